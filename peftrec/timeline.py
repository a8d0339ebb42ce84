"""Tables -> windows of tokens with read positions and labels.

One rule of sight: **an event sees the events strictly earlier in time, and itself.** Within a window that is the
causal mask minus the events that share its timestamp. A candidate is an event whose time is *now* and that no other
event sees. Training, streaming evaluation, frozen evaluation and ranking differ only in the `Sight` that they build.

    Log ── training_sight / evaluation_sight ──> Sight   which events are read, which are seen, in which order
    Sight ── cut ──> windows                              ranges of events that fit in max_tokens
    windows ── pack ──> rows                              several users' windows in one row: no padding
    rows ── WindowDataset ──> arrays for the model

All but the last are plain arrays, which may lie in memory-mapped files (`kept`): tokens of a row are put together when
the row is asked for.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from peftrec.errors import DataError
from peftrec.interactions import drawn_order
from peftrec.prompts import Codec, Pieces, WholeText

if TYPE_CHECKING:
    from peftrec.split import Log

NO_LABEL = -100  # what transformers.Trainer does not count
NOW = np.iinfo(np.int64).max
LEAST_ROOM = 512  # tokens of a row of whole texts at least: a computer is idle with less


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
    ends = _running(lengths)
    seen_ends = _running(lengths[sight.visible])
    seen_before = _running(sight.visible)  # visible events in front of each event
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


def _running(values: np.ndarray) -> np.ndarray:
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
    return Pieces(flat, _running(np.bincount(row_of, minlength=rows)))


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


class TimelineWindows:
    """Windows of a Log's events as arrays of tokens.

    Args:
        log: the events.
        codec: the prompt.
        questions: each item's `{text}:` pieces, in the order of `log.items`.
        sight: what is read and seen.
        max_tokens, overlap, fill, single: as in `cut`.
        max_history: with `single`, earlier events shown at most.
    """

    def __init__(
        self,
        log: Log,
        codec: Codec | WholeText,
        questions: Pieces,
        sight: Sight,
        *,
        max_tokens: int,
        overlap: int,
        fill: bool,
        single: bool = False,
        max_history: int | None = None,
    ) -> None:
        self.log, self.codec, self.questions, self.sight = log, codec, questions, sight
        lengths = questions.lengths[log.item[sight.row]] + codec.tail_length
        self._seen = np.flatnonzero(sight.visible)
        self.spans = cut(
            sight,
            lengths,
            max_tokens=max_tokens,
            header=len(codec.header),
            overlap=overlap,
            fill=fill,
            single=single,
        )
        if max_history is not None:
            first, last = self.spans[:, 0], self.spans[:, 1]
            shown = np.maximum(first, last - max_history)
            ends = _running(lengths[self._seen])
            self.spans[:, 4] -= ends[shown] - ends[first]
            self.spans[:, 0] = shown

    KEPT: ClassVar[tuple[str, ...]] = ("row", "user", "time", "visible", "read")

    def kept(self) -> dict[str, np.ndarray]:
        """What `of` makes the same windows from."""
        sight = {name: getattr(self.sight, name) for name in self.KEPT}
        return {**sight, "seen": self._seen, "spans": self.spans}

    @classmethod
    def of(
        cls, kept: Mapping[str, np.ndarray], log: Log, codec: Codec | WholeText, questions: Pieces
    ) -> TimelineWindows:
        """The windows that gave `kept`."""
        made = cls.__new__(cls)
        made.log, made.codec, made.questions = log, codec, questions
        made.sight = Sight(**{name: kept[name] for name in cls.KEPT})
        made._seen, made.spans = kept["seen"], kept["spans"]
        return made

    def __len__(self) -> int:
        return len(self.spans)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each window."""
        lengths: list[int] = self.spans[:, 4].tolist()
        return lengths

    @property
    def events(self) -> int:
        """Read positions in all windows together."""
        return int(self.sight.read.sum())

    def events_of(self, index: int) -> np.ndarray:
        """The log's rows of one window's events, in reading order."""
        first, last, start, stop, _ = self.spans[index].tolist()
        rows: np.ndarray = self.sight.row[np.concatenate((self._seen[first:last], np.arange(start, stop)))]
        return rows

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        """One window as arrays of length T.

        Keys: `input_ids`; `position_ids`; `event` (0 is the header); `time` (dense rank, 0 is the header); `visible`;
        `row` (the log's row at read positions, else -1).
        """
        assert isinstance(self.codec, Codec)
        first, last, start, stop, _ = self.spans[index].tolist()
        own = np.arange(start, stop)
        events = np.concatenate((self._seen[first:last], own))
        row = self.sight.row[events]
        reads = np.where(np.arange(len(events)) >= len(events) - len(own), self.sight.read[events], False)
        return lay_out(
            self.codec,
            self.questions,
            item=self.log.item[row],
            answer=self.log.label[row],
            time=self.sight.time[events],
            visible=self.sight.visible[events],
            row=np.where(reads, row, -1),
        )


def lay_out(
    codec: Codec,
    questions: Pieces,
    *,
    item: np.ndarray,
    answer: np.ndarray,
    time: np.ndarray,
    visible: np.ndarray,
    row: np.ndarray,
) -> dict[str, np.ndarray]:
    """Events of one user, in order of time, as arrays of tokens (T,): see `TimelineWindows.arrays`.

    Positions count what an event can see, so that a candidate stands right behind its history wherever it lies in the
    row: the same positions as in a prompt of its own.
    """
    tail = codec.tail_length
    asked = questions.lengths[item]
    length = asked + tail
    begin = len(codec.header) + np.concatenate(([0], np.cumsum(length)[:-1])) if len(item) else np.zeros(0, np.int64)
    total = len(codec.header) + int(length.sum())
    event = np.repeat(np.arange(len(item) + 1), np.concatenate(([len(codec.header)], length)))
    offset = np.arange(total) - np.concatenate(([0], begin))[event]

    input_ids = np.empty(total, dtype=np.int64)
    input_ids[: len(codec.header)] = codec.header
    body = slice(len(codec.header), total)
    of, at = event[body] - 1, offset[body]
    in_question = at < asked[of]
    source = np.where(in_question, questions.start[item[of]] + at, 0)
    tails = np.asarray([codec.tail(k) for k in range(len(codec.answers))])
    behind = np.clip(at - asked[of], 0, tail - 1)
    input_ids[body] = np.where(in_question, questions.flat[source], tails[answer[of], behind])

    rank = np.unique(time, return_inverse=True)[1] + 1 if len(time) else np.zeros(0, np.int64)
    seen_length = np.where(visible, length, 0)
    by_rank = np.bincount(rank, weights=seen_length, minlength=int(rank.max(initial=0)) + 1)
    before = np.concatenate(([0], np.cumsum(by_rank)))[rank].astype(np.int64)
    position_ids = offset + np.concatenate(([0], len(codec.header) + before))[event]

    reads = np.full(total, -1, dtype=np.int64)
    reads[begin + asked - 1] = row
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "event": event,
        "time": np.concatenate(([0], rank))[event],
        "visible": np.concatenate(([True], visible))[event],
        "row": reads,
    }


class PromptWindows:
    """Ready-made prompts, one read position each at the end (records, or `pointwise` with a template).

    Args:
        rows: the log's row that each prompt asks for.
        ids: each prompt's tokens.
    """

    def __init__(self, rows: np.ndarray, ids: Sequence[list[int]] | Pieces) -> None:
        self._rows, self._ids = rows, ids if isinstance(ids, Pieces) else Pieces.of(ids)

    def kept(self) -> dict[str, np.ndarray]:
        """What `of` makes the same prompts from."""
        return {"rows": self._rows, "flat": self._ids.flat, "start": self._ids.start}

    @classmethod
    def of(cls, kept: Mapping[str, np.ndarray]) -> PromptWindows:
        """The prompts that gave `kept`."""
        return cls(kept["rows"], Pieces(kept["flat"], kept["start"]))

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        lengths: list[int] = self._ids.lengths.tolist()
        return lengths

    @property
    def events(self) -> int:
        """Read positions in all prompts together."""
        return len(self._ids)

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        """One prompt as arrays of length T: see `TimelineWindows.arrays`."""
        ids = np.asarray(self._ids[index], dtype=np.int64)
        row = np.full(len(ids), -1, dtype=np.int64)
        row[-1] = self._rows[index]
        zeros = np.zeros(len(ids), dtype=np.int64)
        return {
            "input_ids": ids,
            "position_ids": np.arange(len(ids)),
            "event": zeros,
            "time": zeros,
            "visible": np.ones(len(ids), dtype=bool),
            "row": row,
        }


class TextWindows(PromptWindows):
    """Prompts whose tokens all see each other, read at their first token.

    Args:
        rows: the log's row that each prompt asks for.
        ids: each prompt's tokens.
        types: each prompt's token types, end to end in an array or not, or None where the model has none.
    """

    def __init__(
        self, rows: np.ndarray, ids: Sequence[list[int]] | Pieces, types: Sequence[list[int]] | np.ndarray | None
    ) -> None:
        super().__init__(rows, ids)
        self._types = types if types is None or isinstance(types, np.ndarray) else Pieces.of(types).flat

    def kept(self) -> dict[str, np.ndarray]:
        """What `of` makes the same prompts from."""
        return {**super().kept(), **({} if self._types is None else {"types": self._types})}

    @classmethod
    def of(cls, kept: Mapping[str, np.ndarray]) -> TextWindows:
        """The prompts that gave `kept`."""
        return cls(kept["rows"], Pieces(kept["flat"], kept["start"]), kept.get("types"))

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        """One prompt as arrays of length T: `input_ids`, `position_ids`, `row`, and `token_type_ids` if there are."""
        ids = np.asarray(self._ids[index], dtype=np.int64)
        row = np.full(len(ids), -1, dtype=np.int64)
        row[0] = self._rows[index]
        arrays = {"input_ids": ids, "position_ids": np.arange(len(ids)), "row": row}
        if self._types is None:
            return arrays
        types = self._types[self._ids.start[index] : self._ids.start[index + 1]]
        return {**arrays, "token_type_ids": types.astype(np.int64)}


class WindowDataset:
    """Packed rows, ready for a data loader: each item is one row of at most `max_tokens`, of whole texts `LEAST_ROOM`.

    Args:
        windows: what to pack.
        label: answers by row of the log, (n,).
        prior: log-odds to add to the model's, by row of the log, (n,), or None.
        max_tokens: tokens of a row.
        rows: which windows are in each row, where they have been packed before.
    """

    rows: Pieces | Sequence[Sequence[int]]

    def __init__(
        self,
        windows: TimelineWindows | PromptWindows,
        label: np.ndarray,
        prior: np.ndarray | None,
        max_tokens: int,
        rows: Pieces | None = None,
    ) -> None:
        self.windows = windows
        self.label = label
        # A view of one number where there is none.
        self.prior = np.broadcast_to(np.float32(0), len(label)) if prior is None else prior
        if rows is not None:
            self.rows = rows
        elif isinstance(windows, TextWindows):
            # The model pads them to the longest: prompts of one length leave no gaps.
            self.rows = alike(windows.lengths, max(max_tokens, LEAST_ROOM))
        else:
            self.rows = pack(windows.lengths, max_tokens)
        self.tokens = sum(windows.lengths)
        self.events = windows.events

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        lengths = self.windows.lengths
        return [sum(lengths[i] for i in row) for row in self.rows]

    def kept(self) -> dict[str, np.ndarray]:
        """The windows' `kept`, and how they are packed."""
        assert isinstance(self.rows, Pieces)
        return {**self.windows.kept(), "packed": self.rows.flat, "packed_start": self.rows.start}

    def blank(self) -> dict[str, np.ndarray]:
        """A short row that asks nothing, for a process that has nothing to do while others compute."""
        row = self._row([int(np.argmin(self.windows.lengths))])
        return {**row, "labels": np.full_like(row["labels"], NO_LABEL), "row": np.full_like(row["row"], -1)}

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._row(self.rows[index])

    def _row(self, windows: Iterable[int]) -> dict[str, np.ndarray]:
        parts = [self.windows.arrays(i) for i in windows]
        row = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        row["segment"] = np.repeat(np.arange(len(parts)), [len(part["row"]) for part in parts])
        read = row["row"] >= 0
        row["labels"] = np.where(read, self.label[row["row"]], NO_LABEL).astype(np.int64)
        row["prior"] = np.where(read, self.prior[row["row"]], 0.0).astype(np.float32)
        return row


def collate(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Rows as one batch of tensors (B, T), padded at the right with a segment of its own that nothing sees."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    padding = {"row": -1, "labels": NO_LABEL, "segment": -1}
    batch = {}
    for key in rows[0]:
        padded = [np.pad(row[key], (0, longest - len(row[key])), constant_values=padding.get(key, 0)) for row in rows]
        batch[key] = torch.from_numpy(np.stack(padded))
    return batch
