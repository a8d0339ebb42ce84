"""Vectors of texts are those of transformers, whatever the batch; they are kept; files hold them with their ids."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from saved import save_adapter, save_run
from test_encoders import shape_of

from peftrec import cli, config, embeddings, vector_files
from peftrec.embeddings import Embedder, Reading
from peftrec.errors import DataError, ModelError
from peftrec.vector_files import VectorTable

ROOT = Path(__file__).parents[1]
TEXTS = ["Heat (1995)", "Toy Story", "What's Up, Doc? (1972)", "Film 12", "Heat (1995)"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PEFTREC_HOME", str(home))
    return home / "vectors"


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, shape, tokenizer = shape_of("t5")
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(1)
    kind(shape).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def passes(embedder: Embedder) -> list[int]:
    """Filled with the number of texts of each forward pass from now on."""
    found: list[int] = []
    embedder.trunk.register_forward_pre_hook(
        lambda _, __, given: found.append(len(given["input_ids"])), with_kwargs=True
    )
    return found


# --- vectors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "pooling", "layer"),
    [
        ("tiny_llama_folder", "mean", -1),
        ("tiny_llama_folder", "last", 1),
        ("tiny_llama_folder", "mean", 0),
        ("tiny_gpt2_folder", "last", -1),
        ("tiny_bert_folder", "mean", -1),
        ("tiny_bert_folder", "cls", 1),
        ("t5", "mean", -1),
    ],
)
def test_vectors_are_those_of_transformers(
    folder: str, pooling: Any, layer: int, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoModel, AutoTokenizer

    place = request.getfixturevalue(folder)
    model, tokenizer = AutoModel.from_pretrained(place).eval(), AutoTokenizer.from_pretrained(place)
    expected = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            read = (model.encoder if folder == "t5" else model)(input_ids=ids, output_hidden_states=True)
        hidden = (read.hidden_states[layer] if layer else model.get_input_embeddings()(ids))[0]
        expected.append({"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling].detach().numpy())
    embedder = Embedder.from_pretrained(place, Reading(pooling, layer, normalize=False))
    found = embedder.embed(TEXTS, batch_tokens=64)
    assert found.shape == (5, embedder.size)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(found[0], found[4])
    unit = embedder.reads(Reading(pooling, layer)).embed(TEXTS)
    np.testing.assert_allclose(unit, found / np.linalg.norm(found, axis=1, keepdims=True), atol=1e-5)


def test_a_long_text_is_cut_and_special_tokens_stay_text(tiny_llama_folder: Path) -> None:
    embedder = Embedder.from_pretrained(tiny_llama_folder, Reading(layer=0, max_tokens=3))
    long, short, special, written = embedder.embed(["7 7 7 7 7", "7 7", "</s>", "< /s>"])
    np.testing.assert_allclose(long, short, atol=1e-6)
    np.testing.assert_array_equal(special, written)


def test_batches_hold_their_tokens(tiny_llama_folder: Path) -> None:
    embedder = Embedder.from_pretrained(tiny_llama_folder)
    sizes = passes(embedder)
    embedder.embed([f"{n} " * 5 for n in range(10)], batch_tokens=40, cache=False)
    assert sum(sizes) == 10
    assert len(sizes) > 2
    whole = passes(embedder)
    embedder.embed([f"{n} " * 5 for n in range(10)], cache=False)
    assert whole == [10]


@pytest.mark.parametrize(
    ("reading", "message"),
    [
        (Reading("cls"), r"pooling: 'cls'; .* is a causal model: expected mean or last"),
        (Reading(layer=3), r"layer: 3; .* has 2 layers: expected -3 to 2"),
        (Reading(max_tokens=0), "max_tokens: 0; expected a whole number from 1"),
        (Reading(max_tokens=5000), "this LlamaModel takes up to 2048 tokens"),
    ],
)
def test_readings_that_do_not_fit(tiny_llama_folder: Path, reading: Reading, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Embedder.from_pretrained(tiny_llama_folder, reading)


def test_an_empty_text_is_refused(tiny_llama_folder: Path) -> None:
    with pytest.raises(DataError, match=r"texts\[1\]: ' '; expected a text that is not empty"):
        Embedder.from_pretrained(tiny_llama_folder).embed(["Heat", " "])


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_an_adapter_changes_the_layers_and_not_the_embedding_matrix(tiny_llama_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_run(tiny_llama_folder, run)
    assert embeddings.is_adapter(str(run))
    assert not embeddings.is_adapter(str(tiny_llama_folder))
    assert not embeddings.is_adapter("all-minilm-l6-v2")
    assert not embeddings.is_adapter("nowhere/nothing")  # and no network to ask
    base, adapted = (Embedder.from_pretrained(one) for one in (tiny_llama_folder, run))
    assert np.abs(base.embed(TEXTS) - adapted.embed(TEXTS)).max() > 0.01
    first = Reading(layer=0)
    np.testing.assert_array_equal(base.reads(first).embed(TEXTS), adapted.reads(first).embed(TEXTS))


def test_virtual_tokens_are_refused(tiny_llama_folder: Path, tmp_path: Path) -> None:
    how = config.Adapter(method="prefix", num_virtual_tokens=2)
    folder = save_adapter(tiny_llama_folder, tmp_path / "adapter", how)
    with pytest.raises(ModelError, match=r"virtual tokens .*\(prefix_tuning\).*; embed with its base model"):
        Embedder.from_pretrained(folder, base_model=tiny_llama_folder)
    with pytest.raises(ModelError, match="no base model to exchange"):
        Embedder.from_pretrained(tiny_llama_folder, base_model=tiny_llama_folder)


# --- the cache --------------------------------------------------------------------------------------------------------


def test_what_was_read_is_not_read_again(tiny_llama_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "BLOCK", 2)
    embedder = Embedder.from_pretrained(tiny_llama_folder)
    sizes = passes(embedder)
    first = embedder.embed(TEXTS)
    assert sum(sizes) == 4  # one text stands there twice
    np.testing.assert_array_equal(embedder.embed(TEXTS), first)
    assert sum(sizes) == 4
    embedder.embed([*TEXTS, "Sabrina", "187"])  # only the new block
    assert sum(sizes) == 6
    embedder.reads(Reading(pooling="last")).embed(TEXTS[:2])
    assert sum(sizes) == 8
    for path in cache.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:20])
    np.testing.assert_array_equal(embedder.embed(TEXTS), first)
    assert sum(sizes) == 12


def test_processes_share_the_blocks(tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "BLOCK", 1)
    embedder = Embedder.from_pretrained(tiny_llama_folder)
    whole = embedder.embed(TEXTS, cache=False)
    done: list[int] = []
    half = embedder.embed(TEXTS, share=(0, 2), progress=done.append)
    assert (half != 0).any(axis=1).tolist() == [True, False, True, False, True]
    np.testing.assert_array_equal(embedder.embed(TEXTS, share=(1, 2)), whole)  # the others' are in the cache by now
    assert done == [1, 1, 1, 1]


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v.parquet", "v.safetensors"])
@pytest.mark.parametrize("ids", [pl.Series("item_id", [3, 1, 2]), pl.Series("user_id", ["ü", "b", "3"])])
def test_files_hold_vectors_and_ids(tmp_path: Path, name: str, ids: pl.Series) -> None:
    vectors = np.arange(6, dtype=np.float32).reshape(3, 2)
    vector_files.write(tmp_path / name, VectorTable(ids, vectors, {"model": "tiny"}))
    found = vector_files.read(tmp_path / name)
    assert found.ids.to_list() == ids.to_list()
    assert found.ids.name == ids.name
    np.testing.assert_array_equal(found.vectors, vectors)
    assert found.about == {"model": "tiny"}
    np.testing.assert_array_equal(found.of(ids.reverse(), "x"), vectors[::-1])
    with pytest.raises(DataError, match="x: no vectors of 1 of 1 ids, such as '9'"):
        found.of(pl.Series([9]), "x")
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_files_that_are_none(tmp_path: Path) -> None:
    pl.DataFrame({"item_id": [1, 1], "vector": [[1.0], [2.0]]}).write_parquet(tmp_path / "twice.parquet")
    pl.DataFrame({"item_id": [1, 2], "vector": [[1.0], [2.0, 3.0]]}).write_parquet(tmp_path / "ragged.parquet")
    pl.DataFrame({"id": [1]}).write_parquet(tmp_path / "other.parquet")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for name in ("twice.parquet", "ragged.parquet", "other.parquet", "broken.safetensors"):
        with pytest.raises(DataError, match=f"{name}: cannot be read as vectors"):
            vector_files.read(tmp_path / name)
    with pytest.raises(DataError, match="no such file; expected vectors as"):
        vector_files.read(tmp_path / "none.parquet")
    with pytest.raises(DataError, match="expected a name that ends in"):
        vector_files.check_path(tmp_path / "v.csv")
    with pytest.raises(DataError, match="there is no folder"):
        vector_files.check_path(tmp_path / "deep" / "v.parquet")


# --- the verb ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an items table, a log and a users table."""
    monkeypatch.chdir(tmp_path)
    pl.DataFrame({"movie": ["a", "b", "c"], "title": ["Heat", "Toy Story", "187"]}).write_csv("items.csv")
    pl.DataFrame(
        {"uid": ["u", "u", "u", "v", "w"], "movie": list("abcab"), "rating": [4, 5, 1, 1, 4], "ts": [1, 2, 3, 1, 1]}
    ).write_csv("log.csv")
    pl.DataFrame({"uid": ["u", "v"], "age": [30, None], "job": ["cook", None]}).write_csv("users.csv")
    return tmp_path


COLUMNS = ("--columns", "item_id=movie", "user_id=uid", "timestamp=ts")


def test_items_by_the_verb_and_by_the_recipe(
    place: Path, tiny_bert_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(tiny_bert_folder), "--items", "items.csv", "--item", "{title}", *COLUMNS[:2]]
    assert cli.main(["embed", *words, "--output", "v.parquet"]) == 0
    assert "v.parquet: 3 items, 32 dimensions" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["embed.py", *words, "--output", "v.safetensors"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(ROOT / "recipes" / "embed.py"), run_name="__main__")
    one, other = vector_files.read("v.parquet"), vector_files.read("v.safetensors")
    assert one.ids.to_list() == other.ids.to_list() == ["a", "b", "c"]
    np.testing.assert_array_equal(one.vectors, other.vectors)
    expected = Embedder.from_pretrained(tiny_bert_folder).embed(["Heat", "Toy Story", "187"])
    np.testing.assert_array_equal(one.vectors, expected)
    assert one.about["pooling"] == "mean"
    assert json.loads(json.dumps(dict(one.about)))["model"] == tiny_bert_folder.name


def test_users_as_means_and_as_texts(place: Path, tiny_bert_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    users = [str(tiny_bert_folder), "--items", "items.csv", "--of", "users", "--history", "log.csv", *COLUMNS]
    users += ["--like-at", "4", "--output", "u.parquet"]
    heat, toy, _ = Embedder.from_pretrained(tiny_bert_folder).embed(["Heat", "Toy Story", "187"])
    assert cli.main(["embed", *users, "--no-normalize"]) == 0
    assert "2 users, 32 dimensions" in (said := capsys.readouterr().out)
    assert "1 of whom nothing is known are left out" in said
    found = vector_files.read("u.parquet")
    assert found.ids.to_list() == ["u", "w"]
    raw = Embedder.from_pretrained(tiny_bert_folder, Reading(normalize=False)).embed(["Heat", "Toy Story"])
    np.testing.assert_allclose(found.vectors[0], (raw[0] + 2 * raw[1]) / 3, atol=1e-5)  # 4 counts 1, 5 counts 2
    assert cli.main(["embed", *users, "--half-life", "1"]) == 0
    halved = 0.25 * heat + 2 * 0.5 * toy  # two events and one event before the last one
    np.testing.assert_allclose(vector_files.read("u.parquet").vectors[0], halved / np.linalg.norm(halved), atol=1e-5)
    template = ["--profile", "text", "--users", "users.csv", "--user", "{job} {age} likes {liked}"]
    assert cli.main(["embed", *users, *template]) == 0, capsys.readouterr().err
    texts = ["cook 30 likes Toy Story; Heat", "likes Toy Story"]
    expected = Embedder.from_pretrained(tiny_bert_folder).embed(texts)
    np.testing.assert_allclose(vector_files.read("u.parquet").vectors, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--history", "log.csv"], "--history: means nothing to items; add --of users"),
        (["--of", "users"], "--of users: no --history"),
        (["--of", "users", "--history", "log.csv", "--user", "{age}"], "{age} is no column of items.csv"),
        (["--of", "users", "--history", "log.csv", "--user", "none"], "shows nothing of a person"),
        (["--of", "users", "--history", "log.csv", "--like-at", "9"], "expected both 0 and 1"),
        (["--of", "users", "--history", "log.csv", "--like-at", "4", "--half-life", "0"], "half_life: 0.0; expected"),
        (["--batch-tokens", "0"], "--batch-tokens: 0; expected a whole number from 1"),
        (["--item", "{titel}"], "no column 'titel'"),
        (["--pooling", "last"], "is an encoder: expected mean or cls"),
        (["--output", "v.csv"], "expected a name that ends in"),
    ],
)
def test_mistakes_are_one_line(
    place: Path, tiny_bert_folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = ["embed", str(tiny_bert_folder), "--items", "items.csv", "--output", "v.parquet", *COLUMNS]
    assert cli.main([*begin, *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not Path("v.parquet").exists()
