"""The comparison of methods: what its config says is valid, and two methods really run and stand in one table."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import polars as pl
import pytest
import yaml

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "recipes/compare_methods.py"
SHIPPED = ROOT / "recipes/configs/compare_methods.yaml"


def compare(*arguments: Any, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def test_every_shipped_method_is_a_valid_recipe() -> None:
    from peftrec import config

    plan = yaml.safe_load(SHIPPED.read_text())
    kinds = {method["adapter"]["method"] for method in plan["methods"].values()}
    everything = set(get_args(get_type_hints(config.Adapter)["method"])) - {"other"}
    assert kinds == everything
    overrides = runpy.run_path(str(SCRIPT))["_overrides"]
    for name, method in plan["methods"].items():
        words = overrides(plan["changes"], method, Path("runs") / name)
        recipe = config.load_recipe(SHIPPED.parent / plan["recipe"], words)
        assert (recipe.adapter.method, recipe.score.prior) == (method["adapter"]["method"], "none")


@pytest.fixture
def plan(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    random = np.random.default_rng(5)
    user, film = np.repeat(np.arange(20), 12), np.concatenate([random.permutation(16)[:12] for _ in range(20)])
    table = {"user_id": user, "item_id": film, "label": random.integers(0, 2, 240), "timestamp": np.arange(240)}
    pl.DataFrame({**table, "title": [f"Film {k}" for k in film]}).write_parquet(tmp_path / "clicks.parquet")
    recipe = {
        "data": {"interactions": str(tmp_path / "clicks.parquet")},
        "prompt": {"max_tokens": 256, "overlap": 32},
        "model": {"name": str(tiny_llama_folder), "dtype": "float32"},
        "adapter": {"method": "lora", "r": 2},
        "train": {"max_steps": 2, "evals": 1},
        "eval": {"bootstrap": 20},
        "output_dir": "unused",
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(recipe))
    methods = {"none": {"adapter": {"method": "none"}}, "ia3": {"adapter": {"method": "ia3"}}}
    plan = {"recipe": "base.yaml", "changes": {}, "output_dir": str(tmp_path / "runs"), "methods": methods}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    return tmp_path / "plan.yaml"


def test_two_methods_in_one_table(plan: Path, tmp_path: Path) -> None:
    done = compare("--config", plan)
    lines = (tmp_path / "runs/methods.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["none", "ia3"]
    trained = json.loads((tmp_path / "runs/ia3/run.json").read_text())["adapter"]["trainable_parameters"]
    assert f"| ia3 | {trained:,} |" in lines[3]
    # What it gains over the frozen base is the difference of the two figures, on the same rows.
    quality, gain = zip(*(line.split("|")[5:7] for line in lines[2:]), strict=True)
    assert gain[0].strip() == "-"
    apart = float(quality[1].split()[0]) - float(quality[0].split()[0])
    assert float(gain[1].split()[0]) == pytest.approx(apart, abs=2e-3)  # of rounded figures
    assert (tmp_path / "runs/methods.png").stat().st_size > 10_000
    assert done.stdout.count("everything is in") == 2
    again = compare("--config", plan, "--methods", "ia3")
    assert "this run has ended" in again.stdout


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, ["--methods", "lorra"], "--methods: lorra; expected some of none, ia3"),
        ({"extra": 1}, [], "keys changes, extra, methods, output_dir, recipe; expected changes, methods, output_dir"),
        ({"changes": {"train": {"max_stps": 1}}}, [], "train.max_stps: unknown key; did you mean max_steps?"),
    ],
)
def test_mistakes(plan: Path, tmp_path: Path, change: dict[str, Any], arguments: list[str], message: str) -> None:
    plan.write_text(yaml.safe_dump({**yaml.safe_load(plan.read_text()), **change}, sort_keys=False))
    assert message in compare("--config", plan, *arguments, expect=2).stderr
    assert not (tmp_path / "runs").exists()
