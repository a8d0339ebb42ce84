"""One adapter on its base model: what it is asked, in its own words, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from peftrec import artifact, backbone, scorer, side, side_vectors, values, virtual_tokens
from peftrec.catalogue import Catalogue, Item, check_list, read_history, read_ratings
from peftrec.encode import max_user_tokens, new_codec, prompt_windows, record_ids, templated_ids
from peftrec.errors import DataError, ModelError
from peftrec.metrics import chances
from peftrec.opponents import SavedPrior
from peftrec.prompts import ANSWER_MARK, Codec, Pieces, user_texts, with_user
from peftrec.side_vectors import BITS, Asked, Sources, Table
from peftrec.target import Target
from peftrec.timeline import WindowDataset

Floats = npt.NDArray[np.float64]
Outputs = npt.NDArray[np.float32]  # of the head, (number of candidates, K)

UNKNOWN = "\0"  # stands for an item without id: no table holds it, so the prior takes the mean


@dataclass(frozen=True)
class Event:
    """One entry of a history, as it was understood: the item and the index of its answer."""

    item: Item
    label: int


@dataclass(frozen=True)
class Question:
    """A history and candidates as they were understood.

    Attributes:
        events: oldest first.
        candidates: what is to be scored; of an adapter of ready-made prompts, `given` is the record.
        user: the person's text.
        vector: the person's vector, or None.
    """

    events: Sequence[Event]
    candidates: Sequence[Item]
    user: str = ""
    vector: Sequence[float] | None = None


@dataclass(frozen=True)
class Recommendation:
    """One ranked item.

    Attributes:
        item: the candidate as it was given; the items table's row as a dict where the whole table was ranked.
        item_id: its id, None where it is not in an items table and nobody gave one.
        title: the item as the model reads it.
        score: log-odds that the person likes it, or the predicted rating.
        probability: chance that the person likes it; None where ratings are predicted.
    """

    item: Any
    item_id: Any
    title: str
    score: float
    probability: float | None = None


class LoadedAdapter:
    """Understands histories and candidates, and scores them.

    Args:
        about: the adapter's `peftrec.json`.
        model: base model with adapter and answer head.
        tokenizer: the base model's.
        items: the items table, or None.
        prior: what is added to the model's score, or None.
        sources: side vectors, whose projectors the model has, or None.

    Raises:
        ModelError: the tokenizer gives the answers other ids than the adapter was trained with, or the prompt is longer
            than the model.
        DataError: the items table lacks a column that the prompt shows.
    """

    def __init__(
        self,
        about: artifact.Artifact,
        model: Any,
        tokenizer: Any,
        items: Any,
        prior: SavedPrior | None,
        sources: Sources | None = None,
    ) -> None:
        self.artifact, self.model, self.prior, self.sources = about, model, prior, sources or {}
        self.prompt = about.prompt
        self.target = target_of(about)
        backbone.check_window(model, self.prompt.max_tokens, virtual_tokens.count(model))
        self.codec = new_codec(tokenizer, self.prompt.header, self.prompt.answers, self.prompt.kind)
        if self.codec.answers != self.prompt.answer_ids or (tokenizer.bos_token or None) != self.prompt.bos:
            raise ModelError(
                f"tokenizer: answers {self.prompt.answers} are the tokens {self.codec.answers} behind "
                f"{tokenizer.bos_token!r}; the adapter was trained with {self.prompt.answer_ids} behind "
                f"{self.prompt.bos!r}; load it on the base model that it names, {about.base_model.hub_id}"
            )
        self.catalogue = Catalogue(items, self.prompt.item, ids_matter=prior is not None or bool(sources))

    # --- what is asked ------------------------------------------------------------------------------------------------

    def events(self, history: Sequence[Any]) -> list[Event]:
        """The history as it is understood: which items were meant, and whether each was liked or how it was rated.

        Raises:
            DataError: an entry that cannot be read.
        """
        answers = self.prompt.answers
        if self.artifact.task == "rating":
            entries = read_ratings(history, self.target.scale, answers)
        else:
            entries = read_history(history, self.artifact.like_at, answers)
        found = [(self.catalogue.find(entry, f"history[{i}]"), label) for i, (entry, label) in enumerate(entries)]
        return [Event(item, label) for item, label in found]

    def question(
        self, history: Sequence[Any], candidates: Sequence[Any] | None, user: Any = None, *, unseen: bool = False
    ) -> Question:
        """What `Recommender.score` was asked.

        Args:
            history: as there.
            candidates: as there; None is the whole items table.
            user: as there.
            unseen: leave out candidates that are in the history.

        Raises:
            DataError: something in it cannot be read, or there is nothing to score.
        """
        if candidates is not None:
            check_list(candidates, "candidates")
        if self.own_prompts:
            if user is not None:
                raise DataError("user: this adapter was trained on ready-made prompts; put the person into the input")
            return Question([], self._records(history, candidates))
        events = self.events(history)
        seen = {event.item.key for event in events} if unseen else set()
        found = [item for item in self._items(candidates) if item.key not in seen]
        if "users" in self.sources:
            return Question(events, found, vector=_vector(user))
        return Question(events, found, self._about(user))

    def _items(self, candidates: Sequence[Any] | None) -> list[Item]:
        if candidates is not None:
            return [self.catalogue.find(entry, f"candidates[{i}]") for i, entry in enumerate(candidates)]
        if not len(self.catalogue):
            raise DataError("candidates: none given, and there is no items table to rank; give candidates or items")
        return self.catalogue.all()

    @property
    def own_prompts(self) -> bool:
        """Whether the adapter was trained on ready-made prompts, which know neither items nor histories."""
        return self.prompt.template is not None and "item" not in values.placeholders(self.prompt.template)

    def _records(self, history: Sequence[Any], candidates: Sequence[Any] | None) -> list[Item]:
        if candidates is None:
            raise DataError("candidates: none given; this adapter was trained on ready-made prompts: give some")
        if len(history):
            raise DataError("history: this adapter was trained on ready-made prompts; put the history into the input")
        names = values.placeholders(self.prompt.template or "")
        for i, record in enumerate(candidates):
            if not isinstance(record, dict) or any(name not in record for name in names):
                raise DataError(f"candidates[{i}]: {record!r}; expected a dict with {', '.join(names)}")
        return [Item(str(one.get("input", one)), one.get("item_id"), None, one) for one in candidates]

    def _about(self, user: Any) -> str:
        """The person's text."""
        if user is None:
            return ""
        if self.prompt.user is None:
            raise DataError("user: this adapter's prompt shows nothing of the person; leave it out")
        if isinstance(user, Mapping):
            (user,) = user_texts(pl.DataFrame([dict(user)], strict=False), self.prompt.user)
        if not isinstance(user, str):
            raise DataError(f"user: a {type(user).__name__}; expected a dict of columns, or the text")
        return self.codec.written([" ".join(user.split())], max_user_tokens(self.prompt.max_tokens))[0]

    # --- what is answered ---------------------------------------------------------------------------------------------

    def score(self, questions: Sequence[Question]) -> list[Floats]:
        """Log-odds of a like, or predicted ratings, of each question's candidates, (number of candidates,) each."""
        found = self._outputs(questions)
        return [
            self.target.calibrated(self.target.measure(outputs, self.prior_scores(one))[0])
            if len(outputs)
            else np.zeros(0)
            for one, outputs in zip(questions, found, strict=True)
        ]

    def probability(self, question: Question) -> Floats:
        """Chances of a like, (number of candidates,).

        Raises:
            DataError: the adapter predicts ratings.
        """
        if self.artifact.task == "rating":
            raise DataError("probability: this adapter predicts ratings; use score")
        return chances(self.score([question])[0])

    def rank(self, question: Question, k: int) -> list[Recommendation]:
        """The `k` best candidates, best first.

        Raises:
            DataError: `k` is no whole number from 1.
        """
        check_k(k)
        (scores,) = self.score([question])
        return self.best(question.candidates, scores, k)

    def best(self, candidates: Sequence[Item], scores: Floats, k: int) -> list[Recommendation]:
        """The `k` candidates of the highest scores, best first.

        Raises:
            DataError: `k` is no whole number from 1.
        """
        check_k(k)
        best = np.argsort(-scores, kind="stable")[:k]
        likely = [None] * len(best) if self.artifact.task == "rating" else chances(scores[best]).tolist()
        found = [candidates[i] for i in best]
        return [
            Recommendation(item.given, item.item_id, item.text, score, chance)
            for item, score, chance in zip(found, scores[best].tolist(), likely, strict=True)
        ]

    def probe_scores(self) -> Floats:
        """What is answered to the artifact's own probes, without prior and calibration, (number of probes,)."""
        questions = [_asked_again(probe) for probe in self.artifact.probes]
        questions += [self.question([], [one.record]) for one in self.artifact.record_probes]
        found = [self.target.measure(outputs)[0] for outputs in self._outputs(questions)]
        return np.concatenate([np.zeros(0), *found])

    def prior_scores(self, question: Question) -> Floats | None:
        """What is added to the model's scores, (number of candidates,), or None.

        It knows the whole history, also what the prompt leaves out.
        """
        if self.prior is None or self.own_prompts:
            return None
        met = [_prior_id(event.item) for event in question.events]
        asked = [_prior_id(item) for item in question.candidates]
        answers = [self.target.scale[event.label] for event in question.events]
        return self.prior.scores(met, answers, asked)

    def _outputs(self, questions: Sequence[Question]) -> list[Outputs]:
        if self.prompt.template is None:
            questions, table = self._numbered(questions)
            histories = [self._history(one) for one in questions]
            pieces = [Pieces.of(self._lines(one.candidates)) for one in questions]
            with side.asked(table):
                return scorer.score_requests(self.model, histories, pieces)
        prompts = [self._prompts(one) for one in questions]
        ends = np.cumsum([0, *(len(one) for one in prompts)]).tolist()
        outputs = self._read([ids for one in prompts for ids in one])
        return [outputs[begin:end] for begin, end in pairwise(ends)]

    def _numbered(self, questions: Sequence[Question]) -> tuple[Sequence[Question], Table | None]:
        """The questions with the numbers of their side vectors, and these."""
        if not self.sources:
            return questions, None
        asked = [
            Asked(
                [event.item.item_id for event in one.events],
                [event.label for event in one.events],
                [item.item_id for item in one.candidates],
                one.vector,
            )
            for one in questions
        ]
        table, numbers = side_vectors.number(self.sources, asked)
        return [_with_numbers(one, own.tolist()) for one, own in zip(questions, numbers, strict=True)], table

    def _shown(self, events: Sequence[Event]) -> list[Event]:
        shown = [event for event in events if self.prompt.history == "all" or self._liked(event)]
        most = self.prompt.max_history
        return shown if most is None else shown[max(0, len(shown) - most) :]

    def _liked(self, event: Event) -> bool:
        value, like_at = self.target.scale[event.label], self.artifact.like_at
        return event.label == 1 if self.artifact.task == "click" else like_at is not None and value >= like_at

    def _history(self, question: Question) -> npt.NDArray[np.int64]:
        """Header and as many of the newest events as fit, as token ids."""
        assert isinstance(self.codec, Codec)
        shown = self._shown(question.events)
        asked = self._lines([event.item for event in shown])
        lines = [[*ids, *self.codec.tail(event.label)] for ids, event in zip(asked, shown, strict=True)]
        # Room for the longest candidate that could be: what one candidate sees must not depend on the others.
        room = self.prompt.max_tokens - len(self.codec.header) - self.prompt.max_item_tokens - len(self.codec.tail(0))
        kept = _newest([len(line) for line in lines], room)
        ids = [*self.codec.header, *(token for line in lines[len(lines) - kept :] for token in line)]
        return np.asarray(ids, dtype=np.int64)

    def _prompts(self, question: Question) -> list[list[int]]:
        """One prompt for each candidate, with as many of the newest events as fit."""
        prompt, tail = self.prompt, self.codec.tail_length
        template = prompt.template or ""
        if self.own_prompts:
            names = values.placeholders(template)
            records = [{name: str(item.given[name]) for name in names} for item in question.candidates]
            return [record_ids(self.codec, template, record, prompt.max_tokens) for record in records]
        template = with_user(template, question.user)
        shown = self._shown(question.events)
        past = self._written([event.item.text for event in shown])
        asked = self._written([item.text for item in question.candidates])
        lengths = [len(ids) + tail for ids in self._tokens(past)]
        room = prompt.max_tokens - len(self.codec.prompt(template.format(history="", item="")))
        lines = [
            f"{text}{ANSWER_MARK}{prompt.answers[event.label]}{prompt.line_end}"
            for text, event in zip(past, shown, strict=True)
        ]
        prompts = []
        for text, ids in zip(asked, self._tokens(asked), strict=True):
            kept = _newest(lengths, room - len(ids) - tail)
            prompts.append(templated_ids(self.codec, template, lines[len(lines) - kept :], text, prompt.max_tokens))
        return prompts

    def _written(self, texts: Sequence[str]) -> list[str]:
        return self.codec.written(texts, self.prompt.max_item_tokens) if texts else []

    def _lines(self, items: Sequence[Item]) -> list[list[int]]:
        """Token ids of items' questions, with the numbers of their side vectors."""
        asked = self._tokens([item.text for item in items])
        return [[*ids[:-1], ids[-1] + (item.number << BITS)] for ids, item in zip(asked, items, strict=True)]

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return self.codec.questions(texts, self.prompt.max_item_tokens) if texts else []

    def _read(self, prompts: Sequence[list[int]]) -> Outputs:
        if not prompts:
            return np.zeros((0, 1), dtype=np.float32)
        windows = prompt_windows(self.codec, np.arange(len(prompts)), prompts)
        data = WindowDataset(windows, np.zeros(len(prompts), dtype=np.int8), None, self.prompt.max_tokens)
        rows, outputs = scorer.score_rows(self.model, data, range(len(data)))
        return outputs[np.argsort(rows)]


def check_k(k: int) -> None:
    """See whether so many can be recommended.

    Raises:
        DataError: `k` is no whole number from 1.
    """
    if not isinstance(k, (int, np.integer)) or isinstance(k, bool) or k < 1:
        raise DataError(f"k: {k!r}; expected a whole number from 1")


def target_of(about: artifact.Artifact) -> Target:
    """What the outputs of a saved adapter mean."""
    how = about.target
    knots = tuple((x, y) for x, y in how.calibration)
    return Target(about.task, how.head, how.loss, tuple(how.scale), tuple(how.offset), how.slope, how.centre, knots)


def _newest(lengths: Sequence[int], room: int) -> int:
    """How many of the last `lengths` fit into `room` together."""
    return int((np.cumsum(np.asarray(lengths, dtype=np.int64)[::-1]) <= room).sum())


def _prior_id(item: Item) -> Any:
    return UNKNOWN if item.item_id is None else item.item_id


def _as_read(text: str, item_id: str | None = None) -> Item:
    """The item of a text that is word for word what the model reads."""
    return Item(text, item_id, None, text)


def _asked_again(probe: artifact.Probe) -> Question:
    ids = probe.items or [None] * (len(probe.history) + 1)
    met = [Event(_as_read(text, one), answer) for (text, answer), one in zip(probe.history, ids[:-1], strict=True)]
    return Question(met, [_as_read(probe.candidate, ids[-1])])


def _with_numbers(question: Question, numbers: Sequence[int]) -> Question:
    count = len(question.events)
    return replace(
        question,
        events=[
            replace(event, item=replace(event.item, number=one))
            for event, one in zip(question.events, numbers[:count], strict=True)
        ],
        candidates=[replace(item, number=one) for item, one in zip(question.candidates, numbers[count:], strict=True)],
    )


def _vector(user: Any) -> Sequence[float] | None:
    """The person's vector in what was given of the person."""
    if user is None:
        return None
    if not isinstance(user, Mapping) or "vector" not in user:
        raise DataError(f"user: {user!r}; this adapter knows people by a vector; expected {{'vector': [numbers]}}")
    found: Sequence[float] = user["vector"]
    return found
