"""Domains by items, few training events, and what is measured on them: hand-made tables and figures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from conftest import build_log, random_log

from peftrec import config, few_shot, interactions, sources, split
from peftrec.baselines import Shrinkage, fit_prior
from peftrec.bootstrap import bootstrap, over_seeds
from peftrec.errors import DataError

GENRES = {1: "Drama", 2: "Drama, War", 3: "Comedy|Drama", 4: "Comedy", 5: None, 6: "War|Comedy", 7: "Comedy, Musical"}


def load(folder: Path, where: dict[str, list[str]], *, check: bool = True) -> interactions.Interactions:
    events = {
        "user_id": [1, 1, 2, 2, 2, 3, 3, 3],
        "item_id": [1, 2, 3, 4, 1, 5, 6, 7],
        "label": [0, 1, 0, 1, 0, 0, 1, 0],
    }
    pl.DataFrame(events).write_csv(folder / "events.csv")
    items = {"item_id": [*GENRES], "title": [f"Film {k}" for k in GENRES], "genres": [*GENRES.values()]}
    pl.DataFrame(items).write_csv(folder / "items.csv")
    data = config.Data(
        interactions=str(folder / "events.csv"),
        items=str(folder / "items.csv"),
        items_where=where,
        split=config.Split(kind="kfold"),
    )
    if check:
        sources.check(data)
    return interactions.load(data, 13)


def test_an_item_belongs_where_all_of_its_genres_are(tmp_path: Path) -> None:
    found = load(tmp_path, {"genres": ["Drama", "War"]})
    assert found.items["item_id"].to_list() == [1, 2]
    assert found.user_ids.to_list() == [1, 2], "the third person has no event there"
    assert found.events.select("user", "item", "label").rows() == [(0, 0, 0), (0, 1, 1), (1, 0, 0)]


def test_lists_without_a_common_value_have_no_common_item(tmp_path: Path) -> None:
    found = load(tmp_path, {"genres": ["Comedy", "Musical"]})
    assert found.items["item_id"].to_list() == [4, 7]
    assert load(tmp_path, {"genres": ["Comedy", "Musical"], "title": ["Film 4", "Film 7"]}).sha256 == found.sha256
    assert found.sha256 != load(tmp_path, {}).sha256


@pytest.mark.parametrize("check", [True, False])
def test_a_column_that_is_not_there(check: bool, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.items_where: no column 'genre' in .* \(.*\); did you mean genres\?"):
        load(tmp_path, {"genre": ["Drama"]}, check=check)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["Drama", "Comdey"], "genres: no item is 'Comdey'; found Comedy, Drama, Musical, War; did you mean Comedy?"),
        (["Musical"], "no event of .* is on an item that has all of it; name more values"),
    ],
)
def test_values_that_leave_nothing(values: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.items_where.*" + message.replace("?", r"\?")):
        load(tmp_path, {"genres": values})


# Few training events


def test_few_are_the_first_events_of_several_people() -> None:
    """Twelve of six people with eight events each: three of each of four people, in order of time."""
    log = build_log(
        user=np.repeat(np.arange(6), 10).tolist(),
        time=[*range(10)] * 6,
        label=[0, 1] * 30,
        split=([0] * 8 + [1, 2]) * 6,
    )
    few = split.few(dataclasses.replace(log, key="kept"), 12, seed=1)
    assert few.key is None, "what was kept of the whole log is not this one's"
    train = few.split == split.TRAIN
    people, counts = np.unique(few.user[train], return_counts=True)
    assert counts.tolist() == [3] * 4
    assert few.timestamp[train].reshape(4, 3).tolist() == [[0, 1, 2]] * 4
    for name in ("user", "item", "timestamp", "label"):
        held = getattr(few, name)[~train]
        assert held.tolist() == getattr(log, name)[log.split != split.TRAIN].tolist(), "nothing else has changed"
    others = {tuple(np.unique((one := split.few(log, 12, seed)).user[one.split == 0]).tolist()) for seed in range(9)}
    assert len(others | {tuple(people.tolist())}) > 3
    # Where six people have given three each, four of them give the next.
    assert (
        sorted(np.unique(split.few(log, 20, 1).user[split.few(log, 20, 1).split == 0], return_counts=True)[1])
        == [5] * 4
    )
    assert len(split.few(log, 48, 1)) == len(log)


def test_too_few_and_of_one_kind() -> None:
    log = build_log([0, 0, 0, 1, 1, 1], [0, 1, 2] * 2, [1, 1, 0, 1, 1, 0], split=[0, 0, 2] * 2)
    with pytest.raises(DataError, match=r"data.train_events: 5; the data has 4 training events; lower it"):
        split.few(log, 5, 13)
    with pytest.raises(DataError, match="the 2 events drawn by seed 13 all have one label; raise it, or change seed"):
        split.few(log, 2, 13)


# What is tested, and what counting makes of few


def test_the_same_events_are_tested_whatever_was_learned_from() -> None:
    log = random_log(3, users=9, events=40, moments=40)
    rows = few_shot.tested_rows(log, 20, 3, seed=13)
    assert (log.split[rows] == split.TEST).all()
    users, counts = np.unique(log.user[rows], return_counts=True)
    assert counts.max() == 3
    assert len(users) > 4
    first = np.flatnonzero((log.split == split.TEST) & (log.user == users[0]))[:3]
    assert rows[:3].tolist() == first.tolist()
    for k in (8, 50):
        few = split.few(log, k, seed=k)
        again = few_shot.tested_rows(few, 20, 3, seed=13)
        for name in ("user", "item", "timestamp", "label"):
            assert getattr(few, name)[again].tolist() == getattr(log, name)[rows].tolist()


def test_counting_knows_the_samples_and_the_persons_own_past() -> None:
    """Two samples like item 0 and not item 1; a new person disliked item 2 before the row in question, or since."""
    log = build_log(
        user=[0, 0, 1, 1, 1, 1],
        time=[0, 1, 5, 6, 6, 7],
        label=[1, 0, 0, 1, 0, 0],
        item=[0, 1, 2, 0, 1, 0],
        split=[0, 0, 1, 2, 2, 2],
    )
    liked, disliked, later = few_shot.tested_rows(log, 9, 9, seed=1).tolist()
    found = few_shot.counted(log, np.array([liked, disliked, later]), seed=1)
    prior = fit_prior(log, Shrinkage())
    assert found["global_mean"].tolist() == [prior.mean] * 3
    assert prior.mean == pytest.approx(0), "one like and one dislike"
    assert found["item_mean"] == pytest.approx([effect := found["item_mean"][0], -effect, effect])
    assert effect > 0
    assert found["bias"][:2] == pytest.approx(prior.scores(["i2"], [0], ["i0", "i1"]))
    assert found["bias"][2] == pytest.approx(prior.scores(["i2", "i0", "i1"], [0, 1, 0], ["i0"])[0])
    assert np.isfinite(found["mf"]).all()


def test_coverage_counts_what_is_among_somebodys_best() -> None:
    item, user = np.array([0, 1, 2, 3, 0, 1]), np.array([0, 0, 0, 0, 1, 1])
    assert few_shot.coverage(item, user, np.array([4, 3, 2, 1, 0, 0.0])) == 3 / 4
    assert few_shot.coverage(item, user, np.array([0, 3, 2, 1, 0, 0.0])) == 1


# Means over seeds


def test_figures_over_seeds_are_means_of_the_seeds() -> None:
    rng = np.random.default_rng(4)
    user, label = np.repeat(np.arange(12), 8), rng.integers(0, 2, 96)
    scores = {"a": [label + rng.normal(size=96) for _ in range(3)], "b": [rng.normal(size=96)]}
    figures, differences = over_seeds(label, scores, user, [("a", "b")], n=200, seed=5)
    each = [bootstrap(label, {"x": one}, user, n=0).intervals["x"] for one in scores["a"]]
    for key, found in figures["a"].items():
        assert found.point == pytest.approx(np.mean([one[key].point for one in each]))
    # One seed each is the plain paired bootstrap.
    _, plain = over_seeds(label, {"a": scores["a"][:1], "b": scores["b"]}, user, [("a", "b")], n=200, seed=5)
    expected = bootstrap(label, {"a": scores["a"][0], "b": scores["b"][0]}, user, n=200, seed=5).differences["b"]
    assert plain["a", "b"] == expected
    auc = differences["a", "b"]["auc"]
    assert auc.low < auc.point < auc.high
    assert auc.low > 0
