"""Ready-made prompts as events: what they tell, who may know it, and what is asked."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from peftrec import config, interactions, opponents, retrieval, sources
from peftrec.errors import ConfigError, DataError
from peftrec.record_events import events_of
from peftrec.sight import evaluation_sight, training_sight
from peftrec.split import TEST, TRAIN, VALID, Log, split

MARKS = config.Data().record_marks


def record(liked: list[str], disliked: list[str], target: str, answer: str = "Yes.", **more: Any) -> dict[str, Any]:
    first, second = (", ".join(f'"{title}"' for title in titles) for titles in (liked, disliked))
    told = f"User Preference: {first}\nUser Unpreference: {second}\n"
    asked = f'Whether the user will like the target movie "{target}"?'
    return {"instruction": "Answer Yes or No.", "input": told + asked, "output": answer, **more}


def taken(*records: dict[str, Any]) -> tuple[pl.DataFrame, pl.DataFrame]:
    table = pl.DataFrame(records).with_columns(label=(pl.col("output") == "Yes.").cast(pl.Int8))
    return events_of(table, "r.json", 0, MARKS)


def test_what_records_tell() -> None:
    events, items = taken(record(["Heat"], ["Babe", "187"], "Big"), record([], [], "Heat", "No."))
    assert events["user_id"].to_list() == [1, 1, 1, 1, 2]
    assert dict(events.head(3).select("item_id", "label").iter_rows()) == {"Heat": 1, "Babe": 0, "187": 0}
    assert events.filter("target").select("item_id", "label").rows() == [("Big", 1), ("Heat", 0)]
    assert events["target"].to_list() == [False, False, False, True, True]
    assert events["timestamp"].is_sorted()
    assert events["timestamp"].is_unique().all()
    assert sorted(items["title"]) == ["187", "Babe", "Big", "Heat"]
    assert items["item_id"].equals(items["title"], check_names=False)


def test_the_order_of_told_titles_is_drawn_by_the_text() -> None:
    titles = [f"Film {number}" for number in range(10)]
    events, _ = taken(*(record(titles[:5], titles[5:], f"Film {10 + number}") for number in range(40)))
    orders = [tuple(part["item_id"])[:10] for part in events.partition_by("user_id", maintain_order=True)]
    assert len(set(orders)) > 30
    # Liked titles are as often in front as behind: a list's place would tell the answer.
    liked = events.filter(~pl.col("target"))["label"].to_numpy().reshape(40, 10)
    assert liked[:, :5].mean() == pytest.approx(0.5, abs=0.08)
    again, _ = taken(record(titles[:5], titles[5:], "Film 39"), record(titles[:5], titles[5:], "Film 10"))
    assert tuple(again["item_id"])[11:21] == orders[0]


@pytest.mark.parametrize(
    ("title", "written"),
    [
        ("Postman, The (Postino, Il) (1994)", '"Postman, The (Postino, Il) (1994)"'),
        ('The "Real" Thing', '"The "Real" Thing"'),
        ("What? No!", '"What? No!"'),
        ("Emma", '"Emma" written by Jane Austen'),
    ],
)
def test_titles_with_marks_in_them(title: str, written: str) -> None:
    one = record([], [], "Heat")
    told = f'User Preference: {written}, "Babe"\nUser Unpreference: {written}\n'
    one["input"] = f"{told}Whether the user will like the target book {written}?"
    events, _ = taken(one)
    assert sorted(events["item_id"]) == sorted([title, title, title, "Babe"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Liked: Heat. New: Babe",
            "r.json: input of record 2: no title behind 'Whether the user will like the target'",
        ),
        ('User Preference: Heat, Babe\nWhether the user will like the target "Big"', "record 2: 'Heat, Babe' behind"),
        ('User Preference: "Heat"\nWhether the user will like the target movie Big?', "record 2: 'movie Big?' behind"),
    ],
)
def test_records_that_tell_nothing(text: str, expected: str) -> None:
    with pytest.raises(DataError) as error:
        taken(record(["Heat"], [], "Big"), {**record([], [], "x"), "input": text})
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_times_of_records_order_them() -> None:
    events, _ = taken(record(["a"], [], "b", timestamp=9), record(["c"], [], "d", timestamp=3))
    assert events.sort("timestamp")["item_id"].to_list() == ["c", "d", "a", "b"]


FILES = {
    "train": [record(["Heat", "Big"], ["Babe"], "187"), record(["Babe"], ["Heat"], "Big", "No.")],
    "valid": [record(["Heat"], ["Babe"], "Big"), record(["187"], ["Heat"], "Babe", "No.")],
    "test": [record(["Heat"], ["Big"], "Babe"), record(["Babe"], ["187"], "Big", "No."), record([], [], "187")],
}


def recipe_of(folder: Path, files: dict[str, Any], **sections: Any) -> config.Recipe:
    named = {}
    for name, records in files.items():
        named[name] = str(folder / f"{name}.json")
        Path(named[name]).write_text(json.dumps(records))
    data = {"records": named, "records_as": "events"}
    return config.parse_recipe({"data": data, "output_dir": "x", **sections}, "x.yaml")


def log_of(recipe: config.Recipe) -> Log:
    return split(interactions.load(recipe.data, recipe.seed), recipe.data.split, recipe.seed)


def test_a_test_record_reports_its_target_alone(tmp_path: Path) -> None:
    log = log_of(recipe_of(tmp_path, FILES))
    titles = np.array(log.items["title"].to_list())
    assert len(log.rows(TRAIN)) == 4 + 3
    assert len(log.rows(VALID)) == 3 + 3
    assert titles[log.item[log.rows(TEST)]].tolist() == ["Babe", "Big", "187"]
    assert log.label[log.rows(TEST)].tolist() == [1, 0, 1]
    assert log.keep(log.split == TEST).rows(TEST).tolist() == [2, 5, 6]
    # The model reads what the record tells, and is asked for the target.
    sight = evaluation_sight(log, log.rows(TEST), streaming=True)
    assert sight.row[sight.read].tolist() == log.rows(TEST).tolist()
    assert np.bincount(sight.user)[-3:].tolist() == [3, 3, 1]
    learned = training_sight(log)
    assert learned.row.tolist() == log.rows(TRAIN).tolist()
    assert learned.read.all()


@pytest.mark.parametrize("prior", ["bias", "mf", "bpmf"])
def test_what_a_record_tells_is_known_of_its_person_alone(tmp_path: Path, prior: str) -> None:
    """Answers of other test records, told or asked for, change nothing."""
    names = ["item_mean", "bias", "mf", "popularity"]
    recipe = recipe_of(tmp_path, FILES, score={"prior": prior}, eval={"baselines": names})
    others = {
        **FILES,
        "test": [FILES["test"][0], record(["187", "Big"], ["Babe"], "Heat"), record(["Big"], [], "Babe")],
    }
    told = {**FILES, "test": [record(["Big", "Heat"], [], "Babe"), *FILES["test"][1:]]}
    log = log_of(recipe)
    row = int(log.rows(TEST)[0])
    before = opponents.measure(log, recipe)
    after = opponents.measure(log_of(recipe_of(tmp_path, others)), recipe)
    for name in (*names, "global_mean"):
        assert after.scores[name][row] == before.scores[name][row], name
    own = opponents.measure(log_of(recipe_of(tmp_path, told)), recipe)
    assert own.prior is not None
    assert before.prior is not None
    assert after.prior is not None
    assert after.prior[row] == before.prior[row]
    assert own.prior[row] != before.prior[row]
    # A saved prior answers as the run did.
    ids = log.items["item_id"].to_list()
    history = [ids[log.item[i]] for i in (row - 2, row - 1)]
    assert before.saved_prior is not None
    served = before.saved_prior.scores(history, log.label[row - 2 : row].tolist(), [ids[log.item[row]]])
    assert served[0] == pytest.approx(before.prior[row], abs=1e-5)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"task": "rating"}, "data.records_as: events; records tell of likes, not of ratings; set task: click"),
        ({"eval": {"history": "frozen"}}, "eval.history: frozen; it hides what a record tells of its person"),
        ({"data": {"records": "a.json", "records_as": "events"}}, "data.split.kind: temporal; it would cut records"),
        (
            {"data": {"records": "a.json", "record_marks": {"liked": "a", "disliked": "b", "target": "c"}}},
            "data.record_marks: does nothing under data.records_as: prompts",
        ),
        (
            {"data": {"records": "a.json"}, "prompt": {"layout": "pointwise"}, "eval": {"baselines": ["mf"]}},
            "eval.baselines: does nothing under data.records: a.json",
        ),
        (
            {"data": {"name": "ml-100k", "records_as": "events"}},
            "data.records_as: does nothing under data.name: ml-100k",
        ),
        (
            {"data": {"records": "a.json", "records_as": "events", "record_marks": {"liked": "a"}}},
            "data.record_marks: {'liked': 'a'}; expected the three words liked, disliked and target",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        recipe_of(tmp_path, FILES, **values)
    assert [line for line in str(error.value).splitlines() if line.startswith(f"x.yaml: {expected}")], error.value


def test_a_record_without_the_words_is_seen_before_all_are_read(tmp_path: Path) -> None:
    marks = {**MARKS, "target": "Will they like"}
    recipe = recipe_of(tmp_path, FILES)
    sources.check(recipe.data)
    with pytest.raises(DataError, match=r"train\.json: input of record 1: no title behind 'Will they like'"):
        sources.check(dataclasses.replace(recipe.data, record_marks=marks))


def test_one_file_is_cut_by_whole_records(tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    path.write_text(json.dumps([record([f"a{n}"], [f"b{n}"], f"c{n % 3}", ["Yes.", "No."][n % 2]) for n in range(20)]))
    data = {"records": str(path), "records_as": "events", "split": {"kind": "cold_user", "valid": 0.2, "test": 0.2}}
    log = log_of(config.parse_recipe({"data": data, "output_dir": "x"}, "x.yaml"))
    assert [len(log.rows(part)) for part in (TRAIN, VALID, TEST)] == [12 * 3, 4 * 3, 4]
    assert all(len(np.unique(log.split[log.user == user])) == 1 for user in range(20))


def test_targets_are_ranked_and_what_is_told_is_not(tmp_path: Path) -> None:
    """The liked title that a test record tells last is no held-out item, and candidates may be reported."""
    log = log_of(recipe_of(tmp_path, {**FILES, "test": [*FILES["test"], record(["Heat"], [], "Big", "No.")]}))
    questions = retrieval.draw(log, 9, None, "streaming", 1)
    assert questions.row.tolist() == [int(log.rows(TEST)[0])]  # liked, and behind something told
    rows, places = retrieval.as_rows(log, questions)
    assert set(places.tolist()) <= set(rows.rows(TEST).tolist())
    assert rows.asked is not None
    assert len(rows.asked) == len(rows)
