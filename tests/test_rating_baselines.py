from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftrec import factors, rating_baselines
from peftrec.draws import drawn_order
from peftrec.errors import ModelError
from peftrec.rating_baselines import NAMES, RatingPrior, RatingSettings
from peftrec.split import Log

SETTINGS = RatingSettings(item_mean=2.0, item=3.0, user=1.5, factors=2, factor_penalty=0.5)
SCALE = (1.0, 2.0, 3.0, 4.0, 5.0)
WHOLE = tuple(name for name in NAMES if name != "popularity")
WAYS = [(history, order) for history in ("streaming", "frozen") for order in ("time", "random")]


def make_log(user, item, time, rating, split, scale=SCALE) -> Log:
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
        items=pl.DataFrame({"item_id": [f"film {code}" for code in range(int(item.max(initial=-1)) + 1)]}),
        prompts=None,
        scale=scale,
    )


@st.composite
def logs(draw: st.DrawFn, first_item: int = -1) -> Log:
    """Small logs with many shared timestamps; splits do not follow time."""
    n = draw(st.integers(1, 25))

    def column(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=n, max_size=n))

    return make_log(column(0, 6), column(first_item, 4), column(0, 8), column(1, 5), column(0, 2))


def two_tastes(n: int = 3000, seed: int = 0) -> Log:
    """Half of the users like even films and half odd ones; some films and users rate higher than others."""
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, 60, n), rng.integers(0, 40, n)
    taste = np.where((user + item) % 2, 1.0, -1.0)
    rating = 3 + taste + 0.4 * rng.normal(size=60)[user] + 0.4 * rng.normal(size=40)[item] + 0.3 * rng.normal(size=n)
    return make_log(
        user, item, rng.permutation(n), np.clip(np.round(rating), 1, 5), rng.choice(3, n, p=[0.7, 0.1, 0.2])
    )


def scores(log: Log, history: str = "frozen", order: str = "time", ties: str = "isolate") -> dict[str, np.ndarray]:
    return rating_baselines.predict(log, history, ties, order, SETTINGS).scores


def with_rating(log: Log, row: int, rating: float) -> Log:
    changed = log.rating.copy()
    changed[row] = rating
    return replace(log, rating=changed)


def other_ratings(log: Log, rows: np.ndarray) -> Log:
    return replace(log, rating=np.where(rows, log.rating % 5 + 1, log.rating).astype(np.float32))


def rmse(log: Log, score: np.ndarray, split: int) -> float:
    return float(np.sqrt(np.mean((score - log.rating)[log.split == split] ** 2)))


# Three users and three films; the test row is user 2's film 0. Ratings of training: 5 3 | 4 2 | 1, their mean 3.
def three_by_three() -> Log:
    return make_log([0, 0, 1, 1, 2, 2], [0, 1, 0, 2, 1, 0], [1, 2, 1, 2, 1, 2], [5, 3, 4, 2, 1, 3], [0, 0, 0, 0, 0, 2])


def test_held_rows_by_hand():
    found = scores(three_by_three())
    assert found["global_mean"][5] == pytest.approx(3)
    assert found["user_mean"][5] == pytest.approx(3 + (1 - 3) / (1 + 1.5))
    assert found["item_mean"][5] == pytest.approx(3 + ((5 - 3) + (4 - 3)) / (2 + 2))
    assert found["popularity"].tolist() == [1, 1, 1, 0, 1, 2]
    # One round of effects is enough to follow by hand; ten go on from there.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factors, "_EFFECT_ROUNDS", 1)
        bias = scores(three_by_three())["bias"]
    effects = (2 + 1) / (2 + 3), (0 - 2) / (2 + 3)
    assert bias[5] == pytest.approx(3 + effects[0] + (1 - 3 - effects[1]) / (1 + 1.5))


def test_training_rows_by_hand():
    # Three users are three groups: user 0's films are known from the ratings 4 2 | 1 of the others, their mean 7/3.
    mean = 7 / 3
    found = scores(three_by_three(), order="time")
    assert found["global_mean"][:2] == pytest.approx([mean, mean])
    assert found["user_mean"][:2] == pytest.approx([mean, mean + (5 - mean) / (1 + 1.5)])
    assert found["item_mean"][:2] == pytest.approx([mean + (4 - mean) / (1 + 2), mean + (1 - mean) / (1 + 2)])
    by_others = scores(three_by_three(), order="random")
    assert by_others["user_mean"][:2] == pytest.approx([mean + (3 - mean) / (1 + 1.5), mean + (5 - mean) / (1 + 1.5)])
    assert by_others["item_mean"] == pytest.approx(found["item_mean"])


class Looped:
    """The user's part of the same definitions, one row and one fit at a time."""

    def __init__(self, log: Log, history: str, ties: str, order: str):
        self.log, self.history, self.ties, self.order = log, history, ties, order
        users = len(log.user_ids)
        groups = np.empty(users, dtype=int)
        groups[drawn_order(users, 13, "rating groups")] = np.arange(users) % 5
        self.group = groups[log.user]

    def knows(self, row: int, event: int) -> bool:
        log = self.log
        earlier = event < row if self.ties == "order" else log.timestamp[event] < log.timestamp[row]
        if log.split[row] == 0:
            return log.split[event] == 0 and (event != row if self.order == "random" else earlier)
        return earlier if self.history == "streaming" else log.split[event] == 0

    def rating(self, row: int, name: str) -> float:
        log = self.log
        train = log.split == 0
        rows = train & (self.group != self.group[row]) if train[row] else train
        items = rating_baselines._fitted(name, log, rows, SETTINGS, 13)
        known = [e for e in np.flatnonzero(log.user == log.user[row]) if self.knows(row, e)]
        design = items.design(log.item[known])
        gram = design.T @ design + np.diag([1.5] + [0.5] * (design.shape[1] - 1))
        part = np.linalg.inv(gram) @ design.T @ (log.rating[known] - items.base(log.item[known]))
        base = items.base(log.item[[row]])[0]
        with_user = items.design(log.item[[row]])[0] @ part if name in ("user_mean", "bias", "mf") else 0
        return float(np.clip(base + with_user, 1, 5))


@pytest.mark.parametrize(("history", "order"), WAYS)
@given(log=logs(), ties=st.sampled_from(["isolate", "order"]))
@settings(max_examples=25, deadline=None)
def test_agrees_with_a_fit_for_each_row(history, order, log, ties):
    found = scores(log, history, order, ties)
    looped = Looped(log, history, ties, order)
    assert set(found) == (set(NAMES) if len(log.items) else {"global_mean", "user_mean"})
    for name in set(found) - {"popularity"}:
        assert found[name] == pytest.approx([looped.rating(row, name) for row in range(len(log))], abs=1e-8), name


@pytest.mark.parametrize(("history", "order"), WAYS)
@given(log=logs(first_item=0), data=st.data(), rating=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_no_row_knows_its_own_rating(history, order, log, data, rating):
    row = data.draw(st.integers(0, len(log) - 1))
    found, changed = scores(log, history, order), scores(with_rating(log, row, rating), history, order)
    for name in NAMES:
        assert changed[name][row] == pytest.approx(found[name][row], abs=1e-8), name


@given(logs(first_item=0))
@settings(max_examples=25, deadline=None)
def test_frozen_rows_know_no_held_out_rating(log):
    found, changed = scores(log), scores(other_ratings(log, log.split != 0))
    for name in NAMES:
        assert changed[name].tolist() == found[name].tolist()


@given(logs(first_item=0), st.data())
@settings(max_examples=25, deadline=None)
def test_a_streaming_row_knows_no_rating_of_its_users_moment_or_later_but_by_the_items(log, data):
    held = np.flatnonzero(log.split != 0)
    if not len(held):
        return
    row = data.draw(st.sampled_from(held.tolist()))
    hidden = (log.user == log.user[row]) & (log.timestamp >= log.timestamp[row])
    # Training ratings reach a held-out row through its item too, held-out ones not at all if they are later.
    found, changed = scores(log, "streaming"), scores(other_ratings(log, hidden & (log.split != 0)), "streaming")
    for name in NAMES:
        assert changed[name][row] == pytest.approx(found[name][row], abs=1e-9), name


@given(logs(first_item=0), st.data())
@settings(max_examples=25, deadline=None)
def test_a_training_row_in_order_of_time_knows_nothing_later_of_its_user(log, data):
    training = np.flatnonzero(log.split == 0)
    if not len(training):
        return
    row = data.draw(st.sampled_from(training.tolist()))
    hidden = ((log.user == log.user[row]) & (log.timestamp >= log.timestamp[row])) | (log.split != 0)
    found, changed = scores(log), scores(other_ratings(log, hidden))
    for name in NAMES:
        assert changed[name][row] == pytest.approx(found[name][row], abs=1e-9), name


def test_rows_do_know_what_they_may():
    log = two_tastes(600)
    row = int(np.flatnonzero((log.split == 0) & (log.user == 3))[3])
    of_user = log.user == log.user[row]
    later, earlier = (
        of_user & mask for mask in (log.timestamp > log.timestamp[row], log.timestamp < log.timestamp[row])
    )
    training = log.split == 0
    for name in ("user_mean", "bias", "mf"):
        timed, mixed = scores(log)[name][row], scores(log, order="random")[name][row]
        assert scores(other_ratings(log, earlier & training))[name][row] != pytest.approx(timed)
        assert scores(other_ratings(log, later & training), order="random")[name][row] != pytest.approx(mixed)
        held = int(np.flatnonzero(log.split != 0)[1:][np.diff(log.user[log.split != 0]) == 0][0])
        before = (log.user == log.user[held]) & (log.split != 0) & (log.timestamp < log.timestamp[held])
        assert before.any()
        streamed = scores(log, "streaming")[name][held]
        assert scores(other_ratings(log, before), "streaming")[name][held] != pytest.approx(streamed)


def test_events_of_one_second_see_each_other_only_in_order():
    log = make_log([0, 0, 1], [0, 1, 2], [7, 7, 1], [5, 3, 3], [0, 0, 0])
    assert scores(log)["user_mean"].tolist() == [3, 3, 4]  # user 1 knows the mean of user 0
    assert scores(log, ties="order")["user_mean"] == pytest.approx([3, 3 + 2 / 2.5, 4])


@pytest.mark.parametrize(("history", "order"), WAYS)
def test_the_order_of_rows_does_not_matter(history, order):
    rng = np.random.default_rng(1)
    user, item, time = rng.integers(0, 8, 80), rng.integers(0, 6, 80), rng.integers(0, 12, 80)
    rating, split = rng.integers(1, 6, 80), rng.choice(3, 80, p=[0.6, 0.2, 0.2])
    there = rng.permutation(80)
    first = make_log(user, item, time, rating, split)
    second = make_log(*(column[there] for column in (user, item, time, rating, split)))
    # Rows of one user and second stand in another order now: match them by all their columns.
    keys = [np.lexsort((log.rating, log.split, log.item, log.timestamp, log.user)) for log in (first, second)]
    assert keys[0].tolist() != keys[1].tolist()
    found, again = scores(first, history, order), scores(second, history, order)
    for name in NAMES:
        assert again[name][keys[1]] == pytest.approx(found[name][keys[0]]), name


def test_factors_pay_where_tastes_differ_and_training_rows_look_like_test_rows():
    log = two_tastes()
    settings = replace(SETTINGS, factor_penalty=3.0)
    found = rating_baselines.predict(log, "frozen", order="random", settings=settings).scores
    assert rmse(log, found["mf"], 2) < 0.7 * rmse(log, found["bias"], 2)
    assert rmse(log, found["bias"], 2) < rmse(log, found["global_mean"], 2)
    assert rmse(log, found["mf"], 0) == pytest.approx(rmse(log, found["mf"], 2), rel=0.1)


def test_strangers_and_unknown_items_get_what_is_left_of_the_formula():
    # User 1 and film 2 have no training event; in streaming, the later test row knows the earlier one.
    log = make_log([0, 0, 0, 1, 1], [0, 1, 2, 0, 2], [1, 2, 3, 1, 2], [5, 3, 4, 1, 2], [0, 0, 2, 2, 2])
    found = scores(log)
    for name in ("item_mean", "bias", "mf"):
        assert found[name][4] == pytest.approx(4)
        assert found[name][3] > 4
    assert found["user_mean"][3:] == pytest.approx([4, 4])
    assert found["popularity"][2:].tolist() == [0, 1, 0]
    streaming = scores(log, "streaming")
    assert streaming["user_mean"][3:] == pytest.approx([4, 4 + (1 - 4) / 2.5])


def test_predictions_stay_within_the_scale():
    # User 0 gives full marks to everything: on films that others like too, the sum of the effects is beyond the scale.
    user, item = np.repeat(np.arange(6), 8), np.tile(np.arange(8), 6)
    rating = np.where(user == 0, 1.0, np.where(item < 4, 0.5, 0.0))
    log = make_log(user, item, range(48), rating, [2, *[0] * 47], (0.0, 0.5, 1.0))
    free = replace(log, scale=(-9.0, 9.0))
    weak = RatingSettings(item=0.1, user=0.1)
    for name in ("bias", "mf"):
        found, beyond = (
            rating_baselines.predict(each, "frozen", order="random", settings=weak).scores[name] for each in (log, free)
        )
        assert beyond[log.split == 2].max() > 1 > beyond.min()
        assert found.tolist() == np.clip(beyond, 0, 1).tolist()


def test_without_training_rows_of_others_the_middle_of_the_scale_serves():
    log = make_log([0, 0], [0, 1], [1, 2], [5, 5], [0, 2])
    found = scores(log)
    assert {name: found[name][0] for name in WHOLE} == dict.fromkeys(WHOLE, 3.0)


def test_only_what_is_asked_for_is_computed(monkeypatch):
    asked = []
    real = factors.fit_items
    monkeypatch.setattr(factors, "fit_items", lambda *given: asked.append(given[5]) or real(*given))
    log = two_tastes(300)
    found = rating_baselines.predict(log, "frozen", names=("item_mean", "popularity"))
    assert list(found.scores) == ["item_mean", "popularity"]
    assert asked == []
    assert list(rating_baselines.predict(log, "frozen", names=("bias",)).scores) == ["bias"]
    assert set(asked) == {0}


@pytest.mark.parametrize("history", ["streaming", "frozen"])
def test_settings_are_the_best_of_the_grid_on_validation_rows(history, monkeypatch):
    monkeypatch.setattr(rating_baselines, "_FACTORS_GRID", (1, 2))
    monkeypatch.setattr(rating_baselines, "_FACTOR_PENALTY_GRID", (1.0, 12.0))
    log = two_tastes(1500)
    chosen = rating_baselines.predict(log, history).settings

    def loss(name: str, each: RatingSettings) -> float:
        return rmse(log, rating_baselines.predict(log, history, settings=each, names=(name,)).scores[name], 1)

    means = [replace(chosen, item_mean=each) for each in rating_baselines._ITEM_MEAN_GRID]
    biases = [replace(chosen, item=i, user=u) for i in rating_baselines._ITEM_GRID for u in rating_baselines._USER_GRID]
    penalties = [replace(chosen, factor_penalty=each) for each in (1.0, 12.0)]
    for name, grid in (("item_mean", means), ("bias", biases), ("mf", penalties)):
        assert loss(name, chosen) == pytest.approx(min(loss(name, each) for each in grid)), name
    assert chosen.factor_penalty == 1


def test_without_validation_rows_the_default_settings_serve():
    log = two_tastes(200)
    log = replace(log, split=np.where(log.split == 1, 0, log.split).astype(np.int8))
    assert rating_baselines.predict(log, "streaming", names=("bias",)).settings == RatingSettings()


@pytest.mark.parametrize(("kind", "tolerance"), [("bias", 1e-9), ("mf", 1e-5)])
def test_prior_scores_a_frozen_row_as_the_baseline_does(kind, tolerance):
    log = two_tastes(800)
    fitted = rating_baselines.fit_prior(log, kind, SETTINGS)
    prior = RatingPrior.from_json(fitted.to_json())
    assert prior == fitted
    expected = scores(log)[kind]
    ids = np.array(log.items["item_id"].to_list())
    for user in range(60):
        met, held = (np.flatnonzero((log.user == user) & mask) for mask in (log.split == 0, log.split != 0))
        score = prior.scores(ids[log.item[met]], log.rating[met], ids[log.item[held]])
        assert score == pytest.approx(expected[held], abs=tolerance)


def test_prior_of_a_stranger_and_of_an_unknown_item():
    log = two_tastes(800)
    prior = rating_baselines.fit_prior(log, "mf", SETTINGS)
    assert prior.scores([], [], ["never seen"]) == pytest.approx([log.rating[log.split == 0].mean()])
    assert prior.scores([], [], []).shape == (0,)
    pleased, displeased = (prior.scores(["film 2", "film 4"], [y, y], ["film 6"])[0] for y in (5, 1))
    assert pleased > prior.scores([], [], ["film 6"])[0] > displeased
    assert len(prior.items["film 2"]) == 3
    assert len(rating_baselines.fit_prior(log, "bias", SETTINGS).items["film 2"]) == 1


def test_prior_takes_whole_number_ids_as_they_are():
    log = two_tastes(200)
    prior = rating_baselines.fit_prior(replace(log, items=pl.DataFrame({"item_id": range(40)})), "bias", SETTINGS)
    assert prior.scores([1], [5], [2, 3]).tolist() == prior.scores(["1"], [5], ["2", "3"]).tolist()


def test_prior_of_a_log_that_never_trains_on_items_is_its_mean():
    log = make_log([0, 1], [-1, -1], [1, 2], [2, 4], [0, 2])
    prior = rating_baselines.fit_prior(log, "mf", SETTINGS)
    assert RatingPrior.from_json(prior.to_json()).scores([], [], ["a"]).tolist() == [2]


GOOD = {"mean": 3, "items": {"a": [0.5, 1.0]}, "user_penalty": 1, "factor_penalty": 2.5, "bounds": [1, 5]}


def test_a_prior_may_be_written_by_hand():
    prior = RatingPrior.from_json(json.dumps(GOOD))
    # 4 on "a" is 0.5 above it, spread over intercept and factor: 0.5 (1/1, 1/2.5) / (1 + 1/1 + 1/2.5).
    step = 0.5 / (1 + 1 + 0.4)
    assert prior.scores(["a"], [4], ["a", "b"]) == pytest.approx([3.5 + 1.4 * step, 3 + step])


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "[[]]",
        '"mean"',
        "7",
        "[" * 100_000,
        json.dumps({**GOOD, "more": 1}),
        json.dumps({key: value for key, value in GOOD.items() if key != "mean"}),
        *(
            json.dumps({**GOOD, key: value})
            for key, value in [
                ("mean", float("nan")),
                ("mean", None),
                ("mean", "3"),
                ("mean", True),
                ("mean", 10**400),
                ("items", []),
                ("items", {"a": 1}),
                ("items", {"a": []}),
                ("items", {"a": "xy"}),
                ("items", {"a": [float("inf")]}),
                ("items", {"a": [1, 2], "b": [1]}),
                ("items", {"a": [1, 1e300]}),
                ("items", {"a": [0] * 66}),
                ("user_penalty", 0),
                ("factor_penalty", -1),
                ("factor_penalty", 1e-300),
                ("factor_penalty", 1e300),
                ("bounds", [1]),
                ("bounds", [1, 2, 3]),
                ("bounds", [5, 1]),
                ("bounds", [1, float("inf")]),
                ("bounds", 1),
                ("bounds", None),
            ]
        ),
    ],
)
def test_a_broken_prior_is_refused_in_one_line(text):
    with pytest.raises(ModelError, match="fetch the adapter again") as error:
        RatingPrior.from_json(text)
    assert "\n" not in str(error.value)


def test_the_widest_numbers_that_a_prior_may_hold_still_give_ratings():
    items = {str(code): [1e6, *[1e3] * 64] for code in range(50)}
    prior = RatingPrior.from_json(json.dumps({**GOOD, "items": items, "user_penalty": 1e-3, "factor_penalty": 1e-3}))
    score = prior.scores([str(code) for code in range(50)], [5.0] * 50, ["7", "none"])
    assert ((score >= 1) & (score <= 5)).all()
