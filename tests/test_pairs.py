"""Pairs: each is asked with what its user had met before, and one person's events are read once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import FILMS
from test_recommender import save_adapter

from peftrec.errors import DataError
from peftrec.histories import Histories
from peftrec.pairs import Known, score_pairs
from peftrec.recommender import Recommender

LOG = pl.DataFrame(
    {
        "user_id": ["b", "a", "a", "b", "a", "a"],
        "item_id": [10, 12, 11, 14, 10, 13],
        "label": [1, 0, 1, 1, 0, 1],
        "timestamp": [5, 30, 10, 6, 20, 20],
    }
)
# In order of time: a met 11 (10), 10 and 13 (20), 12 (30); b met 10 (5) and 14 (6).
OF_A = [(11, 1), (10, 0), (13, 1), (12, 0)]


@pytest.fixture(scope="module")
def adapter(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tiny_llama_folder, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def recommender(adapter: Path, tiny_llama_folder: Path) -> Recommender:
    return Recommender.from_pretrained(adapter, base_model=tiny_llama_folder, items=FILMS)


def log_of(recommender: Recommender, events: Any, **columns: str) -> Histories:
    assert recommender.catalogue.items is not None
    return Histories.read(events, recommender.artifact, recommender.catalogue.items, columns)


@pytest.fixture(scope="module")
def log(recommender: Recommender) -> Histories:
    return log_of(recommender, LOG)


class Work:
    """Counts a model's forward passes, the tokens that they read and those that they remember."""

    def __init__(self, model: Any) -> None:
        self.tokens: list[int] = []
        self.handle = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, model: Any, arguments: Any, options: dict[str, Any]) -> None:
        self.tokens.append(options["input_ids"].numel())

    def __enter__(self) -> Work:
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


def pairs_of(*rows: tuple[str, int, int]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")


# --- the log ----------------------------------------------------------------------------------------------------------


def past(log: Histories, user: Any, seconds: int | None = None) -> list[tuple[Any, Any]]:
    first, last = log.before(pl.Series([user]), None if seconds is None else np.array([seconds]))
    return log.entries(int(first[0]), int(last[0]))


def test_what_came_before_by_hand(log: Histories) -> None:
    assert [past(log, "a", time) for time in (10, 11, 20, 21, 30, 31)] == [
        *([], OF_A[:1], OF_A[:1]),
        *(OF_A[:3], OF_A[:3], OF_A),
    ]
    assert past(log, "a") == OF_A
    assert past(log, "b", 6) == [(10, 1)]
    assert past(log, "nobody") == []
    assert past(log, 7) == []


def test_no_log() -> None:
    assert past(Histories.none(), "a") == []


def test_ids_as_text_and_as_numbers_meet(recommender: Recommender) -> None:
    numbers = log_of(recommender, LOG.with_columns(user_id=pl.Series([2, 1, 1, 2, 1, 1])))
    assert past(numbers, "1") == past(numbers, 1) == OF_A
    assert past(numbers, "01") == past(numbers, "1.0") == []
    mixed = log_of(recommender, LOG.with_columns(user_id=pl.Series(["x", "1", "1", "x", "1", "1"])))
    assert past(mixed, 1) == OF_A
    texts = log_of(recommender, LOG.with_columns(pl.col("item_id").cast(pl.String)))
    assert past(texts, "a") == OF_A


def test_without_times_rows_are_in_order_of_time(recommender: Recommender) -> None:
    log = log_of(recommender, LOG.drop("timestamp"))
    assert past(log, "a") == [(12, 0), (11, 1), (10, 0), (13, 1)]


def test_ratings_become_answers(recommender: Recommender) -> None:
    rated = LOG.drop("label").with_columns(stars=pl.Series([5.0, 1.0, 4.0, 4.5, 3.0, 5.0]))
    assert past(log_of(recommender, rated, rating="stars"), "a") == OF_A  # liked from 4
    ones = log_of(recommender, rated.with_columns(stars=pl.lit(1.0)), rating="stars")
    assert {answer for _, answer in past(ones, "a")} == {0}, "a rating of 1 is no label 1"
    target = dataclasses.replace(recommender.artifact.target, scale=[1.0, 1.5, 3.0, 4.0, 4.5, 5.0], offset=[0.0] * 6)
    about = dataclasses.replace(recommender.artifact, task="rating", target=target)
    log = Histories.read(rated, about, FILMS, {"rating": "stars"})
    assert [answer for _, answer in past(log, "a")] == [4.0, 3.0, 5.0, 1.0]
    with pytest.raises(DataError, match=r"history: rating in row 2 is 1.7; expected one of 1, 1.5, 3, 4"):
        Histories.read(
            rated.with_columns(stars=pl.Series([5.0, 1.7, 4.0, 4.0, 3.0, 5.0])), about, FILMS, {"rating": "stars"}
        )


def test_a_log_of_clicks_alone_is_for_adapters_of_such(recommender: Recommender) -> None:
    about = dataclasses.replace(recommender.artifact, clicks_alone=True, like_at=None)
    for log in (LOG.drop("label"), LOG.drop("label").with_columns(rating=pl.lit(1.0), table=pl.lit("x"))):
        clicks = Histories.read(log, about, FILMS, {})
        assert [answer for _, answer in past(clicks, "a")] == [1, 1, 1, 1]
    prompt = dataclasses.replace(recommender.artifact.prompt, history="liked")
    others = dataclasses.replace(recommender.artifact, prompt=prompt)
    with pytest.raises(DataError, match="no column 'label' or 'rating'"):
        Histories.read(LOG.drop("label"), others, FILMS, {})


def test_what_is_left_out_is_counted(recommender: Recommender) -> None:
    events = pl.concat((LOG, LOG[1:3], LOG[:1].with_columns(item_id=pl.lit(99, pl.Int64))))
    log = log_of(recommender, events)
    assert past(log, "a") == OF_A
    assert log.warnings == (
        "history: 1 rows of unknown items (such as 99) left out",
        "history: 2 duplicate rows (same user_id, item, timestamp) left out, the last of each kept",
    )


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (LOG.drop("label"), r"history: no column 'label' or 'rating' \(found user_id, item_id, timestamp\)"),
        (LOG.rename({"user_id": "uid"}), r"history: no column 'user_id' .*; set columns.user_id=uid"),
        (LOG.rename({"label": "clicked"}), r"no column 'label' or 'rating' .*; set columns.rating=clicked"),
        (LOG.with_columns(item_id=pl.col("item_id") + 100), r"none of its item ids \(such as 110\)"),
        (LOG.with_columns(label=pl.lit(2)), r"history: label in row 1 is 2"),
        (LOG.with_columns(timestamp=pl.lit(None, pl.Int64)), r"timestamp in row 1 is nothing .*; expected a time in"),
        (3, r"history: int; expected the path of a table"),
    ],
)
def test_bad_logs(recommender: Recommender, events: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        log_of(recommender, events)


def test_ratings_need_to_know_what_is_liked(recommender: Recommender) -> None:
    about = dataclasses.replace(recommender.artifact, like_at=None)
    with pytest.raises(DataError, match="the adapter was trained on labels; expected a column 'label'"):
        Histories.read(LOG.rename({"label": "rating"}), about, FILMS)


# --- scores -----------------------------------------------------------------------------------------------------------


def test_a_pair_is_asked_with_what_came_before(recommender: Recommender, log: Histories) -> None:
    pairs = pairs_of(("a", 14, 20), ("b", 11, 100), ("a", 14, 21), ("c", 14, 9), ("a", 10, 20), ("a", 14, 5))
    found = score_pairs(recommender, pairs, log)["score"].to_numpy()
    of_b = [(10, 1), (14, 1)]
    expected = [
        recommender.score(history, [item])[0]
        for history, item in ((OF_A[:1], 14), (of_b, 11), (OF_A[:3], 14), ([], 14), (OF_A[:1], 10), ([], 14))
    ]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert len(set(np.round(expected, 3))) == 5, "scores that are all equal prove nothing"
    assert found[3] == pytest.approx(found[5], abs=1e-4)


rows = st.tuples(st.integers(0, 3), st.sampled_from([10, 11, 12, 13, 14]), st.integers(0, 6))


@settings(max_examples=60)
@given(events=st.sets(rows, min_size=1, max_size=20), asked=st.lists(rows, min_size=1, max_size=12))
def test_every_pair_sees_all_events_before_it_and_no_others(
    recommender: Recommender, events: set[tuple[int, int, int]], asked: list[tuple[int, int, int]]
) -> None:
    names = ["user_id", "item_id", "timestamp"]
    log = log_of(recommender, pl.DataFrame(sorted(events, key=hash), names, orient="row").with_columns(label=1))
    seen: list[tuple[list[int], int]] = []

    def score(history: list[tuple[int, int]], candidates: list[int]) -> Any:
        seen.extend((sorted(item for item, _ in history), one) for one in candidates)
        return np.arange(len(seen) - len(candidates), len(seen))

    telling: Any = SimpleNamespace(artifact=recommender.artifact, catalogue=recommender.catalogue, score=score)
    found = score_pairs(telling, pl.DataFrame(asked, names, orient="row"), log)["score"]
    expected = [(sorted(i for u, i, t in events if u == user and t < time), item) for user, item, time in asked]
    assert [seen[int(number)] for number in found] == expected


def test_nothing_at_or_after_the_time_is_read(recommender: Recommender, log: Histories) -> None:
    pairs = pairs_of(("a", 14, 20), ("a", 11, 11), ("b", 14, 6))
    later = LOG.with_columns(label=pl.when(pl.col("timestamp") >= 20).then(1 - pl.col("label")).otherwise("label"))
    changed = score_pairs(recommender, pairs, log_of(recommender, later))
    assert changed.equals(score_pairs(recommender, pairs, log))
    whole = pairs.drop("timestamp")
    assert not score_pairs(recommender, whole, log_of(recommender, later)).equals(score_pairs(recommender, whole, log))


def test_without_times_it_is_the_whole_history(recommender: Recommender, log: Histories) -> None:
    found = score_pairs(recommender, pairs_of(("a", 14, 0)).drop("timestamp"), log)
    np.testing.assert_allclose(found["score"], recommender.score(OF_A, [14]), atol=1e-4)
    np.testing.assert_allclose(found["probability"], recommender.probability(OF_A, [14]), atol=1e-4)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), max_tokens=st.sampled_from([64, 90, 512]), liked=st.booleans())
def test_equals_asking_pair_by_pair(recommender: Recommender, seed: int, max_tokens: int, liked: bool) -> None:
    """Also where the window moves over a history that is longer than it."""
    rng = np.random.default_rng(seed)
    events = pl.DataFrame(
        {
            "user_id": rng.integers(0, 3, 40),
            "item_id": rng.choice(FILMS["item_id"].to_numpy(), 40),
            "label": rng.integers(0, 2, 40),
            "timestamp": rng.integers(0, 12, 40),
        }
    ).unique(["user_id", "item_id", "timestamp"], keep="last", maintain_order=True)
    pairs = pl.DataFrame(
        {
            "user_id": rng.integers(0, 4, 15),
            "item_id": rng.choice(FILMS["item_id"].to_numpy(), 15),
            "timestamp": rng.integers(0, 14, 15),
        }
    )
    shown = dataclasses.replace(
        recommender.artifact.prompt, max_tokens=max_tokens, history="liked" if liked else "all", max_item_tokens=16
    )
    about = dataclasses.replace(recommender.artifact, prompt=shown)
    short = Recommender(
        about,
        recommender.model,
        recommender.codec.tokenizer,
        items=recommender.catalogue.items,
        prior=recommender.prior,
    )
    found = score_pairs(short, pairs, log_of(short, events))["score"].to_numpy()
    expected = []
    for row in pairs.iter_rows(named=True):
        mine = events.filter(pl.col("user_id") == row["user_id"], pl.col("timestamp") < row["timestamp"])
        mine = mine.sort("timestamp", maintain_order=True)
        expected += short.score(list(zip(mine["item_id"], mine["label"], strict=True)), [row["item_id"]]).tolist()
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_ratings_have_no_probability(recommender: Recommender, log: Histories) -> None:
    assert score_pairs(recommender, pairs_of(("a", 14, 0)), log).columns == ["score", "probability"]
    rates: Any = SimpleNamespace(
        artifact=dataclasses.replace(recommender.artifact, task="rating"),
        catalogue=recommender.catalogue,
        score=lambda history, candidates: np.full(len(candidates), 3.0),
    )
    found = score_pairs(rates, pairs_of(("a", 14, 0)), log)
    assert (found.columns, found["score"].to_list()) == (["score"], [3.0])


def test_no_pairs(recommender: Recommender, log: Histories) -> None:
    assert score_pairs(recommender, pairs_of(("a", 14, 0)).clear(), log).height == 0


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (
            pairs_of(("a", 10, 0), ("a", 15, 0)),
            r"pairs: item_id in row 2 is 15; expected an id of the items table of 5",
        ),
        (pairs_of(("a", 10, 0)).rename({"item_id": "movieId"}), r"pairs: no column 'item_id' .*; set columns.item_id="),
        (pairs_of(("a", 10, 0)).with_columns(score=1), r"pairs: a column 'score' is there already"),
        (
            pairs_of(("a", 10, 0), ("a", 10, None)),
            r"pairs: timestamp in row 2 is nothing; expected a time in every row",
        ),  # type: ignore[arg-type]
        (pairs_of(("a", 10, 1), (None, 10, 1)), r"pairs: user_id in row 2 is nothing"),  # type: ignore[arg-type]
    ],
)
def test_bad_pairs(recommender: Recommender, log: Histories, pairs: pl.DataFrame, message: str) -> None:
    with pytest.raises(DataError, match=message):
        score_pairs(recommender, pairs, log)


def test_times_need_a_log_with_times(recommender: Recommender) -> None:
    with pytest.raises(DataError, match=r"a time in each pair \(timestamp\), but the log has no column 'timestamp'"):
        score_pairs(recommender, pairs_of(("a", 10, 0)), log_of(recommender, LOG.drop("timestamp")))


def test_ids_need_an_items_table(recommender: Recommender, log: Histories) -> None:
    bare = Recommender(recommender.artifact, recommender.model, recommender.codec.tokenizer)
    with pytest.raises(DataError, match="no items table; load the recommender with items="):
        score_pairs(bare, pairs_of(("a", 10, 0)), log)


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_name_counts_in_the_tables_that_have_it(adapter: Path) -> None:
    events = LOG.rename({"user_id": "uid", "timestamp": "at"})
    films = FILMS.rename({"item_id": "film", "title": "name"})
    columns = {"user_id": "uid", "item_id": "film", "timestamp": "at", "title": "name"}
    known = Known.read(str(adapter), history=events, items=films, columns=columns)
    assert known.names(["film", "at", "uid"], "p") == {"user_id": "uid", "item_id": "film", "timestamp": "at"}
    assert known.names(["item_id", "user_id"], "p") == {"user_id": "user_id", "item_id": "item_id"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"timestamp": "tme"}, r"pairs: no column 'tme'"),
        ({"user_id": "uid"}, r"pairs: no column 'uid'"),
        ({"titel": "name"}, r"columns.titel: no column 'name' in the items table"),
    ],
)
def test_a_name_that_leads_nowhere(adapter: Path, columns: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Known.read(str(adapter), history=LOG, items=FILMS, columns=columns).names(LOG.columns, "pairs")


def test_an_unknown_data_set_needs_an_items_table(adapter: Path) -> None:
    with pytest.raises(DataError, match=r"trained on films, whose items table is not known; .* \(--items FILE\)"):
        Known.read(str(adapter))


# --- work -------------------------------------------------------------------------------------------------------------


def tokens_of(recommender: Recommender, history: list[tuple[int, int]], candidates: list[int]) -> tuple[int, int]:
    """Tokens of header and events, and of the candidates."""
    texts = {row["item_id"]: f"{row['title']} ({row['year']})" for row in FILMS.iter_rows(named=True)}
    codec: Any = recommender.codec
    length = {item: len(ids) for item, ids in zip(texts, codec.questions(list(texts.values()), 32), strict=True)}
    events = sum(length[item] + codec.tail_length for item, _ in history)
    return len(codec.header) + events, sum(length[item] for item in candidates)


def test_one_forward_reads_a_history_for_all_of_its_pairs(recommender: Recommender, log: Histories) -> None:
    candidates = [14, 12, 10, 11, 13]
    pairs = pairs_of(*(("a", item, 0) for item in candidates)).drop("timestamp")
    with Work(recommender.model) as work:
        score_pairs(recommender, pairs, log)
    assert work.tokens == [sum(tokens_of(recommender, OF_A, candidates))]


def test_a_growing_history_is_read_once(recommender: Recommender, log: Histories) -> None:
    """Three moments of one person, mixed with another's: three forward passes, and each event's tokens only once."""
    pairs = pairs_of(("a", 14, 31), ("b", 12, 100), ("a", 14, 20), ("a", 13, 31), ("a", 14, 21))
    with Work(recommender.model) as work:
        score_pairs(recommender, pairs, log)
    base, one = tokens_of(recommender, OF_A[:1], [14])
    more, two = tokens_of(recommender, OF_A[:3], [14])
    whole, both = tokens_of(recommender, OF_A, [14, 13])
    of_b, asked = tokens_of(recommender, [(10, 1), (14, 1)], [12])
    header = len(recommender.codec.header)
    assert work.tokens == [base + one, more - base + two, whole - more + both, of_b - header + asked]


def test_all_strangers_are_one_group(recommender: Recommender, log: Histories) -> None:
    with Work(recommender.model) as work:
        score_pairs(recommender, pairs_of(("x", 14, 1), ("y", 13, 2), ("a", 12, 3)), log)
    assert work.tokens == [sum(tokens_of(recommender, [], [14, 13, 12]))]
