"""Vectors with the ids of what they stand for, as a Parquet or a safetensors file.

Parquet holds two columns, `item_id` or `user_id` and `vector` (a list of float32, all of one length); safetensors the
tensor `vectors` and, in its metadata, `id_name` and `ids` as JSON. Either says in its metadata how they were made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from peftrec import tables
from peftrec.errors import DataError
from peftrec.record import atomic
from peftrec.similarity import Vectors

SUFFIXES = (".parquet", ".safetensors")
ID_NAMES = ("item_id", "user_id")


@dataclass(frozen=True)
class VectorTable:
    """Vectors by id.

    Attributes:
        ids: (N,), named `item_id` or `user_id`.
        vectors: (N, D), float32.
        about: how they were made.
    """

    ids: pl.Series
    vectors: Vectors
    about: Mapping[str, str] = field(default_factory=dict)

    def of(self, ids: pl.Series, where: str) -> Vectors:
        """The vectors of these ids, in their order.

        Raises:
            DataError: some of them have none.
        """
        place = {str(one): row for row, one in enumerate(self.ids.to_list())}
        wanted = [str(one) for one in ids.to_list()]
        missing = [one for one in wanted if one not in place]
        if missing:
            raise DataError(
                f"{where}: no vectors of {len(missing)} of {len(wanted)} ids, such as {missing[0]!r}; expected one of "
                "each: make them again (peftrec embed)"
            )
        return self.vectors[[place[one] for one in wanted]]


def check_path(path: str | Path) -> Path:
    """The path of a file that can be written.

    Raises:
        DataError: its name ends otherwise, or it is a folder, or lies in none.
    """
    found = Path(path).expanduser()
    if not found.name.lower().endswith(SUFFIXES):
        raise DataError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}; choose another --output")
    if found.is_dir() or not found.parent.is_dir():
        what = "is a folder" if found.is_dir() else f"there is no folder {found.parent}"
        raise DataError(f"{path}: {what}; expected a file to write; choose another --output")
    return found


def write(path: str | Path, table: VectorTable) -> None:
    """Write a file, whole or not at all.

    Raises:
        DataError: as `check_path`.
        PeftrecError: it cannot be written.
    """
    target = check_path(path)
    name, about = table.ids.name, {key: str(value) for key, value in table.about.items()}
    with atomic(target) as scratch:
        if target.name.lower().endswith(".parquet"):
            vectors = pl.Series("vector", table.vectors, dtype=pl.Array(pl.Float32, table.vectors.shape[1]))
            frame = pl.DataFrame([table.ids, vectors.arr.to_list()])
            frame.write_parquet(scratch, metadata=about)
        else:
            ids = {"id_name": name, "ids": json.dumps(table.ids.to_list(), ensure_ascii=False)}
            save_file({"vectors": np.ascontiguousarray(table.vectors)}, scratch, {**about, **ids})


def read(path: str | Path) -> VectorTable:
    """Read what `write` wrote, or a table of that form from elsewhere.

    Raises:
        DataError: it cannot be read, or has another form.
    """
    found = Path(path).expanduser()
    if not found.is_file() or not found.name.lower().endswith(SUFFIXES):
        what = "no such file" if not found.is_file() else "another kind of file"
        raise DataError(f"{path}: {what}; expected vectors as {' or '.join(SUFFIXES)} (peftrec embed writes them)")
    try:
        return _read_parquet(found) if found.name.lower().endswith(".parquet") else _read_safetensors(found)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, pl.exceptions.PolarsError) as error:
        raise DataError(
            f"{path}: cannot be read as vectors ({tables.first_line(error)}); expected item_id or user_id and vector, "
            "all of one length; make it again (peftrec embed)"
        ) from error


def _read_parquet(path: Path) -> VectorTable:
    frame = pl.read_parquet(path)
    name = next((one for one in ID_NAMES if one in frame.columns), None)
    if name is None or "vector" not in frame.columns:
        raise ValueError(f"columns {', '.join(frame.columns)}")
    vectors = np.asarray(frame["vector"].to_list(), dtype=np.float32)
    about = pl.read_parquet_metadata(path)
    return _checked(frame[name], vectors, {key: one for key, one in about.items() if key != "ARROW:schema"})


def _read_safetensors(path: Path) -> VectorTable:
    with safe_open(path, framework="numpy") as file:
        about: dict[str, Any] = dict(file.metadata() or {})
        vectors = file.get_tensor("vectors")
    ids = json.loads(about.pop("ids"))
    return _checked(pl.Series(about.pop("id_name"), ids), vectors.astype(np.float32), about)


def _checked(ids: pl.Series, vectors: Vectors, about: Mapping[str, str]) -> VectorTable:
    if vectors.ndim != 2 or len(vectors) != len(ids) or ids.name not in ID_NAMES:
        raise ValueError(f"{len(ids)} ids named {ids.name}, vectors of shape {vectors.shape}")
    if ids.is_duplicated().any() or ids.null_count():
        raise ValueError(f"{ids.name} is empty or repeated in some rows")
    return VectorTable(ids, vectors, about)
