"""Tables of finished runs into docs/benchmarks.md and, cut to the scorers, README.md, from what the runs recorded.

python benchmarks/runs.py demo runs/ml-100k-click-lora-demo
python benchmarks/runs.py main runs/ml-100k-click-lora
python benchmarks/runs.py bpmf runs/ml-100k-click-bpmf
python benchmarks/runs.py rating runs/ml-100k-rating-5fold
python benchmarks/runs.py encoder runs/ml-100k-click-encoder    # this one and those below into docs/benchmarks.md only
python benchmarks/runs.py liked runs/ml-100k-click-bpmf-liked
python benchmarks/runs.py latest_clicks runs/ml-latest-small-click-bpmf
python benchmarks/runs.py latest_ratings runs/ml-latest-small-rating
"""

from __future__ import annotations

import argparse

from pages import PAGE, put

from peftrec import record, report

IN_README, REST = ("demo", "main", "bpmf", "rating"), ("encoder", "liked", "latest_clicks", "latest_ratings")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("place", choices=[*IN_README, *REST], help="whose markers")
    parser.add_argument("run", help="output_dir of a finished run")
    arguments = parser.parse_args()
    facts = record.read_record(arguments.run)
    comparison = report.compare_run(arguments.run)
    train, adapter = facts.train, facts.adapter
    cost = (
        f"Training: {train['events']:,} events and {train['tokens']:,} tokens in {train['seconds'] / 60:.1f} minutes "
        f"({train['events_per_second']:.1f} events, {train['tokens_per_second']:.0f} tokens a second) on "
        f"{facts.hardware['cores']} cores of {facts.hardware['cpu']}, {facts.model['dtype']}; "
        f"{adapter['trainable_parameters']:,} of {facts.model['parameters']:,} parameters; "
        f"the adapter is {adapter['bytes'] / 1e6:.1f} MB; seed {facts.seed}."
    )
    put(arguments.place, f"{comparison.markdown()}\n{cost}")
    if arguments.place in IN_README:
        put(arguments.place, f"{comparison.markdown(short=True)}\n{cost}", PAGE.parent.parent / "README.md")


if __name__ == "__main__":
    main()
