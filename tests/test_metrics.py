from __future__ import annotations

import time

import numpy as np
import polars as pl
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from peftrec import metrics
from peftrec.errors import DataError
from peftrec.split import Log


@st.composite
def rows(draw: st.DrawFn, most: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, scores with ties, and users."""
    n = draw(st.integers(1, most))
    label = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n))
    score = draw(st.lists(st.integers(-6, 6), min_size=n, max_size=n))
    user = draw(st.lists(st.integers(0, 5), min_size=n, max_size=n))
    return np.array(label), np.array(score) / 2, np.array(user)


def sample(n: int, n_users: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    score = rng.normal(size=n).round(2)
    return (rng.random(n) < 1 / (1 + np.exp(-score))).astype(np.int8), score, rng.integers(0, n_users, n)


def looped_auc(label, score, weight) -> float:
    won = total = 0.0
    for i in np.flatnonzero(label == 1):
        for j in np.flatnonzero(label == 0):
            pair = weight[i] * weight[j]
            total += pair
            won += pair * (1.0 if score[i] > score[j] else 0.5 if score[i] == score[j] else 0.0)
    return won / total if total else np.nan


def test_auc_counts_pairs_and_half_of_ties():
    assert metrics.auc([0, 0, 1, 1], [1, 2, 2, 3]) == pytest.approx(3.5 / 4)
    assert metrics.auc([0, 1], [0.0, 0.0]) == 0.5
    # The lost pair counts 3 x 1, the won one 1 x 1.
    assert metrics.auc([0, 0, 1], [2, 0, 1], weight=[3, 1, 1]) == pytest.approx(0.25)


def test_uauc_is_the_mean_over_users_who_have_both_classes():
    label = [1, 0, 1, 0, 0, 1, 1]
    score = [2, 1, 0, 1, 1, 5, 6]
    user = ["a", "a", "b", "b", "b", "c", "c"]
    assert metrics.uauc(label, score, user) == pytest.approx((1 + 0) / 2)


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
    assert tuple(metrics.click_metrics([0, 1], [3, 70], [1, 1], probability=False)) == metrics.RANKING_METRICS


@pytest.mark.parametrize("label", [[1, 1], [0, 0], []])
def test_one_class_is_nan_and_no_exception(label):
    found = metrics.click_metrics(label, [0.5] * len(label), [0] * len(label))
    assert np.isnan(found["auc"])
    assert np.isnan(found["uauc"])
    assert np.isfinite(found["log_loss"]) == bool(label)
    interval = metrics.bootstrap(label, {"x": [0.5] * len(label)}, [0] * len(label), n=3).intervals["x"]["auc"]
    assert np.isnan([interval.point, interval.low, interval.high]).all()


def test_nothing_predicted_leaves_precision_undefined():
    found = metrics.click_metrics([0, 1], [-1, -2], [0, 0])
    assert np.isnan(found["precision"])
    assert found["recall"] == found["f1"] == 0


def test_huge_scores_do_not_overflow():
    assert metrics.click_metrics([0, 1], [-1e4, 1e4], [0, 0])["log_loss"] == 0
    assert metrics.click_metrics([1, 0], [-1e4, 1e4], [0, 0])["log_loss"] == pytest.approx(1e4)


@pytest.mark.parametrize(
    ("label", "score", "found"),
    [
        ([0, 1], [0.0, np.nan], "1 of 2 scores are NaN or infinite"),
        ([0, 1], [0.0, np.inf], "1 of 2 scores are NaN or infinite"),
        ([0, 5], [0.0, 1.0], "1 of 2 labels are neither 0 nor 1"),
        ([0, 1], [0.0], "labels (2,), scores (1,)"),
    ],
)
def test_rows_that_cannot_be_measured_say_so_in_one_line(label, score, found):
    with pytest.raises(DataError) as error:
        metrics.auc(label, score)
    assert found in str(error.value)
    assert "\n" not in str(error.value)


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
    assert metrics.auc(label, score, weight) == pytest.approx(expected)


@given(rows(), st.integers(0, 99))
def test_auc_agrees_with_a_loop_over_pairs(data, seed):
    label, score, user = data
    weight = np.random.default_rng(seed).integers(0, 3, len(label))
    expected = looped_auc(label, score, weight)
    assert metrics.auc(label, score, weight) == pytest.approx(expected, nan_ok=True)
    ones = np.ones(len(label))
    by_user = [looped_auc(label[user == u], score[user == u], ones) for u in np.unique(user)]
    defined = [value for value in by_user if np.isfinite(value)]
    expected = np.mean(defined) if defined else np.nan
    assert metrics.uauc(label, score, user) == pytest.approx(expected, nan_ok=True)


@given(rows())
def test_ranking_does_not_change_under_a_monotone_map(data):
    label, score, user = data
    for mapped in (np.exp(score), 3 * score - 1, score**3):
        assert metrics.auc(label, mapped) == pytest.approx(metrics.auc(label, score), nan_ok=True)
        assert metrics.uauc(label, mapped, user) == pytest.approx(metrics.uauc(label, score, user), nan_ok=True)


@given(rows(), st.randoms(use_true_random=False))
def test_metrics_do_not_depend_on_the_order_of_rows_or_the_names_of_users(data, random):
    label, score, user = data
    order = list(range(len(label)))
    random.shuffle(order)
    expected = metrics.click_metrics(label, score, user)
    names = np.array([f"user {u}" for u in user])
    assert metrics.click_metrics(label[order], score[order], names[order]) == pytest.approx(expected, nan_ok=True)


def test_bootstrap_equals_measuring_each_resample_by_hand():
    label, score, user = sample(200, 12, seed=3)
    found = metrics.bootstrap(label, {"a": score, "b": -score}, user, n=40, seed=5)
    rng = np.random.default_rng(5)
    values: dict[str, list[float]] = {key: [] for key in metrics.CLICK_METRICS}
    differences = []
    for _ in range(40):
        drawn = rng.integers(12, size=12)
        chosen = np.concatenate([np.flatnonzero(user == u) for u in drawn])
        # A user drawn twice is two users to uauc.
        owner = np.concatenate([np.full((user == u).sum(), k) for k, u in enumerate(drawn)])
        a = metrics.click_metrics(label[chosen], score[chosen], owner)
        b = metrics.click_metrics(label[chosen], -score[chosen], owner)
        differences.append(a["uauc"] - b["uauc"])
        for key, value in a.items():
            values[key].append(value)
    for key, point in metrics.click_metrics(label, score, user).items():
        interval = found.intervals["a"][key]
        assert interval.point == pytest.approx(point)
        assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(values[key], [0.025, 0.975])))
    paired = found.differences["b"]["uauc"]
    assert (paired.low, paired.high) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])))
    assert set(found.differences) == {"b"}


@given(st.integers(2, 6), st.integers(0, 999))
def test_bootstrap_interval_contains_the_point_of_a_symmetric_case(half, seed):
    # Half of the users are told all right, half all wrong: accuracy and uauc are 0.5 and vary about it.
    label = np.tile([0, 1], 2 * half)
    user = np.repeat(np.arange(2 * half), 2)
    score = np.where(user < half, 1, -1) * (2 * label - 1)
    found = metrics.bootstrap(label, {"x": score, "same": score}, user, n=200, seed=seed)
    for key in ("accuracy", "uauc"):
        interval = found.intervals["x"][key]
        assert interval.point == 0.5
        assert interval.low < 0.5 < interval.high
    assert {(each.low, each.high) for each in found.differences["same"].values()} == {(0.0, 0.0)}


def test_bootstrap_of_identical_users_has_no_width():
    label, user = np.tile([0, 1, 1], 5), np.repeat(np.arange(5), 3)
    for interval in metrics.bootstrap(label, {"x": np.tile([0.2, 0.1, 3], 5)}, user, n=20).intervals["x"].values():
        assert interval.low == pytest.approx(interval.point)
        assert interval.high == pytest.approx(interval.point)


def test_bootstrap_does_not_depend_on_how_resamples_are_batched(monkeypatch):
    label, score, user = sample(100, 9)
    once = metrics.bootstrap(label, {"x": score}, user, n=25)
    monkeypatch.setattr(metrics, "_CHUNK_CELLS", 700)
    assert metrics.bootstrap(label, {"x": score}, user, n=25) == once


def test_bootstrap_compares_a_ranking_on_what_it_has():
    label, score, user = sample(100, 9)
    found = metrics.bootstrap(label, {"x": score, "popularity": score}, user, n=5, ranking_only=["popularity"])
    assert tuple(found.intervals["popularity"]) == tuple(found.differences["popularity"]) == metrics.RANKING_METRICS


def test_bootstrap_is_fast_enough_for_every_run():
    label, score, user = sample(10_000, 900)
    start = time.process_time()
    metrics.bootstrap(label, {str(k): score + k for k in range(6)}, user, n=200)
    assert time.process_time() - start < 6  # 30 s for 1000 resamples


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
