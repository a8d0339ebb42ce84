"""What counting alone can do: the classical scorers on ml-100k's test rows, split by time, into docs/benchmarks.md.

python benchmarks/opponents.py --write    # two minutes of one core; no model is loaded
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
from pages import put

from peftrec import interactions, opponents, split
from peftrec.bootstrap import bootstrap
from peftrec.config import Data, Eval, Recipe
from peftrec.looks import shown
from peftrec.metrics import HEADLINE
from peftrec.report import HEADINGS, LEADING, cell, pipes

NAMES = ["item_mean", "bias", "mf", "item_knn", "svd", "gbdt"]
WAYS = (("click", "streaming"), ("click", "frozen"), ("rating", "streaming"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    parts = [table(task, history) for task, history in WAYS]
    text = "\n\n".join(parts)
    print(text)
    if parser.parse_args().write:
        put("opponents", text)


def table(task: str, history: str) -> str:
    recipe = Recipe(
        task=task,
        data=Data(name="ml-100k", like_at=4 if task == "click" else None),
        eval=replace(Eval(), history=history, baselines=NAMES),
        output_dir="none",
    )
    log = split.split(interactions.load(recipe.data, recipe.seed, task), recipe.data.split, recipe.seed)
    known = opponents.measure(log, recipe)
    rows = np.flatnonzero(log.split == split.TEST)
    truth = np.asarray(log.scale)[log.label[rows]]
    scores = {name: known.scores[name][rows] for name in reversed(NAMES)}  # differences are to the first
    found = bootstrap(truth, scores, log.user[rows], recipe.eval.bootstrap, recipe.seed, task=task, scale=log.scale)
    keys, headline = LEADING[task], HEADLINE[task]
    lines = [("scorer", *(HEADINGS[key] for key in keys), f"{shown(NAMES[-1])} minus it, {HEADINGS[headline]}")]
    for name in NAMES:
        gap = found.differences.get(name, {}).get(headline)
        own = [cell(found.intervals[name][key], interval=True) for key in keys]
        lines.append((shown(name), *own, cell(gap, interval=True, sign="+")))
    chosen = ", ".join(f"{value:g} {key}" for key, value in known.settings["gbdt"].items())
    heading = f"{task}s, {history} history, {len(rows):,} test rows of {len(np.unique(log.user[rows])):,} users"
    return f"{heading[0].upper()}{heading[1:]} ({chosen}):\n\n{pipes(lines)}"


if __name__ == "__main__":
    main()
