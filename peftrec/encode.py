"""The recipe's prompt applied to a Log: training and evaluation rows as packed token windows."""

from __future__ import annotations

from typing import Any

import numpy as np

from peftrec import config
from peftrec.interactions import drawn_order
from peftrec.prompts import ANSWER_MARK, LINE_END, Codec, Pieces, item_texts
from peftrec.split import Log
from peftrec.timeline import (
    PromptWindows,
    Sight,
    TimelineWindows,
    WindowDataset,
    evaluation_sight,
    training_sight,
)

Question = tuple[list[tuple[str, int]], str]  # history as texts and answers, and the candidate's text
RECORD_TEMPLATE = "{instruction}" + LINE_END + "{input}" + LINE_END + "Answer" + ANSWER_MARK


class Encoder:
    """Turns rows of a Log into windows of tokens.

    Args:
        log: the events.
        prompt: the recipe's section.
        tokenizer: the base model's.
        ties: `isolate` or `order`, see config.Eval.

    Raises:
        DataError: the item template names a column that is not there.
        ModelError: answers that are not one token.
    """

    def __init__(self, log: Log, prompt: config.Prompt, tokenizer: Any, ties: str) -> None:
        self.log, self.prompt, self.ties = log, prompt, ties
        self.codec = Codec(tokenizer, prompt.header, prompt.answers)
        self.texts = [] if log.prompts is not None else item_texts(log.items, prompt.item)
        self.max_item_tokens = max_item_tokens(prompt)
        self.questions = Pieces.of(self.codec.questions(self.texts, self.max_item_tokens) if self.texts else [])

    def train(self, prior: np.ndarray | None) -> WindowDataset:
        """Every training event once, with the earlier training events of its user in sight."""
        sight = training_sight(self.log, liked_only=self._liked, ordered_ties=self._ordered)
        return self._dataset(sight, prior, fill=False)

    def evaluate(self, rows: np.ndarray, history: str, prior: np.ndarray | None) -> WindowDataset:
        """The rows `rows` (indices into the log), each knowing what `history` (streaming or frozen) lets it know."""
        sight = evaluation_sight(
            self.log, rows, streaming=history == "streaming", liked_only=self._liked, ordered_ties=self._ordered
        )
        return self._dataset(sight, prior, fill=True)

    @property
    def template(self) -> str | None:
        """The template in effect: the recipe's, or the default for prompt records."""
        if self.prompt.template is None and self.log.prompts is not None:
            return RECORD_TEMPLATE
        return self.prompt.template

    def example(self) -> Question:
        """A short question as the prompt asks it; for prompt records the first one, whole."""
        if self.log.prompts is not None:
            return [], self._record_texts(np.zeros(1, dtype=np.int64))[0]
        return self.questions_of(1, seed=0)[0]

    def questions_of(self, n: int, seed: int) -> list[Question]:
        """`n` events of the log drawn by `seed`, each with the texts and answers of at most six events before it."""
        drawn = drawn_order(len(self.log), seed, "questions")[:n]
        return [(self._past(row), self.texts[int(self.log.item[row])]) for row in drawn.tolist()]

    def _past(self, row: int) -> list[tuple[str, int]]:
        first = int(np.searchsorted(self.log.user, self.log.user[row]))
        return [
            (self.texts[int(self.log.item[i])], int(self.log.label[i]))
            for i in range(max(first, row - 6), row)
            if self.log.timestamp[i] < self.log.timestamp[row]
        ]

    @property
    def _liked(self) -> bool:
        return self.prompt.history == "liked"

    @property
    def _ordered(self) -> bool:
        return self.ties == "order"

    def _dataset(self, sight: Sight, prior: np.ndarray | None, *, fill: bool) -> WindowDataset:
        prompt = self.prompt
        windows: TimelineWindows | PromptWindows
        if self.log.prompts is not None:
            rows = np.sort(sight.row[sight.read])
            windows = PromptWindows(self.codec, rows, self._record_texts(rows), prompt.max_tokens)
        else:
            single = prompt.layout == "pointwise"
            windows = TimelineWindows(
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
            )
            if prompt.template is not None:
                windows = self._templated(windows)
        return WindowDataset(windows, self.log.label, prior, prompt.max_tokens)

    def _record_texts(self, rows: np.ndarray) -> list[str]:
        assert self.log.prompts is not None
        template = self.template or ""
        picked = self.log.prompts[rows]
        pairs = zip(picked["instruction"].to_list(), picked["input"].to_list(), strict=True)
        return [template.format(instruction=instruction or "", input=text or "") for instruction, text in pairs]

    def _templated(self, windows: TimelineWindows) -> PromptWindows:
        """One prompt by the recipe's template for each window, which holds one read event and what fits before it."""
        rows, texts = [], []
        template = self.prompt.template or ""
        fixed = len(self.codec.prompt(template.format(history="", item=""), self.prompt.max_tokens))
        room = self.prompt.max_tokens - fixed
        length = self.questions.lengths + 1 + len(self.codec.line_end)
        for index in range(len(windows)):
            events = windows.events_of(index)
            item = self.log.item[events]
            # The oldest events go first; the candidate's own text (last) always stays.
            fits = int((np.cumsum(length[item][::-1]) <= room).sum())
            past = events[max(0, len(events) - fits) : -1]
            history = "".join(self._line(row) for row in past.tolist())
            rows.append(int(events[-1]))
            texts.append(template.format(history=history, item=self.texts[int(item[-1])]))
        return PromptWindows(self.codec, np.asarray(rows), texts, self.prompt.max_tokens)

    def _line(self, row: int) -> str:
        answer = self.prompt.answers[int(self.log.label[row])]
        return f"{self.texts[int(self.log.item[row])]}{ANSWER_MARK}{answer}{LINE_END}"


def max_item_tokens(prompt: config.Prompt) -> int:
    """Longest item text (tokens): an eighth of a window, so that a history of at least seven items always fits."""
    return max(8, prompt.max_tokens // 8)


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
