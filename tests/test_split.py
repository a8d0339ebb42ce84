"""Splits: tiny logs by hand, then what must hold for every log."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftrec import config
from peftrec.errors import DataError
from peftrec.interactions import Interactions
from peftrec.split import SPLITS, TEST, TRAIN, VALID, Log, by_name, cold, kfold, leave_last_out, split, temporal

shares = st.floats(0.05, 0.4)
codes = st.lists(st.integers(0, 30), min_size=1, max_size=200).map(lambda values: np.array(values, dtype=np.int32))
times = st.lists(st.integers(0, 20), min_size=1, max_size=100).map(lambda values: np.array(values, dtype=np.int64))


def table(rows: list[tuple[int, int, int, int]], **columns: list[object]) -> Interactions:
    """Interactions of (user, item, label, timestamp) rows."""
    user, item, label, timestamp = zip(*rows, strict=True)
    events = pl.DataFrame(
        {
            "user": pl.Series(user, dtype=pl.Int32),
            "item": pl.Series(item, dtype=pl.Int32),
            "label": pl.Series(label, dtype=pl.Int8),
            "timestamp": pl.Series(timestamp, dtype=pl.Int64),
            **columns,
        }
    )
    items = pl.DataFrame({"item_id": list(range(max(item) + 1)), "title": "x"})
    return Interactions(events, pl.Series(range(max(user) + 1)), items, "tiny", "0" * 64, ())


def test_temporal_cuts_at_the_quantiles() -> None:
    assert temporal(np.arange(10), 0.2, 0.1).tolist() == [0] * 7 + [1] * 2 + [2]
    assert temporal(np.arange(10)[::-1], 0.2, 0.1).tolist() == [2] + [1] * 2 + [0] * 7


def test_temporal_puts_ties_on_the_later_side() -> None:
    assert temporal(np.array([1, 2, 3, 4, 5, 6, 7, 8, 8, 8]), 0.1, 0.1).tolist() == [0] * 7 + [2] * 3
    assert temporal(np.array([1, 2, 3, 3, 3, 3, 3, 8, 9, 10]), 0.4, 0.3).tolist() == [0, 0, 1, 1, 1, 1, 1, 2, 2, 2]


@given(times, shares, shares)
def test_temporal_is_in_order_and_never_cuts_a_timestamp(time: np.ndarray, valid: float, test: float) -> None:
    parts = temporal(time, valid, test)
    order = np.argsort(time, kind="stable")
    assert (np.diff(parts[order]) >= 0).all()
    for moment in np.unique(time):
        assert len(np.unique(parts[time == moment])) == 1
    assert (parts == TEST).sum() >= round(test * len(time))


def test_leave_last_out_by_hand() -> None:
    user = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    time = np.array([1, 2, 3, 4, 1, 2, 1, 2, 3, 3])
    assert leave_last_out(user, time).tolist() == [0, 0, 1, 2, 0, 0, 0, 1, 2, 2]


def test_leave_last_out_keeps_users_of_one_moment_in_train() -> None:
    assert leave_last_out(np.array([0, 0, 0, 1]), np.array([5, 5, 5, 5])).tolist() == [0, 0, 0, 0]


@given(codes, st.data())
def test_leave_last_out_is_in_order_for_each_user(user: np.ndarray, data: st.DataObject) -> None:
    time = np.array(data.draw(st.lists(st.integers(0, 9), min_size=len(user), max_size=len(user))))
    order = np.lexsort((time, user))
    user, time = user[order], time[order]
    parts = leave_last_out(user, time)
    for one in np.unique(user):
        own, when = parts[user == one], time[user == one]
        moments = len(np.unique(when))
        assert (np.diff(own) >= 0).all()
        if moments < 3:
            assert (own == TRAIN).all()
        else:
            assert ((own == TEST) == (when == when.max())).all()
            assert len(np.unique(when[own == VALID])) == 1
        assert all(len(np.unique(own[when == moment])) == 1 for moment in np.unique(when))


@given(st.integers(2, 300), st.integers(2, 10), shares, st.integers(0, 2**32))
def test_folds_cover_every_row_once(n: int, folds: int, valid: float, seed: int) -> None:
    parts = np.stack([kfold(n, folds, fold, valid, seed) for fold in range(folds)])
    tested = (parts == TEST).sum(axis=0)
    assert (tested == 1).all()
    sizes = (parts == TEST).sum(axis=1)
    assert sizes.max() - sizes.min() <= 1
    assert ((parts == VALID).sum(axis=1) == [round(valid * (n - size)) for size in sizes]).all()


@given(codes, shares, shares, st.integers(0, 2**32))
def test_cold_users_and_items_are_in_one_split_only(code: np.ndarray, valid: float, test: float, seed: int) -> None:
    parts = cold(code, valid, test, seed, "users")
    assert all(len(np.unique(parts[code == one])) == 1 for one in np.unique(code))
    present = len(np.unique(code))
    assert len(np.unique(code[parts == TEST])) == max(1, round(test * present))
    if present >= 3:
        assert (parts == VALID).any()


def test_seeds_draw_differently_and_repeat() -> None:
    code = np.arange(100)
    draws = [tuple(cold(code, 0.1, 0.1, seed, "users").tolist()) for seed in range(10)]
    assert len(set(draws)) == 10
    assert draws[3] == tuple(cold(code, 0.1, 0.1, 3, "users").tolist())
    assert draws[3] != tuple(cold(code, 0.1, 0.1, 3, "items").tolist())


def test_names_of_splits() -> None:
    names = pl.Series(["train", "Test", "valid", "validation", "VAL", " dev "])
    assert by_name(names).tolist() == [0, 2, 1, 1, 1, 1]
    with pytest.raises(DataError, match=r"2 rows have nothing, 'holdout'; expected train, valid or test") as caught:
        by_name(pl.Series(["train", "holdout", None]))
    assert "\n" not in str(caught.value)


def test_the_log_is_sorted_by_user_time_and_source_order() -> None:
    rows = [(1, 0, 0, 9), (0, 1, 0, 7), (1, 2, 0, 3), (0, 0, 1, 7), (0, 2, 1, 1), (1, 1, 1, 4)]
    names = ["test", "train", "train", "test", "train", "valid"]
    log = split(table(rows, split=names, rating=[6.0, 3.0, 1.0, 4.0, 2.0, 5.0]), config.Split(kind="column"), 1)
    assert len(log) == 6
    assert log.user.tolist() == [0, 0, 0, 1, 1, 1]
    assert log.timestamp.tolist() == [1, 7, 7, 3, 4, 9]
    assert log.item.tolist() == [2, 1, 0, 2, 1, 0]
    assert log.label.tolist() == [1, 0, 1, 0, 1, 0]
    assert log.rating is not None
    assert log.rating.tolist() == [2.0, 3.0, 4.0, 1.0, 5.0, 6.0]
    assert [SPLITS[part] for part in log.split] == ["train", "train", "test", "train", "valid", "test"]
    assert log.prompts is None
    kinds = [array.dtype for array in (log.user, log.item, log.timestamp, log.label, log.split)]
    assert kinds == [np.int32, np.int32, np.int64, np.int8, np.int8]


def test_records_keep_their_prompts_beside_their_rows() -> None:
    rows = [(user, 0, user % 2, user) for user in range(6)][::-1]
    texts = [f"new film {user}" for user, *_ in rows]
    log = split(table(rows, instruction=["like?"] * 6, input=texts), config.Split(valid=0.3, test=0.3), 1)
    assert log.prompts is not None
    assert log.prompts["input"].to_list() == [f"new film {user}" for user in range(6)]


def attempt(rows: list[tuple[int, int, int, int]], kind: str) -> Log | str:
    """The log, or what the error says."""
    try:
        return split(table(rows), config.Split(kind=kind), 1)
    except DataError as error:
        return str(error)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 1), st.integers(0, 30)), min_size=20),
    st.sampled_from(["temporal", "leave_last_out", "kfold", "cold_user", "cold_item"]),
)
def test_every_split_is_whole_or_says_why_not(rows: list[tuple[int, int, int, int]], kind: str) -> None:
    log = attempt(rows, kind)
    if isinstance(log, str):
        assert log.startswith("tiny: ")
        assert "\n" not in log
        return
    assert sorted(zip(log.user, log.item, log.label, log.timestamp, strict=True)) == sorted(rows)
    assert set(log.split.tolist()) == {TRAIN, VALID, TEST}
    assert set(log.label[log.split == TEST].tolist()) == set(log.label[log.split == TRAIN].tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("rows", "kind", "expected"),
    [
        ([(0, 0, n % 2, 5) for n in range(20)], "temporal", r"train is empty after a temporal split \(.*test 20\)"),
        ([(0, 0, n % 2, min(n, 15)) for n in range(20)], "temporal", "valid is empty .* share a timestamp"),
        ([(n, 0, n % 2, n) for n in range(20)], "leave_last_out", "valid is empty .* events at three times"),
        ([(n, 0, int(n > 2), n) for n in range(20)], "temporal", "all 2 rows of test have label 1 .* both labels"),
        ([(n, 0, int(n > 17), n) for n in range(20)], "temporal", "all 16 rows of train have label 0"),
        ([(0, n, n % 2, n) for n in range(20)], "cold_user", "train is empty .* bring more users"),
        ([(n, 0, n % 2, n) for n in range(20)], "cold_item", "train is empty .* bring more items"),
    ],
)
def test_a_split_without_rows_or_without_both_labels(
    rows: list[tuple[int, int, int, int]], kind: str, expected: str
) -> None:
    with pytest.raises(DataError, match=expected):
        split(table(rows), config.Split(kind=kind), 1)


def test_a_split_that_the_source_gives_is_checked_too() -> None:
    rows = [(n, 0, n % 2, n) for n in range(4)]
    with pytest.raises(DataError, match="test is empty after a given split"):
        split(table(rows, split=["train", "train", "valid", "valid"]), config.Split(kind="column"), 1)


def test_records_have_no_cold_items() -> None:
    rows = table([(n, 0, n % 2, n) for n in range(20)])
    bare = Interactions(rows.events, rows.user_ids, rows.items.clear(), "r.json", "", ())
    with pytest.raises(DataError, match=r"r\.json: prompt records name no items"):
        split(bare, config.Split(kind="cold_item"), 1)
