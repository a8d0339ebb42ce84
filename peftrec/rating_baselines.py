"""What ratings alone can tell: means, user+item bias and matrix factorisation, in units of the scale.

As with clicks (`peftrec/baselines.py`), a baseline knows what the model knows about a row. All of them are one formula,
`mean + effect of the item + [1, factors of the item] . part of the user`, with parts left out:

* the item's side comes from training events; for a training row only from those of other users, drawn into groups, so
  that it never holds the row's own rating. Held-out (validation and test) ratings are in no item's side;
* the user's side is solved from the events known of that user. A held-out row knows all training events (`history`
  "frozen") or the strictly earlier ones of whichever split ("streaming"); a training row the strictly earlier training
  events (`order` "time") or all other ones ("random").

That makes the score of a training row honest enough to be the prior on which the model learns the residual.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from peftrec import factors
from peftrec.baselines import RANKING_ONLY, History, Ties
from peftrec.draws import drawn_order
from peftrec.errors import ModelError
from peftrec.factors import Floats, Items, Penalties

if TYPE_CHECKING:
    from peftrec.split import Log

Order = Literal["time", "random"]
Kind = Literal["bias", "mf"]
Rows = npt.NDArray[np.bool_]

NAMES = ("global_mean", "user_mean", "item_mean", "bias", "mf", "popularity")
MOST_FACTORS = 64

_GROUPS = 5
_OF_NO_ITEM = ("global_mean", "user_mean")
_WITH_USER = ("user_mean", "bias", "mf")
_ITEM_MEAN_GRID = (1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0)
_ITEM_GRID = (1.0, 2.0, 4.0)
_USER_GRID = (2.0, 4.0, 8.0)
_FACTORS_GRID = (5, 10, 20)
_FACTOR_PENALTY_GRID = (10.0, 12.0, 15.0, 20.0)
# What a saved prior may hold: far beyond any fit, and small enough that no sum overflows and no system is singular.
_LARGEST, _LARGEST_FACTOR, _PENALTIES = 1e6, 1e3, (1e-3, 1e9)


@dataclass(frozen=True)
class RatingSettings:
    """How strongly few events are drawn to the mean, and how many factors there are.

    Attributes:
        item_mean: events at the global mean that the item mean starts from.
        item: the same for the item effects of `bias` and `mf`.
        user: events at zero that a user's intercept starts from.
        factors: number of factors of `mf`, at most `MOST_FACTORS`.
        factor_penalty: ridge penalty on the factors of items and users.
    """

    item_mean: float = 5.0
    item: float = 3.0
    user: float = 4.0
    factors: int = 10
    factor_penalty: float = 12.0

    def __post_init__(self) -> None:
        assert 0 <= self.factors <= MOST_FACTORS, self.factors


@dataclass(frozen=True)
class RatingPredictions:
    """Scores of every row of a log.

    Attributes:
        scores: baseline -> float64 (n,): ratings within the scale, and for `popularity` the number of training events
            of the item, the row itself not counted. A log without items has `global_mean` and `user_mean` alone.
        settings: what they were made with.
    """

    scores: dict[str, Floats]
    settings: RatingSettings


def predict(
    log: Log,
    history: History,
    ties: Ties = "isolate",
    order: Order = "time",
    settings: RatingSettings | None = None,
    seed: int = 13,
    names: Sequence[str] = NAMES,
) -> RatingPredictions:
    """Score all rows by what is known of each.

    Args:
        log: all splits, with ratings.
        history: what validation and test rows know of their user, see the module's text.
        ties: "order" lets a row know the events of its own user that share its timestamp and stand before it.
        order: what training rows know of their user.
        settings: chosen on the validation rows (squared error, a grid) if left out; the default where there are none.
        seed: draws the groups of users and the factors that fits start from.
        names: which of `NAMES` to compute; `mf` takes by far the longest.
    """
    names = [name for name in NAMES if name in names and (len(log.items) or name in _OF_NO_ITEM)]
    known = _Known(log, history, ties, order, seed)
    settings = settings or _best_settings(known, names)
    scores = {name: known.ratings(name, settings) for name in names if name not in RANKING_ONLY}
    if "popularity" in names:
        scores["popularity"] = known.popularity()
    return RatingPredictions(scores, settings)


@dataclass(frozen=True)
class RatingPrior:
    """The items' side after all training events, small enough to travel with an adapter.

    Attributes:
        mean: mean rating of all training events.
        items: item id as a string -> effect and factors (1 + k numbers, the same k for all); other items have zeros.
        user_penalty: `RatingSettings.user`.
        factor_penalty: `RatingSettings.factor_penalty`.
        bounds: lowest and highest rating.
    """

    mean: float
    items: Mapping[str, tuple[float, ...]]
    user_penalty: float
    factor_penalty: float
    bounds: tuple[float, float]

    def scores(
        self, history_items: Sequence[Any], history_ratings: Sequence[float], candidate_items: Sequence[Any]
    ) -> Floats:
        """Ratings of candidates by one person, equal to those of a frozen test row with this history.

        Args:
            history_items: item ids that the person has rated, shape (h,); may be empty.
            history_ratings: the rating of each, shape (h,).
            candidate_items: item ids to score, shape (c,).

        Returns:
            Shape (c,).
        """
        met, candidates = self._codes(history_items), self._codes(candidate_items)
        base, design = self._items.base(candidates), self._items.design(candidates)
        residual = np.asarray(history_ratings, dtype=np.float64) - self._items.base(met)
        penalty = Penalties(0.0, self.user_penalty, self.factor_penalty).of_user(design.shape[1] - 1)
        return np.clip(base + design @ factors.solve(self._items.design(met), residual, penalty), *self.bounds)

    def to_json(self) -> str:
        """One JSON object; `from_json` gives an equal prior back."""
        return json.dumps({field.name: getattr(self, field.name) for field in fields(self)}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> RatingPrior:
        """Read what `to_json` wrote.

        Raises:
            ModelError: anything else.
        """
        try:
            return _checked_prior(json.loads(text))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            names = ", ".join(field.name for field in fields(cls))
            raise ModelError(
                f"prior: {error}; expected {names} in numbers, as many for each item; fetch the adapter again"
            ) from None

    @cached_property
    def _code(self) -> dict[str, int]:
        return {item: code for code, item in enumerate(self.items)}

    @cached_property
    def _items(self) -> Items:
        width = len(next(iter(self.items.values()), (0.0,)))
        rows = np.zeros((len(self.items) + 1, width))
        rows[:-1] = np.array(list(self.items.values())).reshape(-1, width)
        return Items(self.mean, rows[:, 0], rows[:, 1:])

    def _codes(self, items: Sequence[Any]) -> npt.NDArray[np.int64]:
        return np.array([self._code.get(str(item), -1) for item in items], dtype=np.int64)


def fit_prior(log: Log, kind: Kind, settings: RatingSettings, seed: int = 13) -> RatingPrior:
    """The items' side of `bias` or `mf` after all training events; factors are kept to seven digits.

    Args:
        log: all splits, with ratings.
        kind: whose formula.
        settings: as `predict` chose them.
        seed: as `predict` had it.
    """
    train = log.split == 0
    items = _fitted(kind, log, train, settings, seed)
    ids = log.items.get_column("item_id").to_list() if len(log.items) else []
    rows = {
        str(ids[code]): (float(items.effect[code]), *(float(f"{value:.7g}") for value in items.factors[code]))
        for code in np.unique(log.item[train & (log.item >= 0)])
    }
    return RatingPrior(items.mean, rows, settings.user, settings.factor_penalty, (log.scale[0], log.scale[-1]))


class _Known:
    """What each row of a log knows of its item and its user, for any settings."""

    def __init__(self, log: Log, history: History, ties: Ties, order: Order, seed: int):
        self.log, self._history, self._ties, self._order, self._seed = log, history, ties, order, seed
        self.rating = _ratings(log)
        self._train = log.split == 0
        users = len(log.user_ids)
        self._start = np.searchsorted(log.user, np.arange(users + 1))
        group_of = np.empty(users, dtype=np.int64)
        group_of[drawn_order(users, seed, "rating groups")] = np.arange(users) % _GROUPS
        self._group = group_of[log.user]

    def ratings(self, name: str, settings: RatingSettings) -> Floats:
        """Predictions (n,) of the baseline."""
        found: Floats = np.empty(len(self.log))
        parts = [(~self._train, self._train)]
        parts += [
            (self._train & (self._group == group), self._train & (self._group != group)) for group in range(_GROUPS)
        ]
        for rows, fitted_on in parts:
            if rows.any():
                found[rows] = self._part(name, settings, rows, fitted_on)
        return found

    def held(self, name: str, settings: RatingSettings, rows: Rows) -> Floats:
        """The same for some of the validation and test rows alone."""
        return self._part(name, settings, rows, self._train)

    def popularity(self) -> Floats:
        """Training events of each row's item, without the row itself (n,)."""
        item = self.log.item
        counts = np.append(np.bincount(item[self._train & (item >= 0)], minlength=len(self.log.items)), 0)
        known: Floats = (counts[item] - (self._train & (item >= 0))).astype(np.float64)
        return known

    def _part(self, name: str, settings: RatingSettings, rows: Rows, fitted_on: Rows) -> Floats:
        """Predictions of the given rows, all of training or all held out, from items fitted on other rows."""
        items = _fitted(name, self.log, fitted_on, settings, self._seed)
        found = items.base(self.log.item[rows])
        if name in _WITH_USER:
            found += self._of_users(items, settings, rows)
        return np.clip(found, self.log.scale[0], self.log.scale[-1])

    def _of_users(self, items: Items, settings: RatingSettings, rows: Rows) -> Floats:
        """What users add to the given rows."""
        item, train = self.log.item, self._train
        penalty = _penalties(settings).of_user(items.factors.shape[1])
        of_training = bool(train[rows].all())
        added: Floats = np.zeros(len(self.log))
        for events in self._users(rows, without_held=of_training):
            wanted = rows[events]
            design, residual = items.design(item[events]), self.rating[events] - items.base(item[events])
            met = self.log.met[events]
            if of_training and self._order == "random":
                added[events[met]] = factors.leave_one_out(design[met], residual[met], penalty)
                added[events[~met]] = design[~met] @ factors.solve(design[met], residual[met], penalty)
            elif of_training or self._history == "streaming":
                earlier = self._earlier(events)
                told = factors.solved_earlier(design * met[:, None], residual, earlier, wanted, penalty)
                added[events[wanted]] = np.sum(design[wanted] * told, axis=1)
            else:
                known = train[events] & met
                added[events[wanted]] = design[wanted] @ factors.solve(design[known], residual[known], penalty)
        return added[rows]

    def _users(self, rows: Rows, without_held: bool) -> Iterator[npt.NDArray[np.int64]]:
        """Places of the events of each user who has one of the rows, in order of time."""
        for user in np.unique(self.log.user[rows]):
            events = np.arange(self._start[user], self._start[user + 1])
            yield events[self._train[events]] if without_held else events

    def _earlier(self, events: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many of a user's events each of them knows by time."""
        if self._ties == "order":
            return np.arange(len(events))
        time = self.log.timestamp[events]
        return np.searchsorted(time, time, side="left")


def _ratings(log: Log) -> Floats:
    assert log.rating is not None, "a log of the rating task has ratings"
    return log.rating.astype(np.float64)


def _penalties(settings: RatingSettings) -> Penalties:
    return Penalties(settings.item, settings.user, settings.factor_penalty)


def _fitted(name: str, log: Log, rows: Rows, settings: RatingSettings, seed: int) -> Items:
    """The items' side of a baseline from the given rows."""
    user, item, rating = log.user[rows], log.item[rows], _ratings(log)[rows]
    users, items = len(log.user_ids), len(log.items)
    # Without any event the middle of the scale is as good as anything.
    mean = float(rating.mean()) if len(rating) else (log.scale[0] + log.scale[-1]) / 2
    if name in ("bias", "mf"):
        k = settings.factors if name == "mf" else 0
        return factors.fit_items(user, item, rating, mean, (users, items), k, _penalties(settings), seed)
    effect: Floats = np.zeros(items + 1)
    if name == "item_mean":
        known = item >= 0
        sums = np.bincount(item[known], rating[known] - mean, items)
        effect[:-1] = sums / (np.bincount(item[known], minlength=items) + settings.item_mean)
    return Items(mean, effect, np.zeros((items + 1, 0)))


def _best_settings(known: _Known, names: Sequence[str]) -> RatingSettings:
    """The lowest squared error on validation rows of the baselines asked for, one choice after the other."""
    valid, best = known.log.split == 1, RatingSettings()
    if not valid.any():
        return best
    rating = known.rating[valid]

    def lowest(name: str, grid: Sequence[RatingSettings]) -> RatingSettings:
        return min(grid, key=lambda each: float(np.mean((known.held(name, each, valid) - rating) ** 2)))

    if "item_mean" in names:
        best = lowest("item_mean", [replace(best, item_mean=each) for each in _ITEM_MEAN_GRID])
    if "bias" in names or "mf" in names:
        best = lowest("bias", [replace(best, item=item, user=user) for item in _ITEM_GRID for user in _USER_GRID])
    elif "user_mean" in names:
        best = lowest("user_mean", [replace(best, user=user) for user in _USER_GRID])
    if "mf" in names:
        best = lowest("mf", [replace(best, factors=each) for each in _FACTORS_GRID])
        best = lowest("mf", [replace(best, factor_penalty=each) for each in _FACTOR_PENALTY_GRID])
    return best


def _checked_prior(found: Any) -> RatingPrior:
    """The prior in parsed JSON.

    Raises:
        ValueError: says what is wrong; TypeError and AttributeError where the shape is another one.
    """
    if set(found) != {field.name for field in fields(RatingPrior)}:
        raise ValueError(f"keys {sorted(found)}")
    low, high = (_number(each, _LARGEST) for each in found["bounds"])
    items = {}
    for item, (effect, *rest) in found["items"].items():
        items[item] = (_number(effect, _LARGEST), *(_number(each, _LARGEST_FACTOR) for each in rest))
    if len(sizes := {len(each) for each in items.values()}) > 1:
        raise ValueError("items with different numbers of factors")
    if sizes and max(sizes) - 1 > MOST_FACTORS:
        raise ValueError(f"more than {MOST_FACTORS} factors")
    penalties = [_number(found[name], _PENALTIES[1]) for name in ("user_penalty", "factor_penalty")]
    if low >= high or min(penalties) < _PENALTIES[0]:
        raise ValueError("bounds or a penalty out of range")
    return RatingPrior(_number(found["mean"], _LARGEST), items, penalties[0], penalties[1], (low, high))


def _number(found: Any, largest: float) -> float:
    if isinstance(found, bool) or not isinstance(found, int | float) or not abs(found) <= largest:
        raise ValueError("a number out of range")
    return float(found)
