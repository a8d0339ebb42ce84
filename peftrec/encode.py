"""The recipe's prompt applied to a Log: training and evaluation rows as packed token windows."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from peftrec import config, kept
from peftrec.augment import Augment
from peftrec.draws import drawn_order
from peftrec.errors import DataError, ModelError
from peftrec.prompts import (
    ANSWER_MARK,
    LINE_END,
    Codec,
    Kind,
    Pieces,
    Texts,
    WholeText,
    item_texts,
    user_texts,
    with_user,
)
from peftrec.side_vectors import MarkedWindows, OfRun
from peftrec.sight import Sight, evaluation_sight, training_sight
from peftrec.split import TRAIN, Log
from peftrec.timeline import PromptWindows, TextWindows, TimelineWindows, WindowDataset, Wordings

Question = tuple[list[tuple[str, int]], str]  # history as texts and answers, and the candidate's text
AGREEING = 20.0
"""Events that answer as all do, with which an item's share of an answer begins: few events are no agreement."""
RECORD_TEMPLATE = "{instruction}" + LINE_END + "{input}" + LINE_END + "Answer" + ANSWER_MARK


class Encoder:
    """Turns rows of a Log into windows of tokens.

    Args:
        log: the events.
        prompt: the recipe's section.
        tokenizer: the base model's.
        ties: `isolate` or `order`, see config.Eval.
        task: `click` or `rating`.
        shuffle: seed of a random order of each user's events in place of time, see config.Train.order.
        kind: of the base model; all but causal ones need the layout pointwise.
        side: vectors beside the text, or None.

    Raises:
        DataError: the item template names a column that is not there, or answers do not go with the ratings.
        ModelError: answers that are not one token.
    """

    def __init__(
        self,
        log: Log,
        prompt: config.Prompt,
        tokenizer: Any,
        ties: str,
        *,
        task: Literal["click", "rating"] = "click",
        shuffle: int | None = None,
        kind: Kind = "causal",
        side: OfRun | None = None,
    ) -> None:
        self.log, self.prompt, self.ties, self._shuffle, self._side = log, prompt, ties, shuffle, side
        template = RECORD_TEMPLATE if prompt.template is None and log.prompts is not None else prompt.template
        # A template's prompt has no header, whose length would take room from the history.
        header = prompt.header if template is None else ""
        self.codec = task_codec(tokenizer, task, log.scale, header, prompt.answers, kind)
        # The template in effect, None where there is none.
        self.template = self.codec.completed(template) if isinstance(self.codec, WholeText) else template
        self.texts = [] if log.prompts is not None else item_texts(log.items, prompt.item)
        self.max_item_tokens = max_item_tokens(prompt)
        if self.texts and self.template is not None:
            self.texts = self.codec.written(self.texts, self.max_item_tokens)
        self._people: list[str] = []
        if prompt.user is not None:
            assert log.users is not None, "interactions.load(…, with_users=…)"
            self._people = self.codec.written(user_texts(log.users, prompt.user), max_user_tokens(prompt.max_tokens))
        self._key = _key(log, prompt, tokenizer, ties=ties, task=task, shuffle=shuffle, kind=kind)
        items = kept.keep("items", self._key, self._items).arrays
        self.questions = Pieces(items["flat"], items["start"])

    def train(self, prior: np.ndarray | None, augment: Augment | None = None) -> WindowDataset:
        """Every training event once, with its user's earlier training events in sight, in the forms of `augment`."""

        def sight() -> Sight:
            return training_sight(self.log, liked_only=self._liked, ordered_ties=self._ordered, shuffle=self._shuffle)

        worded = augment is not None and bool(self.prompt.paraphrases)
        if augment is not None and worded and (self.template is not None or self.log.prompts is not None):
            wordings = Wordings([self._written(sight(), one) for one in self._templates()], augment)
            return WindowDataset(wordings, self.log.label, prior, self.prompt.max_tokens)
        headers = self._headers() if worded else []
        room = str(max(map(len, headers))) if headers else None
        data = self._dataset(sight, prior, fill=False, rows=None, room=room)
        if augment is not None and isinstance(data.windows, TimelineWindows):
            data.windows.vary(augment, headers, single=self.prompt.layout == "pointwise")
        return data

    def evaluate(self, rows: np.ndarray, history: str, prior: np.ndarray | None) -> WindowDataset:
        """The rows `rows` (indices into the log), each knowing what `history` (streaming or frozen) lets it know."""

        def sight() -> Sight:
            return evaluation_sight(
                self.log,
                rows,
                streaming=history == "streaming",
                liked_only=self._liked,
                ordered_ties=self._ordered,
                shuffle=self._shuffle,
            )

        digest = hashlib.sha256(rows.astype(np.int64).tobytes()).hexdigest()
        return self._dataset(sight, prior, fill=True, rows=digest, history=history)

    def example(self) -> Question:
        """A short question as the prompt asks it; for prompt records the first one, whole."""
        if self.log.prompts is not None:
            (first,) = self._records(np.zeros(1, dtype=np.int64))
            return [], _record_text(self.codec, self.template or "", first)
        return self.questions_of(1, seed=0)[0]

    def questions_of(self, n: int, seed: int) -> list[Question]:
        """`n` events of the log drawn by `seed`, each with texts and answers of what is shown of the six before it."""
        drawn = drawn_order(len(self.log), seed, "questions")[:n]
        return [(self._past(row), self.texts[int(self.log.item[row])]) for row in drawn.tolist()]

    def records_of(self, n: int, seed: int) -> list[dict[str, str]]:
        """`n` of the ready-made prompts, drawn by `seed`."""
        return self._records(np.asarray(drawn_order(len(self.log), seed, "questions")[:n]))

    def opening(self, tokens: int) -> list[int]:
        """A made-up history in the prompt's form: items that training events answer so more often than others do.

        Args:
            tokens: how long it is, or a little longer, as far as there are such items.

        Returns:
            Token ids; none where nothing trains, for records, and for models that read a prompt as a whole.
        """
        train = self.log.split == TRAIN
        if not (self.texts and train.any() and isinstance(self.codec, Codec)):
            return []
        answers, text = len(self.codec.answers), list(self.codec.header)
        pairs = self.log.item[train] * answers + self.log.label[train]
        counts = np.bincount(pairs, minlength=len(self.texts) * answers).reshape(-1, answers)
        usual = counts.sum(axis=0) / counts.sum()
        share = (counts + AGREEING * usual) / (counts.sum(axis=1, keepdims=True) + AGREEING)
        shown = self._shown or range(answers)
        # Each item brings a token at least, so that nobody gets further than this.
        best = [np.argsort(-share[:, label], kind="stable")[:tokens] for label in shown]
        ranked = [items[share[items, label] > usual[label]].tolist() for label, items in zip(shown, best, strict=True)]
        taken: set[int] = set()
        for items in itertools.zip_longest(*ranked):
            for label, item in zip(shown, items, strict=True):
                if item is None or item in taken or len(text) >= tokens:
                    continue
                taken.add(item)
                begin, end = self.questions.start[item : item + 2]
                text += [*self.questions.flat[begin:end].tolist(), *self.codec.tail(label)]
        return text

    def _past(self, row: int) -> list[tuple[str, int]]:
        first = int(np.searchsorted(self.log.user, self.log.user[row]))
        return [
            (self.texts[int(self.log.item[i])], int(self.log.label[i]))
            for i in range(max(first, row - 6), row)
            if self.log.timestamp[i] < self.log.timestamp[row] and int(self.log.label[i]) in self._shown
        ]

    @property
    def _liked(self) -> bool:
        return self.prompt.history == "liked"

    @property
    def _shown(self) -> range:
        """The labels of events that a history shows."""
        return range((self.log.liked_from or 0) if self._liked else 0, len(self.codec.answers))

    @property
    def _ordered(self) -> bool:
        return self.ties == "order"

    def _items(self) -> kept.Kept:
        """Each item's tokens."""
        pieces = Pieces.of(self.codec.questions(self.texts, self.max_item_tokens) if self.texts else [])
        return kept.Kept({"flat": pieces.flat, "start": pieces.start})

    def _dataset(
        self, sight: Callable[[], Sight], prior: np.ndarray | None, *, fill: bool, **asked: str | None
    ) -> WindowDataset:
        """The windows of what `sight` gives, which is not called where windows of the same name were kept."""

        def make() -> kept.Kept:
            made = WindowDataset(self._windows(sight(), fill, **asked), self.log.label, None, self.prompt.max_tokens)
            return kept.Kept(made.kept())

        key = None if self._key is None else kept.key_of(encoder=self._key, fill=fill, asked=asked)
        arrays = kept.keep("windows", key, make).arrays
        rows = Pieces(arrays["packed"], arrays["packed_start"])
        return WindowDataset(self._of(arrays, fill), self.log.label, prior, self.prompt.max_tokens, rows)

    def _of(self, arrays: Mapping[str, np.ndarray], fill: bool) -> TimelineWindows | PromptWindows:
        if "spans" in arrays:
            windows = TimelineWindows.of(arrays, self.log, self.codec, self.questions)
            if self._side is None:
                return windows
            return MarkedWindows(windows, self._side.evaluation if fill else self._side.training)
        return (TextWindows if isinstance(self.codec, WholeText) else PromptWindows).of(arrays)

    def _windows(self, sight: Sight, fill: bool, room: str | None = None, **_: Any) -> TimelineWindows | PromptWindows:
        """The windows of `sight`; `room` is what the longest header takes, where it is not the prompt's own."""
        if self.template is not None or self.log.prompts is not None:
            return self._written(sight, self.template or "", fill)
        return self._cut(sight, fill, None if room is None else int(room))

    def _cut(self, sight: Sight, fill: bool, room: int | None = None) -> TimelineWindows:
        prompt = self.prompt
        single = prompt.layout == "pointwise"
        return TimelineWindows(
            self.log,
            self.codec,
            self.questions,
            sight,
            max_tokens=prompt.max_tokens,
            # Evaluated rows get at least half a window of history; training repeats no more than it must.
            overlap=max(prompt.overlap, prompt.max_tokens // 2) if fill else prompt.overlap,
            fill=fill or single,
            single=single,
            max_history=prompt.max_history,
            header_room=room,
        )

    def _written(self, sight: Sight, template: str, fill: bool = False) -> PromptWindows:
        """Whole prompts by a template."""
        if self.log.prompts is None:
            return self._templated(self._cut(sight, fill), template)
        rows = np.sort(sight.row[sight.read])
        ids = [record_ids(self.codec, template, one, self.prompt.max_tokens) for one in self._records(rows)]
        return prompt_windows(self.codec, rows, ids)

    def _templates(self) -> list[str]:
        """The recipe's template and its paraphrases, as they are in effect."""
        others = self.prompt.paraphrases
        if isinstance(self.codec, WholeText):
            others = [self.codec.completed(one) for one in others]
        return [self.template or "", *others]

    def _headers(self) -> list[list[int]]:
        """The header and its paraphrases as token ids."""
        ended = [one if one.endswith(LINE_END) else one + LINE_END for one in self.prompt.paraphrases]
        return [self.codec.header, *(self.codec.prompt(one) for one in ended)]

    def _records(self, rows: np.ndarray) -> list[dict[str, str]]:
        assert self.log.prompts is not None
        picked = self.log.prompts[rows].select("instruction", "input").fill_null("")
        return picked.to_dicts()

    def _templated(self, windows: TimelineWindows, template: str) -> PromptWindows:
        """One prompt by a template for each window, which holds one read event and what fits before it."""
        rows, ids = [], []
        of_user: dict[int, tuple[str, int]] = {}
        length = self.questions.lengths + self.codec.tail_length
        for index in range(len(windows)):
            events = windows.events_of(index)
            item = self.log.item[events]
            user = int(self.log.user[events[-1]])
            if user not in of_user:
                of_user[user] = self._about(user, template)
            whole, room = of_user[user]
            # The oldest events go first; the candidate's own text (last) always stays.
            fits = int((np.cumsum(length[item][::-1]) <= room).sum())
            past = events[max(0, len(events) - fits) : -1]
            lines = [self._line(row) for row in past.tolist()]
            rows.append(int(events[-1]))
            ids.append(templated_ids(self.codec, whole, lines, self.texts[int(item[-1])], self.prompt.max_tokens))
        return prompt_windows(self.codec, np.asarray(rows), ids)

    def _about(self, user: int, template: str) -> tuple[str, int]:
        """The template with what it says of a user, and the room (tokens) that this leaves for events."""
        template = with_user(template, self._people[user] if self._people else "")
        return template, self.prompt.max_tokens - len(self.codec.prompt(template.format(history="", item="")))

    def _line(self, row: int) -> str:
        answer = self.codec.answer_texts[int(self.log.label[row])]
        return f"{self.texts[int(self.log.item[row])]}{ANSWER_MARK}{answer}{self.codec.line_end_text}"


def _key(log: Log, prompt: config.Prompt, tokenizer: Any, **settings: Any) -> str | None:
    """A hash of all that windows are made of besides what is asked for; None where it cannot be known."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if log.key is None or fast is None:
        return None
    return kept.key_of(
        log=log.key,
        prompt=dataclasses.asdict(prompt),
        tokenizer=hashlib.sha256(fast.to_str().encode()).hexdigest(),
        special=repr((type(tokenizer).__name__, tokenizer.special_tokens_map, tokenizer.chat_template)),
        settings=settings,
    )


def prompt_windows(codec: Texts, rows: np.ndarray, ids: Sequence[list[int]]) -> PromptWindows:
    """Prompts as a model reads them that goes with `codec`: see `PromptWindows` and `TextWindows`."""
    if isinstance(codec, WholeText):
        types = [codec.types(one) for one in ids]
        told = [one for one in types if one is not None]
        return TextWindows(rows, ids, told if len(told) == len(types) and told else None)
    return PromptWindows(rows, ids)


def new_codec(tokenizer: Any, header: str, answers: Sequence[str], kind: Kind) -> Codec | WholeText:
    """The prompt's parts under the tokenizer of a base model of this kind.

    Raises:
        ModelError: an answer that has to be one token is not.
    """
    if kind == "causal":
        return Codec(tokenizer, header, answers)
    return WholeText(tokenizer, header, answers, kind=kind)


def task_codec(
    tokenizer: Any,
    task: Literal["click", "rating"],
    scale: Sequence[float],
    header: str | None = None,
    answers: Sequence[str] | None = None,
    kind: Kind = "causal",
) -> Codec | WholeText:
    """The prompt's parts under a tokenizer, with the task's own header and answers where none are given.

    Ratings are answered by themselves where each is one token, behind a blank or not; where they are not (half stars),
    by the letters from A on, and the header says what the letters at both ends mean.

    Raises:
        DataError: another number of answers than `scale` has values.
        ModelError: an answer is not one token.
    """
    if answers is not None and len(answers) != len(scale):
        shown = ", ".join(f"{value:g}" for value in scale)
        raise DataError(
            f"prompt.answers: {len(answers)} answers for {len(scale)} ratings ({shown}); give one for each, the "
            "lowest first"
        )
    numbers = [f"{value:g}" for value in scale]
    letters = list(string.ascii_uppercase[: len(scale)])
    if answers is not None:
        ways = [list(answers)]
    elif task == "click":
        ways = [[" no", " yes"]]
    else:
        ways = [[f" {number}" for number in numbers], numbers, [f" {letter}" for letter in letters], letters]
    for way in ways[:-1]:
        with contextlib.suppress(ModelError):
            return new_codec(tokenizer, default_header(task, numbers, way) if header is None else header, way, kind)
    way = ways[-1]
    return new_codec(tokenizer, default_header(task, numbers, way) if header is None else header, way, kind)


def default_header(task: str, numbers: Sequence[str], answers: Sequence[str]) -> str:
    """The first line of a prompt: what the lines below it are."""
    if task == "click":
        return "What this person rated, oldest first, and whether they liked each:" + LINE_END
    low, high = (
        answer.strip() if answer.strip() == number else f"{answer.strip()} ({number})"
        for number, answer in ((numbers[0], answers[0]), (numbers[-1], answers[-1]))
    )
    return f"What this person rated, from {low} to {high}:{LINE_END}"


def templated_ids(codec: Texts, template: str, lines: Sequence[str], item: str, max_tokens: int) -> list[int]:
    """The prompt by a recipe's template as token ids, with as many of the newest lines as fit.

    Args:
        codec: the prompt's.
        template: with {history} and {item}; it may hold special tokens.
        lines: earlier events as text, line end included, oldest first.
        item: the candidate's text; this and the lines' are `codec.written`.
        max_tokens: tokens of the prompt at most.

    Raises:
        DataError: template and candidate alone are longer.
    """

    def text(newest: int) -> str:
        return template.format(history="".join(lines[len(lines) - newest :]), item=item)

    ids = codec.fitted(text, len(lines), max_tokens)
    if ids is None:
        raise DataError(
            f"prompt.template: with {item[:40]!r} and no history it takes {len(codec.prompt(text(0)))} tokens; "
            f"expected up to {max_tokens} (prompt.max_tokens); shorten it or raise that"
        )
    return ids


def record_ids(codec: Texts, template: str, record: Mapping[str, str], max_tokens: int) -> list[int]:
    """A ready-made prompt as token ids, cut at the beginning of its input where it is too long.

    The question stands last and the instruction first; only an instruction that is too long by itself is cut at its
    own beginning. Special tokens count in the template alone.
    """
    shown = record.get("input", "")
    ids = codec.fitted(
        lambda last: _record_text(codec, template, {**record, "input": shown[len(shown) - last :]}),
        len(shown),
        max_tokens,
    )
    if ids is None:
        whole = _record_text(codec, template, record)
        ids = codec.fitted(lambda last: whole[len(whole) - last :], len(whole), max_tokens)
    return ids or []


def _record_text(codec: Texts, template: str, record: Mapping[str, str]) -> str:
    return template.format(**{name: codec.plain(text) for name, text in record.items()})


def max_item_tokens(prompt: config.Prompt) -> int:
    """Longest item text (tokens): an eighth of a window, so that a history of at least seven items always fits."""
    return max(8, prompt.max_tokens // 8)


def max_user_tokens(max_tokens: int) -> int:
    """Longest text of a person (tokens): a quarter of a prompt."""
    return max(16, max_tokens // 4)


def whole_users(rows: np.ndarray, user: np.ndarray, limit: int | None, order: np.ndarray) -> np.ndarray:
    """The rows of as many whole users as stay within `limit` rows (at least one user), in row order.

    Args:
        rows: candidates, indices into the log.
        user: user codes of the log, (n,).
        limit: most rows; None keeps all.
        order: user codes in the order in which they are drawn.
    """
    if limit is None or len(rows) <= limit:
        return rows
    count = np.bincount(user[rows], minlength=len(order))
    present = order[count[order] > 0]
    taken = present[: max(1, int((np.cumsum(count[present]) <= limit).sum()))]
    return rows[np.isin(user[rows], taken)]
