"""Bayesian matrix factorisation: one closed form for what a row knows, honest for training rows, and saved whole."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from peftrec import baselines, bayes_factors, bpmf, opponents
from peftrec.baselines import Prior
from peftrec.bayes_factors import Posterior
from peftrec.bpmf import BpmfPrior, LogOdds
from peftrec.config import parse_recipe
from peftrec.errors import DataError, ModelError
from peftrec.split import Log

# Item 0 is good; who met it is of a kind that likes item 1; the last row is an unknown item.
BY_HAND = Posterior(
    mean=3.0,
    deviation=2.0,
    effect=np.array([0.5, 0.0, 0.0]),
    factors=np.array([[1.0], [1.0], [0.0]]),
    traits=np.array([[1.0], [0.0], [0.0]]),
    leanings=np.array([[0.0], [0.25], [0.0]]),
    shrinkage=np.array([1.0]),
)


def test_answers_by_hand() -> None:
    # One event: traits 1 / (1 + 1). The answer 5 is one deviation, half of which the effect explains; of the other half
    # the person keeps 1 / (1 + 1).
    told = BY_HAND.told(np.array([0]), np.array([5.0]), np.array([1, -1]))
    assert told == pytest.approx([3 + 2 * (0.25 / 2 + 0.25), 3])


def test_a_penalty_of_three_halves_what_a_person_keeps() -> None:
    # 1 / (1 + 3) where it was 1 / (1 + 1).
    told = BY_HAND.penalised(3.0).told(np.array([0]), np.array([5.0]), np.array([1]))
    assert told == pytest.approx([3 + 2 * (0.25 / 2 + 0.125)], abs=1e-5)


def test_of_nobody_known_the_effects_are_told() -> None:
    nothing = np.zeros(0, dtype=np.int64)
    assert BY_HAND.told(nothing, np.zeros(0), np.array([0, 1, -1])) == pytest.approx([4, 3, 3])


@st.composite
def histories(draw: st.DrawFn) -> tuple[Posterior, np.ndarray, np.ndarray]:
    items, factors, traits, events = (draw(st.integers(low, 5)) for low in (1, 0, 0, 1))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    rows = [rng.normal(size=(items + 1, width)) for width in (1, factors, traits, traits)]
    for each in rows:
        each[-1] = 0
    posterior = Posterior(2.0, 1.5, rows[0][:, 0], rows[1], rows[2], rows[3], rng.random(traits) + 0.5)
    return posterior, rng.integers(-1, items, events), rng.normal(size=events)


@given(histories())
def test_all_ways_to_leave_events_out_agree(given_: tuple[Posterior, np.ndarray, np.ndarray]) -> None:
    posterior, met, answers = given_
    left_out, every = posterior.left_out(met, answers), np.arange(len(met))
    earlier = posterior.from_earlier(met, answers, every, met)
    for row in every:
        others = every != row
        assert left_out[row] == pytest.approx(posterior.told(met[others], answers[others], met[[row]])[0])
        assert earlier[row] == pytest.approx(posterior.told(met[:row], answers[:row], met[[row]])[0])


def test_long_histories_are_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    met, answers = np.resize([0, 1, -1], 20), np.linspace(1, 5, 20)
    known = np.array([0, 3, 3, 4, 9, 20])
    whole = BY_HAND.from_earlier(met, answers, known, met[:6])
    monkeypatch.setattr(bayes_factors, "_BLOCK", 2)
    assert BY_HAND.from_earlier(met, answers, known, met[:6]) == pytest.approx(whole)


# --- what is learned --------------------------------------------------------------------------------------------------


def two_tastes(task: str, n: int = 3000, genres: bool = False) -> Log:
    """Half of the people like even films, half odd ones; each likes a tenth of the others. Films 40 and 41 wait."""
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 60, n), rng.integers(0, 40, n)
    liked = rng.random(n) < np.where(user % 2 == item % 2, 0.9, 0.1)
    order = np.lexsort((np.arange(n), user))
    scale = (0.0, 1.0) if task == "click" else (1.0, 2.0)
    kinds = ["even" if i % 2 == 0 else "odd" for i in range(42)]
    table = {"item_id": [f"film {i}" for i in range(42)], **({"genres": kinds} if genres else {})}
    return Log(
        user=user[order].astype(np.int32),
        item=item[order].astype(np.int32),
        timestamp=np.arange(n)[order],
        label=liked[order].astype(np.int8),
        rating=np.asarray(scale, dtype=np.float32)[liked[order].astype(np.int8)],
        split=rng.choice(3, n, p=[0.8, 0.1, 0.1]).astype(np.int8),
        user_ids=pl.Series(range(60)),
        items=pl.DataFrame(table),
        scale=scale,
    )


def test_the_penalty_is_the_one_that_tells_validation_rows_best(monkeypatch: pytest.MonkeyPatch) -> None:
    log = two_tastes("rating", 600)
    errors = {}
    for penalty in (1.0, 2.0, 4.0):
        monkeypatch.setattr(bpmf, "_PENALTIES", (penalty,))
        found = bpmf.predict(log, "frozen", training=False)
        assert found.settings == {"penalty": penalty}
        valid = log.split == 1
        errors[penalty] = float(np.mean((found.scores[valid] - log.rating[valid]) ** 2))
    assert len(set(errors.values())) == 3
    monkeypatch.setattr(bpmf, "_PENALTIES", tuple(errors))
    found = bpmf.predict(log, "frozen", training=False)
    assert found.settings["penalty"] == min(errors, key=lambda one: errors[one])
    none = replace(log, split=np.where(log.split == 1, 0, log.split).astype(np.int8))
    assert bpmf.predict(none, "frozen", training=False).settings == {"penalty": 1.0}


def test_what_few_have_met_leans_on_little() -> None:
    log = two_tastes("rating", 600)
    found = bayes_factors.fit(log.user, log.item, log.rating.astype(float), np.zeros((42, 0)), 1.5, 13)
    assert not found.leanings[40:].any()
    assert found.leanings[:40].all()


@pytest.fixture(scope="module")
def clicks() -> Log:
    return two_tastes("click")


@pytest.fixture(scope="module")
def ratings() -> Log:
    return two_tastes("rating")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few draws: what a row may know does not hang on how well it is told."""
    monkeypatch.setattr(bayes_factors, "_FIRST_ROUNDS", 2)
    monkeypatch.setattr(bayes_factors, "_ROUNDS", 3)
    monkeypatch.setattr(bpmf, "_PENALTIES", (1.0,))  # chosen by validation answers, as any setting is


def item_mean(log: Log) -> tuple[np.ndarray, Prior]:
    """Held fast, so that a label's way into the factorisation is seen alone."""
    return np.linspace(-1, 1, len(log)), Prior(0.3, {"film 0": 0.5, "film 3": -0.25}, 3.0)


@pytest.mark.parametrize("order", ["time", "random"])
def test_tastes_are_told_apart_in_training_rows_as_in_test_rows(ratings: Log, order: Any) -> None:
    found = bpmf.predict(ratings, "frozen", order=order).scores
    aucs = [roc_auc_score(ratings.label[ratings.split == part], found[ratings.split == part]) for part in (0, 2)]
    assert min(aucs) > (0.75 if order == "time" else 0.85)  # early rows know little of their person
    assert found.min() >= 1
    assert found.max() <= 2


def test_a_film_that_nobody_saw_is_told_by_its_kind() -> None:
    log = two_tastes("rating", genres=True)
    prior = bpmf.predict(log, "frozen", training=False).prior
    history, answers = [f"film {i}" for i in range(0, 20)], [2.0, 1.0] * 10
    even, odd = prior.scores(history, answers, ["film 40", "film 41"])
    assert even > odd + 0.2


def test_what_was_chosen_tells_whatever_the_answers() -> None:
    """Half of the people choose among the first twenty films and like film 40; half among the next, and do not."""
    rng = np.random.default_rng(1)
    user, half = np.repeat(np.arange(80), 12), np.repeat(np.arange(80) % 2, 12)
    item = np.where(np.arange(len(user)) % 12 == 0, 40, 20 * half + rng.integers(0, 20, len(user)))
    answer = np.where(item == 40, 1.0 - half, rng.integers(0, 2, len(user)))
    learned = bayes_factors.fit(user, item, answer, np.zeros((41, 0)), 0.5, 13)
    first, second = (learned.told(np.arange(20 * group, 20 * group + 8), np.resize([0.0, 1.0], 8), np.array([40]))
                     for group in (0, 1))  # fmt: skip
    assert first[0] > second[0] + 0.4


def test_no_events_tell_the_middle() -> None:
    none = np.zeros(0, dtype=np.int64)
    learned = bayes_factors.fit(none, none, np.zeros(0), np.zeros((2, 1)), 2.5, 13)
    assert learned.told(np.array([0]), np.array([4.0]), np.array([1])) == pytest.approx([2.5])


def test_answers_all_alike_are_expected_again() -> None:
    learned = bayes_factors.fit(np.array([0, 0, 1]), np.array([0, 1, 0]), np.ones(3), np.zeros((2, 0)), 2.5, 13)
    assert learned.told(np.array([1]), np.ones(1), np.array([0])) == pytest.approx([1.0], abs=0.5)


def test_people_who_all_met_the_same_differ_in_nothing() -> None:
    user, item = np.repeat(np.arange(6), 3), np.tile(np.arange(3), 6)
    learned = bayes_factors.fit(user, item, (item == 0).astype(float), np.zeros((3, 0)), 0.5, 13)
    assert np.abs(learned.traits).max() < 100
    told = learned.told(np.zeros(0, dtype=np.int64), np.zeros(0), np.arange(3))
    assert told[0] > max(told[1:]) + 0.3


# --- what a row may know ----------------------------------------------------------------------------------------------


def flipped(log: Log, rows: np.ndarray) -> Log:
    label = np.where(rows, 1 - log.label, log.label).astype(np.int8)
    return replace(log, label=label, rating=np.asarray(log.scale, dtype=np.float32)[label])


def raw(log: Log, history: Any, order: Any, ties: Any = "isolate") -> np.ndarray:
    """What the factorisation says, without the weights that validation labels choose."""
    if log.scale == (1.0, 2.0):
        return bpmf.predict(log, history, ties, order).scores
    given = item_mean(log)
    found = bpmf.predict(log, history, ties, order, given)
    how = found.prior.log_odds
    assert how is not None
    return (found.scores - how.intercept - how.item_slope * given[0]) / how.slope


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("task", ["click", "rating"])
@pytest.mark.parametrize("ties", ["isolate", "order"])
def test_a_training_row_knows_no_answer_of_its_person_from_its_own_moment_on(task: str, ties: Any) -> None:
    log = two_tastes(task, 1200)
    log = replace(log, timestamp=log.timestamp // 100)
    row = int(np.flatnonzero(log.split == 0)[500])
    same = np.arange(len(log)) >= row if ties == "order" else log.timestamp >= log.timestamp[row]
    later = (log.user == log.user[row]) & same
    assert later.sum() > 1
    other = flipped(log, later)
    before, after = raw(log, "frozen", "time", ties), raw(other, "frozen", "time", ties)
    assert after[row] == pytest.approx(before[row], abs=1e-9)
    changed = (log.split == 0) & (log.user == log.user[row]) & ~same
    assert after[changed] == pytest.approx(before[changed], abs=1e-9)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("task", ["click", "rating"])
def test_in_random_order_a_training_row_knows_all_answers_but_its_own(task: str) -> None:
    log = two_tastes(task, 1200)
    row = int(np.flatnonzero(log.split == 0)[500])
    before = raw(log, "frozen", "random")
    assert raw(flipped(log, np.arange(len(log)) == row), "frozen", "random")[row] == pytest.approx(before[row])
    others = (log.user == log.user[row]) & (np.arange(len(log)) != row)
    assert abs(raw(flipped(log, others), "frozen", "random")[row] - before[row]) > 0.01


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("task", ["click", "rating"])
def test_a_held_out_row_knows_no_held_out_answer_from_its_own_moment_on(task: str) -> None:
    log = two_tastes(task, 1200)
    row = int(np.flatnonzero(log.split == 2)[60])
    held = log.split != 0
    before = raw(log, "streaming", "time")
    later = flipped(log, held & (log.timestamp >= log.timestamp[row]))
    assert raw(later, "streaming", "time")[row] == pytest.approx(before[row])
    earlier = flipped(log, (log.user == log.user[row]) & (log.timestamp < log.timestamp[row]))
    assert abs(raw(earlier, "streaming", "time")[row] - before[row]) > 0.01
    frozen = raw(log, "frozen", "time")
    assert raw(flipped(log, held), "frozen", "time")[held] == pytest.approx(frozen[held])


def test_a_streaming_row_knows_what_others_said_of_its_film_since_training() -> None:
    """Forty answers since training that were .5 above what was expected: half of that is believed."""
    log = two_tastes("rating", 200)
    log = replace(log, item=np.zeros(200, dtype=np.int32), timestamp=np.arange(200), split=np.repeat([0, 2], 100))
    news = bpmf._news(log, np.full(200, 0.5), log.split == 2)
    assert news[[0, 1, 40]] == pytest.approx([0, 0.5 / 41, 0.25])
    unknown = replace(log, item=np.full(200, -1, dtype=np.int32))
    assert not bpmf._news(unknown, np.full(200, 0.5), log.split == 2).any()
    frozen_items = bpmf.predict(log, "streaming", items="frozen", training=False).scores
    assert np.nanmax(np.abs(bpmf.predict(log, "streaming", training=False).scores - frozen_items)) > 0


# --- what is saved ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("task", ["click", "rating"])
def test_prior_scores_a_frozen_row_as_the_baseline_does(task: str) -> None:
    log = two_tastes(task, genres=True)
    if task == "click":
        counted = baselines.predict(log, "frozen")
        of_all = baselines.fit_prior(log, baselines.Shrinkage(item=counted.shrinkage.item_mean))
        found = bpmf.predict(log, "frozen", item_mean=(counted.scores["item_mean"], of_all), training=False)
    else:
        found = bpmf.predict(log, "frozen", training=False)
    prior = opponents.prior_from_json(task, found.prior.to_json())  # type: ignore[arg-type]
    assert prior == found.prior
    ids, answers = np.array(log.items["item_id"].to_list()), np.asarray(log.scale)[log.label]
    for user in range(0, 60, 7):
        met, held = (np.flatnonzero((log.user == user) & mask) for mask in (log.split == 0, log.split != 0))
        score = prior.scores(ids[log.item[met]].tolist(), answers[met].tolist(), ids[log.item[held]].tolist())
        assert score == pytest.approx(found.scores[held], abs=1e-9)


def test_log_odds_by_hand() -> None:
    item_prior = Prior(0.1, {"a": 0.4}, 3.0)
    rows = {"a": (0.5, 1.0), "b": (0.0, 1.0)}
    prior = BpmfPrior(0.5, 0.5, (), rows, (0.0, 1.0), LogOdds(4.0, 0.2, -2.0, item_prior))
    # A like is one deviation up, half of which the effect of "a" explains; half of the rest is the person's.
    assert prior.scores(["a"], [1], ["a", "b"]) == pytest.approx([4 * 0.875 + 0.2 * 0.5 - 2, 4 * 0.625 + 0.2 * 0.1 - 2])
    assert prior.scores([], [], ["c"]) == pytest.approx([4 * 0.5 + 0.2 * 0.1 - 2])


GOOD: dict[str, Any] = {
    "bpmf": 1, "mean": 0.5, "deviation": 0.5, "shrinkage": [2.0], "bounds": [0, 1],
    "items": {"a": [0.5, 1.0, 0.1, 0.2]},
    "log_odds": {
        "slope": 4, "item_slope": 0.2, "intercept": -2,
        "item_mean": {"mean": 0.1, "items": {"a": 0.4}, "user_shrinkage": 3.0},
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"bpmf": 2},
        {"more": 1},
        {"mean": None},
        {"mean": float("nan")},
        {"deviation": 0},
        {"shrinkage": [0]},
        {"shrinkage": [1.0, 1.0]},
        {"shrinkage": [1.0] * 21},
        {"bounds": [1, 0]},
        {"bounds": [1]},
        {"items": {"a": []}},
        {"items": {"a": [0.5, 1.0, 0.1, 0.2], "b": [0.5, 0.1, 0.2]}},
        {"items": {"a": [0.5] * 100}},
        {"items": {"a": [0.5, 1e9, 0.1, 0.2]}},
        {"log_odds": {}},
        {"log_odds": {**GOOD["log_odds"], "slope": "4"}},
        {"log_odds": {**GOOD["log_odds"], "item_mean": {}}},
        {"log_odds": {**GOOD["log_odds"], "item_mean": {**GOOD["log_odds"]["item_mean"], "mean": 10**400}}},
        {"log_odds": {**GOOD["log_odds"], "item_mean": {**GOOD["log_odds"]["item_mean"], "items": {"a": 1e300}}}},
    ],
)
def test_a_broken_prior_is_refused_in_one_line(change: dict[str, Any]) -> None:
    assert opponents.prior_from_json("click", json.dumps(GOOD)).scores([], [], ["a"]) == pytest.approx([1.1])
    with pytest.raises(ModelError, match=r"^prior: .*; fetch the adapter again$") as error:
        opponents.prior_from_json("click", json.dumps({**GOOD, **change}))
    assert "\n" not in str(error.value)


def test_too_many_events_are_refused(ratings: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpmf, "MOST_EVENTS", 100)
    with pytest.raises(DataError, match=r"^bpmf with 2,\d+ training events; expected at most 100; leave it out$"):
        bpmf.predict(ratings, "frozen")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("task", ["click", "rating"])
@pytest.mark.parametrize("kind", ["none", "bpmf"])
def test_a_recipe_may_want_it_as_baseline_and_as_prior(task: str, kind: str) -> None:
    log = two_tastes(task, 1200)
    recipe = parse_recipe(
        {
            "task": task,
            "data": {"interactions": "x.csv", "items": "y.csv"},
            "score": {"prior": kind},
            "eval": {"history": "frozen", "baselines": ["bpmf", "mf"]},
            "output_dir": "x",
        },
        "r",
    )
    found = opponents.measure(log, recipe)
    assert list(found.scores) == ["bpmf", "mf", "global_mean"]
    assert np.isfinite(found.scores["bpmf"][log.split != 0]).all()
    if kind == "none":
        assert found.prior is None
        assert np.isnan(found.scores["bpmf"][log.split == 0]).all()
    else:
        assert found.prior is not None
        assert np.isfinite(found.prior).all()
        assert isinstance(found.saved_prior, BpmfPrior)


@pytest.mark.parametrize(("task", "log_odds"), [("click", None), ("rating", GOOD["log_odds"])])
def test_a_prior_of_the_other_task_is_refused(task: Any, log_odds: Any) -> None:
    text = json.dumps({**GOOD, "log_odds": log_odds})
    with pytest.raises(ModelError, match=f"of another task than {task}"):
        opponents.prior_from_json(task, text)


def test_rare_likes_do_not_make_it_sure_of_itself() -> None:
    rng = np.random.default_rng(3)
    log = two_tastes("click", 1000)
    mean, liked = 0.02, rng.random(1000) < 0.02
    log = replace(log, split=np.where(np.arange(1000) < 400, 1, 0).astype(np.int8), label=liked.astype(np.int8))
    predicted, item_mean = mean + rng.normal(0, 0.05, 1000), np.full(1000, np.log(mean / (1 - mean)))
    slope, item_slope, intercept = bpmf._weights(predicted, item_mean, log, mean)

    def loss(log_odds: np.ndarray) -> float:
        return float(np.mean(np.logaddexp(0, np.where(liked, -log_odds, log_odds))[:400]))

    assert loss(slope * predicted + item_slope * item_mean + intercept) < loss(item_mean) + 0.01


def test_too_many_items_are_refused(clicks: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpmf, "MOST_ITEMS", 41)
    with pytest.raises(DataError, match="bpmf with 42 items; expected at most 41"):
        bpmf.predict(clicks, "frozen", item_mean=None)
