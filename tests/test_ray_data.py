"""Ray Data: the class by itself, and in actors of a real local cluster where ray is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from samples import FILMS
from test_pairs import LOG, pairs_of
from test_recommender import save_adapter

from peftrec.errors import DataError
from peftrec.histories import Histories
from peftrec.pairs import score_pairs
from peftrec.ray_data import PairScorer

ROOT = Path(__file__).parents[1]
PAIRS = pairs_of(*((user, item, time) for user in ("a", "b", "c") for item in (10, 14) for time in (6, 21, 40)))


@pytest.fixture(scope="module")
def place(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a scorer is made with."""
    folder = tmp_path_factory.mktemp("place")
    save_adapter(tiny_llama_folder, folder / "adapter")
    LOG.rename({"user_id": "uid"}).write_csv(folder / "log.csv")
    FILMS.write_csv(folder / "films.csv")
    names = {"history": "log.csv", "items": "films.csv", "adapter": "adapter"}
    return {**{key: str(folder / name) for key, name in names.items()}, "base_model": str(tiny_llama_folder)}


def test_a_batch_gets_its_scores(place: dict[str, str]) -> None:
    scorer = PairScorer(**place, columns={"user_id": "uid"})  # type: ignore[arg-type]
    batch = PAIRS.rename({"user_id": "uid"}).to_arrow()
    found = scorer(batch)
    assert found.column_names == ["uid", "item_id", "timestamp", "score", "probability"]
    assert found.select(batch.column_names).equals(batch)
    log = Histories.read(LOG, scorer.recommender.artifact, scorer.known.items)
    expected = score_pairs(scorer.recommender, PAIRS, log)
    assert found["score"].to_pylist() == expected["score"].to_list()
    assert scorer(batch.slice(0, 0)).schema == found.schema


def test_another_kind_of_batch(place: dict[str, str]) -> None:
    scorer = PairScorer(**place, columns={"user_id": "uid"})  # type: ignore[arg-type]
    batch: Any = {"uid": np.array(["a"]), "item_id": np.array([10])}
    with pytest.raises(
        DataError, match=r"a batch of type dict; expected a table: map_batches\(batch_format='pyarrow'\)"
    ):
        scorer(batch)


# Ray's workers would give way to everything else on the machine.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}

CLUSTER = """
import json, sys
import ray
from peftrec.ray_data import PairScorer

place = json.loads(sys.argv[1])
# Two actors take a CPU each for good; reading, repartitioning and writing need the third one.
ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
pairs = ray.data.read_parquet(sys.argv[2]).repartition(3)
scored = pairs.map_batches(
    PairScorer,
    fn_constructor_kwargs={**place, "columns": {"user_id": "uid"}},
    batch_format="pyarrow",
    batch_size=4,
    concurrency=2,
)
scored.write_parquet(sys.argv[3])
"""


@pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra ray")
def test_a_local_cluster(place: dict[str, str], tmp_path: Path) -> None:
    PAIRS.rename({"user_id": "uid"}).with_columns(note=pl.int_range(pl.len())).write_parquet(tmp_path / "pairs.parquet")
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER, json.dumps(place), str(tmp_path / "pairs.parquet"), str(tmp_path / "scores")],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        env={**os.environ, **QUIET, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = pl.read_parquet(tmp_path / "scores" / "*.parquet").sort("note")
    assert found["note"].to_list() == list(range(len(PAIRS)))
    scorer = PairScorer(**place, columns={"user_id": "uid"})  # type: ignore[arg-type]
    expected = scorer(PAIRS.rename({"user_id": "uid"}).to_arrow())
    np.testing.assert_allclose(found["score"], pa.table(expected)["score"].to_pylist(), atol=1e-4)
