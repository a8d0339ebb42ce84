"""Arrays and tables that are made once, kept in memory-mapped files, and found again by what they were made of.

    $PEFTREC_HOME/prepared/windows-0123456789abcdef/{about.json, spans.npy, …}

`PEFTREC_PREPARED=off` keeps nothing; a number there is how many gigabytes are kept at most.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from filelock import FileLock

from peftrec import assets
from peftrec.errors import ConfigError

SWITCH, MOST = "PEFTREC_PREPARED", 20.0
ABOUT, ARRAY, FRAME = "about.json", ".npy", ".arrow"
GIGABYTE = 1e9


@dataclass(frozen=True)
class Kept:
    """What is kept together.

    Attributes:
        arrays: by name; those from files are read-only and take memory only while they are looked at.
        frames: tables by name.
        facts: what JSON can say.
    """

    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    frames: Mapping[str, pl.DataFrame] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def keep(kind: str, key: str | None, make: Callable[[], Kept]) -> Kept:
    """What `make` gives, from files where it was made before.

    Of several processes that want the same, one makes it. A file that is not as it was written is made again.

    Args:
        kind: what it is, a word for the folder's name.
        key: see `key_of`; None keeps nothing.
        make: called if there is nothing.

    Raises:
        ConfigError: the environment's `PEFTREC_PREPARED` is neither off nor a number.
    """
    if key is None or not limit():
        return make()
    folder = assets.cache_folder() / "prepared" / f"{kind}-{key[:16]}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_suffix(".lock"))
        lock.acquire()
    except OSError as error:
        _cannot(folder, error)
        return make()
    try:
        if (found := _read(folder)) is not None:
            return found
        made = make()
        try:
            _write(folder, made)
        except OSError as error:
            _cannot(folder, error)
            return made
        _forget(folder)
        return _read(folder) or made
    finally:
        lock.release()


def key_of(**facts: Any) -> str:
    """A hash of facts that JSON can say, whatever their order."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def limit() -> float:
    """Bytes that are kept at most; 0 keeps nothing.

    Raises:
        ConfigError: the environment's `PEFTREC_PREPARED` is neither off nor a number.
    """
    said = os.environ.get(SWITCH, "").strip()
    try:
        gigabytes = 0.0 if said.lower() == "off" else float(said or MOST)
    except ValueError:
        gigabytes = -1.0
    if not gigabytes >= 0:
        raise ConfigError(f"{SWITCH}: {said!r} in the environment; expected off, or how many gigabytes to keep at most")
    return gigabytes * GIGABYTE


def _cannot(folder: Path, error: OSError) -> None:
    warnings.warn(
        f"{folder.parent}: prepared data cannot be kept ({error.strerror or error}) and will be made again next time; "
        f"set PEFTREC_HOME to a folder that can be written, or {SWITCH}=off",
        stacklevel=3,
    )


def _read(folder: Path) -> Kept | None:
    """What is kept there; None where nothing is, or other bytes than were written."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if any(file_hash(folder / name) != digest for name, digest in about["files"].items()):
            return None
        os.utime(folder)  # when it was last of use
        arrays, frames = {}, {}
        for name in about["files"]:
            path = folder / name
            if path.suffix == ARRAY:
                arrays[path.stem] = np.asarray(np.load(path, mmap_mode="r"))
            else:
                frames[path.stem] = pl.read_ipc(path)
        return Kept(arrays, frames, about["facts"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pl.exceptions.PolarsError):
        return None


def _write(folder: Path, made: Kept) -> None:
    """Write all of it beside the folder, then give it the folder's name: nobody sees half of it."""
    prefix = f".{folder.name}-"
    for stale in folder.parent.glob(f"{prefix}*"):  # left by a process that was killed: the lock says nobody uses it
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent, ignore_cleanup_errors=True) as scratch:
        inner = Path(scratch) / "whole"
        inner.mkdir()
        for name, values in made.arrays.items():
            np.save(inner / f"{name}{ARRAY}", values)
        for name, frame in made.frames.items():
            frame.write_ipc(inner / f"{name}{FRAME}", compression="uncompressed")
        files = {path.name: file_hash(path) for path in sorted(inner.iterdir())}
        text = json.dumps({"files": files, "facts": dict(made.facts)}, indent=2, ensure_ascii=False)
        (inner / ABOUT).write_text(text + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        inner.replace(folder)


def _forget(newest: Path) -> None:
    """Remove what was not of use for the longest time, as far as there is more than the limit."""
    entries = [(path.stat().st_mtime, path) for path in newest.parent.iterdir() if (path / ABOUT).is_file()]
    size = {path: sum(file.stat().st_size for file in path.iterdir()) for _, path in entries}
    total = sum(size.values())
    for _, path in sorted(entries):
        if total <= limit() or path == newest:
            continue
        total -= size[path]
        # Who has mapped its files keeps them until the mapping ends.
        shutil.rmtree(path, ignore_errors=True)
