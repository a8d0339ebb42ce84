"""A recipe's data read, checked and split; what was once, is read from memory-mapped files from then on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from peftrec import config, interactions, kept, split, tables
from peftrec.datasets import DATASETS
from peftrec.interactions import Interactions
from peftrec.sources import Task
from peftrec.split import Log

ARRAYS = ("user", "item", "timestamp", "label", "rating", "split", "asked")
FRAMES = ("items", "prompts", "users")

# What is kept depends on the code that makes it: all that this module and encode.py call, and the libraries below it.
MODULES = (
    "assets",
    "draws",
    "encode",
    "interactions",
    "kept",
    "negatives",
    "prepared",
    "prompts",
    "record_events",
    "sources",
    "split",
    "tables",
    "sight",
    "packing",
    "timeline",
    "datasets/*",
)
LIBRARIES = ("numpy", "polars", "tokenizers", "transformers")


def load(
    data: config.Data, seed: int, task: Task = "click", *, with_users: Mapping[str, str] | None = None
) -> tuple[Interactions, Log]:
    """What `interactions.load` and `split.split` give, except that the first one's `events` are let go.

    Args:
        data: the recipe's data section.
        seed: draws users and splits.
        task: whether the events need labels or ratings.
        with_users: as in `interactions.load`.

    Returns:
        The source, without rows, and its log, whose `key` others may keep by what they make of it.

    Raises:
        AssetError, ConfigError, DataError: as these, and as `kept.keep`.
    """
    key = _key(data, seed, task, with_users)

    def make() -> kept.Kept:
        source = interactions.load(data, seed, task, with_users=with_users)
        return _pack(source, split.split(source, data.split, seed))

    return _unpack(kept.keep("log", key, make), key)


def _key(data: config.Data, seed: int, task: Task, with_users: Mapping[str, str] | None) -> str | None:
    """A hash of the files and settings; None where the files are not at hand."""
    records = data.records.values() if isinstance(data.records, dict) else [data.records]
    sources = [source for source in (data.interactions, data.items, data.users, *records) if source]
    paths = [Path(source).expanduser() for source in sources]
    if data.name in DATASETS:
        paths += [path for found in DATASETS[data.name].find(data.folder).values() for path in found]
    if any(tables.on_hub(source) for source in sources) or not all(path.is_file() for path in paths):
        return None
    return kept.key_of(
        data=dataclasses.asdict(data),
        files=[kept.file_hash(path) for path in paths],
        seed=seed,
        task=task,
        with_users=dict(with_users or {}),
        code=code(),
    )


def code() -> dict[str, str]:
    """Hashes and versions of the code that makes what is kept."""
    from importlib.metadata import version

    here = Path(__file__).parent
    files = sorted(path for name in MODULES for path in here.glob(f"{name}.py"))
    return {
        **{path.relative_to(here).as_posix(): kept.file_hash(path) for path in files},
        **{name: version(name) for name in LIBRARIES},
    }


def _pack(source: Interactions, log: Log) -> kept.Kept:
    values: dict[str, Any] = {name: getattr(log, name) for name in (*ARRAYS, *FRAMES)}
    return kept.Kept(
        arrays={name: values[name] for name in ARRAYS if values[name] is not None},
        frames={
            **{name: values[name] for name in FRAMES if values[name] is not None},
            "user_ids": pl.DataFrame({"user_id": log.user_ids}),
        },
        facts={
            "name": source.name,
            "sha256": source.sha256,
            "warnings": source.warnings,
            "like_at": source.like_at,
            "scale": log.scale,
            "liked_from": log.liked_from,
            "drawn": log.drawn,
        },
    )


def _unpack(found: kept.Kept, key: str | None) -> tuple[Interactions, Log]:
    facts = found.facts
    user_ids, scale = found.frames["user_ids"]["user_id"], tuple(facts["scale"])
    log = Log(
        **{name: found.arrays.get(name) for name in ARRAYS},  # type: ignore[arg-type]
        **{name: found.frames.get(name) for name in FRAMES},  # type: ignore[arg-type]
        user_ids=user_ids,
        scale=scale,
        liked_from=facts["liked_from"],
        drawn=facts["drawn"],
        key=key if kept.limit() else None,
    )
    source = Interactions(
        events=pl.DataFrame(),
        user_ids=user_ids,
        items=log.items,
        name=facts["name"],
        sha256=facts["sha256"],
        warnings=tuple(facts["warnings"]),
        scale=scale,
        like_at=facts["like_at"],
        users=log.users,
        drawn=log.drawn,
    )
    return source, log
