"""Pairs of a person and an item -> scores, each with the person's history as it was before the pair's own time.

histories = Histories.read("log.parquet", recommender.artifact, recommender.catalogue.items)
score_pairs(recommender, pairs, histories)  # pairs: user_id, item_id and, if each has a time of its own, timestamp
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl

from peftrec import artifact, scorer, tables, values
from peftrec.catalogue import read_items
from peftrec.datasets import DATASETS
from peftrec.errors import DataError
from peftrec.histories import COLUMNS, Histories, places
from peftrec.metrics import chances

if TYPE_CHECKING:
    from peftrec.recommender import Recommender

SCORED = ("score", "probability")
"""Columns that scoring adds; the second one where clicks are predicted."""

REQUIRED, OPTIONAL = ("user_id", "item_id"), ("timestamp",)


@dataclass(frozen=True)
class Known:
    """What pairs are scored with besides the model.

    Attributes:
        about: the adapter's `peftrec.json`.
        items: the items table.
        histories: everybody's events.
        columns: our name -> name in the pairs; a name that is not there counts only for those in `must`.
        must: our names whose other names no other table has.
    """

    about: artifact.Artifact
    items: pl.DataFrame
    histories: Histories
    columns: Mapping[str, str]
    must: frozenset[str] = frozenset()

    @classmethod
    def read(
        cls, adapter: str, *, history: Any = None, items: Any = None, columns: Mapping[str, str] | None = None
    ) -> Known:
        """Read the tables beside the pairs; no model is loaded.

        Args:
            adapter: folder of a saved adapter.
            history: the log, see `Histories.read`; None is nobody's history.
            items: the items table, see `catalogue.read_items`; None is that of the adapter's named data set.
            columns: our name -> name. `user_id`, `item_id`, `timestamp`, `label` and `rating` are renamed wherever the
                other name occurs, what else there is in the items table.

        Raises:
            ModelError: no adapter in the folder.
            DataError: a table cannot be used, or a name of `columns` is in none of them.
        """
        about, columns = artifact.read(adapter), dict(columns or {})
        if about.prompt.template is not None and "item" not in values.placeholders(about.prompt.template):
            raise DataError(
                f"{adapter}: an adapter of ready-made prompts, which know neither users nor items; expected one that "
                "was trained on tables; use Recommender.score"
            )
        of_items = {ours: theirs for ours, theirs in columns.items() if ours == "item_id" or ours not in COLUMNS}
        of_events = {ours: theirs for ours, theirs in columns.items() if ours in COLUMNS}
        table, used = _items(items, of_items, about, adapter)
        known = cls.of(about, table, history, of_events)
        if nowhere := [ours for ours in of_items if ours != "item_id" and ours not in used]:
            raise DataError(
                f"columns.{nowhere[0]}: no column '{of_items[nowhere[0]]}' in the items table; expected one of its "
                "columns; leave it out or name another"
            )
        return replace(known, must=known.must - used)

    @classmethod
    def of(
        cls, about: artifact.Artifact, items: pl.DataFrame, history: Any, columns: Mapping[str, str] | None
    ) -> Known:
        """The same beside an items table that is read already.

        Args:
            about: the adapter's `peftrec.json`.
            items: the items table.
            history: the log, see `Histories.read`; None is nobody's history.
            columns: our name -> name in the log, in the pairs or in both.

        Raises:
            DataError: the log cannot be used.
        """
        columns = dict(columns or {})
        if history is None:
            return cls(about, items, Histories.none(), columns, frozenset(columns))
        present = _present(history, columns)
        histories = Histories.read(history, about, items, present)
        return cls(about, items, histories, columns, frozenset(columns.keys() - present.keys()))

    def names(self, found: list[str], where: str) -> dict[str, str]:
        """Our column name -> name in a table of pairs, which has the columns `found`.

        Raises:
            DataError: a column is missing, or would be overwritten; or the pairs have times and the log has none.
        """
        there = {ours: theirs for ours, theirs in self.columns.items() if theirs in found or ours in self.must}
        optional = {*OPTIONAL, *self.must} - {*REQUIRED}
        names = tables.match_columns(found, where, there, REQUIRED, sorted(optional), key="columns")
        if taken := [name for name in SCORED if name in found]:
            raise DataError(f"{where}: a column '{taken[0]}' is there already; scores get this name; rename it")
        if "timestamp" in names and len(self.histories) and self.histories.timestamp is None:
            raise DataError(
                f"{where}: a time in each pair ({names['timestamp']}), but the log has no column 'timestamp'; expected "
                "one, to tell what came before; name it with columns.timestamp=<column>, or leave the pairs' times out"
            )
        return names

    def asked(self, pairs: pl.DataFrame, where: str) -> Asked:
        """What a table of pairs asks for.

        Raises:
            DataError: as `names`, or an id or a time that is missing, or an item that is not in the items table.
        """
        names = self.names(pairs.columns, where)
        user, item = (tables.parse_ids(pairs[names[name]], where, names[name]) for name in REQUIRED)
        row = places(item, self.items["item_id"])
        example = self.items["item_id"][0] if len(self.items) else "none"
        expected = f"an id of the items table of {len(self.items):,} items, such as {example!r}"
        tables.refuse(where, names["item_id"], item, pl.Series(row < 0), expected)
        seconds = None
        if "timestamp" in names:
            column = pairs[names["timestamp"]]
            parsed = tables.parse_seconds(column, where, names["timestamp"])
            tables.refuse(where, names["timestamp"], column, parsed.is_null(), "a time in every row, or no such column")
            seconds = parsed.to_numpy()
        return Asked(row, *self.histories.before(user, seconds))


@dataclass(frozen=True)
class Asked:
    """Pairs as codes: the item's row in the items table, and which of the log's events its history is, (n,) each.

    Where the log does not know the user, `first` and `last` are -1.
    """

    item: npt.NDArray[np.int64]
    first: npt.NDArray[np.int64]
    last: npt.NDArray[np.int64]

    def groups(self) -> Iterator[tuple[int, int, npt.NDArray[np.int64]]]:
        """Pairs of one history together: its first event, one past its last, and the pairs' rows.

        One person's histories follow each other from the shortest on, so that each begins with the one before it.
        Everybody without any event is one group.
        """
        first = np.where(self.last > self.first, self.first, -1)
        last = np.where(self.last > self.first, self.last, -1)
        order = np.lexsort((last, first))
        cuts = np.flatnonzero((np.diff(first[order]) != 0) | (np.diff(last[order]) != 0)) + 1
        for rows in np.split(order, cuts) if len(order) else []:
            yield int(self.first[rows[0]]), int(self.last[rows[0]]), rows


def score_pairs(
    recommender: Recommender,
    pairs: pl.DataFrame,
    histories: Histories,
    *,
    columns: Mapping[str, str] | None = None,
    where: str = "pairs",
) -> pl.DataFrame:
    """Score each pair with its user's history from before the pair's time; without times, with the whole history.

    A user's history is read once for all of the user's pairs: what one moment knows more than the one before is added
    to it. A user without events is scored without history.

    Args:
        recommender: with an items table, the one that `histories` was read with.
        pairs: `user_id`, `item_id` and, if there is one, `timestamp`.
        histories: everybody's events.
        columns: our name -> name in `pairs`.
        where: what to call the table in messages.

    Returns:
        `score` and, where clicks are predicted, `probability`, in the order of the rows.

    Raises:
        DataError: a column is missing, an id or a time cannot be read, or an item is not in the items table.
    """
    renamed = dict(columns or {})
    known = Known(recommender.artifact, items_of(recommender, where), histories, renamed, frozenset(renamed))
    return score_asked(recommender, known.asked(pairs, where), histories)


def items_of(recommender: Recommender, where: str) -> pl.DataFrame:
    """The items table of a loaded recommender.

    Raises:
        DataError: there is none.
    """
    if recommender.catalogue.items is None:
        raise DataError(f"{where}: item ids, but there is no items table; load the recommender with items=…")
    return recommender.catalogue.items


def score_asked(recommender: Recommender, asked: Asked, histories: Histories) -> pl.DataFrame:
    """What `score_pairs` gives, by the pairs' codes."""
    item_ids = items_of(recommender, "pairs")["item_id"]
    scores = np.zeros(len(asked.item))
    with scorer.continued_histories():
        for first, last, rows in asked.groups():
            history = histories.entries(first, last)
            scores[rows] = recommender.score(history, item_ids.gather(asked.item[rows]).to_list())
    scored = {"score": scores}
    if recommender.artifact.task == "click":
        scored["probability"] = chances(scores)
    return pl.DataFrame(scored)


def _items(
    items: Any, columns: Mapping[str, str], about: artifact.Artifact, adapter: str
) -> tuple[pl.DataFrame, frozenset[str]]:
    """The items table, and which of `columns` were renamed in it."""
    if items is not None:
        present = _present(items, columns)
        return read_items(items, present), frozenset(present)
    named = DATASETS.get(about.data.name)
    if named is None or not named.fetched:
        raise DataError(
            f"{adapter}: trained on {about.data.name}, whose items table is not known; expected one, to read items by "
            "their ids; give it with items (--items FILE)"
        )
    return read_items(named.load().items), frozenset()


def _present(source: Any, columns: Mapping[str, str]) -> dict[str, str]:
    """The renames that lead somewhere in this table: they were written for several."""
    if isinstance(source, (str, Path)):
        found = tables.column_names(tables.scan(str(source)), str(source))
    else:
        found = list(getattr(source, "columns", ()))
    return {ours: theirs for ours, theirs in columns.items() if theirs in found}
