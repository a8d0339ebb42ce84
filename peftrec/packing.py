"""Events into windows that fit, and windows into rows without padding."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np

from peftrec.errors import DataError
from peftrec.prompts import Pieces
from peftrec.sight import Sight


def cut(
    sight: Sight, lengths: np.ndarray, *, max_tokens: int, header: int, overlap: int, fill: bool, single: bool = False
) -> np.ndarray:
    """Cut each user's events into windows that fit; every read event is in exactly one.

    A window is `context` events (visible, not read again) and then events of its own.

    Args:
        sight: m events.
        lengths: tokens of each event, (m,).
        max_tokens: tokens of a window at most, its header included.
        header: tokens of the header.
        overlap: tokens of earlier events that a window repeats as context at most.
        fill: let the context grow into the room that the window's own events leave.
        single: one read event a window (the pointwise layout); its context holds strictly earlier events only.

    Returns:
        Windows (w, 5): half-open range of the Sight's *visible* events that are context, half-open range of its events,
        tokens with the header.

    Raises:
        DataError: one event alone is longer than a window.
    """
    room = max_tokens - header
    if len(lengths) and int(lengths.max()) > room:
        raise DataError(
            f"prompt.max_tokens: an event takes {int(lengths.max())} tokens, a window has room for {room} behind its "
            "header; raise prompt.max_tokens or shorten prompt.item"
        )
    overlap = min(overlap, room - int(lengths.max())) if len(lengths) else overlap
    ends = running(lengths)
    seen_ends = running(lengths[sight.visible])
    seen_before = running(sight.visible)  # visible events in front of each event
    reads = np.flatnonzero(sight.read)
    moments = np.flatnonzero((np.diff(sight.user, prepend=-1) != 0) | (np.diff(sight.time, prepend=0) != 0))
    first_of_user = np.flatnonzero(np.diff(sight.user, prepend=-1))
    user_of_read = np.searchsorted(first_of_user, reads, side="right") - 1
    windows = array("q")
    at = 0
    while at < len(reads):
        start = int(reads[at])
        user_start = int(first_of_user[user_of_read[at]])
        last = at if single else int(np.searchsorted(user_of_read, user_of_read[at], side="right")) - 1
        # What shares the moment of a lone read event is hidden from it: it would only take room.
        moment_start = int(moments[np.searchsorted(moments, start, side="right") - 1])
        seen_to = int(seen_before[moment_start if single else start])
        seen_from = max(
            int(seen_before[user_start]), int(np.searchsorted(seen_ends, seen_ends[seen_to] - overlap, side="left"))
        )
        used = int(seen_ends[seen_to] - seen_ends[seen_from])
        fits = int(np.searchsorted(ends, ends[start] + room - used, side="right")) - 1
        following = int(np.searchsorted(reads, min(fits, int(reads[last]) + 1), side="left"))
        stop = int(reads[following - 1]) + 1  # nothing behind the last read event is of use
        own = int(ends[stop] - ends[start])
        if fill:
            seen_from = max(
                int(seen_before[user_start]),
                int(np.searchsorted(seen_ends, seen_ends[seen_to] - (room - own), side="left")),
            )
            used = int(seen_ends[seen_to] - seen_ends[seen_from])
        windows.extend((seen_from, seen_to, start, stop, header + used + own))
        at = following
    return np.asarray(windows, dtype=np.int64).reshape(-1, 5)


def running(values: np.ndarray) -> np.ndarray:
    """Sums of the first 0, 1, … values, (n + 1,)."""
    sums = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum(values, out=sums[1:])
    return sums


def pack(lengths: Sequence[int], max_tokens: int) -> Pieces:
    """Indices of windows put together into rows of at most `max_tokens`: best fit, the longest first."""
    size = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-size, kind="stable")
    least = int(size.min(initial=max_tokens))
    row_of = np.empty(len(size), dtype=np.int64)
    rows = 0
    # Rows by the tokens that they have left, and which of these lists are not empty, as bits of one number: a sorted
    # list of rows would be moved at each step.
    free: list[list[int]] = [[] for _ in range(max_tokens)]
    some = 0
    for index, need in zip(order.tolist(), size[order].tolist(), strict=True):
        fitting = some >> need
        if fitting:
            left = need + (fitting & -fitting).bit_length() - 1
            row = heappop(free[left])
            if not free[left]:
                some ^= 1 << left
        else:
            left, row, rows = max_tokens, rows, rows + 1
        row_of[index] = row
        if left - need >= least:
            heappush(free[left - need], row)
            some |= 1 << (left - need)
    flat = order[np.argsort(row_of[order], kind="stable")]
    return Pieces(flat, running(np.bincount(row_of, minlength=rows)))


def alike(lengths: Sequence[int], max_tokens: int) -> Pieces:
    """Indices of prompts put together into rows whose prompts, padded to the longest, take at most `max_tokens`."""
    size = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-size, kind="stable")
    start = [0]
    longest = 0  # the first one of a row is its longest
    for place, length in enumerate(size[order].tolist()):
        if place == start[-1]:
            longest = length
        elif (place - start[-1] + 1) * longest > max_tokens:
            start.append(place)
            longest = length
    return Pieces(order, np.asarray([*start, len(size)] if len(size) else start, dtype=np.int64))
