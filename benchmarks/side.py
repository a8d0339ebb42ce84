"""Side vectors against none: the same recipe, budget and test rows, on warm and cold items, beside ALS alone.

    python benchmarks/side.py [--folder runs/side] [--arms with without] [--write]

Two runs of recipes/finetune.py with recipes/configs/ml-100k/click_side.yaml, one of them without its side vectors. Runs
that have ended are not repeated, and one that was killed goes on. Further --section.key VALUE go to both. Differences
are of the run with side vectors; without the other run (--arms with) its column is left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
from pages import put

from peftrec import record
from peftrec.bootstrap import Interval, bootstrap
from peftrec.report import HEADINGS, cell, pipes

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes/configs/ml-100k/click_side.yaml"
ARMS = {"with": [], "without": ["--side.als", "false"]}
ROWS = ["user_id", "item_id", "timestamp", "split"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/side"), help="of the two runs")
    parser.add_argument("--write", action="store_true", help="put the table into docs/side-vectors.md")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="which of the runs")
    arguments, changes = parser.parse_known_args()
    for name in arguments.arms:
        command = [sys.executable, str(ROOT / "recipes/finetune.py"), "--config", str(RECIPE), *ARMS[name], *changes]
        subprocess.run([*command, "--output_dir", str(arguments.folder / name), "--resume"], check=True)
    text = table(arguments.folder)
    print(text)
    if arguments.write:
        put("side", text, ROOT / "docs/side-vectors.md")


def table(folder: Path) -> str:
    """AUC, and AUC by user, of the runs and of what they are made of, by slice, and the differences, as Markdown."""
    ended = [name for name in ARMS if (folder / name / "run.json").is_file()]
    runs = {name: record.read_predictions(folder / name).filter(pl.col("split") == "test") for name in ended}
    ours = runs["with"]
    found = record.scorers(ours)
    scores = {"with side vectors": found["adapter"]}
    if "without" in runs:
        assert ours.select(ROWS).equals(runs["without"].select(ROWS)), "both runs score the same rows"
        scores["without"] = record.scorers(runs["without"])["adapter"]
    scores |= {"ALS alone": found["mf"], "user+item bias": found["bias"]}
    truth, users = ours["label"].to_numpy(), ours["user_id"].to_numpy()
    cold = record.members(ours)["cold_item"]
    slices = {"all": np.ones(len(cold), dtype=bool), "warm items": ~cold, "cold items": cold}
    rows = [("rows", "number", "", *scores)]
    gaps = [("rows", "", *(f"minus {name}" for name in list(scores)[1:]))]
    for name, member in slices.items():
        told = {key: values[member] for key, values in scores.items()}
        drawn = bootstrap(truth[member], told, users[member])
        for metric in ("auc", "uauc") if name != "cold items" else ("auc",):
            shown = HEADINGS[metric]
            rows.append((name, f"{member.sum():,}", shown, *(_figure(drawn.intervals[key], metric) for key in scores)))
            gaps.append((name, shown, *(_figure(one, metric, "+") for one in drawn.differences.values())))
    facts = record.read_record(folder / "with")
    train = facts.train
    cost = (
        f"{train['steps']:,} steps, {train['events']:,} events and {train['tokens']:,} tokens; "
        f"{facts.adapter['trainable_parameters']:,} trained parameters; seed {facts.seed}."
    )
    return f"{pipes(rows)}\n\nWith side vectors, minus the others:\n\n{pipes(gaps)}\n\n{cost}"


def _figure(found: dict[str, Interval], metric: str, sign: str = "") -> str:
    return cell(found.get(metric), interval=True, sign=sign)


if __name__ == "__main__":
    main()
