"""Several adapters as one scorer: means by hand, and what cannot be averaged."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

from peftrec import record
from peftrec.ensemble import Ensemble, average_predictions
from peftrec.errors import DataError, ModelError


class Told:
    """A recommender whose adapters say what they are told to."""

    def __init__(self, tasks: dict[str, str], scores: dict[str, list[float]]) -> None:
        self.adapters = {
            name: SimpleNamespace(artifact=SimpleNamespace(task=task), target=SimpleNamespace(scale=(0, 1)))
            for name, task in tasks.items()
        }
        self.artifact, self.scores = next(iter(self.adapters.values())).artifact, scores

    def score(self, history: Any, candidates: Any, *, adapter: str) -> np.ndarray:
        return np.array(self.scores[adapter])


def test_scores_are_means() -> None:
    told: Any = Told({"a": "click", "b": "click"}, {"a": [0.0, 2.0, -1.0], "b": [1.0, 4.0, 1.0]})
    both = Ensemble(told, ["a", "b"])
    assert both.score([], ["x", "y", "z"]).tolist() == [0.5, 3.0, 0.0]
    assert np.allclose(both.probability([], ["x", "y", "z"]), [0.62246, 0.95257, 0.5], atol=1e-5)
    assert both.rank([], ["x", "y", "z"], k=2) == [("y", 3.0), ("x", 0.5)]


def test_what_cannot_be_averaged() -> None:
    told: Any = Told({"a": "click", "b": "rating"}, {})
    with pytest.raises(ModelError, match=r"ensemble: adapters of different tasks or scales \(click, rating\)"):
        Ensemble(told, ["a", "b"])
    with pytest.raises(ModelError, match="ensemble: 1 adapters; expected two or more"):
        Ensemble(told, ["a", "a"])
    with pytest.raises(ModelError, match="ensemble: 1 adapters; expected two or more"):
        Ensemble.from_pretrained(["a"])
    rates: Any = Told({"a": "rating", "b": "rating"}, {"a": [1.0], "b": [2.0]})
    with pytest.raises(ModelError, match="the adapters predict ratings"):
        Ensemble(rates, ["a", "b"]).probability([], ["x"])


def predictions(score: list[float], user: list[int]) -> pl.DataFrame:
    rows = len(score)
    return pl.DataFrame(
        {
            "user_id": user,
            "item_id": list(range(rows)),
            "timestamp": [0] * rows,
            "label": [0, 1] * (rows // 2),
            "split": ["test"] * rows,
            "score": score,
            "score_no_prior": score,
            "baseline/bias": [0.0] * rows,
        }
    )


def test_predictions_of_runs_are_averaged(tmp_path: Path) -> None:
    for name, score in (("a", [0.0, 1.0]), ("b", [2.0, 5.0])):
        (tmp_path / name).mkdir()
        record.write_predictions(tmp_path / name, predictions(score, [1, 1]))
    found = average_predictions([tmp_path / "a", tmp_path / "b"])
    assert found["score"].to_list() == [1.0, 3.0]
    assert found["baseline/run 1"].to_list() == [0.0, 1.0]
    assert found["baseline/run 2"].to_list() == [2.0, 5.0]
    assert "score_no_prior" not in found.columns
    assert found["baseline/bias"].to_list() == [0.0, 0.0]
    (tmp_path / "c").mkdir()
    record.write_predictions(tmp_path / "c", predictions([2.0, 5.0], [1, 2]))
    with pytest.raises(DataError, match="its predictions are of other rows"):
        average_predictions([tmp_path / "a", tmp_path / "c"])
