"""Bayesian matrix factorisation as opponent and prior: `bpmf`, for clicks and ratings.

A row knows what it knows in matrix factorisation (`peftrec/rating_baselines.py`): the items' side comes from all
training rows, for a training row from those of other users, drawn into groups; the person's side from the events that
the row may know of its user. The items table says what items have in common: kinds and years (`peftrec/boosting.py`).

Under a streaming history a held-out row also knows what others said of its item since training, as the item mean does:
by how much they were above what they had been expected to say, shrunk.

Clicks are fitted as 0 and 1. Log-odds are then weighted together from what comes out and those of the item mean, by
three numbers fitted on the validation rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from peftrec import bayes_factors, boosting
from peftrec.baselines import Earlier, History, Prior, Ties, logistic
from peftrec.bayes_factors import KEPT_FACTORS, TRAITS, Posterior
from peftrec.draws import drawn_order
from peftrec.errors import DataError, ModelError
from peftrec.metrics import mean_log_loss
from peftrec.people import held_people, training_people

if TYPE_CHECKING:
    from peftrec.rating_baselines import Order
    from peftrec.split import Log

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.bool_]

NAME = "bpmf"
MOST_EVENTS = 5_000_000
"""Training events are read some hundred times over: an hour for so many."""
MOST_ITEMS = 300_000
"""All draws of an item are kept while they are averaged: 6 kB each."""

_GROUPS = 5
_PENALTIES = (1.0, 1.4, 2.0, 2.8, 4.0)  # on the part of a person; one is what the draws themselves say
_NEWS_SHRINKAGE = 40.0  # events that were as expected
_WEIGHTS = ("slope", "item_slope", "intercept")
_LEAST_VARIANCE = 0.02  # of answers, where almost all are one
# What a saved prior may hold: far beyond any fit, and small enough that no sum overflows and no system is singular.
_LARGEST, _LARGEST_FACTOR, _SMALLEST = 1e6, 1e3, 1e-6


@dataclass(frozen=True)
class LogOdds:
    """How log-odds of a like come about.

    Attributes:
        slope: of what the factorisation predicts.
        item_slope: of the log-odds of the item mean.
        intercept: added to both.
        item_mean: of all training events.
    """

    slope: float
    item_slope: float
    intercept: float
    item_mean: Prior

    def of(self, predicted: Floats, item_mean: Floats) -> Floats:
        """(n,) and (n,) -> (n,)."""
        found: Floats = self.slope * predicted + self.item_slope * item_mean + self.intercept
        return found


@dataclass(frozen=True)
class BpmfPrior:
    """The items' side after all training events, small enough to travel with an adapter.

    Attributes:
        mean: mean answer.
        deviation: of the answers.
        shrinkage: events of no kind that a person's traits start from (d,).
        items: item id as a string -> effect, r factors, d traits, d leanings (`bayes_factors.Posterior`); other items
            have zeros.
        bounds: lowest and highest answer.
        log_odds: for clicks.
    """

    mean: float
    deviation: float
    shrinkage: tuple[float, ...]
    items: Mapping[str, tuple[float, ...]]
    bounds: tuple[float, float]
    log_odds: LogOdds | None

    def scores(
        self, history_items: Sequence[Any], history_answers: Sequence[float], candidate_items: Sequence[Any]
    ) -> Floats:
        """Ratings or log-odds of candidates by one person, equal to those of a frozen test row with this history.

        Args:
            history_items: item ids that the person has met, shape (h,); may be empty.
            history_answers: 0 or 1, or the rating, for each, shape (h,).
            candidate_items: item ids to score, shape (c,).

        Returns:
            Shape (c,).
        """
        answers = np.asarray(history_answers, dtype=np.float64)
        told = self._posterior.told(self._codes(history_items), answers, self._codes(candidate_items))
        if self.log_odds is None:
            return np.clip(told, *self.bounds)
        return self.log_odds.of(told, self.log_odds.item_mean.of_items(candidate_items))

    def to_json(self) -> str:
        """One JSON object; `from_json` gives an equal prior back."""
        found: dict[str, Any] = {NAME: 1, **{field.name: getattr(self, field.name) for field in fields(self)}}
        if self.log_odds is not None:
            numbers = {name: getattr(self.log_odds, name) for name in _WEIGHTS}
            found["log_odds"] = {**numbers, "item_mean": json.loads(self.log_odds.item_mean.to_json())}
        return json.dumps(found, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> BpmfPrior:
        """Read what `to_json` wrote.

        Raises:
            ModelError: anything else.
        """
        try:
            return _checked_prior(json.loads(text))
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError, OverflowError) as error:
            names = ", ".join(field.name for field in fields(cls))
            raise ModelError(
                f"prior: {error}; expected {NAME} 1 and {names}, in numbers; fetch the adapter again"
            ) from None

    @cached_property
    def _code(self) -> dict[str, int]:
        return {item: code for code, item in enumerate(self.items)}

    @cached_property
    def _posterior(self) -> Posterior:
        d = len(self.shrinkage)
        width = len(next(iter(self.items.values()), (0.0,) * (1 + 2 * d)))
        rows = np.zeros((len(self.items) + 1, width))
        rows[:-1] = np.array(list(self.items.values())).reshape(-1, width)
        effect, factors, traits, leanings = np.split(rows, [1, width - 2 * d, width - d], axis=1)
        shrinkage = np.array(self.shrinkage, dtype=np.float64)
        return Posterior(self.mean, self.deviation, effect[:, 0], factors, traits, leanings, shrinkage)

    def _codes(self, items: Sequence[Any]) -> npt.NDArray[np.int64]:
        return np.array([self._code.get(str(item), -1) for item in items], dtype=np.int64)


@dataclass(frozen=True)
class Predictions:
    """Scores of every row of a log.

    Attributes:
        scores: log-odds of a like, or ratings within the scale, float64 (n,); nan in training rows where they were not
            asked for.
        prior: the same for whomever the adapter meets later.
        settings: what was chosen on the validation rows.
    """

    scores: Floats
    prior: BpmfPrior
    settings: dict[str, float]


def predict(
    log: Log,
    history: History,
    ties: Ties = "isolate",
    order: Order = "time",
    item_mean: tuple[Floats, Prior] | None = None,
    seed: int = 13,
    *,
    training: bool = True,
    items: History | None = None,
) -> Predictions:
    """Score all rows by what is known of each.

    Args:
        log: all splits, with items.
        history: what validation and test rows know of their user.
        ties: whether a row knows its user's events of the same timestamp that stand before it.
        order: what training rows know of their user.
        item_mean: for clicks, its log-odds in each row (n,), and those of all training events; none for ratings.
        seed: draws the groups of users and the samples.
        training: whether training rows are scored, which takes five more fits.
        items: what validation and test rows know of items; as of their user if left out.

    Raises:
        DataError: the log is too large.
    """
    train = log.split == 0
    if (events := int(train.sum())) > MOST_EVENTS:
        raise DataError(f"{NAME} with {events:,} training events; expected at most {MOST_EVENTS:,}; leave it out")
    if len(log.items) > MOST_ITEMS:
        raise DataError(f"{NAME} with {len(log.items):,} items; expected at most {MOST_ITEMS:,}; leave it out")
    known, answer = side_information(log), np.asarray(log.scale)[log.label]

    def fitted(rows: Rows) -> Posterior:
        return bayes_factors.fit(
            log.user[rows], log.item[rows], answer[rows], known, (log.scale[0] + log.scale[-1]) / 2, seed
        )

    whole, found = fitted(train), np.full(len(log), np.nan)
    penalty = _penalty(whole, log, answer, history, ties, None if item_mean is None else item_mean[0])
    whole = whole.penalised(penalty)
    _score_held(found, log, ~train, whole, answer, history, ties)
    if (items or history) == "streaming":
        found[~train] += _news(log, answer - found, ~train)
    if training:
        for rows in _groups(log, train, seed):
            if rows.any():
                _score_training(found, log, rows, fitted(train & ~rows).penalised(penalty), order, ties)
    if item_mean is None:
        return Predictions(np.clip(found, log.scale[0], log.scale[-1]), _prior(log, whole, None), {"penalty": penalty})
    in_rows, of_all = item_mean
    weights = _weights(found, in_rows, log, whole.mean)
    log_odds = LogOdds(*weights, of_all)
    settings = {"penalty": penalty, **dict(zip(_WEIGHTS, weights, strict=True))}
    return Predictions(log_odds.of(found, in_rows), _prior(log, whole, log_odds), settings)


def side_information(log: Log) -> Floats:
    """Kinds and years of items in numbers around one (items, g); no numbers where the items table names none."""
    columns = [of_kind.astype(np.float64) for of_kind in boosting.kinds(log.items)]
    years = boosting.years(log.items)[:-1]
    if (has_year := np.isfinite(years)).any():
        spread = float(years[has_year].std()) or 1.0
        columns.append(np.where(has_year, (years - years[has_year].mean()) / spread, 0.0))
    return np.stack(columns, axis=1) if columns else np.zeros((len(log.items), 0))


def _news(log: Log, surprise: Floats, held: Rows) -> Floats:
    """What held-out events, (n,), strictly earlier in time tell of each one's item, (held-out rows,)."""
    earlier, has_item = Earlier(log.item[held], log.timestamp[held]), log.item[held] >= 0
    told: Floats = earlier.sum(surprise[held] * has_item) / (earlier.sum(has_item) + _NEWS_SHRINKAGE)
    return told


def _groups(log: Log, train: Rows, seed: int) -> Iterator[Rows]:
    """Training rows of each group of users."""
    group = np.empty(len(log.user_ids), dtype=np.int64)
    group[drawn_order(len(group), seed, f"{NAME} groups")] = np.arange(len(group)) % _GROUPS
    return (train & (group[log.user] == number) for number in range(_GROUPS))


def _penalty(
    items: Posterior, log: Log, answer: Floats, history: History, ties: Ties, item_mean: Floats | None
) -> float:
    """The one of `_PENALTIES` that tells the validation rows best; one where there are none.

    Ratings by squared error, clicks by log loss under the weights that suit the penalty. The draws are too sure of
    people where most items have been met by few.
    """
    valid, best = log.split == 1, (np.inf, 1.0)
    told = np.full(len(log), np.nan)
    for penalty in _PENALTIES if valid.any() else ():
        _score_held(told, log, valid, items.penalised(penalty), answer, history, ties)
        if item_mean is None:
            loss = float(np.mean((told[valid] - answer[valid]) ** 2))
        else:
            slope, item_slope, intercept = _weights(told, item_mean, log, items.mean)
            log_odds = slope * told[valid] + item_slope * item_mean[valid] + intercept
            loss = mean_log_loss(log.label[valid], log_odds)
        best = min(best, (loss, penalty))
    return best[1]


def _score_held(
    found: Floats, log: Log, rows: Rows, items: Posterior, answer: Floats, history: History, ties: Ties
) -> None:
    """Write into `found` what these held-out rows are told by what is known of their people."""
    for person in held_people(log, rows, history, ties):
        found[person.rows] = items.from_earlier(
            log.item[person.events], answer[person.events], person.known, log.item[person.rows]
        )


def _score_training(found: Floats, log: Log, rows: Rows, items: Posterior, order: Order, ties: Ties) -> None:
    """Write into `found` what the training `rows`, all those of some users, are told by items from other users."""
    answer = np.asarray(log.scale)[log.label]
    for person in training_people(log.keep(rows), ties):
        own = np.flatnonzero(rows)[person.rows]
        if order == "random":
            found[own] = items.left_out(log.item[own], answer[own])
        else:
            found[own] = items.from_earlier(log.item[own], answer[own], person.known, log.item[own])


def _weights(predicted: Floats, item_mean: Floats, log: Log, mean: float) -> tuple[float, float, float]:
    """Of prediction and item mean in log-odds, by the validation rows; the tangent's where there are none."""
    valid, variance = log.split == 1, max(mean * (1 - mean), _LEAST_VARIANCE)
    centre = math.log((mean + _LEAST_VARIANCE) / (1 - mean + _LEAST_VARIANCE))
    # In these units the tangent's slope is one, and a deviation of one leaves none of it, however rare a like is.
    design = np.stack([(predicted[valid] - mean) / variance, item_mean[valid], np.ones(int(valid.sum()))], axis=1)
    slope, item_slope, level = logistic(design, log.label[valid] == 1, np.array([1.0, 0.0, centre])).tolist()
    return slope / variance, item_slope, level - slope * mean / variance


def _prior(log: Log, items: Posterior, log_odds: LogOdds | None) -> BpmfPrior:
    rows = np.concatenate([items.effect[:, None], items.factors, items.traits, items.leanings], axis=1)[:-1]
    ids = log.items.get_column("item_id").to_list()
    return BpmfPrior(
        items.mean,
        items.deviation,
        tuple(items.shrinkage.tolist()),
        {str(each): tuple(row) for each, row in zip(ids, rows.tolist(), strict=True)},
        (log.scale[0], log.scale[-1]),
        log_odds,
    )


def _checked_prior(found: Any) -> BpmfPrior:
    """The prior in parsed JSON.

    Raises:
        ValueError: says what is wrong; TypeError, KeyError and AttributeError where the shape is another one.
    """
    if set(found) != {NAME, *(field.name for field in fields(BpmfPrior))} or found[NAME] != 1:
        raise ValueError(f"keys {sorted(found)}")
    low, high = (_number(each, _LARGEST) for each in found["bounds"])
    shrinkage = tuple(_number(each, _LARGEST) for each in found["shrinkage"])
    items = {
        item: (_number(effect, _LARGEST), *(_number(each, _LARGEST_FACTOR) for each in rest))
        for item, (effect, *rest) in found["items"].items()
    }
    sizes = {len(row) for row in items.values()}
    if len(sizes) > 1 or any(not 0 <= size - 1 - 2 * len(shrinkage) <= KEPT_FACTORS for size in sizes):
        raise ValueError("items with different or wrong numbers of factors")
    deviation = _number(found["deviation"], _LARGEST)
    if low >= high or deviation < _SMALLEST or len(shrinkage) > TRAITS or any(each < _SMALLEST for each in shrinkage):
        raise ValueError("bounds, deviation or shrinkage out of range")
    given = found["log_odds"]
    log_odds = None
    if given is not None:
        if set(given) != {field.name for field in fields(LogOdds)}:
            raise ValueError(f"log_odds with keys {sorted(given)}")
        slope, item_slope, intercept = (_number(given[name], _LARGEST) for name in _WEIGHTS)
        for each in (given["item_mean"]["mean"], *given["item_mean"]["items"].values()):
            _number(each, _LARGEST)
        log_odds = LogOdds(slope, item_slope, intercept, Prior.from_json(json.dumps(given["item_mean"])))
    return BpmfPrior(_number(found["mean"], _LARGEST), deviation, shrinkage, items, (low, high), log_odds)


def _number(found: Any, largest: float) -> float:
    if isinstance(found, bool) or not isinstance(found, int | float) or not abs(found) <= largest:
        raise ValueError("a number out of range")
    return float(found)
