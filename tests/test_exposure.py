"""What stands in the ten best rows of each user, by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftrec.exposure import K, exposure
from peftrec.split import Log


@pytest.fixture
def log() -> Log:
    """Items 0..19; items 0 and 1, the head, have three training events each, item 2 two, the others none.

    User 0 met each item once in the test, user 1 items 0 to 11 (so two of twelve are of the head), user 2 ten items.
    """
    train = [0, 0, 0, 1, 1, 1, 2, 2]
    tests = [(0, range(20)), (1, range(12)), (2, range(10))]
    user = [0] * len(train) + [who for who, items in tests for _ in items]
    item = [*train, *(one for _, items in tests for one in items)]
    n = len(user)
    return Log(
        user=np.asarray(user, dtype=np.int32),
        item=np.asarray(item, dtype=np.int32),
        timestamp=np.arange(n),
        label=np.zeros(n, dtype=np.int8),
        rating=None,
        split=np.asarray([0] * len(train) + [2] * (n - len(train)), dtype=np.int8),
        user_ids=pl.Series("user_id", ["a", "b", "c"]),
        items=pl.DataFrame({"item_id": range(20), "title": [f"Film {k}" for k in range(20)]}),
    )


def measured(log: Log, score: Any, rows: Any = None, **changes: Any) -> dict[str, Any]:
    rows = np.arange(8, len(log)) if rows is None else rows
    return exposure(log, rows, {"adapter": score}, **{"resamples": 200, "seed": 13, **changes})


def test_by_hand(log: Log) -> None:
    """Ours likes high numbers: user 0 gets items 10 to 19, user 1 items 2 to 11; user 2 has nothing to choose."""
    found = measured(log, log.item[8:])
    assert (found["users"], found["places"], found["items"], found["candidates"]) == (2, 20, 20, 20)
    assert (found["head"], found["head_in_log"]) == (2, 6 / 8)
    offered = (2 / 20 + 2 / 12) / 2
    assert found["head_in_candidates"] == pytest.approx(offered)
    ours = found["scorers"]["adapter"]
    assert (ours["items"], ours["head"], ours["lift"]) == (18, 0.0, pytest.approx(-offered))
    # Of two users a resample takes one twice, or both.
    assert (ours["low"], ours["high"]) == (pytest.approx(-2 / 12), pytest.approx(-2 / 20))


def test_the_other_way_round(log: Log) -> None:
    """Low numbers first: both users get items 0 to 9, two of ten of the head."""
    ours = measured(log, -log.item[8:])["scorers"]["adapter"]
    assert (ours["items"], ours["head"]) == (10, pytest.approx(0.2))
    assert ours["low"] == pytest.approx(0.2 - 2 / 12)


def test_the_order_of_rows_says_nothing(log: Log) -> None:
    rows = np.random.default_rng(1).permutation(np.arange(8, len(log)))
    assert measured(log, log.item[rows], rows) == measured(log, log.item[8:])


def test_equal_scores_keep_the_order_of_rows(log: Log) -> None:
    assert measured(log, np.zeros(len(log) - 8)) == measured(log, -log.item[8:])


def test_nothing_to_choose(log: Log) -> None:
    few = np.flatnonzero(log.user == 2)
    assert measured(log, np.zeros(len(few)), few) == {}
    assert measured(log, np.zeros(8), np.arange(8)) == {}  # training rows
    assert measured(log, [], []) == {}


def test_without_resamples(log: Log) -> None:
    alone = np.flatnonzero((log.user == 0) & (log.split == 2))
    for found in (measured(log, log.item[8:], resamples=0), measured(log, log.item[alone], alone)):
        assert np.isnan(found["scorers"]["adapter"]["low"])
        assert found["scorers"]["adapter"]["head"] == 0


@given(seed=st.integers(0, 99))
def test_against_a_loop(make_random_log: Callable[..., Log], seed: int) -> None:
    log = make_random_log(seed, users=3, events=60, moments=12)
    score = np.random.default_rng(seed).normal(size=len(log)).round(1)
    rows = np.flatnonzero(log.split > 0)
    found = measured(log, score[rows], rows)
    train = np.bincount(log.item[log.split == 0], minlength=log.items.height)
    head = int(np.argmax(train))  # a tenth of eight items is one
    shares, items = [], set()
    for user in range(3):
        mine = [row for row in rows if log.split[row] == 2 and log.user[row] == user]
        best = sorted(mine, key=lambda row: -score[row])[:K]
        if len(mine) > K:
            shares.append(np.mean([log.item[row] == head for row in best]))
            items |= {int(log.item[row]) for row in best}
    if not shares:
        assert found == {}
        return
    assert found["users"] == len(shares)
    assert found["scorers"]["adapter"]["head"] == pytest.approx(np.mean(shares))
    assert found["scorers"]["adapter"]["items"] == len(items)
