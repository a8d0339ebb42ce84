"""Side vectors: what they hold and must not know, the soft token, and what an adapter keeps of them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import conftest
import numpy as np
import polars as pl
import pytest
import torch
from safetensors.numpy import load_file, save_file
from test_docs import ROOT, blocks

from peftrec import (
    Recommender,
    adapters,
    artifact,
    backbone,
    cli,
    config,
    contents,
    encode,
    rating_baselines,
    scorer,
    side,
    side_als,
    side_files,
    side_vectors,
)
from peftrec.errors import ConfigError, DataError, ModelError
from peftrec.schema import parse_yaml
from peftrec.side_vectors import Asked
from peftrec.split import Log
from peftrec.target import Target

SHIPPED = "recipes/configs/ml-100k/click_side.yaml"
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-4}


def a_recipe(base: Path | str = "tiny", **sections: Any) -> config.Recipe:
    found = {
        "data": {"name": "ml-100k"},
        "prompt": {"max_tokens": 512, "overlap": 64, "header": conftest.HEADER},
        "model": {"name": str(base), "dtype": "float32"},
        "adapter": {"r": 4},
        "output_dir": "x",
    }
    return config.parse_recipe({**found, **sections}, "r")


def a_log(seed: int = 5, **changed: Any) -> Log:
    """Six people with ten events each, ties among them; items 6 and 7 are never in training."""
    log = conftest.random_log(seed, users=6, events=10)
    item = np.where((log.split == 0) & (log.item > 5), log.item - 6, log.item).astype(np.int32)
    return dataclasses.replace(log, item=item, **changed)


def vectors_file(folder: Path, ids: list[Any], size: int = 3, key: str = "item_id") -> str:
    values = np.random.default_rng(1).normal(size=(len(ids), size))
    pl.DataFrame({key: ids, "vector": values.tolist()}).write_parquet(folder / f"{key}.parquet")
    return str(folder / f"{key}.parquet")


def stir(module: torch.nn.Module) -> None:
    """Move everything that trains away from its start, as training does."""
    torch.manual_seed(3)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)


class Run:
    """A tiny model with an adapter and side vectors, as the recipe puts them together."""

    def __init__(self, base: Path, log: Log, *, stirred: bool = True, **sections: Any) -> None:
        self.log, self.recipe = log, a_recipe(base, **sections)
        self.loaded = backbone.load(self.recipe.model, Target())
        self.vectors = side_vectors.of_run(log, self.recipe)
        self.encoder = self.encoder_with(self.vectors)
        model = scorer.with_head(self.loaded.model, "tokens", self.encoder.codec.answers)
        self.model = adapters.attach(model, self.recipe.adapter, base_name="tiny", seed=3, steps=100)
        side.attach(self.model, self.vectors, self.recipe.side, 2, seed=3)
        if stirred:
            stir(self.model)

    def encoder_with(self, vectors: Any, **prompt: Any) -> encode.Encoder:
        prompt_ = dataclasses.replace(self.recipe.prompt, **prompt)
        return encode.Encoder(self.log, prompt_, self.loaded.tokenizer, "isolate", side=vectors)

    def outputs(self, encoder: encode.Encoder | None = None, rows: Any = None) -> np.ndarray:
        rows = np.flatnonzero(self.log.split > 0) if rows is None else rows
        data = (encoder or self.encoder).evaluate(np.asarray(rows), self.recipe.eval.history, None)
        found, outputs = scorer.score_rows(self.model, data, range(len(data)))
        return outputs[np.argsort(found)]

    def save(self, folder: Path) -> Path:
        adapters.save(self.model, folder)
        self.loaded.tokenizer.save_pretrained(folder)
        about = artifact.describe(
            self.recipe,
            self.encoder.codec,
            self.loaded.base,
            Target(),
            data_name="films",
            data_sha256="0",
            like_at=None,
            max_item_tokens=self.encoder.max_item_tokens,
            example=self.encoder.example(),
            side=list(self.vectors.sources),
        )
        artifact.write(folder, about, None)
        side.save(self.model, folder, self.vectors.sources)
        return folder

    def load(self, folder: Path, **options: Any) -> Recommender:
        return Recommender.from_pretrained(
            folder, items=self.log.items, base_model=self.recipe.model.name, device="cpu", **options
        )


@pytest.fixture(scope="module")
def run(tiny_llama_folder: Path) -> Run:
    return Run(tiny_llama_folder, a_log(), side={"als": True})


@pytest.fixture(scope="module")
def saved(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run.save(tmp_path_factory.mktemp("run") / "adapter")


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_keys_without_vectors_and_what_goes_without_saying() -> None:
    with pytest.raises(ConfigError, match=r"side.dropout: does nothing under side.als: false"):
        a_recipe(side={"dropout": 0.2})
    assert "side" not in config.recipe_to_dict(a_recipe())
    assert config.recipe_to_dict(a_recipe(side={"items": ["a.npz", "b.npz"]}))["side"] == {
        "items": ["a.npz", "b.npz"],
        "hidden_size": 64,
        "dropout": 0.1,
    }


def test_encoders_are_refused(tiny_bert_folder: Path) -> None:
    recipe = a_recipe(tiny_bert_folder, side={"als": True}, score={"head": "linear"}, prompt={"layout": "pointwise"})
    with pytest.raises(ConfigError, match=r"side: .* is an encoder, which reads texts as a whole; set a causal model"):
        backbone.check(recipe)


# --- files ------------------------------------------------------------------------------------------------------------


def test_three_kinds_of_file_say_the_same(tmp_path: Path) -> None:
    path = vectors_file(tmp_path, [7, 3])
    ids, vectors = side_files.read_vectors(path, "item_id")
    assert ids == ["7", "3"]
    np.savez(tmp_path / "v.npz", item_id=np.array([7, 3]), vector=vectors)
    save_file({"item_id": np.array([7, 3]), "vector": vectors}, tmp_path / "numbers.safetensors")
    text = np.frombuffer(json.dumps(["7", "3"]).encode(), dtype=np.uint8)
    save_file({"item_id": text, "vector": vectors}, tmp_path / "texts.safetensors")
    for name in ("v.npz", "numbers.safetensors", "texts.safetensors"):
        same, equal = side_files.read_vectors(str(tmp_path / name), "item_id")
        assert same == ids
        np.testing.assert_array_equal(equal, vectors)


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        ({"item_id": [1, 2], "vector": [[1.0, 2.0], [3.0]]}, "vectors of 1 to 2 numbers"),
        ({"item_id": [1, 1], "vector": [[1.0], [2.0]]}, "item_id '1' is there twice"),
        ({"item_id": [1, 2], "vector": [[1.0], [float("nan")]]}, "1 vectors with a number that is not finite"),
        ({"id": [1, 2], "vector": [[1.0], [2.0]]}, "cannot be read"),
        ({"item_id": [1, 2], "vector": [1.0, 2.0]}, "2 ids and vectors of shape (2,)"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, columns: dict[str, Any], line: str) -> None:
    pl.DataFrame(columns).write_parquet(tmp_path / "v.parquet")
    with pytest.raises(DataError) as caught:
        side_files.read_vectors(str(tmp_path / "v.parquet"), "item_id")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_other_items_and_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"v.npz: no such file; expected a .parquet"):
        side_files.read_vectors("v.npz", "item_id")
    (tmp_path / "v.csv").write_text("item_id,vector\n")
    with pytest.raises(DataError, match=r"v.csv: unknown kind of file '.csv'"):
        side_files.read_vectors(str(tmp_path / "v.csv"), "item_id")
    recipe = a_recipe(side={"items": vectors_file(tmp_path, ["x", "y"])})
    with pytest.raises(DataError, match=r"none of its ids \(such as 'x'\) is one of the data \(such as 'i0'\)"):
        side_vectors.of_run(a_log(), recipe)


# --- collaborative vectors --------------------------------------------------------------------------------------------


def fitted(log: Log, history: Any = "streaming") -> side_als.Fitted:
    return side_als.fit(log, "click", history, "isolate", 13)


@pytest.mark.parametrize("history", ["streaming", "frozen"])
def test_vectors_hold_what_matrix_factorisation_says(history: Any) -> None:
    """Mean, effect, intercept and products of an evaluated row add up to its prediction."""
    log = a_log()
    found = fitted(log, history)
    values = found.factors.values
    answers = dataclasses.replace(log, rating=values[log.label].astype(np.float32), scale=tuple(values.tolist()))
    told = rating_baselines.predict(answers, history, "isolate", "time", found.settings, 13, names=("mf",)).scores["mf"]
    k = found.settings.factors
    vectors = found.evaluation.astype(float)
    assert vectors.shape == (len(log), 3 * k + 3)
    held = log.split > 0
    np.testing.assert_allclose(np.clip(found.factors.items.mean + vectors[:, -1], *values)[held], told[held], atol=1e-5)
    total = vectors[:, 0] + vectors[:, 1 + k] + vectors[:, 2 + 2 * k : -1].sum(axis=1)
    np.testing.assert_allclose(vectors[:, -1], total, atol=1e-5)
    of_item, of_person = vectors[:, 1 : 1 + k], vectors[:, 2 + k : 2 + 2 * k]
    np.testing.assert_allclose(vectors[:, 2 + 2 * k : -1], of_item * of_person, atol=1e-6)
    assert (found.in_evaluation == (log.item < 6)).all()


def test_no_training_vector_knows_its_answer_or_a_later_one() -> None:
    """Answers of one person from a moment on are turned round: what that person's events up to it show stays."""
    log = a_log(split=np.zeros(60, dtype=np.int8))

    def told(labels: Any) -> np.ndarray:
        # As ratings, because clicks are scaled by the deviation of everybody's answers.
        found = side_als.fit(dataclasses.replace(log, label=labels), "rating", "streaming", "isolate", 13)
        k = found.settings.factors
        # Effect, intercept and what all adds up to: these do not depend on which way the factors are turned.
        return found.training[:, [0, 1 + k, -1]]

    before = told(log.label)
    for row in (0, 4, 13, 27):
        own = log.user == log.user[row]
        turned = np.where(own & (log.timestamp >= log.timestamp[row]), 1 - log.label, log.label).astype(np.int8)
        after = told(turned)
        upto = own & (log.timestamp <= log.timestamp[row])
        np.testing.assert_allclose(after[upto], before[upto], atol=1e-5)
        assert np.abs(after - before)[own & (log.timestamp > log.timestamp[row])].max() > 1e-3


def test_one_person_has_nobody_to_learn_from() -> None:
    log = a_log()
    alone = dataclasses.replace(log, split=np.where(log.user == 0, log.split, 2).astype(np.int8))
    with pytest.raises(DataError, match=r"side.als: no item has training events of two groups of people"):
        side_vectors.of_run(alone, a_recipe(side={"als": True}))


def test_a_stranger_is_read_as_in_evaluation() -> None:
    """Of a person without training events, a history and candidates give the vectors of the log's rows."""
    log = a_log()
    split = np.where(log.user == 2, 2, log.split).astype(np.int8)
    log = dataclasses.replace(log, split=split, timestamp=np.arange(60))
    found = fitted(log)
    rows = np.flatnonzero(log.user == 2)
    known = np.where(found.in_evaluation, log.item, -1)[rows]
    given = found.factors.vectors(known[:7], log.label[rows[:7]].tolist(), known[7:8])
    kept = known[:8] >= 0
    np.testing.assert_allclose(given[kept], found.evaluation[rows[:8]][kept], atol=1e-5)
    assert not given[0, 1 + found.settings.factors : -1].any()  # the first event knows nothing of the person


# --- the soft token ---------------------------------------------------------------------------------------------------


def test_training_starts_from_the_plain_prompt(tiny_llama_folder: Path) -> None:
    made = Run(tiny_llama_folder, a_log(), stirred=False, side={"als": True})
    np.testing.assert_array_equal(made.outputs(), made.outputs(made.encoder_with(None)))


METHODS = ["lora", "bottleneck", "prefix", "prompt", "p_tuning", "ia3", "ln_tuning", "adalora"]


@pytest.mark.parametrize("method", METHODS)
def test_packed_equals_one_prompt_each(tiny_llama_folder: Path, method: str) -> None:
    made = Run(tiny_llama_folder, a_log(), adapter={"method": method}, side={"als": True, "hidden_size": 8})
    packed = made.outputs()
    single = made.outputs(made.encoder_with(made.vectors, layout="pointwise"))
    np.testing.assert_allclose(packed, single, **CLOSE)
    assert np.abs(packed - made.outputs(made.encoder_with(None))).max() > 0.01


def test_switched_off_it_is_text(run: Run) -> None:
    with side.off():
        np.testing.assert_array_equal(run.outputs(), run.outputs(run.encoder_with(None)))


def test_events_without_vectors_are_text(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """Vectors of items 0 and 1 only: who met neither, and is asked for neither, is scored as without side vectors."""
    log = a_log()
    made = Run(tiny_llama_folder, log, side={"items": vectors_file(tmp_path, ["i0", "i1"])})
    touched = np.array(
        [
            np.isin(log.item[(log.user == log.user[r]) & (log.timestamp < log.timestamp[r])], [0, 1]).any()
            or log.item[r] < 2
            for r in range(60)
        ]
    )
    ours, plain = made.outputs(rows=np.arange(60)), made.outputs(made.encoder_with(None), rows=np.arange(60))
    np.testing.assert_allclose(ours[~touched], plain[~touched], **CLOSE)
    assert (~touched).sum() > 5
    assert np.abs(ours[touched] - plain[touched]).max() > 0.01


def test_sources_add_up_and_people_have_vectors_too(tiny_llama_folder: Path, tmp_path: Path) -> None:
    log = a_log()
    files = {
        "items": [vectors_file(tmp_path, [f"i{n}" for n in range(8)])],
        "users": vectors_file(tmp_path, ["u0", "u1"], key="user_id"),
    }
    made = Run(tiny_llama_folder, log, side={**files, "als": True})
    assert list(made.vectors.sources) == ["als", "items_0", "users"]
    before = made.outputs(rows=np.arange(60))
    projectors = side.of(made.model).projectors  # type: ignore[union-attr]
    projectors["users"][2].weight.data.zero_()
    moved = np.abs(made.outputs(rows=np.arange(60)) - before).max(axis=1) > 1e-4
    assert moved[log.user < 2].all()
    assert not moved[log.user >= 2].any()
    folder = made.save(tmp_path / "adapter")
    assert set(load_file(folder / side_vectors.FILE)) >= {"users.mean", "items_0.vector", "als.fit"}
    assert "users.vector" not in load_file(folder / side_vectors.FILE)


def test_a_readout_adds_what_the_vectors_say(tiny_llama_folder: Path) -> None:
    """With projectors at zero an output is the text's, plus the network of this very event's vector, plus nothing."""
    made = Run(tiny_llama_folder, a_log(), stirred=False, side={"als": True, "hidden_size": 8})
    network = side.of(made.model).readouts["als"]  # type: ignore[union-attr]
    stir(network)
    rows = np.flatnonzero(made.log.split > 0)
    numbers, (part,) = made.vectors.evaluation[rows], made.vectors.table.parts.values()
    row = np.where(numbers > 0, part.row[np.searchsorted(made.vectors.table.numbers, numbers)], -1)
    with torch.no_grad():
        said = network(torch.from_numpy(part.vectors[row])).numpy() * (row >= 0)[:, None]
    assert (row < 0).any()
    assert np.abs(said).max() > 0.1
    np.testing.assert_allclose(made.outputs(), made.outputs(made.encoder_with(None)) + said, **CLOSE)


def test_training_moves_projectors_and_not_the_base(tiny_llama_folder: Path, tmp_path: Path) -> None:
    made = Run(tiny_llama_folder, a_log(), stirred=False, side={"als": True, "dropout": 0.5})
    trained = {name for name, p in made.model.named_parameters() if p.requires_grad}
    frozen = {name: p.clone() for name, p in made.model.named_parameters() if name not in trained}
    assert sum(f"side.{kind}.als" in name for kind in ("projectors", "readouts") for name in trained) == 6
    data = made.encoder.train(None)
    optimizer = torch.optim.SGD([p for p in made.model.parameters() if p.requires_grad], lr=1.0)
    made.model.train()
    for _ in range(2):
        batch = scorer.collate([data[0]])
        scorer.interaction_loss(made.model, batch, torch.float32, Target(), 1).backward()
        optimizer.step()
    weight = side.of(made.model).projectors["als"][2].weight  # type: ignore[union-attr]
    assert weight.abs().max() > 1e-4
    for name, parameter in made.model.named_parameters():
        if name in frozen:
            torch.testing.assert_close(parameter, frozen[name], rtol=0, atol=0)
    adapters.save_checkpoint(made.model, tmp_path)
    kept = weight.clone()
    weight.data.zero_()
    adapters.load_checkpoint(made.model, tmp_path)
    torch.testing.assert_close(weight, kept, rtol=0, atol=0)


def test_every_event_dropped_is_text(tiny_llama_folder: Path) -> None:
    made = Run(tiny_llama_folder, a_log(), side={"als": True, "dropout": 0.999999})
    batch = scorer.collate([made.encoder.evaluate(np.arange(60), "streaming", None)[0]])
    plain = scorer.collate([made.encoder_with(None).evaluate(np.arange(60), "streaming", None)[0]])
    made.model.train()
    dropped, text = (scorer.read_outputs(made.model, one, torch.float32) for one in (batch, plain))
    torch.testing.assert_close(dropped, text)


# --- saved ------------------------------------------------------------------------------------------------------------


def met(log: Log, row: int) -> list[tuple[str, int]]:
    before = np.flatnonzero((log.user == log.user[row]) & (np.arange(len(log)) < row))
    return [(f"i{log.item[one]}", int(log.label[one])) for one in before]


def test_a_saved_adapter_scores_as_the_run_did(tiny_llama_folder: Path, tmp_path: Path) -> None:
    log = a_log()
    log = dataclasses.replace(log, split=np.where(log.user == 2, 2, 0).astype(np.int8), timestamp=np.arange(60))
    made = Run(tiny_llama_folder, log, side={"als": True})
    rows = np.flatnonzero(log.user == 2)
    expected = made.outputs(rows=rows)
    recommender = made.load(made.save(tmp_path / "adapter"))
    row = int(rows[-1])
    for kept, one in enumerate(rows.tolist()):
        score = recommender.score(met(log, one), [f"i{log.item[one]}"])
        np.testing.assert_allclose(score, expected[kept, 1] - expected[kept, 0], **CLOSE)
    # One by one, together, several people at once, and behind a kept history: the same.
    every = [f"i{code}" for code in range(8)]
    alone = np.concatenate([recommender.score(met(log, row), [one]) for one in every])
    np.testing.assert_allclose(recommender.score(met(log, row), every), alone, **CLOSE)
    asked: list[Any] = [{"history": met(log, one), "candidates": every} for one in (row - 1, row)]
    found = recommender.score_many(asked)
    np.testing.assert_allclose(found[1], alone, **CLOSE)
    with scorer.continued_histories():
        grown = [recommender.score(one["history"], every) for one in asked]
    np.testing.assert_allclose(np.concatenate(grown), np.concatenate(found), **CLOSE)


def test_histories_of_one_text_and_other_vectors_are_kept_apart(run: Run, saved: Path) -> None:
    """Two items of one title: a kept history must not serve for the other one's."""
    twins = run.log.items.with_columns(title=pl.lit("Heat"))
    recommender = Recommender.from_pretrained(saved, items=twins, base_model=run.recipe.model.name)
    asked = [[("i0", 1), ("i1", 0)], [("i2", 1), ("i1", 0)]]
    alone = [recommender.score(history, ["i3"]) for history in asked]
    with scorer.continued_histories():
        kept = [recommender.score(history, ["i3"]) for history in asked]
    np.testing.assert_allclose(kept, alone, **CLOSE)
    assert abs(alone[0] - alone[1]) > 1e-4


def test_an_unknown_item_is_its_text(run: Run, saved: Path) -> None:
    recommender = run.load(saved)
    with side.off():
        text = recommender.score([], ["i0", "i7", "Another film"])
    found = recommender.score([], ["i0", "i7", "Another film"])
    np.testing.assert_allclose(found[1:], text[1:], **CLOSE)  # i7 was in no training event
    assert abs(found[0] - text[0]) > 0.001


def test_a_fresh_process_answers_the_probes(run: Run, saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "adapter"))
    (tmp_path / "config.yaml").write_text(config.dump_recipe(run.recipe))
    recommender = run.load(folder)
    titles = run.log.items["title"].to_list()
    told = [(titles[0], 1), (titles[3], 0)]
    ids = recommender.item_ids([(title, "yes") for title, _ in told], [titles[2]])
    assert ids == ["i0", "i3", "i2"]
    (score,) = recommender.score([(titles[0], "yes"), (titles[3], "no")], [titles[2]])
    about = artifact.read(folder)
    assert about.side == ["als"]
    artifact.write(folder, dataclasses.replace(about, probes=[artifact.Probe(told, titles[2], score, ids)]), None)
    done = subprocess.run(
        [sys.executable, "-m", "peftrec.reload", str(folder)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    np.testing.assert_allclose(json.loads(done.stdout.splitlines()[-1]), [score], **CLOSE)
    with side.off():
        assert abs(recommender.score([(titles[0], "yes"), (titles[3], "no")], [titles[2]])[0] - score) > 0.001


def test_people_are_told_by_their_vector(tiny_llama_folder: Path, tmp_path: Path) -> None:
    path = vectors_file(tmp_path, [f"u{n}" for n in range(6)], key="user_id")
    made = Run(tiny_llama_folder, a_log(), side={"users": path})
    recommender = made.load(made.save(tmp_path / "adapter"))
    _, vectors = side_files.read_vectors(path, "user_id")
    plain, one, two = (
        recommender.score([("i0", 1)], ["i1"], user)
        for user in (None, {"vector": vectors[0].tolist()}, {"vector": vectors[1].tolist()})
    )
    assert len({round(float(score[0]), 3) for score in (plain, one, two)}) == 3
    best = recommender.rank([("i0", 1)], k=2, user={"vector": vectors[1].tolist()}, shortlist=4)
    exact = recommender.score([("i0", 1)], [film.item_id for film in best], {"vector": vectors[1].tolist()})
    np.testing.assert_allclose([film.score for film in best], exact, **CLOSE)
    with pytest.raises(DataError, match=r"user: a vector of shape \(2,\); expected 3 finite numbers"):
        recommender.score([], ["i1"], {"vector": [1, 2]})
    with pytest.raises(DataError, match=r"user: {'age': 3}; this adapter knows people by a vector"):
        recommender.score([], ["i1"], {"age": 3})


def test_no_question_needs_no_vector(run: Run) -> None:
    table, numbers = side_vectors.number(run.vectors.sources, [Asked([None], [1], [None])])
    assert [one.tolist() for one in numbers] == [[0, 0]]
    assert side_vectors.number(run.vectors.sources, [])[1] == []
    assert table.numbers.tolist() == [0]


def test_the_folder_may_be_published_and_a_broken_one_not(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "adapter"))
    assert not [line for line in contents.check_folder(folder) if "side" in line]
    whole = load_file(folder / side_vectors.FILE)
    for broken, line in (
        ({**whole, "als.mean": whole["als.mean"][:-1]}, "not what a run wrote (ValueError"),
        ({**whole, "als.fit": np.array([0.5, -1.0, 2.0])}, "als with other numbers than its fit has"),
        ({name: one for name, one in whole.items() if name != "als.item_id"}, "not what a run wrote (KeyError"),
    ):
        save_file(broken, folder / side_vectors.FILE)
        assert [one for one in contents.check_folder(folder) if line in one]
    text = whole["als.item_id"].tobytes().replace(b'"i0"', b'"/home/me/0.png"')
    save_file({**whole, "als.item_id": np.frombuffer(text, dtype=np.uint8)}, folder / side_vectors.FILE)
    assert [one for one in contents.check_folder(folder) if "a local path, '/home/me/0.png'" in one]
    (folder / side_vectors.FILE).unlink()
    assert [one for one in contents.check_folder(folder) if "no such file, though the adapter has side vectors" in one]


def test_projectors_of_another_model(run: Run, saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "adapter"))
    whole = load_file(folder / side_vectors.FILE)
    last = "projector.als.2.weight"
    save_file({**whole, last: whole[last][:5]}, folder / side_vectors.FILE)
    with pytest.raises(
        ModelError, match=r"side.safetensors: its projectors do not fit this base model \(.*size mismatch"
    ):
        run.load(folder)


def test_an_adapter_without_readouts_is_read_as_it_was(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """Adapters of earlier days have projectors alone."""
    made = Run(tiny_llama_folder, a_log(), side={"als": True})
    folder = made.save(tmp_path / "adapter")
    asked = [("i0", 1), ("i1", 0)], ["i2", "i3"]
    both = made.load(folder).score(*asked)
    whole = load_file(folder / side_vectors.FILE)
    old = {name: tensor for name, tensor in whole.items() if not name.startswith("projector.readout.")}
    assert len(whole) - len(old) == 3
    save_file(old, folder / side_vectors.FILE)
    for parameter in side.of(made.model).readouts.parameters():  # type: ignore[union-attr]
        parameter.data.zero_()
    without = made.load(made.save(tmp_path / "zero")).score(*asked)
    np.testing.assert_array_equal(made.load(folder).score(*asked), without)
    assert np.abs(np.subtract(both, without)).max() > 0.01


def test_an_export_cannot_hold_them(saved: Path, tmp_path: Path, exports: list[Callable[..., Any]]) -> None:
    for export in exports:
        with pytest.raises(ModelError, match=r"side vectors, which only peftrec can add; serve it with peftrec"):
            export(saved, tmp_path / "out")


@pytest.fixture
def exports() -> list[Callable[..., Any]]:
    from peftrec import export

    return [export.merged, export.for_vllm]


def test_the_page(tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/side-vectors.md: its files fit its recipe, and what was trained on them is asked as it says."""
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "side-vectors.md"
    write, ask, ask_with_vector = (compile(block, "page", "exec") for block in blocks(page, "python"))
    (told,) = (parse_yaml(block)["side"] for block in blocks(page, "yaml"))
    exec(write, {})
    assert cli.main(["validate", str(ROOT / SHIPPED), "--side.items", "my-data/graph.parquet"]) == 0
    assert cli.main(["validate", str(ROOT / SHIPPED), "--side.items", "my-data/no.parquet"]) == cli.REFUSED
    log = a_log()
    numbered = log.items.with_columns(item_id=pl.Series(range(1, 9)))
    log = dataclasses.replace(log, items=numbered, user_ids=pl.Series("user_id", range(1, 7)))
    for name, how in (("runs/ml-100k-click-side", {"als": True}), ("runs/side", told)):
        made = Run(tiny_llama_folder, log, side=how)
        made.save(tmp_path / name / "adapter")
    assert list(made.vectors.sources) == ["als", "items_0", "items_1", "users"]
    monkeypatch.setattr(
        Recommender,
        "from_pretrained",
        partial(Recommender.from_pretrained, items=numbered, base_model=tiny_llama_folder),
    )
    for block in (ask, ask_with_vector):
        found: dict[str, Any] = {}
        exec(block, found)
        assert found["recommender"].artifact.side is not None
