"""How good scores are, for clicks and for ratings, and the slices that a single figure hides.

The score of a click is the log-odds of label 1: the probability is `sigmoid(score)`. The score of a rating is the
predicted rating, in the units of its scale. AUC over all rows rewards knowing *who likes much* as well as *what this
person likes*; `uauc`, the mean over users, sees only the second. Both are always reported. RMSE mixes the two as well.

Everything except AUC is a ratio of sums, so it is kept as sums per user: the same sums give the figure itself, any
slice, and every bootstrap resample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from peftrec.errors import DataError
from peftrec.ranking import Bools, Floats, Ints, Ranking, checked, codes, labelled, ratio, user_auc, user_ndcg
from peftrec.sources import Task

if TYPE_CHECKING:
    from peftrec.split import Log

CLICK_METRICS = ("auc", "uauc", "log_loss", "accuracy", "precision", "recall", "f1", "ece")
RATING_METRICS = ("rmse", "mae", "exact", "uauc", "ndcg@10", "ece")
METRICS: dict[Task, tuple[str, ...]] = {"click": CLICK_METRICS, "rating": RATING_METRICS}
RANKING: dict[Task, tuple[str, ...]] = {"click": ("auc", "uauc"), "rating": ("uauc", "ndcg@10")}
"""What is defined for scores that only order rows, such as popularity."""

HEADLINE: dict[Task, str] = {"click": "auc", "rating": "rmse"}
"""The one that is shown for each slice."""
LOWER_IS_BETTER = frozenset({"loss", "log_loss", "ece", "rmse", "mae"})

ECE_BINS = 15
NDCG_K = 10


def click_metrics(
    label: npt.ArrayLike, score: npt.ArrayLike, user: npt.ArrayLike, *, ranking_only: bool = False
) -> dict[str, float]:
    """All figures of click prediction for one scorer.

    Args:
        label: 0 or 1, shape (n,).
        score: log-odds of label 1, shape (n,).
        user: whose row it is (any ids), shape (n,).
        ranking_only: whether scores only order rows (popularity): then only `auc` and `uauc`.

    Returns:
        `CLICK_METRICS`, or `auc` and `uauc`, as keys. What the rows do not define is nan: AUC with one class, precision
        when nothing is predicted at p >= 0.5, recall when nothing is liked.

    Raises:
        DataError: a score is NaN or infinite, a label is neither 0 nor 1, or lengths differ.
    """
    users, n_users = codes(user)
    return _once(ClickRows.of(label, score, users, n_users, ranking_only=ranking_only), n_users)


def rating_metrics(
    rating: npt.ArrayLike,
    score: npt.ArrayLike,
    user: npt.ArrayLike,
    scale: Sequence[float],
    answer: npt.ArrayLike | None = None,
    *,
    ranking_only: bool = False,
) -> dict[str, float]:
    """All figures of rating prediction for one scorer.

    * `rmse`, `mae`: in rating points.
    * `exact`: share of rows whose `answer` is the rating.
    * `uauc`: see `peftrec.ranking.uauc`.
    * `ndcg@10`: of each user's rows, then the mean over users who gave more than one rating. The gain is the rating
      minus the lowest of the scale, linear as in Järvelin and Kekäläinen (2002) and in scikit-learn's `ndcg_score`:
      unlike 2^rating it means the same on 1 to 5 and on 1 to 10.
    * `ece`: gap between mean predicted and mean given rating, in rating points, in 15 bins of the predicted rating that
      are equally wide from end to end of the scale; predictions beyond it are in the outermost. Weighted by rows.

    Args:
        rating: values of `scale`, shape (n,).
        score: predicted rating, shape (n,).
        user: whose row it is (any ids), shape (n,).
        scale: the ratings that can be given, ascending.
        answer: the most probable rating, shape (n,); the value of the scale nearest to the score if left out (half-way
            goes up).
        ranking_only: whether scores only order rows (popularity): then only `uauc` and `ndcg@10`.

    Returns:
        `RATING_METRICS`, or `uauc` and `ndcg@10`, as keys. What the rows do not define is nan: ranking, where nobody
        gave two different ratings.

    Raises:
        DataError: a score is NaN or infinite, a rating or an answer is not on the scale, or lengths differ.
    """
    users, n_users = codes(user)
    return _once(RatingRows.of(rating, score, users, n_users, scale, answer, ranking_only=ranking_only), n_users)


def slices(log: Log) -> dict[str, Bools]:
    """Which rows of a log are hard in which way.

    * `cold_item`, `cold_user`: the item, the user, has no training event.
    * `popular`, `mid`, `tail`: items ranked by training events and cut where they hold a third and two thirds of all
      training events; items with equally many events stay together. With `cold_item` they share out all rows that
      have an item.

    Returns:
        name -> rows, each of shape (n,), rows of every split.
    """
    train = (log.split == 0) & log.met
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
class ClickRows:
    """One scorer of clicks, prepared so that a draw of users costs no sorting: `sums` have one row per user."""

    ranking: Ranking
    negative_user: Ints
    positive_user: Ints
    sums: dict[str, Floats]

    @classmethod
    def of(
        cls, label: npt.ArrayLike, score: npt.ArrayLike, users: Ints, n_users: int, *, ranking_only: bool = False
    ) -> ClickRows:
        """Sort and sum; arguments as `click_metrics`, users as codes."""
        label_, score_ = labelled(label, score)
        ranking = Ranking.of(label_, score_)
        sums = _ranked({"uauc": user_auc(label_, score_, users, n_users)})
        if not ranking_only:
            predicted, chance = score_ >= 0, chances(score_)
            per_row = {
                "rows": np.ones(len(users)),
                "loss": _losses(label_, score_),
                "correct": predicted == label_,
                "hits": predicted * label_,
                "predicted": predicted,
                "liked": label_,
            }
            sums |= {name: _per_user(values, users, n_users) for name, values in per_row.items()}
            sums["gaps"] = _gaps(chance - label_, chance, users, n_users)
        return cls(ranking, users[ranking.negatives], users[ranking.positives], sums)

    def measure(self, times: Floats) -> dict[str, Floats]:
        """Each metric, shape (B,), when user u counts `times[b, u]` times: (B, users)."""
        areas = self.ranking.auc(np.take(times, self.negative_user, axis=1), np.take(times, self.positive_user, axis=1))
        total = {name: times @ values for name, values in self.sums.items()}
        found = {"auc": areas, "uauc": ratio(total["uauc"], total["has uauc"])}
        if "rows" in total:
            found |= {
                "log_loss": ratio(total["loss"], total["rows"]),
                "accuracy": ratio(total["correct"], total["rows"]),
                "precision": ratio(total["hits"], total["predicted"]),
                "recall": ratio(total["hits"], total["liked"]),
                "f1": ratio(2 * total["hits"], total["predicted"] + total["liked"]),
                # Gap between mean probability and share of likes in bins of equal width (Guo et al. 2017, section 2).
                "ece": ratio(np.abs(total["gaps"]).sum(axis=-1), total["rows"]),
            }
        return found


@dataclass(frozen=True)
class RatingRows:
    """One scorer of ratings, prepared so that a draw of users costs no sorting: `sums` have one row per user."""

    sums: dict[str, Floats]

    @classmethod
    def of(
        cls,
        rating: npt.ArrayLike,
        score: npt.ArrayLike,
        users: Ints,
        n_users: int,
        scale: Sequence[float],
        answer: npt.ArrayLike | None = None,
        *,
        ranking_only: bool = False,
    ) -> RatingRows:
        """Sort and sum; arguments as `rating_metrics`, users as codes."""
        rating_, score_ = checked(rating, score)
        values = np.asarray(scale, dtype=np.float64)
        place = _places(rating_, values, "ratings")
        sums = _ranked(
            {
                "uauc": user_auc(rating_, score_, users, n_users),
                "ndcg": user_ndcg(values[place] - values[0], score_, users, n_users, NDCG_K),
            }
        )
        if not ranking_only:
            chosen = nearest(score_, values) if answer is None else _places(np.asarray(answer), values, "answers")
            per_row = {
                "rows": np.ones(len(users)),
                "squared": (score_ - rating_) ** 2,
                "absolute": np.abs(score_ - rating_),
                "exact": chosen == place,
            }
            sums |= {name: _per_user(row, users, n_users) for name, row in per_row.items()}
            share = (score_ - values[0]) / (values[-1] - values[0])
            sums["gaps"] = _gaps(score_ - rating_, share, users, n_users)
        return cls(sums)

    def measure(self, times: Floats) -> dict[str, Floats]:
        """Each metric, shape (B,), when user u counts `times[b, u]` times: (B, users)."""
        total = {name: times @ values for name, values in self.sums.items()}
        ranked = {
            "uauc": ratio(total["uauc"], total["has uauc"]),
            f"ndcg@{NDCG_K}": ratio(total["ndcg"], total["has ndcg"]),
        }
        if "rows" not in total:
            return ranked
        return {
            "rmse": np.sqrt(ratio(total["squared"], total["rows"])),
            "mae": ratio(total["absolute"], total["rows"]),
            "exact": ratio(total["exact"], total["rows"]),
            **ranked,
            "ece": ratio(np.abs(total["gaps"]).sum(axis=-1), total["rows"]),
        }


def nearest(score: Floats, scale: npt.ArrayLike) -> Ints:
    """Place in the ascending `scale` of the value nearest to each score; half-way goes up."""
    values = np.asarray(scale, dtype=np.float64)
    found: Ints = np.searchsorted((values[1:] + values[:-1]) / 2, score, side="right")
    return found


def bins(share: Floats) -> Ints:
    """Which of `ECE_BINS` equal bins of 0..1 each share is in; what lies beyond is in the outermost."""
    found: Ints = (share * ECE_BINS).clip(0, ECE_BINS - 1).astype(np.int64)
    return found


def _once(rows: ClickRows | RatingRows, n_users: int) -> dict[str, float]:
    """Each metric when every user counts once."""
    return {name: float(value[0]) for name, value in rows.measure(np.ones((1, n_users))).items()}


def _ranked(per_user: Mapping[str, Floats]) -> dict[str, Floats]:
    """A figure that some users lack: the figure, 0 for those, and under `has …` who has it."""
    sums = {name: np.nan_to_num(values) for name, values in per_user.items()}
    return sums | {f"has {name}": np.isfinite(values).astype(np.float64) for name, values in per_user.items()}


def _per_user(values: npt.NDArray[Any], users: Ints, n_users: int) -> Floats:
    return np.bincount(users, weights=values, minlength=n_users).astype(np.float64, copy=False)


def _gaps(gap: Floats, share: Floats, users: Ints, n_users: int) -> Floats:
    """Sum of each user's gaps in each bin: (users, ECE_BINS)."""
    return _per_user(gap, users * ECE_BINS + bins(share), n_users * ECE_BINS).reshape(n_users, ECE_BINS)


def _places(rating: npt.NDArray[Any], scale: Floats, what: str) -> Ints:
    """Place of each rating in the scale; float32 ratings are near enough."""
    place = nearest(rating.astype(np.float64), scale)
    off = ~np.isclose(scale[place], rating, rtol=1e-6, atol=1e-6)
    if off.any():
        shown = ", ".join(f"{value:g}" for value in scale)
        raise DataError(
            f"metrics: {int(off.sum())} of {len(rating)} {what} are not on the scale {shown}, such as "
            f"{rating[off][0]:g}; give the scale that the data have"
        )
    return place


def _losses(label: Floats, score: Floats) -> Floats:
    """Negative log-likelihood of each row in nats; stable for large scores."""
    losses: Floats = np.maximum(score, 0) - score * label + np.log1p(np.exp(-np.abs(score)))
    return losses


def mean_log_loss(liked: npt.ArrayLike, log_odds: npt.ArrayLike) -> float:
    """Of labels 0 or 1, (n,), under log-odds of a like, (n,)."""
    odds = np.asarray(log_odds, dtype=np.float64)
    return float(np.mean(np.logaddexp(0.0, np.where(np.asarray(liked) == 1, -odds, odds))))


def chances(log_odds: Floats) -> Floats:
    """Chances of a like by their log-odds, in the same shape; large ones do not overflow, small ones are not lost."""
    small = np.exp(-np.abs(log_odds))
    chance: Floats = np.where(log_odds >= 0, 1, small) / (1 + small)
    return chance
