from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_metrics import sample

from peftrec import metrics
from peftrec.bootstrap import Interval, UserMeans, bootstrap, resample


def test_bootstrap_equals_measuring_each_resample_by_hand():
    label, score, user = sample(200, 12, seed=3)
    found = bootstrap(label, {"a": score, "b": -score}, user, n=40, seed=5)
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


def test_bootstrap_of_ratings_equals_measuring_each_resample_by_hand():
    scale = (1.0, 2.0, 3.0, 4.0, 5.0)
    rng = np.random.default_rng(3)
    rating, user = rng.integers(1, 6, 200), rng.integers(0, 12, 200)
    scores = {"a": (rating + rng.normal(size=200)).round(1), "b": np.full(200, 3.4), "popularity": rng.normal(size=200)}
    answer = rng.integers(1, 6, 200)
    found = bootstrap(rating, scores, user, 30, 5, ["popularity"], task="rating", scale=scale, answers={"a": answer})

    def measured(name, rows, owner):
        only = name == "popularity"
        given = answer[rows] if name == "a" else None
        return metrics.rating_metrics(rating[rows], scores[name][rows], owner, scale, given, ranking_only=only)

    rng = np.random.default_rng(5)
    drawn = []
    for _ in range(30):
        users = rng.integers(12, size=12)
        rows = np.concatenate([np.flatnonzero(user == u) for u in users])
        owner = np.concatenate([np.full((user == u).sum(), k) for k, u in enumerate(users)])
        drawn.append({name: measured(name, rows, owner) for name in scores})
    for name, own in found.intervals.items():
        assert tuple(own) == (metrics.RANKING["rating"] if name == "popularity" else metrics.RATING_METRICS)
        for key, point in measured(name, np.arange(200), user).items():
            ends = np.quantile([one[name][key] for one in drawn], [0.025, 0.975])
            assert (own[key].point, own[key].low, own[key].high) == pytest.approx((point, *ends))
    for name, own in found.differences.items():
        for key, paired in own.items():
            ends = np.quantile([one["a"][key] - one[name][key] for one in drawn], [0.025, 0.975])
            assert (paired.low, paired.high) == pytest.approx(tuple(ends))
    assert tuple(found.differences["popularity"]) == metrics.RANKING["rating"]


def test_bootstrap_of_ratings_that_can_be_counted():
    # One user is hit and the other missed by two points: resamples have a mean squared error of 0, 2 or 4.
    scores = {"ours": [1.0, 5.0], "by one": [2.0, 4.0]}
    found = bootstrap([1, 3], scores, ["hit", "missed"], 200, task="rating", scale=(1, 2, 3, 4, 5))
    assert found.intervals["ours"]["rmse"] == pytest.approx(Interval(np.sqrt(2), 0.0, 2.0))
    assert found.intervals["by one"]["rmse"] == Interval(1.0, 1.0, 1.0)
    assert found.differences["by one"]["rmse"] == Interval(pytest.approx(np.sqrt(2) - 1), -1.0, 1.0)
    assert np.isnan(found.intervals["ours"]["uauc"].point)


@given(st.integers(2, 6), st.integers(0, 999))
def test_bootstrap_interval_contains_the_point_of_a_symmetric_case(half, seed):
    # Half of the users are told all right, half all wrong: accuracy and uauc are 0.5 and vary about it.
    label = np.tile([0, 1], 2 * half)
    user = np.repeat(np.arange(2 * half), 2)
    score = np.where(user < half, 1, -1) * (2 * label - 1)
    found = bootstrap(label, {"x": score, "same": score}, user, n=200, seed=seed)
    for key in ("accuracy", "uauc"):
        interval = found.intervals["x"][key]
        assert interval.point == 0.5
        assert interval.low < 0.5 < interval.high
    assert {(each.low, each.high) for each in found.differences["same"].values()} == {(0.0, 0.0)}


def test_bootstrap_of_identical_users_has_no_width():
    label, user = np.tile([0, 1, 1], 5), np.repeat(np.arange(5), 3)
    for interval in bootstrap(label, {"x": np.tile([0.2, 0.1, 3], 5)}, user, n=20).intervals["x"].values():
        assert interval.low == pytest.approx(interval.point)
        assert interval.high == pytest.approx(interval.point)


def test_bootstrap_does_not_depend_on_how_resamples_are_batched(monkeypatch):
    label, score, user = sample(100, 9)
    once = bootstrap(label, {"x": score}, user, n=25)
    monkeypatch.setattr("peftrec.bootstrap._CHUNK_CELLS", 700)
    assert bootstrap(label, {"x": score}, user, n=25) == once


def test_bootstrap_compares_a_ranking_on_what_it_has():
    label, score, user = sample(100, 9)
    found = bootstrap(label, {"x": score, "popularity": score}, user, n=5, ranking_only=["popularity"])
    assert tuple(found.intervals["popularity"]) == tuple(found.differences["popularity"]) == metrics.RANKING["click"]


def test_bootstrap_is_fast_enough_for_every_run():
    label, score, user = sample(10_000, 900)
    start = time.process_time()
    bootstrap(label, {str(k): score + k for k in range(6)}, user, n=200)
    assert time.process_time() - start < 6  # 30 s for 1000 resamples


def test_means_over_users_and_ratios_of_sums() -> None:
    ones = np.ones(4)
    first = UserMeans(
        {"mean": (np.array([0.0, 1, 1, 0]), ones), "ratio": (np.array([1.0, 0, 5, 0]), np.array([1.0, 0, 2, 0]))}
    )
    second = UserMeans({"mean": (np.array([1.0, 0, 0, 1]), ones)})
    found = resample({"a": first, "b": second}, 4, 4, 200, 1)
    assert found.intervals["a"]["mean"].point == 0.5
    assert found.intervals["a"]["ratio"].point == 2
    assert 1 <= found.intervals["a"]["ratio"].low < 2 < found.intervals["a"]["ratio"].high <= 2.5
    # One is the other's opposite on every resample: the difference is twice as far from its point.
    gap, own = found.differences["b"]["mean"], found.intervals["a"]["mean"]
    assert (gap.point, gap.low, gap.high) == pytest.approx((0, 2 * own.low - 1, 2 * own.high - 1))
    assert "ratio" not in found.differences["b"]
