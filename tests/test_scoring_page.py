"""docs/scoring.md does what it says: its commands and code, in its order, on a tiny adapter."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from test_docs import ROOT, YOUR_DATA, blocks
from test_ray_data import QUIET
from test_recommender import save_adapter

from peftrec import cli

PAGE = ROOT / "docs" / "scoring.md"


def words(block: str) -> list[str]:
    return shlex.split(block.replace("\\\n", " "))


@pytest.fixture
def place(tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the page goes on from: tables of docs/your-data.md, and an adapter in its run's folder."""
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks(YOUR_DATA, "python")[0], "page", "exec"), {})
    save_adapter(tiny_llama_folder, tmp_path / "runs/my-data/adapter", item="{title}")
    recipe = f"data: {{name: ml-100k}}\nmodel: {{name: {tiny_llama_folder}}}\noutput_dir: runs/my-data\n"
    (tmp_path / "runs/my-data/config.yaml").write_text(recipe)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    return tmp_path


def test_the_page(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pairs, read_scores, on_ray, in_memory = blocks(PAGE, "python")
    command, launched = (words(block) for block in blocks(PAGE, "sh"))
    known: dict[str, Any] = {}
    exec(compile(make_pairs, "page", "exec"), known)
    assert command[0] == "peftrec"
    assert cli.main(command[1:]) == 0, capsys.readouterr().err
    assert "scores: complete, 200 rows in 1 parts; read scores/parts" in capsys.readouterr().out
    exec(compile(read_scores, "page", "exec"), known)
    assert known["scores"].columns == ["uid", "dish", "score", "probability"]

    assert launched[:2] == ["accelerate", "launch"]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launched[2:]],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "scores: 1 parts are there, 0 are to do" in done.stdout

    exec(compile(in_memory, "page", "exec"), known)
    assert "probability" in capsys.readouterr().out
    if find_spec("ray") is not None:
        paths = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT)}
        # On the page there is a cluster, whose workers find no file by a relative path.
        code = on_ray.replace("concurrency=4", "concurrency=1").replace("my-data/", f"{place}/my-data/")
        code = code.replace("runs/my-data/", f"{place}/runs/my-data/").replace("scores-ray", f"{place}/scores-ray")
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=paths)
        assert pl.read_parquet("scores-ray/*.parquet").height == 200
