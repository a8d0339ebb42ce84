"""The tables of a recipe's data as they are: a named data set, the user's files, the Hub, or ready-made prompts.

Columns get our names and values their types; every row is kept. What cannot be right is an error that says where.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Literal

import numpy as np
import polars as pl

from peftrec import tables
from peftrec.config import Data
from peftrec.datasets import DATASETS
from peftrec.errors import DataError
from peftrec.record_events import events_of

Task = Literal["click", "rating"]

NEEDS_TIME = ("temporal", "leave_last_out")
"""Kinds of split that cannot do without timestamps."""

OF_EVENTS = ("user_id", "item_id", "title", "rating", "label", "timestamp")
"""All that is read of a table of events, the splits of its rows apart."""
ITEMS, USERS = ("item_id", "title"), ("user_id",)
"""Columns that the two tables beside the events must have, the id first."""
UNITS = {10**3: "milliseconds", 10**6: "microseconds", 10**9: "nanoseconds"}
"""What `tables.unit_of_time` finds -> its name."""
FINER = "timestamp as told"
"""A column beside the whole seconds, where times are told in parts of a second."""


def with_known(data: Data) -> Data:
    """The section with what is known of a named data set where the recipe leaves it open."""
    known = DATASETS.get(data.name or "")
    if known is None:
        return data
    like_at = known.like_at if data.like_at is None else data.like_at
    rating_range = data.rating_range or (list(known.rating_range) if known.rating_range else None)
    return dataclasses.replace(data, like_at=like_at, rating_range=rating_range)


def read(data: Data, task: Task | None, warnings: list[str]) -> tuple[str, pl.DataFrame, pl.DataFrame]:
    """The source's name, its events, and its items.

    Args:
        data: the recipe's data section, with what is known of a named data set.
        task: whether the events need labels or ratings; None reads neither, and all labels are 0.
        warnings: what was left out or assumed is added to them.

    Raises:
        AssetError: a named data set cannot be fetched.
        DataError: the tables cannot be read or used.
    """
    if data.records is not None:
        assert task is not None
        return _records(data, task)
    return _named(data, task, warnings) if data.name else _files(data, task, warnings)


def check(
    data: Data, shown: Sequence[str] = (), task: Task | None = "click", of_users: Mapping[str, str] | None = None
) -> None:
    """Check what can be checked without reading rows: names of data sets, files, and their columns.

    What lies on the Hub, or comes with a named data set, is not fetched.

    Args:
        data: The recipe's data section.
        shown: Columns of the items table that the prompt shows.
        task: Whether the events need labels or ratings; None is neither.
        of_users: Columns of the users table that are used -> the recipe's key that names them.

    Raises:
        DataError: Every mistake, one line each.
    """
    problems = []
    if data.name is not None and data.name not in DATASETS:
        problems.append(_unknown_name(data.name))
    elif data.name is not None:
        problems += _mistakes_of_named(data, task, of_users or {})
    for source, look in _looks(data, shown, task, of_users or {}):
        try:
            if not tables.on_hub(source):
                look(source)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(dict.fromkeys(problems)))  # a missing file is missed by whoever looks into it


# --- what can be told from the first rows -----------------------------------------------------------------------------


def _looks(
    data: Data, shown: Sequence[str], task: Task | None, of_users: Mapping[str, str]
) -> Iterator[tuple[str, Callable[[str], object]]]:
    """Each source with what looks at its columns."""
    if data.interactions:
        yield data.interactions, lambda source: _first_event(source, data, task)
        yield data.interactions, lambda source: _check_renames(data)
    if data.items:
        yield data.items, lambda source: _check_shown(source, data, ITEMS, dict.fromkeys(shown, "prompt.item"))
        if data.items_where:
            yield data.items, lambda source: _check_where(source, data)
    if data.users:
        yield data.users, lambda source: _check_shown(source, data, USERS, of_users)
    files = data.records.values() if isinstance(data.records, dict) else filter(None, [data.records])
    for file in files:
        yield file, lambda source: _first_record(source, data, task)


def _first_event(where: str, data: Data, task: Task | None) -> pl.DataFrame:
    """The first row, read as all of them will be: whatever is wrong with the columns shows in it."""
    first = tables.scan(where).head(1)
    raw = _select(first, where, data.columns, data, task, with_title=data.items is None, warnings=[])
    return _parse(raw, where, data.like_at, None, task)


def _check_renames(data: Data) -> None:
    """See whether what `data.columns` calls otherwise is there, beyond the columns of events that are asked for anyway.

    Tables of items and users may have columns of any name. What lies on the Hub is not asked.
    """
    files = [file for file in (data.items, data.users) if file is not None]
    elsewhere = {
        ours: theirs
        for ours, theirs in data.columns.items()
        if ours not in OF_EVENTS or (ours == "title" and data.items)
    }
    if not elsewhere or any(map(tables.on_hub, files)):
        return
    found = [name for file in files for name in tables.column_names(tables.scan(file), file)]
    for ours, theirs in elsewhere.items():
        if theirs not in found:
            near = get_close_matches(ours, OF_EVENTS, n=1)
            todo = f"did you mean data.columns.{near[0]}?" if near and near[0] != ours else "mend it or remove it"
            where = " or ".join(files) or "a table of items or users, of which there is none"
            raise DataError(f"data.columns.{ours}: no column '{theirs}' in {where}; {todo}")


def _first_record(source: str, data: Data, task: Task | None) -> None:
    """Read the first record as all of them will be."""
    first = _record_file(source, data, task or "click", most=1)
    if data.prompts is None:
        events_of(first, source, 0, data.record_marks)


def _check_where(source: str, data: Data) -> None:
    _, names, kept = _side_names(source, data.columns, ITEMS)
    for column in data.items_where:
        check_column(column, [*names, *kept], source)


def _check_shown(source: str, data: Data, required: Sequence[str], shown: Mapping[str, str]) -> None:
    table, names, kept = _side_names(source, data.columns, required)
    empty = table.clear().collect()
    for name, key in shown.items():
        if name in (*names, *kept) and tables.showable(empty[names.get(name, name)]) is None:
            kind = empty[names.get(name, name)].dtype
            raise DataError(f"{key}: {name} in {source} has the type {kind}; expected text, numbers or lists of text")
        if name not in (*names, *kept):
            found = ", ".join((*names, *kept))
            near = tables.nearest_column(name, [*names, *kept])
            todo = f"did you mean {{{near}}}?" if near else "use one of them"
            raise DataError(f"{key}: no column '{name}' in {source} ({found}); {todo}")


def check_column(column: str, found: Sequence[str], where: str) -> None:
    """See whether `data.items_where` names a column that is there."""
    if column not in found:
        near = tables.nearest_column(column, list(found))
        todo = f"did you mean {near}?" if near else "use one of them"
        raise DataError(f"data.items_where: no column '{column}' in {where} ({', '.join(found)}); {todo}")


# --- named data sets --------------------------------------------------------------------------------------------------


def _named(data: Data, task: Task | None, warnings: list[str]) -> tuple[str, pl.DataFrame, pl.DataFrame]:
    dataset = DATASETS.get(data.name or "")
    if dataset is None:
        raise DataError(_unknown_name(data.name or ""))
    if problems := _mistakes_of_named(data, task, {}):
        raise DataError(problems[0])
    loaded = dataset.load(data.folder)
    warnings += loaded.warnings
    table = loaded.interactions.lazy()
    raw = _select(table, dataset.name, {}, data, task, with_title=False, warnings=warnings)
    ids = tables.parse_ids(loaded.items["item_id"], dataset.name, "item_id")
    return (
        dataset.name,
        _parse(raw, dataset.name, data.like_at, data.rating_range, task),
        loaded.items.with_columns(ids),
    )


def _unknown_name(name: str) -> str:
    return f"data.name: no data set '{name}'; expected one of {', '.join(sorted(DATASETS))}"


def _mistakes_of_named(data: Data, task: Task | None, of_users: Mapping[str, str]) -> list[str]:
    """What is wrong with the section about a data set that is known by name, as far as can be told without reading."""
    known, kind = DATASETS[data.name or ""], data.split.kind
    problems = [_tells_nothing(known.name)] if of_users and known.read_users is None else []
    try:
        known.find(data.folder)
    except DataError as error:
        problems.append(str(error))
    if task == "rating" and known.rating_range is None:
        problems.append(f"data.name: {known.name} holds {known.rating or 'clicks'}, no ratings; set task: click")
    if kind in NEEDS_TIME and not known.timed:
        problems.append(
            f"data.split.kind: {kind}; {known.name} tells no times; expected kfold, cold_user or cold_item: set it"
        )
    if known.like_at is None and data.like_at is not None:
        problems.append(f"data.like_at: {data.like_at:g}; {known.name} has labels, no ratings; remove it")
    return problems


def _tells_nothing(name: str) -> str:
    return f"data.name: {name} tells nothing of its users; leave prompt.user and eval.user_groups out"


# --- tables of events -------------------------------------------------------------------------------------------------


def _files(data: Data, task: Task | None, warnings: list[str]) -> tuple[str, pl.DataFrame, pl.DataFrame]:
    where = data.interactions or ""
    _check_renames(data)
    table = tables.scan(where, data.hub_revision)
    raw = _select(table, where, data.columns, data, task, with_title=data.items is None, warnings=warnings)
    events = _parse(raw, where, data.like_at, data.rating_range, task)
    if data.items is None:
        items = events.select("item_id", tables.as_text(raw["title"], where)).unique(
            "item_id", keep="first", maintain_order=True
        )
        items = items.sort("item_id")
    else:
        items = _side_table(data.items, data.columns, ITEMS)
    if FINER in raw.columns:  # within a second rows keep their order: it is to be that of time
        events = events.sort(raw[FINER], nulls_last=True, maintain_order=True)
    return where, events, items


def _select(
    table: pl.LazyFrame,
    where: str,
    columns: Mapping[str, str],
    data: Data,
    task: Task | None,
    with_title: bool,
    warnings: list[str],
) -> pl.DataFrame:
    """The columns that are needed, under our names, as they are in the source."""
    found = tables.column_names(table, where)
    given = {ours: theirs for ours, theirs in columns.items() if ours != "title" or with_title}
    required = ["user_id", "item_id", *(["title"] if with_title and "title" in given else [])]
    # Whatever a rating says, the row was clicked.
    answers = [] if task is None else ["label"] if data.sampled_negatives is not None else ["label", "rating"]
    names = tables.match_columns(found, where, given, required, [*answers, "timestamp"])
    if task is None:
        pass
    elif task == "rating":
        names.pop("label", None)
        if "rating" not in names:
            hint = tables.nearest_column("rating", found) or "<column>"
            todo = f"set data.columns.rating to a column, such as {hint}, or task: click"
            raise DataError(f"{where}: no column 'rating' (found {', '.join(found)}); {todo}")
    elif "label" in names:
        unused = [*(["rating"] if names.pop("rating", None) is not None and data.like_at is not None else [])]
        unused += [f"data.{key}" for key in ("like_at", "rating_range") if getattr(data, key) is not None]
        if unused:
            are = "is" if len(unused) == 1 else "are"
            warnings.append(f"{where}: the label column is used; {' and '.join(unused)} {are} not")
    elif "rating" not in names and data.sampled_negatives is None:
        hint = tables.nearest_column("label", found) or tables.nearest_column("rating", found) or "<column>"
        todo = (
            f"set data.columns.rating or data.columns.label to a column, such as {hint}, or data.sampled_negatives if "
            "every row is a click"
        )
        raise DataError(f"{where}: no column 'rating' or 'label' (found {', '.join(found)}); {todo}")
    if with_title and "title" not in names:
        if "title" not in found:
            raise DataError(
                f"{where}: no column 'title' (found {', '.join(found)}) and no items table; the model reads items as "
                "text: set data.items to a table with item_id and title, or data.columns.title to a column here"
            )
        names["title"] = "title"
    if data.split.kind in NEEDS_TIME and "timestamp" not in names:
        near = tables.nearest_column("timestamp", found)
        todo = f"set data.columns.timestamp={near}" if near else "add it"
        raise DataError(
            f"{where}: no column 'timestamp' (found {', '.join(found)}); a {data.split.kind} split needs it: {todo}, "
            "or set data.split.kind=kfold"
        )
    if data.split.kind == "column":
        names["split"] = _split_column(found, where, data)
    raw = tables.collect(table.select(**{ours: pl.col(theirs) for ours, theirs in names.items()}), where)
    return _with_times(raw, where, data, warnings)


def _split_column(found: list[str], where: str, data: Data) -> str:
    name = data.split.column or "split"
    if name not in found:
        raise DataError(
            f"{where}: no column '{name}' (found {', '.join(found)}); set data.split.column to the one that holds "
            "train, valid or test"
        )
    return name


def _with_times(raw: pl.DataFrame, where: str, data: Data, warnings: list[str]) -> pl.DataFrame:
    """Timestamps as seconds; the column is left out where times are missing and the split can do without."""
    if "timestamp" not in raw.columns:
        warnings.append(f"{where}: no timestamps: rows are taken to be in order of time")
        return raw
    seconds = tables.parse_seconds(raw["timestamp"], where)
    if missing := seconds.null_count():
        row = int(seconds.is_null().arg_max() or 0) + 1
        if data.split.kind in NEEDS_TIME:
            raise DataError(
                f"{where}: {missing} of {len(seconds)} rows have no timestamp, the first is row {row}; a "
                f"{data.split.kind} split needs them: add them, drop the rows, or set data.split.kind=kfold"
            )
        warnings.append(f"{where}: {missing} rows have no timestamp: rows are taken to be in order of time")
        return raw.drop("timestamp")
    told = raw["timestamp"]
    raw = raw.with_columns(seconds.alias("timestamp"))
    if told.dtype.is_numeric() or told.dtype == pl.String:
        numbers = tables.whole_numbers(told)
        if (unit := tables.unit_of_time(numbers)) > 1:
            warnings.append(f"{where}: timestamps are too large for seconds: they are taken for {UNITS[unit]}")
            return raw.with_columns(numbers.alias(FINER))
    return raw


def _parse(
    raw: pl.DataFrame,
    where: str,
    like_at: float | None,
    limits: Sequence[float] | None,
    task: Task | None,
) -> pl.DataFrame:
    """Ids, label and rating as what they are; every row is kept."""
    columns = [tables.parse_ids(raw[name], where, name).alias(name) for name in ("user_id", "item_id")]
    if task is None:
        columns.append(pl.repeat(0, raw.height, dtype=pl.Int8, eager=True).alias("label"))
    elif "label" in raw.columns:
        columns.append(tables.parse_labels(raw["label"], where).alias("label"))
    elif "rating" not in raw.columns:
        columns.append(pl.repeat(1, raw.height, dtype=pl.Int8, eager=True).alias("label"))
    else:
        rating = tables.parse_numbers(raw["rating"], where, "rating")
        if limits is not None:
            low, high = limits
            outside = ~rating.is_between(low, high)
            tables.refuse(where, "rating", raw["rating"], outside, f"{low:g} to {high:g} (data.rating_range)")
        if task == "click":
            if like_at is None:
                raise DataError(
                    f"{where}: ratings from {rating.min()!r} to {rating.max()!r} and no labels; expected to know what "
                    "counts as liked: set data.like_at to the lowest rating that does, or task: rating"
                )
            columns.append((rating >= like_at).cast(pl.Int8).alias("label"))
        columns.append(rating.cast(pl.Float32).alias("rating"))
    if "timestamp" in raw.columns:
        columns.append(raw["timestamp"])
    if "split" in raw.columns:
        columns.append(raw["split"].cast(pl.String))
    return pl.DataFrame(columns)


# --- tables of items and users ----------------------------------------------------------------------------------------


def _side_table(source: str, columns: Mapping[str, str], required: Sequence[str]) -> pl.DataFrame:
    """The items or users table: every column that a template could show, ids parsed, lists of text joined."""
    table, names, kept = _side_names(source, columns, required)
    frame = tables.collect(table.select(*kept, **{ours: pl.col(theirs) for ours, theirs in names.items()}), source)
    ids = tables.parse_ids(frame[required[0]], source, required[0]).alias(required[0])
    texts = [tables.as_text(frame[name], source) for name in required[1:]]
    rest = [tables.showable(frame[name]) for name in frame.columns if name not in required]
    return pl.DataFrame([ids, *texts, *(column for column in rest if column is not None)])


def users(data: Data, user_ids: pl.Series, used: Mapping[str, str], warnings: list[str]) -> pl.DataFrame:
    """One row for each of `user_ids`; of whom the table says nothing, nulls."""
    if data.users is not None:
        where, table = data.users, _side_table(data.users, data.columns, USERS)
    else:
        where = data.name or ""
        told = DATASETS[where].load_users(data.folder)
        if told is None:
            raise DataError(_tells_nothing(where))
        table = told.with_columns(tables.parse_ids(told["user_id"], where, "user_id"))
    if missing := [name for name in used if name not in table.columns]:
        found = ", ".join(table.columns)
        raise DataError(f"{used[missing[0]]}: no column '{missing[0]}' in the users table ({found}); use one of them")
    if table["user_id"].dtype != user_ids.dtype:
        table = table.with_columns(pl.col("user_id").cast(pl.String))
    rows = table.height
    table = table.unique("user_id", keep="first", maintain_order=True)
    if count := rows - table.height:
        warnings.append(f"{where}: {count} rows with a user_id that came before dropped")
    asked = pl.DataFrame({"user_id": user_ids.cast(table["user_id"].dtype)})
    unknown = asked.join(table, on="user_id", how="anti")
    if unknown.height == len(user_ids):
        raise DataError(
            f"{where}: none of the events' user ids (such as {user_ids[0]!r}) is in it; expected the same ids: check "
            "data.columns.user_id"
        )
    if unknown.height:
        warnings.append(f"{where}: {unknown.height} of {len(user_ids)} users are not in it: nothing is said of them")
    return asked.join(table, on="user_id", how="left", maintain_order="left")


def _side_names(
    source: str, columns: Mapping[str, str], required: Sequence[str]
) -> tuple[pl.LazyFrame, dict[str, str], list[str]]:
    """The table, our names -> its names, and what else it has."""
    table = tables.scan(source)
    found = tables.column_names(table, source)
    # The renames were written for the interactions too: here only those count that lead somewhere.
    given = {ours: theirs for ours, theirs in columns.items() if theirs in found}
    optional = [ours for ours in given if ours not in required]
    names = tables.match_columns(found, source, given, required, optional)
    kept = [other for other in found if other not in names and other not in names.values()]
    return table, names, kept


# --- ready-made prompts -----------------------------------------------------------------------------------------------


def _records(data: Data, task: Task) -> tuple[str, pl.DataFrame, pl.DataFrame]:
    """Ready-made prompts, one event a row and no items, or the events that they tell of."""
    if isinstance(data.records, str):
        sources, parts = [data.records], [_record_file(data.records, data, task)]
    else:
        files = data.records or {}
        sources = list(files.values())
        parts = [_record_file(files[split], data, task).with_columns(split=pl.lit(split)) for split in files]
    shared = [name for name in parts[0].columns if all(name in part.columns for part in parts)]
    parts = [part.select(shared) for part in parts]
    if data.prompts is None:
        before = np.cumsum([0, *(part.height for part in parts)]).tolist()
        taken = [events_of(*one, data.record_marks) for one in zip(parts, sources, before, strict=False)]
        items = pl.concat([items for _, items in taken]).unique(maintain_order=True)
        return ", ".join(sources), pl.concat([events for events, _ in taken]), items
    events = pl.concat(parts)
    if "user_id" not in shared:
        events = events.with_row_index("user_id").with_columns(pl.col("user_id").cast(pl.Int64))
    events = events.with_columns(item=pl.lit(-1, pl.Int32))
    return ", ".join(sources), events, pl.DataFrame(schema={"item_id": pl.Int64, "title": pl.String})


def _record_names(source: str, data: Data) -> tuple[pl.LazyFrame, dict[str, str]]:
    """The table, and our names -> its names."""
    table = tables.scan(source, data.hub_revision)
    found = tables.column_names(table, source)
    optional = ["user_id", "timestamp"]
    names = tables.match_columns(found, source, data.columns, ["instruction", "input", "output"], optional)
    if data.split.kind == "column" and isinstance(data.records, str):
        names["split"] = _split_column(found, source, data)
    return table, names


def _record_file(source: str, data: Data, task: Task, most: int | None = None) -> pl.DataFrame:
    """The records of one file, `most` at most, as they will be used."""
    table, names = _record_names(source, data)
    if most is not None:
        table = table.head(most)
    raw = tables.collect(table.select(**{ours: pl.col(theirs) for ours, theirs in names.items()}), source)
    columns = [raw[name].cast(pl.String).fill_null("") for name in ("instruction", "input")]
    if task == "rating":
        columns.append(tables.parse_numbers(raw["output"], source, "output").cast(pl.Float32).alias("rating"))
    else:
        columns.append(tables.parse_labels(raw["output"], source, "output").alias("label"))
    if "user_id" in names:
        columns.append(tables.parse_ids(raw["user_id"], source, "user_id"))
    if "timestamp" in names:
        seconds = tables.parse_seconds(raw["timestamp"], source)
        tables.refuse(source, "timestamp", raw["timestamp"], seconds.is_null(), "a time in every row or no such column")
        columns.append(seconds)
    if "split" in names:
        columns.append(raw["split"].cast(pl.String))
    return pl.DataFrame(columns)
