from __future__ import annotations

import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from peftrec import baselines, classical, metrics
from peftrec.errors import ConfigError, DataError
from peftrec.split import Log

RATINGS = (1.0, 2.0, 3.0, 4.0, 5.0)
WAYS = [("frozen", "isolate"), ("streaming", "isolate"), ("streaming", "order")]


def make_log(user, item, time, rating, split, scale=RATINGS) -> Log:
    """A log from columns in any order of rows; sorted by user, then time, as logs are."""
    user, item, time, rating, split = (np.array(column) for column in (user, item, time, rating, split))
    order = np.lexsort((time, user))
    return Log(
        user=user[order].astype(np.int32),
        item=item[order].astype(np.int32),
        timestamp=time[order].astype(np.int64),
        label=np.searchsorted(scale, rating[order]).astype(np.int8),
        rating=rating[order].astype(np.float32),
        split=split[order].astype(np.int8),
        user_ids=pl.Series(range(int(user.max(initial=-1)) + 1)),
        items=pl.DataFrame({"item_id": range(int(item.max(initial=-1)) + 1)}),
        scale=scale,
    )


def two_tastes(seed: int = 0, clicks: bool = False) -> Log:
    """Users 0 to 29 like even films and dislike odd ones, the other 30 the reverse; each has rated half of 40 films."""
    rng = np.random.default_rng(seed)
    user, item = np.divmod(rng.permutation(60 * 40)[:1200], 40)
    taste = np.where((user < 30) == (item % 2 == 0), 1.0, -1.0)
    rating = np.clip(np.round(3 + 1.2 * taste + 0.5 * rng.normal(size=1200)), 1, 5)
    split = rng.choice(3, 1200, p=[0.7, 0.1, 0.2])
    if clicks:
        return make_log(user, item, rng.permutation(1200), rating >= 4, split, scale=(0.0, 1.0))
    return make_log(user, item, rng.permutation(1200), rating, split)


def some_log(n: int = 150, seed: int = 1, valid: bool = True) -> Log:
    """Random ratings with many shared timestamps, users and items without training events, and rows without item."""
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, 12, n), rng.integers(-1, 15, n)
    split = rng.choice(3, n, p=[0.6, 0.2, 0.2]) if valid else rng.choice([0, 2], n, p=[0.7, 0.3])
    item[np.flatnonzero(user == 3)[:2]] = 7, -1
    split[(user == 3) | (item == 7)] = 2
    return make_log(user, item, rng.integers(0, 30, n), rng.integers(1, 6, n), split)


def rmse(log: Log, score: np.ndarray) -> float:
    test = log.split == 2
    return float(np.sqrt(np.mean((score[test] - log.rating[test]) ** 2)))


def known_of(log: Log, row: int, history: str, ties: str) -> np.ndarray:
    """Rows of its user that a held-out row knows, by the definition."""
    own = log.user == log.user[row]
    if history == "frozen":
        return np.flatnonzero(own & (log.split == 0))
    earlier = np.arange(len(log)) < row if ties == "order" else log.timestamp < log.timestamp[row]
    return np.flatnonzero(own & earlier)


class Learned:
    """An algorithm of a library that learned given numbers."""

    def __init__(self, **numbers):
        vars(self).update(numbers)

    def fit(self, trainset):
        return self


def library(monkeypatch, **numbers) -> None:
    """Puts a library in place whose every fit ends in the given numbers."""

    def algorithm(*args, **options):
        return Learned(**numbers)

    fake = SimpleNamespace(SVD=algorithm, SVDpp=algorithm, KNNBaseline=algorithm, Trainset=lambda *args: None)
    monkeypatch.setitem(sys.modules, "surprise", fake)


# Training ratings 2 and 4: mean 3, deviation 1, so that values are ratings minus 3.
SMALL = make_log([0, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 2], [4, 2, 5, 3], [0, 0, 2, 2])


def test_a_factorisation_by_hand(monkeypatch):
    library(monkeypatch, n_factors=1, bi=np.array([0.5, -0.5]), qi=np.array([[1.0], [2.0]]))
    # User 1 knows a 2 of item 1: -1 + 0.5 is to be 1 b + 2 p under penalties 4 and 10. By symmetry of the ridge fit
    # (b, p) = (1/4, 2/10) t with t = -0.5 / (1 + 1/4 + 4/10), and row 2 is 3 + 0.5 + b + p.
    t = -0.5 / 1.65
    score = classical.predict(SMALL, ["svd"], "frozen").scores["svd"]
    assert score.tolist() == pytest.approx([math.nan, math.nan, 3.5 + t * 0.45, 2.5 + t * 0.65], nan_ok=True)
    # Streaming, the last row knows a 5 of item 0 as well: 2 - 0.5 is to be b + p.
    b, p = np.linalg.solve([[4 + 2, 3], [3, 10 + 5]], [-0.5 + 1.5, -1.0 + 1.5])
    score = classical.predict(SMALL, ["svd"], "streaming").scores["svd"]
    assert score[2:].tolist() == pytest.approx([3.5 + t * 0.45, 2.5 + b + 2 * p])


def test_neighbours_by_hand(monkeypatch):
    library(monkeypatch, bi=np.array([0.5, -0.5]), sim=np.array([[1.0, 0.4], [0.4, 1.0]]))
    # User 1 knows a 2 of item 1, half a point below its effect: one of 16 parts is the user's own, the rest the
    # item's, and both other rows have it as their one neighbour.
    frozen = classical.predict(SMALL, ["item_knn"], "frozen").scores["item_knn"]
    assert frozen[2:].tolist() == pytest.approx([3.5 - 0.5, 2.5 - 0.5])
    own = (-0.5 + 1.5) / 17
    around = (1.0 * (-0.5 - own) + 0.4 * (1.5 - own)) / 1.4
    streaming = classical.predict(SMALL, ["item_knn"], "streaming").scores["item_knn"]
    assert streaming[2:].tolist() == pytest.approx([3.5 - 0.5, 2.5 + own + around])


@pytest.mark.parametrize(("history", "ties"), WAYS)
@pytest.mark.parametrize("name", ["svd", "svdpp"])
def test_a_users_part_is_the_least_squares_fit_of_what_the_row_knows(monkeypatch, name, history, ties):
    log, rng = some_log(valid=False), np.random.default_rng(0)
    train = (log.split == 0) & (log.item >= 0)
    items = np.unique(log.item[train])
    effect, factors, chosen = rng.normal(size=len(items)), rng.normal(size=(len(items), 3)), rng.normal(size=(99, 3))
    chosen = chosen[: len(items)] * (name == "svdpp")
    implicit = {"yj": chosen} if name == "svdpp" else {}
    library(monkeypatch, n_factors=3, bi=effect, qi=factors, **implicit)
    score = classical.predict(log, [name], history, ties).scores[name]

    mean, deviation = log.rating[train].mean(), log.rating[train].std()
    place = {item: index for index, item in enumerate(items.tolist())}
    zeros = (0.0, np.zeros(3), np.zeros(3))

    def item(row):
        index = place.get(int(log.item[row]))
        return zeros if index is None else (effect[index], factors[index], chosen[index])

    for row in np.flatnonzero(log.split == 2):
        met = known_of(log, row, history, ties)
        with_factors = [event for event in met if int(log.item[event]) in place]
        centre = sum((item(event)[2] for event in with_factors), np.zeros(3)) / math.sqrt(max(len(with_factors), 1))
        # The penalty as further rows of ordinary least squares.
        design = [[1, *item(event)[1]] for event in met] + np.diag(np.sqrt([4, 10, 10, 10])).tolist()
        values = [(log.rating[event] - mean) / deviation - item(event)[0] for event in met]
        values += [0, *(math.sqrt(10) * centre)]
        own = np.linalg.lstsq(np.array(design, dtype=float), np.array(values, dtype=float), rcond=None)[0]
        told = mean + deviation * (item(row)[0] + own @ [1, *item(row)[1]])
        assert score[row] == pytest.approx(np.clip(told, 1, 5), abs=1e-6)


def test_item_knn_is_the_librarys_own_prediction_for_those_it_knows():
    surprise = pytest.importorskip("surprise")
    log = two_tastes()
    found = classical.predict(log, ["item_knn"], "frozen")
    frame = pl.DataFrame({"user": log.user, "item": log.item, "rating": log.rating}).filter(log.split == 0)
    data = surprise.Dataset.load_from_df(frame.to_pandas(), surprise.Reader(rating_scale=(1, 5)))
    options = {"name": "pearson_baseline", "user_based": False}
    theirs = surprise.KNNBaseline(k=found.settings["item_knn"]["nearest"], sim_options=options, verbose=False)
    theirs.fit(data.build_full_trainset())
    rows = np.flatnonzero(log.split == 2)
    expected = [theirs.predict(int(log.user[row]), int(log.item[row])).est for row in rows]
    assert found.scores["item_knn"][rows] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", classical.NAMES)
@pytest.mark.parametrize("history", ["frozen", "streaming"])
def test_tastes_are_found_that_no_bias_can_tell(name, history):
    pytest.importorskip("surprise")
    log = two_tastes()
    # The best that effects of users and items can do: all films are rated alike on average, and all users alike.
    no_taste = rmse(log, np.full(len(log), log.rating[log.split == 0].mean()))
    assert rmse(log, classical.predict(log, [name], history).scores[name]) < 0.9 * no_taste
    clicks = two_tastes(clicks=True)
    test = clicks.split == 2
    bias = baselines.predict(clicks, history).scores["bias"]
    score = classical.predict(clicks, [name], history, task="click").scores[name]
    auc = [metrics.click_metrics(clicks.label[test], s[test], clicks.user[test])["auc"] for s in (bias, score)]
    assert auc[0] < 0.5
    assert auc[1] > 0.75


@pytest.mark.parametrize("name", classical.NAMES)
def test_the_unknown_falls_back_to_effects_and_the_mean(name):
    pytest.importorskip("surprise")
    log = some_log(valid=False)
    score = classical.predict(log, [name], "frozen").scores[name]
    held = log.split != 0
    assert np.isfinite(score[held]).all()
    assert np.isnan(score[~held]).all()
    assert ((score[held] >= 1) & (score[held] <= 5)).all()
    stranger = held & (log.user == 3)
    nothing = stranger & ((log.item == 7) | (log.item == -1))
    mean = log.rating[(log.split == 0) & (log.item >= 0)].mean()
    assert score[nothing].tolist() == pytest.approx([mean] * nothing.sum())
    assert 0 < nothing.sum() < stranger.sum()
    of_item = {int(item): score[stranger & (log.item == item)] for item in log.item[stranger & ~nothing]}
    assert len({round(float(scores[0]), 9) for scores in of_item.values()}) > 1
    assert all(np.ptp(scores) < 1e-12 for scores in of_item.values())


@pytest.mark.parametrize("name", classical.NAMES)
@pytest.mark.parametrize(("history", "ties"), WAYS)
def test_a_row_knows_what_it_may_and_nothing_else(name, history, ties):
    pytest.importorskip("surprise")
    log = some_log(valid=False)
    score = classical.predict(log, [name], history, ties).scores[name]
    held = np.flatnonzero(log.split != 0)
    changes = 0
    for event in held[::4]:
        label = log.label.copy()
        label[event] = 4 - label[event] if label[event] != 2 else 0
        rating = np.asarray(log.scale, dtype=np.float32)[label]
        other = classical.predict(replace(log, label=label, rating=rating), [name], history, ties).scores[name]
        may = np.array([event in known_of(log, row, history, ties) for row in held])
        assert (other[held][~may] == score[held][~may]).all()
        changes += int((other[held][may] != score[held][may]).sum())
    assert (changes > 0) == (history == "streaming")


@pytest.mark.parametrize("name", ["svd", "svdpp"])
def test_the_seed_fixes_a_fit(name):
    pytest.importorskip("surprise")
    log = two_tastes()
    first, again, other = (classical.predict(log, [name], "frozen", seed=seed).scores[name] for seed in (5, 5, 6))
    held = log.split != 0
    assert (first[held] == again[held]).all()
    assert (first[held] != other[held]).any()


@pytest.mark.parametrize("name", classical.NAMES)
def test_ratings_on_another_scale_are_predicted_alike(name):
    pytest.importorskip("surprise")
    log = two_tastes()
    halves = tuple(rating / 2 for rating in RATINGS)
    half = replace(log, rating=log.rating / 2, scale=halves)
    one, two = (classical.predict(each, [name], "streaming").scores[name][each.split != 0] for each in (log, half))
    assert two == pytest.approx(one / 2, abs=1e-6)


def test_clicks_become_log_odds_of_labels_whatever_the_ratings():
    pytest.importorskip("surprise")
    log = two_tastes(clicks=True)
    found = classical.predict(log, ["svd"], "frozen", task="click")
    valid, held = log.split == 1, log.split != 0
    # Where a fit of slope and intercept is best, mean chance and share agree; the prior moves it by less than a row.
    chance = 1 / (1 + np.exp(-found.scores["svd"][valid]))
    assert chance.sum() == pytest.approx(log.label[valid].sum(), abs=3)
    assert found.settings["svd"]["slope"] > 0
    other = classical.predict(replace(log, rating=np.zeros(len(log))), ["svd"], "frozen", task="click")
    assert (other.scores["svd"][held] == found.scores["svd"][held]).all()


def test_without_validation_rows_log_odds_follow_the_tangent(monkeypatch):
    library(monkeypatch, n_factors=1, bi=np.zeros(2), qi=np.zeros((2, 1)))
    log = make_log([0, 0, 1, 2], [0, 1, 0, 1], [0, 1, 2, 3], [1, 0, 0, 1], [0, 0, 0, 2], scale=(0.0, 1.0))
    found = classical.predict(log, ["svd"], "frozen", task="click")
    assert found.scores["svd"][3] == pytest.approx(4 / 3 - 2)
    assert found.settings["svd"] == pytest.approx(
        {"regularisation": 0.1, "factor_penalty": 10.0, "slope": 4.0, "intercept": -2.0}
    )


def test_a_missing_library_is_said_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "surprise", None)
    for call in (
        lambda: classical.check(["bias", "svd", "item_knn"]),
        lambda: classical.predict(SMALL, ["svd", "item_knn"], "frozen"),
    ):
        with pytest.raises(ConfigError, match=r"^eval\.baselines: .*svd.*pip install 'peftrec\[baselines\]'") as error:
            call()
        assert "\n" not in str(error.value)
    classical.check(["bias", "popularity"])
    assert classical.predict(SMALL, ["bias"], "frozen") == classical.Predictions({}, {})


@pytest.mark.parametrize(
    ("limit", "name", "found"),
    [
        ("MOST_ITEMS", "item_knn", "2 items in training"),
        ("MOST_EVENTS", "svd", "2 training events"),
        ("MOST_EVENTS", "svdpp", "2 training events"),
        ("MOST_PAIRS", "svdpp", "2 pairs of events of a user"),
    ],
)
def test_what_would_fill_the_machine_is_refused(monkeypatch, limit, name, found):
    library(monkeypatch, n_factors=1, bi=np.zeros(2), qi=np.zeros((2, 1)), sim=np.eye(2))
    monkeypatch.setattr(classical, limit, 2)
    classical.predict(SMALL, [name], "frozen")
    monkeypatch.setattr(classical, limit, 1)
    with pytest.raises(DataError, match=f"^eval.baselines: {name} with {found}; expected at most 1; leave it out$"):
        classical.predict(SMALL, [name], "frozen")


def test_prompts_without_items_have_no_such_baselines():
    pytest.importorskip("surprise")
    log = replace(SMALL, item=np.full(4, -1, dtype=np.int32), items=pl.DataFrame({"item_id": []}))
    assert classical.predict(log, classical.NAMES, "frozen").scores == {}
