"""Windows of events: what each read position sees, where it stands, and that nothing is lost, repeated or leaked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftrec.errors import DataError
from peftrec.packing import cut, pack
from peftrec.sight import NOW, Sight, evaluation_sight, training_sight
from peftrec.split import Log
from peftrec.timeline import NO_LABEL, PromptWindows, TimelineWindows, WindowDataset, collate

WAYS = st.sampled_from(["train", "streaming", "frozen"])


def sight_of(log: Log, way: str, liked: bool, ordered: bool) -> Sight:
    if way == "train":
        return training_sight(log, liked_only=liked, ordered_ties=ordered)
    rows = np.flatnonzero(log.split > 0)
    return evaluation_sight(log, rows, streaming=way == "streaming", liked_only=liked, ordered_ties=ordered)


def may_see(log: Log, row: int, way: str, liked: bool, ordered: bool) -> list[int]:
    """Rows of the log that the event `row` may see, by the definition, event by event."""
    seen = []
    for other in range(len(log.user)):
        earlier = other < row if ordered else log.timestamp[other] < log.timestamp[row]
        if way == "frozen":
            earlier = log.split[other] == 0
        elif way == "train":
            earlier = earlier and log.split[other] == 0
        if log.user[other] == log.user[row] and earlier and (log.label[other] == 1 or not liked):
            seen.append(other)
    return seen


def sees(windows: Any, index: int) -> dict[int, list[int]]:
    """Read row -> the rows whose tokens the read position may look at, from one window's arrays."""
    arrays = windows.arrays(index)
    events = windows.events_of(index)
    found = {}
    for at in np.flatnonzero(arrays["row"] >= 0):
        before = np.arange(len(arrays["row"])) <= at
        look = before & arrays["visible"] & (arrays["time"] < arrays["time"][at]) & (arrays["event"] > 0)
        found[int(arrays["row"][at])] = events[np.unique(arrays["event"][look]) - 1].tolist()
    return found


class TestSight:
    def test_training_is_training_events_only(self, make_log: Callable[..., Log]) -> None:
        log = make_log([0, 0, 0, 1], [5, 5, 9, 1], [1, 0, 1, 0], split=[0, 0, 2, 0])
        sight = training_sight(log)
        assert sight.row.tolist() == [0, 1, 3]
        assert sight.time.tolist() == [5, 5, 1]
        assert sight.read.all()
        assert sight.visible.all()

    def test_liked_only_hides_but_still_reads(self, make_log: Callable[..., Log]) -> None:
        sight = training_sight(make_log([0, 0], [1, 2], [0, 1]), liked_only=True)
        assert sight.read.tolist() == [True, True]
        assert sight.visible.tolist() == [False, True]

    def test_streaming_drops_what_no_read_event_needs(self, make_log: Callable[..., Log]) -> None:
        log = make_log([0, 0, 0, 1, 1], [1, 2, 3, 1, 2], [1, 0, 1, 1, 0], split=[0, 2, 2, 0, 0])
        sight = evaluation_sight(log, np.array([1]), streaming=True)
        assert sight.row.tolist() == [0, 1]
        assert sight.read.tolist() == [False, True]

    def test_frozen_candidates_stand_behind_all_training_events(self, make_log: Callable[..., Log]) -> None:
        log = make_log([0, 0, 0, 0], [1, 2, 3, 4], [1, 0, 1, 0], split=[0, 2, 0, 2])
        sight = evaluation_sight(log, np.array([1, 3]), streaming=False)
        assert sight.row.tolist() == [0, 2, 1, 3]
        assert sight.time.tolist() == [1, 3, NOW, NOW]
        assert sight.visible.tolist() == [True, True, False, False]

    def test_no_rows(self, make_log: Callable[..., Log]) -> None:
        log = make_log([0, 0], [1, 2], [1, 0])
        for streaming in (True, False):
            assert len(evaluation_sight(log, np.zeros(0, dtype=np.int64), streaming=streaming).row) == 0


class TestCut:
    """Ten tokens an event, two of header, one user unless said."""

    def cut(self, sight: Sight, **options: Any) -> list[tuple[tuple[int, int], int, int, int]]:
        options = {"max_tokens": 32, "header": 2, "overlap": 10, "fill": False, **options}
        lengths = options.pop("lengths", np.full(len(sight.row), 10))
        return [((first, last), *rest) for first, last, *rest in cut(sight, lengths, **options).tolist()]

    def sight(self, n: int, user: list[int] | None = None, read: list[bool] | None = None) -> Sight:
        every = np.ones(n, dtype=bool)
        codes = np.zeros(n, dtype=np.int32) if user is None else np.asarray(user)
        return Sight(np.arange(n), codes, np.arange(n), every, every if read is None else np.asarray(read))

    def test_windows_overlap_by_one_event(self) -> None:
        assert self.cut(self.sight(5)) == [((0, 0), 0, 3, 32), ((2, 3), 3, 5, 32)]

    def test_no_overlap(self) -> None:
        assert self.cut(self.sight(5), overlap=9) == [((0, 0), 0, 3, 32), ((3, 3), 3, 5, 22)]

    def test_context_fills_the_room_left(self) -> None:
        assert self.cut(self.sight(4), overlap=0, fill=True) == [((0, 0), 0, 3, 32), ((1, 3), 3, 4, 32)]

    def test_overlap_leaves_room_for_the_longest_event(self) -> None:
        lengths = np.array([10, 10, 10, 30])
        assert self.cut(self.sight(4), lengths=lengths, overlap=25)[-1] == ((3, 3), 3, 4, 32)

    def test_users_do_not_share_windows(self) -> None:
        assert self.cut(self.sight(3, user=[0, 0, 4])) == [((0, 0), 0, 2, 22), ((2, 2), 2, 3, 12)]

    def test_events_that_are_not_read_are_context(self) -> None:
        sight = self.sight(5, read=[False, False, False, False, True])
        assert self.cut(sight, fill=True) == [((2, 4), 4, 5, 32)]

    def test_nothing_behind_the_last_read_event(self) -> None:
        assert self.cut(self.sight(3, read=[True, False, False])) == [((0, 0), 0, 1, 12)]

    def test_single_reads_one_event_and_shows_what_fits(self) -> None:
        found = self.cut(self.sight(4), fill=True, single=True)
        assert found == [((0, 0), 0, 1, 12), ((0, 1), 1, 2, 22), ((0, 2), 2, 3, 32), ((1, 3), 3, 4, 32)]

    def test_single_shows_nothing_of_its_own_moment(self) -> None:
        sight = self.sight(4)
        tied = Sight(sight.row, sight.user, np.array([0, 7, 7, 7]), sight.visible, sight.read)
        assert [window[0] for window in self.cut(tied, fill=True, single=True)] == [(0, 0), (0, 1), (0, 1), (0, 1)]

    def test_event_longer_than_a_window(self) -> None:
        with pytest.raises(DataError, match=r"prompt.max_tokens: an event takes 31 tokens, a window has room for 30"):
            self.cut(self.sight(2), lengths=np.array([10, 31]))

    def test_no_events(self) -> None:
        assert self.cut(self.sight(0)) == []


def best_fit(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """What `pack` makes, looking at every row each time."""
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        left = [max_tokens - sum(lengths[i] for i in row) for row in rows]
        fitting = [(free, row) for row, free in enumerate(left) if free >= lengths[index]]
        if fitting:
            rows[min(fitting)[1]].append(index)
        else:
            rows.append([index])
    return rows


class TestPack:
    def pack(self, lengths: list[int], max_tokens: int) -> list[list[int]]:
        return [row.tolist() for row in pack(lengths, max_tokens)]

    def test_longest_first_best_fit(self) -> None:
        assert self.pack([4, 10, 6, 3], 10) == [[1], [2, 0], [3]]

    @given(lengths=st.lists(st.integers(1, 50), max_size=40))
    def test_each_window_once_and_rows_fit(self, lengths: list[int]) -> None:
        rows = self.pack(lengths, 50)
        assert rows == best_fit(lengths, 50)
        assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
        assert all(0 < sum(lengths[index] for index in row) <= 50 for row in rows)


class TestArrays:
    def one(self, log: Log, codec: Any, questions: Any, way: str = "train", **options: Any) -> dict[str, np.ndarray]:
        options = {"max_tokens": 1000, "overlap": 0, "fill": True, **options}
        windows = TimelineWindows(log, codec, questions, sight_of(log, way, False, False), **options)
        assert len(windows) == 1
        assert windows.lengths == [len(windows.arrays(0)["row"])]
        return windows.arrays(0)

    def test_a_user_reads_as_text(
        self, make_log: Callable[..., Log], codec: Any, questions: Any, tokenizer: Any, header: str, titles: list[str]
    ) -> None:
        found = self.one(make_log([0, 0], [1, 2], [1, 0]), codec, questions)
        text = f"{header}{titles[0]}: yes\n{titles[1]}: no\n"
        assert found["input_ids"].tolist() == [0, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        assert found["position_ids"].tolist() == list(range(len(found["input_ids"])))

    def test_read_position_is_the_token_before_the_answer(
        self, make_log: Callable[..., Log], codec: Any, questions: Any
    ) -> None:
        found = self.one(make_log([0, 0], [1, 2], [1, 0]), codec, questions)
        at = np.flatnonzero(found["row"] >= 0)
        assert found["row"][at].tolist() == [0, 1]
        assert found["input_ids"][at + 1].tolist() == [codec.answers[1], codec.answers[0]]

    def test_ties_stand_at_the_same_position(self, make_log: Callable[..., Log], codec: Any, questions: Any) -> None:
        found = self.one(make_log([0] * 4, [1, 2, 2, 3], [1, 0, 1, 0], item=[0, 1, 2, 3]), codec, questions)
        tail = 1 + len(codec.line_end)
        length = questions.lengths[:4] + tail
        first = [int(found["position_ids"][found["event"] == event][0]) for event in (1, 2, 3, 4)]
        begin = len(codec.header)
        behind = begin + length[0]
        assert first == [begin, behind, behind, behind + length[1] + length[2]]
        assert [int(found["time"][found["event"] == event][0]) for event in (0, 1, 2, 3, 4)] == [0, 1, 2, 2, 3]

    def test_candidates_stand_right_behind_the_history(
        self, make_log: Callable[..., Log], codec: Any, questions: Any
    ) -> None:
        log = make_log([0] * 3, [1, 2, 3], [1, 0, 1], split=[0, 2, 2])
        found = self.one(log, codec, questions, "frozen")
        assert found["row"].max() == 2
        starts = [int(found["position_ids"][found["event"] == event][0]) for event in (2, 3)]
        assert starts[0] == starts[1]

    def test_most_history_is_kept(self, make_log: Callable[..., Log], codec: Any, questions: Any) -> None:
        log = make_log([0] * 5, [1, 2, 3, 4, 5], [1, 0, 1, 0, 1], split=[0, 0, 0, 0, 2])
        sight = sight_of(log, "streaming", False, False)
        windows = TimelineWindows(
            log, codec, questions, sight, max_tokens=1000, overlap=0, fill=True, single=True, max_history=2
        )
        assert windows.events_of(0).tolist() == [2, 3, 4]
        assert windows.lengths == [len(windows.arrays(0)["row"])]


@given(
    seed=st.integers(0, 10_000),
    moments=st.integers(1, 12),
    way=WAYS,
    liked=st.booleans(),
    ordered=st.booleans(),
    single=st.booleans(),
    fill=st.booleans(),
    max_tokens=st.integers(50, 200),
    overlap=st.integers(0, 100),
)
@settings(max_examples=80)
def test_every_read_event_once_and_what_it_sees(
    make_random_log: Callable[..., Log],
    codec: Any,
    questions: Any,
    seed: int,
    moments: int,
    way: str,
    liked: bool,
    ordered: bool,
    single: bool,
    fill: bool,
    max_tokens: int,
    overlap: int,
) -> None:
    log = make_random_log(seed, users=3, events=7, moments=moments)
    sight = sight_of(log, way, liked, ordered)
    windows = TimelineWindows(
        log, codec, questions, sight, max_tokens=max_tokens, overlap=overlap, fill=fill, single=single
    )
    read = []
    for index in range(len(windows)):
        arrays = windows.arrays(index)
        assert len(arrays["row"]) == windows.lengths[index] <= max_tokens
        assert len(set(log.user[windows.events_of(index)].tolist())) == 1
        for row, seen in sees(windows, index).items():
            read.append(row)
            # Seen is a suffix of what may be seen: the oldest events go first, and nothing else is added.
            allowed = may_see(log, row, way, liked, ordered)
            assert seen == allowed[len(allowed) - len(seen) :]
    expected = np.flatnonzero(log.split == 0 if way == "train" else log.split > 0)
    assert sorted(read) == expected.tolist()


@given(seed=st.integers(0, 10_000), way=WAYS, liked=st.booleans(), ordered=st.booleans())
@settings(max_examples=40)
def test_a_wide_window_shows_everything_allowed(
    make_random_log: Callable[..., Log], codec: Any, questions: Any, seed: int, way: str, liked: bool, ordered: bool
) -> None:
    log = make_random_log(seed)
    sight = sight_of(log, way, liked, ordered)
    windows = TimelineWindows(log, codec, questions, sight, max_tokens=4000, overlap=0, fill=True)
    for index in range(len(windows)):
        for row, seen in sees(windows, index).items():
            assert seen == may_see(log, row, way, liked, ordered)


class TestWindowDataset:
    def test_rows_carry_labels_prior_and_segments(
        self, make_log: Callable[..., Log], codec: Any, questions: Any
    ) -> None:
        log = make_log([0, 0, 1], [1, 2, 1], [1, 0, 1])
        windows = TimelineWindows(log, codec, questions, training_sight(log), max_tokens=500, overlap=0, fill=False)
        data = WindowDataset(windows, log.label, np.array([0.5, -0.5, 2.0], dtype=np.float32), 500)
        assert len(data) == 1
        assert (data.events, data.tokens) == (3, sum(windows.lengths))
        row = data[0]
        read = row["row"] >= 0
        assert dict(zip(row["row"][read].tolist(), row["labels"][read].tolist(), strict=True)) == {0: 1, 1: 0, 2: 1}
        assert dict(zip(row["row"][read].tolist(), row["prior"][read].tolist(), strict=True)) == {0: 0.5, 1: -0.5, 2: 2}
        assert (row["labels"][~read] == NO_LABEL).all()
        assert (row["prior"][~read] == 0).all()
        assert np.unique(row["segment"]).tolist() == [0, 1]

    def test_prompts_are_read_at_their_end(self, codec: Any) -> None:
        windows = PromptWindows(np.array([4, 2]), [codec.prompt("one two:"), codec.prompt("three:")])
        assert windows.events == 2
        for index, row in enumerate([4, 2]):
            arrays = windows.arrays(index)
            assert np.flatnonzero(arrays["row"] >= 0).tolist() == [len(arrays["row"]) - 1]
            assert arrays["row"][-1] == row
            assert arrays["position_ids"].tolist() == list(range(windows.lengths[index]))

    def test_padding_is_a_segment_of_its_own(self, codec: Any) -> None:
        windows = PromptWindows(np.array([0, 1]), [codec.prompt("one two three:"), codec.prompt("four:")])
        data = WindowDataset(windows, np.array([1, 0], dtype=np.int8), None, max(windows.lengths))
        batch = collate([data[0], data[1]])
        short = min(windows.lengths)
        assert batch["input_ids"].shape == (2, max(windows.lengths))
        assert (batch["segment"][1, short:] == -1).all()
        assert (batch["labels"][1, short:] == NO_LABEL).all()
        assert (batch["row"][1, short:] == -1).all()
        assert int((batch["labels"] >= 0).sum()) == 2
