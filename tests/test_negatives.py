"""Negatives beside clicks: what may be drawn, how often, and who sees it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from peftrec import config, interactions, negatives, opponents, prepared, retrieval, sources
from peftrec.errors import ConfigError, DataError
from peftrec.sight import evaluation_sight, training_sight
from peftrec.split import TEST, TRAIN, Log, click_of, few, split

EACH, CLICKS = 3, 305


def clicks(people: int = 40, items: int = 30, each: int = 8, seed: int = 1) -> pl.DataFrame:
    """`CLICKS` of some people, at times of their own, on items of which more and more are there."""
    draw = np.random.default_rng(seed)
    rows = []
    for user in range(people):
        start = int(draw.integers(0, 1000))
        late = 5 + (items - 5) * start // 1000  # an item is not there before its time
        chosen = draw.permutation(late)[:each]
        rows += [(user, int(item), start + 10 * place) for place, item in enumerate(chosen)]
    return pl.DataFrame(rows, schema={"user": pl.Int32, "item": pl.Int32, "timestamp": pl.Int64}, orient="row")


def test_what_may_be_drawn() -> None:
    events = clicks()
    found, count = negatives.beside(events, EACH, 13)
    drawn = found.filter(label=0)
    assert drawn.height == count > 0.75 * EACH * events.height
    assert found.filter(label=1).select(events.columns).equals(events)
    met = set(events.select("user", "item").rows())
    first = dict(events.group_by("item").agg(pl.col("timestamp").min()).rows())
    for user, item, time, _ in drawn.rows():
        assert (user, item) not in met
        assert first[item] <= time
    of_moment = drawn.group_by("user", "timestamp").agg(pl.len(), pl.col("item").n_unique().alias("different"))
    assert of_moment["len"].max() == EACH
    assert of_moment["len"].equals(of_moment["different"], check_names=False)
    # Each stands in front of its own click.
    behind = found.with_columns(nxt=pl.col("label").reverse().cum_sum().reverse())
    order = behind.filter(label=0)["nxt"].to_numpy()
    whose = events.height - order  # the click that comes next
    assert (events["timestamp"].to_numpy()[whose] == drawn["timestamp"].to_numpy()).all()
    assert (events["user"].to_numpy()[whose] == drawn["user"].to_numpy()).all()


def test_one_moment_draws_an_item_once() -> None:
    """Three clicks at one time draw the three items that are left, one each, however many they ask for."""
    told = [(9, item, 0) for item in range(6)]
    events = pl.DataFrame(
        [*told, (1, 0, 5), (1, 1, 5), (1, 2, 5)],
        schema={"user": pl.Int32, "item": pl.Int32, "timestamp": pl.Int64},
        orient="row",
    )
    for each in (1, 5):
        drawn = negatives.beside(events, each, 13)[0].filter(label=0, user=1)["item"].sort().to_list()
        assert drawn == [3, 4, 5]


def test_the_seed_draws_and_nothing_else() -> None:
    events = clicks()
    one, _ = negatives.beside(events, EACH, 13)
    assert one.equals(negatives.beside(events, EACH, 13)[0])
    assert not one.equals(negatives.beside(events, EACH, 14)[0])


def test_popular_items_are_drawn_as_often_as_they_were_met() -> None:
    """Item 0 was met three times as often as item 1 before 400 others come, who know neither."""
    told = [(user, 0, user) for user in range(30)] + [(30 + user, 1, 30 + user) for user in range(10)]
    late = [(100 + user, 2, 1000) for user in range(400)]
    events = pl.DataFrame(told + late, schema={"user": pl.Int32, "item": pl.Int32, "timestamp": pl.Int64}, orient="row")
    found, _ = negatives.beside(events, 1, 13)
    drawn = found.filter((pl.col("label") == 0) & (pl.col("user") >= 100))["item"]
    assert drawn.len() == 400
    assert (drawn == 0).mean() == pytest.approx(0.75, abs=0.07)  # 3.2 standard deviations


def test_who_has_met_everything_has_none() -> None:
    events = pl.DataFrame({"user": [0, 0, 1], "item": [0, 1, 0], "timestamp": [1, 2, 3]})
    found, count = negatives.beside(events, 2, 13)
    assert found.rows() == [(0, 0, 1, 1), (0, 1, 2, 1), (1, 1, 3, 0), (1, 0, 3, 1)]
    assert count == 1


def recipe_of(folder: Path, table: pl.DataFrame | None = None, **sections: Any) -> config.Recipe:
    path = folder / "clicks.csv"
    events = clicks() if table is None else table
    events.rename({"user": "user_id", "item": "item_id"}).with_columns(
        title=pl.format("Film {}", "item_id" if "item_id" in events.columns else pl.col("item_id"))
    ).write_csv(path)
    data = {"interactions": str(path), "sampled_negatives": 2, **sections.pop("data", {})}
    known = {"prompt": {"history": "liked"}, "output_dir": "x"}
    return config.parse_recipe({"data": data, **known, **sections}, "x.yaml")


def log_of(recipe: config.Recipe) -> Log:
    return split(interactions.load(recipe.data, recipe.seed), recipe.data.split, recipe.seed)


def test_a_table_of_clicks_alone(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    sources.check(recipe.data)
    source = interactions.load(recipe.data, recipe.seed)
    (warning,) = source.warnings
    drawn = int((source.events["label"] == 0).sum())
    assert warning.endswith(f"clicks.csv: {drawn} negatives drawn beside {CLICKS} clicks (data.sampled_negatives)")
    log = log_of(recipe)
    assert log.met.sum() == CLICKS
    assert np.array_equal(log.met, log.label == 1)
    # Nobody sees what was drawn, and each negative is asked for where its click is.
    for sight in (
        training_sight(log, liked_only=True),
        evaluation_sight(log, log.rows(TEST), streaming=True, liked_only=True),
    ):
        seen = sight.row[sight.visible]
        assert len(seen)
        assert log.met[seen].all()
    assert set(log.timestamp[~log.met]) <= set(log.timestamp[log.met])
    again, kept = prepared.load(recipe.data, recipe.seed)
    assert again.drawn
    assert np.array_equal(kept.met, log.met)


def test_ratings_are_clicks_whatever_they_say_and_labels_of_zero_are_refused(tmp_path: Path) -> None:
    rated = clicks().with_columns(rating=pl.lit(1.0))
    assert log_of(recipe_of(tmp_path, rated)).met.sum() == CLICKS
    labelled = clicks().with_columns(label=pl.Series([0] + [1] * (CLICKS - 1)))
    with pytest.raises(DataError, match=r"1 rows have label 0; expected clicks alone beside data\.sampled_negatives"):
        log_of(recipe_of(tmp_path, labelled))


def test_who_has_clicks_alone_is_told_what_to_do(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    without = dataclasses.replace(recipe.data, sampled_negatives=None)
    with pytest.raises(DataError, match=r"or data\.sampled_negatives if every row is a click"):
        interactions.load(without, 13)
    labelled = recipe_of(tmp_path, clicks().with_columns(label=1))
    without = dataclasses.replace(labelled.data, sampled_negatives=None)
    with pytest.raises(DataError, match=r"expected both 0 and 1: if every row is a click, set data\.sampled_negatives"):
        interactions.load(without, 13)


@pytest.mark.parametrize("order", ["time", "random"])
@pytest.mark.parametrize("kind", ["bias", "mf"])
def test_a_prior_knows_of_a_person_what_it_will_know_later(tmp_path: Path, kind: str, order: str) -> None:
    """A saved prior that is asked with clicks alone says of a frozen row what the run said."""
    folds = {"split": {"kind": "kfold", "folds": 4}}
    ways = {"score": {"prior": kind}, "train": {"order": order}, "eval": {"history": "frozen"}}
    recipe = recipe_of(tmp_path, data=folds, **ways)
    log = log_of(recipe)
    found = opponents.measure(log, recipe)
    assert found.prior is not None
    assert found.saved_prior is not None
    ids = log.items["item_id"].to_list()
    rows = log.rows(TEST)
    known = [retrieval.known_rows(log, row, "frozen") for row in rows]
    assert max(map(len, known)) > 3
    for row, told in zip(rows.tolist(), known, strict=True):
        history = [ids[code] for code in log.item[told]]
        later = found.saved_prior.scores(history, [1] * len(history), [ids[log.item[row]]])
        assert later[0] == pytest.approx(found.prior[row], abs=1e-4)
    # A training row's prior is finite, and drawn rows are no clicks of their person's.
    assert np.isfinite(found.prior).all()


@pytest.mark.parametrize("how", [{"kind": "kfold", "folds": 4}, {"kind": "leave_last_out"}, {"kind": "cold_user"}])
def test_a_click_and_what_is_drawn_beside_it_are_in_one_split(tmp_path: Path, how: dict[str, Any]) -> None:
    log = log_of(recipe_of(tmp_path, data={"split": how}))
    click = click_of(log.label)
    assert (log.met[click] & (log.timestamp[click] == log.timestamp) & (log.user[click] == log.user)).all()
    assert (log.split[click] == log.split).all()
    assert set(log.split) == {0, 1, 2}


def test_few_clicks_come_with_what_is_drawn_beside_them(tmp_path: Path) -> None:
    log = log_of(recipe_of(tmp_path))
    found = few(log, 20, 13)
    learned = found.split == TRAIN
    assert (learned & found.met).sum() == 20
    assert 20 < (learned & ~found.met).sum() <= 40


def test_where_nothing_can_be_drawn(tmp_path: Path) -> None:
    all_met = pl.DataFrame({"user": [0, 0, 1, 1], "item": [0, 1, 0, 1], "timestamp": [1, 2, 3, 4]})
    with pytest.raises(DataError, match=r"no negative could be drawn, .*; leave data\.sampled_negatives out"):
        interactions.load(recipe_of(tmp_path, all_met).data, 13)


def test_ranking_asks_among_what_nobody_showed_the_person(tmp_path: Path) -> None:
    """A drawn item was never met, so it stays a candidate; and it is in no history."""
    log = log_of(recipe_of(tmp_path))
    questions = retrieval.draw(log, 5, None, "streaming", 13)
    drawn = {(int(u), int(i)) for u, i in zip(log.user[~log.met], log.item[~log.met], strict=True)}
    asked = {
        (int(log.user[row]), int(item))
        for row, item in zip(questions.row[questions.question], questions.item, strict=True)
    }
    assert asked & drawn
    for row in questions.row.tolist():
        assert log.met[retrieval.known_rows(log, row, "streaming")].all()
        assert (log.split[retrieval.known_rows(log, row, "frozen")] == TRAIN).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"prompt": {"history": "all"}}, "prompt.history: all; nobody met what is drawn"),
        ({"score": {"prior": "bpmf"}}, "score.prior: bpmf; it counts what is drawn"),
        ({"eval": {"baselines": ["mf", "gbdt", "lstm"]}}, "eval.baselines: gbdt, lstm; it counts what is drawn"),
        ({"side": {"als": True}}, "side.als: true; it counts what is drawn"),
        ({"task": "rating"}, "data.sampled_negatives: does nothing under task: rating"),
        ({"data": {"like_at": 4}}, "data.like_at: does nothing under data.sampled_negatives: 2"),
        (
            {"align": {"kind": "mmd", "target": {"items_where": {"title": ["a"]}}}},
            "align.kind: mmd; it aligns with events",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        recipe_of(tmp_path, **values)
    assert [line for line in str(error.value).splitlines() if line.startswith(f"x.yaml: {expected}")], error.value
