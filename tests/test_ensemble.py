"""Several adapters as one scorer: means by hand, and what cannot be averaged."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from samples import FILMS
from test_recommender import save_adapter

from peftrec import record
from peftrec.config import Adapter
from peftrec.ensemble import Ensemble, average_predictions
from peftrec.errors import DataError, ModelError
from peftrec.recommender import Recommender


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


def test_the_recipe_measures_the_mean_beside_each_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, score in (("a", [0.0, 1.0, 3.0, 2.0]), ("b", [2.0, 1.0, 0.0, 9.0])):
        (tmp_path / name).mkdir()
        record.write_predictions(tmp_path / name, predictions(score, [1, 1, 2, 2]))
        (tmp_path / name / "config.yaml").write_text("data: {name: ml-100k}\neval: {bootstrap: 5}\noutput_dir: x\n")
    recipe = str(Path(__file__).parents[1] / "recipes" / "ensemble.py")
    monkeypatch.setattr(sys, "argv", [recipe, str(tmp_path / "a"), str(tmp_path / "b")])
    runpy.run_path(recipe, run_name="__main__")
    told = capsys.readouterr().out
    # Four pairs of a like and a dislike, in order by hand: of the means 1, 1, 1.5, 5.5 two and a half.
    assert re.search(r"^adapter +0\.625", told, re.M)
    assert re.search(r"^run 1 +0\.500", told, re.M)
    assert re.search(r"^run 2 +0\.750", told, re.M)
    assert "mean of the scores of 2 runs." in told
    for runs, line in ((["a"], "expected two or more different runs"), (["a", "a"], "two or more different runs")):
        monkeypatch.setattr(sys, "argv", [recipe, *(str(tmp_path / run) for run in runs)])
        with pytest.raises(SystemExit):
            runpy.run_path(recipe, run_name="__main__")
        assert line in capsys.readouterr().err
    (tmp_path / "b/config.yaml").write_text("task: rating\ndata: {name: ml-100k}\noutput_dir: x\n")
    monkeypatch.setattr(sys, "argv", [recipe, str(tmp_path / "a"), str(tmp_path / "b")])
    with pytest.raises(SystemExit):
        runpy.run_path(recipe, run_name="__main__")
    assert "their tasks are click, rating; expected runs of one task" in capsys.readouterr().err


def test_adapters_of_one_base_model_answer_together(tiny_llama_folder: Path, tmp_path: Path) -> None:
    folders = [
        save_adapter(tiny_llama_folder, tmp_path / str(seed), adapter=Adapter(r=4), seed=seed) for seed in (1, 2, 3)
    ]
    options: dict[str, Any] = {"base_model": tiny_llama_folder, "items": FILMS}
    history, films = ["Heat (1995):yes", "Fargo (1996):no"], ["Sabrina (1954)", "187 (1997)", "Babe"]
    alone = [Recommender.from_pretrained(folder, **options).score(history, films) for folder in folders]
    together = Ensemble.from_pretrained(folders, **options)
    assert np.allclose(together.score(history, films), np.mean(alone, axis=0), atol=1e-5)
    assert np.abs(alone[0] - alone[1]).max() > 1e-3
    best = together.rank(history, films, k=1)[0][0]
    assert best == films[int(np.argmax(np.mean(alone, axis=0)))]
    for k in (0, -1, True):
        with pytest.raises(DataError, match="expected a whole number from 1"):
            together.rank(history, films, k=k)
    assert len(together.rank(history, films, k=np.int64(2))) == 2


def test_members_are_loaded_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A revision is one of all members, and so is what they are forgiven."""
    asked: list[dict[str, Any]] = []

    def load_adapter(adapter: str, name: str, **options: Any) -> None:
        asked.append(options)
        raise ModelError("enough")

    first = SimpleNamespace(adapters={"default": None}, load_adapter=load_adapter)
    monkeypatch.setattr(Recommender, "from_pretrained", lambda adapter, **options: first)
    with pytest.raises(ModelError, match="enough"):
        Ensemble.from_pretrained(["a/b", "c/d"], revision="v1", strict=False, dtype="float32")
    assert asked == [{"revision": "v1", "strict": False}]
