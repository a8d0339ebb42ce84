"""Frames of pairs: each scored with what its user knew by then, what is odd warned of, every mistake in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from samples import FILMS
from saved import save_adapter

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


def test_columns_are_added_to_the_rows_as_they_were(recommender: Recommender) -> None:
    pairs = pl.DataFrame(
        {"note": list("abc"), "who": ["ann", "bob", "ann"], "item_id": [13, 13, 12], "timestamp": [5, 3, 2]}
    )
    named = LOG.rename({"user_id": "who", "timestamp": "at"})
    found = score_frame(recommender, pairs, named, columns={"user_id": "who", "timestamp": "at"})
    assert found.columns == [*pairs.columns, "score", "probability"]
    assert found.select(pairs.columns).equals(pairs)
    pasts = ([(10, 4), (11, 1), (14, 3)], [], [(10, 4)])  # strictly before
    expected = [recommender.score(past, [item])[0] for past, item in zip(pasts, (13, 13, 12), strict=True)]
    np.testing.assert_allclose(found["score"], expected, atol=1e-4)
    np.testing.assert_allclose(found["probability"], 1 / (1 + np.exp(-np.asarray(expected))), atol=1e-4)
    assert len(set(np.round(expected, 3))) == 3, "scores that are all equal prove nothing"


@pytest.mark.parametrize("kind", [int, str])
def test_pandas_frames_come_back_as_they_were(recommender: Recommender, kind: type) -> None:
    pandas = pytest.importorskip("pandas")
    users = {"ann": 1, "bob": 2}
    pairs = pandas.DataFrame(
        {"item_id": [13, 12], "user_id": [kind(users[one]) for one in ("bob", "ann")]}, index=["x", "y"]
    )
    pairs["odd"] = [1, "what no table of another kind can hold"]
    log = LOG.drop("timestamp", "rating").with_columns(
        label=pl.Series([True, False, True, False, True]), user_id=pl.col("user_id").replace_strict(users)
    )
    with pytest.warns(UserWarning, match="pairs: 1 of 2 are in the log themselves"):
        found = score_frame(recommender, pairs, log.to_pandas())
    assert found.index.tolist() == ["x", "y"]
    assert found.columns.tolist() == ["item_id", "user_id", "odd", "score", "probability"]
    assert "score" not in pairs.columns
    # Without times the log's rows are in order.
    past = [(12, True), (10, True), (11, False), (14, True)]
    (score,) = recommender.score([{"item_id": item, "label": int(label)} for item, label in past], [12])
    assert found["score"]["y"] == pytest.approx(score, abs=1e-4)


def test_times_may_be_written_in_any_way(recommender: Recommender) -> None:
    """The second pair is about a film that its person has met before: that is no leak to warn of."""
    pairs = pl.DataFrame({"user_id": ["ann", "bob"], "item_id": [13, 10], "timestamp": [5, 4]})
    plain = score_frame(recommender, pairs, LOG)
    moments = [frame.with_columns(pl.from_epoch("timestamp", "s")) for frame in (pairs, LOG)]
    for frames in (moments, (moments[0], LOG)):
        np.testing.assert_allclose(score_frame(recommender, *frames)["score"], plain["score"], atol=1e-4)


def test_strangers_know_nothing_and_are_counted(recommender: Recommender) -> None:
    pairs = pl.DataFrame({"user_id": ["cleo", "bob", "dan", "cleo"], "item_id": [13] * 4})
    with pytest.warns(UserWarning, match="users have no events") as said:
        found = score_frame(recommender, pairs, LOG)["score"]
    assert [str(one.message) for one in said] == [
        "pairs: 2 users have no events in the log (such as 'cleo') and are scored as people of whom nothing is known; "
        "look whether the ids are the same"
    ]
    assert said[0].filename == __file__
    np.testing.assert_allclose(found.gather([0, 2, 3]), recommender.score([], [13])[0], atol=1e-4)
    assert found[0] != pytest.approx(found[1], abs=1e-3)
    with pytest.warns(UserWarning, match=r"pairs: 3 users have no events in the log \(such as 'cleo'\)"):
        nobody = score_frame(recommender, pairs, None)["score"]
    np.testing.assert_allclose(nobody, found[0], atol=1e-4)


def test_somebody_without_events_yet_is_no_stranger(recommender: Recommender) -> None:
    """`ann` is the log's first user, whose first event is the log's first one."""
    pairs = pl.DataFrame({"user_id": ["ann", "bob"], "item_id": [13, 13], "timestamp": [1, 1]})
    found = score_frame(recommender, pairs, LOG)
    np.testing.assert_allclose(found["score"], recommender.score([], [13])[0], atol=1e-4)


def test_what_the_log_loses_is_said(recommender: Recommender) -> None:
    pairs = pl.DataFrame({"user_id": ["bob"], "item_id": [13]})
    odd = pl.concat(
        [LOG.with_columns(rating=pl.lit(5, pl.Int64)), LOG, LOG[:1].with_columns(item_id=pl.lit(99, pl.Int64))]
    )
    with pytest.warns(UserWarning, match="left out") as said:
        found = score_frame(recommender, pairs, odd)
    assert [str(one.message) for one in said] == [
        "history: 1 rows of unknown items (such as 99) left out",
        "history: 5 duplicate rows (same user_id, item, timestamp) left out, the last of each kept",
    ]
    assert {one.filename for one in said} == {__file__}
    np.testing.assert_allclose(found["score"], score_frame(recommender, pairs, LOG)["score"], atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, h: (p.rename({"user_id": "uid"}), h), r"pairs: no column 'user_id' .*; set columns.user_id=uid$"),
        (lambda p, h: (p, h.drop("item_id")), r"history: no column 'item_id' \(found user_id, rating, timestamp\)"),
        (lambda p, h: (p, h.drop("rating")), r"history: no column 'label' or 'rating' \(found user_id, item_id, times"),
        (lambda p, h: (p, h.clear()), r"history: no rows; expected at least one"),
        (lambda p, h: (p.with_columns(item_id=99), h), r"pairs: item_id in row 1 is 99; expected an id of the items"),
        (lambda p, h: (p, h.with_columns(item_id=99)), r"history: none of its item ids \(such as 99\) is in the items"),
        (lambda p, h: (p.with_columns(score=1.0), h), r"pairs: a column 'score' is there already"),
        (lambda p, h: (p, h.drop("timestamp")), r"pairs: a time in each pair \(timestamp\), but the log has"),
        (lambda p, h: (p.with_columns(timestamp=pl.lit(None, pl.Int64)), h), r"pairs: timestamp in row 1 is nothing"),
        (lambda p, h: (p.with_columns(user_id=pl.lit(None, pl.String)), h), r"pairs: user_id in row 1 is nothing"),
        (lambda p, h: (p, h.with_columns(rating=pl.lit("good"))), r"history: rating in row 1 is 'good'"),
        (lambda p, h: (p.lazy(), h), r"pairs: LazyFrame; expected a polars or pandas DataFrame; collect\(\) it"),
        (lambda p, h: (p.to_dicts(), h), r"pairs: list; expected a polars or pandas DataFrame$"),
        (lambda p, h: (p, [1]), r"history: list; expected the path of a table, or a polars or pandas frame"),
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
