"""Cross-validation: run a k-fold recipe on some or all of its folds, and put the folds' figures together.

    python recipes/folds.py --config recipes/configs/ml-100k/rating_5fold.yaml                 all folds
    python recipes/folds.py --config … --folds 0 2 --train.learning_rate 1e-4                  some, with other settings
    python recipes/folds.py --config … --launch "accelerate launch --config_file recipes/accelerate/multi_gpu.yaml"

Each fold is a run of its own in OUTPUT_DIR/fold-K. The same command continues what was interrupted, between folds and
within one; folds that have ended are not run again. OUTPUT_DIR/folds.json holds the table that is printed last.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftrec import config, record
from peftrec.errors import ConfigError, as_one_line
from peftrec.metrics import METRICS

FINETUNE = Path(__file__).with_name("finetune.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a recipe with data.split.kind: kfold")
    parser.add_argument("--folds", type=int, nargs="+", help="which folds, counted from 0; all if left out")
    parser.add_argument("--launch", default=sys.executable, help="what starts a recipe; this Python if left out")
    arguments, overrides = parser.parse_known_args()
    recipe = config.load_recipe(arguments.config, overrides)
    split, folder = recipe.data.split, Path(recipe.output_dir)
    if split.kind != "kfold":
        raise ConfigError(
            f"{arguments.config}: data.split.kind is {split.kind}; expected kfold; set it, or use finetune"
        )
    wanted = sorted(set(range(split.folds) if arguments.folds is None else arguments.folds))
    if wanted[0] < 0 or wanted[-1] >= split.folds:
        raise ConfigError(f"--folds: {wanted}; expected numbers from 0 to {split.folds - 1} (data.split.folds)")
    for fold in wanted:
        print(f"\nfold {fold} of {split.folds}", flush=True)
        own = ["--data.split.fold", str(fold), "--output_dir", str(folder / f"fold-{fold}"), "--resume"]
        command = [*shlex.split(arguments.launch), str(FINETUNE), "--config", arguments.config, *overrides, *own]
        ended = subprocess.run(command, check=False).returncode
        if ended:
            print(f"fold {fold} ended with code {ended}; the same command continues there", file=sys.stderr)
            sys.exit(ended)
    runs = {fold: record.read_record(folder / f"fold-{fold}") for fold in wanted}
    found = summary(list(runs.values()))
    with record.atomic(folder / "folds.json") as scratch:
        scratch.write_text(json.dumps({"folds": wanted, "of": split.folds, "scorers": found}, indent=2) + "\n")
    print(f"\n{table(found, METRICS[recipe.task])}")
    print(f"mean and standard deviation over {len(wanted)} of {split.folds} folds ({', '.join(map(str, wanted))})")


def summary(runs: Sequence[record.RunRecord]) -> dict[str, dict[str, dict[str, Any]]]:
    """Scorer -> metric -> {mean, deviation, folds}: what each fold's run reported, and what they have in common."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for scorer in ("adapter", *runs[0].baselines):
        for name in runs[0].metrics:
            figures = [(run.metrics if scorer == "adapter" else run.baselines[scorer]).get(name) for run in runs]
            if "|" not in name and None not in figures:
                deviation = statistics.stdev(figures) if len(figures) > 1 else None
                mean = statistics.mean(figures)
                found.setdefault(scorer, {})[name] = {"mean": mean, "deviation": deviation, "folds": figures}
    return found


def table(found: dict[str, dict[str, dict[str, Any]]], metrics: Sequence[str]) -> str:
    """One line for each scorer, one column for each metric."""
    width = max(map(len, found))
    lines = [f"{'scorer':<{width}}" + "".join(f"  {name:>15}" for name in metrics)]
    for scorer, figures in found.items():
        cells = [figures.get(f"test/{name}") for name in metrics]
        shown = [
            "-"
            if cell is None
            else f"{cell['mean']:.3f}" + ("" if cell["deviation"] is None else f" ±{cell['deviation']:.3f}")
            for cell in cells
        ]
        lines.append(f"{scorer:<{width}}" + "".join(f"  {text:>15}" for text in shown))
    return "\n".join(lines)


if __name__ == "__main__":
    with as_one_line():
        main()
