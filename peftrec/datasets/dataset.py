"""What peftrec knows of a named data set: how to load it, and the facts that a model card states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class Tables:
    """A data set's tables under our column names, one row per event and item, not checked yet."""

    interactions: pl.DataFrame
    items: pl.DataFrame


@dataclass(frozen=True)
class Graph:
    """A knowledge graph of the items: `triples` (head, relation, tail) and `links` (item_id, entity)."""

    triples: pl.DataFrame
    links: pl.DataFrame


@dataclass(frozen=True)
class Dataset:
    """One named data set.

    Attributes:
        name: What `data.name` takes.
        description: One line for `peftrec datasets`.
        load: Reads the tables, fetching them when they are not in the cache.
        load_users: Reads what is told of the users, one row per `user_id`; None where nothing is.
        load_graph: Reads the items' knowledge graph, as `Graph`; None where there is none.
        like_at: Rating from which an event counts as liked, unless the recipe says otherwise.
        rating_range: Lowest and highest rating of the scale.
        homepage: Where the data set is described.
        license: What its owners allow, in a sentence.
        citation: The reference that its owners ask for.
        language: Language of the items' texts (ISO 639-1).
    """

    name: str
    description: str
    load: Callable[[], Tables]
    like_at: float
    rating_range: tuple[float, float]
    homepage: str
    license: str
    citation: str
    language: str
    load_users: Callable[[], pl.DataFrame] | None = None
    load_graph: Callable[[], Graph] | None = None
