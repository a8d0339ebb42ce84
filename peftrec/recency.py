"""What a person answered of late, beside any prior: `score.recency`.

A prior weighs all that a person has answered alike, but people change: a mood, a season, how strict somebody is by now
(Koren 2009, "Collaborative filtering with temporal dynamics"). Here each answer is compared with what others gave to
its item. The mean of that over a person's last 3, 10 and 30 events, and over all of them, is weighed together with the
prior by a regression on the training rows.

A row knows what the prior knows about it (`peftrec/baselines.py`), so a training row knows no answer that is still to
be given, its own least of all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from peftrec.baselines import History, Known, Ties, items_known, logistic
from peftrec.errors import ModelError
from peftrec.people import held_people, training_people

if TYPE_CHECKING:
    from peftrec.split import Log

Floats = npt.NDArray[np.float64]

NAME = "recent"
WINDOWS = (3, 10, 30)
"""Last events of a person that are looked at together; all of them besides."""
_USER_SHRINKAGE = 5.0  # events that were as expected
_ITEM_SHRINKAGE = 5.0  # events at the mean of all
_LARGEST = 1e6  # of what a saved prior may hold: far beyond any fit, and small enough that no sum overflows


class Inner(Protocol):
    """A saved prior that knows nothing of the order of events."""

    def scores(self, history_items: Sequence[Any], history_answers: Sequence[float], candidate_items: Any) -> Floats:
        """As in `RecentPrior`."""

    def to_json(self) -> str:
        """One JSON object."""


@dataclass(frozen=True)
class RecentPrior:
    """Another prior, and how what a person answered of late is weighed with it.

    Attributes:
        weights: of one, of the prior and of the means over each of `WINDOWS` and over all events (3 + windows,).
        mean: mean answer of all training events, which an unknown item is expected to get.
        expected: item id as a string -> the answer that it is expected to get.
        bounds: lowest and highest rating; None for clicks, whose scores are log-odds.
        prior: the other one.
    """

    weights: tuple[float, ...]
    mean: float
    expected: Mapping[str, float]
    bounds: tuple[float, float] | None
    prior: Inner

    def scores(
        self, history_items: Sequence[Any], history_answers: Sequence[float], candidate_items: Sequence[Any]
    ) -> Floats:
        """Ratings or log-odds of candidates by one person, equal to those of a frozen test row with this history.

        Args:
            history_items: item ids that the person has met, oldest first, shape (h,); may be empty.
            history_answers: 0 or 1, or the rating, for each, shape (h,).
            candidate_items: item ids to score, shape (c,).

        Returns:
            Shape (c,).
        """
        told = self.prior.scores(history_items, history_answers, candidate_items)
        expected = np.array([self.expected.get(str(item), self.mean) for item in history_items], dtype=np.float64)
        above = np.asarray(history_answers, dtype=np.float64) - expected
        means = np.broadcast_to(_means(above, np.array([len(above)])), (len(told), len(WINDOWS) + 1))
        return _weighed(self.weights, told, means, self.bounds)

    def to_json(self) -> str:
        """One JSON object; `from_json` gives an equal prior back."""
        found: dict[str, Any] = {NAME: 1, **{field.name: getattr(self, field.name) for field in fields(self)}}
        return json.dumps({**found, "prior": json.loads(self.prior.to_json())}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, inner: Callable[[str], Inner]) -> RecentPrior:
        """Read what `to_json` wrote, the other prior by `inner`.

        Raises:
            ModelError: anything else.
        """
        names = [field.name for field in fields(cls)]
        try:
            found = json.loads(text)
            if set(found) != {NAME, *names} or found[NAME] != 1:
                raise ValueError(f"keys {sorted(found)}")
            weights = tuple(_number(one) for one in found["weights"])
            bounds = found["bounds"] and tuple(_number(one) for one in found["bounds"])
            if len(weights) != 3 + len(WINDOWS) or (bounds and not (len(bounds) == 2 and bounds[0] < bounds[1])):
                raise ValueError("weights or bounds of another number")
            expected = {str(item): _number(one) for item, one in found["expected"].items()}
            return cls(weights, _number(found["mean"]), expected, bounds or None, inner(json.dumps(found["prior"])))
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
            raise ModelError(
                f"prior: {error}; expected {NAME} 1 and {', '.join(names)}; fetch the adapter again"
            ) from None


@dataclass(frozen=True)
class Predictions:
    """Scores of every row of a log.

    Attributes:
        scores: log-odds of a like, or ratings within the scale, (n,).
        prior: the same for whomever the adapter meets later.
        settings: the weights.
    """

    scores: Floats
    prior: RecentPrior
    settings: dict[str, float]


def predict(
    log: Log, history: History, ties: Ties, items: History, prior: tuple[Floats, Inner], *, clicks: bool
) -> Predictions:
    """Score all rows by the prior and by what is known of each row's user of late.

    Args:
        log: all splits, with items.
        history: what validation and test rows know of their user.
        ties: whether a row knows its user's events of the same timestamp that stand before it.
        items: what validation and test rows know of items.
        prior: in each row, training rows too (n,), and saved.
        clicks: whether scores are log-odds.
    """
    told, saved = prior
    train, answer = log.split == 0, np.asarray(log.scale, dtype=np.float64)[log.label]
    mean, of_items = _settled(log, answer, train)
    then = answer - _expected_then(log, answer, train, items)
    # Of a training event held-out rows know all that training tells of its item, as a saved prior does.
    above = np.where(train, answer - np.append(of_items, mean)[log.item], then)
    means = np.zeros((len(log), len(WINDOWS) + 1))
    for person in training_people(log, ties):
        means[person.rows] = _means(then[person.events], person.known)
    for person in held_people(log, ~train, history, ties):
        means[person.rows] = _means(above[person.events], person.known)
    weights = _fit(told[train], means[train], answer[train], clicks)
    bounds = None if clicks else (float(log.scale[0]), float(log.scale[-1]))
    ids = log.items.get_column("item_id").to_list()
    met = np.unique(log.item[train & (log.item >= 0)])
    expected = {str(ids[code]): float(of_items[code]) for code in met}
    names = ("intercept", "prior", *(f"last_{window}" for window in WINDOWS), "all")
    return Predictions(
        _weighed(weights, told, means, bounds),
        RecentPrior(weights, mean, expected, bounds, saved),
        dict(zip(names, weights, strict=True)),
    )


def _settled(log: Log, answer: Floats, train: npt.NDArray[np.bool_]) -> tuple[float, Floats]:
    """The mean answer of all training events, and the shrunk mean of each item (items,)."""
    mean = float(answer[train].mean()) if train.any() else float(np.mean(log.scale))
    rows = train & (log.item >= 0)
    total = np.bincount(log.item[rows], answer[rows], minlength=len(log.items))
    events = np.bincount(log.item[rows], minlength=len(log.items))
    return mean, (total + _ITEM_SHRINKAGE * mean) / (events + _ITEM_SHRINKAGE)


def _expected_then(log: Log, answer: Floats, train: npt.NDArray[np.bool_], items: History) -> Floats:
    """The shrunk mean answer of each row's item, as far as the row may know it, (n,)."""
    everybody = Known(np.zeros(len(log), dtype=np.int8), log.timestamp, train, items_known(items))
    middle = (log.scale[0] + log.scale[-1]) / 2
    mean = (everybody.sum(answer) + 2 * middle) / (everybody.sum(np.ones(len(log))) + 2)
    of_item, has_item = Known(log.item, log.timestamp, train, items_known(items)), log.item >= 0
    total, events = of_item.sum(has_item * answer), of_item.sum(has_item)
    then: Floats = (total + _ITEM_SHRINKAGE * mean) / (events + _ITEM_SHRINKAGE)
    return then


def _means(above: Floats, known: npt.NDArray[np.int64]) -> Floats:
    """Shrunk means of the last events before each row, (w, windows + 1).

    Args:
        above: by how much each event was above what had been expected, oldest first (h,).
        known: how many of them each row knows (w,).
    """
    total = np.concatenate(([0.0], np.cumsum(above)))
    first = np.stack([*(np.maximum(known - window, 0) for window in WINDOWS), np.zeros_like(known)], axis=1)
    found: Floats = (total[known][:, None] - total[first]) / (known[:, None] - first + _USER_SHRINKAGE)
    return found


def _fit(told: Floats, means: Floats, answer: Floats, clicks: bool) -> tuple[float, ...]:
    """Weights by the given rows; of no rows those of the prior alone."""
    design = np.column_stack([np.ones(len(told)), told, means])
    alone = np.zeros(design.shape[1])
    alone[1] = 1.0
    if clicks:
        return tuple(logistic(design, answer == 1, alone).tolist())
    # The same Gaussian prior, with a deviation of one around the prior alone.
    step = np.linalg.solve(design.T @ design + np.eye(len(alone)), design.T @ (answer - told))
    return tuple((alone + step).tolist())


def _weighed(weights: Sequence[float], told: Floats, means: Floats, bounds: tuple[float, float] | None) -> Floats:
    found: Floats = weights[0] + weights[1] * told + means @ np.asarray(weights[2:])
    return found if bounds is None else np.clip(found, *bounds)


def _number(found: Any) -> float:
    if isinstance(found, bool) or not isinstance(found, int | float) or not abs(found) <= _LARGEST:
        raise ValueError("a number out of range")
    return float(found)
