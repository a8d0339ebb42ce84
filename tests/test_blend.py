"""A blended prior: weights and means by hand, nothing from the future, and the same when it is asked for later."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import random_log
from sklearn.metrics import roc_auc_score

from peftrec import baselines, blend, opponents, rating_baselines
from peftrec.blend import BlendedPrior
from peftrec.config import parse_recipe
from peftrec.errors import ConfigError, ModelError
from peftrec.split import Log

PLAIN = baselines.Prior(0.0, {}, 1.0)
WEIGHTS = (0.25, 1.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0)


def test_means_by_hand() -> None:
    """Five events that were as expected belong to each mean, twenty to the last; the last 3 of 4 are -1, 1 and 1."""
    found = blend._means(np.array([1.0, -1.0, 1.0, 1.0]), np.array([0, 1, 4]))
    assert found[0] == pytest.approx([0] * 5)
    assert found[1] == pytest.approx([1 / 6] * 4 + [1 / 21])
    assert found[2] == pytest.approx([1 / 8, 2 / 9, 2 / 9, 2 / 9, 2 / 24])


def test_a_prior_by_hand() -> None:
    """Two likes, of an item that half like and of an unknown one; last three: (0.5 + 0.2) / (2 + 5)."""
    prior = BlendedPrior(WEIGHTS, 0.8, {"7": 0.5}, None, PLAIN)
    told = PLAIN.scores([7, 9], [1, 1], ["a", "b"])
    assert prior.scores([7, 9], [1, 1], ["a", "b"]) == pytest.approx(0.25 + told + 0.5 * 0.1)
    assert prior.scores([], [], ["a"]) == pytest.approx([0.25])
    # Half of the log-odds of 0.8, which an unknown item is expected to have: log(4) / 2.
    assert replace(prior, weights=(0, 0, 0.5, 0, 0, 0, 0, 0)).scores([], [], ["a"]) == pytest.approx([np.log(2)])
    ratings = replace(prior, mean=3.0, expected={}, bounds=(1.0, 5.0), weights=(9.0, *WEIGHTS[1:]))
    assert ratings.scores([7], [4], ["a"]).tolist() == [5.0]


def ratings_of(log: Log) -> Log:
    return replace(log, scale=(1.0, 2.0, 3.0), label=(log.label + log.item % 2).astype(np.int8))


def scores(log: Log, history: Any, ties: Any = "isolate") -> np.ndarray:
    told = np.full(len(log), np.mean(log.scale)), PLAIN
    return blend.predict(log, history, ties, history, told, clicks=len(log.scale) == 2).scores


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are learned from all training answers; everything else must know the past alone."""
    monkeypatch.setattr(blend, "_order", lambda *_: (1.0, 0.4))
    monkeypatch.setattr(blend, "_level", lambda *_: (0.0, 1.0, 0.7, -0.3, 0.2, 0.5, 0.1))


@pytest.mark.usefixtures("fixed")
@pytest.mark.parametrize("ties", ["isolate", "order"])
@pytest.mark.parametrize("kind", [lambda log: log, ratings_of])
def test_no_row_knows_an_answer_of_its_moment_or_later(kind: Callable[[Log], Log], ties: Any) -> None:
    log = kind(random_log(3))
    before = scores(log, "streaming", ties)
    told = 0
    for row in range(len(log)):
        label = log.label.copy()
        label[row] = (label[row] + 1) % len(log.scale)
        moved = np.flatnonzero(np.abs(scores(replace(log, label=label), "streaming", ties) - before) > 1e-12)
        told += len(moved)
        own = log.user[moved] == log.user[row]
        later = (moved > row) if ties == "order" else log.timestamp[moved] > log.timestamp[row]
        # Held-out rows look at training events with all that training tells of their items.
        settled = (log.split[row] == 0) & (log.split[moved] > 0)
        assert (np.where(own, later, log.timestamp[moved] > log.timestamp[row]) | settled).all()
        assert row not in moved
    assert told > len(log)


@pytest.mark.parametrize("task", ["click", "rating"])
@pytest.mark.parametrize("prior", ["bias", "mf"])
def test_what_is_saved_scores_a_frozen_row_as_the_run_did(task: str, prior: str) -> None:
    log = random_log(5) if task == "click" else ratings_of(random_log(5))
    log = replace(log, rating=None if task == "click" else np.asarray(log.scale, dtype=np.float32)[log.label])
    recipe = a_recipe(task=task, score={"prior": prior, "blend": True}, eval={"history": "frozen"})
    found = opponents.measure(log, recipe)
    assert found.saved_prior is not None
    assert found.prior is not None
    np.testing.assert_array_equal(found.prior, found.scores["blend"].astype(np.float32))
    saved = opponents.prior_from_json(recipe.task, found.saved_prior.to_json())
    assert saved == found.saved_prior
    ids, answers = log.items["item_id"].to_list(), np.asarray(log.scale)[log.label]
    for row in np.flatnonzero(log.split == 2):
        met = np.flatnonzero((log.user == log.user[row]) & (log.split == 0))
        told = saved.scores([ids[log.item[one]] for one in met], answers[met], [ids[log.item[row]]])
        assert told == pytest.approx(found.scores["blend"][row], abs=1e-6)


def a_recipe(**sections: Any) -> Any:
    return parse_recipe({"data": {"name": "ml-100k"}, "output_dir": "x", **sections}, "a recipe")


def test_a_mood_that_turns_is_told() -> None:
    """Everybody likes all for twenty events and nothing for twenty, in turn: the bias sees half and half."""
    users, events = 12, 120
    rng = np.random.default_rng(2)
    time = np.tile(np.arange(events), users)
    label = ((time // 20) % 2 == 0) ^ (rng.random(len(time)) < 0.1)
    split = np.select([time >= 100, time >= 90], [2, 1], 0).astype(np.int8)
    log = replace(
        random_log(1, users=users, events=events),
        timestamp=time,
        label=label.astype(np.int8),
        item=rng.integers(0, 8, len(time)).astype(np.int32),
        split=split,
    )
    found = opponents.measure(log, a_recipe(task="click", score={"prior": "bias", "blend": True}))
    train = split == 0
    area = {name: roc_auc_score(label[train], found.scores[name][train]) for name in ("bias", "blend")}
    assert area["blend"] > area["bias"] + 0.2
    assert found.settings["blend"]["last_3"] > 0.5


@pytest.mark.parametrize("clicks", [True, False])
def test_nothing_to_learn_from_is_the_prior_alone(clicks: bool) -> None:
    nothing = np.zeros(0)
    assert blend._order(nothing, nothing, nothing, nothing, clicks) == (1, 0)
    assert blend._level(nothing, np.zeros((0, 5)), nothing, clicks) == (0, 1, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("clicks", [True, False])
def test_the_order_within_people_is_weighed_whatever_is_between_them(clicks: bool) -> None:
    """Between people the prior is right; within each of them it is noise, and the item decides."""
    rng = np.random.default_rng(4)
    user = np.repeat(np.arange(200), 20)
    level, noise, item = rng.normal(size=200)[user] * 3, rng.normal(size=len(user)), rng.normal(size=len(user))
    score = level + 2 * item
    answer = (rng.random(len(user)) < 1 / (1 + np.exp(-score))).astype(float) if clicks else score
    prior, of_item = blend._order(level + noise, item, answer, user, clicks)
    assert prior == pytest.approx(0, abs=0.1)
    assert of_item == pytest.approx(2, abs=0.3)


def test_pairs_of_one_person_are_spread_evenly() -> None:
    rows, answer = np.arange(10, 15), np.array([1.0, 0, 1, 0, 0])
    pairs = blend._pairs(rows, answer).tolist()
    assert pairs == [[10, 11], [10, 13], [10, 14], [12, 11], [12, 13], [12, 14]]
    assert blend._pairs(rows, np.ones(5)).shape == (0, 2)
    for likes in (48, 49, 50, 98):
        answer = np.arange(likes + 60) < likes
        many = blend._pairs(np.arange(likes + 60), answer.astype(float))
        assert many.shape == (50, 2)
        assert answer[many[:, 0]].all()
        assert not answer[many[:, 1]].any()
        assert len(np.unique(many[:, 0])) == min(likes, 50)
        assert len(np.unique(many[:, 1])) == 50


@pytest.mark.parametrize(
    "change",
    [
        {"weights": [1.0]},
        {"weights": [1e9, 1, 0, 0, 0, 0, 0, 0]},
        {"weights": None},
        {"bounds": [5, 1]},
        {"bounds": 3},
        {"bounds": 0},
        {"bounds": False},
        {"expected": {"7": "high"}},
        {"expected": [1]},
        {"mean": None},
        {"prior": {"mean": 0}},
        {"prior": {"blend": 1}},
        {"blend": 2},
        {"more": 1},
    ],
)
def test_a_broken_prior_is_refused_in_one_line(change: dict[str, Any]) -> None:
    whole = json.loads(BlendedPrior(WEIGHTS, 0.8, {"7": 0.5}, None, PLAIN).to_json())
    with pytest.raises(ModelError, match=r"^prior: [^\n]+; fetch the adapter again$"):
        opponents.prior_from_json("click", json.dumps({**whole, **change}))


def test_it_means_nothing_without_a_prior() -> None:
    with pytest.raises(ConfigError, match=r"score\.blend: does nothing under score\.prior: none"):
        a_recipe(score={"blend": True})


def test_drawn_negatives_are_no_answers() -> None:
    with pytest.raises(ConfigError, match=r"score\.blend: true; it counts what is drawn"):
        a_recipe(
            data={"interactions": "clicks.parquet", "items": "items.parquet", "sampled_negatives": 4},
            prompt={"history": "liked"},
            score={"prior": "bias", "blend": True},
        )


@pytest.mark.parametrize(("task", "bounds"), [("rating", None), ("click", (1.0, 5.0))])
def test_a_blend_of_the_other_task_is_refused(task: Any, bounds: tuple[float, float] | None) -> None:
    inner = rating_baselines.RatingPrior(3.0, {}, 1.0, 1.0, (1.0, 5.0)) if task == "rating" else PLAIN
    text = BlendedPrior(WEIGHTS, 0.8, {"7": 0.5}, bounds, inner).to_json()
    with pytest.raises(ModelError, match=f"prior: a blend of another kind than one for {task}"):
        opponents.prior_from_json(task, text)


def test_a_blend_of_a_blend_is_refused() -> None:
    inner = BlendedPrior(WEIGHTS, 0.8, {}, None, PLAIN)
    with pytest.raises(ModelError, match="prior: a blend of another kind"):
        opponents.prior_from_json("click", replace(inner, prior=inner).to_json())


def test_the_other_prior_is_read_by_its_task() -> None:
    text = BlendedPrior(WEIGHTS, 0.8, {"7": 0.5}, (1.0, 5.0), PLAIN).to_json()
    with pytest.raises(ModelError, match=r"^prior: "):
        opponents.prior_from_json("rating", text)
