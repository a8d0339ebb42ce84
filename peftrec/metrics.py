"""How good scores are, with intervals from resampled users and the slices that a single figure hides.

A score is the log-odds of label 1: the probability is `sigmoid(score)`. AUC over all rows rewards knowing *who likes
much* as well as *what this person likes*; `uauc`, the mean of the AUC of each user, sees only the second. Both are
always reported together.

Everything except AUC is a ratio of sums, so it is kept as sums per user: the same sums give the figure itself, any
slice, and every bootstrap resample.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from peftrec.errors import DataError

if TYPE_CHECKING:
    from peftrec.split import Log

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

RANKING_METRICS = ("auc", "uauc")
CLICK_METRICS = (*RANKING_METRICS, "log_loss", "accuracy", "precision", "recall", "f1", "ece")
ECE_BINS = 15

# Columns of the per-user sums; the ECE bins follow them.
_ROWS, _LOSS, _CORRECT, _TRUE_POSITIVE, _PREDICTED, _LIKED, _AUC, _HAS_AUC = range(8)
_COLUMNS = 8 + ECE_BINS
# Weights held at once while resampling: 32 MB of float64 for each temporary.
_CHUNK_CELLS = 4_000_000


def auc(label: npt.ArrayLike, score: npt.ArrayLike, weight: npt.ArrayLike | None = None) -> float:
    """Probability that a row of label 1 scores above a row of label 0; a tie counts a half.

    Args:
        label: 0 or 1, shape (n,).
        score: anything that orders rows, shape (n,).
        weight: how often each row counts, shape (n,); once each if left out.

    Returns:
        The AUC, or nan where only one class has weight.

    Raises:
        DataError: a score is NaN or infinite, a label is neither 0 nor 1, or lengths differ.
    """
    label_, score_ = _rows(label, score)
    ranking = _Ranking.of(label_, score_)
    weight_ = np.ones(len(label_)) if weight is None else np.asarray(weight, dtype=np.float64)
    return float(ranking.auc(weight_[None, ranking.negatives], weight_[None, ranking.positives])[0])


def uauc(label: npt.ArrayLike, score: npt.ArrayLike, user: npt.ArrayLike) -> float:
    """Mean AUC of the users who have both classes, each user counting once; nan where there is none.

    Args:
        label: 0 or 1, shape (n,).
        score: anything that orders rows of one user, shape (n,).
        user: whose row it is (any ids), shape (n,).

    Raises:
        DataError: as `auc`.
    """
    label_, score_ = _rows(label, score)
    users, n_users = _codes(user)
    values = _user_auc(label_, score_, users, n_users)
    return float(_ratio(np.nansum(values), np.isfinite(values).sum()))


def click_metrics(
    label: npt.ArrayLike, score: npt.ArrayLike, user: npt.ArrayLike, probability: bool = True
) -> dict[str, float]:
    """All figures of click prediction for one scorer.

    Args:
        label: 0 or 1, shape (n,).
        score: log-odds of label 1, shape (n,).
        user: whose row it is (any ids), shape (n,).
        probability: False for scores that only order rows (popularity): then only `auc` and `uauc`.

    Returns:
        `CLICK_METRICS` or `RANKING_METRICS` as keys. What the rows do not define is nan: AUC with one class, precision
        when nothing is predicted at p >= 0.5, recall when nothing is liked.

    Raises:
        DataError: as `auc`.
    """
    label_, score_ = _rows(label, score)
    users, n_users = _codes(user)
    sums = _user_sums(label_, score_, users, n_users, probability).sum(axis=0)
    values = {name: float(value) for name, value in _from_sums(sums, probability).items()}
    return {"auc": auc(label_, score_), **values}


@dataclass(frozen=True)
class Interval:
    """A figure and the middle 95 % of its values over resamples."""

    point: float
    low: float
    high: float


@dataclass(frozen=True)
class Bootstrap:
    """What resampling users says about several scorers of the same rows.

    Attributes:
        intervals: scorer -> metric -> interval.
        differences: other scorer -> metric -> interval of *first scorer minus this one*, paired: both are measured on
            the same resample. Only metrics that both have.
    """

    intervals: dict[str, dict[str, Interval]]
    differences: dict[str, dict[str, Interval]]


def bootstrap(
    label: npt.ArrayLike,
    scores: Mapping[str, npt.ArrayLike],
    user: npt.ArrayLike,
    n: int = 1000,
    seed: int = 13,
    ranking_only: Collection[str] = (),
) -> Bootstrap:
    """Percentile intervals (95 %) of every metric of every scorer, by drawing users with replacement.

    Users and not rows are drawn, because the rows of one user stand or fall together. A resample on which a metric is
    undefined is left out of that metric's interval.

    Args:
        label: 0 or 1, shape (n_rows,).
        scores: scorer -> log-odds, each of shape (n_rows,). Differences are taken to the first.
        user: whose row it is (any ids), shape (n_rows,).
        n: resamples; time grows with resamples x rows x scorers (about 1 s for 1000 x 10,000 x 6).
        seed: of the resamples, which all scorers share.
        ranking_only: scorers whose scores only order rows; they get `RANKING_METRICS` alone.

    Raises:
        DataError: as `auc`.
    """
    users, n_users = _codes(user)
    scorers = {}
    for name, score in scores.items():
        label_, score_ = _rows(label, score)
        scorers[name] = _Resampled.of(label_, score_, users, n_users, name not in ranking_only)
    points = {name: scorer.measure(np.ones((1, n_users))) for name, scorer in scorers.items()}
    drawn: dict[str, list[dict[str, Floats]]] = {name: [] for name in scorers}
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_CELLS // max(len(users), n_users, 1))
    for start in range(0, n if n_users else 0, chunk):
        size = min(chunk, n - start)
        times = np.stack(
            [np.bincount(rng.integers(n_users, size=n_users), minlength=n_users) for _ in range(size)]
        ).astype(np.float64)
        for name, scorer in scorers.items():
            drawn[name].append(scorer.measure(times))
    values = {name: {key: _joined(drawn[name], key) for key in points[name]} for name in scorers}
    intervals = {
        name: {key: _interval(point[0], values[name][key]) for key, point in points[name].items()} for name in scorers
    }
    first = next(iter(scorers), "")
    differences = {
        name: {
            key: _interval(points[first][key][0] - points[name][key][0], values[first][key] - values[name][key])
            for key in points[name]
            if key in points[first]
        }
        for name in scorers
        if name != first
    }
    return Bootstrap(intervals, differences)


def slices(log: Log) -> dict[str, Bools]:
    """Which rows of a log are hard in which way.

    * `cold_item`, `cold_user`: the item, the user, has no training event.
    * `popular`, `mid`, `tail`: items ranked by training events and cut where they hold a third and two thirds of all
      training events; items with equally many events stay together. With `cold_item` they share out all rows that
      have an item.

    Returns:
        name -> rows, each of shape (n,), rows of every split.
    """
    train = log.split == 0
    has_item = log.item >= 0
    n_items = int(log.item.max(initial=-1)) + 1
    n_users = int(log.user.max(initial=-1)) + 1
    item_events = np.bincount(log.item[train & has_item], minlength=n_items)
    user_events = np.bincount(log.user[train], minlength=n_users)
    third = _thirds(item_events)[log.item] if n_items else np.zeros(len(log.item), dtype=np.int64)
    warm = has_item & (item_events[log.item] > 0) if n_items else has_item
    return {
        "cold_item": has_item & ~warm,
        "cold_user": user_events[log.user] == 0,
        "popular": warm & (third == 0),
        "mid": warm & (third == 1),
        "tail": warm & (third == 2),
    }


def _thirds(events: Ints) -> Ints:
    """0, 1 or 2 for each item: the third of all events in which the items with more events than this one end."""
    ordered = np.sort(events)[::-1]
    before = np.concatenate([[0], np.cumsum(ordered)])
    more = before[np.searchsorted(-ordered, -events, side="left")]
    third: Ints = np.minimum(3 * more // max(int(before[-1]), 1), 2)
    return third


@dataclass(frozen=True)
class _Ranking:
    """Rows of each class in the order of their scores, ready for the AUC under any weights.

    `below` and `upto` give for each positive how many negatives score less, and less or equally.
    """

    negatives: Ints
    positives: Ints
    below: Ints
    upto: Ints

    @classmethod
    def of(cls, label: Floats, score: Floats) -> _Ranking:
        negatives, positives = np.flatnonzero(label == 0), np.flatnonzero(label == 1)
        negatives = negatives[np.argsort(score[negatives], kind="stable")]
        positives = positives[np.argsort(score[positives], kind="stable")]
        lows, highs = score[negatives], score[positives]
        return cls(
            negatives, positives, np.searchsorted(lows, highs, side="left"), np.searchsorted(lows, highs, side="right")
        )

    def auc(self, negative_weight: Floats, positive_weight: Floats) -> Floats:
        """AUC for each of B weightings: (B, negatives) and (B, positives) in this order -> (B,)."""
        passed = np.zeros((len(negative_weight), len(self.negatives) + 1))
        np.cumsum(negative_weight, axis=1, out=passed[:, 1:])
        won = np.einsum("bp,bp->b", positive_weight, np.take(passed, self.below, axis=1))
        won += np.einsum("bp,bp->b", positive_weight, np.take(passed, self.upto, axis=1))
        return _ratio(won / 2, passed[:, -1] * positive_weight.sum(axis=1))


@dataclass(frozen=True)
class _Resampled:
    """One scorer, prepared so that a draw of users costs no sorting."""

    ranking: _Ranking
    negative_user: Ints
    positive_user: Ints
    sums: Floats
    probability: bool

    @classmethod
    def of(cls, label: Floats, score: Floats, users: Ints, n_users: int, probability: bool) -> _Resampled:
        ranking = _Ranking.of(label, score)
        sums = _user_sums(label, score, users, n_users, probability)
        return cls(ranking, users[ranking.negatives], users[ranking.positives], sums, probability)

    def measure(self, times: Floats) -> dict[str, Floats]:
        """Each metric, shape (B,), when user u counts `times[b, u]` times."""
        areas = self.ranking.auc(np.take(times, self.negative_user, axis=1), np.take(times, self.positive_user, axis=1))
        return {"auc": areas, **_from_sums(times @ self.sums, self.probability)}


def _user_sums(label: Floats, score: Floats, users: Ints, n_users: int, probability: bool) -> Floats:
    """The sums from which all metrics but AUC follow, one row per user: (users, columns)."""
    sums = np.zeros((n_users, _COLUMNS))
    areas = _user_auc(label, score, users, n_users)
    sums[:, _AUC], sums[:, _HAS_AUC] = np.nan_to_num(areas), np.isfinite(areas)
    if not probability:
        return sums

    def per_user(values: npt.NDArray[Any]) -> Floats:
        return np.bincount(users, weights=values, minlength=n_users).astype(np.float64, copy=False)

    predicted = score >= 0
    sums[:, _ROWS] = np.bincount(users, minlength=n_users)
    sums[:, _LOSS] = per_user(_losses(label, score))
    sums[:, _CORRECT] = per_user(predicted == label)
    sums[:, _TRUE_POSITIVE] = per_user(predicted * label)
    sums[:, _PREDICTED] = per_user(predicted)
    sums[:, _LIKED] = per_user(label)
    chance = _sigmoid(score)
    gaps = np.bincount(users * ECE_BINS + _bins(chance), weights=chance - label, minlength=n_users * ECE_BINS)
    sums[:, -ECE_BINS:] = gaps.reshape(n_users, ECE_BINS)
    return sums


def _from_sums(sums: Floats, probability: bool) -> dict[str, Floats]:
    """Metrics from sums over users: (..., columns) -> (...) each."""

    def column(index: int) -> Floats:
        return np.asarray(sums[..., index])

    values = {"uauc": _ratio(column(_AUC), column(_HAS_AUC))}
    if probability:
        rows, hits = column(_ROWS), column(_TRUE_POSITIVE)
        values |= {
            "log_loss": _ratio(column(_LOSS), rows),
            "accuracy": _ratio(column(_CORRECT), rows),
            "precision": _ratio(hits, column(_PREDICTED)),
            "recall": _ratio(hits, column(_LIKED)),
            "f1": _ratio(2 * hits, column(_PREDICTED) + column(_LIKED)),
            # Gap between mean probability and share of likes in bins of equal width (Guo et al. 2017, section 2).
            "ece": _ratio(np.abs(sums[..., -ECE_BINS:]).sum(axis=-1), rows),
        }
    return values


def _user_auc(label: Floats, score: Floats, users: Ints, n_users: int) -> Floats:
    """AUC of each user from the rank sum of the liked rows (Mann and Whitney 1947); nan with one class: (users,)."""
    order = np.lexsort((score, users))
    users, score, liked = users[order], score[order], label[order]
    new_user = np.append(True, users[1:] != users[:-1])[: len(users)]
    starts = np.flatnonzero(new_user | np.append(True, score[1:] != score[:-1])[: len(users)])
    ends = np.append(starts[1:], len(users))[: len(starts)]
    # Ranks count from 1 in each user; rows that tie share the mean of their ranks.
    rank = np.repeat((starts + ends + 1) / 2, ends - starts)
    rank -= np.flatnonzero(new_user)[np.cumsum(new_user) - 1] if len(users) else 0
    likes = np.bincount(users, weights=liked, minlength=n_users)
    rows = np.bincount(users, minlength=n_users)
    won = np.bincount(users, weights=rank * liked, minlength=n_users) - likes * (likes + 1) / 2
    return _ratio(won, likes * (rows - likes))


def _rows(label: npt.ArrayLike, score: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Labels and scores as float64, or the reason why they cannot be measured."""
    label_, score_ = np.asarray(label, dtype=np.float64), np.asarray(score, dtype=np.float64)
    if label_.shape != score_.shape or label_.ndim != 1:
        raise DataError(f"metrics: labels {label_.shape}, scores {score_.shape}; need one score for each label")
    if bad := int((~np.isfinite(score_)).sum()):
        raise DataError(
            f"metrics: {bad} of {len(score_)} scores are NaN or infinite; every row needs a finite score; "
            "lower train.learning_rate if training diverged"
        )
    if bad := int(((label_ != 0) & (label_ != 1)).sum()):
        raise DataError(f"metrics: {bad} of {len(label_)} labels are neither 0 nor 1; set data.like_at for ratings")
    return label_, score_


def _codes(user: npt.ArrayLike) -> tuple[Ints, int]:
    """Any user ids -> codes 0..users-1 and the number of users."""
    ids, codes = np.unique(np.asarray(user), return_inverse=True)
    return codes.astype(np.int64, copy=False), len(ids)


def _losses(label: Floats, score: Floats) -> Floats:
    """Negative log-likelihood of each row in nats; stable for large scores."""
    losses: Floats = np.maximum(score, 0) - score * label + np.log1p(np.exp(-np.abs(score)))
    return losses


def _sigmoid(score: Floats) -> Floats:
    small = np.exp(-np.abs(score))
    chance: Floats = np.where(score >= 0, 1, small) / (1 + small)
    return chance


def _bins(chance: Floats) -> Ints:
    bins: Ints = np.minimum((chance * ECE_BINS).astype(np.int64), ECE_BINS - 1)
    return bins


def _ratio(top: npt.ArrayLike, bottom: npt.ArrayLike) -> Floats:
    """`top / bottom`, nan where bottom is 0."""
    top, bottom = np.asarray(top, dtype=np.float64), np.asarray(bottom, dtype=np.float64)
    ratio: Floats = np.full(np.broadcast(top, bottom).shape, np.nan)
    np.divide(top, bottom, out=ratio, where=bottom != 0)
    return ratio


def _joined(chunks: list[dict[str, Floats]], key: str) -> Floats:
    return np.concatenate([chunk[key] for chunk in chunks]) if chunks else np.empty(0)


def _interval(point: float, values: Floats) -> Interval:
    values = values[np.isfinite(values)]
    low, high = np.quantile(values, [0.025, 0.975]) if len(values) else (np.nan, np.nan)
    return Interval(float(point), float(low), float(high))
