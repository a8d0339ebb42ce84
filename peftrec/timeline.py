"""Tables -> windows of tokens with read positions and labels.

    Log ── training_sight / evaluation_sight ──> Sight   which events are read, which are seen, in which order
    Sight ── cut ──> windows                              ranges of events that fit in max_tokens
    windows ── pack ──> rows                              several users' windows in one row: no padding
    rows ── WindowDataset ──> arrays for the model

All but the last are plain arrays, which may lie in memory-mapped files (`kept`): tokens of a row are put together when
the row is asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from peftrec.augment import Augment
from peftrec.packing import alike, cut, pack, running
from peftrec.prompts import Codec, Pieces, WholeText
from peftrec.sight import Sight

if TYPE_CHECKING:
    from peftrec.split import Log

NO_LABEL = -100  # what transformers.Trainer does not count
LEAST_ROOM = 512  # tokens of a row of whole texts at least: a computer is idle with less


class TimelineWindows:
    """Windows of a Log's events as arrays of tokens.

    Args:
        log: the events.
        codec: the prompt.
        questions: each item's `{text}:` pieces, in the order of `log.items`.
        sight: what is read and seen.
        max_tokens, overlap, fill, single: as in `cut`.
        max_history: with `single`, earlier events shown at most.
        header_room: tokens that are left to the header, where it may be another than the prompt's; see `vary`.
    """

    augment: Augment | None = None
    headers: Sequence[list[int]] = ()
    epoch = 0
    _still = 0

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
        header_room: int | None = None,
    ) -> None:
        self.log, self.codec, self.questions, self.sight = log, codec, questions, sight
        lengths = questions.lengths[log.item[sight.row]] + codec.tail_length
        self._seen = np.flatnonzero(sight.visible)
        self.spans = cut(
            sight,
            lengths,
            max_tokens=max_tokens,
            header=len(codec.header) if header_room is None else header_room,
            overlap=overlap,
            fill=fill,
            single=single,
        )
        if max_history is not None:
            first, last = self.spans[:, 0], self.spans[:, 1]
            shown = np.maximum(first, last - max_history)
            ends = running(lengths[self._seen])
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

    def vary(self, augment: Augment, headers: Sequence[list[int]] = (), *, single: bool = False) -> None:
        """Show each window in another form in each epoch.

        Args:
            augment: draws the forms.
            headers: wordings of the header as token ids, the prompt's own first; none keeps that one.
            single: whether the last event of a window is the only one that is read: it stays behind the others.
        """
        self.augment, self.headers, self._still = augment, headers, int(single)

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

    def shown(self, index: int) -> np.ndarray:
        """The same as the window shows them in this epoch: fewer, and in another order, where it varies."""
        rows: np.ndarray = self.sight.row[self._form(index)[0]]
        return rows

    def _form(self, index: int) -> tuple[np.ndarray, ...]:
        """One window's events, as rows of the sight, in the order of this epoch; which are read; times; who is seen."""
        first, last, start, stop, _ = self.spans[index].tolist()
        own = np.arange(start, stop)
        events = np.concatenate((self._seen[first:last], own))
        reads = np.where(np.arange(len(events)) >= len(events) - len(own), self.sight.read[events], False)
        time, visible = self.sight.time[events], self.sight.visible[events]
        if self.augment is not None:
            order = self.augment.order(self.epoch, index, self.log.timestamp[self.sight.row[events]], self._still)
            visible = self.augment.visible(self.epoch, index, visible[order], self._still)
            # Times stay where they were: events change places, and with them what they see.
            kept = visible | reads[order]  # an event that nobody sees and that is not asked for would only take room
            events, reads = events[order][kept], reads[order][kept]
            time, visible = time[kept], visible[kept]
        return events, reads, time, visible

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        """One window as arrays of length T.

        Keys: `input_ids`; `position_ids`; `event` (0 is the header); `time` (dense rank, 0 is the header); `visible`;
        `row` (the log's row at read positions, else -1).
        """
        assert isinstance(self.codec, Codec)
        events, reads, time, visible = self._form(index)
        codec = self.codec
        if self.augment is not None and self.headers:
            codec = copy.copy(codec)
            codec.header = self.headers[self.augment.wording(self.epoch, index)]
        row = self.sight.row[events]
        return lay_out(
            codec,
            self.questions,
            item=self.log.item[row],
            answer=self.log.label[row],
            time=time,
            visible=visible,
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


class Wordings:
    """The same prompts in several wordings, one of which is drawn for each prompt in each epoch.

    Args:
        variants: the prompts in each wording, the recipe's own first.
        augment: draws.
    """

    def __init__(self, variants: Sequence[PromptWindows], augment: Augment) -> None:
        self.variants, self.augment, self.epoch = variants, augment, 0

    def __len__(self) -> int:
        return len(self.variants[0])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt in its longest wording."""
        return [max(lengths) for lengths in zip(*(one.lengths for one in self.variants), strict=True)]

    @property
    def events(self) -> int:
        """Read positions in all prompts together."""
        return len(self)

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        """One prompt as arrays of length T: see `TimelineWindows.arrays`."""
        return self.variants[self.augment.wording(self.epoch, index)].arrays(index)


class WindowDataset:
    """Packed rows, ready for a data loader: each item is one row of at most `max_tokens`, of whole texts `LEAST_ROOM`.

    Args:
        windows: what to pack.
        label: answers by row of the log, (n,).
        prior: log-odds to add to the model's, by row of the log, (n,), or None.
        max_tokens: tokens of a row.
        rows: which windows are in each row, where they have been packed before.

    Attributes:
        taught: what answers are taken for in their place, by row of the log (n, M): see `teachers.taught`.
    """

    taught: np.ndarray | None = None
    rows: Pieces | Sequence[Sequence[int]]

    def __init__(
        self,
        windows: TimelineWindows | PromptWindows | Wordings,
        label: np.ndarray,
        prior: np.ndarray | None,
        max_tokens: int,
        rows: Pieces | None = None,
    ) -> None:
        self.windows = windows
        self.label = label
        # A view of one number where there is none.
        self.prior = np.broadcast_to(np.float32(0), len(label)) if prior is None else prior
        kind = windows.variants[0] if isinstance(windows, Wordings) else windows
        if rows is not None:
            self.rows = rows
        elif isinstance(kind, TextWindows):
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

    def set_epoch(self, epoch: int) -> None:
        """Draw the forms of this epoch from now on, where there is something to draw."""
        if not isinstance(self.windows, PromptWindows):
            self.windows.epoch = epoch

    def kept(self) -> dict[str, np.ndarray]:
        """The windows' `kept`, and how they are packed."""
        assert isinstance(self.rows, Pieces)
        assert not isinstance(self.windows, Wordings), "made anew for each run"
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
        if self.taught is not None:
            row["taught"] = np.where(read[:, None], self.taught[row["row"]], np.float32(0))
        return row


def collate(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Rows as one batch of tensors (B, T), padded at the right with a segment of its own that nothing sees."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    padding = {"row": -1, "labels": NO_LABEL, "segment": -1}
    batch = {}
    for key in rows[0]:
        padded = []
        for row in rows:
            room = [(0, longest - len(row[key])), *[(0, 0)] * (row[key].ndim - 1)]
            padded.append(np.pad(row[key], room, constant_values=padding.get(key, 0)))
        batch[key] = torch.from_numpy(np.stack(padded))
    return batch
