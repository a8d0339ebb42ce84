"""Events and items from a named data set, the user's files, the Hub or ready-made prompts, checked and made canonical.

Whatever the source, the result is the same: events with dense integer codes, one label and one time each. What cannot
be right is an error; what can be mended by leaving rows out is, and `Interactions.warnings` says how many.
"""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl

from peftrec import negatives, tables
from peftrec.config import Data
from peftrec.datasets import DATASETS
from peftrec.errors import DataError
from peftrec.record_events import events_of
from peftrec.schema import nearest

NEEDS_TIME = ("temporal", "leave_last_out")
"""Kinds of split that cannot do without timestamps."""

ITEMS, USERS = ("item_id", "title"), ("user_id",)
"""Columns that the two tables beside the events must have, the id first."""

HASHED_ROWS = 1_000_000
CLICK_SCALE = (0.0, 1.0)
MOST_RATINGS = 26

Task = Literal["click", "rating"]


@dataclass(frozen=True)
class Interactions:
    """Checked events, in the order of their source.

    Attributes:
        events: `user` (Int32, row of `user_ids`), `item` (Int32, row of `items`; -1 for prompt records), `timestamp`
            (Int64, seconds; the row number where the source has no times); for clicks `label` (Int8, 0 or 1) and, where
            labels were made of such, `rating` (Float32), which ratings always have; where there are such, `split` (the
            split that the source itself gives), `instruction` and `input`, and `target` (Boolean: whether a record
            asks for the event; its others are told).
        user_ids: Original ids, sorted; each has an event.
        items: `item_id`, `title` and whatever else the items table holds; no rows for prompt records.
        name: The data set's name, or the source as the recipe has it.
        sha256: Hash of the values of events and items as they are used; a CSV and a Parquet of the same rows agree.
        warnings: What was left out or assumed, one counted line each.
        scale: What the answers stand for, ascending: 0 and 1 for clicks, every rating that can be given for ratings.
        like_at: Rating from which an event counts as liked; None where nobody said.
        users: What is known of the users, one row for each of `user_ids`; None where it was not asked for.
        drawn: Whether the events of label 0 are negatives that were drawn, which nobody met.
    """

    events: pl.DataFrame
    user_ids: pl.Series
    items: pl.DataFrame
    name: str
    sha256: str
    warnings: tuple[str, ...]
    scale: tuple[float, ...] = CLICK_SCALE
    like_at: float | None = None
    users: pl.DataFrame | None = None
    drawn: bool = False


def load(
    data: Data,
    seed: int,
    task: Task | None = "click",
    *,
    with_users: Mapping[str, str] | None = None,
) -> Interactions:
    """Read and check what `data` names.

    Args:
        data: The recipe's data section.
        seed: Draws the users that `sample_users` keeps.
        task: Whether the events need labels or ratings; None reads neither, and all labels are 0.
        with_users: Columns of the users table that are used -> the recipe's key that names them; none does not read it.

    Raises:
        AssetError: If a named data set cannot be fetched.
        DataError: If the tables cannot be read or used; says where, what was found and what to do.
    """
    warnings: list[str] = []
    data = _with_known(data)
    if data.records is not None:
        assert task is not None
        name, events, items = _records(data, task)
    else:
        name, events, items = _named(data, task, warnings) if data.name else _files(data, task, warnings)
    if data.prompts is None:
        events, items = _join_items(events, items, name, warnings)
        events, items = _where(events, items, data.items_where, name)
    events, user_ids = _code_users(events)
    if data.prompts is None:
        events = _drop_repeats(events, name, warnings)
    if "timestamp" not in events.columns:
        events = events.with_row_index("timestamp").with_columns(pl.col("timestamp").cast(pl.Int64))
    if data.sample_users is not None:
        events, user_ids = _sample(events, user_ids, data.sample_users, seed, warnings)
    drawn = data.sampled_negatives is not None and task is not None
    if data.sampled_negatives is not None and task is not None:
        events = _with_negatives(events, data.sampled_negatives, seed, name, warnings)
    if task == "rating":
        scale = rating_scale(events["rating"], name, data.rating_range)
    else:
        scale = CLICK_SCALE
        if task is not None:
            _check_classes(events["label"], name, data)
    users = _users(data, user_ids, with_users, warnings) if with_users else None
    fingerprint = _fingerprint(events, user_ids, items, users)
    return Interactions(events, user_ids, items, name, fingerprint, tuple(warnings), scale, data.like_at, users, drawn)


def rating_scale(ratings: pl.Series, where: str, limits: Sequence[float] | None) -> tuple[float, ...]:
    """Every rating that can be given, ascending: those found and, where they lie on one grid, what lies between.

    Args:
        ratings: What was given.
        where: The source, for errors.
        limits: Lowest and highest of the scale, if they are known: the grid then spans them.

    Raises:
        DataError: If all ratings are one, or there are too many different ones to be answers.
    """
    found = ratings.unique().sort().cast(pl.Float64).to_numpy()
    if len(found) == 1:
        raise DataError(f"{where}: all {len(ratings)} ratings are {found[0]:g}; expected at least two different ones")
    low, high = (found[0], found[-1]) if limits is None else limits
    step = float(np.diff(found).min())
    steps = round((high - low) / step)
    grid = low + step * np.arange(steps + 1)
    places = (found - low) / step
    if steps < MOST_RATINGS and np.allclose(places, np.round(places)) and np.isclose(grid[-1], high):
        found = grid
    if len(found) > MOST_RATINGS:
        raise DataError(
            f"{where}: {len(found)} different ratings from {found[0]:g} to {found[-1]:g}; expected at most "
            f"{MOST_RATINGS}, each of which is an answer of the model: round them, for example to halves"
        )
    return tuple(found.tolist())


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
        problems += _of_named(data, task, of_users or {})
    for source, look in _looks(data, shown, task, of_users or {}):
        try:
            if not tables.on_hub(source):
                look(source)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))


def drawn_order(n: int, seed: int, purpose: str) -> np.ndarray:
    """The numbers below `n` in an order (n,) that `seed` and `purpose` fix on every machine."""
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(purpose.encode())]))
    # Not Generator.permutation, whose way of shuffling may change between versions of numpy.
    return np.argsort(generator.random(n), kind="stable")


def sorted_order(key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The order (n,) of rows by a code `key` (from -1), then by a whole number `value`, then as they stand."""
    low = int(value.min()) if len(value) else 0
    shift = (int(value.max(initial=low)) - low).bit_length()
    if int(key.max(initial=0)).bit_length() + shift > 62:
        return np.lexsort((value, key))
    # One number for both sorts in a quarter of the time of two keys.
    return np.argsort((key.astype(np.int64) << shift) + (value - low), kind="stable")


# --- sources ----------------------------------------------------------------------------------------------------------


def _named(data: Data, task: Task | None, warnings: list[str]) -> tuple[str, pl.DataFrame, pl.DataFrame]:
    dataset = DATASETS.get(data.name or "")
    if dataset is None:
        raise DataError(_unknown_name(data.name or ""))
    if problems := _of_named(data, task, {}):
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


def _with_known(data: Data) -> Data:
    """The section with what is known of a named data set where the recipe leaves it open."""
    known = DATASETS.get(data.name or "")
    if known is None:
        return data
    like_at = known.like_at if data.like_at is None else data.like_at
    rating_range = data.rating_range or (list(known.rating_range) if known.rating_range else None)
    return dataclasses.replace(data, like_at=like_at, rating_range=rating_range)


def _unknown_name(name: str) -> str:
    return f"data.name: no data set '{name}'; expected one of {', '.join(sorted(DATASETS))}"


def _of_named(data: Data, task: Task | None, of_users: Mapping[str, str]) -> list[str]:
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


def _looks(
    data: Data, shown: Sequence[str], task: Task | None, of_users: Mapping[str, str]
) -> Iterator[tuple[str, Callable[[str], object]]]:
    """Each source with what looks at its columns."""
    if data.interactions:
        yield data.interactions, lambda source: _first_event(source, data, task)
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


def _first_record(source: str, data: Data, task: Task | None) -> None:
    """Read the first record as all of them will be."""
    first = _record_file(source, data, task or "click", most=1)
    if data.prompts is None:
        events_of(first, source, 0, data.record_marks)


def _check_where(source: str, data: Data) -> None:
    _, names, kept = _side_names(source, data.columns, ITEMS)
    for column in data.items_where:
        _check_column(column, [*names, *kept], source)


def _check_shown(source: str, data: Data, required: Sequence[str], shown: Mapping[str, str]) -> None:
    _, names, kept = _side_names(source, data.columns, required)
    for name, key in shown.items():
        if name not in (*names, *kept):
            found = ", ".join((*names, *kept))
            near = tables.nearest_column(name, [*names, *kept])
            todo = f"did you mean {{{near}}}?" if near else "use one of them"
            raise DataError(f"{key}: no column '{name}' in {source} ({found}); {todo}")


def _files(data: Data, task: Task | None, warnings: list[str]) -> tuple[str, pl.DataFrame, pl.DataFrame]:
    where = data.interactions or ""
    table = tables.scan(where, data.hub_revision)
    raw = _select(table, where, data.columns, data, task, with_title=data.items is None, warnings=warnings)
    events = _parse(raw, where, data.like_at, data.rating_range, task)
    if data.items is None:
        items = events.select("item_id", raw["title"]).unique("item_id", keep="first", maintain_order=True)
        items = items.sort("item_id")
    else:
        items = _side_table(data.items, data.columns, ITEMS)
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
        if names.pop("rating", None) is not None and data.like_at is not None:
            warnings.append(f"{where}: the label column is used; rating and data.like_at are not")
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
    return raw.with_columns(seconds.alias("timestamp"))


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


def _side_table(source: str, columns: Mapping[str, str], required: Sequence[str]) -> pl.DataFrame:
    """The items or users table: every column that a template could show, ids parsed, lists of text joined."""
    table, names, kept = _side_names(source, columns, required)
    frame = tables.collect(table.select(*kept, **{ours: pl.col(theirs) for ours, theirs in names.items()}), source)
    ids = tables.parse_ids(frame[required[0]], source, required[0]).alias(required[0])
    texts = [frame[name].cast(pl.String) for name in required[1:]]
    rest = [tables.showable(frame[name]) for name in frame.columns if name not in required]
    return pl.DataFrame([ids, *texts, *(column for column in rest if column is not None)])


def _users(data: Data, user_ids: pl.Series, used: Mapping[str, str], warnings: list[str]) -> pl.DataFrame:
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


# --- cleaning ---------------------------------------------------------------------------------------------------------


def _join_items(
    events: pl.DataFrame, items: pl.DataFrame, where: str, warnings: list[str]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Give each event the row of its item; drop items that have no title or came before, and events without item."""
    blank = items["title"].is_null() | (items["title"].str.strip_chars() == "")
    titled = items.filter(~blank)
    if count := items.height - titled.height:
        warnings.append(f"items: {count} rows without title dropped")
    items = titled.unique("item_id", keep="first", maintain_order=True)
    if count := titled.height - items.height:
        warnings.append(f"items: {count} rows with an item_id that came before dropped")
    event_ids, item_ids = tables.same_kind(events["item_id"], items["item_id"])
    items = items.with_columns(item_ids)
    codes = pl.DataFrame({"item_id": item_ids, "item": np.arange(len(item_ids), dtype=np.int32)})
    joined = events.with_columns(event_ids).join(codes, on="item_id", how="left", maintain_order="left")
    unknown = joined["item"].is_null()
    if unknown.all():
        raise DataError(
            f"{where}: none of its item ids (such as {event_ids[0]!r}) is in the items table (such as "
            f"{item_ids[0] if len(item_ids) else 'nothing'!r}); expected the same ids: check data.columns.item_id"
        )
    if count := int(unknown.sum()):
        example = event_ids.filter(unknown)[0]
        warnings.append(f"{where}: {count} rows of unknown items (such as {example!r}) dropped")
        joined = joined.filter(~unknown)
    return joined.drop("item_id"), items


def _where(
    events: pl.DataFrame, items: pl.DataFrame, wanted: Mapping[str, Sequence[str]], where: str
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The items of which each column of `wanted` says nothing but its values, and their events."""
    kept = np.ones(items.height, dtype=bool)
    for column, values in wanted.items():
        _check_column(column, items.columns, "the items table")
        parts = items[column].cast(pl.String).str.replace_all("|", ",", literal=True).str.split(",")
        parts = parts.list.eval(pl.element().str.strip_chars())
        there = parts.explode().unique().drop_nulls().sort()
        if unknown := [value for value in values if value not in there]:
            near = nearest(unknown[0], there.to_list())
            found = ", ".join(there.head(20).to_list())
            todo = f"did you mean {near}?" if near else "use some of them"
            raise DataError(f"data.items_where.{column}: no item is {unknown[0]!r}; found {found}; {todo}")
        kept &= parts.list.eval(pl.element().is_in(list(values))).list.all().fill_null(False).to_numpy()
    if kept.all():
        return events, items
    code = np.where(kept, np.cumsum(kept) - 1, -1).astype(np.int32)
    events = events.with_columns(item=pl.Series(code[events["item"].to_numpy()])).filter(pl.col("item") >= 0)
    if events.is_empty():
        raise DataError(f"data.items_where: no event of {where} is on an item that has all of it; name more values")
    return events, items.filter(pl.Series(kept))


def _check_column(column: str, found: Sequence[str], where: str) -> None:
    if column not in found:
        near = tables.nearest_column(column, list(found))
        todo = f"did you mean {near}?" if near else "use one of them"
        raise DataError(f"data.items_where: no column '{column}' in {where} ({', '.join(found)}); {todo}")


def _code_users(events: pl.DataFrame) -> tuple[pl.DataFrame, pl.Series]:
    user_ids = events["user_id"].unique().sort()
    codes = pl.DataFrame({"user_id": user_ids, "user": np.arange(len(user_ids), dtype=np.int32)})
    return events.join(codes, on="user_id", how="left", maintain_order="left").drop("user_id"), user_ids


def _drop_repeats(events: pl.DataFrame, where: str, warnings: list[str]) -> pl.DataFrame:
    key = [name for name in ("user", "item", "timestamp") if name in events.columns]
    user, item = events["user"].to_numpy(), events["item"].to_numpy()
    order = sorted_order(user, item)
    user, item = user[order], item[order]
    again = np.flatnonzero((user[1:] == user[:-1]) & (item[1:] == item[:-1]))
    # In most tables few rows share user and item with another: only these are worth a look at their time.
    rows = np.union1d(order[again], order[again + 1])
    last = events.select(key).with_row_index("row")[rows].unique(key, keep="last")["row"].to_numpy()
    if count := len(rows) - len(last):
        kept = np.ones(events.height, dtype=bool)
        kept[rows], kept[last] = False, True
        events = events.filter(kept)
        same = "user_id, item_id and timestamp" if "timestamp" in key else "user_id and item_id"
        warnings.append(f"{where}: {count} duplicate rows (same {same}) dropped, the last of each kept")
    return events


def _sample(
    events: pl.DataFrame, user_ids: pl.Series, count: int, seed: int, warnings: list[str]
) -> tuple[pl.DataFrame, pl.Series]:
    if count > len(user_ids):
        warnings.append(f"data.sample_users: {count} asked for, {len(user_ids)} there: all kept")
        return events, user_ids
    kept = np.sort(drawn_order(len(user_ids), seed, "sample_users")[:count])
    code = np.full(len(user_ids), -1, dtype=np.int32)
    code[kept] = np.arange(count, dtype=np.int32)
    events = events.with_columns(user=pl.Series(code[events["user"].to_numpy()])).filter(pl.col("user") >= 0)
    return events, user_ids.gather(kept)


def _with_negatives(events: pl.DataFrame, each: int, seed: int, where: str, warnings: list[str]) -> pl.DataFrame:
    if count := int((events["label"] == 0).sum()):
        raise DataError(
            f"{where}: {count} rows have label 0; expected clicks alone beside data.sampled_negatives: leave it out, "
            "to learn from these, or leave these rows out"
        )
    found, drawn = negatives.beside(events, each, seed)
    warnings.append(f"{where}: {drawn} negatives drawn beside {events.height} clicks (data.sampled_negatives)")
    return found


def _check_classes(label: pl.Series, where: str, data: Data) -> None:
    if label.n_unique() == 1:
        todo = "" if data.like_at is None else f": change data.like_at, which is {data.like_at:g}"
        if label[0] == 1 and data.sampled_negatives is None:
            todo += f"{' or' if todo else ': if every row is a click,'} set data.sampled_negatives"
        raise DataError(f"{where}: all {len(label)} rows have label {label[0]}; expected both 0 and 1{todo}")


def _fingerprint(
    events: pl.DataFrame, user_ids: pl.Series, items: pl.DataFrame, users: pl.DataFrame | None = None
) -> str:
    digest = hashlib.sha256()
    columns = [events[name] for name in sorted(events.columns)]
    columns += [user_ids.alias("user_id"), *(items[name].alias(f"items.{name}") for name in sorted(items.columns))]
    if users is not None:
        columns += [users[name].alias(f"users.{name}") for name in sorted(users.columns)]
    for column in columns:
        digest.update(f"{column.name}:{len(column)};".encode())
        coded = column.name in ("user", "item", "label", "timestamp", "rating")
        for start in range(0, len(column), HASHED_ROWS):
            part = column.slice(start, HASHED_ROWS)
            if coded:
                array = part.to_numpy()
                digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
            else:  # as text, so that a year is the same from a CSV and from a Parquet file
                text = part.cast(pl.String)
                lengths = text.str.len_bytes().cast(pl.Int64).fill_null(-1).to_numpy()
                digest.update(lengths.astype("<i8", copy=False).tobytes())
                digest.update("".join(text.fill_null("").to_list()).encode())
    return digest.hexdigest()
