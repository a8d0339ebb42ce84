"""What the counts alone can tell: global mean, item mean, user+item bias and popularity, as log-odds.

A baseline knows exactly what the model knows about a row:

* a training row: the training events strictly earlier in time, so never its own label nor one of the same second;
* a validation or test row, `history` "streaming": of its user the events strictly earlier in time, of whichever split,
  as the prompt shows them; of items and of everybody all training events, which the weights have met, and the
  validation and test events strictly earlier in time;
* a validation or test row, `history` "frozen": all training events, of its user and of items.

Drawn negatives (`data.sampled_negatives`) are known of items, not of users: whoever asks later has clicks alone.

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
from peftrec.interactions import sorted_order
from peftrec.metrics import chances

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
LOWEST, HIGHEST = 0.02, 0.98
_BOUND = math.log(HIGHEST / LOWEST)
_ALL = slice(None)
_NEWTON_STEPS = 25
_LEAST_STEP = 1e-9


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


def predict(
    log: Log,
    history: History,
    ties: Ties = "isolate",
    shrinkage: Shrinkage | None = None,
    items: History | None = None,
) -> Predictions:
    """Score all rows by what is known of each.

    Args:
        log: all splits.
        history: what validation and test rows know, see the module's text.
        ties: "order" lets a row know the events of its own user that share its timestamp and stand before it, as the
            model does then; items still count strictly earlier events only.
        shrinkage: chosen on the validation rows (log loss, a grid) if left out; the default where there are none.
        items: what validation and test rows know of items and of everybody; as of their user if left out.
    """
    items = items or history
    if not (log.item >= 0).any():
        return Predictions({"global_mean": _Means(log, items).log_odds}, shrinkage or Shrinkage())
    known = _Effects(log, history, ties, items)
    shrinkage = shrinkage or known.best_shrinkage()
    user_gap, user_variance = known.user_sums(shrinkage.item)
    scores = {
        "global_mean": known.means.log_odds,
        "item_mean": logit(known.item_chance(shrinkage.item_mean)),
        "bias": _bias(logit(known.item_chance(shrinkage.item)), user_gap, user_variance, shrinkage.user),
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
        self, history_items: Sequence[Any], history_labels: Sequence[float], candidate_items: Sequence[Any]
    ) -> Floats:
        """Log-odds for candidates of one person, equal to `bias` of a frozen test row with this history.

        Args:
            history_items: item ids that the person has met, shape (h,); may be empty.
            history_labels: 0 or 1 for each, shape (h,).
            candidate_items: item ids to score, shape (c,).

        Returns:
            Shape (c,).
        """
        chance = chances(self.of_items(history_items))
        gap = float(np.sum(np.asarray(history_labels, dtype=np.float64) - chance))
        variance = float(np.sum(chance * (1 - chance)))
        return _bias(self.of_items(candidate_items), gap, variance, self.user_shrinkage)

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
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise ModelError(
                f"prior: {error}; expected mean, items and user_shrinkage as finite numbers; fetch the adapter again"
            ) from None
        return prior

    def of_items(self, items: Sequence[Any]) -> Floats:
        """Log-odds of items by a person of whom nothing is known, (c,)."""
        return self.mean + np.array([self.items.get(str(item), 0.0) for item in items], dtype=np.float64)


def fit_prior(log: Log, shrinkage: Shrinkage | None = None) -> Prior:
    """The bias of all training events; `shrinkage` as `predict` chose it, else chosen for streaming."""
    shrinkage = shrinkage or predict(log, "streaming").shrinkage
    train = log.split == 0
    mean = _smoothed(log.label[train].sum(dtype=np.float64), int(train.sum()))
    with_item = train & (log.item >= 0)
    likes, events = _item_totals(log, with_item)
    effects = logit(_shrunk(likes, events, mean, shrinkage.item)) - logit(mean)
    ids = log.items.get_column("item_id").to_list() if len(log.items) else []
    items = {str(ids[code]): float(effects[code]) for code in np.flatnonzero(events)}
    return Prior(float(logit(mean)), items, shrinkage.user)


class Earlier:
    """Sums over the rows of the same key that are strictly earlier in time.

    Rows are sorted by key and time once; then such a sum is a difference of two cumulative sums.
    """

    def __init__(self, key: npt.NDArray[Any], time: npt.NDArray[Any]):
        self._order = sorted_order(key, time)
        key, time = key[self._order], time[self._order]
        new = np.ones(len(key), dtype=bool)
        new[1:] = key[1:] != key[:-1]
        # 32 bits are half the memory, and more rows than that are refused with an OverflowError.
        place = np.arange(len(key), dtype=np.int32)
        self._start = np.maximum.accumulate(np.where(new, place, np.int32(0)))
        new[1:] |= time[1:] != time[:-1]
        self._now = np.maximum.accumulate(np.where(new, place, np.int32(0)))

    def sum(self, value: npt.NDArray[Any]) -> Floats:
        """(n,) -> (n,)."""
        running = np.zeros(len(value) + 1)
        np.cumsum(value[self._order], dtype=np.float64, out=running[1:])
        result: Floats = np.empty(len(value))
        result[self._order] = running[self._now] - running[self._start]
        return result


class Known:
    """Sums over what each row knows of the other rows with the same key, a code from -1.

    A training row knows the training rows strictly earlier in time. `held_knows` is for validation and test rows:
    "training" is all training rows, "streaming" those and the validation and test rows strictly earlier in time, "past"
    the rows of any split strictly earlier in time.
    """

    def __init__(
        self,
        key: npt.NDArray[Any],
        time: npt.NDArray[Any],
        train: npt.NDArray[np.bool_],
        held_knows: Literal["training", "streaming", "past"],
    ):
        self._train, self._held = train, ~train
        self._train_key, self._held_key = key[train] + 1, key[self._held] + 1
        self._keys = int(key.max(initial=-1)) + 2
        self._in_training = Earlier(key[train], time[train])
        self._in_held = Earlier(key[self._held], time[self._held]) if held_knows == "streaming" else None
        self._in_all = Earlier(key, time) if held_knows == "past" else None

    def sum(self, value: npt.NDArray[Any]) -> Floats:
        """Sum of `value` over the rows that each row knows, (n,) -> (n,)."""
        train_value = value[self._train]
        return self.join(self.of_training(train_value), self.of_held(value[self._held], train_value))

    def of_training(self, value: npt.NDArray[Any]) -> Floats:
        """The same for training rows alone, (t,) -> (t,)."""
        return self._in_training.sum(value)

    def of_held(self, value: npt.NDArray[Any], settled: npt.NDArray[Any]) -> Floats:
        """The same for validation and test rows alone, (h,) -> (h,); `settled`, (t,), is what training rows count."""
        if self._in_all is not None:
            past: Floats = self._in_all.sum(self.join(settled, value))[self._held]
            return past
        total = np.bincount(self._train_key, settled, self._keys).astype(np.float64)  # of no rows it is of integers
        known: Floats = total[self._held_key]
        if self._in_held is not None:
            known += self._in_held.sum(value)
        return known

    def join(self, training: npt.NDArray[Any], held: npt.NDArray[Any]) -> Floats:
        """(t,) and (h,) -> (n,)."""
        result: Floats = np.empty(len(self._train))
        result[self._train], result[self._held] = training, held
        return result


class _Means:
    """The share of likes known to each row, over all users and items."""

    def __init__(self, log: Log, history: History):
        one_key = np.zeros(len(log.label), dtype=np.int8)
        everything = Known(one_key, log.timestamp, log.split == 0, items_known(history))
        self.chance = _smoothed(everything.sum(log.label), everything.sum(np.ones(len(log.label), dtype=np.int8)))
        self.log_odds = logit(self.chance)


class _Effects:
    """What each row knows of its item and its user, for any shrinkage."""

    def __init__(self, log: Log, history: History, ties: Ties, of_items: History):
        self.means = _Means(log, of_items)
        self._log = log
        train, has_item = log.split == 0, log.item >= 0
        items = Known(log.item, log.timestamp, train, items_known(of_items))
        self.item_events = items.sum(has_item)
        self._item_likes = items.sum(has_item * log.label)
        del items
        # A log is sorted by user, then time: a row's place tells the events of one second apart.
        user_time = log.timestamp if ties == "isolate" else np.arange(len(log.user))
        self._users = Known(log.user, user_time, train, "past" if history == "streaming" else "training")
        self._train, self._held, self._met = train, ~train, log.met
        self._settled_likes, self._settled_events = _item_totals(log, train & has_item)
        self._settled_mean = _smoothed(log.label[train].sum(dtype=np.float64), int(train.sum()))

    def item_chance(self, shrinkage: float, rows: npt.NDArray[np.bool_] | slice = _ALL) -> Floats:
        """The smoothed share of likes of each row's item, for the given rows."""
        return _shrunk(self._item_likes[rows], self.item_events[rows], self.means.chance[rows], shrinkage)

    def user_sums(self, item_shrinkage: float) -> tuple[Floats, Floats]:
        """Sum of `label - chance` and of the chances' variance over the known events of the user.

        Chances are those of the event's own moment; validation and test rows look at training events with all that
        training tells about their items, as a saved prior does.
        """
        chance, met = self.item_chance(item_shrinkage, self._train), self._met[self._train]
        gap = self._users.of_training(met * (self._log.label[self._train] - chance))
        variance = self._users.of_training(met * chance * (1 - chance))
        held_gap, held_variance = self._held_user_sums(item_shrinkage)
        return self._users.join(gap, held_gap), self._users.join(variance, held_variance)

    def _held_user_sums(self, item_shrinkage: float) -> tuple[Floats, Floats]:
        chance, log = self.item_chance(item_shrinkage, self._held), self._log
        of_items = _shrunk(self._settled_likes, self._settled_events, self._settled_mean, item_shrinkage)
        # The mean stands last, where the item code -1 of a row without item finds it.
        settled = np.append(of_items, self._settled_mean)[log.item[self._train]]
        met, met_before = self._met[self._held], self._met[self._train]
        gap = self._users.of_held(
            met * (log.label[self._held] - chance), met_before * (log.label[self._train] - settled)
        )
        return gap, self._users.of_held(met * chance * (1 - chance), met_before * settled * (1 - settled))

    def best_shrinkage(self) -> Shrinkage:
        """The grid's lowest log loss on validation rows."""
        valid = self._log.split == 1
        if not valid.any():
            return Shrinkage()
        liked = self._log.label[valid] == 1
        item_means, biases = {}, {}
        for item in _ITEM_GRID:
            log_odds = logit(self.item_chance(item, valid))
            item_means[item] = _log_loss(liked, log_odds)
            gap, variance = (sums[valid[self._held]] for sums in self._held_user_sums(item))
            for user in _USER_GRID:
                biases[item, user] = _log_loss(liked, _bias(log_odds, gap, variance, user))
        item, user = min(biases, key=lambda pair: biases[pair])
        return Shrinkage(min(item_means, key=lambda one: item_means[one]), item, user)


def items_known(history: History) -> Literal["training", "streaming"]:
    """What validation and test rows know of items, in the words of `Known`."""
    return "streaming" if history == "streaming" else "training"


def _bias(item_log_odds: Floats, user_gap: npt.ArrayLike, user_variance: npt.ArrayLike, shrinkage: float) -> Floats:
    """Item log-odds plus one Newton step from 0 of the user's own intercept, under a Gaussian prior."""
    bias: Floats = item_log_odds + np.divide(user_gap, np.add(user_variance, shrinkage))
    return np.clip(bias, -_BOUND, _BOUND)


def _item_totals(log: Log, rows: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Likes and events of each item code over the given rows."""
    size = int(log.item.max(initial=-1)) + 1
    likes: Floats = np.bincount(log.item[rows], weights=log.label[rows], minlength=size).astype(np.float64)
    return likes, np.bincount(log.item[rows], minlength=size).astype(np.float64)


def _smoothed(likes: Any, events: Any) -> Any:
    """Share of likes after one like and one dislike that nobody gave, so that the first rows have one too."""
    return np.clip((likes + 1.0) / (events + 2.0), LOWEST, HIGHEST)


def _shrunk(likes: Floats, events: Floats, mean: Any, shrinkage: float) -> Floats:
    chance: Floats = np.clip((likes + shrinkage * mean) / (events + shrinkage), LOWEST, HIGHEST)
    return chance


def logit(chance: Any) -> Any:
    """Log-odds of chances strictly between 0 and 1."""
    return np.log(chance) - np.log1p(-chance)


def _log_loss(liked: npt.NDArray[np.bool_], log_odds: Floats) -> float:
    # Bounded as they are, log-odds do not overflow, and this is many times as fast as logaddexp.
    return float(np.mean(np.log(1 + np.exp(np.where(liked, -log_odds, log_odds)))))


def platt(
    predicted: Floats, liked: npt.NDArray[np.bool_], *, centre: float = 0.5, slope: float = 4.0
) -> tuple[float, float]:
    """Slope and intercept that make log-odds of predicted answers (Platt's scaling), by Newton steps.

    A Gaussian prior around `slope * (predicted - centre)` stands in where rows are few, all of one kind, or perfectly
    told apart.

    Args:
        predicted: (n,).
        liked: (n,).
        centre: what stands for an even chance.
        slope: of the log-odds there: that of the tangent, 4 where a like is 1 and a dislike 0.
    """
    design = np.stack([predicted, np.ones_like(predicted)], axis=1)
    found = logistic(design, liked, np.array([slope, -slope * centre]))
    return float(found[0]), float(found[1])


def logistic(design: Floats, liked: npt.NDArray[np.bool_], prior: Floats) -> Floats:
    """Weights (d,) of log-odds `design @ weights`, by Newton steps under a Gaussian prior around `prior` (d,).

    A step that would make things worse, as from where all chances are near 0 or 1, is halved until it does not.

    Args:
        design: (n, d).
        liked: (n,).
        prior: where the weights are without rows, each with a deviation of one.
    """

    def loss(weights: Floats) -> float:
        log_odds = design @ weights
        of_rows = np.logaddexp(0, np.where(liked, -log_odds, log_odds))
        return float(of_rows.sum() + np.sum((weights - prior) ** 2) / 2)

    found, lowest = prior, loss(prior)
    for _ in range(_NEWTON_STEPS):
        chance = chances(np.clip(design @ found, -30, 30))
        gradient = (chance - liked) @ design + (found - prior)
        curvature = (design * (chance * (1 - chance))[:, None]).T @ design + np.eye(len(prior))
        step = np.linalg.solve(curvature, gradient)
        while (reached := loss(found - step)) > lowest and np.abs(step).max() > _LEAST_STEP:
            step = step / 2
        if reached > lowest:
            break
        found, lowest = found - step, reached
    return found
