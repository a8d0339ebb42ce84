"""What counting alone can do: the classical scorers on ml-100k's test rows, by time and in random folds.

python benchmarks/opponents.py --write    # some minutes of one core; no model is loaded

The tables go into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
from pages import put

from peftrec import interactions, opponents, split
from peftrec.bootstrap import bootstrap
from peftrec.config import Data, Eval, Recipe, Split, Train
from peftrec.looks import shown
from peftrec.metrics import HEADLINE
from peftrec.report import HEADINGS, LEADING, cell, pipes

NAMES = ["item_mean", "bias", "mf", "item_knn", "svd", "gbdt", "bpmf"]  # differences are those of the last
TEMPORAL = Split(kind="temporal", valid=0.1, test=0.1)
FOLDS = [Split(kind="kfold", folds=5, fold=fold, valid=0.02) for fold in (0, 1)]
WAYS = (
    ("click", "streaming", TEMPORAL),
    ("click", "frozen", TEMPORAL),
    ("rating", "streaming", TEMPORAL),
    *(("rating", "frozen", fold) for fold in FOLDS),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    parts = [table(*way) for way in WAYS]
    text = "\n\n".join(parts)
    print(text)
    if parser.parse_args().write:
        put("opponents", text)


def table(task: str, history: str, how: Split) -> str:
    recipe = Recipe(
        task=task,
        data=Data(name="ml-100k", like_at=4 if task == "click" else None, split=how),
        train=replace(Train(), order="random" if how.kind == "kfold" else "time"),
        eval=replace(Eval(), history=history, baselines=NAMES),
        output_dir="none",
    )
    log = split.split(interactions.load(recipe.data, recipe.seed, task), recipe.data.split, recipe.seed)
    known = opponents.measure(log, recipe)
    rows = np.flatnonzero(log.split == split.TEST)
    truth = np.asarray(log.scale)[log.label[rows]]
    scores = {name: known.scores[name][rows] for name in reversed(NAMES)}  # differences are to the first
    found = bootstrap(truth, scores, log.user[rows], recipe.eval.bootstrap, recipe.seed, task=task, scale=log.scale)
    keys, compared = LEADING[task], (HEADLINE[task], "mae" if task == "rating" else "uauc")
    gaps = [f"{shown(NAMES[-1])} minus it, {HEADINGS[key]}" for key in compared]
    lines = [("scorer", *(HEADINGS[key] for key in keys), *gaps)]
    for name in NAMES:
        gap = found.differences.get(name, {})
        own = [cell(found.intervals[name][key], interval=True) for key in keys]
        lines.append((shown(name), *own, *(cell(gap.get(key), interval=True, sign="+") for key in compared)))
    rows_of = f"{len(rows):,} test rows of {len(np.unique(log.user[rows])):,} users"
    where = f"random fold {how.fold} of {how.folds}" if how.kind == "kfold" else "the last tenth in time"
    return f"{task.capitalize()}s, {history} history, {where}, {rows_of}:\n\n{pipes(lines)}"


if __name__ == "__main__":
    main()
