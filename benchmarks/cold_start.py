"""What adapters know of new films and of new people, into docs/transfer.md.

python benchmarks/cold_start.py new_people runs/compare-methods/lora
python benchmarks/cold_start.py new_films runs/ml-100k-cold-item

`new_films` takes a run of recipes/configs/ml-100k/click_cold.yaml: test films have no event in training. `new_people`
takes any run without a prior that was split by time: of its test rows those of people without a training event are
asked with an empty history, so that a film has one score for all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import numpy as np
from pages import PAGE, put

from peftrec import baselines, click_factors, config, interactions, lstm_clicks, report, split
from peftrec.bootstrap import Interval, bootstrap
from peftrec.looks import shown
from peftrec.metrics import slices
from peftrec.recommender import Recommender

SCORERS = ("adapter", "base_model", "item_mean", "bias", "mf", "lstm", "popularity", "global_mean")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("place", choices=["new_films", "new_people"], help="whose markers")
    parser.add_argument("run", help="output_dir of a finished run")
    arguments = parser.parse_args()
    text = {"new_films": new_films, "new_people": new_people}[arguments.place](arguments.run)
    put(arguments.place, text, PAGE.parent / "transfer.md")


def new_films(run: str) -> str:
    """Each scorer on films that nobody rated in training, with the adapter's lead over it."""
    recipe, found = config.load_recipe(f"{run}/config.yaml"), report.compare_run(run)
    size = found.sizes["all"]
    intervals = {name: {key: own[f"test/{key}"] for key in ("auc", "uauc")} for name, own in found.intervals.items()}
    gaps = {name: gap["test/auc"] for name, gap in found.differences.items()}
    about = f"New films: {size.rows:,} test rows of {size.users} people, who are known ({settings(recipe)})."
    return f"{about}\n\n{table(intervals, gaps)}"


def new_people(run: str) -> str:
    """Each scorer on people of whom nothing is known, with the adapter's lead over it."""
    recipe = config.load_recipe(f"{run}/config.yaml")
    log = split.split(interactions.load(recipe.data, recipe.seed), recipe.data.split, recipe.seed)
    rows = np.flatnonzero((log.split == split.TEST) & slices(log)["cold_user"])
    asked = np.unique(log.item[rows])
    recommender = Recommender.from_pretrained(f"{run}/adapter", items=log.items, prior=False)
    of_item = np.zeros(log.items.height)
    of_item[asked] = recommender.score([], [log.items["item_id"][int(code)] for code in asked])
    counted = baselines.predict(log, "frozen").scores
    scores = {"adapter": of_item[log.item[rows]]}
    # Nothing is known of a person, so the bias is that of the film.
    counted |= {
        "mf": click_factors.predict(log, "frozen", seed=recipe.seed).scores,
        "lstm": lstm_clicks.predict(log, "frozen", seed=recipe.seed).scores,
    }
    scores |= {name: counted[name][rows] for name in SCORERS if name in counted and name != "bias"}
    user = log.user[rows]
    found = bootstrap(log.label[rows], scores, user, recipe.eval.bootstrap, recipe.seed, baselines.RANKING_ONLY)
    gaps = {name: gap["auc"] for name, gap in found.differences.items()}
    about = f"New people: {len(rows):,} test rows of {len(np.unique(user))} people ({settings(recipe)})."
    return f"{about}\n\n{table(found.intervals, gaps)}"


def settings(recipe: config.Recipe) -> str:
    """How long the adapter was trained."""
    return f"{recipe.train.max_steps} steps of {recipe.prompt.max_tokens} tokens, seed {recipe.seed}"


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
