"""How the main job's adapter and the classical scorers rank one held-out liked item, into docs/benchmarks.md.

python benchmarks/ranking.py runs/ml-100k-click-lora --users 25 --write                  # some minutes for the adapter
python benchmarks/ranking.py runs/ml-100k-click-lora --users 1000 --no-adapter --write   # a minute, all items too
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from pages import put

from peftrec.retrieval_run import rank_run

BASELINES = ["item_mean", "bias", "mf", "item_knn", "svd", "gbdt", "popularity"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="output_dir of a finished run")
    parser.add_argument("--users", type=int, default=60)
    parser.add_argument("--no-adapter", action="store_true", help="the classical scorers alone")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    arguments = parser.parse_args()
    asks = not arguments.no_adapter
    found = rank_run(arguments.run, arguments.users, adapter=asks, baselines=BASELINES)
    if asks:  # it ranked the 99 only
        found = replace(found, among={"99": found.among["99"]})
    text = found.markdown()
    print(text)
    if arguments.write:
        put("ranking" if asks else "counts", text)


if __name__ == "__main__":
    main()
