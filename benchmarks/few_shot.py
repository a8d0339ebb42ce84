"""Adapters learned from 64 and 256 ready-made prompts of TALLRec's form, into docs/your-data.md.

    python benchmarks/few_shot.py --work runs/few-shot             # every run that is missing there
    python benchmarks/few_shot.py --work runs/few-shot --write     # the table, from what is there
    python benchmarks/few_shot.py --work runs/few-shot --records   # the records alone

The records are made of ml-100k as TALLRec's are: each rating from a person's eleventh on is a target behind the ten
before it, those from 4 on are liked, and targets are cut by time into 8 tenths to learn from, one to validate and one
to test. Training records are drawn by the seed; the others are the same for all.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from pages import put

from peftrec import config, prepared, record, split
from peftrec.draws import drawn_order

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes/configs/few_shot_records.yaml"
PAGE = ROOT / "docs/your-data.md"
SIZES, SEEDS, TOLD = (64, 256), (1, 2, 3), 10
VALID, TEST = 100, 1000
SCORERS = ("adapter", "bias", "mf", "bpmf", "item_mean")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for records and runs")
    parser.add_argument("--records", action="store_true", help="write the records and stop")
    parser.add_argument("--write", action="store_true", help="put the table into docs/your-data.md")
    arguments, overrides = parser.parse_known_args()
    if arguments.write:
        put("fewshot", table(arguments.work), PAGE)
        return
    write_records(arguments.work)
    for size in () if arguments.records else SIZES:
        for seed in SEEDS:
            run(arguments.work, size, seed, overrides)


def write_records(work: Path) -> None:
    """The files that all runs share, and those to learn from."""
    recipe = config.load_recipe(ROOT / "recipes/configs/ml-100k/click_lora.yaml")
    _, log = prepared.load(recipe.data, recipe.seed)
    place = np.arange(len(log)) - np.searchsorted(log.user, log.user)
    targets = np.flatnonzero(place >= TOLD)
    targets = targets[np.argsort(log.timestamp[targets], kind="stable")]
    train, valid, test = np.split(targets, [len(targets) * 8 // 10, len(targets) * 9 // 10])
    drawn = {"valid": some(valid, VALID, 0), "test": some(test, TEST, 0)}
    drawn |= {f"train-{size}-{seed}": some(train, size, seed) for size in SIZES for seed in SEEDS}
    work.mkdir(parents=True, exist_ok=True)
    for name, rows in drawn.items():
        records = [record_of(log, row) for row in rows.tolist()]
        (work / f"{name}.json").write_text(json.dumps(records, indent=1), encoding="utf-8")


def some(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    return rows[drawn_order(len(rows), seed, "few-shot records")[:count]]


def record_of(log: split.Log, row: int) -> dict[str, str]:
    """The row as a prompt, behind the ten before it of the same person."""
    titles, told = log.items["title"], np.arange(row - TOLD, row)
    liked, disliked = (
        ", ".join(f'"{titles[int(code)]}"' for code in log.item[told[log.label[told] == label]]) for label in (1, 0)
    )
    return {
        "instruction": "By what the user liked and disliked, say whether the user will like the target: Yes. or No.",
        "input": f"User Preference: {liked}\nUser Unpreference: {disliked}\n"
        f'Whether the user will like the target movie "{titles[int(log.item[row])]}"?',
        "output": ("No.", "Yes.")[int(log.label[row])],
    }


def run(work: Path, size: int, seed: int, overrides: list[str]) -> None:
    folder = work / f"run-{size}-{seed}"
    if (folder / "adapter").is_dir():
        return
    files = {"train": work / f"train-{size}-{seed}.json", "valid": work / "valid.json", "test": work / "test.json"}
    shown = ", ".join(f"{name}: {path.resolve()}" for name, path in files.items())
    changed = {"data.records": f"{{{shown}}}", "seed": seed, "output_dir": folder}
    words = [word for key, value in changed.items() for word in (f"--{key}", str(value))]
    subprocess.run(
        [sys.executable, ROOT / "recipes/finetune.py", "--config", RECIPE, "--overwrite", *words, *overrides],
        check=True,
    )


def table(work: Path) -> str:
    """AUC of each scorer on the targets of the test records, each seed and their mean."""
    lines = [
        "| records | seed | answered events | training, minutes | " + " | ".join(SCORERS) + " |",
        "|---|---|---:|---:|" + "---|" * len(SCORERS),
    ]
    for size in SIZES:
        found: list[dict[str, Any]] = []
        for seed in SEEDS:
            folder = work / f"run-{size}-{seed}"
            if not (folder / "run.json").is_file():
                continue
            facts = record.read_record(folder)
            auc = {"adapter": facts.metrics["test/auc"], **{n: facts.baselines[n]["test/auc"] for n in SCORERS[1:]}}
            found.append(auc)
            shown = " | ".join(f"{auc[name]:.3f}" for name in SCORERS)
            learned, minutes = facts.data["splits"]["train"]["rows"], facts.train["seconds"] / 60
            lines.append(f"| {size} | {seed} | {learned:,} | {minutes:.1f} | {shown} |")
        if len(found) > 1:
            means = " | ".join(f"**{np.mean([auc[name] for auc in found]):.3f}**" for name in SCORERS)
            lines.append(f"| {size} | mean | | | {means} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
