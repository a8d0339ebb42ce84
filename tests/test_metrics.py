from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ranking import rows

from peftrec import metrics
from peftrec.bootstrap import bootstrap
from peftrec.errors import DataError
from peftrec.ranking import auc
from peftrec.split import Log

STARS = (1.0, 2.0, 3.0, 4.0, 5.0)


def sample(n: int, n_users: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    score = rng.normal(size=n).round(2)
    return (rng.random(n) < 1 / (1 + np.exp(-score))).astype(np.int8), score, rng.integers(0, n_users, n)


def test_chances_neither_overflow_nor_get_lost() -> None:
    found = metrics.chances(np.array([-800.0, -40.0, np.log(1 / 3), 0.0, 40.0, 800.0]))
    np.testing.assert_allclose(found, [0, np.exp(-40), 0.25, 0.5, 1, 1], rtol=1e-12)


def test_click_metrics_by_hand():
    label, chance = np.array([1, 1, 0, 0]), np.array([0.9, 0.3, 0.6, 0.2])
    found = metrics.click_metrics(label, np.log(chance / (1 - chance)), [0, 0, 1, 1])
    assert found == pytest.approx(
        {
            "auc": 3 / 4,
            "uauc": np.nan,
            "log_loss": -np.log([0.9, 0.3, 0.4, 0.8]).mean(),
            "accuracy": 2 / 4,
            "precision": 1 / 2,
            "recall": 1 / 2,
            "f1": 1 / 2,
            "ece": (0.1 + 0.7 + 0.6 + 0.2) / 4,
        },
        nan_ok=True,
    )
    assert tuple(found) == metrics.CLICK_METRICS


def test_calibration_error_is_measured_in_each_bin_and_not_in_each_row():
    log_odds_of_quarter = np.log(1 / 3)
    found = metrics.click_metrics([1, 0, 0, 0], [log_odds_of_quarter] * 4, [0] * 4)
    assert found["ece"] == pytest.approx(0)


def test_a_score_that_is_no_probability_gets_ranking_metrics_only():
    assert tuple(metrics.click_metrics([0, 1], [3, 70], [1, 1], ranking_only=True)) == metrics.RANKING["click"]
    found = metrics.rating_metrics([1, 5], [3, 70], [1, 1], STARS, ranking_only=True)
    assert found == {"uauc": 1.0, "ndcg@10": 1.0}
    assert tuple(found) == metrics.RANKING["rating"]


@pytest.mark.parametrize("label", [[1, 1], [0, 0], []])
def test_one_class_is_nan_and_no_exception(label):
    found = metrics.click_metrics(label, [0.5] * len(label), [0] * len(label))
    assert np.isnan(found["auc"])
    assert np.isnan(found["uauc"])
    assert np.isfinite(found["log_loss"]) == bool(label)
    interval = bootstrap(label, {"x": [0.5] * len(label)}, [0] * len(label), n=3).intervals["x"]["auc"]
    assert np.isnan([interval.point, interval.low, interval.high]).all()


def test_nothing_predicted_leaves_precision_undefined():
    found = metrics.click_metrics([0, 1], [-1, -2], [0, 0])
    assert np.isnan(found["precision"])
    assert found["recall"] == found["f1"] == 0


def test_huge_scores_do_not_overflow():
    assert metrics.click_metrics([0, 1], [-1e4, 1e4], [0, 0])["log_loss"] == 0
    assert metrics.click_metrics([1, 0], [-1e4, 1e4], [0, 0])["log_loss"] == pytest.approx(1e4)


def test_agrees_with_scikit_learn():
    label, score, user = sample(3000, 40)
    found = metrics.click_metrics(label, score, user)
    chance, predicted = 1 / (1 + np.exp(-score)), score >= 0
    by_user = [sklearn.metrics.roc_auc_score(label[user == u], score[user == u]) for u in np.unique(user)]
    assert found["auc"] == pytest.approx(sklearn.metrics.roc_auc_score(label, score))
    assert found["uauc"] == pytest.approx(np.mean(by_user))
    assert found["log_loss"] == pytest.approx(sklearn.metrics.log_loss(label, chance))
    assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(label, predicted))
    assert found["precision"] == pytest.approx(sklearn.metrics.precision_score(label, predicted))
    assert found["recall"] == pytest.approx(sklearn.metrics.recall_score(label, predicted))
    assert found["f1"] == pytest.approx(sklearn.metrics.f1_score(label, predicted))
    weight = np.random.default_rng(1).integers(0, 4, len(label))
    expected = sklearn.metrics.roc_auc_score(label, score, sample_weight=weight)
    assert auc(label, score, weight) == pytest.approx(expected)


@given(rows(), st.randoms(use_true_random=False))
def test_metrics_do_not_depend_on_the_order_of_rows_or_the_names_of_users(data, random):
    label, score, user = data
    order = list(range(len(label)))
    random.shuffle(order)
    expected = metrics.click_metrics(label, score, user)
    names = np.array([f"user {u}" for u in user])
    assert metrics.click_metrics(label[order], score[order], names[order]) == pytest.approx(expected, nan_ok=True)


# Two users: a rated three films, b two, and those alike.
RATING, SCORE, USER = np.array([5, 3, 1, 4, 4]), np.array([4.5, 4.5, 2.0, 3.3, 5.0]), np.array(list("aaabb"))


def test_rating_metrics_by_hand():
    second = 1 / np.log2(3)
    expected = {
        "rmse": np.sqrt((0.5**2 + 1.5**2 + 1**2 + 0.7**2 + 1**2) / 5),
        "mae": (0.5 + 1.5 + 1 + 0.7 + 1) / 5,
        "exact": 1 / 5,  # half-way goes up: 4.5 is 5
        "uauc": (0.5 + 1 + 1) / 3,
        "ndcg@10": (3 + 3 * second) / (4 + 2 * second),  # two rows tie and share a mean gain of 3
        "ece": (abs(-0.5 + 1.5) + 1 + 0.7 + 1) / 5,  # 4.5 twice in one bin
    }
    found = metrics.rating_metrics(RATING, SCORE, USER, STARS)
    assert found == pytest.approx(expected)
    assert tuple(found) == metrics.RATING_METRICS
    answered = metrics.rating_metrics(RATING, SCORE, USER, STARS, [5, 3, 1, 3, 4])
    assert answered == pytest.approx(expected | {"exact": 4 / 5})


def test_a_prediction_beyond_the_scale_is_in_the_outermost_bin():
    # 7 and 5 are in the last bin, where the gaps of 2 and -2 meet.
    found = metrics.rating_metrics([5, 5, 1], [7, 3 + 2 - 0.1, -1], [0, 0, 0], STARS)
    assert found["ece"] == pytest.approx((abs(2 - 0.1) + 2) / 3)
    assert found["exact"] == 1


def test_ratings_in_float32_are_on_their_scale():
    scale = tuple(k / 10 for k in range(11))
    rating = np.array(scale, dtype=np.float32)
    assert metrics.rating_metrics(rating, rating, np.zeros(11), scale)["exact"] == 1


@pytest.mark.parametrize(
    ("rating", "answer", "found"),
    [
        ([1, 2.5], None, "1 of 2 ratings are not on the scale 1, 2, 3, 4, 5, such as 2.5"),
        ([1, np.nan], None, "1 of 2 ratings are not on the scale"),
        ([1, 2], [0, 2], "1 of 2 answers are not on the scale 1, 2, 3, 4, 5, such as 0"),
    ],
)
def test_ratings_that_cannot_be_measured_say_so_in_one_line(rating, answer, found):
    with pytest.raises(DataError, match=found) as error:
        metrics.rating_metrics(rating, [1, 2], [0, 0], STARS, answer)
    assert "\n" not in str(error.value)


def test_ratings_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    rating, user = rng.integers(1, 6, 3000), rng.integers(0, 40, 3000)
    score = (rating + rng.normal(size=3000)).round(1)
    found = metrics.rating_metrics(rating, score, user, STARS)
    assert found["rmse"] == pytest.approx(sklearn.metrics.root_mean_squared_error(rating, score))
    assert found["mae"] == pytest.approx(sklearn.metrics.mean_absolute_error(rating, score))
    best = np.floor(score + 0.5).clip(1, 5)
    assert found["exact"] == pytest.approx(sklearn.metrics.accuracy_score(rating, best))
    by_user = [sklearn.metrics.ndcg_score([rating[user == u] - 1], [score[user == u]], k=10) for u in range(40)]
    assert found["ndcg@10"] == pytest.approx(np.mean(by_user))


def test_two_ratings_rank_as_clicks_do():
    label, score, user = sample(500, 20)
    found = metrics.rating_metrics(np.where(label == 1, 5, 1), score, user, STARS)
    assert found["uauc"] == metrics.click_metrics(label, score, user)["uauc"]


ratings = st.lists(st.tuples(st.integers(0, 4), st.integers(-8, 40), st.integers(0, 3)), min_size=1, max_size=30)


@given(ratings, st.sampled_from([0.5, 2, 8]), st.integers(-4, 4))
def test_another_scale_changes_the_unit_of_errors_and_nothing_else(events, unit, shift):
    place, eighths, user = np.array(events).T
    scale = np.arange(5.0)
    found = metrics.rating_metrics(scale[place], eighths / 8, user, scale)
    moved = metrics.rating_metrics(scale[place] * unit + shift, eighths / 8 * unit + shift, user, scale * unit + shift)
    in_points = {"rmse", "mae", "ece"}
    expected = {key: value * unit if key in in_points else value for key, value in found.items()}
    assert moved == pytest.approx(expected, nan_ok=True)


@given(ratings)
def test_the_absolute_error_lies_between_calibration_error_and_rmse(events):
    place, eighths, user = np.array(events).T
    found = metrics.rating_metrics(place + 1, eighths / 8, user, STARS)
    assert found["ece"] <= found["mae"] + 1e-12
    assert found["mae"] <= found["rmse"] + 1e-12


def test_what_is_lower_the_better_is_a_metric():
    known = {key for keys in metrics.METRICS.values() for key in keys}
    assert metrics.LOWER_IS_BETTER - {"loss"} <= known
    assert all(metrics.HEADLINE[task] in keys for task, keys in metrics.METRICS.items())


def make_log(user, item, split, label=None) -> Log:
    n = len(user)
    return Log(
        user=np.array(user, dtype=np.int32),
        item=np.array(item, dtype=np.int32),
        timestamp=np.arange(n, dtype=np.int64),
        label=np.zeros(n, dtype=np.int8) if label is None else np.array(label, dtype=np.int8),
        rating=None,
        split=np.array(split, dtype=np.int8),
        user_ids=pl.Series(range(max(user, default=-1) + 1)),
        items=pl.DataFrame({"item_id": range(max(item, default=-1) + 1)}),
        prompts=None,
    )


def test_slices_by_hand():
    # Training events: item 0 has three, items 1 and 2 have two, items 3 and 4 one; item 5 is only in the test rows.
    item = [0, 0, 0, 1, 1, 2, 2, 3, 4, 0, 1, 2, 3, 4, 5]
    user = [0] * 9 + [0, 0, 0, 1, 1, 1]
    found = {name: rows[9:].tolist() for name, rows in metrics.slices(make_log(user, item, [0] * 9 + [2] * 6)).items()}
    assert found == {
        "cold_item": [False, False, False, False, False, True],
        "cold_user": [False, False, False, True, True, True],
        "popular": [True, False, False, False, False, False],
        "mid": [False, True, True, False, False, False],
        "tail": [False, False, False, True, True, False],
    }


def test_rows_without_items_are_in_no_item_slice():
    found = metrics.slices(make_log([0, 1], [-1, -1], [0, 2]))
    assert {name for name, rows in found.items() if rows.any()} == {"cold_user"}


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 8), st.integers(0, 2)), max_size=30))
def test_item_slices_share_out_all_rows_that_have_an_item(events):
    user, item, split = ([event[k] for event in events] for k in range(3))
    found = metrics.slices(make_log(user, item, split))
    share = sum(found[name].astype(int) for name in ("cold_item", "popular", "mid", "tail"))
    assert share.tolist() == [int(i >= 0) for i in item]
