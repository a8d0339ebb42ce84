"""The files that an adapter is made of: which there are, how large they may be, and what must not be inside.

All of it is data, and is read as such: weights as numbers, JSON and YAML as plain values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import yaml

from peftrec import artifact, side_vectors
from peftrec.leaks import Watch, in_texts, in_values
from peftrec.patterns import count_ways
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
    side_vectors.FILE,
    "special_tokens_map.json",
    "tokenizer_config.json",
)
"""What an adapter's folder is made of, besides its figures: a push that has one of them no more takes it away."""

MEGABYTE = 1_000_000
MOST_BYTES: Final[Mapping[str, int]] = {
    **artifact.MOST_BYTES,
    **dict.fromkeys(VOCABULARIES, 100 * MEGABYTE),
    "json": 10 * MEGABYTE,
    "text": 2 * MEGABYTE,
    "picture": 20 * MEGABYTE,
    "tokenizer": 100 * MEGABYTE,
}
MOST_HEADER_BYTES = 10 * MEGABYTE
MOST_YAML_NODES = 100_000
MOST_DIMENSION = 8192
"""Of an adapter's own matrices: they are made before anybody can see whether the weights fit them."""
MOST_WAYS = 10_000
"""In which all patterns of module names in a configuration may be tried on one name: some milliseconds at most."""

RUNS: Final = ("auto_map", "custom_pipelines", "megatron_config", "trust_remote_code")
"""Keys of JSON files by which transformers or PEFT are told to import something."""
PROSE: Final = ("prompt_tuning_init_text",)
"""Keys of an adapter's configuration with words for the model; any other text may be taken for a pattern."""
SIZES: Final = ("r", "init_r", "target_r", "num_virtual_tokens", "encoder_hidden_size", "rank_pattern")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
FLOATS: Final = {
    "F64": ("<u8", 0x7FF0 << 48),
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
"""Type in a safetensors header -> its bits as whole numbers, and those that are all set in what is not finite."""
WIDTHS: Final = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def kind_of(path: str) -> Kind | None:
    """What a file is by its path inside the folder; None is nothing that an adapter has."""
    folder, _, name = path.rpartition("/")
    if name.endswith(".png") and folder in ("", FIGURES):
        return "picture"
    if folder:
        return None
    if name in (*WEIGHTS, side_vectors.FILE):
        return "weights"
    if name in TOKENIZER:
        return "tokenizer"
    return "json" if name.endswith(".json") else "text" if name.endswith(".md") else None


def is_ours(path: str) -> bool:
    """Whether an earlier push of an adapter may have left this file."""
    return path in OURS or (path.startswith(f"{FIGURES}/") and kind_of(path) == "picture")


def check_size(path: str, size: int) -> str | None:
    """Why a file of `size` bytes is too large to be read, or None."""
    most = MOST_BYTES.get(path, MOST_BYTES.get(str(kind_of(path))))
    if most is None or 0 <= size <= most:
        return None
    return f"{path}: {size:,} bytes; expected at most {most:,}"


def check_file(path: str, file: Path, watch: Watch | None) -> list[str]:
    """What is wrong inside a file that `kind_of` knows: one line for each problem.

    Args:
        path: its path inside the folder.
        file: where it is.
        watch: what its author would rather keep; None does not look for that.
    """
    kind = kind_of(path)
    if too_large := check_size(path, file.stat().st_size):
        return [too_large]
    if kind == "weights":
        problems = _check_weights(path, file)
        ids = side_vectors.ids_in(file) if path == side_vectors.FILE and not problems else []
        return problems + _check_leaks(path, ids, watch)
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
        return _check_json(path, text, watch)
    problems = front_matter(path, text)[1] if path == CARD else []
    return problems + _check_leaks(path, [text], watch)


def _check_pickle(path: str, content: bytes) -> list[str]:
    if content[:1] == b"\x80" or content[:2] == b"PK":
        return [f"{path}: a pickle or an archive under another name; expected a SentencePiece model; remove it"]
    return []


def _check_leaks(path: str, texts: list[str], watch: Watch | None) -> list[str]:
    return [] if watch is None else in_texts(path, texts, watch, vocabulary=path in VOCABULARIES)


# --- weights ----------------------------------------------------------------------------------------------------------


def _check_weights(path: str, file: Path) -> list[str]:
    """A safetensors file holds tensors side by side to its end, room for nothing else, and finite numbers."""
    problem = f"{path}: not a whole safetensors file (%s); save the adapter again"
    left = file.stat().st_size - 8
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if not 0 < size <= min(left, MOST_HEADER_BYTES):
            return [problem % f"a header of {size:,} bytes"]
        try:
            header = json.loads(opened.read(size), object_pairs_hook=_once)
            header.pop("__metadata__", None)
            tensors = sorted((*one["data_offsets"], one["dtype"], *map(int, one["shape"])) for one in header.values())
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            return [problem % "its header is not one"]
    end = 0
    for first, last, kind, *shape in tensors:
        if not (isinstance(first, int) and isinstance(last, int)) or first != end or last < first:
            return [problem % "its tensors do not lie side by side"]
        if kind not in WIDTHS or any(n < 0 for n in shape) or last - first != WIDTHS[kind] * prod(shape):
            return [problem % f"{last - first:,} bytes for {kind} of shape {shape}"]
        end = last
    if end != left - size:
        return [problem % f"{left - size:,} bytes of tensors, {end:,} announced"]
    for first, last, kind, *_ in tensors:
        if kind in FLOATS and last > first and not _finite(file, 8 + size + first, last - first, *FLOATS[kind]):
            return [f"{path}: a weight that is no finite number; expected a trained adapter; train it again"]
    return []


def _finite(file: Path, offset: int, size: int, kind: str, mask: int) -> bool:
    values = np.memmap(file, kind, "r", offset, (size // np.dtype(kind).itemsize,))
    pieces = (values[start : start + MEGABYTE] for start in range(0, len(values), MEGABYTE))
    return all(((piece & values.dtype.type(mask)) != mask).all() for piece in pieces)


# --- JSON -------------------------------------------------------------------------------------------------------------


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without repeated keys, of which every reader takes another one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key that is there twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _check_json(path: str, text: str, watch: Watch | None) -> list[str]:
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return [f"{path}: not JSON ({error}); save it again"]
    if not isinstance(value, dict):
        return [f"{path}: {show(value)}; expected a JSON object"]
    if path in VOCABULARIES:
        return _check_leaks(path, [text], watch)
    problems = [
        f"{path}: {key}: {show(inner)} names code to run; expected data only; remove it"
        for key, inner in _pairs(value)
        if key in RUNS and inner
    ]
    if path == CONFIG:
        problems += _check_config(path, value)
    told = [] if watch is None else in_values(path, value, watch)
    return problems + told + _check_leaks(path, list(_strings(value)), watch)


def _check_config(path: str, value: Mapping[str, Any]) -> list[str]:
    problems = []
    base = value.get("base_model_name_or_path")
    if base and not (isinstance(base, str) and HUB_ID.fullmatch(base)):
        problems.append(f"{path}: base_model_name_or_path: {show(base)}; expected a Hub id, not a path")
    mapping = value.get("auto_mapping") or {}
    library = mapping.get("parent_library") if isinstance(mapping, dict) else mapping
    if library and not (isinstance(library, str) and re.match(r"(transformers|peftrec)(\.|$)", library)):
        problems.append(f"{path}: auto_mapping: {show(library)} would be imported; expected a part of transformers")
    for key in SIZES:
        inner = value.get(key)
        sizes = inner.values() if isinstance(inner, dict) else [inner]
        if any(isinstance(size, (int, float)) and size > MOST_DIMENSION for size in sizes):
            problems.append(f"{path}: {key}: {show(inner)}; expected at most {MOST_DIMENSION:,}; use another adapter")
    others = {key: inner for key, inner in value.items() if key not in PROSE}
    ways = [(count_ways(text), text) for text in _strings(others)]
    if sum(number for number, _ in ways) > MOST_WAYS:
        problems.append(
            f"{path}: {show(max(ways)[1])}: a pattern that may take for ever; expected names of modules, or few "
            "of .* \\d+ (a|b) ? and nothing repeated behind a bracket; write it plainer"
        )
    return problems


def _walk(value: Any) -> Iterator[Any]:
    """A JSON value and everything in it."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        yield one
        waiting += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    return (pair for one in _walk(value) if isinstance(one, dict) for pair in one.items())


def _strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    for one in _walk(value):
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            yield from one


# --- YAML -------------------------------------------------------------------------------------------------------------


def front_matter(path: str, text: str) -> tuple[dict[str, Any], list[str]]:
    """A card's metadata, and what is wrong with it: it is plain YAML, without tags and without aliases that grow.

    Args:
        path: of the card, for the lines.
        text: the whole card.
    """
    front = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    if front is None:
        return {}, []
    try:
        node = yaml.compose(front[1], yaml.SafeLoader)
        tags = {one.tag for one in _nodes(node)}
        odd = sorted(tag for tag in tags if not tag.startswith("tag:yaml.org,2002:") or "python" in tag)
        if odd:
            return {}, [f"{path}: metadata: the tag {odd[0]}; expected plain YAML without tags"]
        if not isinstance(node, yaml.MappingNode):
            return {}, [f"{path}: metadata: not keys and values; expected plain YAML between two lines of ---"]
        return dict(yaml.safe_load(front[1])), []
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        reason = getattr(error, "problem", None) or str(error)
        return {}, [f"{path}: metadata: {' '.join(reason.split())}; expected plain YAML between two lines of ---"]


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
