"""Side vectors against none: the same recipe, budget and test rows, on warm and cold items, beside ALS alone.

    python benchmarks/side.py [--folder runs/side] [--write]

Two runs of recipes/finetune.py with recipes/configs/ml-100k/click_side.yaml, one of them without its side vectors. Runs
that have ended are not repeated, and one that was killed goes on. Further --section.key VALUE go to both.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
from pages import put

from peftrec import record
from peftrec.bootstrap import Interval, bootstrap
from peftrec.report import cell, pipes

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes/configs/ml-100k/click_side.yaml"
ARMS = {"with": [], "without": ["--side.als", "false"]}
ROWS = ["user_id", "item_id", "timestamp", "split"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/side"), help="of the two runs")
    parser.add_argument("--write", action="store_true", help="put the table into docs/side-vectors.md")
    arguments, changes = parser.parse_known_args()
    for name, words in ARMS.items():
        command = [sys.executable, str(ROOT / "recipes/finetune.py"), "--config", str(RECIPE), *words, *changes]
        subprocess.run([*command, "--output_dir", str(arguments.folder / name), "--resume"], check=True)
    text = table(arguments.folder)
    print(text)
    if arguments.write:
        put("side", text, ROOT / "docs/side-vectors.md")


def table(folder: Path) -> str:
    """AUC of both runs and of what they are made of, by slice, and the differences, as Markdown."""
    runs = {name: record.read_predictions(folder / name) for name in ARMS}
    ours, plain = (runs[name].filter(runs[name]["split"] == "test") for name in ARMS)
    assert ours.select(ROWS).equals(plain.select(ROWS)), "both runs score the same rows"
    found = record.scorers(ours)
    scores = {
        "with side vectors": found["adapter"],
        "without": record.scorers(plain)["adapter"],
        "ALS alone": found["mf"],
        "user+item bias": found["bias"],
    }
    truth, users = ours["label"].to_numpy(), ours["user_id"].to_numpy()
    cold = record.members(ours)["cold_item"]
    slices = {"all": np.ones(len(cold), dtype=bool), "warm items": ~cold, "cold items": cold}
    rows = [("rows", "number", *scores)]
    gaps = [("rows", *(f"minus {name}" for name in list(scores)[1:]))]
    for name, member in slices.items():
        told = {key: values[member] for key, values in scores.items()}
        drawn = bootstrap(truth[member], told, users[member])
        rows.append((name, f"{member.sum():,}", *(_auc(drawn.intervals[key]) for key in scores)))
        gaps.append((name, *(_auc(one, sign="+") for one in drawn.differences.values())))
    facts = {name: record.read_record(folder / name) for name in ARMS}
    train = facts["with"].train
    cost = (
        f"{train['steps']:,} steps, {train['events']:,} events and {train['tokens']:,} tokens each; "
        f"{facts['with'].adapter['trainable_parameters'] - facts['without'].adapter['trainable_parameters']:,} of "
        f"{facts['with'].adapter['trainable_parameters']:,} trained parameters are the projector's; "
        f"{train['seconds'] / 60:.1f} and {facts['without'].train['seconds'] / 60:.1f} minutes on one core."
    )
    return f"{pipes(rows)}\n\n{pipes(gaps)}\n\n{cost}"


def _auc(found: dict[str, Interval], sign: str = "") -> str:
    return cell(found.get("auc"), interval=True, sign=sign)


if __name__ == "__main__":
    main()
