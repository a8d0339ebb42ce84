"""Scores for a table of (user, item) pairs, each with what its user knew by then, looked up in a log of events."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from peftrec import tables
from peftrec.errors import DataError
from peftrec.recommender import Recommender

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

ANSWERS = ("label", "rating")


def score_frame(recommender: Recommender, pairs: Any, history: Any, *, new_users: bool = False) -> Any:
    """The frame with a column `score` and, where clicks are predicted, `probability`, rows in their order.

    A pair with a `timestamp` knows its user's events strictly before that (in whole seconds); without the column it
    knows all of them. A history is read once for all pairs that know the same.

    Args:
        recommender: with an items table.
        pairs: a polars or pandas frame with `user_id`, `item_id` and optionally `timestamp`.
        history: the log, a frame of either kind with `user_id`, `item_id`, `rating` or `label`, and `timestamp` where
            pairs have one. Without times its rows are in order, oldest first. A user's row of the same item and time as
            another counts once, the last one.
        new_users: score users who have no row in the log, as people of whom nothing is known; else they are an error.

    Raises:
        DataError: a frame or a column that cannot be used, ids that are in no table, no pairs, or columns that would be
            overwritten.
    """
    kept = frame_of(pairs, "pairs", ("user_id", "item_id"), ("timestamp",))
    if taken := sorted({"score", "probability"} & set(pairs.columns)):
        raise DataError(f"pairs: a column '{taken[0]}' is there already; drop or rename it")
    scores = pair_scores(recommender, kept, Histories(recommender, history), new_users=new_users)
    found = {"score": scores} | ({} if recommender.artifact.task == "rating" else {"probability": chances(scores)})
    if isinstance(pairs, pl.DataFrame):
        return pairs.with_columns(**{name: pl.Series(values) for name, values in found.items()})
    return pairs.assign(**found)


def chances(log_odds: Floats) -> Floats:
    """Chances of a like, (n,), by their log-odds."""
    found: Floats = np.exp(-np.logaddexp(0, -log_odds))
    return found


class Histories:
    """A log's events by user, oldest first.

    Args:
        recommender: tells which answers are understood, and which items there are.
        log: as `history` in `score_frame`.

    Raises:
        DataError: as `score_frame`.
    """

    def __init__(self, recommender: Recommender, log: Any) -> None:
        wanted = ("rating",) if recommender.artifact.task == "rating" else ANSWERS
        frame = frame_of(log, "history", ("user_id", "item_id"), ("timestamp", *wanted), empty=True)
        self.answer = next((name for name in wanted if name in frame.columns), "")
        if not self.answer:
            raise DataError(
                f"history: no column {' or '.join(map(repr, wanted))} (found {', '.join(map(str, log.columns))}); "
                "expected what each person answered; add it"
            )
        frame = _parsed(frame, "history")
        self.timed = "timestamp" in frame.columns
        parse = tables.parse_labels if self.answer == "label" else tables.parse_numbers
        frame = frame.with_columns(parse(frame[self.answer], "history", self.answer).alias(self.answer))
        known_items(recommender, frame["item_id"], "history")
        key = [name for name in ("user_id", "item_id", "timestamp") if name in frame.columns]
        once = frame.unique(key, keep="last", maintain_order=True)
        if count := frame.height - once.height:
            warnings.warn(f"history: {count} rows of the same {', '.join(key)} dropped, the last kept", stacklevel=4)
        order = ["user_id", "timestamp"] if self.timed else ["user_id"]
        self.events = once.sort(order, maintain_order=True)
        starts = self.events.select(pl.col("user_id").rle_id()).to_series().to_numpy()
        self.start = np.flatnonzero(np.append(True, starts[1:] != starts[:-1])[: len(starts)]).astype(np.int64)
        self.user_ids = self.events["user_id"][self.start.tolist()]
        self.end = np.append(self.start[1:], len(starts))[: len(self.start)]

    def before(self, user: int, second: int | None) -> int:
        """How many of a user's events lie strictly before a time; None is after all of them."""
        start, end = int(self.start[user]), int(self.end[user])
        if second is None:
            return end - start
        return int(np.searchsorted(self.events["timestamp"][start:end].to_numpy(), second, side="left"))

    def first(self, user: int, count: int) -> list[dict[str, Any]]:
        """A user's first events as `Recommender.score` takes them."""
        rows = self.events[int(self.start[user]) : int(self.start[user]) + count]
        return rows.select("item_id", self.answer).to_dicts()


def pair_scores(recommender: Recommender, pairs: pl.DataFrame, log: Histories, *, new_users: bool) -> Floats:
    """Scores of pairs, (n,), in their order.

    Args:
        recommender: with an items table.
        pairs: of `frame_of`.
        log: the histories.
        new_users: as in `score_frame`.

    Raises:
        DataError: as `score_frame`.
    """
    pairs = _parsed(pairs, "pairs")
    known_items(recommender, pairs["item_id"], "pairs")
    users = _codes(pairs["user_id"], log, new_users)
    times: Sequence[int | None] = [None] * pairs.height
    if "timestamp" in pairs.columns:
        if not log.timed:
            raise DataError(
                "history: no column 'timestamp', though pairs have one; add it, or drop it from pairs, which then know "
                "all events of their users"
            )
        times = pairs["timestamp"].to_list()
    else:
        _warn_of_answers(pairs, log)
    seen = [0 if user < 0 else log.before(user, second) for user, second in zip(users.tolist(), times, strict=True)]
    scores = np.zeros(pairs.height)
    items = pairs["item_id"].to_list()
    order = sorted(range(pairs.height), key=lambda row: (users[row], seen[row]))
    for (user, count), rows in groupby(order, key=lambda row: (int(users[row]), seen[row])):
        picked = list(rows)
        past = log.first(user, count) if count else []
        scores[picked] = recommender.score(past, [{"item_id": items[row]} for row in picked])
    return scores


def frame_of(
    frame: Any, where: str, required: Sequence[str], optional: Sequence[str] = (), *, empty: bool = False
) -> pl.DataFrame:
    """Columns of a polars or pandas frame.

    Args:
        frame: what somebody gave.
        where: what to call it in messages.
        required: columns that must be there.
        optional: columns that are taken where they are there.
        empty: whether it may have no rows.

    Raises:
        DataError: it is no frame, lacks a column or rows, or has columns that polars does not know.
    """
    is_pandas = type(frame).__module__.startswith("pandas") and hasattr(frame, "columns")
    if not (isinstance(frame, pl.DataFrame) or is_pandas):
        todo = "; collect() it" if isinstance(frame, pl.LazyFrame) else ""
        raise DataError(f"{where}: {type(frame).__name__}; expected a polars or pandas DataFrame{todo}")
    found = [str(name) for name in frame.columns]
    for name in required:
        if name not in found:
            near = tables.nearest_column(name, [other for other in found if other not in required])
            todo = f"rename '{near}'" if near else "add it"
            raise DataError(f"{where}: no column '{name}' (found {', '.join(found) or 'none'}); {todo}")
    wanted = [name for name in (*required, *optional) if name in found]
    try:
        taken = frame.select(wanted) if isinstance(frame, pl.DataFrame) else pl.from_pandas(frame[wanted])
    except (ValueError, TypeError, ImportError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{where}: cannot be read ({tables.first_line(error)}); expected plain columns") from error
    if taken.is_empty() and not empty:
        raise DataError(f"{where}: no rows; expected at least one")
    return taken


def known_items(recommender: Recommender, item_ids: pl.Series, where: str) -> None:
    """Check that the items table has all ids.

    Raises:
        DataError: it lacks some, or there is none.
    """
    items = recommender.catalogue.items
    if items is None:
        raise DataError(f"{where}: item ids, but there is no items table; load the recommender with items=…")
    ours, theirs = tables.same_kind(item_ids, items["item_id"])
    missing = ours.filter(~ours.is_in(theirs.implode())).unique(maintain_order=True)
    if len(missing):
        looks = repr(items["item_id"][0]) if items.height else "nothing"
        raise DataError(
            f"{where}: {len(missing)} item ids are not in the items table, e.g. {missing[0]!r} (there they look like "
            f"{looks}); drop these rows, or load the recommender with an items table that has them"
        )


def _parsed(frame: pl.DataFrame, where: str) -> pl.DataFrame:
    ids = [tables.parse_ids(frame[name], where, name).alias(name) for name in ("user_id", "item_id")]
    frame = frame.with_columns(ids)
    if "timestamp" not in frame.columns:
        return frame
    seconds = tables.parse_seconds(frame["timestamp"], where)
    tables.refuse(where, "timestamp", frame["timestamp"], seconds.is_null(), "a time")
    return frame.with_columns(seconds.alias("timestamp"))


def _codes(user_ids: pl.Series, log: Histories, new_users: bool) -> Ints:
    """Each pair's user by its place in the log, -1 for one who is not there, (n,)."""
    ours, theirs = tables.same_kind(user_ids, log.user_ids)
    known = pl.DataFrame({"user": theirs, "code": np.arange(len(theirs), dtype=np.int64)})
    found = pl.DataFrame({"user": ours}).join(known, on="user", how="left", maintain_order="left")["code"]
    missing = ours.filter(found.is_null()).unique(maintain_order=True)
    if len(missing) and not new_users:
        raise DataError(
            f"pairs: {len(missing)} users have no row in the log, e.g. {missing[0]!r}; drop them, or set "
            "new_users=True to score them as people of whom nothing is known"
        )
    return found.fill_null(-1).to_numpy()


def _warn_of_answers(pairs: pl.DataFrame, log: Histories) -> None:
    on = ["user_id", "item_id"]
    left, right = pairs.select(on), log.events.select(on)
    for name in on:
        ours, theirs = tables.same_kind(left[name], right[name])
        left, right = left.with_columns(ours), right.with_columns(theirs)
    if count := left.join(right, on=on, how="semi").height:
        warnings.warn(
            f"pairs: {count} of {pairs.height} are in the log themselves, so that the model sees their answers; give "
            "pairs a timestamp, or leave these events out of the log",
            stacklevel=4,
        )
