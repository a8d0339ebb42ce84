"""What an adapter's folder may hold: data of bounded size, nothing that runs, nothing of its author's machine.

The same rules stand at both doors: `hub.push` sends no folder that breaks them, `hub.pull` takes none.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

from peftrec import artifact, side_vectors
from peftrec.errors import ModelError
from peftrec.file_checks import CARD, CONFIG, WEIGHTS, check_file, check_size, front_matter, kind_of
from peftrec.leaks import Watch
from peftrec.schema import show

NEUTRAL: Final = (".cache", ".git", ".gitattributes", ".gitignore")
"""What git and the Hub's client keep for themselves at the top of a folder: neither looked at nor sent."""

PICKLES = re.compile(r"\.(bin|pt|pth|pkl|pickle|joblib|ckpt|dill|npy|npz|h5|hdf5|keras|msgpack|mar|pdparams)$", re.I)
CODE = re.compile(
    r"\.(py[cdowxz]?|so|dll|dylib|exe|sh|bash|bat|cmd|ps1|js|jar|rb|pl|php|ipynb|whl|egg|wasm|lua)$", re.I
)


def check_folder(
    folder: str | Path, allow: Sequence[str] | None = (), users: Collection[str] = frozenset()
) -> list[str]:
    """What speaks against publishing an adapter's folder; empty where nothing does.

    Args:
        folder: with what a run saved, RUN/adapter.
        allow: beginnings of texts that look like a local path, an e-mail address or a user's id and may be published,
            such as a contact; None looks for none of these: the folder is somebody else's.
        users: ids of the people in the data, none of which may be told.

    Returns:
        One line for each problem, sorted by file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return [f"{folder}: no such folder; expected RUN/adapter of a finished run"]
    found, problems = list_files(folder)
    problems += [
        f"{folder}: no {name}; expected the folder of an adapter that peftrec saved; use RUN/adapter"
        for name in (artifact.FILE, *([CONFIG] if WEIGHTS[1] not in found else []))
        if name not in found
    ]
    if not any(name in found for name in WEIGHTS):
        problems.append(f"{folder}: no {WEIGHTS[0]}; expected the weights of an adapter; use RUN/adapter")
    watch = None if allow is None else Watch(tuple(allow), frozenset(users))
    return sorted(problems + check_files(folder, found, watch))


def check_files(folder: Path, files: Mapping[str, Path], watch: Watch | None, *, whole: bool = True) -> list[str]:
    """What is wrong inside the files of an adapter: one line for each problem.

    Args:
        folder: where they are.
        files: path inside the folder -> file, all of kinds that an adapter has.
        watch: as in `check_file`.
        whole: whether these are all of its files.
    """
    problems = [problem for path, file in files.items() for problem in check_file(path, file, watch)]
    if artifact.FILE not in files or any(line.startswith((f"{artifact.FILE}: ", f"{CARD}: ")) for line in problems):
        return problems
    try:
        about = artifact.read(folder)
        if whole:
            artifact.read_prior(folder, about)
            side_vectors.read(folder, about)
    except ModelError as error:
        return [*problems, str(error)]
    # A base model without a namespace is a folder of its author's, whose name on the Hub the card may know.
    named = about.base_model.hub_id
    if CARD in files and "/" in named:
        claimed = front_matter(CARD, files[CARD].read_text(encoding="utf-8"))[0].get("base_model")
        if claimed is not None and named not in (claimed if isinstance(claimed, list) else [claimed]):
            problems.append(
                f"{CARD}: metadata: base_model: {show(claimed)}; expected {named}, as {artifact.FILE} has it; render "
                "the card again"
            )
    return problems


def list_files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Path inside the folder -> file, for what an adapter may have; and a line for everything else."""
    found: dict[str, Path] = {}
    problems: list[str] = []
    whole = folder.resolve()
    for place, folders, names in os.walk(folder):
        top = Path(place) == folder
        folders[:] = sorted(name for name in folders if not (top and name in NEUTRAL))
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        for name in sorted({*names, *links}):
            file = Path(place) / name
            path = file.relative_to(folder).as_posix()
            if top and name in NEUTRAL:
                continue
            problem = check_path(path) or _check_letters(path) or _check_link(path, file, whole)
            if problem is None and kind_of(path) is None:
                what = "a format that can run code" if PICKLES.search(path) else "not a file of an adapter"
                problem = f"{path}: {what}; expected safetensors, JSON, Markdown, PNG, tokenizer files; remove it"
            if problem:
                problems.append(problem)
            else:
                found[path] = file
    return dict(sorted(found.items())), problems


def _check_link(path: str, file: Path, whole: Path) -> str | None:
    if file.is_symlink() and not (file.is_file() and file.resolve().is_relative_to(whole)):
        return f"{path}: a link that leaves the folder, or to no file; expected a file; put the file in its place"
    return None if file.is_file() else f"{path}: neither a file nor a folder; remove it"


def check_path(path: str) -> str | None:
    """Why a path from elsewhere may not be written below a folder, or None."""
    parts = path.split("/")
    if (
        not path.isprintable()
        or len(path) > 200
        or any(character in path for character in '\\:*?"<>|')
        or path.startswith("~")
        or any(part in ("", ".", "..") or part.endswith((" ", ".")) or part.lower() == ".git" for part in parts)
        or PurePosixPath(path).is_absolute()
    ):
        return f"{show(path)}: a path that could leave the folder; expected a plain relative one"
    return None


def _check_letters(path: str) -> str | None:
    """Letters that look like others make names that are not what they seem."""
    return None if path.isascii() else f"{show(path)}: letters beyond ASCII; expected an adapter's file; rename it"


def check_remote(sizes: Mapping[str, int]) -> list[str]:
    """What speaks against downloading from a repository, by the paths and sizes (bytes) of its files."""
    problems = []
    folded: dict[str, str] = {}
    for path, size in sorted(sizes.items()):
        problem = check_path(path)
        if problem is None and PICKLES.search(path):
            problem = f"{path}: a pickle or another format that can run code; expected safetensors"
        if problem is None and CODE.search(path):
            problem = f"{path}: code; expected data only"
        # Systems differ in which of these names are one.
        twin = folded.setdefault(unicodedata.normalize("NFKC", path).casefold(), path)
        if problem is None and kind_of(path) is not None:
            problem = check_size(path, size) if twin == path else f"{path}: differs from {twin} by case only"
            problem = problem or _check_letters(path)
        if problem:
            problems.append(problem)
    problems += [f"{name}: missing; expected an adapter that peftrec pushed" for name in _missing(sizes)]
    return problems


def _missing(paths: Mapping[str, Any]) -> list[str]:
    return [
        *([artifact.FILE] if artifact.FILE not in paths else []),
        *([WEIGHTS[0]] if not any(name in paths for name in WEIGHTS) else []),
    ]
