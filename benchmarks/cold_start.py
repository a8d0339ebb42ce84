"""What adapters know of new films and of new people, into docs/transfer.md.

python benchmarks/cold_start.py new_films runs/ml-100k-cold-item
python benchmarks/cold_start.py new_people runs/ml-100k-cold-user

The runs are those of recipes/configs/ml-100k/click_cold.yaml: test films that have no event in training, or test people
of whom nothing is known, so that a film has one score for all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from pages import PAGE, put

from peftrec import config, report
from peftrec.bootstrap import Interval
from peftrec.looks import shown

SCORERS = ("adapter", "base_model", "item_mean", "bias", "mf", "lstm", "popularity", "global_mean")
TITLES = {
    "new_films": "New films: {:,} test rows of {} people, who are known",
    "new_people": "New people: {:,} test rows of {} people of whom nothing is known",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("place", choices=[*TITLES], help="whose markers")
    parser.add_argument("run", help="output_dir of a finished run")
    arguments = parser.parse_args()
    put(arguments.place, of_run(arguments.run, TITLES[arguments.place]), PAGE.parent / "transfer.md")


def of_run(run: str, title: str) -> str:
    """Each scorer of a run, with the adapter's lead over it."""
    recipe, found = config.load_recipe(f"{run}/config.yaml"), report.compare_run(run)
    size = found.sizes["all"]
    intervals = {name: {key: own[f"test/{key}"] for key in ("auc", "uauc")} for name, own in found.intervals.items()}
    gaps = {name: gap["test/auc"] for name, gap in found.differences.items()}
    steps = f"{recipe.train.max_steps} steps of {recipe.prompt.max_tokens} tokens, seed {recipe.seed}"
    return f"{title.format(size.rows, size.users)} ({steps}).\n\n{table(intervals, gaps)}"


def table(intervals: Mapping[str, Mapping[str, Interval]], gaps: Mapping[str, Interval]) -> str:
    """Markdown."""
    lines = ["| scorer | AUC | uauc | adapter minus this, AUC |", "|---|---|---|---|"]
    for name in (one for one in SCORERS if one in intervals):
        own, lead = intervals[name], cell(gaps[name], "+") if name in gaps else "-"
        lines.append(f"| {shown(name)} | {cell(own['auc'])} | {cell(own['uauc'])} | {lead} |")
    return "\n".join(lines)


def cell(one: Interval, sign: str = "") -> str:
    """A figure with its interval."""
    return f"{one.point:{sign}.3f} [{one.low:{sign}.3f}, {one.high:{sign}.3f}]"


if __name__ == "__main__":
    main()
