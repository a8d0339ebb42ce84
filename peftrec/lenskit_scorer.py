"""A scorer for LensKit's pipelines: a saved adapter in the place of a model that LensKit would train.

pipeline = lenskit.pipeline.topn_pipeline(RecommenderScorer(adapter="runs/ml-100k-click-lora/adapter"))
pipeline.train(dataset)
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import polars as pl

from peftrec.errors import ConfigError, DataError
from peftrec.histories import Codes, places
from peftrec.pairs import items_of
from peftrec.recommender import Recommender

try:
    from lenskit.data import Dataset, ItemList, QueryInput, RecQuery
    from lenskit.pipeline import Component
    from lenskit.training import Trainable, TrainingOptions
    from pydantic import BaseModel
except ImportError as _missing:
    raise ConfigError(
        f"peftrec.lenskit_scorer: LensKit cannot be imported ({_missing}); install it: pip install 'peftrec[lenskit]' "
        "(Python 3.11 or newer)"
    ) from _missing


class RecommenderConfig(BaseModel):
    """Settings of `RecommenderScorer`; all but two are arguments of `Recommender.from_pretrained`."""

    adapter: str
    """The adapter's folder or Hub id."""
    items: str | None = None
    """Items table, a file; None is that of the data set that the adapter was trained on. Its ids are LensKit's."""
    base_model: str | None = None
    dtype: str | None = None
    prior: bool = True
    unrated: Literal["yes", "no"] | None = None
    """How an event without rating counts; None refuses histories without ratings."""


class RecommenderScorer(Component[ItemList], Trainable):  # type: ignore[misc]
    """Scores items for a query by the items of its history.

    The history is the query's `history_items`, in the order of its `timestamp` field where it has one, else as they
    stand. Scores are log-odds of a like, or predicted ratings. An item that the items table lacks has the score NaN, as
    LensKit's own scorers give what they cannot score, and tells nothing where it is in a history.
    """

    config: RecommenderConfig

    def train(self, data: Dataset, options: TrainingOptions = TrainingOptions()) -> None:  # noqa: B008
        """Load the adapter and check that it knows the items; nothing is learned from the data.

        Raises:
            PeftrecError: the adapter cannot be loaded, or its items table has none of the data's items.
        """
        ids = data.items.ids()
        if len(ids) and (self._rows(ids) < 0).all():
            raise DataError(
                f"items: none of the {len(ids)} ids of LensKit's data (such as {ids[0]}) is in the items table of "
                f"{self.config.adapter}; expected the same ids: give items=FILE"
            )

    def __call__(self, query: QueryInput, items: ItemList) -> ItemList:
        """The items with a score each.

        Raises:
            PeftrecError: the adapter cannot be loaded or has no items table, or the history has no ratings.
        """
        rows = self._rows(items.ids())
        scored = rows >= 0
        scores = np.full(len(rows), np.nan)
        if scored.any():
            asked = self._ids.gather(rows[scored]).to_list()
            scores[scored] = self.recommender.score(self._history(RecQuery.create(query)), asked)
        return ItemList(items, scores=scores)

    @property
    def recommender(self) -> Recommender:
        """The adapter, loaded when it is first needed.

        Raises:
            PeftrecError: it cannot be loaded.
        """
        if not hasattr(self, "_loaded"):
            wanted = self.config.model_dump(exclude={"adapter", "unrated"})
            self._loaded = Recommender.from_pretrained(self.config.adapter, **wanted)
        return self._loaded

    @property
    def _ids(self) -> pl.Series:
        return items_of(self.recommender, self.config.adapter)["item_id"]

    def _rows(self, ids: Any) -> Codes:
        """Rows of the items table, -1 for items that it lacks, (n,)."""
        return places(pl.Series(ids.tolist()), self._ids)

    def _history(self, query: RecQuery) -> list[dict[str, Any]]:
        past = query.history_items
        if past is None or not len(past):
            return []
        ids, times, ratings = past.ids(), past.field("timestamp"), past.field("rating")
        if ratings is None and self.config.unrated is None:
            raise DataError(
                "history: no ratings in LensKit's data; expected what each person answered: add them, or set "
                "unrated='yes' where an event is a like"
            )
        rows = self._rows(ids)
        order = range(len(ids)) if times is None else np.argsort(times, kind="stable").tolist()
        answers = (
            [{"label": int(self.config.unrated == "yes")}] * len(ids)
            if ratings is None
            else [{"rating": float(one)} for one in ratings]
        )
        return [{"item_id": self._ids[int(rows[at])]} | answers[at] for at in order if rows[at] >= 0]

    def __getstate__(self) -> dict[str, Any]:
        # Each of LensKit's worker processes loads the adapter for itself.
        return {name: value for name, value in self.__dict__.items() if name != "_loaded"}
