"""Replacing a folder by another: who looks sees the old one or the new one."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from peftrec import artifact
from peftrec.contents import NEUTRAL, list_files
from peftrec.errors import HubError
from peftrec.hub_client import Content

_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux


def replace(target: Path, files: Mapping[str, Content]) -> bool:
    """Make `target` hold copies of `files`, what git and the Hub's client keep there (`NEUTRAL`), and nothing else.

    Args:
        target: a folder with an adapter, an empty one, or none.
        files: path inside the folder -> file; a copy with another hash is refused.

    Returns:
        Whether anything was written: False where the folder held the same already.

    Raises:
        HubError: the folder holds other things, or cannot be written.
    """
    there = adapter_in(target)
    try:
        if there.keys() == files.keys() and all(sha256(place) == files[path].sha256 for path, place in there.items()):
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, hence on the same filesystem: a rename is atomic only there.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            new = Path(scratch) / "new"
            for path, file in files.items():
                copy = new / path
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file.place, copy)
                with copy.open("rb+") as written:
                    os.fsync(written.fileno())
                if sha256(copy) != file.sha256:
                    raise HubError(f"{file.place}: changed while it was copied; nothing was published: push again")
            _carry(target, new)
            _swap(new, target)
    except OSError as error:
        raise HubError(f"{target}: cannot be written ({error.strerror or error}); choose another folder") from error
    return True


def adapter_in(target: Path) -> dict[str, Path]:
    """Path inside the folder -> file, of an adapter that lies there; empty where nothing does.

    Raises:
        HubError: it is no folder, or it holds other things.
    """
    try:
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise HubError(f"{target}: not a folder; expected one, or none; choose another")
        if not target.exists():
            return {}
        names = {one.name for one in target.iterdir()}
    except OSError as error:
        raise HubError(f"{target}: cannot be read ({error.strerror or error}); choose another folder") from error
    if names <= set(NEUTRAL):
        return {}
    found, others = list_files(target)
    if artifact.FILE not in found or others:
        what = others[0].partition(":")[0] if others else f"no {artifact.FILE}"
        raise HubError(f"{target}: holds other things than an adapter ({what}); choose another folder")
    return found


def sha256(path: Path) -> str:
    """The hash of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _carry(target: Path, new: Path) -> None:
    """Give `new` what git and the Hub's client keep in `target`, which holds it too until it is gone."""
    for name in NEUTRAL:
        kept, place = target / name, new / name
        if kept.is_symlink():
            place.symlink_to(kept.readlink())
        elif kept.is_dir():
            shutil.copytree(kept, place, symlinks=True, copy_function=_link)
        elif kept.exists():
            _link(kept, place)


def _link(kept: str | Path, place: str | Path) -> None:
    try:
        os.link(kept, place)
    except OSError:  # a filesystem without links
        shutil.copy2(kept, place)


def _swap(new: Path, target: Path) -> None:
    if not target.exists():
        new.replace(target)
    elif not _exchange(new, target):
        old = new.with_name("old")
        target.rename(old)
        try:
            new.rename(target)
        except BaseException:  # also an impatient Ctrl-C: `old` goes with the scratch folder
            old.rename(target)
            raise


def _exchange(new: Path, target: Path) -> bool:
    """Let two folders change names in one step, where the system can."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(call(_HERE, os.fsencode(new), _HERE, os.fsencode(target), _EXCHANGE) == 0)
