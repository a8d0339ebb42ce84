"""What an adapter's folder may hold: data of bounded size, nothing that runs, nothing of its author's machine.

The same rules stand at both doors: `hub.push` sends no folder that breaks them, `hub.pull` takes none.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

import yaml

from peftrec import artifact
from peftrec.errors import ModelError
from peftrec.schema import show

Kind = Literal["weights", "json", "text", "picture", "tokenizer"]

CONFIG, CARD, FIGURES = "adapter_config.json", "README.md", "figures"
WEIGHTS: Final = ("adapter_model.safetensors", "model.safetensors")
TOKENIZER: Final = (
    "chat_template.jinja",
    "merges.txt",
    "sentencepiece.bpe.model",
    "source.spm",
    "spiece.model",
    "target.spm",
    "tokenizer.model",
    "vocab.txt",
)
VOCABULARIES: Final = ("added_tokens.json", "merges.txt", "tokenizer.json", "vocab.json", "vocab.txt")
OURS: Final = (
    *WEIGHTS,
    *TOKENIZER,
    *VOCABULARIES,
    CONFIG,
    CARD,
    artifact.FILE,
    artifact.PRIOR_FILE,
    "special_tokens_map.json",
    "tokenizer_config.json",
)
"""What an adapter's folder is made of, besides its figures: a push that has one of them no more takes it away."""
NEUTRAL: Final = (".cache", ".git", ".gitattributes", ".gitignore")
"""What git and the Hub's client keep for themselves at the top of a folder: neither looked at nor sent."""

MEGABYTE = 1_000_000
MOST_BYTES: Final[Mapping[str, int]] = {
    **artifact.MOST_BYTES,
    **dict.fromkeys(VOCABULARIES, 100 * MEGABYTE),
    "json": 10 * MEGABYTE,
    "text": 2 * MEGABYTE,
    "picture": 20 * MEGABYTE,
    "tokenizer": 100 * MEGABYTE,
}
MOST_HEADER_BYTES = 100 * MEGABYTE
MOST_YAML_NODES = 100_000

PICKLES = re.compile(r"\.(bin|pt|pth|pkl|pickle|joblib|ckpt|dill|npy|npz|h5|hdf5|keras|msgpack|mar|pdparams)$", re.I)
CODE = re.compile(
    r"\.(py[cdowxz]?|so|dll|dylib|exe|sh|bash|bat|cmd|ps1|js|jar|rb|pl|php|ipynb|whl|egg|wasm|lua)$", re.I
)
RUNS: Final = ("auto_map", "custom_pipelines", "megatron_config", "trust_remote_code")
"""Keys of JSON files by which transformers or PEFT are told to import something."""

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
FOLDERS = "home|Users|root|mnt|media|tmp|var|opt|srv|private|Volumes|scratch|workspace|work|data|gpfs|lustre|nfs"
LEAKS: Final = {
    "a local path": re.compile(
        rf"(?<![\w./:~-])/(?:{FOLDERS})/[\w.@+-][^\s\"'`)\]]*|file:///[^\s\"'`)\]]+"
        r"|(?<!\w)[A-Za-z]:\\{1,2}(?:Users|Windows|Temp|Program|Documents)[^\s\"'`)\]]*"
    ),
    "an e-mail address": re.compile(
        r"(?<![\w.+-])(?!git@)[\w.+-]+@(?!example\.)[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}(?!\w)"
    ),
}
SECRET = re.compile(
    r"(?<!\w)(?:(?:hf|api_org)_[A-Za-z]{30,}|hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}"
    r"|glpat-[\w-]{20,}|sk-[\w-]{20,}|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16})(?!\w)|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


def kind_of(path: str) -> Kind | None:
    """What a file is by its path inside the folder; None is nothing that an adapter has."""
    folder, _, name = path.rpartition("/")
    if name.endswith(".png") and folder in ("", FIGURES):
        return "picture"
    if folder:
        return None
    if name in WEIGHTS:
        return "weights"
    if name in TOKENIZER:
        return "tokenizer"
    return "json" if name.endswith(".json") else "text" if name.endswith(".md") else None


def is_ours(path: str) -> bool:
    """Whether an earlier push of an adapter may have left this file."""
    return path in OURS or (path.startswith(f"{FIGURES}/") and kind_of(path) == "picture")


def check_folder(folder: str | Path, allow: Sequence[str] | None = ()) -> list[str]:
    """What speaks against publishing an adapter's folder; empty where nothing does.

    Args:
        folder: with what a run saved, RUN/adapter.
        allow: texts that look like a local path or an e-mail address and may be published, such as a contact.

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
    for path, file in found.items():
        problems += check_file(path, file, allow)
    if artifact.FILE in found and not any(line.startswith(f"{artifact.FILE}: ") for line in problems):
        try:
            artifact.read(folder)
        except ModelError as error:
            problems.append(str(error))
    return sorted(problems)


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
            problem = check_path(path) or _check_link(path, file, whole)
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


def check_remote(sizes: Mapping[str, int]) -> list[str]:
    """What speaks against downloading from a repository, by the paths and sizes (bytes) of its files."""
    problems = []
    lower: dict[str, str] = {}
    for path, size in sorted(sizes.items()):
        problem = check_path(path)
        if problem is None and PICKLES.search(path):
            problem = f"{path}: a pickle or another format that can run code; expected safetensors"
        if problem is None and CODE.search(path):
            problem = f"{path}: code; expected data only"
        if problem is None and kind_of(path) is not None:
            twin = lower.setdefault(path.lower(), path)
            problem = _check_size(path, size) if twin == path else f"{path}: differs from {twin} by case only"
        if problem:
            problems.append(problem)
    problems += [f"{name}: missing; expected an adapter that peftrec pushed" for name in _missing(sizes)]
    return problems


def _missing(paths: Mapping[str, Any]) -> list[str]:
    return [
        *([artifact.FILE] if artifact.FILE not in paths else []),
        *([WEIGHTS[0]] if not any(name in paths for name in WEIGHTS) else []),
    ]


def _check_size(path: str, size: int) -> str | None:
    kind = kind_of(path)
    most = MOST_BYTES.get(path, MOST_BYTES.get(str(kind)))
    if most is None or 0 <= size <= most:
        return None
    return f"{path}: {size:,} bytes; expected at most {most:,}"


def check_file(path: str, file: Path, allow: Sequence[str] | None = ()) -> list[str]:
    """What is wrong inside a file that `kind_of` knows: one line for each problem.

    Args:
        path: its path inside the folder.
        file: where it is.
        allow: as in `check_folder`; None does not look for what its author would rather keep.
    """
    kind = kind_of(path)
    if too_large := _check_size(path, file.stat().st_size):
        return [too_large]
    if kind == "weights":
        return _check_weights(path, file)
    if kind == "picture":
        with file.open("rb") as opened:
            found = opened.read(8)
        return [] if found == b"\x89PNG\r\n\x1a\n" else [f"{path}: not a PNG picture; remove it, or draw it again"]
    content = file.read_bytes()
    if path.endswith((".model", ".spm")):  # SentencePiece's own binary format, data only
        return _check_pickle(path, content)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        return [f"{path}: byte {error.start} is not UTF-8; expected text; write it again"]
    if path.endswith(".json"):
        return _check_json(path, text, allow)
    problems = _check_front_matter(path, text) if path == CARD else []
    return problems + _check_leaks(path, [text], allow)


def _check_pickle(path: str, content: bytes) -> list[str]:
    if content[:1] == b"\x80" or content[:2] == b"PK":
        return [f"{path}: a pickle or an archive under another name; expected a SentencePiece model; remove it"]
    return []


def _check_weights(path: str, file: Path) -> list[str]:
    """The header of a safetensors file: tensors side by side to the end of the file, and no room for anything else."""
    problem = f"{path}: not a whole safetensors file (%s); save the adapter again"
    left = file.stat().st_size - 8
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if not 0 < size <= min(left, MOST_HEADER_BYTES):
            return [problem % f"a header of {size:,} bytes"]
        try:
            header = json.loads(opened.read(size))
            header.pop("__metadata__", None)
            spans = sorted(tuple(one["data_offsets"]) for one in header.values())
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            return [problem % "its header is not one"]
    end = 0
    for span in spans:
        if len(span) != 2 or not all(isinstance(place, int) for place in span) or span[0] != end or span[1] < end:
            return [problem % "its tensors do not lie side by side"]
        end = span[1]
    return [] if end == left - size else [problem % f"{left - size:,} bytes of tensors, {end:,} announced"]


def _check_json(path: str, text: str, allow: Sequence[str] | None) -> list[str]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return [f"{path}: not JSON ({error}); save it again"]
    if not isinstance(value, dict):
        return [f"{path}: {show(value)}; expected a JSON object"]
    problems = [
        f"{path}: {key}: {show(value[key])} names code to run; expected data only; remove it"
        for key in RUNS
        if value.get(key)
    ]
    if path == CONFIG:
        problems += _check_config(path, value)
    return problems + _check_leaks(path, [text] if path in VOCABULARIES else list(_strings(value)), allow)


def _check_config(path: str, value: Mapping[str, Any]) -> list[str]:
    problems = []
    base = value.get("base_model_name_or_path")
    if base and not (isinstance(base, str) and HUB_ID.fullmatch(base)):
        problems.append(f"{path}: base_model_name_or_path: {show(base)}; expected a Hub id, not a path")
    mapping = value.get("auto_mapping") or {}
    library = mapping.get("parent_library") if isinstance(mapping, dict) else mapping
    if library and not (isinstance(library, str) and re.match(r"(transformers|peftrec)(\.|$)", library)):
        problems.append(f"{path}: auto_mapping: {show(library)} would be imported; expected a part of transformers")
    return problems


def _strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, list):
            waiting += one


def _check_leaks(path: str, texts: Sequence[str], allow: Sequence[str] | None) -> list[str]:
    """Secrets are shown by their first letters only: problems end up in logs."""
    if allow is None:
        return []
    own = os.environ.get("HF_TOKEN") or ""
    found: dict[str, None] = {}
    for text in texts:
        for match in SECRET.finditer(text):
            found[f"{path}: what looks like an access token ({match[0][:6]}…); remove it, and revoke the token"] = None
        if len(own) >= 8 and own in text:
            found[f"{path}: the access token in HF_TOKEN; remove it, and revoke the token"] = None
        if path in VOCABULARIES:  # a vocabulary has pieces of everything, and comes from the base model
            continue
        for what, pattern in LEAKS.items():
            for match in pattern.finditer(text):
                if not any(match[0].startswith(allowed) for allowed in allow):
                    found[f"{path}: {what}, {show(match[0])}; remove it, or allow it"] = None
        for place in {str(Path.home()), str(Path.cwd())}:
            if len(place) > 5 and re.search(re.escape(place) + r"(?!\w)", text):
                found[f"{path}: a path of this machine, {place}; remove it"] = None
    return list(found)


def _check_front_matter(path: str, text: str) -> list[str]:
    """The card's metadata is plain YAML: no tags, and no aliases that grow."""
    front = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    if front is None:
        return []
    try:
        node = yaml.compose(front[1], yaml.SafeLoader)
        tags = {one.tag for one in _nodes(node)}
    except (yaml.YAMLError, RecursionError) as error:
        reason = getattr(error, "problem", None) or str(error)
        return [f"{path}: metadata: {' '.join(reason.split())}; expected plain YAML between two lines of ---"]
    odd = sorted(tag for tag in tags if not tag.startswith("tag:yaml.org,2002:") or "python" in tag)
    if odd:
        return [f"{path}: metadata: the tag {odd[0]}; expected plain YAML without tags"]
    if not isinstance(node, yaml.MappingNode):
        return [f"{path}: metadata: not keys and values; expected plain YAML between two lines of ---"]
    return []


def _nodes(node: yaml.Node | None) -> Iterator[yaml.Node]:
    """Every node of a document, one that is referred to again each time anew."""
    waiting, seen = [node], 0
    while waiting:
        one = waiting.pop()
        if one is None:
            continue
        seen += 1
        if seen > MOST_YAML_NODES:
            raise yaml.YAMLError(f"more than {MOST_YAML_NODES:,} values")
        yield one
        if isinstance(one, yaml.MappingNode):
            waiting += [part for pair in one.value for part in pair]
        elif isinstance(one, yaml.SequenceNode):
            waiting += one.value
