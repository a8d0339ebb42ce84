"""Scoring pairs on a cluster, as a step of Ray Data (pip install 'peftrec[ray]').

ray.data.read_parquet("pairs/").map_batches(
    PairScorer,
    fn_constructor_kwargs={"adapter": "runs/mine/adapter", "history": "log.parquet", "items": "items.csv"},
    batch_format="pyarrow",
    batch_size=4096,
    concurrency=4,
).write_parquet("scores/")
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl
import pyarrow as pa

from peftrec import backbone, loading
from peftrec.errors import DataError
from peftrec.pairs import Known, score_pairs
from peftrec.recommender import Recommender


class PairScorer:
    """A class for `Dataset.map_batches`: each actor loads the adapter once, and each batch gets its scores.

    A user's history is read once for all of the user's pairs in a batch, so sort or partition the data by user. Paths
    must lead to the same files on every node.

    Args:
        adapter: see `Recommender.from_pretrained`.
        history: the log, see `histories.Histories.read`; None is nobody's history.
        items: the items table; None is that of the adapter's named data set.
        columns: our name -> name in the pairs and in these tables.
        base_model: see `Recommender.from_pretrained`.
        prior: whether the saved prior is added.
        device: as in torch; None is the GPU if there is one.
        revision: of the adapter on the Hub; None is main.

    Raises:
        HubError, ModelError, DataError: what is named cannot be used.
    """

    def __init__(
        self,
        adapter: str,
        *,
        history: str | None = None,
        items: str | None = None,
        columns: Mapping[str, str] | None = None,
        base_model: str | None = None,
        prior: bool = True,
        device: str | None = None,
        revision: str | None = None,
    ) -> None:
        backbone.quiet()
        adapter = str(loading.find(adapter, revision))
        self.known = Known.read(adapter, history=history, items=items, columns=columns)
        self.recommender = Recommender.from_pretrained(
            adapter, items=self.known.items, base_model=base_model, prior=prior, device=device
        )

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The batch with `score` and, where clicks are predicted, `probability`.

        Raises:
            DataError: see `pairs.score_pairs`.
        """
        if not isinstance(batch, pa.Table):
            raise DataError(
                f"a batch of type {type(batch).__name__}; expected a table: map_batches(batch_format='pyarrow')"
            )
        pairs: Any = pl.from_arrow(batch)
        names = self.known.names(pairs.columns, "pairs")
        scores = score_pairs(self.recommender, pairs, self.known.histories, columns=names)
        for name in scores.columns:
            batch = batch.append_column(name, scores[name].to_arrow())
        return batch
