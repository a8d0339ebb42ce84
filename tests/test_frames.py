"""Frames of pairs: each scored with what its user knew by then, read once, and every mistake in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from saved import FILMS, save_adapter

from peftrec.errors import DataError
from peftrec.frames import score_frame
from peftrec.recommender import Recommender

# Ann's events lie at 1, 2, 2 and 5; Bob's at 3.
LOG = pl.DataFrame(
    {
        "user_id": ["ann", "bob", "ann", "ann", "ann"],
        "item_id": [12, 10, 10, 11, 14],
        "rating": [5, 2, 4, 1, 3],
        "timestamp": [5, 3, 1, 2, 2],
    }
)


@pytest.fixture(scope="module")
def recommender(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    folder = save_adapter(tiny_llama_folder, tmp_path_factory.mktemp("adapter"))
    return Recommender.from_pretrained(folder, base_model=tiny_llama_folder, items=FILMS)


@pytest.fixture
def asked(recommender: Recommender, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Every question that the recommender is asked."""
    found, real = [], recommender.score

    def score(history: Any, candidates: Any) -> Any:
        found.append((history, candidates))
        return real(history, candidates)

    monkeypatch.setattr(recommender, "score", score)
    return found


def events(*found: tuple[int, int]) -> list[dict[str, int]]:
    return [{"item_id": item, "rating": rating} for item, rating in found]


def test_a_pair_knows_what_lies_strictly_before_it(recommender: Recommender, asked: list[tuple[Any, Any]]) -> None:
    pairs = pl.DataFrame(
        {
            "note": list("abcdef"),
            "user_id": ["ann", "bob", "ann", "ann", "ann", "ann"],
            "item_id": [13, 13, 12, 12, 13, 10],
            "timestamp": [5, 3, 2, 6, 3, 1],
        }
    )
    found = score_frame(recommender, pairs, LOG)
    assert found.columns == [*pairs.columns, "score", "probability"]
    assert found.select(pairs.columns).equals(pairs)
    before_5 = events((10, 4), (11, 1), (14, 3))
    expected = [
        ([], [10]),
        (events((10, 4)), [12]),
        (before_5, [13, 13]),  # at 3 and at 5 the same is known, so it is read once
        ([*before_5, {"item_id": 12, "rating": 5}], [12]),
        ([], [13]),
    ]
    assert [(past, [one["item_id"] for one in items]) for past, items in asked] == expected
    by_row = {0: (before_5, 13), 1: ([], 13), 2: (events((10, 4)), 12), 5: ([], 10)}
    for row, (past, item) in by_row.items():
        (score,) = recommender.score(past, [{"item_id": item}])
        assert found["score"][row] == pytest.approx(score, abs=1e-4)
        assert found["probability"][row] == pytest.approx(1 / (1 + np.exp(-score)), abs=1e-4)
    assert found["score"][0] == pytest.approx(found["score"][4], abs=1e-4)
    assert found["score"].round(3).n_unique() == 5


@pytest.mark.parametrize("kind", [int, str])
def test_pandas_frames_come_back_as_they_were(recommender: Recommender, kind: type) -> None:
    pandas = pytest.importorskip("pandas")
    users = {"ann": 1, "bob": 2}
    pairs = pandas.DataFrame(
        {"item_id": [13, 12], "user_id": [kind(users[one]) for one in ("bob", "ann")]}, index=["x", "y"]
    )
    log = LOG.drop("timestamp", "rating").with_columns(
        label=pl.Series([True, False, True, False, True]), user_id=pl.col("user_id").replace_strict(users)
    )
    with pytest.warns(UserWarning, match="pairs: 1 of 2 are in the log themselves"):
        found = score_frame(recommender, pairs, log.to_pandas())
    assert found.index.tolist() == ["x", "y"]
    assert found.columns.tolist() == ["item_id", "user_id", "score", "probability"]
    assert "score" not in pairs.columns
    # Without times the log's rows are in order.
    past = [(12, True), (10, True), (11, False), (14, True)]
    (score,) = recommender.score([{"item_id": item, "label": int(label)} for item, label in past], [12])
    assert found["score"]["y"] == pytest.approx(score, abs=1e-4)


def test_times_may_be_written_in_any_way(recommender: Recommender) -> None:
    pairs = pl.DataFrame({"user_id": ["ann", "bob"], "item_id": [13, 13], "timestamp": [5, 4]})
    plain = score_frame(recommender, pairs, LOG)
    moments = [frame.with_columns(pl.from_epoch("timestamp", "s")) for frame in (pairs, LOG)]
    for frames in (moments, (moments[0], LOG)):
        np.testing.assert_allclose(score_frame(recommender, *frames)["score"], plain["score"], atol=1e-4)


def test_new_users_know_nothing(recommender: Recommender) -> None:
    pairs = pl.DataFrame({"user_id": ["cleo", "bob"], "item_id": [13, 13]})
    with pytest.raises(DataError, match=r"pairs: 1 users have no row in the log, e\.g\. 'cleo'"):
        score_frame(recommender, pairs, LOG)
    found = score_frame(recommender, pairs, LOG, new_users=True)
    np.testing.assert_allclose(found["score"][0], recommender.score([], [13])[0], atol=1e-4)
    assert found["score"][0] != found["score"][1]
    nobody = score_frame(recommender, pairs, LOG.clear(), new_users=True)["score"]
    np.testing.assert_allclose(nobody, found["score"][0], atol=1e-4)


def test_repeated_events_count_once(recommender: Recommender) -> None:
    pairs = pl.DataFrame({"user_id": ["bob", "bob"], "item_id": [13, 13]})
    twice = pl.concat([LOG.with_columns(rating=pl.lit(5, pl.Int64)), LOG])
    with pytest.warns(UserWarning, match="history: 5 rows of the same user_id, item_id, timestamp dropped"):
        found = score_frame(recommender, pairs, twice)
    np.testing.assert_allclose(found["score"], score_frame(recommender, pairs, LOG)["score"], atol=1e-4)
    np.testing.assert_allclose(found["score"][0], found["score"][1], atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, h: (p.rename({"user_id": "uid"}), h), r"pairs: no column 'user_id' .*; rename 'uid'$"),
        (lambda p, h: (p, h.drop("item_id")), r"history: no column 'item_id' .*; add it$"),
        (lambda p, h: (p, h.drop("rating")), r"history: no column 'label' or 'rating' \(found user_id, item_id, times"),
        (lambda p, h: (p.clear(), h), r"pairs: no rows; expected at least one"),
        (
            lambda p, h: (p.with_columns(item_id=99), h),
            r"pairs: 1 item ids are not in the items table, e.g. 99 \(there",
        ),
        (lambda p, h: (p, h.with_columns(item_id=99)), r"history: 1 item ids are not in the items table"),
        (lambda p, h: (p.with_columns(score=1.0), h), r"pairs: a column 'score' is there already"),
        (lambda p, h: (p, h.drop("timestamp")), r"history: no column 'timestamp', though pairs have one"),
        (lambda p, h: (p.with_columns(timestamp=pl.lit(None, pl.Int64)), h), r"pairs: timestamp in row 1 is nothing"),
        (lambda p, h: (p.with_columns(user_id=pl.lit(None, pl.String)), h), r"pairs: user_id in row 1 is nothing"),
        (lambda p, h: (p, h.with_columns(rating=pl.lit("good"))), r"history: rating in row 1 is 'good'"),
        (lambda p, h: (p.lazy(), h), r"pairs: LazyFrame; expected a polars or pandas DataFrame; collect\(\) it"),
        (lambda p, h: (p.to_dicts(), h), r"pairs: list; expected a polars or pandas DataFrame$"),
        (lambda p, h: (p, None), r"history: NoneType; expected"),
    ],
)
def test_mistakes_are_one_line(recommender: Recommender, change: Callable[..., Any], message: str) -> None:
    pairs = pl.DataFrame({"user_id": ["ann"], "item_id": [13], "timestamp": [9]})
    with pytest.raises(DataError, match=message) as caught:
        score_frame(recommender, *change(pairs, LOG))
    assert "\n" not in str(caught.value)


def test_ratings_have_no_probability(tiny_llama_folder: Path, tmp_path: Path) -> None:
    folder = save_adapter(tiny_llama_folder, tmp_path, task="rating", scale=(1, 2, 3, 4, 5), prior=None)
    rater = Recommender.from_pretrained(folder, base_model=tiny_llama_folder, items=FILMS)
    found = score_frame(rater, pl.DataFrame({"user_id": ["bob"], "item_id": [13]}), LOG)
    assert found.columns == ["user_id", "item_id", "score"]
    np.testing.assert_allclose(found["score"], rater.score([(10, 2)], [13]), atol=1e-4)
    with pytest.raises(DataError, match="history: no column 'rating'"):
        score_frame(rater, found.drop("score"), LOG.rename({"rating": "label"}))


class Counting:
    """A recommender whose scores tell what it was asked: the events seen, and the item."""

    def __init__(self, recommender: Recommender) -> None:
        self.artifact, self.catalogue = recommender.artifact, recommender.catalogue

    def score(self, history: list[Any], candidates: list[Any]) -> Any:
        return np.asarray([1000.0 * len(history) + one["item_id"] for one in candidates])


rows = st.tuples(st.integers(0, 3), st.sampled_from([10, 11, 12, 13, 14]), st.integers(0, 6))


@settings(max_examples=60)
@given(log=st.sets(rows, min_size=1, max_size=20), pairs=st.lists(rows, min_size=1, max_size=12))
def test_every_pair_sees_all_events_before_it_and_no_others(
    recommender: Recommender, log: set[tuple[int, int, int]], pairs: list[tuple[int, int, int]]
) -> None:
    names = ["user_id", "item_id", "timestamp"]
    history = pl.DataFrame(sorted(log, key=hash), schema=names, orient="row").with_columns(label=1)
    asked = pl.DataFrame(pairs, schema=names, orient="row")
    found = score_frame(Counting(recommender), asked, history, new_users=True)  # type: ignore[arg-type]
    expected = [1000 * sum(u == user and t < time for u, _, t in log) + item for user, item, time in pairs]
    assert found["score"].to_list() == expected
