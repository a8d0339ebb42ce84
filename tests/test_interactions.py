"""From the user's tables to checked events: what is kept, what is dropped and counted, what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftrec import interactions, sources
from peftrec.catalogue import read_items
from peftrec.config import Data, Split
from peftrec.draws import drawn_order
from peftrec.errors import DataError
from peftrec.interactions import Interactions, sorted_order
from peftrec.split import split as split_log

EVENTS = {
    "user_id": ["b", "a", "b", "c"],
    "item_id": [10, 10, 20, 30],
    "rating": [5.0, 3.0, 4.0, 1.0],
    "timestamp": [300, 100, 200, 400],
}
ITEMS = {"item_id": [30, 20, 10], "title": ["Heat", "Babe", "Toy Story"], "year": [1995, 1995, 1995]}
TIMELESS = Split(kind="kfold")


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes tables as CSV, and gives a Data that names them."""

    def _write(
        events: dict[str, list[Any]] | None = None, items: dict[str, list[Any]] | None = None, **options: Any
    ) -> Data:
        events = EVENTS if events is None else events
        pl.DataFrame(events, strict=False).write_csv(tmp_path / "events.csv")
        if "title" not in events:
            pl.DataFrame(ITEMS if items is None else items).write_csv(tmp_path / "items.csv")
            options = {"items": str(tmp_path / "items.csv"), **options}
        if "label" not in events:
            options = {"like_at": 4, **options}
        return Data(interactions=str(tmp_path / "events.csv"), **options)

    return _write


def load(data: Data, seed: int = 1) -> Interactions:
    return interactions.load(data, seed)


def refused(data: Data) -> str:
    with pytest.raises(DataError) as caught:
        load(data)
    message = str(caught.value)
    assert "\n" not in message
    return message


def changed(**columns: list[Any]) -> dict[str, list[Any]]:
    return {**EVENTS, **columns}


def test_a_small_table_by_hand(write: Any) -> None:
    log = load(write())
    assert log.user_ids.to_list() == ["a", "b", "c"]
    assert log.items["title"].to_list() == ["Heat", "Babe", "Toy Story"]
    assert log.events["user"].to_list() == [1, 0, 1, 2]
    assert log.events["item"].to_list() == [2, 2, 1, 0]
    assert log.events["label"].to_list() == [1, 0, 1, 0]
    assert log.events["rating"].to_list() == [5.0, 3.0, 4.0, 1.0]
    assert log.events["timestamp"].to_list() == [300, 100, 200, 400]
    assert log.warnings == ()
    schema = {name: log.events.schema[name] for name in ("user", "item", "label", "rating", "timestamp")}
    assert schema == {
        "user": pl.Int32, "item": pl.Int32, "label": pl.Int8, "rating": pl.Float32, "timestamp": pl.Int64,
    }  # fmt: skip


def test_other_column_names(write: Any) -> None:
    events = {"uid": EVENTS["user_id"], "movie": EVENTS["item_id"], "stars": EVENTS["rating"], "ts": [3, 1, 2, 4]}
    items = {"movie": ITEMS["item_id"], "name": ITEMS["title"]}
    columns = {"user_id": "uid", "item_id": "movie", "rating": "stars", "timestamp": "ts", "title": "name"}
    log = load(write(events, items, columns=columns))
    assert log.events["label"].to_list() == [1, 0, 1, 0]
    assert log.items.columns == ["item_id", "title"]


def test_titles_may_stand_in_the_interactions(write: Any) -> None:
    log = load(write(changed(title=["Toy Story", "Toy Story", "Babe", "Heat"])))
    assert log.items.rows() == [(10, "Toy Story"), (20, "Babe"), (30, "Heat")]
    assert log.events["item"].to_list() == [0, 0, 1, 2]


def test_a_label_wins_over_a_rating(write: Any) -> None:
    log = load(write(changed(label=["no", "yes", "no", "yes"]), like_at=4))
    assert log.events["label"].to_list() == [0, 1, 0, 1]
    assert "rating" not in log.events.columns
    assert [warning.split(": ")[1] for warning in log.warnings] == [
        "the label column is used; rating and data.like_at are not"
    ]
    alone = {name: values for name, values in changed(label=["no", "yes", "no", "yes"]).items() if name != "rating"}
    assert load(write(alone, rating_range=[1, 5])).warnings[0].endswith("is used; data.rating_range is not")


def test_the_hash_is_of_the_content_and_not_of_the_file(write: Any, tmp_path: Path) -> None:
    csv = load(write())
    pl.DataFrame(EVENTS).write_parquet(tmp_path / "e.parquet")
    pl.DataFrame(ITEMS).write_ndjson(tmp_path / "i.jsonl")
    parquet = load(Data(interactions=str(tmp_path / "e.parquet"), items=str(tmp_path / "i.jsonl"), like_at=4))
    assert parquet.sha256 == csv.sha256
    assert len(csv.sha256) == 64
    for events, items, options in [
        (changed(rating=[5.0, 3.0, 4.0, 2.0]), None, {}),
        (changed(timestamp=[300, 100, 200, 401]), None, {}),
        (changed(user_id=["b", "a", "b", "d"]), None, {}),
        (None, {**ITEMS, "title": ["Heat", "Babe", "Toy Stories"]}, {}),
        (None, {**ITEMS, "title": ["HeatB", "abe", "Toy Story"]}, {}),
        (None, None, {"like_at": 3}),
        (None, None, {"sample_users": 2}),
    ]:
        assert load(write(events, items, **options)).sha256 != csv.sha256
    assert load(write()).sha256 == csv.sha256


def test_duplicates_are_dropped_and_counted(write: Any) -> None:
    rows = {name: [*values, values[0]] for name, values in EVENTS.items()}
    rows["rating"][-1] = 2.0
    log = load(write(rows))
    assert log.events["rating"].to_list() == [3.0, 4.0, 1.0, 2.0]
    assert len(log.warnings) == 1
    assert "1 duplicate rows (same user_id, item_id and timestamp) dropped, the last of each kept" in log.warnings[0]


def test_one_item_at_two_times_is_no_duplicate(write: Any) -> None:
    rows = {name: [*values, values[0]] for name, values in EVENTS.items()}
    rows["timestamp"][-1] = 500
    assert load(write(rows)).events.height == 5


def test_unknown_items_are_dropped_and_counted(write: Any) -> None:
    log = load(write(changed(item_id=[10, 10, 20, 99])))
    assert log.events.height == 3
    assert log.user_ids.to_list() == ["a", "b"]
    assert log.warnings[0].endswith("1 rows of unknown items (such as 99) dropped")
    assert "none of its item ids (such as 98) is in the items table" in refused(
        write(changed(item_id=[98, 97, 96, 95]))
    )


def test_items_without_title_and_twice_the_same_item(write: Any) -> None:
    items = {"item_id": [30, 20, 10, 10, 40], "title": ["Heat", "Babe", "Toy Story", "Toy Story again", None]}
    log = load(write(items=items))
    assert log.items["title"].to_list() == ["Heat", "Babe", "Toy Story"]
    assert log.warnings == (
        "items: 1 rows without title dropped",
        "items: 1 rows with an item_id that came before dropped",
    )


def test_ids_that_are_numbers_in_one_table_and_text_in_the_other_still_meet(write: Any) -> None:
    items = {"item_id": ["30", "20", "10", "x"], "title": ["Heat", "Babe", "Toy Story", "Other"]}
    assert load(write(items=items)).events["item"].to_list() == [2, 2, 1, 0]


def test_unsorted_rows_keep_their_order_and_one_event_is_enough_for_a_user(write: Any) -> None:
    assert load(write()).events["timestamp"].to_list() == [300, 100, 200, 400]


def test_rows_count_as_time_where_the_split_can_do_without(write: Any) -> None:
    rows = {name: values for name, values in EVENTS.items() if name != "timestamp"}
    log = load(write(rows, split=TIMELESS))
    assert log.events["timestamp"].to_list() == [0, 1, 2, 3]
    assert log.warnings[0].endswith("no timestamps: rows are taken to be in order of time")
    log = load(write(changed(timestamp=[1, None, 2, None]), split=TIMELESS))
    assert log.events["timestamp"].to_list() == [0, 1, 2, 3]
    assert log.warnings[0].endswith("2 rows have no timestamp: rows are taken to be in order of time")


def test_without_times_a_repeated_pair_is_a_duplicate(write: Any) -> None:
    rows = {name: [*values, values[0]] for name, values in EVENTS.items() if name != "timestamp"}
    log = load(write(rows, split=TIMELESS))
    assert log.events["timestamp"].to_list() == [0, 1, 2, 3]
    assert "1 duplicate rows (same user_id and item_id) dropped" in log.warnings[1]


def test_a_split_that_needs_times_says_so(write: Any) -> None:
    rows = {("when" if name == "timestamp" else name): values for name, values in EVENTS.items()}
    assert refused(write(rows)).endswith(
        "no column 'timestamp' (found user_id, item_id, rating, when); a temporal split needs it: add it, "
        "or set data.split.kind=kfold"
    )
    rows = {("ts" if name == "timestamp" else name): values for name, values in EVENTS.items()}
    assert "set data.columns.timestamp=ts" in refused(write(rows))
    message = refused(write(changed(timestamp=[1, None, 2, None])))
    assert "2 of 4 rows have no timestamp, the first is row 2; a temporal split needs them" in message


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"rating": [5.0, None, 4.0, 1.0]}, "rating in row 2 is nothing; expected a number"),
        ({"rating": [5.0, float("nan"), 4.0, 1.0]}, "rating in row 2 is 'NaN'; expected a number"),
        ({"rating": ["5", "3", "many", "1"]}, "rating in row 3 is 'many'; expected a number"),
        ({"user_id": ["a", None, "b", "c"]}, "user_id in row 2 is nothing; expected an id"),
        ({"timestamp": [1, 2, "noon", 4]}, "timestamp in row 3 is 'noon'; expected seconds since 1970"),
        ({"label": [0, 1, 2, 1]}, "label in row 3 is '2'; expected 0 or 1"),
    ],
)
def test_a_bad_value_is_named_by_its_row(write: Any, columns: dict[str, list[Any]], expected: str) -> None:
    assert expected in refused(write(changed(**columns)))


def test_ratings_out_of_scale(write: Any) -> None:
    assert load(write(rating_range=[1, 5])).events.height == 4
    message = refused(write(changed(rating=[6.0, 3.0, 4.0, 0.0]), rating_range=[1, 5]))
    assert "rating in row 1 is '6.0' (and in 1 more rows); expected 1 to 5 (data.rating_range)" in message


def test_a_scale_of_tenths_is_what_people_gave(write: Any) -> None:
    """In float32 4.7 is 4.69999980926: that is no answer that anybody gave."""
    found = interactions.load(write(changed(rating=["3.0", "3.1", "4.7", "5.0"]), like_at=None), 1, task="rating")
    assert found.scale == tuple(round(3 + step / 10, 1) for step in range(21))
    log = split_log(found, Split(kind="kfold", folds=2, valid=0.0), 1, answered=False)
    assert sorted(np.asarray(log.scale)[log.label].tolist()) == [3.0, 3.1, 4.7, 5.0]


@pytest.mark.parametrize("like_at", [9, 1])
def test_a_liking_that_tells_no_ratings_apart_is_refused(write: Any, like_at: float) -> None:
    found = interactions.load(write(like_at=like_at), 1, task="rating")
    with pytest.raises(
        DataError, match=rf"data\.like_at: {like_at}; ratings go from 1 to 5, so that .* would be liked"
    ):
        split_log(found, TIMELESS, 1)


def test_what_happened_within_a_second_keeps_its_order(write: Any) -> None:
    rows = changed(
        user_id=["a"] * 4,
        item_id=[10, 20, 10, 30],
        rating=[5.0, 5.0, 1.0, 1.0],
        timestamp=[1_700_000_000_000 + more for more in (900, 100, 300, 5000)],
    )
    found = load(write(rows))
    assert "timestamps are too large for seconds: they are taken for milliseconds" in found.warnings[0]
    # The later answer of the two to one item stays, behind that to the other.
    assert found.items["item_id"].gather(found.events["item"]).to_list() == [20, 10, 30]
    assert found.events["label"].to_list() == [1, 1, 0]
    assert found.events["timestamp"].to_list() == [1_700_000_000] * 2 + [1_700_000_005]
    assert "rating in row 1 is 'many'" in refused(write({**rows, "rating": ["many", "5", "1", "1"]}))  # of the file


def test_ids_are_served_as_they_were_trained(write: Any, tmp_path: Path) -> None:
    """A CSV that pandas wrote."""
    ids = ["1.0", "2.0", "3.0"]
    data = write(
        changed(item_id=["1.0", "1.0", "2.0", "3.0"]), {**ITEMS, "item_id": ids, "year": ["1995.0", None, None]}
    )
    assert load(data).items["item_id"].to_list() == ids
    served = read_items(data.items)
    assert served["item_id"].to_list() == ids
    assert served["year"].to_list() == ["1995", None, None]


def test_titles_of_any_type_that_text_can_stand_for(tmp_path: Path) -> None:
    path = tmp_path / "events.parquet"
    events = pl.DataFrame(EVENTS).with_columns(title=pl.Series(["A", "A", "B", "C"], dtype=pl.Categorical))
    events.write_parquet(path)
    assert load(Data(interactions=str(path), like_at=4)).items["title"].to_list() == ["A", "B", "C"]
    events.with_columns(title=pl.struct(a=1)).write_parquet(path)
    assert "title has the type Struct" in refused(Data(interactions=str(path), like_at=4))


def test_pictures_in_the_items_table_are_left_out(write: Any, tmp_path: Path) -> None:
    data = write()
    items = pl.DataFrame(ITEMS).with_columns(thumb=pl.lit(b"\xff\xd8"), tags=pl.Series([[1], [2], [3]]))
    items.write_parquet(tmp_path / "items.parquet")
    data = dataclasses.replace(data, items=str(tmp_path / "items.parquet"))
    assert load(data).items.columns == ["item_id", "title", "year"]
    with pytest.raises(DataError, match=r"prompt\.item: tags in .* has the type List\(Int64\); expected text"):
        sources.check(data, ["tags"], "click")


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        ({"timestmp": "timestamp"}, "data.columns.timestmp: no column 'timestamp' in"),
        ({"genre": "kind"}, "data.columns.genre: no column 'kind' in"),
        ({"title": "name"}, "data.columns.title: no column 'name' in"),
    ],
)
def test_a_rename_that_leads_nowhere_is_refused(write: Any, columns: dict[str, str], line: str) -> None:
    assert line in refused(write(columns=columns))


def test_ratings_need_to_know_what_is_liked(write: Any) -> None:
    assert "ratings from 1.0 to 5.0 and no labels" in refused(write(like_at=None))


def test_labels_of_one_class_are_refused(write: Any) -> None:
    assert "all 4 rows have label 1; expected both 0 and 1: change data.like_at, which is 1" in refused(
        write(like_at=1)
    )
    assert "all 4 rows have label 0" in refused(write(changed(label=[0, 0, 0, 0])))


def test_missing_columns(write: Any) -> None:
    rows = {"userId": EVENTS["user_id"], "item_id": EVENTS["item_id"], "rating": EVENTS["rating"]}
    assert "no column 'user_id' (found userId, item_id, rating); set data.columns.user_id=userId" in refused(
        write(rows)
    )
    rows = {("stars" if name == "rating" else name): values for name, values in EVENTS.items()}
    assert "no column 'rating' or 'label'" in refused(write(rows))
    assert "such as stars" in refused(write(rows))
    assert "items.csv: no column 'title' (found item_id, name); set data.columns.title=name" in refused(
        write(items={"item_id": [10], "name": ["Toy Story"]})
    )
    assert "no column 'title' (found user_id, item_id, rating, timestamp) and no items table" in refused(
        dataclasses.replace(write(), items=None)
    )


def test_an_empty_table(write: Any) -> None:
    assert "no rows" in refused(write({name: [] for name in EVENTS}))


def test_a_column_can_give_the_split(write: Any) -> None:
    how = Split(kind="column", column="fold")
    log = load(write(changed(fold=["train", "valid", "test", "train"]), split=how))
    assert log.events["split"].to_list() == ["train", "valid", "test", "train"]
    assert "no column 'fold' (found user_id" in refused(write(split=how))


def test_sampling_keeps_whole_users_and_follows_the_seed(write: Any) -> None:
    names = ["e", "a", "d", "b", "c"] * 4
    rows = {
        "user_id": names,
        "item_id": [10, 20, 30] * 6 + [10, 20],
        "label": [0, 1] * 10,
        "timestamp": list(range(20)),
    }
    drawn = set()
    for seed in range(20):
        sample = load(write(rows, sample_users=2), seed)
        kept = sample.user_ids.to_list()
        drawn.add(tuple(kept))
        assert len(kept) == 2
        assert [kept[code] for code in sample.events["user"]] == [name for name in names if name in kept]
        assert sample.items.height == 3
        assert sample.sha256 == load(write(rows, sample_users=2), seed).sha256
    assert len(drawn) > 3


def test_sampling_more_users_than_there_are(write: Any) -> None:
    log = load(write(sample_users=9))
    assert log.events.height == 4
    assert log.warnings == ("data.sample_users: 9 asked for, 3 there: all kept",)


def test_a_seed_draws_the_same_everywhere() -> None:
    drawn = drawn_order(8, 13, "kfold").tolist()
    assert drawn == [2, 0, 4, 6, 5, 7, 3, 1]
    assert drawn != drawn_order(8, 13, "other").tolist()
    assert drawn != drawn_order(8, 14, "kfold").tolist()
    assert sorted(drawn_order(1000, 1, "x")) == list(range(1000))


def test_an_unknown_data_set_is_named_beside_the_known() -> None:
    assert refused(Data(name="ml-1k")).startswith(
        "data.name: no data set 'ml-1k'; expected one of amazon-reviews-2023, "
    )


# --- prompt records ---------------------------------------------------------------------------------------------------

RECORDS = [
    {"instruction": "Will the user like it?", "input": "Liked: Heat. New: Babe", "output": "Yes."},
    {"instruction": "Will the user like it?", "input": "Liked: Babe. New: Heat", "output": "no"},
    {"instruction": "Will the user like it?", "input": None, "output": "NO!"},
]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_prompt_records(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"r{suffix}"
    path.write_text(json.dumps(RECORDS) if suffix == ".json" else "\n".join(map(json.dumps, RECORDS)))
    log = load(Data(records=str(path)))
    assert log.events["label"].to_list() == [1, 0, 0]
    assert log.events["user"].to_list() == [0, 1, 2]
    assert log.events["item"].to_list() == [-1, -1, -1]
    assert log.events["timestamp"].to_list() == [0, 1, 2]
    assert log.events["input"].to_list() == ["Liked: Heat. New: Babe", "Liked: Babe. New: Heat", ""]
    assert log.items.is_empty()


def test_prompt_records_may_name_users_and_times(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps([{**row, "user_id": "u", "timestamp": 9} for row in RECORDS]))
    log = load(Data(records=str(path)))
    assert log.user_ids.to_list() == ["u"]
    assert log.events["timestamp"].to_list() == [9, 9, 9]


def test_one_file_of_records_for_each_split(tmp_path: Path) -> None:
    files = {}
    for split, rows in {"train": RECORDS[:2], "valid": RECORDS[:1], "test": RECORDS[1:]}.items():
        files[split] = str(tmp_path / f"{split}.json")
        Path(files[split]).write_text(json.dumps(rows))
    log = load(Data(records=files))
    assert log.events["split"].to_list() == ["train", "train", "valid", "test", "test"]
    assert log.events["user"].to_list() == [0, 1, 2, 3, 4]


def test_records_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps([*RECORDS, {**RECORDS[0], "output": "Toy Story"}]))
    assert "r.json: output in row 4 is 'Toy Story'; expected 0 or 1" in refused(Data(records=str(path)))
    path.write_text(json.dumps([{"prompt": "a", "input": "b", "answer": "Yes."}]))
    assert refused(Data(records=str(path))).endswith("data.columns.instruction=prompt data.columns.output=answer")
    path.write_text("[]")
    assert "r.json" in refused(Data(records=str(path)))
    path.write_text(json.dumps(RECORDS[1:]))
    assert "all 2 rows have label 0" in refused(Data(records=str(path)))


def test_repeats_are_the_ones_that_a_table_library_finds() -> None:
    rng = np.random.default_rng(0)
    events = pl.DataFrame({name: rng.integers(0, 6, 400) for name in ("user", "item", "timestamp")})
    events = events.with_row_index("rating")
    for key in (["user", "item", "timestamp"], ["user", "item"]):
        table = events.select("rating", *key)
        once = interactions._drop_repeats(table, "my.csv", [])
        assert once.equals(table.unique(key, keep="last", maintain_order=True))
        assert 0 < once.height < 400


@given(
    st.lists(st.tuples(st.integers(-1, 3), st.integers(-4, 4)), max_size=30),
    st.sampled_from([1, 10**9, 2**60]),  # the last does not fit beside a code in one number
)
def test_sorted_order_is_stable_for_times_of_any_unit(rows: list[tuple[int, int]], unit: int) -> None:
    key = np.array([row[0] for row in rows], dtype=np.int32)
    value = np.array([row[1] for row in rows], dtype=np.int64) * unit
    assert sorted_order(key, value).tolist() == sorted(range(len(rows)), key=lambda row: rows[row])
