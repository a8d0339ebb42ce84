"""What is kept in files: the same bits, made again where anything differs, and never seen half-written."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from peftrec import kept
from peftrec.errors import ConfigError

ARRAYS = {
    "numbers": np.array([[1, -2], [3, 2**60]]),
    "floats": np.array([0.1, np.nan, -np.inf], dtype=np.float32),
    "flags": np.array([True, False]),
    "nothing": np.zeros(0, dtype=np.int8),
}
FRAMES = {"films": pl.DataFrame({"id": [1, 2], "title": ["Heat", None], "genres": [["a"], []]})}
FACTS = {"scale": [0.0, 0.1], "name": "é"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEFTREC_HOME", str(tmp_path))
    monkeypatch.setenv("PEFTREC_PREPARED", "1")
    return tmp_path / "prepared"


class Maker:
    """Counts how often it is asked."""

    def __init__(self, size: int = 0) -> None:
        self.times, self.size = 0, size

    def __call__(self) -> kept.Kept:
        self.times += 1
        return kept.Kept({**ARRAYS, "more": np.zeros(self.size, dtype=np.int8)}, FRAMES, FACTS)


def entries(home: Path) -> list[str]:
    return sorted(path.name for path in home.iterdir() if path.is_dir())


def same(found: kept.Kept) -> None:
    for name, expected in ARRAYS.items():
        assert found.arrays[name].dtype == expected.dtype
        assert found.arrays[name].tobytes() == expected.tobytes()
        assert found.arrays[name].shape == expected.shape
    assert found.frames["films"].equals(FRAMES["films"])
    assert found.frames["films"].schema == FRAMES["films"].schema
    assert dict(found.facts) == FACTS


def test_made_once_and_the_same_from_files(home: Path) -> None:
    make = Maker()
    for _ in range(3):
        found = kept.keep("log", "a" * 64, make)
        same(found)
        mapped = found.arrays["numbers"]
        assert not mapped.flags.writeable
        assert not mapped.flags.owndata
    assert make.times == 1
    assert entries(home) == ["log-" + "a" * 16]


def test_another_key_or_kind_is_another_thing(home: Path) -> None:
    make = Maker()
    for kind, key in (("log", "a"), ("log", "b"), ("windows", "a")):
        kept.keep(kind, key, make)
    assert make.times == 3
    assert entries(home) == ["log-a", "log-b", "windows-a"]


@pytest.mark.parametrize("name", ["numbers.npy", "films.arrow", kept.ABOUT])
@pytest.mark.parametrize("how", ["gone", "cut", "flipped"])
def test_a_damaged_file_is_made_again(home: Path, name: str, how: str) -> None:
    make = Maker()
    kept.keep("log", "a", make)
    path = home / "log-a" / name
    content = path.read_bytes()
    middle = len(content) // 2
    # A new file, as a restore from a bad disk would be; who maps the old one is left alone.
    path.unlink()
    if how != "gone":
        path.write_bytes(
            content[:middle] + (b"" if how == "cut" else bytes([content[middle] ^ 1]) + content[middle + 1 :])
        )
    if name == kept.ABOUT and how == "flipped":
        assert content != path.read_bytes()
    same(kept.keep("log", "a", make))
    assert make.times == 2
    assert path.read_bytes() == content
    kept.keep("log", "a", make)
    assert make.times == 2


@pytest.mark.parametrize("said", ["off", "OFF", "0"])
def test_nothing_is_kept_when_off(home: Path, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv("PEFTREC_PREPARED", said)
    make = Maker()
    for _ in range(2):
        same(kept.keep("log", "a", make))
    assert make.times == 2
    assert not home.exists()


@pytest.mark.parametrize("said", ["yes", "-1", "nan"])
def test_a_switch_that_is_neither(home: Path, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv("PEFTREC_PREPARED", said)
    with pytest.raises(ConfigError, match=f"PEFTREC_PREPARED: '{said}' in the environment; expected off, or how many"):
        kept.keep("log", "a", Maker())


def test_no_key_keeps_nothing(home: Path) -> None:
    same(kept.keep("log", None, Maker()))
    assert not home.exists()


def test_what_was_of_no_use_goes_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTREC_PREPARED", "0.0003")  # 300 kB: two of them
    for number, key in enumerate("abc"):
        kept.keep("log", key, Maker(100_000))
        os.utime(home / f"log-{key}", (number, number))
        if key == "b":
            kept.keep("log", "a", Maker(100_000))  # used again: now b is the oldest
    assert entries(home) == ["log-a", "log-c"]


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PEFTREC_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("PEFTREC_PREPARED", "1")
    with pytest.warns(UserWarning, match=r"prepared data cannot be kept \(.*\) and will be made again"):
        same(kept.keep("log", "a", Maker()))


def test_an_error_while_making_leaves_nothing(home: Path) -> None:
    def fail() -> kept.Kept:
        raise ValueError("no such column")

    with pytest.raises(ValueError, match="no such column"):
        kept.keep("log", "a", fail)
    assert entries(home) == []


def _one_of_two(folder: str) -> None:
    os.environ.update(PEFTREC_HOME=folder, PEFTREC_PREPARED="1")

    def make() -> kept.Kept:
        with (Path(folder) / "made").open("a") as file:
            file.write("x")
        time.sleep(0.3)  # the other one comes while this one is at it
        return Maker()()

    same(kept.keep("log", "a", make))


def test_of_two_processes_one_makes_it(tmp_path: Path) -> None:
    context: Any = multiprocessing.get_context("spawn")
    both = [context.Process(target=_one_of_two, args=(str(tmp_path),)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert (tmp_path / "made").read_text() == "x"


def test_a_key_is_of_the_facts_in_any_order() -> None:
    assert kept.key_of(a=1, b={"c": [2], "d": None}) == kept.key_of(b={"d": None, "c": [2]}, a=1)
    assert kept.key_of(a=1) != kept.key_of(a=1.5)
    assert json.loads(json.dumps(kept.key_of(a=1))) == kept.key_of(a=1)
