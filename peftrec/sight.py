"""Who sees whom: one rule for training, evaluation and ranking.

**An event sees the events strictly earlier in time, and itself.** Within a window that is the causal mask minus the
events that share its timestamp. A candidate is an event whose time is *now* and that no other event sees. Training,
streaming evaluation, frozen evaluation and ranking differ only in the `Sight` that they build.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from peftrec.draws import drawn_order

if TYPE_CHECKING:
    from peftrec.split import Log

NOW = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Sight:
    """Events in reading order, (m,) each: users one after another, within a user by time.

    Attributes:
        row: index into the Log.
        user: user code; windows never cross it.
        time: what orders sight: an event sees those of a smaller time.
        visible: whether later events may see it.
        read: whether its answer is asked.
    """

    row: np.ndarray
    user: np.ndarray
    time: np.ndarray
    visible: np.ndarray
    read: np.ndarray

    def keep(self, mask: np.ndarray) -> Sight:
        """The same events where `mask` (m,) is true."""
        return Sight(self.row[mask], self.user[mask], self.time[mask], self.visible[mask], self.read[mask])


def training_sight(
    log: Log, *, liked_only: bool = False, ordered_ties: bool = False, shuffle: int | None = None
) -> Sight:
    """Every training event is read once and sees the user's earlier training events.

    Args:
        log: the events.
        liked_only: whether only liked events are seen.
        ordered_ties: whether events of one timestamp see those before them in row order.
        shuffle: seed of a random order of each user's events, which then takes the place of time; None keeps time.
    """
    row = np.flatnonzero(log.split == 0)
    return _sight(log, row, _visible(log, row, liked_only), np.ones(len(row), dtype=bool), ordered_ties, shuffle)


def evaluation_sight(
    log: Log,
    rows: np.ndarray,
    *,
    streaming: bool,
    liked_only: bool = False,
    ordered_ties: bool = False,
    shuffle: int | None = None,
) -> Sight:
    """The events `rows` (indices into the log) are read.

    Under `streaming` each sees every earlier event of its user, of whichever split; otherwise it sees all *training*
    events of its user, in the order of time or of `shuffle`, and stands after them as a candidate.
    """
    read = np.zeros(len(log.user), dtype=bool)
    read[rows] = True
    if streaming:
        keep = np.arange(len(log.user)) <= _last_read(log.user, read)
        row = np.flatnonzero(keep)
        return _sight(log, row, _visible(log, row, liked_only), read[row], ordered_ties)
    seen = (log.split == 0) & ~read
    row = np.flatnonzero((seen & np.isin(log.user, log.user[rows])) | read)
    row = row[np.lexsort((row, read[row], log.user[row]))]
    sight = _sight(log, row, ~read[row] & _visible(log, row, liked_only), read[row], ordered_ties, shuffle)
    return Sight(sight.row, sight.user, np.where(sight.read, NOW, sight.time), sight.visible, sight.read)


def _visible(log: Log, row: np.ndarray, liked_only: bool) -> np.ndarray:
    if not liked_only:
        return np.ones(len(row), dtype=bool)
    visible: np.ndarray = log.liked[row]
    return visible


def _sight(
    log: Log, row: np.ndarray, visible: np.ndarray, read: np.ndarray, ordered_ties: bool, shuffle: int | None = None
) -> Sight:
    if shuffle is not None:
        # Each event has its place once and for all, whichever others are asked for; candidates stay behind.
        place = np.argsort(drawn_order(len(log), shuffle, "order of events"))[row]
        order = np.lexsort((place, read & ~visible, log.user[row]))
        row, visible, read = row[order], visible[order], read[order]
    time = np.arange(len(row), dtype=np.int64) if ordered_ties or shuffle is not None else log.timestamp[row]
    sight = Sight(row, log.user[row], time, visible, read)
    of_use = sight.visible | sight.read
    return sight if of_use.all() else sight.keep(of_use)


def _last_read(user: np.ndarray, read: np.ndarray) -> np.ndarray:
    """For each row the index of its user's last read row, or -1, (n,)."""
    last = np.full(int(user.max()) + 1 if len(user) else 0, -1, dtype=np.int64)
    index = np.flatnonzero(read)
    last[user[index]] = index  # rows are in order, so the last assignment of a user stays
    of_row: np.ndarray = last[user]
    return of_row
