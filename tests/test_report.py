from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest

from peftrec import config, record, report
from peftrec.errors import ConfigError, DataError
from peftrec.metrics import click_metrics
from peftrec.report import Comparison
from peftrec.sources import Task
from peftrec.split import Log

RECIPE = config.parse_recipe({"data": {"name": "ml-100k"}, "output_dir": "run"}, "test")

STARS = (1.0, 2.0, 3.0, 4.0, 5.0)


def asked(**changes: Any) -> config.Recipe:
    """The recipe with another evaluation; unless it says so, without slices."""
    return dataclasses.replace(RECIPE, eval=config.Eval(**{"slices": [], "bootstrap": 0, **changes}))


def compare(log: Log, rows: npt.ArrayLike, scorers: dict[str, npt.ArrayLike], recipe: config.Recipe) -> Comparison:
    """What the recipe's tables say of scorers: the first is the adapter, the others are baselines."""
    score, *_ = scorers.values()
    others = {name: one for name, one in scorers.items() if name != "adapter"}
    table = record.predictions(log, rows, task="click", score=score, baselines=others)
    return report.compare_predictions(table, recipe)


def make_log(n: int = 400, users: int = 20, seed: int = 0) -> Log:
    """Two thirds train, the rest test; items from 8 on are met in the test alone."""
    rng = np.random.default_rng(seed)
    test = np.arange(n) % 3 == 0
    return Log(
        user=np.sort(rng.integers(0, users, n)).astype(np.int32),
        item=np.where(test, rng.integers(0, 12, n), rng.integers(0, 8, n)).astype(np.int32),
        timestamp=np.arange(n, dtype=np.int64),
        label=rng.integers(0, 2, n).astype(np.int8),
        rating=None,
        split=np.where(test, 2, 0).astype(np.int8),
        user_ids=pl.Series([f"user {code:03}" for code in range(users)]),
        items=pl.DataFrame({"item_id": np.arange(12)}),
    )


def make_ratings() -> Log:
    """The same events, rated from one to five."""
    log = make_log()
    label = np.random.default_rng(2).integers(0, 5, len(log)).astype(np.int8)
    return dataclasses.replace(log, label=label, rating=label + np.float32(1), scale=STARS)


def four_rows() -> Log:
    """Two users, each with a liked row and one that is not; all are test rows, so every user and item is cold."""
    return Log(
        user=np.array([0, 0, 1, 1], dtype=np.int32),
        item=np.arange(4, dtype=np.int32),
        timestamp=np.arange(4, dtype=np.int64),
        label=np.array([0, 1, 0, 1], dtype=np.int8),
        rating=None,
        split=np.full(4, 2, dtype=np.int8),
        user_ids=pl.Series([1, 2]),
        items=pl.DataFrame({"item_id": np.arange(4)}),
    )


def compare_four(**changes: Any) -> Comparison:
    scorers = {
        "adapter": np.array([-1.0, 2.0, -3.0, 1.0]),
        "bias": np.array([1.0, 2.0, -2.0, -1.0]),
        "popularity": np.array([3.0, 3.0, 3.0, 3.0]),
    }
    return compare(four_rows(), np.arange(4), scorers, asked(**changes))


def cells(table: str, start: str) -> list[str]:
    """Cells of the first line that begins with `start`; columns are two blanks apart or more."""
    line = next(line for line in table.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_figures_by_hand() -> None:
    found = compare_four(bootstrap=0)
    assert found.ours == "adapter"
    assert found.metrics["adapter"] == pytest.approx(
        {f"test/{key}": value for key, value in click_metrics([0, 1, 0, 1], [-1, 2, -3, 1], [0, 0, 1, 1]).items()}
    )
    # Of the pairs (liked, not liked): 2>1, 2>-2, -1>-2 are in order and -1<1 is not.
    assert found.metrics["bias"]["test/auc"] == 0.75
    assert found.metrics["bias"]["test/uauc"] == 1.0
    assert found.metrics["popularity"] == {"test/auc": 0.5, "test/uauc": 0.5}
    assert found.differences["bias"]["test/auc"].point == 0.25
    assert found.differences["popularity"].keys() == {"test/auc", "test/uauc"}
    assert found.sizes == {"all": report.Size(rows=4, users=2, total=2)}
    assert found.warnings == ()


def test_table_by_hand() -> None:
    table = compare_four(bootstrap=0).table()
    assert table.splitlines()[0] == "test: 4 rows of 2 users, 50.0% liked."
    assert " ".join(table.splitlines()[1:3]) == report.sight(RECIPE)
    assert cells(table, "scorer")[1:] == ["AUC", "uauc", "log loss", "accuracy", "precision", "recall", "F1", "ECE"]
    assert cells(table, "user+item bias")[:3] == ["user+item bias", "0.750", "1.000"]
    assert cells(table, "popularity") == ["popularity", "0.500", "0.500", *"------"]
    after = table.partition("adapter minus the other")[2]
    assert cells(after, "user+item bias") == ["user+item bias", "+0.250", "+0.000"]
    assert "interval" not in table
    assert "slice" not in table


def test_intervals_stand_in_brackets() -> None:
    found = compare_four(bootstrap=50)
    # Each user alone is in order under `adapter`, so every resample is.
    assert cells(found.table(), "adapter")[1:3] == ["1.000 [1.000, 1.000]", "1.000 [1.000, 1.000]"]
    assert "95% interval over 50 resamples of the users" in " ".join(found.table().split())
    low, high = found.differences["bias"]["test/auc"].low, found.differences["bias"]["test/auc"].high
    assert (low, high) == (0.0, 0.25)  # one user twice: 0; both users: 0.25


def test_a_slice_of_one_class_prints_a_dash_and_warns() -> None:
    log = dataclasses.replace(four_rows(), split=np.array([0, 0, 2, 2], dtype=np.int8), item=np.array([0, 1, 2, 0]))
    scores = {"adapter": np.array([0.5, 1.0]), "bias": np.array([1.0, 2.0])}
    found = compare(log, [2, 3], scores, asked(slices=["cold_item", "popularity"], bootstrap=10))
    assert list(found.sizes) == ["all", "cold_item", "popular", "mid", "tail"]
    assert math.isnan(found.metrics["adapter"]["test/auc|cold_item"])
    assert found.warnings == (
        "test, slice cold_item: all 1 rows have label 0; AUC is not defined there",
        "test, slice popular: all 1 rows have label 1; AUC is not defined there",
    )
    slices = found.table().partition("AUC by slice")[2]
    assert cells(slices, "all") == ["all", "2", "1", "50.0%", "1.000", "1.000"]
    assert cells(slices, "cold_item") == ["cold_item", "1", "1", "0.0%", "-", "-"]
    assert cells(slices, "tail") == ["tail", "0", "0", "-", "-", "-"]
    assert "test/auc|tail" not in found.metrics["adapter"]
    assert "warning: test, slice cold_item" in found.table()


def test_user_groups() -> None:
    """Users 0 to 9 are women, 10 to 19 men, four of each old; a column that was not asked for stays out."""
    log = make_log()
    rows = np.flatnonzero(log.split == 2)
    score = np.random.default_rng(3).normal(size=len(rows))
    users = np.arange(20)
    groups = {
        "gender=woman": users < 10,
        "gender=man": users >= 10,
        "age=60 to 70": users % 5 == 0,
        "job=cook": users > 3,
    }
    table = record.predictions(log, rows, task="click", score=score, groups=groups)
    found = report.compare_predictions(table, asked(user_groups=["gender", "age"], bootstrap=20))
    assert list(found.sizes) == ["all", "gender=woman", "gender=man"]
    women = log.user[rows] < 10
    size = found.sizes["gender=woman"]
    assert (size.rows, size.users) == (int(women.sum()), 10)
    expected = click_metrics(log.label[rows][women], score[women], log.user[rows][women])["auc"]
    assert found.metrics["adapter"]["test/auc|gender=woman"] == pytest.approx(expected)
    assert found.warnings == ("test: fewer than 5 users in age=60 to 70; not reported apart",)
    assert cells(found.table().partition("AUC by slice")[2], "gender=man")[2] == "10"


def test_one_user_gives_no_interval() -> None:
    found = compare(four_rows(), [0, 1], {"adapter": np.array([0.0, 1.0])}, asked(bootstrap=10))
    assert found.intervals["adapter"]["test/auc"].point == 1
    assert math.isnan(found.intervals["adapter"]["test/auc"].low)
    assert cells(found.table(), "adapter")[1] == "1.000"
    assert "minus the other" not in found.table()


def everything(log: Log, task: Task) -> tuple[pl.DataFrame, config.Recipe]:
    """A predictions table with every scorer there is, and a recipe that asks for every slice."""
    rows = np.flatnonzero(log.split == 2)
    rng = np.random.default_rng(1)
    names = ["item_mean", "bias", "popularity", "global_mean"]
    names += ["user_mean", "mf", "item_knn", "svd", "svdpp", "gbdt"] if task == "rating" else []
    drawn = rng.normal(3, 1, (4 + len(names), len(rows)))
    table = record.predictions(
        log,
        rows,
        task=task,
        score=drawn[0],
        answer=rng.integers(1, 6, len(rows)) if task == "rating" else None,
        score_no_prior=drawn[1],
        prior=drawn[2],
        base_score=drawn[3],
        baselines=dict(zip(names, drawn[4:], strict=True)),
    )
    slices = ["cold_item", "cold_user", "popularity"]
    return table, dataclasses.replace(asked(bootstrap=20, slices=slices), task=task)


@pytest.mark.parametrize("task", ["click", "rating"])
def test_the_widest_table_fits_the_terminal(task: Task) -> None:
    log = make_log() if task == "click" else make_ratings()
    table, recipe = everything(log, task)
    found = report.compare_predictions(table, recipe, scale=log.scale)
    lines = found.table().splitlines()
    assert max(map(len, lines)) <= 120
    assert not [line for line in lines if "nan" in line]
    assert cells(found.table(), "base model, untrained")
    assert sum(found.sizes[name].rows for name in ("cold_item", "popular", "mid", "tail")) == len(table)


@pytest.mark.parametrize("task", ["click", "rating"])
def test_markdown_has_the_same_cells(task: Task) -> None:
    log = make_log() if task == "click" else make_ratings()
    table, recipe = everything(log, task)
    found = report.compare_predictions(table, recipe, scale=log.scale)
    page = found.markdown()
    assert page.startswith(f"test: {len(table)} rows of ")
    for start in ("adapter", "user+item bias", "slice", "all", "cold_item"):
        assert f"| {' | '.join(cells(found.table(), start))} |" in page
    for block in page.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.strip().splitlines()}) == 1
    assert page.startswith(found.markdown(short=True).rstrip())
    assert found.markdown(short=True).count("\n\n") == 2  # headline, scorers, legend


def test_facts_fill_a_run_record() -> None:
    found = compare_four(bootstrap=50, slices=["cold_user"])
    facts = found.facts()
    assert facts["metrics"]["test/auc"] == 1.0
    assert facts["metrics"]["test/auc|cold_user"] == 1.0
    assert list(facts["baselines"]) == ["bias", "popularity"]
    assert facts["intervals"]["adapter"]["test/auc"] == [1.0, 1.0]
    assert facts["differences"]["bias"]["test/auc"] == {"difference": 0.25, "low": 0.0, "high": 0.25}
    assert facts["slices"]["cold_user"] == {"rows": 4, "users": 2, "positives": 2}
    names = {one.name for one in dataclasses.fields(record.RunRecord)}
    assert facts.keys() <= names


def test_a_run_folder_gives_the_same_comparison_again(tmp_path: Path) -> None:
    table, recipe = everything(make_log(), "click")
    record.write_predictions(tmp_path, table)
    (tmp_path / "config.yaml").write_text(config.dump_recipe(recipe), encoding="utf-8")
    expected = report.compare_predictions(table, recipe)
    found = report.compare_run(tmp_path)
    assert found == expected
    assert found.table() == expected.table()
    fewer = report.compare_run(tmp_path, bootstrap=0)
    assert fewer.metrics == expected.metrics
    assert fewer.resamples == 0
    with pytest.raises(DataError, match="valid: no rows were scored"):
        report.compare_run(tmp_path, "valid")


def test_a_run_of_ratings_reads_its_scale_from_its_record(tmp_path: Path) -> None:
    log = make_ratings()
    table, recipe = everything(log, "rating")
    record.write_predictions(tmp_path, table)
    (tmp_path / "config.yaml").write_text(config.dump_recipe(recipe), encoding="utf-8")
    with pytest.raises(DataError, match=r"run.json: no such file"):
        report.compare_run(tmp_path)
    expected = report.compare_predictions(table, recipe, scale=log.scale)
    sections: dict[str, Any] = {name: {} for name in ("prompt", "model", "adapter", "train", "eval")}
    written = record.RunRecord(
        **expected.facts(), **sections, data={"scale": log.scale}, warnings=expected.warnings, seed=recipe.seed
    )
    record.write_record(tmp_path, written)
    assert report.compare_run(tmp_path) == expected
    assert record.read_record(tmp_path).task == "rating"


@pytest.mark.parametrize("task", ["click", "rating"])
def test_a_record_holds_the_comparison(task: Task, tmp_path: Path) -> None:
    """Figures that are not defined included: JSON has no NaN."""
    log = make_log() if task == "click" else make_ratings()
    table, recipe = everything(log, task)
    expected = report.compare_predictions(table, recipe, scale=log.scale)
    sections: dict[str, Any] = {name: {} for name in ("prompt", "model", "adapter", "train", "eval")}
    data = {"warnings": ["of the data"]}
    written = record.RunRecord(
        **expected.facts(), **sections, data=data, warnings=["of the data", *expected.warnings], seed=recipe.seed
    )
    record.write_record(tmp_path, written)
    found = report.compare_record(record.read_record(tmp_path), recipe)
    assert found.markdown() == expected.markdown()
    assert (found.warnings, list(found.intervals)) == (expected.warnings, list(expected.intervals))
    assert str(found.differences) == str(expected.differences)  # nan is not equal to itself


def rated_rows() -> tuple[pl.DataFrame, config.Recipe]:
    """The five rows that tests/test_metrics.py measures by hand: a rated three films differently, b two alike."""
    log = dataclasses.replace(
        four_rows(),
        user=np.array([0, 0, 0, 1, 1], dtype=np.int32),
        item=np.arange(5, dtype=np.int32),
        timestamp=np.arange(5, dtype=np.int64),
        label=np.array([4, 2, 0, 3, 3], dtype=np.int8),
        rating=np.array([5, 3, 1, 4, 4], dtype=np.float32),
        split=np.full(5, 2, dtype=np.int8),
        items=pl.DataFrame({"item_id": np.arange(5)}),
        scale=STARS,
    )
    table = record.predictions(
        log,
        np.arange(5),
        task="rating",
        score=[4.5, 4.5, 2.0, 3.3, 5.0],
        answer=[5.0, 3.0, 1.0, 3.0, 4.0],
        score_no_prior=[4.0, 3.0, 2.0, 4.0, 4.0],
        prior=[3.0, 3.0, 3.0, 3.0, 3.0],
        baselines={"popularity": [3, 2, 1, 9, 8], "global_mean": [3.0] * 5},
    )
    return table, dataclasses.replace(asked(), task="rating")


def test_ratings_by_hand() -> None:
    table, recipe = rated_rows()
    found = report.compare_predictions(table, recipe, scale=STARS)
    second = 1 / np.log2(3)
    assert found.metrics["adapter"] == pytest.approx(
        {
            "test/rmse": np.sqrt(4.99 / 5),
            "test/mae": 0.94,
            "test/exact": 0.8,
            "test/uauc": 2.5 / 3,
            "test/ndcg@10": (3 + 3 * second) / (4 + 2 * second),
            "test/ece": 0.74,
        }
    )
    # The others name no answer: the rating nearest to the score is theirs.
    assert found.metrics["adapter_no_prior"]["test/exact"] == 3 / 5
    assert found.metrics["popularity"] == {"test/uauc": 1.0, "test/ndcg@10": 1.0}
    assert found.differences["adapter_no_prior"]["test/mae"].point == pytest.approx(0.94 - 2 / 5)
    assert found.sizes["all"] == report.Size(rows=5, users=2, total=17)
    facts = found.facts()
    assert (facts["task"], facts["slices"]) == ("rating", {"all": {"rows": 5, "users": 2, "mean_rating": 3.4}})


def test_the_table_of_ratings_by_hand() -> None:
    table, recipe = rated_rows()
    shown = report.compare_predictions(table, recipe, scale=STARS).table()
    assert shown.splitlines()[0] == "test: 5 rows of 2 users, mean rating 3.40."
    assert cells(shown, "scorer")[1:] == ["RMSE", "MAE", "exact", "uauc", "NDCG@10", "ECE"]
    assert cells(shown, "adapter") == ["adapter", "0.999", "0.940", "0.800", "0.833", "0.930", "0.740"]
    assert cells(shown, "popularity") == ["popularity", "-", "-", "-", "1.000", "1.000", "-"]
    assert "adapter minus the other, on the same rows (RMSE, MAE: negative where the adapter is better)" in shown
    after = shown.partition("minus the other")[2]
    assert cells(after, "other scorer") == ["other scorer", "RMSE", "MAE", "uauc"]
    assert cells(after, "adapter, no prior") == ["adapter, no prior", "+0.367", "+0.540", "-0.167"]
    assert "warning" not in shown


def test_slices_of_ratings_show_the_error_of_those_who_predict_one() -> None:
    table, recipe = rated_rows()
    recipe = dataclasses.replace(recipe, eval=dataclasses.replace(recipe.eval, slices=["cold_user", "popularity"]))
    found = report.compare_predictions(table, recipe, scale=STARS)
    shown = found.table().partition("RMSE by slice (lower is better)")[2]
    assert cells(shown, "slice") == ["slice", "rows", "users", "mean", "adapter", "no prior"]
    assert cells(shown, "cold_user") == ["cold_user", "5", "2", "3.40", "0.999", "0.632"]
    assert cells(shown, "tail") == ["tail", "0", "0", "-", "-", "-"]
    assert found.facts()["slices"]["tail"] == {"rows": 0, "users": 0, "mean_rating": None}


def test_ratings_that_nobody_varied_warn() -> None:
    table, recipe = rated_rows()
    found = report.compare_predictions(table.filter(pl.col("rating") == 4), recipe, scale=STARS)
    assert found.warnings == (
        "test: nobody rated two of the 2 rows differently; uauc and NDCG@10 are not defined there",
    )
    assert cells(found.table(), "adapter")[4:6] == ["-", "-"]


def test_predictions_of_another_task_are_refused() -> None:
    table, recipe = rated_rows()
    with pytest.raises(DataError, match=r"predictions: no column label .* expected it under task: click"):
        report.compare_predictions(table, dataclasses.replace(recipe, task="click"))


def test_a_folder_that_holds_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"predictions.parquet: no such file; expected the output_dir"):
        report.compare_run(tmp_path)
    record.write_predictions(tmp_path, record.predictions(four_rows(), [0, 1], task="click", score=[0.0, 1.0]))
    with pytest.raises(ConfigError, match=r"config.yaml: no such file"):
        report.compare_run(tmp_path)


def test_no_rows_is_an_error() -> None:
    with pytest.raises(DataError, match="test: no rows were scored"):
        compare(four_rows(), [], {"adapter": []}, RECIPE)


@pytest.mark.parametrize(("history", "word"), [("streaming", "of all splits"), ("frozen", "training events")])
@pytest.mark.parametrize(("ties", "words"), [("isolate", "do not see each other"), ("order", "above them")])
def test_sight_says_history_and_ties(history: str, word: str, ties: str, words: str) -> None:
    recipe = dataclasses.replace(RECIPE, eval=config.Eval(history=history, ties=ties))
    assert report.sight(recipe).endswith("the baselines know the same.")
    liked = dataclasses.replace(recipe, prompt=config.Prompt(history="liked"))
    assert report.sight(liked).endswith("the baselines also count what was not.")
    sentence = report.sight(recipe)
    assert word in sentence
    assert words in sentence
    assert f"({history} history)" in sentence
