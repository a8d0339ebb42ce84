"""Negatives for logs of clicks alone: beside each event, items that were there and that its person did not take.

Who clicked is recorded and who did not is not, so there is nothing to tell a click from. Negatives are drawn from what
others had met by then, as often as they had. So a popular item is a negative about as often as it is a click, and no
later event is looked at to weigh an item. What nobody had met by then is never drawn: a first click is told by that.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from peftrec.draws import stream

ROUNDS = 200
"""Draws of one negative before it is given up: its person has met nearly everything that was there."""


def beside(events: pl.DataFrame, each: int, seed: int) -> tuple[pl.DataFrame, int]:
    """The events with drawn ones in front of each, of its person at its time, and how many of these there are.

    Args:
        events: `user`, `item` and `timestamp`, and whatever else a drawn event shares with its own; all are clicks.
        each: negatives of one event, on items that its person meets nowhere in `events` and has drawn at that time for
            none of them.
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
    moment = _numbered(user, time)
    row = np.repeat(np.arange(len(item)), each)
    drawn = np.full(len(row), -1, dtype=np.int64)
    open_ = np.arange(len(row))
    taken = np.empty(0, dtype=np.int64)  # what the moments that are still open have drawn
    generator = stream(seed, "negatives")
    for _ in range(ROUNDS):
        event = row[open_]
        one = known[(generator.random(len(open_)) * there[event]).astype(np.int64)]
        code = moment[event] * items + one
        fits = ~_within(user[event] * items + one, met) & ~_within(code, taken) & _first(code)
        drawn[open_[fits]] = one[fits]
        open_ = open_[~fits]
        if not len(open_):
            break
        taken = np.union1d(taken, code[fits])
        taken = taken[_within(taken // items, np.unique(moment[row[open_]]))]
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


def _numbered(user: np.ndarray, time: np.ndarray) -> np.ndarray:
    """A number for each person's moment, (n,)."""
    order = np.lexsort((time, user))
    new = (np.diff(user[order], prepend=-1) != 0) | (np.diff(time[order], prepend=0) != 0)
    found = np.empty(len(user), dtype=np.int64)
    found[order] = np.cumsum(new) - 1
    return found


def _within(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Whether each value is in the other array."""
    if not len(ascending):
        return np.zeros(len(values), dtype=bool)
    place = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    found: np.ndarray = ascending[place] == values
    return found


def _first(values: np.ndarray) -> np.ndarray:
    """Whether each value is the first of its kind."""
    found = np.zeros(len(values), dtype=bool)
    found[np.unique(values, return_index=True)[1]] = True
    return found
