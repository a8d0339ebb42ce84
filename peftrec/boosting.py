"""Gradient boosting on counts: what a table of numbers can tell of a row, each known to the model as well.

The numbers of a row are made from the events that it may know and from nothing else (`peftrec/baselines.py` says which
those are), with constants that no label chose. So a training row's numbers are those of its own moment, as a held-out
row's are under a streaming history, and trees that were grown on the first can be asked about the second. Trees come
from scikit-learn; their size and number are chosen on the validation rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl

from peftrec.baselines import History, Known, Ties, items_known
from peftrec.classical import optional
from peftrec.metrics import mean_log_loss

if TYPE_CHECKING:
    from peftrec.sources import Task
    from peftrec.split import Log

Floats = npt.NDArray[np.float64]

NAME = "gbdt"
LIBRARY = ("sklearn.ensemble", "scikit-learn")  # its module, and what it is called
GENRES = ("genres", "genre", "categories", "category", "cuisine", "tags")
"""Columns of the items table that name kinds of items, several with `|`, `,` or `;` between them; the first counts."""
MOST_GENRES = 64
MOST_ROWS = 2_000_000
"""Training rows that trees are grown on, the latest ones: 10 million more take minutes and tell little."""

_ITEM_SHRINKAGE, _USER_SHRINKAGE, _MATCH_SHRINKAGE = 5.0, 5.0, 5.0
_LEAVES_GRID = (4, 8, 16, 32)
_RATE, _MOST_TREES, _FIRST_TREES, _FIRST_LEAVES = 0.05, 400, 100, 8


@dataclass(frozen=True)
class Predictions:
    """Scores of the held-out rows of a log.

    Attributes:
        scores: float64 (n,): log-odds of a like, or ratings within the scale; nan in training rows.
        settings: what was chosen on the validation rows.
    """

    scores: Floats
    settings: dict[str, float]


def check(names: Sequence[str]) -> None:
    """See whether scikit-learn is there, if `names` asks for `gbdt`.

    Raises:
        ConfigError: it is not.
    """
    if NAME in names:
        optional(*LIBRARY, [NAME])


def predict(
    log: Log,
    history: History,
    ties: Ties = "isolate",
    task: Task = "click",
    seed: int = 13,
    items: History | None = None,
) -> Predictions:
    """Score all validation and test rows by trees grown on the training rows.

    Args:
        log: all splits, with items.
        history: what validation and test rows know.
        ties: whether a row knows its user's events of the same timestamp that stand before it.
        task: whether scores are log-odds, or ratings.
        seed: of the library.
        items: what validation and test rows know of items and of everybody; as of their user if left out.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    trees = optional(*LIBRARY, [NAME])
    held, valid = log.split != 0, log.split == 1
    answer = np.asarray(log.scale)[log.label]
    stages = _stages(trees, log, np.stack(list(features(log, history, ties, items).values()), axis=1), task, seed)
    if valid.any():
        chosen, score = min(stages, key=lambda stage: _loss(stage[1][valid[held]], answer[valid], task))
    else:
        (chosen, score) = deque(stages, maxlen=1)[0]
    scores: Floats = np.full(len(log), np.nan)
    scores[held] = score if task == "click" else np.clip(score, log.scale[0], log.scale[-1])
    return Predictions(scores, chosen)


def _stages(library: Any, log: Log, found: Floats, task: Task, seed: int) -> Iterator[tuple[dict[str, float], Floats]]:
    """Settings, and what they say of the held-out rows, after each further tree."""
    train, held = np.flatnonzero(log.split == 0), log.split != 0
    train = train[np.argsort(log.timestamp[train], kind="stable")][-MOST_ROWS:]
    tuned = bool((log.split == 1).any())
    for leaves in _LEAVES_GRID if tuned else (_FIRST_LEAVES,):
        trees = _MOST_TREES if tuned else _FIRST_TREES
        options = {"learning_rate": _RATE, "max_iter": trees, "max_leaf_nodes": leaves, "random_state": seed}
        if task == "click":
            model = library.HistGradientBoostingClassifier(early_stopping=False, **options)
            stages = model.fit(found[train], log.label[train]).staged_decision_function(found[held])
        else:
            model = library.HistGradientBoostingRegressor(early_stopping=False, **options)
            stages = model.fit(found[train], np.asarray(log.scale)[log.label[train]]).staged_predict(found[held])
        for number, score in enumerate(stages, 1):
            yield {"leaves": leaves, "trees": number}, score


def features(log: Log, history: History, ties: Ties = "isolate", items: History | None = None) -> dict[str, Floats]:
    """What each row knows in numbers: name -> (n,), nan where there is nothing to know.

    Means are drawn to the mean of everybody's known events. A *gap* is by how much an event's answer was above the mean
    that its item had at that moment, so that a person's gaps tell taste from good films.

    Args:
        log: all splits, with items.
        history: what validation and test rows know.
        ties: as in `predict`.
        items: as in `predict`.
    """
    train, has_item = log.split == 0, log.item >= 0
    answer = np.asarray(log.scale)[log.label]
    ones = np.ones(len(log))
    everybody = Known(np.zeros(len(log), dtype=np.int8), log.timestamp, train, items_known(items or history))
    events = everybody.sum(ones)
    mean = (everybody.sum(answer) + log.scale[0] + log.scale[-1]) / (events + 2)
    of_item = Known(log.item, log.timestamp, train, items_known(items or history))
    item_events = of_item.sum(has_item)
    item_mean = (of_item.sum(has_item * answer) + _ITEM_SHRINKAGE * mean) / (item_events + _ITEM_SHRINKAGE)
    # A log is sorted by user, then time: a row's place tells the events of one second apart.
    user_time = log.timestamp if ties == "isolate" else np.arange(len(log))
    user = Known(log.user, user_time, train, "past" if history == "streaming" else "training")
    user_events, gap = user.sum(ones), answer - item_mean
    found = {
        "mean": mean,
        "item_mean": item_mean,
        "item_events": item_events,
        "item_share": item_events / np.maximum(events, 1),
        "user_mean": (user.sum(answer) + _USER_SHRINKAGE * mean) / (user_events + _USER_SHRINKAGE),
        "user_events": user_events,
        "user_gap": user.sum(gap) / (user_events + _USER_SHRINKAGE),
    }
    return {**found, **_of_genres(log, user, gap), **_of_years(log, user)}


def _of_genres(log: Log, user: Known, gap: Floats) -> dict[str, Floats]:
    """How the person took to the kinds that the row's item is of; nothing where the items table names no kinds."""
    met, taken, members = np.zeros(len(log)), np.zeros(len(log)), list(kinds(log.items))
    if not members:
        return {}
    for of_kind in members:
        member = np.append(of_kind, False)[log.item]
        met += member * user.sum(member)
        taken += member * user.sum(member * gap)
    return {"genre_events": met, "genre_gap": taken / (met + _MATCH_SHRINKAGE)}


def kinds(items: pl.DataFrame) -> Iterator[npt.NDArray[np.bool_]]:
    """For each kind that several items are of, the most frequent first, which they are (items,)."""
    name = next((name for name in GENRES if name in items.columns), None)
    if name is None:
        return
    column = items[name]
    if isinstance(column.dtype, pl.List):
        lists = column.cast(pl.List(pl.String))
    else:
        lists = column.cast(pl.String).str.replace_all(r"[|;]", ",").str.split(",")
    parts = pl.DataFrame({"item": np.arange(len(column)), "kind": lists}).explode("kind")
    parts = parts.with_columns(pl.col("kind").str.strip_chars().str.to_lowercase()).unique()
    counts = parts.filter(pl.col("kind").str.len_chars() > 0)["kind"].value_counts().filter(pl.col("count") > 1)
    for kind in counts.sort(["count", "kind"], descending=[True, False])["kind"].head(MOST_GENRES):
        of_kind = np.zeros(len(column), dtype=bool)
        of_kind[parts.filter(pl.col("kind") == kind)["item"].to_numpy()] = True
        yield of_kind


def _of_years(log: Log, user: Known) -> dict[str, Floats]:
    """The item's year, and how far it is from those that the person met; nothing where no item has one."""
    year = years(log.items)[log.item]
    if np.isnan(year).all():
        return {}
    known = ~np.isnan(year)
    total, count = user.sum(np.where(known, year, 0.0)), user.sum(known)
    return {"year": year, "year_gap": year - np.divide(total, count, out=np.full(len(log), np.nan), where=count > 0)}


def years(items: pl.DataFrame) -> Floats:
    """Of a column `year`, else of a title's end in brackets, (items + 1,): the last is that of a row without item."""
    if "year" in items.columns:
        text = items["year"].cast(pl.String)
    elif "title" in items.columns:
        text = items["title"].cast(pl.String).str.extract(r"\((\d{4})\)\s*$")
    else:
        return np.full(len(items) + 1, np.nan)
    found = text.cast(pl.Float64, strict=False).fill_null(np.nan).to_numpy()
    return np.append(found, np.nan)


def _loss(score: Floats, answer: Floats, task: Task) -> float:
    if task == "click":
        return mean_log_loss(answer, score)
    return float(np.mean((score - answer) ** 2))
