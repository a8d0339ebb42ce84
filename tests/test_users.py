"""The users table: read beside the events, shown in the prompt, and asked for when an adapter is served."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from peftrec import adapters, artifact, backbone, config, encode, interactions, scorer, sources
from peftrec.datasets import DATASETS
from peftrec.errors import ConfigError, DataError
from peftrec.prompts import user_texts, with_user
from peftrec.recommender import Recommender
from peftrec.split import Log
from peftrec.target import Target

PEOPLE = pl.DataFrame(
    {
        "user_id": ["u0", "u1", "u2", "u3"],
        "age": [24.0, 53.0, None, 33.0],
        "occupation": ["student", "{other}", None, "<s>"],
    }
)
TEMPLATE = "{user} saw {history}And {item}:"
USER = "{age}, {occupation}"


def test_texts() -> None:
    assert user_texts(PEOPLE, USER) == ["24, student", "53, {other}", "", "33, <s>"]
    assert with_user("{user}: {history}{item}", "a {b}").format(history="H ", item="I") == "a {b}: H I"
    with pytest.raises(DataError, match=r"prompt.user: no column 'job' in the users table \(user_id, age, occ"):
        user_texts(PEOPLE, "{job}")


class TestTable:
    def load(self, folder: Path, users: pl.DataFrame, **columns: str) -> interactions.Interactions:
        events = {
            "user_id": [7, 7, 9, 9, 8],
            "item_id": [1, 2, 1, 2, 1],
            "label": [0, 1, 1, 0, 1],
            "timestamp": range(5),
        }
        pl.DataFrame(events).write_csv(folder / "events.csv")
        pl.DataFrame({"item_id": [1, 2], "title": ["Heat", "Babe"]}).write_csv(folder / "items.csv")
        users.write_csv(folder / "users.csv")
        files = {name: str(folder / f"{name}.csv") for name in ("items", "users")}
        data = config.Data(interactions=str(folder / "events.csv"), columns=columns, **files)  # type: ignore[arg-type]
        return interactions.load(data, 13, with_users={"user_id": "prompt.user"})

    def test_one_row_for_each_user(self, tmp_path: Path) -> None:
        found = self.load(tmp_path, pl.DataFrame({"user_id": [9, 5, 7, 7], "age": [20, 30, 40, 50]}))
        assert found.user_ids.to_list() == [7, 8, 9]
        assert found.users is not None
        assert found.users.rows() == [(7, "40"), (8, None), (9, "20")]  # the first of two rows counts, as for items
        assert f"{tmp_path}/users.csv: 1 of 3 users are not in it: nothing is said of them" in found.warnings
        assert f"{tmp_path}/users.csv: 1 rows with a user_id that came before dropped" in found.warnings
        other = self.load(tmp_path, pl.DataFrame({"user_id": [9, 5, 7, 7], "age": [20, 30, 41, 50]}))
        assert other.sha256 != found.sha256

    def test_other_names_and_ids(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"none of the events' user ids \(such as 7\) is in it; .*columns.user_id"):
            self.load(tmp_path, pl.DataFrame({"user_id": ["x"], "age": [20]}))
        with pytest.raises(DataError, match=r"users.csv: no column 'user_id'"):
            self.load(tmp_path, pl.DataFrame({"person": [7], "age": [20]}))

    def test_columns_are_checked_without_reading_rows(self, tmp_path: Path) -> None:
        self.load(tmp_path, pl.DataFrame({"user_id": [7], "age": [20]}))
        data = config.Data(interactions=str(tmp_path / "events.csv"), items=str(tmp_path / "items.csv"))
        data = dataclasses.replace(data, users=str(tmp_path / "users.csv"))
        sources.check(data, ["title"], "click", {"age": "prompt.user"})
        with pytest.raises(DataError, match=r"prompt.user: no column 'agee' in .*users.csv .*; did you mean {age}"):
            sources.check(data, ["title"], "click", {"agee": "prompt.user"})

    def test_of_movielens(self) -> None:
        found = interactions.load(config.Data(name="ml-100k"), 13, with_users={"age": "prompt.user"})
        assert found.users is not None
        assert found.users.columns == ["user_id", "age", "gender", "occupation"]
        assert found.users.row(0) == (1, 24, "man", "technician")
        assert found.users.height == 943
        assert found.users.null_count().sum_horizontal().item() == 0
        assert found.sha256 != interactions.load(config.Data(name="ml-100k"), 13).sha256


class TestRecipe:
    def problems(self, **prompt: Any) -> str:
        values = {"data": {"interactions": "e.csv", "items": "i.csv", "like_at": 4}, "output_dir": "x"}
        values["data"] |= prompt.pop("data", {})
        with pytest.raises(ConfigError) as caught:
            config.parse_recipe({**values, "prompt": {"layout": "pointwise", **prompt}}, "r")
        return str(caught.value)

    def test_what_belongs_together(self) -> None:
        users = {"users": "u.csv"}
        assert "prompt.user: '{age}'; no {user} in prompt.template" in self.problems(
            user="{age}", data={"users": "u.csv"}
        )
        assert "prompt.user: missing; the template shows {user}" in self.problems(template=TEMPLATE)
        assert "data.users: missing; prompt.user shows columns of it" in self.problems(template=TEMPLATE, user="{age}")
        assert "data.users: does nothing under prompt.user: null" in self.problems(data=users)
        assert "prompt.user: does nothing under prompt.layout: timeline" in self.problems(
            layout="timeline", user="{age}"
        )
        assert "prompt.template: {foo} in it; expected" in self.problems(template="{foo} {history} {item}")


def people(log: Log) -> Log:
    return dataclasses.replace(log, users=PEOPLE)


def test_what_a_prompt_shows(make_random_log: Callable[..., Log], tokenizer: Any) -> None:
    log = people(make_random_log(3))
    prompt = config.Prompt(layout="pointwise", template=TEMPLATE, user=USER, max_tokens=80)
    encoder = encode.Encoder(log, prompt, tokenizer, "isolate")
    windows: Any = encoder.evaluate(np.flatnonzero(log.split > 0), "streaming", None).windows
    starts = {0: "24, student saw", 1: "53, {other} saw", 2: " saw", 3: "33, < s> saw"}
    seen = set()
    for index in range(len(windows)):
        arrays = windows.arrays(index)
        assert len(arrays["input_ids"]) <= 80
        user = int(log.user[arrays["row"].max()])
        assert tokenizer.decode(arrays["input_ids"]).removeprefix("<s>").startswith(starts[user])
        seen.add(user)
    assert seen == {0, 1, 2, 3}


def test_a_served_adapter_asks_the_same(
    make_random_log: Callable[..., Log], tiny_llama_folder: Path, tmp_path: Path
) -> None:
    log = people(make_random_log(3, moments=30))
    prompt = {"layout": "pointwise", "template": TEMPLATE, "user": USER, "max_tokens": 100}
    values = {
        "data": {"name": "ml-100k"},
        "prompt": prompt,
        "model": {"name": str(tiny_llama_folder), "dtype": "float32"},
        "output_dir": "x",
    }
    recipe = config.parse_recipe({**values, "score": {"head": "linear"}}, "r")
    target = Target(head="linear", offset=(0.0,))
    loaded = backbone.load(recipe.model, target)
    encoder = encode.Encoder(log, recipe.prompt, loaded.tokenizer, "isolate")
    model = adapters.attach(loaded.model, config.Adapter(r=4), base_name="tiny", seed=1)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    rows = np.flatnonzero(log.split > 0)
    data = encoder.evaluate(rows, "streaming", None)
    asked, outputs = scorer.score_rows(model, data, range(len(data)))
    adapters.save(model, tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    about = artifact.describe(
        recipe,
        encoder.codec,
        loaded.base,
        target,
        data_name="films",
        data_sha256="0",
        like_at=None,
        max_item_tokens=encoder.max_item_tokens,
        example=encoder.example(),
        template=encoder.template,
    )
    artifact.write(tmp_path, about, None)
    recommender = Recommender.from_pretrained(tmp_path, base_model=tiny_llama_folder, items=log.items, dtype="float32")
    differences = []
    for row, output in list(zip(asked.tolist(), outputs[:, 0], strict=True))[:5]:
        past = [i for i in range(row) if log.user[i] == log.user[row] and log.timestamp[i] < log.timestamp[row]]
        history = [(f"i{log.item[i]}", int(log.label[i])) for i in past]
        person = PEOPLE.row(int(log.user[row]), named=True)
        (score,) = recommender.score(history, [f"i{log.item[row]}"], person)
        assert score == pytest.approx(float(output), abs=1e-4)
        (text,) = recommender.score(history, [f"i{log.item[row]}"], user_texts(pl.DataFrame([person]), USER)[0])
        assert text == score
        differences.append(abs(score - recommender.score(history, [f"i{log.item[row]}"])[0]))
    assert max(differences) > 0.01
    told = recommender.score(history, ["i1"], MappingProxyType(person))
    np.testing.assert_array_equal(told, recommender.score(history, ["i1"], person))
    with pytest.raises(DataError, match="user: a Series; expected a dict of columns, or the text"):
        recommender.score(history, ["i1"], pl.Series([30]))
    best = recommender.rank(history, k=8, exclude_seen=False, user=person)
    ids = [one.item_id for one in best]
    np.testing.assert_allclose([one.score for one in best], recommender.score(history, ids, person), atol=1e-5)
    plain = dataclasses.replace(about, prompt=dataclasses.replace(about.prompt, user=None, template="{history}{item}:"))
    with pytest.raises(DataError, match="user: this adapter's prompt shows nothing of the person; leave it out"):
        Recommender(plain, recommender.model, loaded.tokenizer).score([], ["Heat"], {"age": 3})


def test_a_data_set_that_tells_nothing_of_its_users(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = dataclasses.replace(DATASETS["ml-100k"], read_users=None)
    monkeypatch.setitem(DATASETS, "ml-100k", silent)
    with pytest.raises(
        DataError, match=r"data\.name: ml-100k tells nothing of its users; leave prompt\.user and eval\.user_groups out"
    ):
        sources.check(config.Data(name="ml-100k"), of_users={"age": "prompt.user"})
    sources.check(config.Data(name="ml-100k"))
