"""What an adapter is, before anybody loads it, and which ones somebody has: from a few small files."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile

from peftrec import artifact, record, values
from peftrec.artifact import Artifact
from peftrec.contents import check_files, check_folder, list_files
from peftrec.errors import HubError
from peftrec.file_checks import CARD, CONFIG, FIGURES, WEIGHTS, front_matter, is_ours
from peftrec.folders import sha256
from peftrec.hub_checks import read_check
from peftrec.hub_client import (
    MAIN,
    again,
    connect,
    in_one_line,
    list_tree,
    one_line,
    refuse_offline,
    refuse_unnamed,
)
from peftrec.hub_pull import check_listing
from peftrec.hub_push import adapter_folder
from peftrec.values import FILE_TARGET


@dataclass(frozen=True)
class Info:
    """What an adapter says of itself.

    Attributes:
        where: its repository or folder.
        about: its peftrec.json.
        method: PEFT's name of the method in small letters, or `full`.
        metrics: test metric -> value, slices left out.
        license: of the adapter, as its card has it.
        files: path -> bytes.
        commit: that was looked at; None for a folder.
        private: whether only some may see it; None for a folder.
        reload_check: largest difference that its author's fresh process found when it was pushed, as a commit says of
            the very files that are there now; None where none does, and for a folder.
    """

    where: str
    about: Artifact
    method: str
    metrics: Mapping[str, float]
    license: str | None
    files: Mapping[str, int]
    commit: str | None = None
    private: bool | None = None
    reload_check: float | None = None

    def facts(self) -> dict[str, Any]:
        """Everything as JSON's own types."""
        about = {name: value for name, value in asdict(self.about).items() if not name.endswith("probes")}
        return {**asdict(self), "about": about, "probes": len(self.about.recorded), "needs": self.needs()}

    def needs(self) -> dict[str, Any]:
        """What it wants of whoever asks: columns of the items table, of a person or of a prompt, and its answers."""
        prompt = self.about.prompt
        own = prompt.template is not None and "item" not in values.placeholders(prompt.template)
        found: dict[str, Any] = {
            "answers": [answer.strip() for answer in prompt.answers],
            "max_tokens": prompt.max_tokens,
        }
        if own:
            return found | {"prompt": values.placeholders(prompt.template or "")}
        found["items"] = list(dict.fromkeys(values.placeholders(prompt.item)))
        if prompt.user is not None:
            found["user"] = list(dict.fromkeys(values.placeholders(prompt.user)))
        if self.about.prior is not None:
            found["items"].insert(0, "item_id")
        return found

    def lines(self) -> Iterator[str]:
        """The same for people to read."""
        about, base = self.about, self.about.base_model
        seen = "" if self.private is None else ", private" if self.private else ", public"
        yield f"{self.where}{f' at {self.commit[:12]}' if self.commit else ''}{seen}"
        yield from (f"  {name:<9} {one_line(text)}" for name, text in self._rows(about, base))
        yield "  files"
        width = max(map(len, self.files))
        yield from (f"    {path:<{width}} {size:>13,} bytes" for path, size in sorted(self.files.items()))

    def _rows(self, about: Artifact, base: artifact.Base) -> Iterator[tuple[str, str]]:
        needs, scale = self.needs(), about.target.scale
        what = {"click": "whether an item is liked", "rating": f"ratings from {scale[0]:g} to {scale[-1]:g}"}
        yield "task", f"{about.task}: {what[about.task]} ({'/'.join(needs['answers'])}; head: {about.target.head})"
        known = f"revision {base.revision}" if base.revision else f"weights {base.fingerprint[:12]}"
        note = f"; {base.note}" if base.note else ""
        yield "base", f"{base.hub_id}, {base.parameters / 1e6:.0f} M parameters, {base.dtype}, {known}{note}"
        size = next(self.files[name] for name in WEIGHTS if name in self.files)
        yield "adapter", f"{self.method}, {size / 1e6:.1f} MB, seed {about.seed}, peftrec {about.peftrec_version}"
        asked = (
            f"prompts of your own with {', '.join(needs['prompt'])}"
            if "prompt" in needs
            else f"a history of items with answers; of items: {', '.join(needs['items'])}"
        )
        person = f"; of the person: {', '.join(needs['user'])}" if "user" in needs else ""
        yield "wants", f"{asked}{person}; up to {needs['max_tokens']:,} tokens ({about.prompt.layout})"
        yield "prior", "none" if about.prior is None else "what counting knows of the items is added (prior.json)"
        yield "data", f"{about.data.name}, sha256 {about.data.sha256[:12]}"
        yield "checked", self._checked(len(about.recorded))
        yield "metrics", ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items()) or "none in its card"
        yield "license", self.license or "none in its card"

    def _checked(self, probes: int) -> str:
        if not probes:
            return "never: it has no probes to check it by"
        if self.reload_check is None:
            return f"{probes} probes to check it by; nothing is known of a check"
        return f"when it was pushed: {probes} probes in a fresh process, at most {self.reload_check:.1e} off"


@dataclass(frozen=True)
class Listed:
    """One adapter of an author.

    Attributes:
        repo_id: on the Hub.
        private: whether only some may see it.
        updated: when it changed last, ISO 8601; None where the Hub does not say.
        downloads: in the last 30 days.
        tags: of its card.
    """

    repo_id: str
    private: bool
    updated: str | None
    downloads: int
    tags: tuple[str, ...]


def info(
    where: str | Path,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> Info:
    """What an adapter is, without its weights: a few small files are read, as carefully as `pull` reads them.

    Args:
        where: a run's or an adapter's folder, `file:FOLDER`, or a repository.
        revision: branch, tag or commit of a repository; None is main.
        token: as in huggingface_hub; None is `HF_TOKEN` or who is logged in.
        endpoint: address of the Hub; None is `HF_ENDPOINT`.

    Raises:
        HubError: there is no such thing, or it is not safe to read.
    """
    text = str(where)
    local = Path(text.removeprefix(FILE_TARGET)).expanduser()
    if text.startswith(FILE_TARGET) or local.is_dir() or isinstance(where, Path):
        if revision is not None:
            raise HubError(f"{text}: a folder has no revisions; leave it out")
        return _of_folder(text, adapter_folder(local))
    refuse_unnamed(text, "a folder, or namespace/name")
    refuse_offline("info", "unset it, or give a folder")
    api = connect(token, endpoint)
    with in_one_line(text), tempfile.TemporaryDirectory(prefix="peftrec-") as scratch:
        found = again(text, lambda: api.model_info(text, revision=revision or MAIN))
        commit = str(found.sha)
        there = again(text, lambda: list_tree(api, text, commit))
        check_listing(text, there)
        files = {}
        for path in (artifact.FILE, CONFIG, CARD):
            if path in there:
                files[path] = again(text, lambda path=path: _fetched(api, text, path, commit, scratch))  # type: ignore[misc]
        if problems := check_files(Path(scratch), files, None, whole=False):
            raise HubError(*(f"{text}: {problem}" for problem in problems))
        off = again(text, lambda: _told_check(api, text, commit, there, Path(scratch)))
        metrics, license_ = _of_card(Path(scratch))
        return Info(
            text,
            artifact.read(scratch),
            _method(Path(scratch)),
            metrics,
            license_,
            {path: one.size for path, one in there.items()},
            commit,
            bool(found.private),
            off,
        )


def list_adapters(author: str, *, token: str | bool | None = None, endpoint: str | None = None) -> list[Listed]:
    """The adapters that an author has pushed with peftrec, private ones where the token may see them.

    Args:
        author: a user or an organisation.
        token: as in huggingface_hub; None is `HF_TOKEN` or who is logged in.
        endpoint: address of the Hub; None is `HF_ENDPOINT`.

    Raises:
        HubError: no connection, or it may not be asked.
    """
    refuse_offline("list", "unset it")
    api = connect(token, endpoint)
    with in_one_line(author):
        models = again(author, lambda: list(api.list_models(author=author, full=True)))
    return [
        Listed(
            one.id,
            bool(one.private),
            one.last_modified.isoformat(timespec="seconds") if one.last_modified else None,
            one.downloads or 0,
            tuple(one.tags or ()),
        )
        for one in models
        if any(file.rfilename == artifact.FILE for file in one.siblings or ())
    ]


def _of_folder(where: str, folder: Path) -> Info:
    if problems := check_folder(folder, allow=None):
        raise HubError(*problems)
    metrics, license_ = _of_card(folder)
    run = folder.absolute().parent
    if not metrics and (run / record.RUN).is_file():
        measured = record.read_record(run).metrics
        metrics = {
            name.removeprefix("test/"): value
            for name, value in measured.items()
            if name.startswith("test/") and "|" not in name and value is not None
        }
    files = {path: file.stat().st_size for path, file in list_files(folder)[0].items()}
    return Info(where, artifact.read(folder), _method(folder), metrics, license_, files)


def _fetched(api: HfApi, repo_id: str, path: str, commit: str, folder: str) -> Path:
    return Path(api.hf_hub_download(repo_id, path, revision=commit, local_dir=folder))


def _method(folder: Path) -> str:
    path = folder / CONFIG
    return str(json.loads(path.read_text(encoding="utf-8")).get("peft_type")).lower() if path.is_file() else "full"


def _of_card(folder: Path) -> tuple[dict[str, float], str | None]:
    """Metrics and licence that a card's metadata tell, which may be anybody's."""
    path = folder / CARD
    told = front_matter(CARD, path.read_text(encoding="utf-8"))[0] if path.is_file() else {}
    metrics: dict[str, float] = {}
    for model in _mappings(told.get("model-index")):
        for result in _mappings(model.get("results")):
            for one in _mappings(result.get("metrics")):
                name, value = str(one.get("type")), one.get("value")
                if not isinstance(value, (int, float)) or not math.isfinite(value):
                    continue
                if "(" not in str(one.get("name")):  # a slice is named in brackets
                    metrics.setdefault(name, float(value))
    license_ = told.get("license")
    return metrics, None if license_ is None else str(license_)


def _mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    return (one for one in value if isinstance(one, dict)) if isinstance(value, list) else iter(())


def _told_check(api: HfApi, repo_id: str, commit: str, there: Mapping[str, RepoFile], folder: Path) -> float | None:
    """What the newest commit says that tells of a check of these files; `folder` has peftrec.json."""
    hashes = {artifact.FILE: sha256(folder / artifact.FILE)}
    for path in WEIGHTS:
        if path in there:
            lfs = there[path].lfs
            hashes[path] = lfs.sha256 if lfs else ""
    for one in api.list_repo_commits(repo_id, revision=commit):
        off = read_check(one.message, hashes)
        # The scores hang on the tokenizer and the configuration too.
        if off is not None and _scoring(list_tree(api, repo_id, one.commit_id)) == _scoring(there):
            return off
    return None


def _scoring(there: Mapping[str, RepoFile]) -> dict[str, str]:
    """Path -> git's hash of the files that may change a score."""
    others = (CARD, f"{FIGURES}/")
    return {path: one.blob_id for path, one in there.items() if is_ours(path) and not path.startswith(others)}
