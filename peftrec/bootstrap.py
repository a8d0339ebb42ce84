"""How certain a figure is: its values over resampled users, and those of the difference between two scorers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from peftrec.metrics import ClickRows, RatingRows
from peftrec.ranking import Floats, Ints, codes, ratio
from peftrec.sources import Task

# Weights held at once while resampling: 32 MB of float64 for each temporary.
_CHUNK_CELLS = 4_000_000


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
    truth: npt.ArrayLike,
    scores: Mapping[str, npt.ArrayLike],
    user: npt.ArrayLike,
    n: int = 1000,
    seed: int = 13,
    ranking_only: Collection[str] = (),
    *,
    task: Task = "click",
    scale: Sequence[float] = (0.0, 1.0),
    answers: Mapping[str, npt.ArrayLike] | None = None,
) -> Bootstrap:
    """Percentile intervals (95 %) of every metric of every scorer, by drawing users with replacement.

    Users and not rows are drawn, because the rows of one user stand or fall together. A resample on which a metric is
    undefined is left out of that metric's interval.

    Args:
        truth: labels 0 or 1, or ratings, shape (n_rows,).
        scores: scorer -> log-odds or predicted ratings, each of shape (n_rows,). Differences are taken to the first.
        user: whose row it is (any ids), shape (n_rows,).
        n: resamples; time grows with resamples x rows x scorers (about 1 s for 1000 x 10,000 x 6).
        seed: of the resamples, which all scorers share.
        ranking_only: scorers whose scores only order rows; they get `metrics.RANKING` of the task alone.
        task: what is predicted.
        scale: the ratings that can be given, ascending; clicks need none.
        answers: scorer -> most probable ratings (n_rows,), see `metrics.rating_metrics`.

    Raises:
        DataError: as `metrics.click_metrics` and `metrics.rating_metrics`.
    """
    users, n_users = codes(user)
    given = answers or {}
    scorers = {
        name: (
            ClickRows.of(truth, score, users, n_users, ranking_only=name in ranking_only)
            if task == "click"
            else RatingRows.of(truth, score, users, n_users, scale, given.get(name), ranking_only=name in ranking_only)
        )
        for name, score in scores.items()
    }
    return resample(scorers, len(users), n_users, n, seed)


@dataclass(frozen=True)
class UserMeans:
    """Figures that are means over users, or ratios of sums over users.

    Attributes:
        parts: metric -> each user's share of what is divided and of what it is divided by, (n_users,) each.
    """

    parts: Mapping[str, tuple[Floats, Floats]]

    def measure(self, times: Floats) -> dict[str, Floats]:
        """Every metric under B weightings of the users: (B, n_users) -> metric -> (B,)."""
        return {name: ratio(times @ top, times @ bottom) for name, (top, bottom) in self.parts.items()}


def resample(
    scorers: Mapping[str, ClickRows | RatingRows | UserMeans], n_rows: int, n_users: int, n: int, seed: int
) -> Bootstrap:
    """What `bootstrap` gives, of scorers that are ready to be measured.

    Args:
        scorers: differences are taken to the first.
        n_rows: rows behind each scorer, which set how much is computed at once.
        n_users: number of users.
        n: resamples.
        seed: of the resamples.
    """
    points = {name: scorer.measure(np.ones((1, n_users))) for name, scorer in scorers.items()}
    values = _resampled(scorers, points, n if n_users else 0, n_rows, n_users, seed)
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


def of_means(values: Mapping[str, npt.ArrayLike], n: int = 1000, seed: int = 13) -> Bootstrap:
    """The same for figures that are means over users, such as recall: intervals, and differences to the first.

    Args:
        values: scorer -> the figure of each user, (users,), of the same users in the same order.
        n: resamples.
        seed: of the resamples.

    Returns:
        Intervals of the metric `mean`.
    """
    each = {name: np.asarray(one, dtype=np.float64) for name, one in values.items()}
    first = next(iter(each.values()))
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(len(first), size=len(first)) for _ in range(n)]
    means = {name: np.array([one[rows].mean() for rows in drawn]) for name, one in each.items()}
    names = list(each)
    of_first = means[names[0]]
    intervals = {name: {"mean": _interval(each[name].mean(), means[name])} for name in names}
    differences = {
        name: {"mean": _interval(first.mean() - each[name].mean(), of_first - means[name])} for name in names[1:]
    }
    return Bootstrap(intervals, differences)


def over_seeds(
    label: npt.ArrayLike,
    scores: Mapping[str, Sequence[npt.ArrayLike]],
    user: npt.ArrayLike,
    pairs: Sequence[tuple[str, str]],
    n: int = 1000,
    seed: int = 13,
) -> tuple[dict[str, dict[str, Interval]], dict[tuple[str, str], dict[str, Interval]]]:
    """Figures of click prediction as means over several trainings, with intervals (95 %) by drawing users.

    On each resample of the users a figure is measured for each seed's scores and then averaged; a difference is that of
    two such means on the same resample. An interval says how far other people would move the mean of these seeds.

    Args:
        label: 0 or 1, shape (n_rows,).
        scores: way -> log-odds of each of its seeds, shape (n_rows,) each.
        user: whose row it is (any ids), shape (n_rows,).
        pairs: ways (ours, theirs) whose difference *ours minus theirs* is wanted.
        n: resamples.
        seed: of the resamples, which all ways share.

    Returns:
        Way -> metric -> interval, and pair -> metric -> interval.

    Raises:
        DataError: as `metrics.click_metrics`.
    """
    users, n_users = codes(user)
    scorers = {
        f"{place} {way}": ClickRows.of(label, one, users, n_users)
        for way, several in scores.items()
        for place, one in enumerate(several)
    }
    once = {name: scorer.measure(np.ones((1, n_users))) for name, scorer in scorers.items()}
    drawn = _resampled(scorers, once, n, len(users), n_users, seed)

    def mean(of: Mapping[str, Mapping[str, Floats]], way: str) -> dict[str, Floats]:
        each = [of[f"{place} {way}"] for place in range(len(scores[way]))]
        return {key: np.mean([one[key] for one in each], axis=0) for key in each[0]}

    points = {way: mean(once, way) for way in scores}
    values = {way: mean(drawn, way) for way in scores}
    figures = {
        way: {key: _interval(point[0], values[way][key]) for key, point in points[way].items()} for way in scores
    }
    differences = {
        (ours, theirs): {
            key: _interval(points[ours][key][0] - points[theirs][key][0], values[ours][key] - values[theirs][key])
            for key in points[ours]
        }
        for ours, theirs in pairs
    }
    return figures, differences


def _resampled(
    scorers: Mapping[str, ClickRows | RatingRows | UserMeans],
    points: Mapping[str, Mapping[str, Floats]],
    n: int,
    n_rows: int,
    n_users: int,
    seed: int,
) -> dict[str, dict[str, Floats]]:
    """Scorer -> metric -> its value on each of n resamples, (n,)."""
    drawn: dict[str, list[dict[str, Floats]]] = {name: [] for name in scorers}
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_CELLS // max(n_rows, n_users, 1))
    for start in range(0, n, chunk):
        times = np.stack([_times(rng.integers(n_users, size=n_users), n_users) for _ in range(min(chunk, n - start))])
        for name, scorer in scorers.items():
            drawn[name].append(scorer.measure(times))
    return {
        name: {key: np.concatenate([np.empty(0), *(part[key] for part in drawn[name])]) for key in points[name]}
        for name in scorers
    }


def _times(drawn: Ints, n_users: int) -> Floats:
    return np.bincount(drawn, minlength=n_users).astype(np.float64)


def _interval(point: float, values: Floats) -> Interval:
    values = values[np.isfinite(values)]
    low, high = np.quantile(values, [0.025, 0.975]) if len(values) else (np.nan, np.nan)
    return Interval(float(point), float(low), float(high))
