"""Negatives for logs of clicks alone: beside each event, items that were there and that its person did not take.

Who clicked is recorded and who did not is not, so there is nothing to tell a click from. Negatives are drawn from what
others had met by then, as often as they had. So a popular item is a negative as often as it is a click, and popularity
alone tells nothing; what nobody had met by then is never drawn, and no later event is looked at to weigh an item.
"""

from __future__ import annotations

import zlib

import numpy as np
import polars as pl

ROUNDS = 200
"""Draws of one negative before it is given up: its person has met nearly everything that was there."""


def beside(events: pl.DataFrame, each: int, seed: int) -> tuple[pl.DataFrame, int]:
    """The events with drawn ones in front of each, of its person at its time, and how many of these there are.

    Args:
        events: `user`, `item` and `timestamp`, and whatever else a drawn event shares with its own; all are clicks.
        each: negatives of one event, on different items that its person meets nowhere in `events`.
        seed: draws them.

    Returns:
        The events with `label`, 0 for what was drawn and 1 for the others. Where too few items were there to draw
        from, an event has fewer negatives, or none.
    """
    user, item, time = (events[name].to_numpy().astype(np.int64) for name in ("user", "item", "timestamp"))
    items = int(item.max(initial=0)) + 1
    order = np.argsort(time, kind="stable")
    known = item[order]  # of which each event may draw so many from the front:
    there = np.searchsorted(time[order], time, side="right")
    met = np.unique(user * items + item)
    row = np.repeat(np.arange(len(item)), each)
    drawn = np.full(len(row), -1, dtype=np.int64)
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(b"negatives")]))
    for _ in range(ROUNDS):
        open_ = np.flatnonzero(drawn < 0)
        if not len(open_):
            break
        place = (generator.random(len(open_)) * there[row[open_]]).astype(np.int64)
        drawn[open_] = np.where(_within(user[row[open_]] * items + known[place], met), -1, known[place])
        drawn[_again(row, drawn, items)] = -1
    found = np.flatnonzero(drawn >= 0)
    source = np.concatenate((row[found], np.arange(len(item))))
    label = np.repeat(np.array([0, 1], dtype=np.int8), [len(found), len(item)])
    # A negative stands before its event, so that it does not see that one's answer where ties are in order.
    kept = np.lexsort((label, source))
    taken = np.concatenate((drawn[found], item)).astype(np.int32)
    return (
        events[source[kept]].with_columns(item=pl.Series(taken[kept]), label=pl.Series(label[kept])),
        len(found),
    )


def _within(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Whether each value is in the other array."""
    place = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    found: np.ndarray = ascending[place] == values
    return found


def _again(row: np.ndarray, drawn: np.ndarray, items: int) -> np.ndarray:
    """Places where an event has drawn an item that it has already."""
    there = np.flatnonzero(drawn >= 0)
    code = row[there] * items + drawn[there]
    order = np.argsort(code, kind="stable")
    repeated: np.ndarray = there[order[1:][code[order][1:] == code[order][:-1]]]
    return repeated
