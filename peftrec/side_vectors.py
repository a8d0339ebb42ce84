"""Vectors beside the text: which there are, which event has which, and how an adapter keeps them.

An event's vectors have one number, which stands in its token ids: the id of the token that ends its question is
`number << BITS | id`. Whatever moves, caches and packs token ids moves the vectors with them, and the same ids mean the
same vectors. `side.SideTokens` looks the numbers up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from peftrec import config, side_als
from peftrec.errors import DataError, ModelError
from peftrec.factors import Items
from peftrec.side_als import Factors
from peftrec.side_files import BROKEN, MOST_SIZE, Singles, read_vectors, texts
from peftrec.timeline import TimelineWindows

if TYPE_CHECKING:
    from peftrec.artifact import Artifact
    from peftrec.split import Log

FILE = "side.safetensors"
BITS = 20
"""Of a token's own id: a million is more than any vocabulary has."""
_DIGEST = 5  # bytes of a number: 40 bits above the 20 of the token
_LEAST_DEVIATION = 1e-6

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """What one source says of numbered vectors.

    Attributes:
        vectors: standardised (r, size).
        row: of each number, in them (m,); -1 where the source says nothing.
    """

    vectors: Singles
    row: Ints


@dataclass(frozen=True)
class Table:
    """Numbered vectors.

    Attributes:
        numbers: ascending, from 1 (m,).
        parts: source -> what it says of them.
    """

    numbers: Ints
    parts: Mapping[str, Part]


@dataclass(frozen=True)
class Scaling:
    """What standardises vectors (size,): each number's mean and deviation."""

    mean: Singles
    deviation: Singles

    @classmethod
    def of(cls, vectors: Singles) -> Scaling:
        """That of these vectors (m, size); a number that never differs is left as it is."""
        deviation = vectors.std(axis=0)
        return cls(vectors.mean(axis=0), np.where(deviation > _LEAST_DEVIATION, deviation, 1).astype(np.float32))

    def apply(self, vectors: Singles) -> Singles:
        """Standardised vectors (m, size)."""
        return ((vectors - self.mean) / self.deviation).astype(np.float32)


@dataclass(frozen=True)
class Source:
    """One source of vectors, as an adapter keeps it.

    Attributes:
        scaling: of its vectors.
        ids: of items, as text; empty for a source of people, whom no adapter names.
        vectors: of these items as they were given (m, size); of `als`, effect and factors.
        factors: of `als`.
    """

    scaling: Scaling
    ids: tuple[str, ...] = ()
    vectors: Singles | None = None
    factors: Factors | None = None

    def rows(self, ids: Sequence[Any]) -> Ints:
        """Rows of `vectors` of items (n,); -1 where an item is not known."""
        return np.asarray([-1 if one is None else self._places.get(str(one), -1) for one in ids], dtype=np.int64)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.ids)}


Sources = dict[str, Source]
"""By name: `als`, `items_0`, `items_1` …, `users`."""


# --- for the events of a run ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OfRun:
    """The vectors of a run.

    Attributes:
        table: all of them.
        training: number of each event of the log as training shows it (n,); 0 has none.
        evaluation: the same as evaluation shows it.
        sources: what the adapter keeps.
        settings: of the factorisation; empty where there is none.
    """

    table: Table
    training: Ints
    evaluation: Ints
    sources: Sources
    settings: Mapping[str, Any]


def of_run(log: Log, recipe: config.Recipe) -> OfRun:
    """Read and fit what `recipe.side` names, for every event of the log.

    Raises:
        DataError: a file cannot be used.
    """
    side, n = recipe.side, len(log)
    parts: dict[str, Part] = {}
    sources: Sources = {}
    settings: dict[str, Any] = {}
    # The first n numbers are the events as training shows them, the others as evaluation does.
    if side.als:
        found = side_als.fit(log, recipe.task, recipe.eval.history, recipe.eval.ties, recipe.seed)
        if not found.in_training.any():
            raise DataError(
                "side.als: no item has training events of two groups of people, and a training event's factors are "
                "those of other people; expected more people; leave it out"
            )
        scaling = Scaling.of(found.training[found.in_training])
        known = np.concatenate([found.in_training, found.in_evaluation])
        vectors = scaling.apply(np.concatenate([found.training, found.evaluation]))
        parts["als"] = Part(vectors, np.where(known, np.arange(2 * n), -1))
        sources["als"] = _of_factors(found.factors, scaling, log)
        settings = {"factors": found.settings.factors, "factor_penalty": found.settings.factor_penalty}
    for name, path in files(side).items():
        people = name == "users"
        ids = (log.user_ids if people else log.items["item_id"]).to_list()
        code = log.user if people else log.item
        source = _from_file(path, _key(name), ids)
        assert source.vectors is not None
        row = source.rows(ids)[code]
        parts[name] = Part(source.scaling.apply(source.vectors), np.concatenate([row, row]))
        sources[name] = Source(source.scaling) if people else source
    known = np.any([part.row >= 0 for part in parts.values()], axis=0)
    numbers = np.arange(1, 2 * n + 1)
    marked = np.where(known, numbers, 0)
    return OfRun(Table(numbers, parts), marked[:n], marked[n:], sources, settings)


def files(side: config.Side) -> dict[str, str]:
    """Source -> its file."""
    items = [side.items] if isinstance(side.items, str) else side.items or []
    people = {"users": side.users} if side.users else {}
    return {f"items_{number}": path for number, path in enumerate(items)} | people


def check(side: config.Side) -> None:
    """Look into the files that a recipe names.

    Raises:
        DataError: one cannot be used.
    """
    for name, path in files(side).items():
        read_vectors(path, _key(name))


def _key(name: str) -> str:
    return "user_id" if name == "users" else "item_id"


def _of_factors(factors: Factors, scaling: Scaling, log: Log) -> Source:
    items = factors.items
    met = np.unique(log.item[(log.split == 0) & (log.item >= 0)])
    ids = log.items["item_id"].to_list()
    vectors = np.column_stack([items.effect, items.factors])[met].astype(np.float32)
    return Source(scaling, tuple(str(ids[code]) for code in met), vectors, factors)


def _from_file(path: str, key: str, ids: Sequence[Any]) -> Source:
    """The file's vectors of the given ids."""
    found, vectors = read_vectors(path, key)
    wanted = set(map(str, ids))
    kept = [row for row, name in enumerate(found) if name in wanted]
    if not kept:
        raise DataError(
            f"{path}: none of its ids (such as {found[0] if found else 'nothing'!r}) is one of the data (such as "
            f"{ids[0]!r}); expected the same ids in {key}"
        )
    vectors = vectors[kept]
    return Source(Scaling.of(vectors), tuple(found[row] for row in kept), vectors)


class MarkedWindows(TimelineWindows):
    """Windows of events whose ids hold the numbers of their vectors.

    Args:
        windows: the windows without them.
        numbers: of each event of the log (n,).
    """

    def __init__(self, windows: TimelineWindows, numbers: Ints) -> None:
        vars(self).update(vars(windows))
        self._numbers = numbers

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        """One window as arrays of length T: see `TimelineWindows.arrays`."""
        arrays = super().arrays(index)
        ids, events = arrays["input_ids"].copy(), self.events_of(index)
        ends = np.flatnonzero(np.diff(arrays["event"], append=-1))[-len(events) :]  # a header ends before them
        ids[ends - self.codec.tail_length] += self._numbers[events] << BITS
        return {**arrays, "input_ids": ids}


# --- for questions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """One person's history and candidates.

    Attributes:
        history: ids of items met, oldest first; None is none.
        answers: index of each one's answer.
        candidates: ids of the items in question.
        person: the person's vector as it was given, or None.
    """

    history: Sequence[Any]
    answers: Sequence[int]
    candidates: Sequence[Any]
    person: Sequence[float] | None = None


def number(sources: Sources, questions: Sequence[Asked]) -> tuple[Table, list[Ints]]:
    """The vectors of questions, and the numbers of each one's events and candidates, (h + c,), 0 for none.

    A number is a digest of the vectors: histories that share their ids may share what was computed of them.

    Raises:
        DataError: a person's vector is not what the adapter was trained with.
    """
    sizes = [len(one.history) + len(one.candidates) for one in questions]
    parts = {name: _part(name, source, questions) for name, source in sources.items()}
    numbers = np.zeros(sum(sizes), dtype=np.int64)
    for place in range(len(numbers)):
        rows = {name: part.row[place] for name, part in parts.items() if part.row[place] >= 0}
        if rows:
            digest = blake2b(json.dumps(list(rows)).encode(), digest_size=_DIGEST)
            for name, row in rows.items():
                digest.update(parts[name].vectors[row].tobytes())
            numbers[place] = int.from_bytes(digest.digest()) or 1
    known, first = np.unique(numbers, return_index=True)
    table = Table(known, {name: replace(part, row=part.row[first]) for name, part in parts.items()})
    return table, np.split(numbers, np.cumsum(sizes, dtype=np.int64)[:-1])[: len(sizes)]


def _part(name: str, source: Source, questions: Sequence[Asked]) -> Part:
    if name == "users":
        given = [one.person for one in questions]
        vectors = np.stack([_person(one, source) for one in given]) if given else np.zeros((0, 1), dtype=np.float32)
        whose = [-1 if one is None else place for place, one in enumerate(given)]
        return Part(vectors, np.repeat(whose, [len(one.history) + len(one.candidates) for one in questions]))
    asked = [(source.rows(one.history), source.rows(one.candidates)) for one in questions]
    rows = np.concatenate([np.zeros(0, dtype=np.int64), *(part for pair in asked for part in pair)])
    if source.factors is None:
        assert source.vectors is not None
        taken, row = np.unique(rows, return_inverse=True)  # the first may be -1, which no row of the part shall be
        return Part(source.scaling.apply(source.vectors[taken]), np.where(rows < 0, -1, row))
    found = [
        source.factors.vectors(history, one.answers, candidates)
        for one, (history, candidates) in zip(questions, asked, strict=True)
    ]
    vectors = np.concatenate([np.zeros((0, source.factors.size), dtype=np.float32), *found])
    return Part(source.scaling.apply(vectors), np.where(rows < 0, -1, np.arange(len(rows))))


def _person(given: Sequence[float] | None, source: Source) -> Singles:
    size = len(source.scaling.mean)
    if given is None:
        return np.zeros(size, dtype=np.float32)
    try:
        vector = np.asarray(given, dtype=np.float32)
    except (TypeError, ValueError):
        vector = np.zeros(0, dtype=np.float32)
    if vector.shape != (size,) or not np.isfinite(vector).all():
        raise DataError(f"user: a vector of shape {vector.shape}; expected {size} finite numbers, as in training")
    return source.scaling.apply(vector)


# --- files ------------------------------------------------------------------------------------------------------------


def tensors(sources: Sources) -> dict[str, npt.NDArray[Any]]:
    """What `FILE` holds of sources, by name."""
    found: dict[str, npt.NDArray[Any]] = {}
    for name, source in sources.items():
        found |= {f"{name}.mean": source.scaling.mean, f"{name}.deviation": source.scaling.deviation}
        if source.vectors is not None:
            text = json.dumps(list(source.ids), ensure_ascii=False).encode()
            found |= {f"{name}.item_id": np.frombuffer(text, dtype=np.uint8), f"{name}.vector": source.vectors}
        if (factors := source.factors) is not None:
            fit = [factors.items.mean, factors.user_penalty, factors.factor_penalty]
            found |= {f"{name}.fit": np.asarray(fit), f"{name}.values": factors.values}
    return found


def ids_in(file: Path) -> list[str]:
    """Ids of the items in `FILE`, those of each source in one text; none where they cannot be read."""
    from safetensors.numpy import load_file

    try:
        return ["\n".join(texts(one)) for name, one in load_file(file).items() if name.endswith(".item_id")]
    except BROKEN:  # `read` says so
        return []


def read(folder: str | Path, about: Artifact) -> Sources:
    """The vectors beside `peftrec.json`; none where the adapter has none.

    Raises:
        ModelError: the file is missing, or not what a run wrote.
    """
    if about.side is None:
        return {}
    from safetensors.numpy import load_file

    path = Path(folder) / FILE
    if not path.is_file():
        raise ModelError(f"{path}: no such file, though the adapter has side vectors; fetch the adapter again")
    try:
        found = load_file(path)
        return {name: _source(name, found, len(about.target.scale)) for name in about.side}
    except BROKEN as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise ModelError(f"{path}: not what a run wrote ({reason}); fetch the adapter again") from error


def _source(name: str, found: Mapping[str, npt.NDArray[Any]], answers: int) -> Source:
    scaling = Scaling(found[f"{name}.mean"], found[f"{name}.deviation"])
    size = len(scaling.mean)
    if not (scaling.mean.shape == scaling.deviation.shape == (size,) and 1 <= size <= MOST_SIZE):
        raise ValueError(f"{name} with vectors of {size}")
    if not (np.isfinite(scaling.mean).all() and (scaling.deviation > 0).all()):
        raise ValueError(f"{name} with a mean or a deviation out of range")
    if name == "users":
        return Source(scaling)
    ids, vectors = tuple(texts(found[f"{name}.item_id"])), found[f"{name}.vector"]
    if len(ids) != len(vectors) or vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise ValueError(f"{name} with {len(ids)} ids and vectors of shape {vectors.shape}")
    if name != "als":
        if vectors.shape[1] != size:
            raise ValueError(f"{name} with vectors of {vectors.shape[1]} and statistics of {size}")
        return Source(scaling, ids, vectors)
    mean, *penalties = found["als.fit"].tolist()
    values = found["als.values"].astype(np.float64)
    if min(penalties) <= 0 or len(penalties) != 2 or values.shape != (answers,) or size != 3 * vectors.shape[1]:
        raise ValueError("als with other numbers than its fit has")
    rows = np.vstack([vectors, np.zeros((1, vectors.shape[1]))]).astype(np.float64)
    factors = Factors(Items(mean, rows[:, 0], rows[:, 1:]), values, *penalties)
    return Source(scaling, ids, vectors, factors)
