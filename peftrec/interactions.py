"""Events and items from a named data set, the user's files, the Hub or ready-made prompts, checked and made canonical.

Whatever the source, the result is the same: events with dense integer codes, one label and one time each. What cannot
be right is an error; what can be mended by leaving rows out is, and `Interactions.warnings` says how many.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from peftrec import negatives, sources, tables
from peftrec.config import Data
from peftrec.draws import drawn_order
from peftrec.errors import DataError
from peftrec.schema import nearest
from peftrec.sources import Task

HASHED_ROWS = 1_000_000
CLICK_SCALE = (0.0, 1.0)
MOST_RATINGS = 26


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
    data = sources.with_known(data)
    name, events, items = sources.read(data, task, warnings)
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
    users = sources.users(data, user_ids, with_users, warnings) if with_users else None
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
    # Float32 has 4.7 as 4.69999980926: the shortest number that it can stand for is what was given.
    found = np.array([float(str(one)) for one in ratings.cast(pl.Float32).unique().sort().to_numpy()])
    if len(found) == 1:
        raise DataError(f"{where}: all {len(ratings)} ratings are {found[0]:g}; expected at least two different ones")
    low, high = (found[0], found[-1]) if limits is None else limits
    step = float(np.diff(found).min())
    steps = round((high - low) / step)
    grid = np.round(np.linspace(low, high, steps + 1), 6)
    places = (found - low) / step
    if steps < MOST_RATINGS and np.allclose(places, np.round(places)) and np.isclose(low + step * steps, high):
        found = grid
    if len(found) > MOST_RATINGS:
        raise DataError(
            f"{where}: {len(found)} different ratings from {found[0]:g} to {found[-1]:g}; expected at most "
            f"{MOST_RATINGS}, each of which is an answer of the model: round them, for example to halves"
        )
    return tuple(found.tolist())


def sorted_order(key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The order (n,) of rows by a code `key` (from -1), then by a whole number `value`, then as they stand."""
    low = int(value.min()) if len(value) else 0
    shift = (int(value.max(initial=low)) - low).bit_length()
    if int(key.max(initial=0)).bit_length() + shift > 62:
        return np.lexsort((value, key))
    # One number for both sorts in a quarter of the time of two keys.
    return np.argsort((key.astype(np.int64) << shift) + (value - low), kind="stable")


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
        sources.check_column(column, items.columns, "the items table")
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
    if label.n_unique() == 1 and data.sampled_negatives is not None:
        raise DataError(
            f"{where}: no negative could be drawn, for everybody has met whatever was there; expected more items, or "
            "labels; leave data.sampled_negatives out"
        )
    if label.n_unique() == 1:
        todo = "" if data.like_at is None else f": change data.like_at, which is {data.like_at:g}"
        if label[0] == 1:
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
