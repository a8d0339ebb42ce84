"""Everybody's events as one log, in order of time, and what of them came before a moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from peftrec import artifact, tables
from peftrec.errors import DataError
from peftrec.interactions import sorted_order

COLUMNS = ("user_id", "item_id", "timestamp", "label", "rating")
"""What a log may hold, by our names; the answer is a label or a rating."""

Codes = npt.NDArray[np.int64]


class Histories:
    """Events of all users, sorted by user and time: 13 bytes each (16 where they are ratings), and the users' ids.

    Most people want `read`.

    Attributes:
        users: ids, sorted, (U,).
        begin: each user's first event, and the number of all, (U + 1,).
        item: row in the items table, (n,).
        answer: what `Recommender.score` takes behind an item, (n,): 0 or 1, or the rating.
        timestamp: seconds, (n,); None where the log has no times and its rows are in order of time.
        item_ids: ids of the items table, by row.
        warnings: what was left out, one counted line each.
    """

    def __init__(
        self,
        users: pl.Series,
        begin: Codes,
        item: npt.NDArray[np.int32],
        answer: npt.NDArray[Any],
        timestamp: Codes | None,
        item_ids: Sequence[Any],
        warnings: tuple[str, ...] = (),
    ) -> None:
        self.users, self.begin, self.item, self.answer = users, begin, item, answer
        self.timestamp, self.item_ids, self.warnings = timestamp, item_ids, warnings

    @classmethod
    def none(cls) -> Histories:
        """No log: nobody has a history."""
        nothing = np.zeros(0, dtype=np.int32)
        return cls(pl.Series([], dtype=pl.String), np.zeros(1, dtype=np.int64), nothing, nothing, None, ())

    @classmethod
    def read(
        cls, source: Any, about: artifact.Artifact, items: pl.DataFrame, columns: Mapping[str, str] | None = None
    ) -> Histories:
        """Read a log.

        Args:
            source: a CSV, Parquet, JSON or JSONL file, a polars or a pandas frame: `user_id`, `item_id`, `label` or
                `rating`, and `timestamp`, without which its rows are taken to be in order of time.
            about: the adapter's `peftrec.json`, which says what counts as liked, or which ratings there are.
            items: the items table, as `catalogue.read_items` gives it. Events of other items are left out.
            columns: our name -> name in the log.

        Raises:
            DataError: it cannot be read, a column is missing, or a value cannot be what its column holds.
        """
        where, table = _table(source)
        names = _names(tables.column_names(table, where), where, about, columns or {})
        raw = tables.collect(table.select(**{ours: pl.col(theirs) for ours, theirs in names.items()}), where)
        answer = _answers(raw, where, about)
        time = _times(raw, where)
        user_ids = tables.parse_ids(raw["user_id"], where, "user_id")
        item_ids, known = tables.same_kind(tables.parse_ids(raw["item_id"], where, "item_id"), items["item_id"])
        item = places(item_ids, known)
        events = pl.DataFrame(
            {"user_id": user_ids, "item": item, "answer": answer, **({} if time is None else {"timestamp": time})}
        )
        warnings = []
        if count := int((item < 0).sum()):
            example = item_ids.filter(pl.Series(item < 0))[0]
            if count == len(item):
                raise DataError(
                    f"{where}: none of its item ids (such as {example!r}) is in the items table (such as "
                    f"{items['item_id'][0] if len(items) else 'nothing'!r}); expected the same ids: check item_id"
                )
            warnings.append(f"{where}: {count:,} rows of unknown items (such as {example!r}) left out")
            events = events.filter(pl.col("item") >= 0)
        # As in training: what was written down twice happened once.
        key = [name for name in ("user_id", "item", "timestamp") if name in events.columns]
        once = events.unique(key, keep="last", maintain_order=True)
        if count := len(events) - len(once):
            warnings.append(
                f"{where}: {count:,} duplicate rows (same {', '.join(key)}) left out, the last of each kept"
            )
        return cls._sorted(once, items["item_id"].to_list(), tuple(warnings))

    @classmethod
    def _sorted(cls, events: pl.DataFrame, item_ids: Sequence[Any], warnings: tuple[str, ...]) -> Histories:
        users = events["user_id"].unique().sort()
        user = places(events["user_id"], users)
        time = events["timestamp"].to_numpy() if "timestamp" in events.columns else None
        order = sorted_order(user, np.zeros(len(user), dtype=np.int64) if time is None else time)
        begin = np.concatenate(([0], np.cumsum(np.bincount(user, minlength=len(users)))))
        return cls(
            users,
            begin,
            events["item"].to_numpy()[order].astype(np.int32),
            events["answer"].to_numpy()[order],
            None if time is None else time[order],
            item_ids,
            warnings,
        )

    def __len__(self) -> int:
        return len(self.item)

    def before(self, user_ids: pl.Series, seconds: Codes | None) -> tuple[Codes, Codes]:
        """Which events came before a moment: first one and one past the last, (n,) each; equal where there are none.

        They are -1 for whom the log does not know.

        Args:
            user_ids: whose, (n,), as `tables.parse_ids` gives them.
            seconds: strictly before when, (n,); None is everything that is in the log.
        """
        user = _among_sorted(user_ids, self.users)
        known = user >= 0
        first = np.where(known, self.begin[user], -1)
        last = np.where(known, self.begin[user + 1], -1)
        if seconds is not None and self.timestamp is not None:
            for row in np.flatnonzero(known).tolist():
                own = self.timestamp[first[row] : last[row]]
                last[row] = first[row] + np.searchsorted(own, seconds[row], side="left")
        return first, last

    def entries(self, first: int, last: int) -> list[tuple[Any, Any]]:
        """These events as `Recommender.score` takes a history: (item id, answer), oldest first."""
        items, answers = self.item[first:last].tolist(), self.answer[first:last].tolist()
        return [(self.item_ids[item], answer) for item, answer in zip(items, answers, strict=True)]


def places(ids: pl.Series, known: pl.Series) -> Codes:
    """Where each id stands in `known`, (n,); -1 where it does not. Both are parsed; text and numbers meet as text."""
    if len(known) == 0:
        return np.full(len(ids), -1, dtype=np.int64)
    ids, known = tables.same_kind(ids, known)
    asked = pl.DataFrame({"id": ids})
    rows = pl.DataFrame({"id": known, "place": np.arange(len(known), dtype=np.int64)})
    found = asked.join(rows, on="id", how="left", maintain_order="left")["place"]
    return found.fill_null(-1).to_numpy()


def _among_sorted(ids: pl.Series, known: pl.Series) -> Codes:
    """As `places`, where `known` is sorted and may be far longer than `ids`."""
    if ids.dtype != known.dtype:
        text = ids.cast(pl.String)
        numbers = text.cast(known.dtype, strict=False)
        ids = pl.select(pl.when(numbers.cast(pl.String) == text).then(numbers)).to_series()
    if len(known) == 0 or len(ids) == 0:
        return np.full(len(ids), -1, dtype=np.int64)
    place = known.search_sorted(ids).clip(0, len(known) - 1)
    same = (known.gather(place) == ids).fill_null(False).to_numpy()
    return np.where(same, place.to_numpy().astype(np.int64), -1)


def _table(source: Any) -> tuple[str, pl.LazyFrame]:
    if isinstance(source, (str, Path)):
        return str(source), tables.scan(str(source))
    found = tables.frame_columns(source, "history", "the path of a table, or a polars or pandas frame")
    return "history", tables.from_frame(source, "history", found).lazy()


def _names(found: list[str], where: str, about: artifact.Artifact, columns: Mapping[str, str]) -> dict[str, str]:
    answers = ("rating",) if about.task == "rating" else ("label",) if about.clicks_alone else ("label", "rating")
    optional = [*answers, "timestamp"]
    given = {ours: theirs for ours, theirs in columns.items() if ours in ("user_id", "item_id", *optional)}
    names = tables.match_columns(found, where, given, ["user_id", "item_id"], optional, key="columns")
    if not about.clicks_alone and not any(name in names for name in answers):
        hints = [near for name in answers if (near := tables.nearest_column(name, found))]
        todo = f"set columns.{answers[-1]}={hints[0]}" if hints else f"add it, or set columns.{answers[-1]}=<column>"
        wanted = " or ".join(f"'{name}'" for name in answers)
        raise DataError(f"{where}: no column {wanted} (found {', '.join(found)}); {todo}")
    if "label" in names:
        names.pop("rating", None)
    return names


def _answers(raw: pl.DataFrame, where: str, about: artifact.Artifact) -> pl.Series:
    if "label" in raw.columns:
        return tables.parse_labels(raw["label"], where)
    if about.clicks_alone:
        return pl.repeat(1, raw.height, dtype=pl.Int8, eager=True)
    ratings = tables.parse_numbers(raw["rating"], where, "rating")
    if about.task == "click":
        if about.like_at is None:
            raise DataError(
                f"{where}: ratings, but the adapter was trained on labels; expected a column 'label' with 0 or 1; add "
                "it, or name it with columns.label=<column>"
            )
        return (ratings >= about.like_at).cast(pl.Int8)
    scale = np.asarray(about.target.scale)
    near = np.abs(ratings.to_numpy()[:, None] - scale).argmin(axis=1)
    shown = ", ".join(f"{value:g}" for value in scale)
    far = np.abs(scale[near] - ratings.to_numpy()) > 1e-6
    tables.refuse(where, "rating", raw["rating"], pl.Series(far), f"one of {shown}")
    return pl.Series(scale[near].astype(np.float32))


def _times(raw: pl.DataFrame, where: str) -> pl.Series | None:
    if "timestamp" not in raw.columns:
        return None
    seconds = tables.parse_seconds(raw["timestamp"], where)
    tables.refuse(where, "timestamp", raw["timestamp"], seconds.is_null(), "a time in every row, or no such column")
    return seconds
