"""A folder that a Hugging Face Space runs: an app in which anybody asks an adapter, in the browser.

    write("runs/films", "films-space", repo_id="me/films")

The app is `space_app.py`, copied word for word. peftrec is on no package index, and a Space installs requirements
before it has the folder's other files, so the package comes along as an archive that the app imports from; or its
address is named (`package`), and pip fetches it.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import polars as pl
from huggingface_hub import ModelCard, SpaceCardData
from packaging.requirements import Requirement
from packaging.version import Version

from peftrec import artifact, config, values
from peftrec.card_facts import CARD, Facts, hub_base, hub_data, is_hub_id, named_data, read_facts
from peftrec.card_text import inline
from peftrec.catalogue import Catalogue, read_items
from peftrec.contents import check_folder, list_files
from peftrec.errors import ConfigError, HubError, ModelError
from peftrec.schema import dump_yaml

APP, SETTINGS, ITEMS = "app.py", "space.json", "items.parquet"
REQUIREMENTS: Final = "requirements.txt"
ADAPTER = "adapter"
OURS: Final = (APP, SETTINGS, ITEMS, REQUIREMENTS, CARD, ADAPTER)


@dataclass(frozen=True)
class Written:
    """A Space's folder, and where its app finds what is not in it.

    Attributes:
        folder: that holds it.
        adapter: where the adapter comes from, in words.
        titles: where the titles to pick from come from, in words.
    """

    folder: Path
    adapter: str
    titles: str


def write(
    run: str | Path,
    output: str | Path | None = None,
    *,
    repo_id: str | None = None,
    revision: str | None = None,
    title: str | None = None,
    items: Any = None,
    columns: Mapping[str, str] | None = None,
    base_model: str | None = None,
    package: str | None = None,
    overwrite: bool = False,
) -> Written:
    """Write the folder of a Space.

    Args:
        run: output_dir of a finished run.
        output: where; None is RUN/space.
        repo_id: the adapter on the Hub, which the app pulls when it starts; None puts its files into the folder.
        revision: of `repo_id`, branch, tag or commit; None is main, as it is at each start.
        title: of the page.
        items: items table to put into the folder, as in `Recommender.from_pretrained`; only the columns that the app
            needs. None puts none there: that of a named data set is loaded by name when the app starts.
        columns: our name -> name in that table.
        base_model: its Hub id, where the run's recipe named a local folder.
        package: where pip finds peftrec, such as `git+https://…`; None puts the package into the folder.
        overwrite: write over an earlier folder; files that are not ours stay.

    Raises:
        PeftrecError: no finished run, something in it that may not be published, gradio is not installed, or the folder
            is not empty. Nothing is written then.
    """
    facts = read_facts(run)
    adapter = Path(run) / ADAPTER
    target = Path(run) / "space" if output is None else Path(output)
    if revision and not repo_id:
        raise ConfigError("revision: no repo_id; expected the adapter on the Hub of which this is a revision; add it")
    if repo_id and not is_hub_id(repo_id):
        raise ConfigError(f"repo_id: {repo_id!r}; expected namespace/name; correct it")
    _check_target(target, Path(run), overwrite)
    if base_model and not is_hub_id(base_model):
        raise ConfigError(f"base_model: {base_model!r}; expected a Hub id, which others can load; name it by that")
    base = _base(facts, base_model)
    titles = _titles(facts, items is not None)
    with tempfile.TemporaryDirectory(prefix="peftrec-") as scratch:
        new = Path(scratch)
        if repo_id is None:
            _copy_adapter(adapter, new / ADAPTER)
        if items is not None:
            _needed_items(items, columns, facts.artifact).write_parquet(new / ITEMS)
        if package is None:
            _archive(new / f"peftrec-{metadata.version('peftrec')}.zip")
        name = title or (repo_id or facts.name).rpartition("/")[2]
        settings = {"title": name, "repo_id": repo_id, "revision": revision, "base_model": base_model}
        (new / SETTINGS).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (new / APP).write_bytes((files("peftrec") / "space_app.py").read_bytes())
        lines = [*requirements(facts.record.versions), *([f"peftrec @ {package}"] if package else [])]
        (new / REQUIREMENTS).write_text("\n".join(lines) + "\n", encoding="utf-8")
        models = [one for one in (repo_id, base) if one]
        (new / CARD).write_text(_page(facts, adapter, name, models, titles), encoding="utf-8")
        _put(new, target)
    return Written(
        target, f"{repo_id}, pulled when the app starts" if repo_id else "its files are in the folder", titles
    )


def _titles(facts: Facts, has_items: bool) -> str:
    data, template = named_data(facts), facts.artifact.prompt.template
    if template is not None and "item" not in values.placeholders(template):
        return "none: the adapter answers ready-made prompts"
    if has_items:
        return f"{ITEMS} in the folder"
    if data is not None and data.fetched:
        return f"those of {data.name}, which the app loads by name ({data.license})"
    return "none: candidates must be typed (an items table would bring titles)"


def _base(facts: Facts, base_model: str | None) -> str:
    base = base_model or hub_base(facts, config.Author())
    if base is None:
        raise ModelError(
            f"{facts.name}: the base model was a local folder ({facts.artifact.base_model.name}); expected one that "
            "others can load; name it by its Hub id (base_model, --base-model)"
        )
    return base


def _copy_adapter(adapter: Path, target: Path) -> None:
    if problems := check_folder(adapter):
        raise HubError(*problems)
    for path, file in list_files(adapter)[0].items():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / path)


def _needed_items(items: Any, columns: Mapping[str, str] | None, about: artifact.Artifact) -> pl.DataFrame:
    """Ids, titles and what the prompt shows; no more of a person's table is published than the app needs."""
    found = read_items(items, columns)
    Catalogue(found, about.prompt.item)  # which says if a column of the prompt is missing
    needed = {"item_id", "title", "year", *values.placeholders(about.prompt.item)}
    return found.select(name for name in found.columns if name in needed)


def _archive(path: Path) -> None:
    """The installed package as an archive to import from, with its version and licence."""
    about = metadata.distribution("peftrec")
    folder = f"peftrec-{about.version}.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(_sources(files("peftrec"), "peftrec")):
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
        for name in ("METADATA", "licenses/LICENSE"):
            if (text := about.read_text(name)) is not None:
                archive.writestr(zipfile.ZipInfo(f"{folder}/{name}"), text, zipfile.ZIP_DEFLATED)


def _sources(folder: Any, path: str) -> Iterator[tuple[str, bytes]]:
    for one in folder.iterdir():
        inner = f"{path}/{one.name}"
        if one.is_dir() and one.name != "__pycache__":
            yield from _sources(one, inner)
        elif one.is_file():
            yield inner, one.read_bytes()


def requirements(run: Mapping[str, str | None]) -> list[str]:
    """What the app needs, each at the run's version where this version of peftrec takes that, else within our bounds.

    Args:
        run: name of a package -> its version, as run.json has them.
    """
    gradio = gradio_version()
    lines = [f"gradio=={gradio}"]
    for text in metadata.requires("peftrec") or []:
        wanted = Requirement(text)
        if wanted.marker is not None and "extra" in str(wanted.marker):
            continue
        version = run.get(wanted.name)
        public = Version(version).public if version else None  # no index has builds such as 2.13.0+cpu by that name
        if public is not None and wanted.specifier.contains(public, prereleases=True):
            lines.append(f"{wanted.name}=={public}")
        else:
            lines.append(str(wanted))
    return sorted(lines)


def gradio_version() -> str:
    """The version that is installed, with which the folder can be tried before anybody else does.

    Raises:
        ConfigError: none is.
    """
    try:
        return metadata.version("gradio")
    except metadata.PackageNotFoundError:
        raise ConfigError("gradio: not installed; a Space needs it; pip install 'peftrec[space]'") from None


def _page(facts: Facts, adapter: Path, title: str, models: list[str], titles: str) -> str:
    """The Space's README.md: what the Hub reads, and where the parts come from."""
    python = facts.record.versions.get("python") or ""
    found = re.match(r"\d+\.\d+", python)
    dataset = hub_data(facts)
    head = SpaceCardData(
        title=title,
        emoji="⭐",
        sdk="gradio",
        sdk_version=gradio_version(),
        python_version=found[0] if found else None,
        app_file=APP,
        license=_license(adapter),
        models=models,
        datasets=[dataset] if dataset and "/" in dataset else None,
        tags=["peftrec", "recommendation"],
    ).to_dict()  # type: ignore[no-untyped-call]
    what = "predicted ratings" if facts.artifact.task == "rating" else "the chance that each is liked"
    return (
        f"---\n{dump_yaml(head).strip()}\n---\n\n# {inline(title)}\n\n"
        f"Type what somebody met, and get {what}, best first. Titles to pick from: {inline(titles)}.\n\n"
        "`python app.py` runs the same page anywhere, after `pip install -r requirements.txt`.\n"
    )


def _license(adapter: Path) -> str | None:
    """The adapter's, where its card has one."""
    card = adapter / CARD
    if not card.is_file():
        return None
    try:
        found = ModelCard(card.read_text(encoding="utf-8")).data.get("license")
    except (ValueError, TypeError, KeyError, AttributeError):  # hub.check_card says what is wrong with it
        return None
    return found if isinstance(found, str) else None


def _check_target(target: Path, run: Path, overwrite: bool) -> None:
    """Refuse to write where files of the same names may be somebody's own, such as the run's adapter.

    Raises:
        ConfigError: says why.
    """
    place = target.resolve()
    if any(kept.resolve().is_relative_to(place) for kept in (run, run / ADAPTER)):
        raise ConfigError(f"{target}: holds the run itself; choose another folder")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / SETTINGS).is_file():
        raise ConfigError(f"{target}: not an empty folder, and none that was written here before; choose another")
    if not overwrite:
        raise ConfigError(f"{target}: not an empty folder; choose another, or overwrite what is ours in it (overwrite)")


def _put(new: Path, target: Path) -> None:
    """Move what is in `new` to `target`, and what an earlier call left there away; anything else there stays."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        for old in target.iterdir():
            if old.name in OURS or re.fullmatch(r"peftrec-[\w.+]+\.zip", old.name):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        for path in new.iterdir():
            shutil.move(path, target / path.name)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror or error}); choose another folder") from error
