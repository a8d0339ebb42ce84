from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from peftrec import ranking
from peftrec.errors import DataError


@st.composite
def rows(draw: st.DrawFn, most: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, scores with ties, and users."""
    n = draw(st.integers(1, most))
    label = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n))
    score = draw(st.lists(st.integers(-6, 6), min_size=n, max_size=n))
    user = draw(st.lists(st.integers(0, 5), min_size=n, max_size=n))
    return np.array(label), np.array(score) / 2, np.array(user)


@st.composite
def graded(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ratings from 0 to 4, scores with ties, and users."""
    label, score, user = draw(rows())
    n = len(label)
    return np.array(draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)), dtype=float), score, user


def looped_auc(label, score, weight) -> float:
    won = total = 0.0
    for i in np.flatnonzero(label == 1):
        for j in np.flatnonzero(label == 0):
            pair = weight[i] * weight[j]
            total += pair
            won += pair * (1.0 if score[i] > score[j] else 0.5 if score[i] == score[j] else 0.0)
    return won / total if total else np.nan


def test_auc_counts_pairs_and_half_of_ties():
    assert ranking.auc([0, 0, 1, 1], [1, 2, 2, 3]) == pytest.approx(3.5 / 4)
    assert ranking.auc([0, 1], [0.0, 0.0]) == 0.5
    # The lost pair counts 3 x 1, the won one 1 x 1.
    assert ranking.auc([0, 0, 1], [2, 0, 1], weight=[3, 1, 1]) == pytest.approx(0.25)


def test_uauc_is_the_mean_over_users_who_have_both_classes():
    label = [1, 0, 1, 0, 0, 1, 1]
    score = [2, 1, 0, 1, 1, 5, 6]
    user = ["a", "a", "b", "b", "b", "c", "c"]
    assert ranking.uauc(label, score, user) == pytest.approx((1 + 0) / 2)


@pytest.mark.parametrize(
    ("label", "score", "found"),
    [
        ([0, 1], [0.0, np.nan], "1 of 2 scores are NaN or infinite"),
        ([0, 1], [0.0, np.inf], "1 of 2 scores are NaN or infinite"),
        ([0, 5], [0.0, 1.0], "1 of 2 labels are neither 0 nor 1"),
        ([0, 1], [0.0], "answers (2,), scores (1,)"),
    ],
)
def test_rows_that_cannot_be_measured_say_so_in_one_line(label, score, found):
    with pytest.raises(DataError) as error:
        ranking.auc(label, score)
    assert found in str(error.value)
    assert "\n" not in str(error.value)


def test_uauc_of_ratings_counts_pairs_that_were_rated_differently():
    # Of a's pairs 5>3 is a tie, 5>1 is right and 3>1 is right; b gave one rating.
    assert ranking.uauc([5, 3, 1, 4, 4], [4.5, 4.5, 2, 3, 5], list("aaabb")) == pytest.approx(2.5 / 3)
    assert np.isnan(ranking.uauc([4, 4], [1, 2], ["b", "b"]))


@given(graded())
def test_uauc_agrees_with_a_loop_over_pairs_of_ratings(data):
    rating, score, user = data
    shares = []
    for u in np.unique(user):
        own, scored = rating[user == u], score[user == u]
        higher, lower = np.nonzero(own[:, None] > own[None, :])
        if len(higher):
            shares.append(((np.sign(scored[higher] - scored[lower]) + 1) / 2).mean())
    expected = np.mean(shares) if shares else np.nan
    assert ranking.uauc(rating, score, user) == pytest.approx(expected, nan_ok=True)


def test_ndcg_by_hand():
    second, third = 1 / np.log2(3), 1 / np.log2(4)
    gain = np.array([4.0, 2, 0, 1, 1])
    users = np.array([0, 0, 0, 1, 1])
    # The two best rows tie: each gets the mean gain of 3 in its place.
    found = ranking.user_ndcg(gain, np.array([4.5, 4.5, 2, 3, 5]), users, 3, 10)
    assert found[0] == pytest.approx((3 + 3 * second) / (4 + 2 * second))
    assert np.isnan(found[1:]).all()  # one gain only; no rows
    last = ranking.user_ndcg(gain[:3], np.array([1.0, 2, 3]), users[:3], 1, 10)
    assert last[0] == pytest.approx((2 * second + 4 * third) / (4 + 2 * second))
    assert ranking.user_ndcg(gain[:3], np.array([1.0, 2, 3]), users[:3], 1, 1)[0] == 0


@given(graded(), st.integers(1, 12))
def test_ndcg_agrees_with_scikit_learn(data, k):
    gain, score, user = data
    found = ranking.user_ndcg(gain, score, user, 6, k)
    for u in range(6):
        own = user == u
        if len(np.unique(gain[own])) < 2:
            assert np.isnan(found[u])
        else:
            assert found[u] == pytest.approx(sklearn.metrics.ndcg_score([gain[own]], [score[own]], k=k))


@given(rows(), st.integers(0, 99))
def test_auc_agrees_with_a_loop_over_pairs(data, seed):
    label, score, user = data
    weight = np.random.default_rng(seed).integers(0, 3, len(label))
    expected = looped_auc(label, score, weight)
    assert ranking.auc(label, score, weight) == pytest.approx(expected, nan_ok=True)
    ones = np.ones(len(label))
    by_user = [looped_auc(label[user == u], score[user == u], ones) for u in np.unique(user)]
    defined = [value for value in by_user if np.isfinite(value)]
    expected = np.mean(defined) if defined else np.nan
    assert ranking.uauc(label, score, user) == pytest.approx(expected, nan_ok=True)


@given(graded())
def test_ranking_does_not_change_under_a_monotone_map(data):
    label, score, user = data
    for mapped in (np.exp(score), 3 * score - 1, score**3):
        found = ranking.user_ndcg(label, mapped, user, 6, 3)
        assert found == pytest.approx(ranking.user_ndcg(label, score, user, 6, 3), nan_ok=True)
        label_ = label > 2
        assert ranking.auc(label_, mapped) == pytest.approx(ranking.auc(label_, score), nan_ok=True)
        assert ranking.uauc(label, mapped, user) == pytest.approx(ranking.uauc(label, score, user), nan_ok=True)
