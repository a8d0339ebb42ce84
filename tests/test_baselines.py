from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftrec import baselines
from peftrec.baselines import Prior, Shrinkage
from peftrec.errors import ModelError
from peftrec.split import Log

SHRINKAGE = Shrinkage(item_mean=2.0, item=3.0, user=1.5)
HISTORIES: tuple[baselines.History, ...] = ("streaming", "frozen")


def make_log(user, item, time, label, split) -> Log:
    """A log from columns in any order of rows; sorted by user, then time, as logs are."""
    user, item, time, label, split = (np.array(column) for column in (user, item, time, label, split))
    order = np.lexsort((time, user))
    return Log(
        user=user[order].astype(np.int32),
        item=item[order].astype(np.int32),
        timestamp=time[order].astype(np.int64),
        label=label[order].astype(np.int8),
        rating=None,
        split=split[order].astype(np.int8),
        user_ids=pl.Series(range(int(user.max(initial=-1)) + 1)),
        items=pl.DataFrame({"item_id": [f"film {code}" for code in range(int(item.max(initial=-1)) + 1)]}),
        prompts=None,
    )


@st.composite
def logs(draw: st.DrawFn, temporal: bool = False, first_item: int = -1) -> Log:
    """Small logs with many shared timestamps; splits follow time or do not."""
    n = draw(st.integers(1, 25))

    def column(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=n, max_size=n))

    time = column(0, 8)
    split = [0 if t < 4 else 1 if t < 6 else 2 for t in time] if temporal else column(0, 2)
    return make_log(column(0, 3), column(first_item, 4), time, column(0, 1), split)


def random_log(n: int, seed: int = 0) -> Log:
    """Users and items that differ in how much they like and are liked; splits follow time."""
    rng = np.random.default_rng(seed)
    user, item, time = rng.integers(0, 40, n), rng.integers(0, 60, n), rng.integers(0, 2 * n, n)
    log_odds = rng.normal(size=40)[user] + rng.normal(size=60)[item]
    split = np.searchsorted(np.quantile(time, [0.6, 0.8]), time)
    return make_log(user, item, time, rng.random(n) < 1 / (1 + np.exp(-log_odds)), split)


def logit(chance: float) -> float:
    return math.log(chance / (1 - chance))


def clip(chance: float) -> float:
    return min(max(chance, 0.02), 0.98)


class Looped:
    """The same definitions, one row and one event at a time."""

    def __init__(self, log: Log, history: str, ties: str = "isolate"):
        self.log, self.history, self.ties = log, history, ties
        self.rows = range(len(log.label))

    def knows(self, row: int, event: int, within_user: bool = False) -> bool:
        log = self.log
        in_order = within_user and self.ties == "order"
        earlier = event < row if in_order else log.timestamp[event] < log.timestamp[row]
        if log.split[row] == 0:
            return log.split[event] == 0 and earlier
        if within_user and self.history == "streaming":
            return earlier
        return log.split[event] == 0 or (self.history == "streaming" and earlier)

    def mean(self, row: int | None) -> float:
        """For None, what all training events tell."""
        known = self.events(row)
        return clip((sum(self.log.label[known]) + 1) / (len(known) + 2))

    def events(self, row: int | None) -> list[int]:
        return [e for e in self.rows if (self.log.split[e] == 0 if row is None else self.knows(row, e))]

    def item_chance(self, row: int | None, item: int, shrinkage: float) -> float:
        known = [e for e in self.events(row) if self.log.item[e] == item and item >= 0]
        return clip((sum(self.log.label[known]) + shrinkage * self.mean(row)) / (len(known) + shrinkage))

    def bias(self, row: int) -> float:
        log, gap, variance = self.log, 0.0, 0.0
        for event in self.rows:
            if log.user[event] == log.user[row] and self.knows(row, event, within_user=True):
                settled = log.split[row] != 0 and log.split[event] == 0
                chance = self.item_chance(None if settled else event, log.item[event], SHRINKAGE.item)
                gap += log.label[event] - chance
                variance += chance * (1 - chance)
        score = logit(self.item_chance(row, log.item[row], SHRINKAGE.item)) + gap / (variance + SHRINKAGE.user)
        return min(max(score, -logit(0.98)), logit(0.98))

    def scores(self) -> dict[str, list[float]]:
        item = self.log.item
        return {
            "global_mean": [logit(self.mean(r)) for r in self.rows],
            "item_mean": [logit(self.item_chance(r, item[r], SHRINKAGE.item_mean)) for r in self.rows],
            "bias": [self.bias(r) for r in self.rows],
            "popularity": [sum(item[e] == item[r] >= 0 for e in self.events(r)) for r in self.rows],
        }


def test_item_mean_and_popularity_by_hand():
    # One item, four users: like, dislike, like in training; then one validation and two test rows.
    log = make_log(range(6), [0] * 6, [1, 2, 3, 4, 5, 6], [1, 0, 1, 1, 0, 1], [0, 0, 0, 1, 2, 2])
    found = baselines.predict(log, "streaming", shrinkage=SHRINKAGE).scores
    assert found["popularity"].tolist() == [0, 1, 2, 3, 4, 5]
    means = [1 / 2, 2 / 3, 2 / 4, 3 / 5, 4 / 6, 4 / 7]
    assert found["global_mean"] == pytest.approx([logit(mean) for mean in means])
    likes = [0, 1, 1, 2, 3, 3]
    chances = [(likes[k] + 2 * means[k]) / (k + 2) for k in range(6)]
    assert found["item_mean"] == pytest.approx([logit(chance) for chance in chances])
    frozen = baselines.predict(log, "frozen", shrinkage=SHRINKAGE).scores
    assert frozen["popularity"].tolist() == [0, 1, 2, 3, 3, 3]
    assert frozen["item_mean"][3:] == pytest.approx([logit((2 + 2 * 3 / 5) / 5)] * 3)


def test_bias_by_hand():
    # A user who liked two films that nobody else met, asked about a third.
    log = make_log([0, 0, 0], [0, 1, 2], [1, 2, 3], [1, 1, 0], [0, 0, 2])
    found = baselines.predict(log, "streaming", shrinkage=SHRINKAGE).scores["bias"]
    # First like: known chance 1/2. Second: mean (1 + 1) / (1 + 2), one step of 1/2 over 1/4 + 1.5.
    assert found[1] == pytest.approx(logit(2 / 3) + 0.5 / (0.25 + 1.5))
    # The test row knows both items' training totals: (1 + 3 * 3/4) / 4 each.
    chance = (1 + 3 * 3 / 4) / 4
    step = 2 * (1 - chance) / (2 * chance * (1 - chance) + 1.5)
    assert found[2] == pytest.approx(logit(3 / 4) + step)


def test_the_users_part_of_a_held_out_row_streams_whatever_the_split():
    # A test row between two training likes of its user, as in a random fold: the later one is not in its prompt.
    log = make_log([0, 0, 0], [0, 1, 2], [1, 2, 3], [1, 0, 1], [0, 2, 0])
    mean = 3 / 4  # all training events: two likes
    liked = (1 + 3 * mean) / 4  # each film's share of likes after training
    streaming = baselines.predict(log, "streaming", shrinkage=SHRINKAGE).scores
    assert streaming["bias"][1] == pytest.approx(logit(mean) + (1 - liked) / (liked * (1 - liked) + 1.5))
    frozen = baselines.predict(log, "frozen", shrinkage=SHRINKAGE).scores
    assert frozen["bias"][1] == pytest.approx(logit(mean) + 2 * (1 - liked) / (2 * liked * (1 - liked) + 1.5))
    # Items are known by the weights, which have met all training events.
    for name in ("global_mean", "item_mean", "popularity"):
        assert streaming[name].tolist() == frozen[name].tolist()


@given(logs(), st.sampled_from(HISTORIES), st.sampled_from(["isolate", "order"]))
def test_agrees_with_a_loop_over_events(log, history, ties):
    found = baselines.predict(log, history, ties, SHRINKAGE).scores
    expected = Looped(log, history, ties).scores()
    assert found["global_mean"] == pytest.approx(expected["global_mean"])
    for name in set(found) - {"global_mean"}:
        assert found[name] == pytest.approx(expected[name]), name
    assert set(found) == (set(expected) if (log.item >= 0).any() else {"global_mean"})


def flipped(log: Log, rows: np.ndarray) -> Log:
    return replace(log, label=np.where(rows, 1 - log.label, log.label))


def same_scores_at(row: int, log: Log, other: Log, history: baselines.History) -> bool:
    found = baselines.predict(log, history, shrinkage=SHRINKAGE).scores
    changed = baselines.predict(other, history, shrinkage=SHRINKAGE).scores
    return all(math.isclose(found[name][row], changed[name][row], abs_tol=1e-9) for name in found)


@given(logs(), st.sampled_from(HISTORIES), st.data())
def test_a_training_row_knows_no_label_of_its_own_moment_or_later_or_held_out(log, history, data):
    training = np.flatnonzero(log.split == 0)
    if not len(training):
        return
    row = data.draw(st.sampled_from(training.tolist()))
    hidden = (log.timestamp >= log.timestamp[row]) | (log.split != 0)
    assert same_scores_at(row, log, flipped(log, hidden), history)


@given(logs(temporal=True), st.data())
def test_no_streaming_row_knows_a_label_of_its_own_moment_or_later(log, data):
    row = data.draw(st.integers(0, len(log.label) - 1))
    assert same_scores_at(row, log, flipped(log, log.timestamp >= log.timestamp[row]), "streaming")


@given(logs())
def test_frozen_rows_know_no_held_out_label(log):
    found = baselines.predict(log, "frozen", shrinkage=SHRINKAGE).scores
    changed = baselines.predict(flipped(log, log.split != 0), "frozen", shrinkage=SHRINKAGE).scores
    for name in found:
        assert found[name] == pytest.approx(changed[name], abs=1e-9)


def test_rows_do_know_earlier_labels():
    log = random_log(300)
    row = int(np.flatnonzero(log.split == 2)[-1])
    assert not same_scores_at(row, log, flipped(log, log.timestamp < log.timestamp[row]), "streaming")
    earlier_test = (log.split == 2) & (log.timestamp < log.timestamp[row])
    assert not same_scores_at(row, log, flipped(log, earlier_test), "streaming")
    assert same_scores_at(row, log, flipped(log, earlier_test), "frozen")


def test_events_of_one_second_see_each_other_only_in_order():
    log = make_log([0, 0], [0, 1], [7, 7], [1, 0], [0, 0])
    isolated = baselines.predict(log, "streaming", "isolate", SHRINKAGE).scores["bias"]
    ordered = baselines.predict(log, "streaming", "order", SHRINKAGE).scores["bias"]
    assert isolated.tolist() == [0, 0]
    assert ordered == pytest.approx([0, 0.5 / (0.25 + 1.5)])


@pytest.mark.parametrize("history", HISTORIES)
def test_shrinkage_is_the_best_of_the_grid_on_validation_rows(history, monkeypatch):
    monkeypatch.setattr(baselines, "_ITEM_GRID", (1.0, 5.0, 20.0))
    monkeypatch.setattr(baselines, "_USER_GRID", (0.5, 3.0, 20.0))
    log = random_log(2000)
    valid = log.split == 1

    def loss(name: str, shrinkage: Shrinkage) -> float:
        score = baselines.predict(log, history, shrinkage=shrinkage).scores[name][valid]
        return float(np.mean(np.logaddexp(0, score) - score * log.label[valid]))

    chosen = baselines.predict(log, history).shrinkage
    grid = [Shrinkage(i, i, u) for i in (1.0, 5.0, 20.0) for u in (0.5, 3.0, 20.0)]
    assert loss("bias", chosen) == pytest.approx(min(loss("bias", each) for each in grid))
    assert loss("item_mean", chosen) == pytest.approx(min(loss("item_mean", each) for each in grid))
    assert loss("bias", chosen) < loss("item_mean", chosen) < loss("global_mean", chosen)


def test_without_validation_rows_the_default_shrinkage_serves():
    log = random_log(200)
    log = replace(log, split=np.where(log.split == 1, 0, log.split).astype(np.int8))
    assert baselines.predict(log, "streaming").shrinkage == Shrinkage()


def test_a_log_without_items_has_only_the_global_mean():
    log = make_log([0, 1, 2], [-1, -1, -1], [0, 1, 2], [1, 0, 1], [0, 0, 2])
    found = baselines.predict(log, "frozen").scores
    assert {name: score.tolist() for name, score in found.items()} == {
        "global_mean": pytest.approx([0, logit(2 / 3), 0])
    }


@given(logs(first_item=0))
def test_prior_scores_a_frozen_row_as_the_bias_does(log):
    prior = Prior.from_json(baselines.fit_prior(log, SHRINKAGE).to_json())
    bias = baselines.predict(log, "frozen", shrinkage=SHRINKAGE).scores["bias"]
    ids = log.items["item_id"].to_list()
    for row in np.flatnonzero(log.split != 0):
        met = np.flatnonzero((log.user == log.user[row]) & (log.split == 0))
        score = prior.scores([ids[i] for i in log.item[met]], log.label[met], [ids[log.item[row]]])
        assert score == pytest.approx([bias[row]])


def test_prior_of_a_stranger_and_of_an_unknown_item_is_the_mean():
    log = random_log(500)
    prior = baselines.fit_prior(log, SHRINKAGE)
    liked = log.label[log.split == 0]
    assert prior.scores([], [], ["never seen"]) == pytest.approx([logit((liked.sum() + 1) / (len(liked) + 2))])
    assert prior.scores([], [], []).shape == (0,)
    pleased, displeased = (prior.scores(["film 1", "film 2"], [y, y], ["film 3"])[0] for y in (1, 0))
    assert pleased > prior.scores([], [], ["film 3"])[0] > displeased


def test_prior_takes_whole_number_ids_as_they_are():
    log = random_log(100)
    log = replace(log, items=pl.DataFrame({"item_id": range(len(log.items))}))
    prior = Prior.from_json(baselines.fit_prior(log, SHRINKAGE).to_json())
    assert prior.scores([1], [1], [2, 3]).tolist() == prior.scores(["1"], [1], ["2", "3"]).tolist()
    assert prior.items["2"] != 0


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '"mean"',
        '{"mean": 0, "items": {}}',
        '{"mean": NaN, "items": {}, "user_shrinkage": 1}',
        '{"mean": 0, "items": {"a": Infinity}, "user_shrinkage": 1}',
        '{"mean": 0, "items": {"a": "x"}, "user_shrinkage": 1}',
        '{"mean": 0, "items": [], "user_shrinkage": 1}',
        '{"mean": 0, "items": {}, "user_shrinkage": 0}',
        '{"mean": null, "items": {}, "user_shrinkage": 1}',
    ],
)
def test_a_broken_prior_is_refused_in_one_line(text):
    with pytest.raises(ModelError) as error:
        Prior.from_json(text)
    assert "\n" not in str(error.value)


def test_newton_steps_from_certain_chances_come_back() -> None:
    """From a slope of 50 all chances are near 0 or 1: a whole step leads far off, and the next one further."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 0.4, 2000)
    liked = rng.random(2000) < 0.05
    design = np.stack([x, np.ones_like(x)], axis=1)
    slope, level = baselines.logistic(design, liked, np.array([50.0, 0.0]))
    share = liked.mean()
    entropy = -(share * np.log(share) + (1 - share) * np.log(1 - share))
    found = float(np.mean(np.logaddexp(0, np.where(liked, -1, 1) * (slope * x + level))))
    assert found < 1.5 * entropy + 50**2 / 2 / 2000
