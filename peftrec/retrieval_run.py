"""A finished run's adapter and baselines as they rank: one held-out liked item of each user among others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from peftrec import config, opponents, prepared, retrieval
from peftrec.errors import DataError
from peftrec.looks import shown
from peftrec.ranking import Floats
from peftrec.recommender import Recommender
from peftrec.record import ADAPTER
from peftrec.report import Table, aligned, cell, pipes, wrapped
from peftrec.retrieval import METRICS, Places, Questions
from peftrec.schema import read_yaml
from peftrec.split import Log, few

AMONG = 99
_HEADINGS = {"hr@10": "HR@10", "ndcg@10": "NDCG@10", "mrr": "MRR", "novelty": "novelty", "popularity": "popularity"}
_LEADING = ("hr@10", "ndcg@10", "mrr")
_LEGEND = (
    "HR@10: share of users whose held-out liked item is among the ten best; NDCG@10: 1 / log2(1 + place) where it "
    "is; MRR: 1 / place; candidates that tie share their places. novelty: bits of self-information of the ten, log2 "
    "of training users over those who met the item. popularity: training events of the ten over those of what the "
    "users had met. coverage: share of the offered items that get into anyone's ten. [low, high]: 95% interval over "
    "resamples of the users. That an item was never met does not say that it is disliked: scorers that learn what "
    "people think of what they chose are asked here what people choose."
)


@dataclass(frozen=True)
class Retrieval:
    """How the scorers of a run rank.

    Attributes:
        among: protocol -> what was found; `99` are that many sampled items beside the held-out one, `all` is the whole
            items table.
        knew: what a scorer knew of users.
    """

    among: Mapping[str, Places]
    knew: str

    def facts(self) -> dict[str, Any]:
        """Every figure, as plain values."""
        return {
            name: {
                "users": places.users,
                "candidates": places.candidates,
                "offered": places.offered,
                "scorers": {
                    scorer: {key: vars(one) for key, one in own.items()} | {"items": places.covered[scorer]}
                    for scorer, own in places.found.intervals.items()
                },
                "differences": {
                    scorer: {key: vars(one) for key, one in own.items()}
                    for scorer, own in places.found.differences.items()
                },
            }
            for name, places in self.among.items()
        }

    def table(self) -> str:
        """Plain text for a terminal of 120 columns."""
        parts = []
        for name, places in self.among.items():
            parts += [wrapped(self._headline(name, places)), "", *aligned(_figures(places)), ""]
            if places.found.differences:
                parts += [f"{shown(_first(places))} minus the other", "", *aligned(_differences(places)), ""]
        return "\n".join([*parts, wrapped(_LEGEND)])

    def markdown(self) -> str:
        """The same for a page."""
        parts = []
        for name, places in self.among.items():
            parts += [self._headline(name, places), pipes(_figures(places))]
            if places.found.differences:
                parts += [f"**{shown(_first(places))} minus the other**:", pipes(_differences(places))]
        return "\n\n".join([*parts, _LEGEND]) + "\n"

    def _headline(self, name: str, places: Places) -> str:
        beside = "sampled items" if name != "all" else "items"
        return (
            f"{places.users:,} users, each with one liked test item among {places.candidates - 1:,.0f} {beside} that "
            f"the user never met. A scorer knows of users {self.knew}, and of items the training events."
        )


def rank_run(
    run: str | Path,
    users: int,
    *,
    adapter: bool = True,
    adapter_on_all: bool = False,
    baselines: Sequence[str] | None = None,
    resamples: int | None = None,
) -> Retrieval:
    """Let a run's scorers rank one held-out liked item of each user, among 99 others and among all.

    Args:
        run: its output_dir, with `config.yaml` and, for the adapter, `adapter`.
        users: how many to ask for, drawn by the run's seed.
        adapter: whether the adapter ranks, too; among the 99 only.
        adapter_on_all: whether it also ranks the whole items table, which takes as many times longer as that is larger.
        baselines: names as in `eval.baselines`; those of the recipe if left out.
        resamples: of the users, behind each interval; those of the recipe if left out.

    Raises:
        ConfigError: the folder holds no recipe, or a baseline needs a library that is not installed.
        DataError: there is nothing to ask for, or the run is one of ready-made prompts.
        ModelError: the adapter cannot be loaded.
    """
    path = Path(run) / "config.yaml"
    recipe = config.parse_recipe(read_yaml(path), str(path))
    if baselines is not None:
        mapping = config.recipe_to_dict(recipe)
        mapping["eval"]["baselines"] = list(baselines)
        recipe = config.parse_recipe(mapping, str(path))
    opponents.check(recipe)
    if recipe.data.prompts is not None:
        raise DataError(f"{run}: trained on ready-made prompts, which name no items; ranking needs a table of events")
    _, log = prepared.load(recipe.data, recipe.seed, recipe.task, with_users=config.of_users(recipe))
    if recipe.data.train_events is not None:
        log = few(log, recipe.data.train_events, recipe.seed)
    if log.liked_from is None:  # nobody said what is liked: what is above the mean
        mean = np.asarray(log.scale)[log.label[log.split == 0]].mean()
        log = replace(log, liked_from=int(np.searchsorted(log.scale, mean, side="right")))
    history, resamples = recipe.eval.history, recipe.eval.bootstrap if resamples is None else resamples
    asked = {
        name: retrieval.draw(log, users, among, history, recipe.seed) for name, among in (("99", AMONG), ("all", None))
    }
    asks = [name for name in asked if adapter and (name == "99" or adapter_on_all)]
    recommender = Recommender.from_pretrained(Path(run) / "adapter", items=log.items) if asks else None
    found = {}
    for name, questions in asked.items():
        scores = {}
        if recommender is not None and name in asks:
            scores[ADAPTER] = adapter_scores(recommender, log, questions, recipe)
        scores |= baseline_scores(log, questions, recipe)
        found[name] = retrieval.measure(log, questions, scores, history, resamples, recipe.seed)
    knew = {"streaming": "what was earlier in time", "frozen": "the training events"}[history]
    return Retrieval(found, knew)


def baseline_scores(log: Log, questions: Questions, recipe: config.Recipe) -> dict[str, Floats]:
    """Scores of all candidates by the recipe's baselines, (m,) each.

    Args:
        log: all events.
        questions: as drawn from it.
        recipe: its baselines, history and seed.
    """
    rows, where = retrieval.as_rows(log, questions)
    # Candidates do not see each other, whatever events of one second do.
    alone = replace(recipe, eval=replace(recipe.eval, ties="isolate"), score=replace(recipe.score, prior="none"))
    known = opponents.measure(rows, alone, items="frozen")
    return {name: scores[where] for name, scores in known.scores.items()}


def adapter_scores(recommender: Recommender, log: Log, questions: Questions, recipe: config.Recipe) -> Floats:
    """Scores of all candidates (m,) by an adapter that is asked as anybody would.

    Args:
        recommender: with the log's items table.
        log: all events.
        questions: as drawn from it.
        recipe: its history, and whether a person is shown.
    """
    ids = log.items["item_id"].to_list()
    parts = []
    for number in tqdm(range(len(questions)), desc="rank", unit=" users", leave=False):
        row = int(questions.row[number])
        known = retrieval.known_rows(log, row, recipe.eval.history)
        candidates = questions.item[questions.start[number] : questions.start[number + 1]]
        about = None
        if recipe.prompt.user is not None and log.users is not None:
            about = log.users.row(int(log.user[row]), named=True)
        told = [(ids[log.item[one]], log.scale[log.label[one]]) for one in known]
        parts.append(recommender.score(told, [ids[code] for code in candidates], about))
    return np.concatenate(parts)


def _first(places: Places) -> str:
    return next(iter(places.found.intervals))


def _figures(places: Places) -> Table:
    rows: Table = [("scorer", *(_HEADINGS[key] for key in METRICS), "coverage")]
    for name, own in places.found.intervals.items():
        cells = [cell(own[key], interval=key in _LEADING) for key in METRICS]
        rows.append((shown(name), *cells, f"{places.covered[name] / places.offered:.1%}"))
    return rows


def _differences(places: Places) -> Table:
    rows: Table = [("other scorer", *(_HEADINGS[key] for key in _LEADING))]
    for name, own in places.found.differences.items():
        rows.append((shown(name), *(cell(own[key], interval=True, sign="+") for key in _LEADING)))
    return rows
