"""Average the scores of several runs of one recipe, as under several seeds, and measure the mean beside each of them.

    for seed in 1 2 3; do python recipes/finetune.py --config R.yaml --seed $seed --output_dir runs/seed-$seed; done
    python recipes/ensemble.py runs/seed-1 runs/seed-2 runs/seed-3

The runs must have scored the same rows. peftrec.ensemble.Ensemble does the same with adapters that are loaded.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from peftrec import config, report
from peftrec.ensemble import average_predictions
from peftrec.errors import DataError, as_one_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, two or more")
    runs = parser.parse_args().runs
    recipes = [config.load_recipe(run / "config.yaml") for run in runs]
    if len({recipe.task for recipe in recipes}) > 1:
        tasks = ", ".join(recipe.task for recipe in recipes)
        raise DataError(f"{', '.join(map(str, runs))}: their tasks are {tasks}; expected runs of one task")
    found = report.compare_predictions(average_predictions(runs), recipes[0])
    print(replace(found, knew=f"mean of the scores of {len(runs)} runs. {found.knew}").table())


if __name__ == "__main__":
    with as_one_line():
        main()
