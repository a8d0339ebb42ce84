"""Rating prediction from tables to a served adapter: scales, answers, random folds, and the recipe as people run it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftrec import Recommender, config, encode, interactions, record, report, scorer, split
from peftrec.catalogue import read_ratings
from peftrec.errors import DataError
from peftrec.split import Log

ROOT = Path(__file__).parents[1]
STARS = (1.0, 2.0, 3.0, 4.0, 5.0)


class TestScale:
    def scale(self, *ratings: float, limits: list[float] | None = None) -> tuple[float, ...]:
        return interactions.rating_scale(pl.Series(ratings, dtype=pl.Float32), "r.csv", limits)

    def test_whole_numbers_fill_their_gaps(self) -> None:
        assert self.scale(1, 2, 5, 4) == STARS

    def test_halves_up_to_the_ends_that_are_known(self) -> None:
        assert self.scale(1.5, 2, 4, limits=[0.5, 5]) == (0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5)

    def test_off_a_grid_only_what_was_given(self) -> None:
        assert self.scale(1, 1.5, 2.2) == pytest.approx((1, 1.5, 2.2))

    def test_too_many_to_be_answers(self) -> None:
        with pytest.raises(DataError, match=r"r.csv: 101 different ratings from 0 to 100; expected at most 26"):
            self.scale(*range(101))

    def test_one_rating_is_none(self) -> None:
        with pytest.raises(DataError, match=r"all 2 ratings are 3; expected at least two different ones"):
            self.scale(3, 3)


class TestAnswers:
    def answers(
        self, tokenizer: Any, scale: tuple[float, ...], given: list[str] | None = None
    ) -> tuple[list[str], str]:
        codec = encode.task_codec(tokenizer, "rating", scale, None, given)
        return codec.answer_texts, codec.header_text

    def test_digits_stand_for_themselves(self, tokenizer: Any) -> None:
        texts, header = self.answers(tokenizer, STARS)
        assert [text.strip() for text in texts] == ["1", "2", "3", "4", "5"]
        assert header == "What this person rated, from 1 to 5:\n"

    @pytest.mark.parametrize("scale", [tuple(k / 2 for k in range(1, 11)), tuple(map(float, range(1, 11)))])
    def test_what_is_no_single_token_is_a_letter(self, tokenizer: Any, scale: tuple[float, ...]) -> None:
        texts, header = self.answers(tokenizer, scale)
        assert [text.strip() for text in texts] == list("ABCDEFGHIJ")
        assert header == f"What this person rated, from A ({scale[0]:g}) to J ({scale[-1]:g}):\n"

    def test_one_for_each_rating(self, tokenizer: Any) -> None:
        with pytest.raises(DataError, match=r"prompt.answers: 2 answers for 5 ratings \(1, 2, 3, 4, 5\); give one"):
            self.answers(tokenizer, STARS, [" no", " yes"])


def rated(log: Log, seed: int) -> Log:
    """The log with ratings on random folds in place of labels in time."""
    random = np.random.default_rng(seed)
    label = random.integers(0, 5, len(log)).astype(np.int8)
    parts = random.permutation(np.arange(len(log)) % 5)
    return dataclasses.replace(
        log,
        label=label,
        rating=(label + 1).astype(np.float32),
        scale=STARS,
        liked_from=3,
        split=np.select([parts == 0, parts == 1], [2, 1], 0).astype(np.int8),
    )


def encoder_of(log: Log, tokenizer: Any, **prompt: Any) -> encode.Encoder:
    prompt = {"max_tokens": 120, "overlap": 20, **prompt}
    return encode.Encoder(log, config.Prompt(**prompt), tokenizer, "isolate", task="rating", shuffle=7)


class TestRandomFolds:
    """A held-out rating is in nobody's history, and a training event sees later ones of its user too."""

    @given(seed=st.integers(0, 999), liked=st.booleans(), layout=st.sampled_from(["timeline", "pointwise"]))
    def test_histories_hold_training_ratings_only(
        self, make_random_log: Callable[..., Log], tokenizer: Any, seed: int, liked: bool, layout: str
    ) -> None:
        log = rated(make_random_log(seed), seed)
        encoder = encoder_of(log, tokenizer, history="liked" if liked else "all", layout=layout)
        held = np.flatnonzero(log.split > 0)
        for data, read in (
            (encoder.train(None), log.split == 0),
            (encoder.evaluate(held, "frozen", None), log.split > 0),
        ):
            windows: Any = data.windows
            asked: list[int] = []
            for index in range(len(windows)):
                arrays, events = windows.arrays(index), windows.events_of(index)
                seen = np.unique(arrays["event"][arrays["visible"] & (arrays["event"] > 0)])
                assert (log.split[events[seen - 1]] == 0).all()
                asked += arrays["row"][arrays["row"] >= 0].tolist()
            assert sorted(asked) == np.flatnonzero(read).tolist()

    def test_no_score_moves_with_a_held_out_rating(
        self, make_random_log: Callable[..., Log], tokenizer: Any, tiny_llama_folder: Path
    ) -> None:
        from peftrec import backbone

        log = rated(make_random_log(4), 4)
        held = np.flatnonzero(log.split > 0)
        other = dataclasses.replace(log, label=np.where(log.split > 0, 4 - log.label, log.label).astype(np.int8))
        changed = dataclasses.replace(log, label=np.where(log.split == 0, 4 - log.label, log.label).astype(np.int8))
        model = backbone.load(config.Model(name=str(tiny_llama_folder), dtype="float32")).model
        model = scorer.answer_only(model, encoder_of(log, tokenizer).codec.answers)
        found = []
        for one in (log, other, changed):
            data = encoder_of(one, tokenizer).evaluate(held, "frozen", None)
            rows, outputs = scorer.score_rows(model, data, range(len(data)))
            found.append(outputs[np.argsort(rows)])
        np.testing.assert_allclose(found[0], found[1], atol=1e-5)
        assert np.abs(found[0] - found[2]).max() > 0.01  # what is in the history does move them

    def test_training_events_see_later_ones(self, make_random_log: Callable[..., Log], tokenizer: Any) -> None:
        log = dataclasses.replace(rated(make_random_log(1, moments=60), 1), timestamp=np.arange(48))
        data = encoder_of(log, tokenizer, max_tokens=500).train(None)
        rows = [data.windows.events_of(index) for index in range(len(data.windows))]  # type: ignore[union-attr]
        assert any((np.diff(one) < 0).any() for one in rows)
        again = encoder_of(log, tokenizer, max_tokens=500).train(None)
        assert [again.windows.events_of(i).tolist() for i in range(len(rows))] == [one.tolist() for one in rows]  # type: ignore[union-attr]


class TestHistory:
    def test_every_way_to_write_one(self) -> None:
        history = ["Heat (1995):4", ("Babe", 2), {"title": "Fargo", "rating": 5.0}, ("Big: the film", "3")]
        found = read_ratings(history, STARS, [" 1", " 2", " 3", " 4", " 5"])
        assert found == [("Heat (1995)", 3), ("Babe", 1), (history[2], 4), ("Big: the film", 2)]

    def test_letters_of_a_scale_of_halves(self) -> None:
        scale = tuple(k / 2 for k in range(1, 11))
        assert read_ratings(["Heat: B", "Heat:4.5"], scale, [f" {c}" for c in "ABCDEFGHIJ"]) == [
            ("Heat", 1),
            ("Heat", 8),
        ]

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ("Heat:4.5", r"history\[0\]: rating '4.5'; expected one of 1, 2, 3, 4, 5"),
            ("Heat:yes", r"history\[0\]: rating 'yes'; expected one of 1, 2"),
            ("Heat", r"history\[0\]: 'Heat'; expected 'title:rating'"),
            (("Heat", True), r"expected 'title:rating'"),
            ({"title": "Heat", "label": 1}, r"expected 'title:rating'"),
        ],
    )
    def test_what_is_no_rating(self, entry: Any, message: str) -> None:
        with pytest.raises(DataError, match=message):
            read_ratings([entry], STARS, [" 1", " 2", " 3", " 4", " 5"])


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 people's half-star ratings of 24 films."""
    folder = tmp_path_factory.mktemp("halves")
    random = np.random.default_rng(5)
    user = np.repeat(np.arange(30), 16)
    film = np.concatenate([random.permutation(24)[:16] for _ in range(30)])
    stars = np.clip(np.round(2 * (3.2 + (film % 5 - 2) * 0.6 + random.normal(size=len(user)))) / 2, 0.5, 5)
    table = {"userId": user, "movieId": film, "rating": stars, "timestamp": 1_000_000 + random.permutation(len(user))}
    pl.DataFrame(table).write_csv(folder / "ratings.csv")
    pl.DataFrame({"movieId": np.arange(24), "title": [f"Film {k}" for k in range(24)]}).write_csv(folder / "movies.csv")
    return folder


def recipe(tables: Path, model: Path, run: Path, **sections: str) -> Path:
    text = {
        "task": "rating",
        "data": f"{{interactions: {tables}/ratings.csv, items: {tables}/movies.csv, columns: {{user_id: userId, "
        "item_id: movieId}, rating_range: [0.5, 5], split: {kind: kfold, folds: 3, valid: 0.1}}",
        "prompt": "{max_tokens: 256, overlap: 32}",
        "model": f"{{name: {model}, dtype: float32}}",
        "adapter": "{method: lora, r: 4}",
        "score": "{prior: mf}",
        "train": "{max_steps: 3, evals: 1, learning_rate: 1.0e-2, order: random, metric_for_best_model: rmse}",
        "eval": "{history: frozen, bootstrap: 20, baselines: [user_mean, item_mean, bias, mf, popularity]}",
        "output_dir": str(run),
        **sections,
    }
    path = run.with_suffix(".yaml")
    path.write_text("\n".join(f"{key}: {value}" for key, value in text.items()))
    return path


def launched(script: str, *arguments: Any, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, ROOT / "recipes" / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


class TestRecipe:
    @pytest.mark.parametrize("prior", ["mf", "bpmf"])
    def test_random_folds_with_a_prior(self, tables: Path, tiny_llama_folder: Path, tmp_path: Path, prior: str) -> None:
        run = tmp_path / "run"
        done = launched("finetune.py", "--config", recipe(tables, tiny_llama_folder, run, score=f"{{prior: {prior}}}"))
        found = record.read_record(run)
        assert found.task == "rating"
        assert {f"test/{name}" for name in ("rmse", "mae", "exact", "uauc", "ndcg@10", "ece")} <= found.metrics.keys()
        assert {"user_mean", "item_mean", "bias", "mf", "popularity", "global_mean"} <= found.baselines.keys()
        for words in ("rated 5 before", "best of 24", "rating  later", "RMSE by slice"):
            assert words in done.stdout
        again = report.compare_run(run).facts()["metrics"]
        assert again["test/rmse"] == pytest.approx(found.metrics["test/rmse"], abs=1e-12)

        table = pl.read_parquet(run / "predictions.parquet").filter(pl.col("split") == "test")
        assert "label" not in table.columns
        assert table["score"].is_between(0.5, 5).all()
        assert set(table["answer"]) <= {k / 2 for k in range(1, 11)}
        error = table["score"] - table["rating"]
        assert found.metrics["test/rmse"] == pytest.approx(float(np.sqrt((error**2).mean())), abs=1e-6)

        # What is served is what was measured: a person's training ratings in, the test row's score out.
        events = pl.read_csv(tables / "ratings.csv")
        served = Recommender.from_pretrained(
            run / "adapter", items=tables / "movies.csv", columns={"item_id": "movieId"}, base_model=tiny_llama_folder
        )
        assert served.artifact.task == "rating"
        assert list(served.target.scale) == [k / 2 for k in range(1, 11)]
        settings = config.load_recipe(run / "config.yaml")
        log = split.split(interactions.load(settings.data, settings.seed, "rating"), settings.data.split, settings.seed)
        assert len(log) == len(events)
        row = int(np.flatnonzero(log.split == split.TEST)[0])
        past = np.flatnonzero((log.user == log.user[row]) & (log.split == split.TRAIN))
        drawn = encode.Encoder(
            log, settings.prompt, served.codec.tokenizer, "isolate", task="rating", shuffle=settings.seed
        )
        (window,) = (
            drawn.evaluate(np.array([row]), "frozen", None).windows.events_of(0),  # type: ignore[union-attr]
        )
        assert sorted(window[:-1].tolist()) == past.tolist()
        ids = log.items["item_id"].to_list()
        history = [(ids[log.item[i]], float(log.rating[i])) for i in window[:-1]]  # type: ignore[index]
        (score,) = served.score(history, [ids[log.item[row]]])
        of_row = table.filter(
            (pl.col("user_id") == log.user_ids[int(log.user[row])]) & (pl.col("item_id") == ids[log.item[row]])
        )
        assert score == pytest.approx(of_row["score"].item(), abs=1e-3)
        best = served.rank(history, k=3)
        assert best[0].score >= best[-1].score
        assert best[0].probability is None
        with pytest.raises(DataError, match="this adapter predicts ratings; use score"):
            served.probability(history, [0])

    @pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
    def test_in_order_of_time_without_a_prior(
        self, tables: Path, tiny_llama_folder: Path, tmp_path: Path, loss: str
    ) -> None:
        data = (
            f"{{interactions: {tables}/ratings.csv, items: {tables}/movies.csv, columns: {{user_id: userId, "
            "item_id: movieId}}"
        )
        path = recipe(
            tables,
            tiny_llama_folder,
            tmp_path / "run",
            data=data,
            score=f"{{loss: {loss}}}",
            train="{max_steps: 2, evals: 1}",
            eval="{history: streaming, bootstrap: 0}",
        )
        launched("finetune.py", "--config", path)
        found = record.read_record(tmp_path / "run")
        assert found.metrics["test/rmse"] < 3
        assert "base_model" in found.baselines

    def test_folds_continue_where_they_were(self, tables: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
        path = recipe(tables, tiny_llama_folder, tmp_path / "cv", score="{prior: bias}")
        launched("folds.py", "--config", path, "--folds", 1)
        first = (tmp_path / "cv/fold-1/run.json").read_text()
        done = launched("folds.py", "--config", path, "--folds", 0, 1)
        assert (tmp_path / "cv/fold-1/run.json").read_text() == first
        assert "this run has ended" in done.stdout
        assert "mean and standard deviation over 2 of 3 folds (0, 1)" in done.stdout
        found = json.loads((tmp_path / "cv/folds.json").read_text())
        assert (found["folds"], found["of"]) == ([0, 1], 3)
        figures = found["scorers"]["adapter"]["test/rmse"]
        runs = [record.read_record(tmp_path / f"cv/fold-{fold}").metrics["test/rmse"] for fold in (0, 1)]
        assert figures["folds"] == runs
        assert figures["mean"] == pytest.approx(np.mean(runs))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--folds", "3"], r"--folds: [3]; expected numbers from 0 to 2 (data.split.folds)"),
            (["--data.split.kind", "cold_user"], "data.split.kind is cold_user; expected kfold"),
        ],
    )
    def test_mistakes_in_folds(
        self, tables: Path, tiny_llama_folder: Path, tmp_path: Path, arguments: list[str], message: str
    ) -> None:
        path = recipe(tables, tiny_llama_folder, tmp_path / "run", data=recipe_data_without_folds(tables))
        if "--folds" in arguments:
            path = recipe(tables, tiny_llama_folder, tmp_path / "run")
        done = launched("folds.py", "--config", path, *arguments, expect=2)
        assert message in done.stderr
        assert not (tmp_path / "run").exists()


def recipe_data_without_folds(tables: Path) -> str:
    return (
        f"{{interactions: {tables}/ratings.csv, items: {tables}/movies.csv, columns: {{user_id: userId, "
        "item_id: movieId}}"
    )
