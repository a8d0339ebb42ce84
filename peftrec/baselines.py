"""What the counts alone can tell: global mean, item mean, user+item bias and popularity, as log-odds.

A baseline knows exactly what the model knows about a row:

* a training row: the training events strictly earlier in time, so never its own label nor one of the same second;
* a validation or test row: all training events and, when `history` is "streaming", the validation and test events
  strictly earlier in time. When it is "frozen", the training events only.

That makes the bias of a training row honest enough to be the prior on which the model learns the residual. Everything
is sums over sorted groups: no loop goes over rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from peftrec.errors import ModelError

if TYPE_CHECKING:
    from peftrec.split import Log

Floats = npt.NDArray[np.float64]
History = Literal["streaming", "frozen"]
Ties = Literal["isolate", "order"]

RANKING_ONLY = ("popularity",)
"""Baselines whose scores order rows but are no log-odds."""

_ITEM_GRID = (1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 40.0)
_USER_GRID = (0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0)
# No count proves a probability beyond these.
_LOWEST, _HIGHEST = 0.02, 0.98
_BOUND = math.log(_HIGHEST / _LOWEST)


@dataclass(frozen=True)
class Shrinkage:
    """How strongly few events are drawn to the mean.

    Attributes:
        item_mean: events at the global mean that the item mean starts from.
        item: the same for the item part of the bias.
        user: variance (a quarter is one event of an even chance) that the user part of the bias starts from.
    """

    item_mean: float = 5.0
    item: float = 5.0
    user: float = 3.0


@dataclass(frozen=True)
class Predictions:
    """Scores of every row of a log.

    Attributes:
        scores: baseline -> float64 (n,): log-odds `global_mean`, `item_mean`, `bias`, and `popularity`, the number of
            known events of the item. A log without items has `global_mean` alone.
        shrinkage: what they were made with.
    """

    scores: dict[str, Floats]
    shrinkage: Shrinkage


def predict(log: Log, history: History, ties: Ties = "isolate", shrinkage: Shrinkage | None = None) -> Predictions:
    """Score all rows by what is known of each.

    Args:
        log: all splits.
        history: what validation and test rows know, see the module's text.
        ties: "order" lets a row know the events of its own user that share its timestamp and stand before it, as the
            model does then; items still count strictly earlier events only.
        shrinkage: chosen on the validation rows (log loss, a grid) if left out; the default where there are none.
    """
    if not (log.item >= 0).any():
        return Predictions({"global_mean": _Means(log, history).log_odds}, shrinkage or Shrinkage())
    known = _Effects(log, history, ties)
    shrinkage = shrinkage or known.best_shrinkage()
    user_gap, user_variance = known.user_sums(shrinkage.item)
    scores = {
        "global_mean": known.means.log_odds,
        "item_mean": _logit(known.item_chance(shrinkage.item_mean)),
        "bias": _bias(known.item_chance(shrinkage.item), user_gap, user_variance, shrinkage.user),
        "popularity": known.item_events,
    }
    return Predictions(scores, shrinkage)


@dataclass(frozen=True)
class Prior:
    """The user+item bias of all training events, small enough to travel with an adapter.

    Attributes:
        mean: log-odds of a like over all training events.
        items: item id as a string -> what the item adds to `mean`; other items add nothing.
        user_shrinkage: `Shrinkage.user`.
    """

    mean: float
    items: Mapping[str, float]
    user_shrinkage: float

    def scores(
        self, history_items: Sequence[Any], history_labels: Sequence[int], candidate_items: Sequence[Any]
    ) -> Floats:
        """Log-odds for candidates of one person, equal to `bias` of a frozen test row with this history.

        Args:
            history_items: item ids that the person has met, shape (h,); may be empty.
            history_labels: 0 or 1 for each, shape (h,).
            candidate_items: item ids to score, shape (c,).

        Returns:
            Shape (c,).
        """
        chance = _sigmoid(self._item_log_odds(history_items))
        gap = float(np.sum(np.asarray(history_labels, dtype=np.float64) - chance))
        variance = float(np.sum(chance * (1 - chance)))
        return _bias(_sigmoid(self._item_log_odds(candidate_items)), gap, variance, self.user_shrinkage)

    def to_json(self) -> str:
        """One JSON object; `from_json` gives an equal prior back."""
        return json.dumps({"mean": self.mean, "items": dict(self.items), "user_shrinkage": self.user_shrinkage})

    @classmethod
    def from_json(cls, text: str) -> Prior:
        """Read what `to_json` wrote.

        Raises:
            ModelError: anything else.
        """
        try:
            found = json.loads(text)
            if set(found) != {field.name for field in fields(cls)}:
                raise ValueError(f"keys {sorted(found)}")
            items = {str(item): float(effect) for item, effect in found["items"].items()}
            prior = cls(float(found["mean"]), items, float(found["user_shrinkage"]))
            if not all(map(math.isfinite, (prior.mean, *items.values()))) or not 0 < prior.user_shrinkage < math.inf:
                raise ValueError("a number out of range")
        except (ValueError, TypeError, AttributeError) as error:
            raise ModelError(
                f"prior: {error}; expected mean, items and user_shrinkage as finite numbers; fetch the adapter again"
            ) from None
        return prior

    def _item_log_odds(self, items: Sequence[Any]) -> Floats:
        return self.mean + np.array([self.items.get(str(item), 0.0) for item in items], dtype=np.float64)


def fit_prior(log: Log, shrinkage: Shrinkage | None = None) -> Prior:
    """The bias of all training events; `shrinkage` as `predict` chose it, else chosen for streaming."""
    shrinkage = shrinkage or predict(log, "streaming").shrinkage
    train = log.split == 0
    mean = _smoothed(log.label[train].sum(dtype=np.float64), int(train.sum()))
    with_item = train & (log.item >= 0)
    likes, events = _item_totals(log, with_item)
    effects = _logit(_shrunk(likes, events, mean, shrinkage.item)) - _logit(mean)
    ids = log.items.get_column("item_id").to_list() if len(log.items) else []
    items = {str(ids[code]): float(effects[code]) for code in np.flatnonzero(events)}
    return Prior(float(_logit(mean)), items, shrinkage.user)


class _Known:
    """Sums over what each row knows of the other rows with the same key.

    Rows are sorted by key and time once; then a sum over "strictly earlier" is a difference of two cumulative sums.
    """

    def __init__(self, key: npt.NDArray[Any], time: npt.NDArray[Any], train: npt.NDArray[np.bool_], streaming: bool):
        order = np.lexsort((time, key))
        key, time = key[order], time[order]
        new_key = np.ones(len(order), dtype=bool)
        new_key[1:] = key[1:] != key[:-1]
        new_time = new_key.copy()
        new_time[1:] |= time[1:] != time[:-1]
        self._order = order
        self._train = train[order]
        self._streaming = streaming
        starts = np.flatnonzero(new_key)
        group = np.cumsum(new_key) - 1
        self._start = starts[group]
        self._end = np.append(starts[1:], len(order))[group] if len(order) else starts
        self._now = np.flatnonzero(new_time)[np.cumsum(new_time) - 1]

    def sum(self, value: npt.NDArray[Any], settled: npt.NDArray[Any] | None = None) -> Floats:
        """Sum of `value` over the rows that each row knows, (n,) -> (n,).

        `settled`, (n,), is what training rows are worth to validation and test rows, which know all of them.
        """
        train, value = self._train, value[self._order]
        settled = value if settled is None else settled[self._order]
        earlier, of_training = _running(value, train), _running(settled, train)
        to_training = earlier[self._now] - earlier[self._start]
        known: Floats = np.where(train, to_training, of_training[self._end] - of_training[self._start])
        if self._streaming:
            later = _running(value, ~train)
            known += np.where(train, 0, later[self._now] - later[self._start])
        result: Floats = np.empty_like(known)
        result[self._order] = known
        return result


class _Means:
    """The share of likes known to each row, over all users and items."""

    def __init__(self, log: Log, history: History):
        one_key = np.zeros(len(log.label), dtype=np.int8)
        everything = _Known(one_key, log.timestamp, log.split == 0, history == "streaming")
        self.chance = _smoothed(everything.sum(log.label), everything.sum(np.ones(len(log.label))))
        self.log_odds = _logit(self.chance)


class _Effects:
    """What each row knows of its item and its user, for any shrinkage."""

    def __init__(self, log: Log, history: History, ties: Ties):
        self.means = _Means(log, history)
        self._log = log
        train, streaming, has_item = log.split == 0, history == "streaming", log.item >= 0
        items = _Known(log.item, log.timestamp, train, streaming)
        self.item_events = items.sum(has_item)
        self._item_likes = items.sum(has_item * log.label)
        # A log is sorted by user, then time: a row's place tells the events of one second apart.
        user_time = log.timestamp if ties == "isolate" else np.arange(len(log.user))
        self._users = _Known(log.user, user_time, train, streaming)
        self._settled_likes, self._settled_events = _item_totals(log, train & has_item)
        self._settled_mean = _smoothed(log.label[train].sum(dtype=np.float64), int(train.sum()))

    def item_chance(self, shrinkage: float) -> Floats:
        return _shrunk(self._item_likes, self.item_events, self.means.chance, shrinkage)

    def user_sums(self, item_shrinkage: float) -> tuple[Floats, Floats]:
        """Sum of `label - chance` and of the chances' variance over the known events of the user.

        Chances are those of the event's own moment; validation and test rows look at training events with all that
        training tells about their items, as a saved prior does.
        """
        chance, log = self.item_chance(item_shrinkage), self._log
        of_items = _shrunk(self._settled_likes, self._settled_events, self._settled_mean, item_shrinkage)
        settled = np.where(log.item >= 0, of_items[log.item], self._settled_mean)
        gap = self._users.sum(log.label - chance, log.label - settled)
        return gap, self._users.sum(chance * (1 - chance), settled * (1 - settled))

    def best_shrinkage(self) -> Shrinkage:
        """The grid's lowest log loss on validation rows."""
        valid = self._log.split == 1
        if not valid.any():
            return Shrinkage()
        liked = self._log.label[valid] == 1
        item_means, biases = {}, {}
        for item in _ITEM_GRID:
            chance = self.item_chance(item)[valid]
            item_means[item] = _log_loss(liked, _logit(chance))
            gap, variance = (sums[valid] for sums in self.user_sums(item))
            for user in _USER_GRID:
                biases[item, user] = _log_loss(liked, _bias(chance, gap, variance, user))
        item, user = min(biases, key=lambda pair: biases[pair])
        return Shrinkage(min(item_means, key=lambda one: item_means[one]), item, user)


def _bias(item_chance: Floats, user_gap: npt.ArrayLike, user_variance: npt.ArrayLike, shrinkage: float) -> Floats:
    """Item log-odds plus one Newton step from 0 of the user's own intercept, under a Gaussian prior."""
    bias: Floats = _logit(item_chance) + np.divide(user_gap, np.add(user_variance, shrinkage))
    return np.clip(bias, -_BOUND, _BOUND)


def _item_totals(log: Log, rows: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Likes and events of each item code over the given rows."""
    size = int(log.item.max(initial=-1)) + 1
    likes: Floats = np.bincount(log.item[rows], weights=log.label[rows], minlength=size).astype(np.float64)
    return likes, np.bincount(log.item[rows], minlength=size).astype(np.float64)


def _smoothed(likes: Any, events: Any) -> Any:
    """Share of likes after one like and one dislike that nobody gave, so that the first rows have one too."""
    return np.clip((likes + 1.0) / (events + 2.0), _LOWEST, _HIGHEST)


def _shrunk(likes: Floats, events: Floats, mean: Any, shrinkage: float) -> Floats:
    chance: Floats = np.clip((likes + shrinkage * mean) / (events + shrinkage), _LOWEST, _HIGHEST)
    return chance


def _running(value: npt.NDArray[Any], rows: npt.NDArray[np.bool_]) -> Floats:
    """Cumulative sum over `rows` that starts at 0: (n,) -> (n + 1,)."""
    total = np.zeros(len(value) + 1)
    np.cumsum(np.where(rows, value, 0), dtype=np.float64, out=total[1:])
    return total


def _logit(chance: Any) -> Any:
    return np.log(chance) - np.log1p(-chance)


def _sigmoid(log_odds: Floats) -> Floats:
    chance: Floats = 1 / (1 + np.exp(-log_odds))
    return chance


def _log_loss(liked: npt.NDArray[np.bool_], log_odds: Floats) -> float:
    return float(np.mean(np.logaddexp(0, np.where(liked, -log_odds, log_odds))))
