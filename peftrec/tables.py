"""Reading any table, and turning its columns into ids, numbers, seconds and labels; a wrong value is named by its row.

A source is a CSV, Parquet, JSON or JSONL file, or a Hub data set id. CSV columns are read as text and parsed here,
because a type guessed from the first rows turns the id `007` into 7 and fails on a 3.5 after a thousand whole ratings.
Rows are counted from 1, without the header.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from peftrec.errors import DataError

CSV_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
SUFFIXES = (*CSV_SUFFIXES, ".parquet", ".pq", ".jsonl", ".ndjson", ".json")

_MOST_SECONDS = 10**11  # the year 5138
_POINT_ZERO = r"^-?\d+\.0$"

# What other people call our columns, in lower case without punctuation.
ALIASES = {
    "user_id": ("userid", "user", "uid", "reviewerid", "customerid", "accountid", "visitorid"),
    "item_id": ("itemid", "item", "iid", "movieid", "asin", "parentasin", "productid", "isbn", "bookid", "gameid"),
    "rating": ("rating", "ratings", "stars", "score", "overall", "bookrating"),
    "label": ("label", "click", "clicked", "like", "liked", "target"),
    "timestamp": ("timestamp", "time", "ts", "date", "datetime", "createdat", "unixreviewtime"),
    "title": ("title", "name", "itemname", "movietitle", "productname", "booktitle"),
    "output": ("output", "answer", "response", "completion"),
    "instruction": ("instruction", "prompt"),
}


def scan(source: str, revision: str | None = None) -> pl.LazyFrame:
    """The table at `source`, not read yet; every CSV column is text.

    Args:
        source: A file, or a Hub data set id `namespace/name`, optionally with `:split` (default train).
        revision: Commit, tag or branch of a Hub data set.

    Raises:
        DataError: If there is no such file, its kind is not known, or the Hub does not have or give it.
    """
    path = Path(source).expanduser()
    name = path.name.lower()
    if on_hub(source):
        return _hub_table(source, revision)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise DataError(f"{source}: {found}; expected a {', '.join(SUFFIXES)} file or a Hub id namespace/name")
    if path.stat().st_size == 0:
        raise DataError(f"{source}: the file is empty; expected a table with a header and rows")
    try:
        if name.endswith(CSV_SUFFIXES):
            return pl.scan_csv(path, separator=_separator(path), infer_schema=False)
        if name.endswith((".parquet", ".pq")):
            return pl.scan_parquet(path)
        if name.endswith((".jsonl", ".ndjson")):
            return pl.scan_ndjson(path, infer_schema_length=None)
        if name.endswith(".json"):
            return pl.read_json(path, infer_schema_length=None).lazy()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise unreadable(source, error) from error
    raise DataError(f"{source}: unknown kind of file '{path.suffix}'; expected one of {', '.join(SUFFIXES)}")


def on_hub(source: str) -> bool:
    """Whether `source` means a Hub data set: it looks like an id, and no file or folder has that name."""
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source) and not source.lower().endswith(SUFFIXES)
    return bool(is_id) and not Path(source).expanduser().exists()


def _separator(path: Path) -> str:
    """The character that separates most names of the header; a single column has none, and any will do."""
    if path.suffix == ".gz":
        return "\t" if ".tsv" in path.name.lower() else ","
    with path.open(encoding="utf-8", errors="replace") as file:
        header = file.readline()
    return max(",\t;|", key=header.count)


def _hub_table(source: str, revision: str | None) -> pl.LazyFrame:
    import datasets  # slow to import, and only these sources need it

    name, _, split = source.partition(":")
    try:
        # Data only: this version of datasets runs no code from a repository.
        table = datasets.load_dataset(name, split=split or "train", revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{source}: the Hub gave no such data set ({first_line(error)}); "
            "expected namespace/name[:split] that you may read, or a file that exists: check the name and the network"
        ) from error
    frame = table.to_polars()
    if not isinstance(frame, pl.DataFrame):
        raise DataError(f"{source}: not a single table; expected namespace/name:split")
    return frame.lazy()


def first_line(error: BaseException) -> str:
    """What an exception of another library says, cut to one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")


def unreadable(source: str, error: BaseException) -> DataError:
    """The error for a file whose content is not what its name says; in JSONL the line is named."""
    place = ""
    if source.lower().endswith((".jsonl", ".ndjson")):
        with Path(source).expanduser().open(encoding="utf-8", errors="replace") as file:
            place = next(
                (f"line {number} is not a JSON object; " for number, line in enumerate(file, 1) if _bad(line)), ""
            )
    kind = "".join(Path(source).suffixes[-2:]) or "table"
    return DataError(f"{source}: {place}cannot be read ({first_line(error)}); expected a well-formed {kind} in UTF-8")


def _bad(line: str) -> bool:
    try:
        return bool(line.strip()) and not isinstance(json.loads(line), dict)
    except ValueError:
        return True


def collect(table: pl.LazyFrame, where: str) -> pl.DataFrame:
    """Read what was selected.

    Raises:
        DataError: If the content cannot be read, or there are no rows.
    """
    try:
        frame = table.collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise unreadable(where, error) from error
    if frame.is_empty():
        raise DataError(f"{where}: no rows; expected at least one row below the header")
    return frame


def pieces(
    source: str, rows: int, wanted: Sequence[int] | None = None, columns: Sequence[str] | None = None
) -> Iterator[tuple[int, pl.DataFrame]]:
    """The table at `source` as pieces of `rows` rows with their numbers; memory does not grow with the table.

    Args:
        source: A Parquet, CSV or JSONL file.
        rows: Of each piece; the last one may have fewer.
        wanted: Numbers of the pieces to give, ascending; None is all.
        columns: Which to read; None is all.

    Raises:
        DataError: If the content cannot be read.
    """
    first = wanted[0] if wanted else 0
    table = scan(source).slice(first * rows, None if wanted is None else (wanted[-1] + 1 - first) * rows)
    chosen = None if wanted is None else set(wanted)
    if columns is not None:
        table = table.select(columns)
    full = True
    try:
        for number, frame in enumerate(table.collect_batches(chunk_size=rows, maintain_order=True, lazy=True), first):
            assert full, "only the last piece may be short"
            full = len(frame) == rows
            if len(frame) and (chosen is None or number in chosen):
                yield number, frame
    except (pl.exceptions.PolarsError, OSError) as error:
        raise unreadable(source, error) from error


def frame_columns(frame: Any, where: str, expected: str = "a polars or pandas DataFrame") -> list[str]:
    """Names of the columns of somebody's frame.

    Raises:
        DataError: If it is none.
    """
    if isinstance(frame, pl.DataFrame) or (type(frame).__module__.startswith("pandas") and hasattr(frame, "columns")):
        return [str(name) for name in frame.columns]
    todo = "; collect() it" if isinstance(frame, pl.LazyFrame) else ""
    raise DataError(f"{where}: {type(frame).__name__}; expected {expected}{todo}")


def from_frame(frame: Any, where: str, columns: Sequence[str]) -> pl.DataFrame:
    """These columns of a polars or pandas frame.

    Raises:
        DataError: If polars cannot hold them.
    """
    try:
        if isinstance(frame, pl.DataFrame):
            return frame.select(columns)
        return pl.from_pandas(frame[[name for name in frame.columns if str(name) in columns]])
    except (ValueError, TypeError, ImportError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{where}: cannot be read ({first_line(error)}); expected plain columns") from error


def column_names(table: pl.LazyFrame, where: str) -> list[str]:
    """Names of the table's columns.

    Raises:
        DataError: If the file's content cannot be read.
    """
    try:
        return table.collect_schema().names()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise unreadable(where, error) from error


def match_columns(
    found: list[str],
    where: str,
    columns: Mapping[str, str],
    required: Iterable[str],
    optional: Iterable[str] = (),
    key: str = "data.columns",
) -> dict[str, str]:
    """Our column name -> name in the table, for those that are there.

    Args:
        found: Column names of the table.
        where: The table's name in messages.
        columns: The recipe's renames, ours -> theirs.
        required: Our names that must be there.
        optional: Our names that may be there; one that `columns` renames must be.
        key: The setting that renames columns, for the message.

    Raises:
        DataError: Names every column that is missing, with the nearest that is there.
    """
    matched, missing, absent, hints = {}, [], [], []
    needed = set(required)
    for name in [*required, *optional]:
        theirs = columns.get(name, name)
        if theirs in found:
            matched[name] = theirs
        elif name in needed or name in columns:
            missing.append(f"'{theirs}'")
            absent.append(name)
            if near := nearest_column(name, [other for other in found if other not in matched.values()], theirs):
                hints.append(f"{key}.{name}={near}")
    if missing:
        plural = "s" if len(missing) > 1 else ""
        todo = f"set {' '.join(hints)}" if hints else f"rename the column{plural}, or set {key}.{absent[0]}=<column>"
        raise DataError(f"{where}: no column{plural} {', '.join(missing)} (found {', '.join(found)}); {todo}")
    return matched


def nearest_column(name: str, found: list[str], theirs: str | None = None) -> str | None:
    """The column of `found` that most likely holds our `name`, of which `theirs` is a spelling that is not there."""
    plain = {re.sub(r"[^a-z0-9]", "", other.lower()): other for other in found}
    for alias in (re.sub(r"[^a-z0-9]", "", (theirs or name).lower()), *ALIASES.get(name, ())):
        if alias in plain:
            return plain[alias]
    near = difflib.get_close_matches((theirs or name).lower(), [other.lower() for other in found], n=1)
    return next((other for other in found if near and other.lower() == near[0]), None)


def refuse(where: str, name: str, column: pl.Series, bad: pl.Series, expected: str) -> None:
    """Check a column's rows.

    Args:
        where: The table's name in messages.
        name: The column's name in messages.
        column: The column as it is in the source.
        bad: Which of its rows cannot be used, without nulls.
        expected: What they should hold.

    Raises:
        DataError: If any row is bad; names the first and says how many more there are.
    """
    count = int(bad.sum())
    if count == 0:
        return
    row = int(bad.arg_max() or 0)
    value = column[row]
    shown = "nothing" if value is None else repr(value)
    more = f" (and in {count - 1} more rows)" if count > 1 else ""
    raise DataError(
        f"{where}: {name} in row {row + 1} is {shown}{more}; expected {expected}: mend the rows or drop them"
    )


def parse_ids(column: pl.Series, where: str, name: str) -> pl.Series:
    """Ids as Int64 where every one is a whole number as people write it, else as text (`007` stays `007`).

    Raises:
        DataError: If an id is missing.
    """
    if column.dtype == pl.String:
        refuse(where, name, column, column.is_null() | (column.str.len_bytes() == 0), "an id")
        numbers = column.cast(pl.Int64, strict=False)
        same = numbers.cast(pl.String) == column
        return numbers if numbers.null_count() == 0 and same.all() else column
    if column.dtype.is_float():
        # Beyond 2**53 two whole numbers can be one float.
        whole = column.is_finite() & (column == column.round(0)) & (column.abs() <= 2**53)
        refuse(where, name, column, ~whole.fill_null(False), "an id, text or a whole number")
        return column.cast(pl.Int64)
    refuse(where, name, column, column.is_null(), "an id")
    if column.dtype.is_integer() and column.dtype not in (pl.UInt64, pl.UInt128, pl.Int128):
        return column.cast(pl.Int64)
    return _cast(column, pl.String(), where, name, "an id, text or a whole number")


def _cast(column: pl.Series, dtype: pl.DataType, where: str, name: str, expected: str) -> pl.Series:
    try:
        return column.cast(dtype)
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{where}: {name} has the type {column.dtype}; expected {expected}") from error


def parse_numbers(column: pl.Series, where: str, name: str) -> pl.Series:
    """Finite numbers as Float64.

    Raises:
        DataError: If a value is missing, not a number, NaN or infinite.
    """
    numbers = column.str.strip_chars() if column.dtype == pl.String else column
    try:
        numbers = numbers.cast(pl.Float64, strict=False)
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{where}: {name} has the type {column.dtype}; expected a number") from error
    refuse(where, name, column, numbers.is_null() | ~numbers.is_finite().fill_null(False), "a number")
    return numbers


def parse_labels(column: pl.Series, where: str, name: str = "label") -> pl.Series:
    """Labels as Int8: 0 or 1, from numbers, true/false or yes/no.

    Raises:
        DataError: If a value is missing or anything else.
    """
    if column.dtype == pl.String:
        words = {"0": 0, "1": 1, "no": 0, "yes": 1, "false": 0, "true": 1, "0.0": 0, "1.0": 1}
        # Capitals, blanks and a full stop say nothing: "Yes." is how shared prompt records write it.
        plain = column.str.to_lowercase().str.strip_chars(" \t\r\n.!\"'")
        labels = plain.replace_strict(words, default=None, return_dtype=pl.Int8)
    elif column.dtype == pl.Boolean:
        labels = column.cast(pl.Int8)
    else:
        numbers = parse_numbers(column, where, name)
        labels = pl.select(pl.when(numbers.is_in([0.0, 1.0])).then(numbers)).to_series().cast(pl.Int8)
    refuse(where, name, column, labels.is_null(), "0 or 1, true or false, yes or no")
    return labels


def parse_seconds(column: pl.Series, where: str, name: str = "timestamp") -> pl.Series:
    """Times as whole seconds (Int64), missing ones left null.

    Numbers are seconds since 1970, or milli-, micro- or nanoseconds where all are too large for seconds. Fractions are
    cut off. Dates, datetimes and ISO 8601 text count from 1970 in UTC; a time without zone is taken as UTC.

    Raises:
        DataError: If a value is neither missing nor a time, or numbers are of different units.
    """
    expected = "seconds since 1970 (or, all of them, milli-, micro- or nanoseconds), or an ISO date such as 2024-05-31"
    if column.dtype == pl.Date:
        return column.cast(pl.Datetime("us")).dt.epoch("s")
    if column.dtype == pl.Datetime:
        return column.dt.epoch("s")
    if not (column.dtype.is_numeric() or column.dtype == pl.String):
        raise DataError(f"{where}: {name} has the type {column.dtype}; expected {expected}")
    numbers = whole_numbers(column)
    unit = unit_of_time(numbers)
    size = numbers.abs()
    refuse(where, name, column, size >= _MOST_SECONDS if unit == 0 else (size > 0) & (size < _earliest(unit)), expected)
    seconds = numbers // unit
    if column.dtype == pl.String and seconds.null_count() > column.null_count():
        seconds = seconds.fill_null(_iso_seconds(column))
    missing = column.is_null() | column.is_nan() if column.dtype.is_float() else column.is_null()
    refuse(where, name, column, seconds.is_null() & ~missing, expected)
    return seconds


def whole_numbers(column: pl.Series) -> pl.Series:
    """Numbers, also such in text, cut to whole ones (Int64); null where there is none."""
    if column.dtype.is_float():
        return column.floor().cast(pl.Int64, strict=False)
    numbers = column.cast(pl.Int64, strict=False)
    if numbers.null_count() > column.null_count():  # whole numbers are the common case; only others pay for this
        numbers = numbers.fill_null(column.cast(pl.Float64, strict=False).floor().cast(pl.Int64, strict=False))
    return numbers


def unit_of_time(numbers: pl.Series) -> int:
    """Units of a second in which such times are told, by the largest: 1, 10**3, 10**6 or 10**9; 0 if in none.

    Seconds reach to the year 5138, smaller units from 1973 to 2286. A date written as digits (20240531180000) is none.
    """
    largest = max((abs(int(one)) for one in (numbers.max(), numbers.min()) if one is not None), default=0)  # type: ignore[arg-type]
    if largest < _MOST_SECONDS:
        return 1
    return next((unit for unit in (10**3, 10**6, 10**9) if _earliest(unit) <= largest < 100 * _earliest(unit)), 0)


def _earliest(unit: int) -> int:
    """The first number that is taken for a time in this unit."""
    return 0 if unit == 1 else 10**8 * unit


def _iso_seconds(column: pl.Series) -> pl.Series:
    """Seconds of ISO 8601 text, null where it is something else. Mixed forms in one column are fine."""
    text = pl.col("text").str.strip_chars()
    zone = text.str.extract(r"\d([+-]\d{2}:?\d{2})$").str.replace(":", "")
    offset = (zone.str.slice(1, 2).cast(pl.Int64) * 3600 + zone.str.slice(3, 2).cast(pl.Int64) * 60) * (
        pl.when(zone.str.starts_with("-")).then(-1).otherwise(1)
    )
    # Only a time of day can carry a zone, so that the "-05" of 2024-05-05 is not taken for one.
    timed = text.str.contains(":")
    plain = (
        text.str.replace(r"^(\d{4}-\d{2}-\d{2})T", "$1 ")
        .str.replace(r"(Z| UTC)$", "")
        .pipe(lambda t: pl.when(timed).then(t.str.replace(r"[+-]\d{2}:?\d{2}$", "")).otherwise(t + " 00:00:00"))
        .str.replace(r"^(\d{4}-\d{2}-\d{2} \d{2}:\d{2})$", "$1:00")
    )
    moment = plain.str.to_datetime("%Y-%m-%d %H:%M:%S%.f", time_unit="us", strict=False).dt.epoch("s")
    shift = pl.when(timed).then(offset).otherwise(0).fill_null(0)
    return pl.DataFrame({"text": column}).select(moment - shift).to_series()


def same_kind(left: pl.Series, right: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Two id columns of one type: both text if one of them is."""
    if left.dtype == right.dtype:
        return left, right
    return left.cast(pl.String), right.cast(pl.String)


def showable(column: pl.Series) -> pl.Series | None:
    """The column as a template can show it: lists of text joined with commas, None where no text could stand for it.

    Numbers look as people write them: no digits of float32 that nobody gave, no `.0` behind the years of a CSV that
    lacks some.
    """
    if column.dtype == pl.List(pl.String):
        return column.list.join(", ")
    if column.dtype.is_nested() or column.dtype in (pl.Binary, pl.Object):
        return None
    if column.dtype == pl.Float32:
        return column.cast(pl.String).cast(pl.Float64)
    if column.dtype == pl.String and column.str.contains(_POINT_ZERO).all() and not column.is_null().all():
        return column.str.strip_suffix(".0")
    return column


def as_text(column: pl.Series, where: str) -> pl.Series:
    """The column as text.

    Raises:
        DataError: It holds nothing that text could stand for.
    """
    shown = showable(column)
    if shown is None:
        raise DataError(f"{where}: {column.name} has the type {column.dtype}; expected text")
    return shown.cast(pl.String)
