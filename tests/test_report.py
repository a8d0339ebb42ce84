from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from peftrec import config, record, report
from peftrec.errors import ConfigError, DataError
from peftrec.metrics import click_metrics
from peftrec.report import Comparison
from peftrec.split import Log

RECIPE = config.parse_recipe({"data": {"name": "ml-100k"}, "output_dir": "run"}, "test")

KNEW = "A row knows nothing."


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


def compare_four(**changes) -> Comparison:
    scorers = {
        "adapter": np.array([-1.0, 2.0, -3.0, 1.0]),
        "bias": np.array([1.0, 2.0, -2.0, -1.0]),
        "popularity": np.array([3.0, 3.0, 3.0, 3.0]),
    }
    return report.compare(four_rows(), np.arange(4), scorers, knew=KNEW, **changes)


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
    assert found.sizes == {"all": report.Size(rows=4, users=2, positives=2)}
    assert found.warnings == ()


def test_table_by_hand() -> None:
    table = compare_four(bootstrap=0).table()
    assert table.splitlines()[:2] == ["test: 4 rows of 2 users, 50.0% liked.", KNEW]
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
    found = report.compare(log, [2, 3], scores, knew=KNEW, slices=["cold_item", "popularity"], bootstrap=10)
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


def test_one_user_gives_no_interval() -> None:
    found = report.compare(four_rows(), [0, 1], {"adapter": np.array([0.0, 1.0])}, knew=KNEW, bootstrap=10)
    assert found.intervals["adapter"]["test/auc"].point == 1
    assert math.isnan(found.intervals["adapter"]["test/auc"].low)
    assert cells(found.table(), "adapter")[1] == "1.000"
    assert "minus the other" not in found.table()


def test_the_widest_table_fits_the_terminal() -> None:
    log = make_log()
    rows = np.flatnonzero(log.split == 2)
    rng = np.random.default_rng(1)
    names = ["adapter", "adapter_no_prior", "base_model", "item_mean", "bias", "popularity", "global_mean"]
    found = report.compare(
        log,
        rows,
        {name: rng.normal(size=len(rows)) for name in names},
        knew=report.sight(RECIPE),
        slices=["cold_item", "cold_user", "popularity"],
        bootstrap=20,
    )
    lines = found.table().splitlines()
    assert max(map(len, lines)) <= 120
    assert not [line for line in lines if "nan" in line]
    assert cells(found.table(), "base model, untrained")
    assert sum(found.sizes[name].rows for name in ("cold_item", "popular", "mid", "tail")) == len(rows)


def test_markdown_has_the_same_cells() -> None:
    log = make_log()
    rows = np.flatnonzero(log.split == 2)
    scores = np.random.default_rng(1).normal(size=(2, len(rows)))
    found = report.compare(
        log, rows, {"adapter": scores[0], "bias": scores[1]}, knew=KNEW, slices=["cold_item"], bootstrap=20
    )
    page = found.markdown()
    assert page.startswith(f"test: {len(rows)} rows of ")
    for start in ("adapter", "user+item bias", "all", "cold_item"):
        assert f"| {' | '.join(cells(found.table(), start))} |" in page
    for block in page.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.strip().splitlines()}) == 1


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
    log = make_log()
    rows = np.flatnonzero(log.split == 2)
    rng = np.random.default_rng(1)
    model_score = rng.normal(size=len(rows)).astype(np.float32)
    prior, popularity = rng.normal(size=len(rows)), rng.integers(0, 5, len(rows))
    recipe = config.parse_recipe(
        {
            "data": {"name": "ml-100k", "like_at": 4},
            "eval": {"bootstrap": 20, "slices": ["popularity"], "history": "frozen"},
            "output_dir": "runs/x",
        },
        "recipe",
    )
    everything = np.arange(len(log))
    spread = np.zeros((3, len(log)))
    spread[:, rows] = model_score, prior, popularity
    table = record.predictions(
        log, everything, model_score=spread[0], prior=spread[1], baselines={"popularity": spread[2]}
    )
    record.write_predictions(tmp_path, table)
    (tmp_path / "config.yaml").write_text(config.dump_recipe(recipe), encoding="utf-8")
    scorers = {
        "adapter": model_score.astype(np.float64) + prior,
        "adapter_no_prior": model_score,
        "popularity": popularity,
    }
    expected = report.compare(
        log, rows, scorers, knew=report.sight(recipe), slices=["popularity"], bootstrap=20, seed=recipe.seed
    )
    found = report.compare_run(tmp_path)
    assert found == expected
    assert found.table() == expected.table()


def test_a_folder_that_holds_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"predictions.parquet: no such file; expected the output_dir"):
        report.compare_run(tmp_path)
    record.write_predictions(tmp_path, record.predictions(four_rows(), [0, 1], model_score=[0.0, 1.0]))
    with pytest.raises(ConfigError, match=r"config.yaml: no such file"):
        report.compare_run(tmp_path)


def test_no_rows_is_an_error() -> None:
    with pytest.raises(DataError, match="test: no rows were scored"):
        report.compare(four_rows(), [], {"adapter": []}, knew=KNEW)


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
