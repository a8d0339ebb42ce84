"""LensKit runs the recommender in its own pipelines and measures it by its own metrics, on people of MovieLens 100K."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from saved import save_run

from peftrec.datasets import DATASETS
from peftrec.errors import DataError

lenskit_data = pytest.importorskip("lenskit.data")
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:lenskit")

TRAIN, TEST = 12, 6  # events of each person


@pytest.fixture(scope="module")
def adapter(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tiny_llama_folder, tmp_path_factory.mktemp("runs") / "run", data_name="ml-100k", prior=None)


@pytest.fixture(scope="module")
def events() -> pl.DataFrame:
    """The first events of four people who have written enough, in time; `place` counts each person's."""
    log = DATASETS["ml-100k"].load().interactions.filter(pl.col("user_id") <= 4)
    ordered = log.sort("user_id", "timestamp", "item_id", maintain_order=True)
    places = ordered.with_columns(place=pl.int_range(pl.len()).over("user_id"))
    return places.filter(pl.col("place") < TRAIN + TEST)


@pytest.fixture(scope="module")
def train(events: pl.DataFrame) -> Any:
    return lenskit_data.from_interactions_df(events.filter(pl.col("place") < TRAIN).drop("place").to_pandas())


@pytest.fixture(scope="module")
def test(events: pl.DataFrame) -> Any:
    held_out = events.filter(pl.col("place") >= TRAIN).drop("place", "timestamp")
    return lenskit_data.ItemListCollection.from_df(held_out.to_pandas(), lenskit_data.UserIDKey)


@pytest.fixture(scope="module")
def pipeline(adapter: Path, train: Any) -> Any:
    from lenskit.pipeline import topn_pipeline

    from peftrec.lenskit_scorer import RecommenderScorer

    made = topn_pipeline(RecommenderScorer(adapter=str(adapter)), predicts_ratings="raw")
    made.train(train)
    return made


def past(events: pl.DataFrame, user: int) -> list[Any]:
    mine = events.filter((pl.col("user_id") == user) & (pl.col("place") < TRAIN)).sort("timestamp", "item_id")
    return [{"item_id": item, "rating": rating} for item, rating in mine.select("item_id", "rating").rows()]


def test_its_scores_are_the_recommenders(pipeline: Any, events: pl.DataFrame, test: Any) -> None:
    recommender = pipeline.component("scorer").recommender
    for user in range(1, 5):
        items = test.lookup(user_id=user)
        found = pipeline.run("scorer", query=user, items=items)
        assert found.ids().tolist() == items.ids().tolist()
        expected = recommender.score(past(events, user), items.ids().tolist())
        np.testing.assert_allclose(found.scores(), expected, atol=1e-4)
        assert np.std(expected) > 0.01


def test_lenskits_evaluation_measures_it(pipeline: Any, events: pl.DataFrame, test: Any) -> None:
    from lenskit.batch import BatchPipelineRunner
    from lenskit.metrics import NDCG, RMSE, RecipRank, RunAnalysis

    recommender = pipeline.component("scorer").recommender
    runner = BatchPipelineRunner(n_jobs=1)
    runner.recommend(n=10)
    runner.predict()
    results = runner.run(pipeline, test)
    ranked = RunAnalysis(NDCG(10), RecipRank()).measure(results.output("recommendations"), test)
    candidates = sorted(set(events.filter(pl.col("place") < TRAIN)["item_id"].to_list()))
    expected_ndcg, expected_rank = [], []
    for user in range(1, 5):
        history = past(events, user)
        seen = {one["item_id"] for one in history}
        best = recommender.rank(history, [item for item in candidates if item not in seen], k=10)
        found = results.output("recommendations").lookup(user_id=user)
        ids = found.ids().tolist()
        # Equal scores may stand in either order.
        np.testing.assert_allclose(found.scores(), [one.score for one in best], atol=1e-4)
        np.testing.assert_allclose(found.scores(), recommender.score(history, ids), atol=1e-4)
        wanted = set(test.lookup(user_id=user).ids().tolist())
        hits = np.asarray([one in wanted for one in ids])
        discount = 1 / np.log2(np.maximum(np.arange(1, 11), 2))  # LensKit counts the first two places alike
        expected_ndcg.append((hits * discount).sum() / discount[: len(wanted)].sum())
        expected_rank.append(1 / (np.flatnonzero(hits)[0] + 1) if hits.any() else 0.0)
    means = ranked.list_metrics()
    np.testing.assert_allclose(means["RecipRank"], expected_rank)
    np.testing.assert_allclose(means["NDCG@10"], expected_ndcg, atol=1e-6)
    predicted = RunAnalysis(RMSE()).measure(results.output("predictions"), test).list_metrics()["RMSE"]
    for user, rmse in zip(range(1, 5), predicted, strict=True):
        rows = events.filter((pl.col("user_id") == user) & (pl.col("place") >= TRAIN))
        off = recommender.score(past(events, user), rows["item_id"].to_list()) - rows["rating"].to_numpy()
        assert rmse == pytest.approx(np.sqrt((off**2).mean()), abs=1e-4)


def test_the_querys_own_history_comes_first(pipeline: Any) -> None:
    recommender = pipeline.component("scorer").recommender
    history = lenskit_data.ItemList(item_ids=[50, 1, 100], rating=[5, 1, 4], timestamp=[3, 2, 1])
    items = lenskit_data.ItemList(item_ids=[181, 258])
    query = lenskit_data.RecQuery(user_id=1, history_items=history)
    expected = recommender.score([(100, 4), (1, 1), (50, 5)], [181, 258])
    np.testing.assert_allclose(pipeline.run("scorer", query=query, items=items).scores(), expected, atol=1e-4)
    nobody = pipeline.run("scorer", query=lenskit_data.RecQuery(), items=items).scores()
    np.testing.assert_allclose(nobody, recommender.score([], [181, 258]), atol=1e-4)


def test_what_it_cannot_score_is_nan(pipeline: Any) -> None:
    recommender = pipeline.component("scorer").recommender
    history = lenskit_data.ItemList(item_ids=[50, 99999], rating=[5, 1])
    items = lenskit_data.ItemList(item_ids=[99998, 181])
    found = pipeline.run("scorer", query=history, items=items).scores()
    assert np.isnan(found[0])
    assert found[1] == pytest.approx(recommender.score([(50, 5)], [181])[0], abs=1e-4)


def test_events_without_ratings_need_a_word(adapter: Path, pipeline: Any) -> None:
    from peftrec.lenskit_scorer import RecommenderScorer

    history, items = lenskit_data.ItemList(item_ids=[50, 1]), lenskit_data.ItemList(item_ids=[181])
    with pytest.raises(DataError, match=r"history: no ratings in LensKit's data; .* set unrated='yes'"):
        pipeline.component("scorer")(query=history, items=items)
    liking = RecommenderScorer(adapter=str(adapter), unrated="yes")
    expected = liking.recommender.score([(50, "yes"), (1, "yes")], [181])
    np.testing.assert_allclose(liking(query=history, items=items).scores(), expected, atol=1e-4)


def test_data_with_other_ids_is_refused(adapter: Path) -> None:
    import pandas as pd

    from peftrec.lenskit_scorer import RecommenderScorer

    data = lenskit_data.from_interactions_df(pd.DataFrame({"user_id": [1], "item_id": ["B00X"], "rating": [5]}))
    with pytest.raises(DataError, match=r"items: none of the 1 ids of LensKit's data \(such as B00X\) is in"):
        RecommenderScorer(adapter=str(adapter)).train(data)


def test_it_travels_without_the_model(pipeline: Any) -> None:
    scorer = pickle.loads(pickle.dumps(pipeline.component("scorer")))
    assert not hasattr(scorer, "_loaded")
    assert scorer.config == pipeline.component("scorer").config
