"""A prior blended with what it leaves out of a person's order and mood: `score.blend`.

The bias and the factorisations weigh all that a person has answered alike, and are fitted to the answers of everybody.
Two things are gained by looking closer:

* what is right for the answers of all is not best for the order within a person: there the item's mean counts for more.
  The weights of prior and item mean are fitted on pairs of answers of one person;
* people change: a mood, a season, how strict somebody is by now (Koren 2009, "Collaborative filtering with temporal
  dynamics"). Each answer is compared with what others gave to its item. The means of that over a person's last 3, 10
  and 30 events, and over all, are weighed with the above by a regression on the training rows.

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

from peftrec.baselines import HIGHEST, LOWEST, History, Known, Ties, items_known, logistic, logit
from peftrec.errors import ModelError
from peftrec.people import held_people, training_people

if TYPE_CHECKING:
    from peftrec.split import Log

Floats = npt.NDArray[np.float64]

NAME = "blend"
WINDOWS = (3, 10, 30)
"""Last events of a person that are looked at together; all of them besides, shrunk little and much."""
WEIGHTS = ("intercept", "prior", "item", *(f"last_{window}" for window in WINDOWS), "all", "all_shrunk")
_LITTLE, _MUCH = 5.0, 20.0  # events that were as expected
_ITEM_SHRINKAGE = 5.0  # events at the mean of all
_MOST_PAIRS = 50  # of a person
_LARGEST = 1e6  # of what a saved prior may hold: far beyond any fit, and small enough that no sum overflows


class Inner(Protocol):
    """A saved prior that knows nothing of the order of events."""

    def scores(self, history_items: Sequence[Any], history_answers: Sequence[float], candidate_items: Any) -> Floats:
        """As in `BlendedPrior`."""

    def to_json(self) -> str:
        """One JSON object."""


@dataclass(frozen=True)
class BlendedPrior:
    """Another prior, and what is weighed with it.

    Attributes:
        weights: of the `WEIGHTS`.
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
        above = np.asarray(history_answers, dtype=np.float64) - self._expected(history_items)
        means = np.broadcast_to(_means(above, np.array([len(above)])), (len(told), len(WINDOWS) + 2))
        return _blended(self.weights, told, self._expected(candidate_items), means, self.bounds)

    def to_json(self) -> str:
        """One JSON object; `from_json` gives an equal prior back."""
        found: dict[str, Any] = {NAME: 1, **{field.name: getattr(self, field.name) for field in fields(self)}}
        return json.dumps({**found, "prior": json.loads(self.prior.to_json())}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, inner: Callable[[str], Inner]) -> BlendedPrior:
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
            bounds = None if found["bounds"] is None else tuple(_number(one) for one in found["bounds"])
            if len(weights) != len(WEIGHTS) or (bounds is not None and (len(bounds) != 2 or bounds[0] >= bounds[1])):
                raise ValueError("weights or bounds of another number")
            expected = {str(item): _number(one) for item, one in found["expected"].items()}
            return cls(weights, _number(found["mean"]), expected, bounds, inner(json.dumps(found["prior"])))
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
            raise ModelError(
                f"prior: {error}; expected {NAME} 1 and {', '.join(names)}; fetch the adapter again"
            ) from None

    def _expected(self, items: Sequence[Any]) -> Floats:
        return np.array([self.expected.get(str(item), self.mean) for item in items], dtype=np.float64)


@dataclass(frozen=True)
class Predictions:
    """Scores of every row of a log.

    Attributes:
        scores: log-odds of a like, or ratings within the scale, (n,).
        prior: the same for whomever the adapter meets later.
        settings: the weights.
    """

    scores: Floats
    prior: BlendedPrior
    settings: dict[str, float]


def predict(
    log: Log, history: History, ties: Ties, items: History, prior: tuple[Floats, Inner], *, clicks: bool
) -> Predictions:
    """Score all rows by the prior, their items and what is known of each row's user of late.

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
    expected = _expected_then(log, answer, train, items)
    # Of a training event held-out rows know all that training tells of its item, as a saved prior does.
    above = answer - np.where(train, np.append(of_items, mean)[log.item], expected)
    means = np.zeros((len(log), len(WINDOWS) + 2))
    for person in training_people(log, ties):
        means[person.rows] = _means((answer - expected)[person.events], person.known)
    for person in held_people(log, ~train, history, ties):
        means[person.rows] = _means(above[person.events], person.known)
    if history == "frozen":  # the latest answers that such rows know are old
        means[:, : len(WINDOWS)] = 0
    of_item = _in_units(expected, clicks)
    order = _order(told[train], of_item[train], answer[train], log.user[train], clicks)
    level = _level(order[0] * told[train] + order[1] * of_item[train], means[train], answer[train], clicks)
    weights = (level[0], level[1] * order[0], level[1] * order[1], *level[2:])
    bounds = None if clicks else (float(log.scale[0]), float(log.scale[-1]))
    ids = log.items.get_column("item_id").to_list()
    met = np.unique(log.item[train & (log.item >= 0)])
    return Predictions(
        _blended(weights, told, expected, means, bounds),
        BlendedPrior(weights, mean, {str(ids[code]): float(of_items[code]) for code in met}, bounds, saved),
        dict(zip(WEIGHTS, weights, strict=True)),
    )


def _settled(log: Log, answer: Floats, train: npt.NDArray[np.bool_]) -> tuple[float, Floats]:
    """The mean answer of all training events, and the shrunk mean of each item (items,)."""
    mean = _mean(log, answer[train].sum(), int(train.sum()))
    rows = train & (log.item >= 0)
    total = np.bincount(log.item[rows], answer[rows], minlength=len(log.items))
    return float(mean), _shrunk(total, np.bincount(log.item[rows], minlength=len(log.items)), mean)


def _expected_then(log: Log, answer: Floats, train: npt.NDArray[np.bool_], items: History) -> Floats:
    """The shrunk mean answer of each row's item, as far as the row may know it, (n,)."""
    knows = items_known(items)
    everybody = Known(np.zeros(len(log), dtype=np.int8), log.timestamp, train, knows)
    mean = _mean(log, everybody.sum(answer), everybody.sum(np.ones(len(log))))
    of_item, has_item = Known(log.item, log.timestamp, train, knows), log.item >= 0
    return _shrunk(of_item.sum(has_item * answer), of_item.sum(has_item), mean)


def _mean(log: Log, total: Any, events: Any) -> Any:
    """After one lowest and one highest answer that nobody gave, so that the first rows have a mean too."""
    return (total + log.scale[0] + log.scale[-1]) / (events + 2)


def _shrunk(total: npt.NDArray[Any], events: npt.NDArray[Any], mean: Any) -> Floats:
    found: Floats = (total + _ITEM_SHRINKAGE * mean) / (events + _ITEM_SHRINKAGE)
    return found


def _means(above: Floats, known: npt.NDArray[np.int64]) -> Floats:
    """Shrunk means of the events before each row: of each of `WINDOWS`, and of all twice, (w, windows + 2).

    Args:
        above: by how much each event was above what had been expected, oldest first (h,).
        known: how many of them each row knows (w,).
    """
    total = np.concatenate(([0.0], np.cumsum(above)))
    nothing = np.zeros_like(known)
    first = np.stack([*(np.maximum(known - window, 0) for window in WINDOWS), nothing, nothing], axis=1)
    shrinkage = np.array([*(_LITTLE for _ in WINDOWS), _LITTLE, _MUCH])
    found: Floats = (total[known][:, None] - total[first]) / (known[:, None] - first + shrinkage)
    return found


def _in_units(expected: Floats, clicks: bool) -> Floats:
    """Expected answers in the units of the scores."""
    if not clicks:
        return expected
    odds: Floats = logit(np.clip(expected, LOWEST, HIGHEST))
    return odds


def _order(told: Floats, of_item: Floats, answer: Floats, user: npt.NDArray[Any], clicks: bool) -> tuple[float, float]:
    """Weights of prior and item by differences within people; one and none where there are none.

    Args:
        told: by the prior, (n,).
        of_item: expected of the item, in the same units (n,).
        answer: (n,).
        user: whose they are, ascending (n,).
        clicks: whether a liked event is to score above one that is not, or ratings are to come out.
    """
    design, alone = np.stack([told, of_item], axis=1), np.array([1.0, 0.0])
    people = np.split(np.arange(len(user)), np.flatnonzero(np.diff(user)) + 1)
    if clicks:
        pairs = np.concatenate([np.zeros((0, 2), dtype=np.int64), *(_pairs(rows, answer[rows]) for rows in people)])
        apart = design[pairs[:, 0]] - design[pairs[:, 1]]
        # Each pair both ways round: which of the two is named first tells nothing.
        both = np.concatenate([apart, -apart])
        found = logistic(both, np.arange(len(both)) < len(apart), alone)
    else:
        own = np.zeros(len(user))
        for rows in filter(len, people):
            design[rows] -= design[rows].mean(axis=0)
            own[rows] = answer[rows].mean()
        found = _least_squares(design, answer - own, alone)
    return float(found[0]), float(found[1])


def _pairs(rows: npt.NDArray[np.int64], answer: Floats) -> npt.NDArray[np.int64]:
    """A liked row beside one that is not (k, 2), of one person: all, or so many, spread evenly over both kinds."""
    liked, other = rows[answer == 1], rows[answer != 1]
    if len(liked) * len(other) <= _MOST_PAIRS:
        return np.stack([np.repeat(liked, len(other)), np.tile(other, len(liked))], axis=1)
    place = np.arange(_MOST_PAIRS)
    # A stride of 29 fiftieths visits every fiftieth of the others once, and never beside its neighbour.
    apart = place * 29 % _MOST_PAIRS
    return np.stack([liked[place * len(liked) // _MOST_PAIRS], other[apart * len(other) // _MOST_PAIRS]], axis=1)


def _level(told: Floats, means: Floats, answer: Floats, clicks: bool) -> tuple[float, ...]:
    """Weights of one, of what is told and of the means; of no rows those of what is told alone."""
    design = np.column_stack([np.ones(len(told)), told, means])
    alone = np.zeros(design.shape[1])
    alone[1] = 1.0
    found = logistic(design, answer == 1, alone) if clicks else _least_squares(design, answer, alone)
    return tuple(found.tolist())


def _least_squares(design: Floats, answer: Floats, prior: Floats) -> Floats:
    """Weights (d,) of `answer`, (n,), under the Gaussian prior of `baselines.logistic`: around `prior`."""
    step = np.linalg.solve(design.T @ design + np.eye(len(prior)), design.T @ (answer - design @ prior))
    found: Floats = prior + step
    return found


def _blended(
    weights: Sequence[float], told: Floats, expected: Floats, means: Floats, bounds: tuple[float, float] | None
) -> Floats:
    of_item = _in_units(expected, clicks=bounds is None)
    found: Floats = weights[0] + weights[1] * told + weights[2] * of_item + means @ np.asarray(weights[3:])
    return found if bounds is None else np.clip(found, *bounds)


def _number(found: Any) -> float:
    if isinstance(found, bool) or not isinstance(found, int | float) or not abs(found) <= _LARGEST:
        raise ValueError("a number out of range")
    return float(found)
