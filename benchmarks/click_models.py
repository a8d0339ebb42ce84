"""The LSTM click model beside counting and matrix factorisation on ml-100k's test rows, into docs/baselines.md.

python benchmarks/click_models.py
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from pages import put

from peftrec import config, interactions, opponents, report, split

ROOT = Path(__file__).parents[1]


def main() -> None:
    recipe = config.load_recipe(ROOT / "recipes/configs/ml-100k/click_lora.yaml")
    shown = dataclasses.replace(
        recipe.eval, baselines=["lstm", "item_mean", "bias", "mf", "popularity"], user_groups=[]
    )
    recipe = dataclasses.replace(recipe, eval=shown, score=config.Score())
    data = interactions.load(recipe.data, recipe.seed)
    log = split.split(data, recipe.data.split, recipe.seed)
    scores = opponents.measure(log, recipe).scores
    found = report.compare_scores(log, np.flatnonzero(log.split == split.TEST), scores, recipe)
    put("clickmodels", found.markdown(), ROOT / "docs/baselines.md")
    print(found.table())


if __name__ == "__main__":
    main()
