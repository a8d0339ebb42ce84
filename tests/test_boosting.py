from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from peftrec import baselines, boosting, config, opponents
from peftrec.errors import ConfigError
from peftrec.ranking import auc
from peftrec.split import Log

GENRES = ["Comedy|Drama", "drama, War", "Comedy", "Comedy;War"]


def make_log(user, item, time, label, split, genres=GENRES, years=(1990, 2000, None, 1995)) -> Log:
    """A log from columns that are sorted by user and time."""
    return Log(
        user=np.array(user, dtype=np.int32),
        item=np.array(item, dtype=np.int32),
        timestamp=np.array(time, dtype=np.int64),
        label=np.array(label, dtype=np.int8),
        rating=None,
        split=np.array(split, dtype=np.int8),
        user_ids=pl.Series(range(max(user) + 1)),
        items=pl.DataFrame({"item_id": range(len(genres)), "genres": genres, "year": years}),
    )


def random_log(seed: int, n: int = 30) -> Log:
    """Many shared times, rows without item, splits by time."""
    rng = np.random.default_rng(seed)
    user, time = rng.integers(0, 4, n), rng.integers(0, 12, n)
    order = np.lexsort((time, user))
    split = np.select([time >= 10, time >= 8], [2, 1], 0)[order]
    return make_log(user[order], rng.integers(-1, 4, n), time[order], rng.integers(0, 2, n), split)


def two_kinds(task: str = "click", n: int = 1500) -> Log:
    """Half of the people like films of even number, the others odd ones; the genre says which are which."""
    rng = np.random.default_rng(3)
    user, item = rng.integers(0, 60, n), rng.integers(0, 40, n)
    likes = rng.random(n) < np.where(user % 2 == item % 2, 0.85, 0.25)
    time = rng.permutation(n)
    order = np.lexsort((time, user))
    split = np.select([time >= 0.8 * n, time >= 0.7 * n], [2, 1], 0)
    log = make_log(user[order], item[order], time[order], likes[order], split[order], ["even", "odd"] * 20, [1990] * 40)
    if task == "rating":
        return replace(log, scale=(1.0, 5.0), rating=np.where(log.label == 1, 5, 1).astype(np.float32))
    return log


def test_features_by_hand() -> None:
    # One person likes film 0 at time 1 and dislikes film 1 at time 2; at time 3 both are answered to about film 3.
    log = make_log([0, 0, 0, 1], [0, 1, 3, 0], [1, 2, 3, 3], [1, 0, 1, 0], [0, 0, 2, 2])
    found = {name: value.tolist() for name, value in boosting.features(log, "streaming").items()}
    assert found["mean"] == pytest.approx([1 / 2, 2 / 3, 2 / 4, 2 / 4])
    assert found["item_mean"] == pytest.approx([1 / 2, 2 / 3, 2 / 4, (1 + 5 * 0.5) / 6])
    assert found["item_events"] == [0, 0, 0, 1]
    assert found["item_share"] == [0, 0, 0, 0.5]
    assert found["user_events"] == [0, 1, 2, 0]
    assert found["user_mean"] == pytest.approx([1 / 2, (1 + 5 * 2 / 3) / 6, (1 + 5 * 0.5) / 7, 0.5])
    # The gaps are 1 - 1/2 and 0 - 2/3. Film 3 shares comedy with the first film and war with the second.
    assert found["user_gap"] == pytest.approx([0, 0.5 / 6, (0.5 - 2 / 3) / 7, 0])
    assert found["genre_events"] == [0, 1, 2, 0]
    assert found["genre_gap"] == pytest.approx([0, 0.5 / 6, (0.5 - 2 / 3) / 7, 0])
    assert found["year"] == [1990, 2000, 1995, 1990]
    assert found["year_gap"] == pytest.approx([np.nan, 10, 0, np.nan], nan_ok=True)


@pytest.mark.parametrize("ties", ["isolate", "order"])
def test_no_number_of_a_row_knows_its_own_answer_or_a_later_one(ties: baselines.Ties) -> None:
    log = random_log(1)
    before = np.stack(list(boosting.features(log, "streaming", ties).values()), axis=1)
    moved = 0
    for row in range(len(log)):
        unknown = log.timestamp >= log.timestamp[row]
        if ties == "order":
            unknown &= (log.user != log.user[row]) | (np.arange(len(log)) >= row)
        for change in (unknown, np.arange(len(log)) == row):
            other = replace(log, label=np.where(change, 1 - log.label, log.label))
            after = np.stack(list(boosting.features(other, "streaming", ties).values()), axis=1)
            # Sums are differences of running sums: equal but for rounding.
            assert np.allclose(before[row], after[row], rtol=0, atol=1e-9, equal_nan=True)
            moved += not np.allclose(before, after, rtol=0, atol=1e-3, equal_nan=True)
    assert moved > len(log)  # what must not move the row does move others


def test_frozen_rows_know_the_training_events_alone() -> None:
    log = random_log(2)
    held = log.split != 0
    before = boosting.features(log, "frozen")
    after = boosting.features(replace(log, label=np.where(held, 1 - log.label, log.label)), "frozen")
    assert all(np.allclose(before[name], after[name], rtol=0, atol=1e-9, equal_nan=True) for name in before)
    assert set(before["user_events"][held & (log.user == 0)]) == {((log.user == 0) & ~held).sum()}


def test_kinds_and_years_are_found_in_other_forms() -> None:
    log = make_log([0, 0], [0, 1], [1, 2], [1, 0], [0, 0], ["Thai", "Thai"], [None, None])
    lists = log.items.select("item_id", category=pl.Series([["Thai"], ["Thai", "Soup"]]))
    titles = log.items.select("item_id", title=pl.Series(["Heat (1995)", "Babe (pig)"]))
    assert boosting.features(replace(log, items=lists), "streaming")["genre_events"].tolist() == [0, 1]
    found = boosting.features(replace(log, items=titles), "streaming")
    assert found["year"].tolist() == pytest.approx([1995, np.nan], nan_ok=True)
    assert "genre_events" not in found
    assert "year" not in boosting.features(replace(log, items=lists), "streaming")


@pytest.fixture(scope="module")
def grown() -> Iterator[tuple[Log, boosting.Predictions]]:
    """Fewer trees than are tried otherwise, which take their time."""
    pytest.importorskip("sklearn")
    log = two_kinds()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boosting, "_MOST_TREES", 60)
        patch.setattr(boosting, "_LEAVES_GRID", (4, 8))
        yield log, boosting.predict(log, "streaming")


def test_trees_see_a_taste_that_counts_do_not(grown: tuple[Log, boosting.Predictions]) -> None:
    log, found = grown
    test = log.split == 2
    ours = auc(log.label[test], found.scores[test])
    assert np.isnan(found.scores[log.split == 0]).all()
    assert ours > auc(log.label[test], baselines.predict(log, "streaming").scores["bias"][test]) + 0.1
    assert ours > 0.75


def test_the_scores_are_those_of_the_chosen_number_of_trees(grown: tuple[Log, boosting.Predictions]) -> None:
    ensemble = pytest.importorskip("sklearn.ensemble")
    log, found = grown
    assert found.settings["trees"] < 60
    columns = np.stack(list(boosting.features(log, "streaming").values()), axis=1)
    model = ensemble.HistGradientBoostingClassifier(
        learning_rate=0.05,
        max_iter=found.settings["trees"],
        max_leaf_nodes=found.settings["leaves"],
        early_stopping=False,
        random_state=13,
    ).fit(columns[log.split == 0], log.label[log.split == 0])
    held = log.split != 0
    assert found.scores[held] == pytest.approx(model.decision_function(columns[held]))


def test_ratings_stay_within_the_scale_and_without_validation_rows_there_are_a_hundred_trees() -> None:
    pytest.importorskip("sklearn")
    log = two_kinds("rating", 600)
    log = replace(log, split=np.where(log.split == 1, 0, log.split))
    found = boosting.predict(log, "streaming", task="rating")
    assert found.settings == {"leaves": 8, "trees": 100}
    low, high = found.scores[log.split == 2].min(), found.scores[log.split == 2].max()
    assert 1 <= low < 2.5 < 3.5 < high <= 5


def asked(**keys) -> config.Recipe:
    return config.Recipe(data=config.Data(name="ml-100k"), eval=config.Eval(**keys), output_dir="runs/x")


def test_a_recipe_asks_for_them(grown: tuple[Log, boosting.Predictions]) -> None:
    log, found = grown
    told = opponents.measure(log, asked(baselines=["gbdt"]))
    assert np.array_equal(told.scores["gbdt"], found.scores, equal_nan=True)
    assert told.settings["gbdt"] == found.settings
    no_items = replace(log, item=np.full_like(log.item, -1))
    assert set(opponents.measure(no_items, asked(baselines=["gbdt"])).scores) == {"global_mean"}


def test_without_the_library_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(ConfigError, match=r"^eval\.baselines: gbdt .*pip install 'peftrec\[baselines\]'") as error:
        opponents.check(asked(baselines=["gbdt"]))
    assert "\n" not in str(error.value)
    opponents.check(asked(baselines=["bias"]))
