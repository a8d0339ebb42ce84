"""Several adapters as one scorer: the mean of their scores, such as of one recipe under several seeds.

Matrices of adapters from different seeds are not averaged: they are different bases of different updates, and the mean
of products is not the product of means. Scores are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from peftrec import record
from peftrec.errors import DataError, ModelError
from peftrec.loaded_adapter import check_k
from peftrec.metrics import chances
from peftrec.ranking import Floats
from peftrec.recommender import Recommender

KEYS = ("user_id", "item_id", "timestamp", "split")


class Ensemble:
    """The mean of several adapters' scores, on one base model in memory.

    Args:
        recommender: holds all of them.
        names: which of its adapters count.

    Raises:
        ModelError: there are fewer than two, or they answer different questions.
    """

    def __init__(self, recommender: Recommender, names: Sequence[str]) -> None:
        if len(set(names)) < 2:
            raise ModelError(f"ensemble: {len(set(names))} adapters; expected two or more; use Recommender for one")
        about = [recommender.adapters[name].artifact for name in names]
        told = {
            (one.task, tuple(recommender.adapters[name].target.scale)) for one, name in zip(about, names, strict=True)
        }
        if len(told) > 1:
            tasks = ", ".join(sorted({one.task for one in about}))
            raise ModelError(f"ensemble: adapters of different tasks or scales ({tasks}); expected one; leave some out")
        self.recommender, self.names = recommender, tuple(names)

    @classmethod
    def from_pretrained(cls, adapters: Sequence[str | Path], **options: Any) -> Ensemble:
        """Load adapters of one base model, which is loaded once.

        Args:
            adapters: runs' folders, adapters' folders, or names on the Hub.
            options: as in `Recommender.from_pretrained`, the same for all of them.

        Raises:
            ModelError: one of them does not fit the base model of the first, or they answer different questions.
        """
        if len(adapters) < 2:
            raise ModelError(f"ensemble: {len(adapters)} adapters; expected two or more; use Recommender for one")
        recommender = Recommender.from_pretrained(adapters[0], **options)
        first, *others = recommender.adapters
        assert not others
        more = {
            key: options[key]
            for key in ("revision", "items", "columns", "prior", "strict", "token", "endpoint", "cache_dir")
            if key in options
        }
        names = [first]
        for number, adapter in enumerate(adapters[1:], 2):
            names.append(f"member {number}")
            recommender.load_adapter(adapter, names[-1], **more)
        return cls(recommender, names)

    def score(self, history: Sequence[Any], candidates: Sequence[Any]) -> Floats:
        """Mean log-odds of a like, or mean predicted rating, for each candidate (c,); see `Recommender.score`."""
        scores = [self.recommender.score(history, candidates, adapter=name) for name in self.names]
        mean: Floats = np.mean(scores, axis=0)
        return mean

    def probability(self, history: Sequence[Any], candidates: Sequence[Any]) -> Floats:
        """Chance of a like for each candidate (c,), of the mean log-odds.

        Raises:
            ModelError: the adapters predict ratings.
        """
        if self.recommender.artifact.task != "click":
            raise ModelError("ensemble: the adapters predict ratings, which are no probabilities; use score")
        return chances(self.score(history, candidates))

    def rank(self, history: Sequence[Any], candidates: Sequence[Any], k: int = 10) -> list[tuple[Any, float]]:
        """The `k` candidates with the highest mean scores, best first, each with its score.

        Raises:
            DataError: `k` is no whole number from 1.
        """
        check_k(k)
        scores = self.score(history, candidates)
        best = np.argsort(-scores, kind="stable")[:k].tolist()
        return [(candidates[index], float(scores[index])) for index in best]


def average_predictions(runs: Sequence[str | Path]) -> pl.DataFrame:
    """The predictions of the first run with the mean of all runs' scores, and each run's own as `baseline/run N`.

    Raises:
        DataError: there are not two different runs, or they did not score the same rows.
    """
    if len({Path(run).resolve() for run in runs}) < max(len(runs), 2):
        raise DataError(f"{', '.join(map(str, runs))}: expected two or more different runs")
    tables = [record.read_predictions(run) for run in runs]
    first = tables[0]
    for run, table in zip(runs[1:], tables[1:], strict=True):
        if len(table) != len(first) or not table.select(KEYS).equals(first.select(KEYS)):
            raise DataError(f"{run}: its predictions are of other rows than those of {runs[0]}; expected the same data")
    mean = pl.Series("score", np.mean([table["score"].to_numpy() for table in tables], axis=0))
    own = {f"baseline/run {number}": table["score"] for number, table in enumerate(tables, 1)}
    parts = ("score_no_prior", "answer", "base_score", "prior")
    return first.drop([name for name in parts if name in first.columns]).with_columns(mean, **own)
