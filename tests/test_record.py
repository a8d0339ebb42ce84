from __future__ import annotations

import json
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftrec import record
from peftrec.errors import DataError, PeftrecError
from peftrec.interactions import Interactions
from peftrec.record import RunRecord
from peftrec.split import Log


def tiny_log() -> Log:
    """Two users and three items; `heat` is cold, and `eva` has no training event."""
    return Log(
        user=np.array([0, 0, 0, 1, 1], dtype=np.int32),
        item=np.array([0, 1, 2, 0, 2], dtype=np.int32),
        timestamp=np.array([10, 20, 50, 40, 60], dtype=np.int64),
        label=np.array([1, 0, 1, 0, 1], dtype=np.int8),
        rating=np.array([5, 2, 4, 1, 5], dtype=np.float32),
        split=np.array([0, 0, 2, 1, 2], dtype=np.int8),
        user_ids=pl.Series(["adam", "eva"]),
        items=pl.DataFrame({"item_id": ["toys", "gold", "heat"], "title": ["Toys", "Gold", "Heat"]}),
    )


STARS = (1.0, 2.0, 3.0, 4.0, 5.0)


def tiny_ratings() -> Log:
    """The same events as ratings, of which the labels are places in the scale."""
    log = tiny_log()
    assert log.rating is not None
    return replace(log, label=(log.rating - 1).astype(np.int8), scale=STARS)


def tiny_record() -> RunRecord:
    return RunRecord(
        task="click",
        metrics={"test/auc": np.float64(0.75), "test/auc|cold_user": math.nan},
        intervals={"adapter": {"test/auc": [0.5, math.inf]}},
        differences={"bias": {"test/auc": {"difference": 0.1, "low": math.nan, "high": 0.2}}},
        baselines={"bias": {"test/auc": 0.65}},
        slices={"all": {"rows": np.int64(2), "users": 2, "positives": 1}},
        data={"warnings": ("one",), "path": Path("films.csv")},
        prompt={},
        model={"name": "tiny"},
        adapter={"target_modules": {"v_proj", "q_proj"}},
        train={"losses": np.array([0.5, np.nan])},
        eval={},
        seed=13,
    )


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file may grow beyond `room` bytes, which fails as a full disk does: in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_predictions_hold_ids_labels_scores_and_slices() -> None:
    table = record.predictions(
        tiny_log(),
        np.array([2, 3, 4]),
        task="click",
        score=np.array([1.5, -1.0, -1.75]),
        score_no_prior=np.array([0.5, -1.0, 0.25], dtype=np.float32),
        prior=np.array([1.0, 0.0, -2.0]),
        base_score=np.array([0.1, 0.2, 0.3], dtype=np.float32),
        baselines={"item_mean": np.array([7.0, 8.0, 9.0])},
        groups={"age=1 to 9": np.array([True, False])},
    )
    assert table.drop("base_score").to_dict(as_series=False) == {
        "user_id": ["adam", "eva", "eva"],
        "item_id": ["heat", "toys", "heat"],
        "timestamp": [50, 40, 60],
        "label": [1, 0, 1],
        "rating": [4.0, 1.0, 5.0],
        "split": ["test", "valid", "test"],
        "score": [1.5, -1.0, -1.75],
        "prior": [1.0, 0.0, -2.0],
        "score_no_prior": [0.5, -1.0, 0.25],
        "baseline/item_mean": [7.0, 8.0, 9.0],
        "slice/cold_item": [True, False, True],
        "slice/cold_user": [False, True, True],
        "slice/popular": [False, True, False],
        "slice/mid": [False, False, False],
        "slice/tail": [False, False, False],
        "slice/age=1 to 9": [True, False, False],
    }
    assert table["base_score"].to_list() == pytest.approx([0.1, 0.2, 0.3])
    found = record.scorers(table)
    assert list(found) == ["adapter", "adapter_no_prior", "base_model", "item_mean"]
    assert found["adapter_no_prior"].tolist() == [0.5, -1.0, 0.25]
    assert record.answers(table) == {}
    assert list(record.members(table)) == ["cold_item", "cold_user", "popular", "mid", "tail", "age=1 to 9"]


def test_without_an_adapter_the_base_model_is_what_was_scored() -> None:
    table = record.predictions(
        tiny_ratings(), [2], task="rating", score=[3.5], answer=[4.0], score_no_prior=[3.25], prior=[0.25]
    )
    assert list(record.scorers(table, trained=False)) == ["base_model", "base_model_no_prior"]
    assert list(record.answers(table, trained=False)) == ["base_model"]


def test_predictions_of_ratings_hold_no_label() -> None:
    table = record.predictions(
        tiny_ratings(),
        [2, 4],
        task="rating",
        score=[3.5, 4.75],
        answer=np.array([4.0, 5.0]),
        score_no_prior=[3.0, 4.0],
        prior=[3.6, 3.9],
    )
    assert table.drop(
        "user_id", "item_id", "timestamp", "split", *[f"slice/{name}" for name in record.members(table)]
    ).to_dict(as_series=False) == {
        "rating": [4.0, 5.0],
        "score": [3.5, 4.75],
        "answer": [4.0, 5.0],
        "prior": [3.6, 3.9],
        "score_no_prior": [3.0, 4.0],
    }
    assert record.scorers(table)["adapter_no_prior"].tolist() == [3.0, 4.0]
    assert record.answers(table)["adapter"].tolist() == [4.0, 5.0]


def test_without_prior_base_or_baselines_the_adapter_stands_alone() -> None:
    table = record.predictions(tiny_log(), [2], task="click", score=[0.5])
    assert list(record.scorers(table)) == ["adapter"]
    assert not {"prior", "score_no_prior", "base_score", "answer"} & set(table.columns)


def test_prompt_records_have_no_item() -> None:
    log = replace(tiny_log(), item=np.full(5, -1, dtype=np.int32), items=pl.DataFrame(), rating=None)
    table = record.predictions(log, [2, 4], task="click", score=[0.5, 1.0])
    assert table["item_id"].to_list() == [None, None]
    assert "rating" not in table.columns


@given(
    st.lists(
        st.tuples(st.floats(-20, 20, width=32).filter(lambda score: score == 0 or abs(score) > 1e-6), st.floats(-4, 4)),
        min_size=1,
        max_size=5,
    )
)
def test_taking_the_prior_off_a_run_of_format_1_gives_the_models_own_score_exactly(
    pairs: list[tuple[float, float]],
) -> None:
    score, prior = (np.array(column) for column in zip(*pairs, strict=True))
    table = pl.DataFrame({"score": score + prior, "prior": prior})
    found = record.scorers(table)
    if prior.any():
        assert found["adapter_no_prior"].tolist() == score.tolist()
    else:
        assert list(found) == ["adapter"]


def test_predictions_are_read_back_equal(tmp_path: Path) -> None:
    table = record.predictions(tiny_log(), [2, 4], task="click", score=[0.1, 0.7], baselines={"bias": [0.3, 1 / 3]})
    path = record.write_predictions(tmp_path, table)
    assert path == tmp_path / "predictions.parquet"
    assert record.read_predictions(tmp_path).equals(table)
    assert [one.name for one in tmp_path.iterdir()] == ["predictions.parquet"]


def test_predictions_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"predictions.parquet: no such file; expected the output_dir of a finished"):
        record.read_predictions(tmp_path)
    (tmp_path / "predictions.parquet").write_text("user_id,score\n")
    with pytest.raises(DataError, match=r"predictions.parquet: not a Parquet file"):
        record.read_predictions(tmp_path)
    pl.DataFrame({"user_id": [1], "label": [1]}).write_parquet(tmp_path / "predictions.parquet")
    with pytest.raises(DataError, match=r"no column split, score \(found user_id, label\)"):
        record.read_predictions(tmp_path)


def test_what_is_undefined_is_null_in_run_json(tmp_path: Path) -> None:
    path = record.write_record(tmp_path, tiny_record())
    content = json.loads(path.read_text(encoding="utf-8"))
    assert next(iter(content)) == "format"
    assert (content["format"], content["task"]) == (2, "click")
    assert content["metrics"] == {"test/auc": 0.75, "test/auc|cold_user": None}
    assert content["intervals"] == {"adapter": {"test/auc": [0.5, None]}}
    assert content["differences"]["bias"]["test/auc"] == {"difference": 0.1, "low": None, "high": 0.2}
    assert content["slices"] == {"all": {"rows": 2, "users": 2, "positives": 1}}
    assert content["data"] == {"warnings": ["one"], "path": "films.csv"}
    assert content["adapter"] == {"target_modules": ["q_proj", "v_proj"]}
    assert content["train"] == {"losses": [0.5, None]}
    assert content["created"].endswith("+00:00")
    assert content["versions"].keys() >= {"python", "platform", "torch", "transformers", "peft", "accelerate", "polars"}
    assert content["hardware"]["cores"] >= 1


def test_run_json_is_read_back(tmp_path: Path) -> None:
    record.write_record(tmp_path, tiny_record())
    found = record.read_record(tmp_path)
    assert found.metrics == {"test/auc": 0.75, "test/auc|cold_user": None}
    record.write_record(tmp_path, found)
    assert record.read_record(tmp_path) == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "run.json: not JSON"),
        ("[]", "run.json: format None; this version reads format 2"),
        ('{"format": 3}', "run.json: format 3; this version reads format 2"),
        ('{"format": 2}', "run.json: no key task, metrics, intervals"),
        ('{"format": 1}', "run.json: no key metrics, intervals"),
    ],
)
def test_run_json_that_cannot_be_read(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(DataError, match=message):
        record.read_record(tmp_path)


def test_a_run_of_format_1_was_of_clicks(tmp_path: Path) -> None:
    path = record.write_record(tmp_path, tiny_record())
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["task"]
    path.write_text(json.dumps({**content, "format": 1}), encoding="utf-8")
    assert record.read_record(tmp_path).task == "click"


def test_no_run_json(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"run.json: no such file; expected the output_dir of a finished peftrec run"):
        record.read_record(tmp_path)


def tiny_source() -> Interactions:
    log = tiny_log()
    return Interactions(
        events=pl.DataFrame(),
        user_ids=log.user_ids,
        items=log.items,
        name="films",
        sha256="ab",
        warnings=("2 duplicate rows dropped",),
    )


def test_data_facts_of_ratings_count_each_rating() -> None:
    facts = record.data_facts(tiny_source(), tiny_ratings(), "rating")
    assert facts["scale"] == [1, 2, 3, 4, 5]
    splits = facts["splits"]
    assert [splits[name]["mean_rating"] for name in ("train", "valid", "test")] == [3.5, 1, 4.5]
    assert splits["train"]["ratings"] == {"1": 0, "2": 1, "3": 0, "4": 0, "5": 1}
    assert splits["test"]["ratings"] == {"1": 0, "2": 0, "3": 0, "4": 1, "5": 1}
    assert "positives" not in splits["test"]
    halves = replace(tiny_ratings(), scale=(0.5, *STARS), split=np.zeros(5, dtype=np.int8))
    splits = record.data_facts(tiny_source(), halves, "rating")["splits"]
    assert next(iter(splits["train"]["ratings"])) == "0.5"
    assert splits["test"]["mean_rating"] is None


def test_data_facts_count_each_split() -> None:
    facts = record.data_facts(tiny_source(), tiny_log(), "click")
    assert facts == {
        "name": "films",
        "sha256": "ab",
        "rows": 5,
        "users": 2,
        "items": 3,
        "splits": {
            "train": {"rows": 2, "users": 1, "items": 2, "positives": 1, "first": 10, "last": 20},
            "valid": {"rows": 1, "users": 1, "items": 1, "positives": 0, "first": 40, "last": 40},
            "test": {"rows": 2, "users": 2, "items": 1, "positives": 2, "first": 50, "last": 60},
        },
        "warnings": ["2 duplicate rows dropped"],
    }


def test_train_facts_give_rates() -> None:
    facts = record.train_facts(seconds=4.0, events=100, tokens=1000, steps=5, best_step=3, log=[{"loss": 0.5}])
    assert (facts["events_per_second"], facts["tokens_per_second"]) == (25.0, 250.0)
    assert facts["log"] == [{"loss": 0.5}]
    nothing = record.train_facts(seconds=0.0, events=0, tokens=0, steps=0, best_step=None)
    assert nothing["events_per_second"] is None


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_PACKAGES", ("numpy", "no-such-package"))
    assert record.versions()["no-such-package"] is None
    assert record.versions()["numpy"] == np.__version__


def test_hardware_names_the_accelerators() -> None:
    assert record.hardware(["NVIDIA A100"])["accelerators"] == ["NVIDIA A100"]


def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    before = record.write_record(tmp_path, tiny_record()).read_bytes()
    table = pl.DataFrame({"score": np.random.default_rng(0).normal(size=5000)})
    with full_disk(100), pytest.raises(PeftrecError) as failed:
        record.write_record(tmp_path, replace(tiny_record(), seed=14))
    assert str(failed.value).startswith(f"{tmp_path / 'run.json'}: cannot be written (File too large); ")
    with full_disk(1000), pytest.raises(PeftrecError, match=r"predictions.parquet: cannot be written \(.+\); nothing"):
        record.write_predictions(tmp_path, table)
    assert [one.name for one in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PeftrecError, match=r"run.json: cannot be written \(No such file or directory\)"):
        record.write_record(tmp_path / "gone", tiny_record())


def test_a_mistake_of_the_writer_is_not_called_a_full_disk(tmp_path: Path) -> None:
    def write() -> None:
        with record.atomic(tmp_path / "x.txt") as scratch:
            scratch.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert list(tmp_path.iterdir()) == []
