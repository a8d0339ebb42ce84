"""A recipe's data and windows from files: bit for bit what they are without, and made again when anything changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from peftrec import config, encode, interactions, prepared, split
from peftrec.errors import DataError

PROMPT = config.Prompt(max_tokens=128, overlap=40)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEFTREC_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PEFTREC_PREPARED", "1")
    return tmp_path / "home" / "prepared"


@pytest.fixture
def data(tmp_path: Path) -> config.Data:
    """Sixty events of six people on eight items, with what is told of the people."""
    draw = np.random.default_rng(3)
    events = pl.DataFrame(
        {
            "user_id": [f"u{i % 6}" for i in range(60)],
            "item_id": draw.integers(0, 8, 60),
            "rating": draw.integers(1, 6, 60),
            "timestamp": draw.integers(0, 40, 60),
        }
    ).unique(["user_id", "item_id"], maintain_order=True)
    events.write_csv(tmp_path / "events.csv")
    titles = [f"{name} ({year})" for name in ("Heat", "Toy Story", "Film 12", "Up") for year in (1972, 1995)]
    pl.DataFrame({"item_id": range(8), "title": titles}).write_parquet(tmp_path / "films.parquet")
    pl.DataFrame({"user_id": [f"u{i}" for i in range(5)], "age": [30, 40, 50, None, 70]}).write_csv(
        tmp_path / "users.csv"
    )
    paths = {name: str(tmp_path / file) for name, file in (("interactions", "events.csv"), ("items", "films.parquet"))}
    return config.Data(**paths, users=str(tmp_path / "users.csv"), like_at=4)


def entries(home: Path) -> dict[str, float]:
    return {path.name: path.stat().st_ino for path in home.iterdir() if path.is_dir()}


def of(log: split.Log) -> dict[str, Any]:
    found = {field.name: getattr(log, field.name) for field in dataclasses.fields(log) if field.name != "key"}
    return {
        name: (value.dtype, value.tobytes())
        if isinstance(value, np.ndarray)
        else (value.to_dict(as_series=False), value.schema)
        if isinstance(value, pl.DataFrame)
        else value.to_list()
        if isinstance(value, pl.Series)
        else value
        for name, value in found.items()
    }


def rows_of(data: Any) -> list[dict[str, bytes]]:
    return [{key: value.tobytes() for key, value in data[i].items()} for i in range(len(data))]


@pytest.mark.parametrize("task", ["click", "rating"])
def test_the_same_log_with_and_without(
    home: Path, data: config.Data, monkeypatch: pytest.MonkeyPatch, task: Any
) -> None:
    used = {"age": "prompt.user"}
    source = interactions.load(data, 13, task, with_users=used)
    expected = of(split.split(source, data.split, 13))
    for _ in range(2):
        found, log = prepared.load(data, 13, task, with_users=used)
        assert of(log) == expected
        assert found.warnings
        for name in ("name", "sha256", "warnings", "scale", "like_at"):
            assert getattr(found, name) == getattr(source, name)
        assert log.key is not None
    assert len(entries(home)) == 1
    monkeypatch.setenv("PEFTREC_PREPARED", "off")
    _, log = prepared.load(data, 13, task, with_users=used)
    assert of(log) == expected
    assert log.key is None


def test_any_change_misses(home: Path, data: config.Data, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared.load(data, 13)
    keys = set(entries(home))
    later = dataclasses.replace(data, split=dataclasses.replace(data.split, test=0.2))
    for changed in (dataclasses.replace(data, like_at=3), later):
        prepared.load(changed, 13)
        assert len(keys) < len(keys := keys | set(entries(home)))
    prepared.load(data, 14)
    assert len(keys) < len(keys := keys | set(entries(home)))
    films = pl.read_parquet(str(data.items))
    films.with_columns(title=films["title"] + "!").write_parquet(str(data.items))
    _, log = prepared.load(data, 13)
    assert log.items["title"][0] == "Heat (1972)!"
    assert len(keys) < len(keys := keys | set(entries(home)))
    monkeypatch.setattr(prepared, "code", lambda: {"timeline.py": "another"})
    prepared.load(data, 13)
    assert len(keys) < len(keys | set(entries(home)))


def test_the_code_that_counts_is_there() -> None:
    found = prepared.code()
    assert {f"{name}.py" for name in prepared.MODULES if "*" not in name} < set(found)
    assert "datasets/ml_100k.py" in found


def test_bad_data_is_refused_each_time(home: Path, data: config.Data) -> None:
    Path(str(data.items)).unlink()
    for _ in range(2):
        with pytest.raises(DataError, match="no such file"):
            prepared.load(data, 13)


@pytest.mark.parametrize(
    "change",
    [{}, {"layout": "pointwise"}, {"layout": "pointwise", "template": "{user}{history}{item}:", "user": "{age}"}],
    ids=["timeline", "pointwise", "template"],
)
def test_the_same_windows_with_and_without(
    home: Path, data: config.Data, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    prompt = dataclasses.replace(PROMPT, **change)
    users = {"age": "prompt.user"} if "user" in change else None

    def read() -> list[list[dict[str, bytes]]]:
        _, log = prepared.load(data, 13, with_users=users)
        encoder = encode.Encoder(log, prompt, tokenizer, "isolate")
        prior = np.linspace(-1, 1, len(log)).astype(np.float32)
        test = np.flatnonzero(log.split == split.TEST)
        made = [
            encoder.train(prior),
            encoder.evaluate(test, "streaming", None),
            encoder.evaluate(test, "frozen", prior),
        ]
        return [rows_of(one) for one in made]

    kept_first = read()
    before = entries(home)
    assert sorted(name.split("-")[0] for name in before) == ["items", "log", "windows", "windows", "windows"]

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("made again")

    with monkeypatch.context() as patch:
        for module, name in ((interactions, "load"), (split, "split"), (encode, "training_sight")):
            patch.setattr(module, name, refuse)
        assert read() == kept_first
    assert entries(home) == before
    monkeypatch.setenv("PEFTREC_PREPARED", "off")
    assert read() == kept_first
    assert entries(home) == before


def test_another_prompt_or_tokenizer_misses(
    home: Path, data: config.Data, tokenizer: Any, word_start_tokenizer: Any
) -> None:
    _, log = prepared.load(data, 13)

    def windows() -> set[str]:
        return {name for name in entries(home) if name.startswith("windows")}

    for number, (prompt, used, settings) in enumerate(
        (
            (PROMPT, tokenizer, {}),
            (dataclasses.replace(PROMPT, overlap=41), tokenizer, {}),
            (PROMPT, word_start_tokenizer, {}),
            (PROMPT, tokenizer, {"shuffle": 1}),
        ),
        1,
    ):
        encode.Encoder(log, prompt, used, "isolate", **settings).train(None)  # type: ignore[arg-type]
        assert len(windows()) == number
    encoder = encode.Encoder(log, PROMPT, tokenizer, "isolate")
    for rows in (np.array([0, 1]), np.array([0, 2])):
        encoder.evaluate(rows, "streaming", None)
    assert len(windows()) == 6


def test_a_log_that_nobody_named_is_not_kept(home: Path, make_log: Callable[..., Any], tokenizer: Any) -> None:
    log = make_log([0, 0, 1], [1, 2, 1], [1, 0, 1])
    encode.Encoder(log, PROMPT, tokenizer, "isolate").train(None)
    assert not home.exists()
