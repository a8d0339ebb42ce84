"""Reading sources and parsing columns, each form once and each mistake once."""

from __future__ import annotations

import gzip
import json
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftrec import tables
from peftrec.errors import DataError

ROWS = {"user_id": ["007", "b"], "item_id": [1, 2], "rating": [3.5, 4.0]}


def read(path: Path) -> pl.DataFrame:
    return tables.collect(tables.scan(str(path)), str(path))


def one_line(call: Any, *args: Any) -> str:
    with pytest.raises(DataError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".jsonl", ".ndjson", ".json", ".csv.gz"])
def test_every_kind_of_file_gives_the_same_table(tmp_path: Path, suffix: str) -> None:
    frame, path = pl.DataFrame(ROWS), tmp_path / f"t{suffix}"
    if suffix == ".csv.gz":
        path.write_bytes(gzip.compress(frame.write_csv().encode()))
    elif suffix in (".csv", ".tsv"):
        frame.write_csv(path, separator="\t" if suffix == ".tsv" else ",")
    elif suffix == ".parquet":
        frame.write_parquet(path)
    elif suffix == ".json":
        frame.write_json(path)
    else:
        frame.write_ndjson(path)
    table = read(path)
    assert table.columns == list(ROWS)
    assert tables.parse_ids(table["user_id"], "t", "user_id").to_list() == ["007", "b"]
    assert tables.parse_ids(table["item_id"], "t", "item_id").to_list() == [1, 2]
    assert tables.parse_numbers(table["rating"], "t", "rating").to_list() == [3.5, 4.0]


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_the_header_tells_the_separator(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "t.csv"
    pl.DataFrame(ROWS).write_csv(path, separator=separator)
    assert read(path).columns == list(ROWS)


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    assert "no such file" in one_line(tables.scan, str(tmp_path / "absent.csv"))
    assert "a folder" in one_line(tables.scan, str(tmp_path))
    for name, content, expected in [
        ("empty.csv", b"", "the file is empty"),
        ("header.csv", b"user_id,item_id\n", "no rows"),
        ("t.xlsx", b"PK", "unknown kind of file '.xlsx'"),
        ("t.parquet", b"not parquet", "cannot be read"),
        ("t.jsonl", b'{"a": 1}\n{"a": \n', "line 2 is not a JSON object"),
        ("t.json", b"[{]", "cannot be read"),
        ("latin.csv", "user_id,title\n1,Misérables\n".encode("latin-1"), "UTF-8"),
    ]:
        path = tmp_path / name
        path.write_bytes(content)
        message = one_line(read, path)
        assert message.startswith(str(path))
        assert expected in message


def test_a_hub_id_is_loaded_by_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = {}

    def load_dataset(name: str, **options: Any) -> datasets.Dataset:
        asked.update(options, name=name)
        return datasets.Dataset.from_dict(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    table = tables.scan("someone/ratings:test", "v1").collect()
    assert asked == {"name": "someone/ratings", "split": "test", "revision": "v1"}
    assert table["rating"].to_list() == [3.5, 4.0]


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(name: str, **options: Any) -> None:
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub\nRetry?")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = one_line(tables.scan, "someone/ratings")
    assert message.startswith("someone/ratings: the Hub gave no such data set (Couldn't reach")


def test_missing_columns_are_named_together_with_the_nearest() -> None:
    found = ["userId", "movieId", "stars", "when"]
    message = one_line(tables.match_columns, found, "r.csv", {}, ["user_id", "item_id"])
    assert message == (
        "r.csv: no columns 'user_id', 'item_id' (found userId, movieId, stars, when); "
        "set data.columns.user_id=userId data.columns.item_id=movieId"
    )
    message = one_line(tables.match_columns, found, "r.csv", {"user_id": "userid"}, ["user_id"])
    assert message.endswith("set data.columns.user_id=userId")
    message = one_line(tables.match_columns, ["a"], "r.csv", {}, ["title"])
    assert message.endswith("rename the column, or set data.columns.title=<column>")


def test_a_renamed_optional_column_must_be_there() -> None:
    assert tables.match_columns(["u"], "r.csv", {"user_id": "u"}, ["user_id"], ["rating"]) == {"user_id": "u"}
    assert "'stars'" in one_line(
        tables.match_columns, ["user_id"], "r.csv", {"rating": "stars"}, ["user_id"], ["rating"]
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["1", "20"], [1, 20]),
        (["1", "020"], ["1", "020"]),
        (["0451526538", "080442957X"], ["0451526538", "080442957X"]),
        ([1.0, 2.0], [1, 2]),
        ([2**63], ["9223372036854775808"]),
        (["-5", "0"], [-5, 0]),
    ],
)
def test_ids_are_numbers_only_where_nothing_is_lost(values: list[Any], expected: list[Any]) -> None:
    assert tables.parse_ids(pl.Series(values), "t", "user_id").to_list() == expected


def test_other_types_of_ids() -> None:
    assert tables.parse_ids(pl.Series(["a", "b"], dtype=pl.Categorical), "t", "user_id").to_list() == ["a", "b"]
    assert tables.parse_ids(pl.Series([1, 2], dtype=pl.UInt8), "t", "user_id").dtype == pl.Int64
    assert "type List" in one_line(tables.parse_ids, pl.Series([[1]]), "t", "user_id")


@pytest.mark.parametrize("values", [["a", None], ["a", ""], [1, None], [1.0, float("nan")], [1.0, 1.5], [1.0, 1e20]])
def test_an_id_that_is_missing_or_no_id_is_named_by_its_row(values: list[Any]) -> None:
    assert "t: user_id in row 2 is " in one_line(tables.parse_ids, pl.Series(values), "t", "user_id")


@given(st.lists(st.text(min_size=1), min_size=1))
def test_no_two_ids_become_one(values: list[str]) -> None:
    assert tables.parse_ids(pl.Series(values), "t", "user_id").n_unique() == len(set(values))


@pytest.mark.parametrize("bad", ["good", "", None, "nan", "inf"])
def test_a_number_that_is_none_is_named_by_its_row(bad: str | None) -> None:
    message = one_line(tables.parse_numbers, pl.Series(["1", bad, bad], dtype=pl.String), "t", "rating")
    assert message.startswith("t: rating in row 2 is ")
    assert "(and in 1 more rows); expected a number" in message


def test_nan_and_null_are_no_numbers() -> None:
    for bad in (float("nan"), None, float("inf")):
        assert "row 2" in one_line(tables.parse_numbers, pl.Series([1.0, bad]), "t", "rating")
    assert "type List" in one_line(tables.parse_numbers, pl.Series([[1.0]]), "t", "rating")


@pytest.mark.parametrize(
    "values",
    [["Yes.", "no"], [" YES!", "No."], [True, False], [1, 0], [1.0, 0.0], ["1", "0"], ["True", "FALSE"]],
)
def test_labels_in_every_form(values: list[Any]) -> None:
    labels = tables.parse_labels(pl.Series(values), "t")
    assert labels.dtype == pl.Int8
    assert labels.to_list() == [1, 0]


@pytest.mark.parametrize("values", [[1, 2], [0.0, 0.5], ["yes", "maybe"], ["yes", None], [True, None], [1.0, None]])
def test_a_label_that_is_none_is_named_by_its_row(values: list[Any]) -> None:
    message = one_line(tables.parse_labels, pl.Series(values), "t", "output")
    assert message.startswith("t: output in row 2 is ")


HOUR = timedelta(hours=1)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (60, 60),
        (60.9, 60),
        ("60", 60),
        ("60.9", 60),
        ("1970-01-02", 86400),
        ("1970-01-01T00:01", 60),
        ("1970-01-01 00:01:00.500", 60),
        ("1970-01-01T00:01:00Z", 60),
        ("1970-01-01 00:01:00 UTC", 60),
        ("1970-01-01T02:00:00+02:00", 0),
        ("1969-12-31T19:00:00-0500", 0),
        (date(1970, 1, 2), 86400),
        (datetime(1970, 1, 1, 1), 3600),
        (datetime(1970, 1, 1, 1, tzinfo=timezone.utc), 3600),
        (datetime(1970, 1, 1, 1, tzinfo=timezone(HOUR)), 0),
    ],
)
def test_times_in_every_form(value: Any, seconds: int) -> None:
    column = pl.Series([value, None])
    assert tables.parse_seconds(column, "t").to_list() == [seconds, None]


def test_one_column_may_mix_forms() -> None:
    column = pl.Series(["60", "61.5", "1970-01-01T00:01:02Z", "1970-01-02"])
    assert tables.parse_seconds(column, "t").to_list() == [60, 61, 62, 86400]


@pytest.mark.parametrize("unit", [1, 10**3, 10**6, 10**9])
@pytest.mark.parametrize("kind", [pl.Int64, pl.UInt64, pl.Float64, pl.String])
def test_numbers_too_large_for_seconds_are_of_a_smaller_unit(unit: int, kind: Any) -> None:
    times = [0, 978_300_760, 1_700_000_000]
    column = pl.Series([time * unit for time in times]).cast(kind)
    assert tables.parse_seconds(column, "t").to_list() == times


@pytest.mark.parametrize(
    ("times", "row"),
    [
        ([1_700_000_000, 1_700_000_000_000], 1),  # seconds among milliseconds
        ([1_700_000_000_000, 978_300_760], 2),
        ([20_240_531_180_000], 1),  # digits of a date
    ],
)
def test_times_of_several_units_or_none_are_refused(times: list[int], row: int) -> None:
    message = one_line(tables.parse_seconds, pl.Series(times), "t")
    assert message.startswith(f"t: timestamp in row {row} is {times[row - 1]}; expected seconds since 1970 (or, all of")


def test_a_number_beyond_64_bits_is_no_time() -> None:
    message = one_line(tables.parse_seconds, pl.Series([1, 2**64 - 1], dtype=pl.UInt64), "t")
    assert message.startswith("t: timestamp in row 2 is 18446744073709551615; expected seconds since 1970")


@given(st.lists(st.datetimes(datetime(1900, 1, 1), datetime(2100, 1, 1)), min_size=1))
def test_iso_text_and_datetimes_agree(moments: list[datetime]) -> None:
    text = pl.Series([moment.isoformat() for moment in moments])
    assert tables.parse_seconds(text, "t").to_list() == tables.parse_seconds(pl.Series(moments), "t").to_list()


@pytest.mark.parametrize("bad", ["yesterday", "31/12/2020", "2020-13-01", "1e400"])
def test_a_time_that_is_none_is_named_by_its_row(bad: str) -> None:
    message = one_line(tables.parse_seconds, pl.Series(["1", bad]), "t")
    assert message.startswith(f"t: timestamp in row 2 is '{bad}'; expected seconds since 1970")


def test_infinite_and_nested_times_are_refused() -> None:
    assert "row 1" in one_line(tables.parse_seconds, pl.Series([float("inf")]), "t")
    assert "type List" in one_line(tables.parse_seconds, pl.Series([[1]]), "t")


def test_lists_of_text_are_joined_for_templates() -> None:
    joined = tables.showable(pl.Series("genres", [["Drama", "War"], []]))
    assert joined is not None
    assert joined.to_list() == ["Drama, War", ""]
    assert tables.showable(pl.Series("cast", [json.loads('{"a": 1}')])) is None


def test_values_are_shown_as_people_write_them() -> None:
    columns = {
        "price": (pl.Series([12.49, None], dtype=pl.Float32), [12.49, None]),
        "year": (pl.Series(["1990.0", None, "2001.0"]), ["1990", None, "2001"]),
        "version": (pl.Series(["1990.0", "2.1"]), ["1990.0", "2.1"]),
    }
    for name, (column, expected) in columns.items():
        shown = tables.showable(column.alias(name))
        assert shown is not None
        assert shown.to_list() == expected, name
    assert tables.showable(pl.Series("thumb", [b"\xff\xd8"])) is None
