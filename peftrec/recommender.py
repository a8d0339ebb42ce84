"""Recommender: a saved adapter on its base model, asked about people and items by their names.

r = Recommender.from_pretrained("runs/ml-100k-click-lora/adapter")
r.score(["Toy Story (1995):yes", "GoldenEye (1995):no"], ["Heat (1995)", "Babe (1995)"])
r.rank(["Toy Story (1995):yes"], k=10)
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from peftrec import adapters, artifact, backbone, config, scorer, virtual_tokens
from peftrec.catalogue import Catalogue, Item, read_history, read_items, read_ratings
from peftrec.datasets import DATASETS
from peftrec.encode import max_user_tokens, new_codec, prompt_windows, record_ids, templated_ids
from peftrec.errors import ConfigError, DataError, ModelError
from peftrec.opponents import SavedPrior
from peftrec.prompts import ANSWER_MARK, Codec, Pieces, user_texts, with_user
from peftrec.rating_baselines import RatingPrior
from peftrec.schema import read_yaml
from peftrec.target import Target
from peftrec.timeline import WindowDataset

Floats = npt.NDArray[np.float64]
Outputs = npt.NDArray[np.float32]  # of the head, (number of candidates, K)

UNKNOWN = "\0"  # stands for an item without id: no table holds it, so the prior takes the mean


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


@dataclass(frozen=True)
class Event:
    """One entry of a history, as it was understood: the item and the index of its answer."""

    item: Item
    label: int


class Recommender:
    """Scores and ranks items for a person by that person's history.

    A score is the log-odds that the person likes the item, or the rating that the person would give, as the adapter's
    task has it.

    Most people want `from_pretrained`; the constructor takes parts that are already loaded.

    A history is a list, oldest first, and may be empty. Its entries are `"Toy Story (1995):yes"`, pairs such as
    `("Toy Story (1995)", "yes")` or `(1, 0)`, or dicts with `label` or `rating`: see `catalogue.read_history`. Titles
    and ids are looked up in the items table: see `catalogue.Catalogue.find`. Its oldest events are left out where it is
    longer than the prompt.

    Args:
        about: the adapter's `peftrec.json`.
        model: base model with adapter and answer head.
        tokenizer: the base model's.
        items: the items table, or None.
        prior: what is added to the model's score, or None.

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
        *,
        items: Any = None,
        prior: SavedPrior | None = None,
    ) -> None:
        self.artifact, self.model, self.prior = about, model, prior
        self.prompt = about.prompt
        self.target = _target(about)
        backbone.check_window(model, self.prompt.max_tokens, virtual_tokens.count(model))
        self.codec = new_codec(tokenizer, self.prompt.header, self.prompt.answers, self.prompt.kind)
        if self.codec.answers != self.prompt.answer_ids or (tokenizer.bos_token or None) != self.prompt.bos:
            raise ModelError(
                f"tokenizer: answers {self.prompt.answers} are the tokens {self.codec.answers} behind "
                f"{tokenizer.bos_token!r}; the adapter was trained with {self.prompt.answer_ids} behind "
                f"{self.prompt.bos!r}; load it on the base model that it names, {about.base_model.hub_id}"
            )
        self.catalogue = Catalogue(items, self.prompt.item, ids_matter=prior is not None)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        items: Any = None,
        columns: dict[str, str] | None = None,
        base_model: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        prior: bool = True,
        strict: bool = False,
        trust_remote_code: bool = False,
        quantize: Literal["4bit", "8bit"] | None = None,
    ) -> Recommender:
        """Load an adapter that peftrec saved.

        Args:
            folder: the adapter's folder, RUN/adapter.
            items: the items table (a file, a polars or a pandas frame); None takes that of the data set that the
                adapter was trained on where peftrec knows it by name, else there is none.
            columns: our name -> name in the items table.
            base_model: a folder, Hub id or packaged model to use instead of the one that the adapter names; not needed
                while the adapter lies in the folder of its run, whose recipe knows.
            device: as in torch; None is the GPU if there is one.
            dtype: of the base weights, float32, bfloat16 or float16; None is that of the training.
            prior: whether the saved prior is added to the model's score.
            strict: refuse a base model with other weights than those of the training; else only warn.
            trust_remote_code: run Python code that comes with the base model; no file can say so, only the caller.
            quantize: load the base model in 4 or 8 bits, whatever it was trained in: less memory, other scores.

        Raises:
            ModelError: no adapter in the folder, or it does not fit the base model.
            AssetError: a packaged base model or a named data set cannot be fetched.
            DataError: the items table cannot be used.
        """
        about = artifact.read(folder)
        saved_prior = artifact.read_prior(folder, about) if prior else None
        table = _items(items, columns, about)
        base = base_model or _base_of_run(Path(folder))
        loaded = _load_base(about, base, dtype, trust_remote_code, quantize)
        _check_fingerprint(about, loaded.base, strict)
        model = scorer.with_head(loaded.model, about.target.head, about.prompt.answer_ids)
        model = adapters.load(model, folder)
        if device is not None:
            model = model.to(device)
        return cls(about, model, loaded.tokenizer, items=table, prior=saved_prior)

    def score(self, history: Sequence[Any], candidates: Sequence[Any], user: Any = None) -> Floats:
        """Log-odds that the person likes each candidate, or predicted ratings, (number of candidates,).

        A candidate's score depends neither on the other candidates nor on their order.

        Args:
            history: what the person met, oldest first.
            candidates: titles, item ids or dicts. For an adapter of ready-made prompts: dicts with `instruction` and
                `input`, and no history.
            user: what is known of the person, where the adapter's prompt shows that: a dict of columns as in
                `artifact.prompt.user`, or the text; None is nothing.

        Raises:
            DataError: an entry that cannot be read, or an item id that is not in the items table.
        """
        if self._own_prompts:
            return self._score_records(history, candidates)
        return self._score_items(self.events(history), self._find(candidates), self._about(user))

    def probability(self, history: Sequence[Any], candidates: Sequence[Any], user: Any = None) -> Floats:
        """Chance that the person likes each candidate, (number of candidates,); otherwise as `score`.

        Raises:
            DataError: the adapter predicts ratings.
        """
        if self.artifact.task == "rating":
            raise DataError("probability: this adapter predicts ratings; use score")
        return _sigmoid(self.score(history, candidates, user))

    def rank(
        self,
        history: Sequence[Any],
        candidates: Sequence[Any] | None = None,
        k: int = 10,
        exclude_seen: bool = True,
        user: Any = None,
    ) -> list[Recommendation]:
        """The `k` best candidates, best first.

        Args:
            history: what the person met, oldest first.
            candidates: as in `score`; None is the whole items table.
            k: how many; fewer where there are fewer candidates.
            exclude_seen: leave out what is in the history.
            user: as in `score`.

        Raises:
            DataError: as `score`, or neither candidates nor an items table are given.
        """
        if k < 1:
            raise DataError(f"k: {k}; expected a whole number from 1")
        if self._own_prompts:
            if candidates is None:
                raise DataError("candidates: none given; this adapter was trained on ready-made prompts: give some")
            scores = self._score_records(history, candidates)
            found = [Item(str(one.get("input", one)), one.get("item_id"), None, one) for one in candidates]
        else:
            events = self.events(history)
            seen = {event.item.key for event in events} if exclude_seen else set()
            found = [item for item in self._all_items(candidates) if item.key not in seen]
            scores = self._score_items(events, found, self._about(user))
        best = np.argsort(-scores, kind="stable")[:k]
        chances = [None] * len(best) if self.artifact.task == "rating" else _sigmoid(scores[best]).tolist()
        return [
            Recommendation(found[i].given, found[i].item_id, found[i].text, float(scores[i]), chance)
            for i, chance in zip(best, chances, strict=True)
        ]

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

    def _find(self, candidates: Sequence[Any]) -> list[Item]:
        if isinstance(candidates, (str, dict)):
            raise DataError(f"candidates: {candidates!r}; expected a list; put it in a list")
        return [self.catalogue.find(entry, f"candidates[{i}]") for i, entry in enumerate(candidates)]

    def _all_items(self, candidates: Sequence[Any] | None) -> list[Item]:
        if candidates is not None:
            return self._find(candidates)
        if not len(self.catalogue):
            raise DataError("candidates: none given, and there is no items table to rank; give candidates or items")
        return [self.catalogue.at(row) for row in range(len(self.catalogue))]

    # --- scoring ------------------------------------------------------------------------------------------------------

    def _about(self, user: Any) -> str:
        """The person's text."""
        if user is None:
            return ""
        if self.prompt.user is None:
            raise DataError("user: this adapter's prompt shows nothing of the person; leave it out")
        if isinstance(user, dict):
            (user,) = user_texts(pl.DataFrame([user], strict=False), self.prompt.user)
        return self.codec.written([" ".join(str(user).split())], max_user_tokens(self.prompt.max_tokens))[0]

    def _score_items(self, events: Sequence[Event], candidates: Sequence[Item], user: str) -> Floats:
        shown = [event for event in events if self.prompt.history == "all" or self._liked(event)]
        if self.prompt.max_history is not None:
            shown = shown[max(0, len(shown) - self.prompt.max_history) :]
        if not candidates:
            return np.zeros(0)
        texts = [item.text for item in candidates]
        if self.prompt.template is None:
            outputs = self._score_timeline(shown, texts)
        else:
            outputs = self._score_templated(shown, texts, with_user(self.prompt.template, user))
        return self.target.measure(outputs, self._prior_scores(events, candidates))[0]

    def _liked(self, event: Event) -> bool:
        value, like_at = self.target.scale[event.label], self.artifact.like_at
        return event.label == 1 if self.artifact.task == "click" else like_at is not None and value >= like_at

    def _prior_scores(self, events: Sequence[Event], candidates: Sequence[Item]) -> Floats | None:
        """The prior knows the whole history, also what the prompt leaves out."""
        if self.prior is None:
            return None
        met = [_prior_id(event.item) for event in events]
        asked = [_prior_id(item) for item in candidates]
        labels = [event.label for event in events]
        if isinstance(self.prior, RatingPrior):
            return self.prior.scores(met, [self.target.scale[label] for label in labels], asked)
        return self.prior.scores(met, labels, asked)

    def _score_timeline(self, shown: Sequence[Event], candidates: Sequence[str]) -> Outputs:
        """The history once, all candidates behind it."""
        assert isinstance(self.codec, Codec)
        asked = self._questions([event.item.text for event in shown])
        lines = [[*ids, *self.codec.tail(event.label)] for ids, event in zip(asked, shown, strict=True)]
        # Room for the longest candidate that could be: what one candidate sees must not depend on the others.
        room = self.prompt.max_tokens - len(self.codec.header) - self.prompt.max_item_tokens - len(self.codec.tail(0))
        kept = _newest([len(line) for line in lines], room)
        history = [*self.codec.header, *(token for line in lines[len(lines) - kept :] for token in line)]
        pieces = Pieces.of(self._questions(candidates))
        return scorer.score_candidates(self.model, np.asarray(history, dtype=np.int64), pieces)

    def _score_templated(self, shown: Sequence[Event], candidates: Sequence[str], template: str) -> Outputs:
        """One prompt for each candidate, with as many of the newest events as fit."""
        prompt, tail = self.prompt, self.codec.tail_length
        past, asked = self._written([event.item.text for event in shown]), self._written(candidates)
        lengths = [len(ids) + tail for ids in self._questions(past)]
        room = prompt.max_tokens - len(self.codec.prompt(template.format(history="", item="")))
        lines = [
            f"{text}{ANSWER_MARK}{prompt.answers[event.label]}{prompt.line_end}"
            for text, event in zip(past, shown, strict=True)
        ]
        prompts = []
        for text, ids in zip(asked, self._questions(asked), strict=True):
            kept = _newest(lengths, room - len(ids) - tail)
            prompts.append(templated_ids(self.codec, template, lines[len(lines) - kept :], text, prompt.max_tokens))
        return self._score_prompts(prompts)

    def _written(self, texts: Sequence[str]) -> list[str]:
        return self.codec.written(texts, self.prompt.max_item_tokens) if texts else []

    def _questions(self, texts: Sequence[str]) -> list[list[int]]:
        return self.codec.questions(texts, self.prompt.max_item_tokens) if texts else []

    def _score_prompts(self, prompts: Sequence[list[int]]) -> Outputs:
        windows = prompt_windows(self.codec, np.arange(len(prompts)), prompts)
        data = WindowDataset(windows, np.zeros(len(prompts), dtype=np.int8), None, self.prompt.max_tokens)
        rows, outputs = scorer.score_rows(self.model, data, range(len(data)))
        return outputs[np.argsort(rows)]

    @property
    def _own_prompts(self) -> bool:
        """Whether the adapter was trained on ready-made prompts, which know neither items nor histories."""
        return self.prompt.template is not None and "item" not in config.placeholders(self.prompt.template)

    def _score_records(self, history: Sequence[Any], candidates: Sequence[Any]) -> Floats:
        if len(history):
            raise DataError("history: this adapter was trained on ready-made prompts; put the history into the input")
        names = config.placeholders(self.prompt.template or "")
        for i, record in enumerate(candidates):
            if not isinstance(record, dict) or any(name not in record for name in names):
                raise DataError(f"candidates[{i}]: {record!r}; expected a dict with {', '.join(names)}")
        records = [{name: str(record[name]) for name in names} for record in candidates]
        template, most = self.prompt.template or "", self.prompt.max_tokens
        if not records:
            return np.zeros(0)
        outputs = self._score_prompts([record_ids(self.codec, template, record, most) for record in records])
        return self.target.measure(outputs)[0]


def _newest(lengths: Sequence[int], room: int) -> int:
    """How many of the last `lengths` fit into `room` together."""
    return int((np.cumsum(np.asarray(lengths, dtype=np.int64)[::-1]) <= room).sum())


def _prior_id(item: Item) -> Any:
    return UNKNOWN if item.item_id is None else item.item_id


def _sigmoid(log_odds: Floats) -> Floats:
    # This form neither overflows nor loses small chances.
    chance: Floats = np.exp(-np.logaddexp(0, -log_odds))
    return chance


def _items(items: Any, columns: dict[str, str] | None, about: artifact.Artifact) -> Any:
    if items is not None:
        return read_items(items, columns)
    named = DATASETS.get(about.data.name)
    return None if named is None else read_items(named.load().items)


def _base_of_run(folder: Path) -> str | None:
    """The local base model of the run that the adapter still lies in: `peftrec.json` itself names no path."""
    recipe = folder.parent / "config.yaml"
    if not recipe.is_file():
        return None
    try:
        name = config.parse_recipe(read_yaml(recipe), str(recipe)).model.name
    except ConfigError:  # the file of some other program, or of another version
        return None
    return name if Path(name).is_dir() else None


def _target(about: artifact.Artifact) -> Target:
    how = about.target
    return Target(about.task, how.head, how.loss, tuple(how.scale), tuple(how.offset), how.slope, how.centre)


def _load_base(
    about: artifact.Artifact,
    base_model: str | Path | None,
    dtype: str | None,
    trust_remote_code: bool,
    quantize: str | None,
) -> backbone.Backbone:
    if dtype is not None and dtype not in backbone.DTYPES:
        raise ModelError(f"dtype: {dtype!r}; expected one of {', '.join(backbone.DTYPES)}")
    if quantize not in (None, "4bit", "8bit"):
        raise ModelError(f"quantize: {quantize!r}; expected 4bit, 8bit or None")
    base = about.base_model
    wanted = config.Model(
        name=base.name if base_model is None else str(base_model),
        revision=base.revision if base_model is None else None,
        dtype=dtype or base.dtype,  # type: ignore[arg-type]
        trust_remote_code=trust_remote_code,
        load_in_4bit=quantize == "4bit",
        load_in_8bit=quantize == "8bit",
    )
    try:
        loaded = backbone.load(wanted, _target(about))
    except ModelError as error:
        if base_model is not None:
            raise
        raise ModelError(f"{error}; or say where it is: base_model=FOLDER (--base-model FOLDER)") from error
    if loaded.kind != about.prompt.kind:
        raise ModelError(
            f"base model: {wanted.name} is of the kind {loaded.kind}; the adapter was trained on one of the kind "
            f"{about.prompt.kind}; use that"
        )
    return loaded


def _check_fingerprint(about: artifact.Artifact, found: backbone.BaseModel, strict: bool) -> None:
    expected = about.base_model
    if found.fingerprint == expected.fingerprint:
        return
    text = (
        f"base model: {found.name} has weights with fingerprint {found.fingerprint[:16]}; the adapter was trained on "
        f"{expected.name} with {expected.fingerprint[:16]}"
        + (f" ({expected.note})" if expected.note else "")
        + "; scores may differ from the published ones"
    )
    if strict:
        raise ModelError(f"{text}; load that base model, or load without strict")
    warnings.warn(text, stacklevel=3)
