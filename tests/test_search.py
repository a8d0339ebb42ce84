"""The search over recipes: what it proposes, what it ends early, where it goes on, and one with real runs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml

from peftrec import config
from peftrec.errors import ConfigError

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "recipes/search.py"
PAGE = ROOT / "docs/search.md"
SHIPPED = ROOT / "recipes/configs/search_click.yaml"
pytest.importorskip("optuna", reason="the extra 'search' is not installed")

# A stand-in for recipes/finetune.py: validation passes whose AUC is best at rank 8 and at a learning rate of 1e-3.
STAND_IN = """
import json, math, sys
from pathlib import Path
from peftrec import config, record

words = sys.argv[3:-1]
recipe = config.load_recipe(sys.argv[2], words)
folder = Path(recipe.output_dir)
if (folder / "run.json").is_file():
    sys.exit(0)
out = next(parent for parent in folder.parents if parent.name == "out")
with (out / "started").open("a") as log:
    log.write(f"{folder.name} {recipe.seed} {recipe.train.num_train_epochs} {recipe.eval.max_test_rows}\\n")
if (out / "broken").exists():
    sys.exit("train: out of memory")
folder.mkdir(parents=True)
(folder / "config.yaml").write_text(config.dump_recipe(recipe))
auc = 0.8 - 0.1 * abs(math.log10(recipe.train.learning_rate) + 3) - (0.05 if recipe.adapter.r != 8 else 0)
auc += 0.001 * (recipe.seed - 13)
log = [{"step": step, "eval_auc": auc - 0.01 * (2 - step)} for step in (1, 2)]
names = "intervals differences baselines slices data prompt model adapter eval".split()
empty = {name: {} for name in names}
metrics = {"test/auc": auc, "test/auc|popular": 1.0, "test/uauc": None}
own = {"task": "click", "metrics": metrics, "train": {"log": log}, "warnings": [], "seed": recipe.seed}
found = record.RunRecord(**{**empty, **own})
record.write_record(folder, found)
"""


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, with the stand-in for its runs."""
    spec = importlib.util.spec_from_file_location("recipes_search", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "recipes_search", module)
    spec.loader.exec_module(module)
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text(STAND_IN)
    monkeypatch.setattr(module, "FINETUNE", stand_in)
    monkeypatch.setattr(module, "POLL", 0.05)
    return module


def write_plan(folder: Path, **changes: Any) -> Path:
    """A plan over a made-up log of 240 clicks."""
    random = np.random.default_rng(5)
    user, film = np.repeat(np.arange(20), 12), np.concatenate([random.permutation(16)[:12] for _ in range(20)])
    table = {"user_id": user, "item_id": film, "label": random.integers(0, 2, 240), "timestamp": np.arange(240)}
    pl.DataFrame({**table, "title": [f"Film {k}" for k in film]}).write_parquet(folder / "clicks.parquet")
    recipe = {
        "data": {"interactions": str(folder / "clicks.parquet")},
        "prompt": {"max_tokens": 256, "overlap": 32},
        "model": {"dtype": "float32"},
        "adapter": {"method": "lora", "r": 2},
        "train": {"max_steps": 2, "evals": 2},
        "eval": {"baselines": ["bias"]},
        "output_dir": "unused",
    }
    plan = {
        "recipe": "base.yaml",
        "metric": "auc",
        "trials": 6,
        "events": 96,
        "changes": {"eval": {"max_valid_rows": 100}},
        "space": {
            "train.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
            "adapter.r": {"choices": [4, 8]},
        },
        "finalists": 2,
        "seeds": [13, 14],
        "output_dir": str(folder / "out"),
        **changes,
    }
    if "recipe_changes" in plan:
        recipe |= plan.pop("recipe_changes")
    (folder / "base.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    return folder / "plan.yaml"


def run(search: Any, monkeypatch: pytest.MonkeyPatch, *words: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["search.py", *map(str, words)])
    search.main()


def started(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "out/started").read_text().splitlines()]


def test_the_best_settings_win_and_are_tested_once(
    search: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(search, monkeypatch, "--config", write_plan(tmp_path))
    runs = started(tmp_path)
    assert [row[3] for row in runs] == ["1"] * (len(runs) - 1) + ["None"]  # test rows: one person, and the winner all
    assert runs[-1][:2] == ["best", "13"]
    assert sum(row[1] == "14" for row in runs) == 2  # both finalists with the second seed
    assert {float(row[2]) for row in runs} == {96 / 192}  # of 240 events four fifths train
    trials = search.Search(search.read_plan(tmp_path / "plan.yaml"), tmp_path / "base.yaml").trials()
    assert len(trials) == 6
    complete = [one for one in trials if one.state == "complete"]
    assert [one.value for one in complete] == sorted((one.value for one in complete), reverse=True)
    recipe = config.load_recipe(tmp_path / "out/best.yaml")
    assert (recipe.train.learning_rate, recipe.adapter.r) == (
        pytest.approx(complete[0].settings["train.learning_rate"]),
        int(complete[0].settings["adapter.r"]),
    )
    text = (tmp_path / "out/search.md").read_text()
    best, mean = complete[0].value, complete[0].value + 0.0005
    assert f"{best:.4f}" in text
    assert f"{mean:.4f} | {best:.4f} to {best + 0.001:.4f} |" in text  # the seeds add 0 and 0.001
    assert f"looked at once: auc {best:.3f}." in text
    assert (tmp_path / "out/search.png").stat().st_size > 10_000


def test_the_same_command_goes_on(search: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = write_plan(tmp_path, trials=2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/broken").touch()
    with pytest.raises(ConfigError, match=r"ended with code 1: train: out of memory; see .*\.log"):
        run(search, monkeypatch, "--config", plan)
    (tmp_path / "out/broken").unlink()
    run(search, monkeypatch, "--config", plan)
    runs = started(tmp_path)
    assert runs[0][0] == runs[1][0]  # the trial that failed is the first to be tried again
    before = len(runs)
    run(search, monkeypatch, "--config", plan)
    assert len(started(tmp_path)) == before  # everything was there
    run(search, monkeypatch, "--config", plan, "--trials", 3, "--workers", 2)
    ours = search.Search(search.read_plan(plan), tmp_path / "base.yaml")
    assert len(ours.trials()) == 3


def test_what_falls_behind_is_ended_early(search: Any, tmp_path: Path) -> None:
    found = search.Search(search.read_plan(write_plan(tmp_path)), tmp_path / "base.yaml")

    class Judge:
        """Seen at its second pass, a trial has fallen behind."""

        def __init__(self) -> None:
            self.seen: dict[int, float] = {}

        def report(self, value: float, step: int) -> None:
            self.seen[step] = value

        def should_prune(self) -> bool:
            return len(self.seen) == 2

    folder = tmp_path / "out/trials/one"
    states = [folder / f"checkpoints/checkpoint-{step}/trainer_state.json" for step in (9, 10)]
    lines = [{"eval_auc": 0.5, "step": 9}, {"loss": 1.0, "step": 9}, {"eval_auc": 0.625, "step": 10}]
    for path, log in zip(states, (lines[:1], lines), strict=True):
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"log_history": log}))
    assert search.validations(folder, "auc") == [0.5, 0.625]
    judge = Judge()
    value, pruned = found._follow(judge, [sys.executable, "-c", "import time; time.sleep(60)"], folder)
    assert (value, pruned) == (0.625, True)
    assert judge.seen == {0: 0.5, 1: 0.625}
    assert not folder.exists()


def test_a_setting_is_proposed_where_it_means_something(search: Any, tmp_path: Path) -> None:
    space = {
        "score.head": {"choices": ["tokens", "linear"]},
        "score.loss": {"choices": ["cross_entropy"], "when": {"score.head": "tokens"}},
        "adapter.r": {"low": 2, "high": 4, "whole": True},
    }
    found = search.Search(search.read_plan(write_plan(tmp_path, space=space)), tmp_path / "base.yaml")
    proposed = [found._propose(found.study.ask()) for _ in range(20)]
    assert {one["score.head"] for one in proposed} == {"tokens", "linear"}
    assert all(("score.loss" in one) == (one["score.head"] == "tokens") for one in proposed)
    assert {one["adapter.r"] for one in proposed} == {2, 3, 4}


def test_the_shipped_search_is_valid(search: Any) -> None:
    plan = search.read_plan(SHIPPED)
    assert len(plan.space) > 3


def test_the_plan_on_the_page_is_valid(search: Any, tmp_path: Path) -> None:
    (block,) = re.findall(r"^```yaml plan\n(.*?)^```", PAGE.read_text(), flags=re.S | re.M)
    path = tmp_path / "plan.yaml"
    path.write_text(block.replace("recipe: ", f"recipe: {SHIPPED.parent}/"))
    assert search.read_plan(path).space["score.loss"]["when"] == {"score.head": "tokens"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "rmse"}, "metric: rmse; task: click has loss, auc, uauc; choose one"),
        ({"trails": 3}, "trails: unknown key; did you mean trials?"),
        ({"space": {}}, "space: no keys; expected keys of a recipe with choices, or low and high"),
        ({"space": {"adapter.r": 3}}, "space.adapter.r: '3'; expected choices, or low and high"),
        ({"space": {"adapter.r": {"low": 3}}}, "expected choices, or low and high, and not both"),
        ({"space": {"adapter.r": {"low": 3, "high": 2}}}, "3 to 2; expected low below high"),
        ({"space": {"adapter.rank": {"choices": [3]}}}, "adapter.rank: unknown key"),
        ({"space": {"seed": {"choices": [3]}}}, "seed: the search sets it for every trial; leave it out"),
        ({"changes": {"eval": {"bootstrap": 3}}}, "eval.bootstrap: the search sets it for every trial"),
        (
            {"space": {"adapter.r": {"choices": [2], "when": {"score.head": "tokens"}}}},
            "space.adapter.r.when: score.head; expected a key that stands before it: none does",
        ),
        (
            {"space": {"score.head": {"choices": ["linear"]}, "score.loss": {"choices": ["cross_entropy"]}}},
            "does nothing",
        ),
        ({"seeds": []}, "seeds: none; expected at least one"),
    ],
)
def test_mistakes_are_said_before_the_first_trial(
    search: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        search.read_plan(write_plan(tmp_path, **changes))
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_another_search_in_the_same_folder_is_refused(search: Any, tmp_path: Path) -> None:
    search.Search(search.read_plan(write_plan(tmp_path)), tmp_path / "base.yaml")
    changed = search.read_plan(write_plan(tmp_path, events=50))
    with pytest.raises(ConfigError, match="holds another search"):
        search.Search(changed, tmp_path / "base.yaml")


def test_without_optuna(search: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = search.read_plan(write_plan(tmp_path))
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'peftrec\[search\]'"):
        search.Search(plan, tmp_path / "base.yaml")


def test_with_real_runs(tiny_llama_folder: Path, tmp_path: Path) -> None:
    model = {"model": {"name": str(tiny_llama_folder), "dtype": "float32"}}
    space = {"score.head": {"choices": ["linear"]}}
    plan = write_plan(tmp_path, trials=1, finalists=1, seeds=[13], space=space, recipe_changes=model)
    done = subprocess.run(
        [sys.executable, SCRIPT, "--config", plan],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads((tmp_path / "out/best/run.json").read_text())
    assert facts["metrics"]["test/auc"] is not None
    assert facts["prompt"]["layout"] == "timeline"
    tried = json.loads(next((tmp_path / "out/trials").glob("*/run.json")).read_text())
    assert max(line.get("eval_auc", 0) for line in tried["train"]["log"]) == pytest.approx(
        float((tmp_path / "out/search.md").read_text().splitlines()[2].split("|")[2]), abs=1e-4
    )
