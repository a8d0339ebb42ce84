"""How well scores order rows: all rows together (AUC), and those of each user (AUC by user, NDCG).

A rating ranks as a click does: of two rows that were answered differently, the higher answer should score higher. A tie
in score is as good as a coin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from peftrec.errors import DataError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


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
    label_, score_ = labelled(label, score)
    ranking = Ranking.of(label_, score_)
    weight_ = np.ones(len(label_)) if weight is None else np.asarray(weight, dtype=np.float64)
    return float(ranking.auc(weight_[None, ranking.negatives], weight_[None, ranking.positives])[0])


def uauc(rating: npt.ArrayLike, score: npt.ArrayLike, user: npt.ArrayLike) -> float:
    """Share of each user's pairs of differently rated rows that the score orders right, then the mean over users.

    A tie in score counts a half. For labels 0 and 1 this is the mean of the users' AUC. Users who gave one rating only
    are left out, the others count once each; nan where there is none.

    Args:
        rating: rating or label, shape (n,).
        score: anything that orders rows of one user, shape (n,).
        user: whose row it is (any ids), shape (n,).

    Raises:
        DataError: a score is NaN or infinite, or lengths differ.
    """
    rating_, score_ = checked(rating, score)
    users, n_users = codes(user)
    values = user_auc(rating_, score_, users, n_users)
    return float(ratio(np.nansum(values), np.isfinite(values).sum()))


@dataclass(frozen=True)
class Ranking:
    """Rows of each class in the order of their scores, ready for the AUC under any weights.

    `below` and `upto` give for each positive how many negatives score less, and less or equally.
    """

    negatives: Ints
    positives: Ints
    below: Ints
    upto: Ints

    @classmethod
    def of(cls, label: Floats, score: Floats) -> Ranking:
        """Sort the rows once."""
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
        return ratio(won / 2, passed[:, -1] * positive_weight.sum(axis=1))


def user_auc(rating: Floats, score: Floats, users: Ints, n_users: int) -> Floats:
    """`uauc` of each user, nan where all of the user's ratings are one: (n_users,)."""
    order = np.lexsort((score, users))
    rating, score, users = rating[order], score[order], users[order]
    won, pairs = np.zeros(n_users), np.zeros(n_users)
    # Each rating against all lower ones; for labels that is once, 1 against 0.
    for level in np.unique(rating)[1:]:
        upto = rating <= level
        more_won, more_pairs = _pairs(rating[upto] == level, score[upto], users[upto], n_users)
        won, pairs = won + more_won, pairs + more_pairs
    return ratio(won, pairs)


def user_ndcg(gain: Floats, score: Floats, users: Ints, n_users: int, k: int) -> Floats:
    """NDCG of each user's k best-scored rows, nan where all of the user's gains are one: (n_users,).

    Gains discounted by 1 / log2(1 + place), over those of the best possible order (Järvelin and Kekäläinen 2002). Rows
    that tie in score share their places (McSherry and Najork 2008): a scorer that ties everything is worth an order
    drawn at random.

    Args:
        gain: 0 or more, shape (n,).
        score: shape (n,).
        users: codes, shape (n,).
        n_users: number of codes.
        k: places that count.
    """
    lowest, highest = np.full(n_users, np.inf), np.full(n_users, -np.inf)
    np.minimum.at(lowest, users, gain)
    np.maximum.at(highest, users, gain)
    best = _discounted(gain, gain, users, n_users, k)
    return ratio(_discounted(gain, score, users, n_users, k), np.where(lowest < highest, best, 0))


def checked(truth: npt.ArrayLike, score: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Labels or ratings, and scores, as float64.

    Raises:
        DataError: a score is NaN or infinite, or lengths differ.
    """
    truth_, score_ = np.asarray(truth, dtype=np.float64), np.asarray(score, dtype=np.float64)
    if truth_.shape != score_.shape or truth_.ndim != 1:
        raise DataError(f"metrics: answers {truth_.shape}, scores {score_.shape}; need one score for each answer")
    if bad := int((~np.isfinite(score_)).sum()):
        raise DataError(
            f"metrics: {bad} of {len(score_)} scores are NaN or infinite; every row needs a finite score; "
            "lower train.learning_rate if training diverged"
        )
    return truth_, score_


def labelled(label: npt.ArrayLike, score: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Labels and scores as float64.

    Raises:
        DataError: as `checked`, or a label is neither 0 nor 1.
    """
    label_, score_ = checked(label, score)
    if bad := int(((label_ != 0) & (label_ != 1)).sum()):
        raise DataError(
            f"metrics: {bad} of {len(label_)} labels are neither 0 nor 1; set data.like_at, or task: rating"
        )
    return label_, score_


def codes(user: npt.ArrayLike) -> tuple[Ints, int]:
    """Any user ids -> codes 0..users-1 and the number of users."""
    ids, found = np.unique(np.asarray(user), return_inverse=True)
    return found.astype(np.int64, copy=False), len(ids)


def ratio(top: npt.ArrayLike, bottom: npt.ArrayLike) -> Floats:
    """`top / bottom`, nan where bottom is 0."""
    top, bottom = np.asarray(top, dtype=np.float64), np.asarray(bottom, dtype=np.float64)
    found: Floats = np.full(np.broadcast(top, bottom).shape, np.nan)
    np.divide(top, bottom, out=found, where=bottom != 0)
    return found


def _pairs(higher: Bools, score: Floats, users: Ints, n_users: int) -> tuple[Floats, Floats]:
    """Of each user's pairs (higher, not higher): those in order, a tie as a half, and all; rows by user and score.

    The rank sum of the higher rows tells it (Mann and Whitney 1947).
    """
    new_user, starts, ends = _ties(users, score)
    # Ranks count from 1 in each user; rows that tie share the mean of their ranks.
    rank = np.repeat((starts + ends + 1) / 2, ends - starts)
    rank -= np.flatnonzero(new_user)[np.cumsum(new_user) - 1] if len(users) else 0
    positives = np.bincount(users, weights=higher, minlength=n_users)
    rows = np.bincount(users, minlength=n_users)
    won = np.bincount(users, weights=rank * higher, minlength=n_users) - positives * (positives + 1) / 2
    return won, positives * (rows - positives)


def _discounted(gain: Floats, score: Floats, users: Ints, n_users: int, k: int) -> Floats:
    """Each user's discounted gain at k, expected over the orders of tied rows: (n_users,)."""
    order = np.lexsort((-score, users))
    gain, score, users = gain[order], score[order], users[order]
    new_user, starts, ends = _ties(users, score)
    if not len(users):
        return np.zeros(n_users)
    place = np.arange(len(users)) - np.flatnonzero(new_user)[np.cumsum(new_user) - 1]
    discount = np.where(place < k, 1 / np.log2(place + 2), 0)
    shared = np.repeat(np.add.reduceat(gain, starts) / (ends - starts), ends - starts)
    return np.bincount(users, weights=shared * discount, minlength=n_users).astype(np.float64, copy=False)


def _ties(users: Ints, score: Floats) -> tuple[Bools, Ints, Ints]:
    """Of rows sorted by user and score: where a user begins, and begin and end of each run of equal scores."""
    new_user = np.append(True, users[1:] != users[:-1])[: len(users)]
    starts = np.flatnonzero(new_user | np.append(True, score[1:] != score[:-1])[: len(users)])
    return new_user, starts, np.append(starts[1:], len(users))[: len(starts)]
