"""Items of a knowledge graph as vectors, and two kinds of vectors made one.

An item's neighbours, each with the relation that leads there, are its row of a sparse matrix, and the matrix's leading
singular vectors its vector: films are near each other that share actors, directors and genres. It is the graph's first
neighbourhood only, deterministic, and takes seconds.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import polars as pl

from peftrec.errors import ConfigError, DataError
from peftrec.similarity import Vectors, normalized

try:
    from scipy.linalg import orthogonal_procrustes
    from scipy.sparse import csr_matrix
    from sklearn.decomposition import TruncatedSVD
except ImportError as _missing:
    raise ConfigError(
        "peftrec.graph: scikit-learn is not installed; install it: pip install 'peftrec[sklearn]'"
    ) from _missing

Fusion = Literal["concat", "average"]
FUSIONS: tuple[Fusion, ...] = get_args(Fusion)

TRIPLE, LINK = ("head", "relation", "tail"), ("item_id", "entity")


def item_vectors(ids: pl.Series, triples: pl.DataFrame, links: pl.DataFrame, size: int = 64, seed: int = 13) -> Vectors:
    """Vectors of items by their neighbours in a graph, (N, D), of length 1; 0 for an item that is not in the graph.

    A neighbour that few items share says more of them (its column weighs the logarithm of items over items that have
    it); one that a single item has says nothing and is left out.

    Args:
        ids: of the items, (N,).
        triples: `head`, `relation` and `tail`, entities by name; read in both directions.
        links: `item_id` and `entity`, its name in the graph.
        size: dimensions, fewer where the graph has fewer.
        seed: of the factorisation.

    Raises:
        DataError: a column is missing, or no two items share a neighbour.
    """
    for frame, columns, what in ((triples, TRIPLE, "triples"), (links, LINK, "links")):
        if missing := [name for name in columns if name not in frame.columns]:
            found = ", ".join(frame.columns)
            raise DataError(f"{what}: no column '{missing[0]}' (found {found}); expected {', '.join(columns)}")
    rows = pl.DataFrame({"item": np.arange(len(ids)), "item_id": ids.cast(pl.String)})
    items = links.select(pl.col("item_id").cast(pl.String), "entity").join(rows, on="item_id").unique("item")
    there = triples.select(entity="head", relation="relation", other="tail")
    back = triples.select(entity="tail", relation=pl.lit("-") + pl.col("relation"), other="head")
    known = pl.concat((there, back)).unique().join(items, on="entity")
    shared = known.group_by("relation", "other").agg(pl.col("item").n_unique().alias("items"))
    shared = shared.filter(pl.col("items") > 1).sort("relation", "other").with_row_index("column")
    cells = known.join(shared, on=["relation", "other"]).unique(["item", "column"]).sort("item", "column")
    if not cells.height:
        raise DataError("graph: no two items share a neighbour; expected links from their ids to the triples' entities")
    weight = np.log(len(items) / cells["items"].to_numpy()) + 1e-6
    places = (cells["item"].to_numpy(), cells["column"].to_numpy().astype(np.int64))
    matrix = csr_matrix((weight, places), shape=(len(ids), shared.height))
    size = min(size, len(ids) - 1, shared.height - 1)
    if size < 1:
        raise DataError(f"graph: {len(ids)} items and {shared.height} shared neighbours; expected at least 2 of each")
    return normalized(TruncatedSVD(size, random_state=seed).fit_transform(matrix))


def fuse(one: npt.ArrayLike, other: npt.ArrayLike, how: Fusion = "concat") -> Vectors:
    """Vectors of the same items from two sources as one, (N, D) and (N, E), of length 1.

    Each source is centred and brought to length 1 first, so that neither outweighs the other; an item that one of them
    does not know (a vector of 0) keeps what the other says.

    Args:
        one: (N, D).
        other: (N, E).
        how: `concat`, (N, D + E): similarities are averaged. `average`, (N, min(D, E)): the wider source is projected
            to the size of the other (leading singular vectors), turned so that both agree as far as a rotation allows
            (Schönemann 1966), and the two are averaged.

    Raises:
        DataError: other numbers of items, or no such way.
    """
    if how not in FUSIONS:
        raise DataError(f"fusion: {how!r}; expected one of {', '.join(FUSIONS)}")
    left, right = _placed(one), _placed(other)
    if len(left) != len(right):
        raise DataError(f"vectors: of {len(left)} and {len(right)} items; expected the same items in both")
    if how == "concat":
        return normalized(np.concatenate((left, right), axis=1))
    wide, narrow = (left, right) if left.shape[1] >= right.shape[1] else (right, left)
    if wide.shape[1] > narrow.shape[1]:
        wide = normalized(wide @ np.linalg.svd(wide, full_matrices=False)[2][: narrow.shape[1]].T)
    turn, _ = orthogonal_procrustes(wide, narrow)
    return normalized(wide @ turn + narrow)


def _placed(vectors: npt.ArrayLike) -> Vectors:
    found = np.asarray(vectors, dtype=np.float32)
    known = np.abs(found).sum(axis=1) > 0
    mean = found[known].mean(axis=0) if known.any() else 0
    return normalized(np.where(known[:, None], found - mean, 0))
