"""Taking an adapter from others without trusting it: names and sizes first, then every file, then whoever asked."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from huggingface_hub import CacheNotFound, HfApi, constants, get_cached_repo_tree, scan_cache_dir, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError
from huggingface_hub.hf_api import RepoFile

from peftrec import folders
from peftrec.contents import check_files, check_folder, check_remote
from peftrec.errors import HubError
from peftrec.file_checks import kind_of
from peftrec.hub_client import MAIN, Content, again, connect, in_one_line, list_tree, refuse_unnamed
from peftrec.values import FILE_TARGET


def pull(
    repo_id: str,
    revision: str | None = None,
    *,
    local_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> Path:
    """Fetch an adapter that peftrec pushed, and look at every file before anybody reads it.

    Nothing but an adapter's files is downloaded, no code is run, and nothing of a repository that is refused stays
    behind. Under `HF_HUB_OFFLINE` it is what was pulled before.

    Args:
        repo_id: `namespace/name`, or `file:FOLDER`.
        revision: branch, tag or commit; None is main.
        local_dir: copy the files there too; a folder with an adapter, which is replaced, an empty one, or none.
        cache_dir: as in huggingface_hub; None is `HF_HUB_CACHE`.
        token: as in huggingface_hub; None is `HF_TOKEN` or who is logged in.
        endpoint: address of the Hub; None is `HF_ENDPOINT`.

    Returns:
        The adapter's folder, which is not to be written to unless it is `local_dir`.

    Raises:
        HubError: no such repository or revision, no connection, or files that are not an adapter's or not safe to read.
    """
    if repo_id.startswith(FILE_TARGET):
        if revision is not None:
            raise HubError(f"{repo_id}: a folder has no revisions; leave it out")
        folder = Path(repo_id.removeprefix(FILE_TARGET)).expanduser().absolute()
        if problems := check_folder(folder, allow=None):
            raise HubError(*(f"{repo_id}: {problem}" for problem in problems))
        return _copied(folder, local_dir, list(folders.adapter_in(folder)))
    refuse_unnamed(repo_id, f"namespace/name or {FILE_TARGET}FOLDER")
    wanted = revision or MAIN
    with in_one_line(repo_id):
        if constants.is_offline_mode():
            folder, there = _cached(repo_id, wanted, cache_dir)
            check_listing(repo_id, there)
            _check_pulled(repo_id, folder, there)
        else:
            folder, there = _fetched(connect(token, endpoint), repo_id, wanted, cache_dir)
            try:
                _check_pulled(repo_id, folder, there)
            except HubError:
                _forget(folder, cache_dir)
                raise
    return _copied(folder, local_dir, [path for path in there if kind_of(path)])


def check_listing(repo_id: str, there: Mapping[str, RepoFile]) -> None:
    """Raise a HubError where names or sizes of a repository's files speak against downloading any of them."""
    if problems := check_remote({path: one.size for path, one in there.items()}):
        raise HubError(*(f"{repo_id}: {problem}" for problem in problems))


def _copied(folder: Path, local_dir: str | Path | None, paths: list[str]) -> Path:
    if local_dir is None:
        return folder
    folders.replace(Path(local_dir), {path: Content.of(folder / path) for path in paths})
    return Path(local_dir)


def _fetched(api: HfApi, repo_id: str, revision: str, cache_dir: str | Path | None) -> tuple[Path, dict[str, RepoFile]]:
    commit = again(repo_id, lambda: str(api.model_info(repo_id, revision=revision).sha))
    there = again(repo_id, lambda: list_tree(api, repo_id, commit))
    check_listing(repo_id, there)
    exactly = [glob.escape(path) for path in there if kind_of(path)]

    def download(revision: str) -> Path:
        return Path(api.snapshot_download(repo_id, revision=revision, allow_patterns=exactly, cache_dir=cache_dir))

    folder = again(repo_id, lambda: download(revision))  # by its name, which the cache remembers for offline days
    if folder.name != commit:  # the branch has moved since
        folder = again(repo_id, lambda: download(commit))
    return folder, there


def _cached(repo_id: str, revision: str, cache_dir: str | Path | None) -> tuple[Path, dict[str, RepoFile]]:
    try:
        listed = get_cached_repo_tree(repo_id, revision=revision, cache_dir=cache_dir)
        folder = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=[glob.escape(one.path) for one in listed if kind_of(one.path)],
            local_files_only=True,
            cache_dir=cache_dir,
        )
    except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
        raise HubError(
            f"{repo_id}: {revision} was not pulled here before, and HF_HUB_OFFLINE is set; unset it, or pull it first"
        ) from None
    return Path(folder), {one.path: one for one in listed}


def _check_pulled(repo_id: str, folder: Path, there: Mapping[str, RepoFile]) -> None:
    found = {path: Content.of(folder / path) for path in there if kind_of(path)}
    problems = [
        f"{path}: not what the Hub announced; pull again"
        for path, file in found.items()
        if not file.equals(there[path])
    ] or check_files(folder, {path: file.place for path, file in found.items()}, None)
    if problems:
        raise HubError(*(f"{repo_id}: {problem}" for problem in problems))


def _forget(folder: Path, cache_dir: str | Path | None) -> None:
    """Take a revision out of the cache, with the files that no other one has."""
    with suppress(CacheNotFound):
        scan_cache_dir(cache_dir or constants.HF_HUB_CACHE).delete_revisions(folder.name).execute()
