"""Two runs of recipes/configs/ml-100k/click_cold.yaml, for new films and new people, into docs/transfer.md.

python benchmarks/cold_start.py runs/ml-100k-cold-item runs/ml-100k-cold-user
"""

from __future__ import annotations

import argparse

from pages import PAGE, put

from peftrec import config, record, report
from peftrec.bootstrap import Interval
from peftrec.looks import shown

NEW = {"cold_item": "films", "cold_user": "people"}
SCORERS = ("adapter", "base_model", "item_mean", "bias", "popularity", "global_mean")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="output_dir of finished runs")
    arguments = parser.parse_args()
    put("cold_start", "\n\n".join(map(table, arguments.runs)), PAGE.parent / "transfer.md")


def table(run: str) -> str:
    """What is new in a run, and each scorer with the adapter's lead over it."""
    recipe = config.load_recipe(f"{run}/config.yaml")
    found, size = report.compare_run(run), record.read_record(run).slices["all"]
    lines = [
        f"New {NEW[recipe.data.split.kind]}: {size['rows']:,} test rows of {size['users']} people, seed {recipe.seed}, "
        f"{recipe.train.max_steps} steps of {recipe.prompt.max_tokens} tokens.",
        "",
        "| scorer | AUC | uauc | adapter minus this, AUC |",
        "|---|---|---|---|",
    ]
    for name in (one for one in SCORERS if one in found.intervals):
        own = found.intervals[name]
        lead = cell(found.differences[name]["test/auc"], "+") if name in found.differences else "-"
        lines.append(f"| {shown(name)} | {cell(own['test/auc'])} | {cell(own['test/uauc'])} | {lead} |")
    return "\n".join(lines)


def cell(one: Interval, sign: str = "") -> str:
    return f"{one.point:{sign}.3f} [{one.low:{sign}.3f}, {one.high:{sign}.3f}]"


if __name__ == "__main__":
    main()
