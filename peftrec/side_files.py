"""Vectors in files of one's own: Parquet, safetensors or npz with ids and a vector for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import polars as pl
from safetensors import SafetensorError

from peftrec.errors import DataError
from peftrec.tables import unreadable

SUFFIXES = (".parquet", ".pq", ".safetensors", ".npz")
MOST_SIZE = 16_384
"""Numbers of a vector."""

# What a broken file raises depends on the library that reads it; the first one also covers UnicodeDecodeError.
BROKEN = (ValueError, KeyError, TypeError, OSError, EOFError, BadZipFile, SafetensorError, pl.exceptions.PolarsError)

Singles = npt.NDArray[np.float32]


def read_vectors(path: str, key: str) -> tuple[list[str], Singles]:
    """Ids (as text) and vectors (m, size) in a file of one's own.

    Args:
        path: Parquet with the columns `key` and `vector` (lists of numbers), or safetensors or npz with arrays of these
            names (m,) and (m, size); safetensors may hold texts as the bytes of a JSON list.
        key: `item_id` or `user_id`.

    Raises:
        DataError: there is no such file, or it holds something else.
    """
    file = Path(path).expanduser()
    if not file.is_file() or file.suffix.lower() not in SUFFIXES:
        found = f"unknown kind of file '{file.suffix}'" if file.is_file() else "no such file"
        raise DataError(f"{path}: {found}; expected a {', '.join(SUFFIXES)} file with {key} and vector")
    try:
        ids, vectors = _columns(file, key)
    except BROKEN as error:
        raise unreadable(path, error) from error
    if vectors.ndim != 2 or len(ids) != len(vectors) or not 1 <= vectors.shape[1] <= MOST_SIZE:
        raise DataError(
            f"{path}: {len(ids)} ids and vectors of shape {vectors.shape}; expected one vector of 1 to {MOST_SIZE:,} "
            "numbers for each id, all of one length"
        )
    if bad := int((~np.isfinite(vectors).all(axis=1)).sum()):
        raise DataError(f"{path}: {bad} vectors with a number that is not finite; expected numbers; leave these out")
    if len(set(ids)) < len(ids):
        twice = next(one for one in ids if ids.count(one) > 1)
        raise DataError(f"{path}: {key} {twice!r} is there twice; expected one vector each; remove one")
    return ids, vectors


def _columns(file: Path, key: str) -> tuple[list[str], Singles]:
    kind = file.suffix.lower()
    if kind in (".parquet", ".pq"):
        frame = pl.read_parquet(file, columns=[key, "vector"]).drop_nulls()
        if isinstance(frame["vector"].dtype, pl.List):
            sizes = sorted(set(frame["vector"].list.len().to_list()))
            if len(sizes) > 1:
                raise ValueError(f"vectors of {sizes[0]} to {sizes[-1]} numbers")
        return frame[key].cast(pl.String).to_list(), np.stack(frame["vector"].to_list()).astype(np.float32)
    if kind == ".npz":
        with np.load(file, allow_pickle=False) as arrays:
            return arrays[key].astype(str).tolist(), arrays["vector"].astype(np.float32)
    from safetensors.numpy import load_file

    tensors = load_file(file)
    return texts(tensors[key]), tensors["vector"].astype(np.float32)


def texts(found: npt.NDArray[Any]) -> list[str]:
    """Ids in a safetensors file: whole numbers, or the bytes of a JSON list."""
    if found.dtype == np.uint8:
        return [str(one) for one in json.loads(found.tobytes().decode("utf-8"))]
    return [str(one) for one in found.tolist()]
