"""How alike vectors are, and the nearest ones: exact, by blocks of matrix products.

One query is compared with all items in one product, so there is no approximate index to build, to tune
and to keep: docs/features.md has the times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from peftrec.errors import DataError

Measure = Literal["cosine", "dot", "euclidean", "pearson"]
MEASURES: tuple[Measure, ...] = get_args(Measure)

Floats = npt.NDArray[np.float64]
Vectors = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

_CELLS = 16_000_000  # similarities held at once: 64 MB


@dataclass(frozen=True)
class Nearest:
    """The items nearest to one query, nearest first; of equal ones the first in the table comes first.

    Attributes:
        rows: of the items, (k,).
        scores: their similarities, (k,), descending.
    """

    rows: Rows
    scores: Vectors


class Index:
    """Items' vectors, ready to be compared with queries.

    Higher is more alike under every measure: `cosine` and `pearson` (the cosine of vectors less their own mean) are
    from -1 to 1, and 0 for a vector that has no direction; `dot` is the inner product; `euclidean` the distance with a
    minus sign.

    Args:
        vectors: (N, D).
        measure: one of the above.

    Raises:
        DataError: no such measure, or vectors that are not finite or no matrix.
    """

    def __init__(self, vectors: npt.ArrayLike, measure: Measure = "cosine") -> None:
        if measure not in MEASURES:
            raise DataError(f"similarity: {measure!r}; expected one of {', '.join(MEASURES)}")
        found = np.asarray(vectors, dtype=np.float32)
        if found.ndim != 2:
            raise DataError(f"vectors: of shape {found.shape}; expected a matrix, one row for each item")
        if bad := int((~np.isfinite(found)).any(axis=1).sum()):
            raise DataError(f"vectors: {bad} of {len(found)} hold values that are not finite; embed those items again")
        self.measure = measure
        self.vectors = self._ready(found)
        self._squares = np.einsum("nd,nd->n", self.vectors, self.vectors)

    def __len__(self) -> int:
        return len(self.vectors)

    def similarity(self, queries: npt.ArrayLike) -> Vectors:
        """Of each query to each item: (Q, D) -> (Q, N).

        Raises:
            DataError: the queries have another number of dimensions.
        """
        return self._compared(self._queries(queries))

    def nearest(
        self,
        queries: npt.ArrayLike,
        n: int,
        *,
        threshold: float | None = None,
        exclude: Sequence[Sequence[int]] | None = None,
    ) -> list[Nearest]:
        """The `n` items nearest to each query.

        Args:
            queries: (Q, D).
            n: how many; fewer where there are fewer.
            threshold: leave out items that are less similar than this.
            exclude: rows to leave out, for each query.

        Raises:
            DataError: as `similarity`, or `n` is no whole number from 1.
        """
        if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
            raise DataError(f"n: {n!r}; expected a whole number from 1")
        asked = self._queries(queries)
        left_out = exclude or [()] * len(asked)
        together = max(1, _CELLS // max(1, len(self)))
        found = []
        for begin in range(0, len(asked), together):
            group = slice(begin, begin + together)
            for scores, out in zip(self._compared(asked[group]), left_out[group], strict=True):
                kept = np.ones(len(scores), dtype=bool) if threshold is None else scores >= threshold
                kept[list(out)] = False
                rows = np.flatnonzero(kept)
                found.append(_best(rows, scores[rows], int(n)))
        return found

    def _queries(self, queries: npt.ArrayLike) -> Vectors:
        found = np.asarray(queries, dtype=np.float32)
        if found.ndim != 2 or found.shape[1] != self.vectors.shape[1]:
            raise DataError(
                f"queries: of shape {found.shape}; the items have {self.vectors.shape[1]} dimensions; expected a "
                "matrix of as many columns, made by the same model"
            )
        return self._ready(found)

    def _ready(self, vectors: Vectors) -> Vectors:
        if self.measure == "pearson":
            vectors = vectors - vectors.mean(axis=1, keepdims=True)
        return normalized(vectors) if self.measure in ("cosine", "pearson") else vectors

    def _compared(self, queries: Vectors) -> Vectors:
        product: Vectors = queries @ self.vectors.T
        if self.measure != "euclidean":
            return product
        squares = np.einsum("qd,qd->q", queries, queries)
        apart: Vectors = np.maximum(squares[:, None] + self._squares[None] - 2 * product, 0)
        return -np.sqrt(apart)


def normalized(vectors: npt.ArrayLike) -> Vectors:
    """Each vector divided by its length, (N, D); one without length stays 0."""
    found = np.asarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(found, axis=-1, keepdims=True)
    result: Vectors = np.divide(found, lengths, out=np.zeros_like(found), where=lengths > 0)
    return result


def _best(rows: Rows, scores: Vectors, n: int) -> Nearest:
    if len(scores) > n:
        # Everything that ties with the last place stays in, so that the row decides and not the partition.
        last = np.partition(scores, len(scores) - n)[len(scores) - n]
        at = np.flatnonzero(scores >= last)
        rows, scores = rows[at], scores[at]
    order = np.lexsort((rows, -scores))[:n]
    return Nearest(rows[order], scores[order])
