"""A polars or pandas frame of pairs -> the same frame with scores; `pairs` looks up what each pair's user knew."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from peftrec import tables
from peftrec.pairs import Known, items_of, score_asked
from peftrec.recommender import Recommender


def score_frame(recommender: Recommender, pairs: Any, history: Any, *, columns: Mapping[str, str] | None = None) -> Any:
    """The frame with a column `score` and, where clicks are predicted, `probability`, rows in their order.

    A pair with a `timestamp` knows its user's events strictly before that (in whole seconds); without the column it
    knows all of them. Users who are not in the log are scored as people of whom nothing is known, and a warning counts
    them.

    Args:
        recommender: with an items table.
        pairs: a polars or pandas frame with `user_id`, `item_id` and optionally `timestamp`.
        history: the log, see `histories.Histories.read`; None is nobody's history.
        columns: our name -> name in the pairs, in the log or in both.

    Raises:
        DataError: a table or a column that cannot be used, an item that is not in the items table, or columns that
            would be overwritten.
    """
    scores = score(recommender, pairs, known_with(recommender, history, columns))
    if isinstance(pairs, pl.DataFrame):
        return pairs.hstack(scores)
    return pairs.assign(**scores.to_dict(as_series=False))


def known_with(recommender: Recommender, history: Any, columns: Mapping[str, str] | None = None) -> Known:
    """The log for a loaded recommender, see `score_frame`; warns of what is left out.

    Raises:
        DataError: the log cannot be used, or there is no items table.
    """
    known = Known.of(recommender.artifact, items_of(recommender, "history"), history, columns)
    for line in known.histories.warnings:
        warnings.warn(line, stacklevel=3)
    return known


def score(recommender: Recommender, pairs: Any, known: Known, where: str = "pairs") -> pl.DataFrame:
    """The columns that `score_frame` adds; warns of strangers, and of pairs whose answers the model sees.

    Raises:
        DataError: as `score_frame`.
    """
    names = known.names(tables.frame_columns(pairs, where), where)
    frame = tables.from_frame(pairs, where, list(names.values()))
    asked = known.asked(frame, where)
    if strangers := frame[names["user_id"]].filter(pl.Series(asked.first < 0)).unique(maintain_order=True).to_list():
        warnings.warn(
            f"{where}: {len(strangers):,} users have no events in the log (such as {strangers[0]!r}) and are scored as "
            "people of whom nothing is known; look whether the ids are the same",
            stacklevel=3,
        )
    events = known.histories.item
    if "timestamp" not in names and (
        count := sum(int(np.isin(asked.item[rows], events[first:last]).sum()) for first, last, rows in asked.groups())
    ):
        warnings.warn(
            f"{where}: {count:,} of {len(frame):,} are in the log themselves, so that the model sees their answers; "
            "give pairs a timestamp, or leave these events out of the log",
            stacklevel=3,
        )
    return score_asked(recommender, asked, known.histories)
