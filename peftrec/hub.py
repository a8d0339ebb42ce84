"""Publishing an adapter so that what arrives is what was measured, and taking one from others without trusting it.

    push("runs/films/adapter", "me/films")      # or "file:/site/adapters/films"
    pull("me/films", revision="v1")

`push` goes through five doors: the folder holds nothing but an adapter (`contents.check_folder`), a fresh process gets
the recorded scores from it, its card is valid, everything goes up in one commit, and what is read back has the same
hashes. The revision that others see is the old one or the new one at every moment.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final, TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    get_cached_repo_tree,
    snapshot_download,
)
from huggingface_hub import errors as client_errors
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from peftrec import artifact, folders
from peftrec.contents import CARD, check_file, check_folder, check_remote, is_ours, kind_of, list_files
from peftrec.errors import HubError, ModelError

T = TypeVar("T")
FILE_TARGET: Final = "file:"
MAIN = constants.DEFAULT_REVISION
TOLERANCE = 1e-4
"""How far a reloaded score may be from the recorded one: float32 on another number of threads."""
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each further attempt, where the Hub does not say how long."""
LONGEST_WAIT = 300.0
TRANSIENT = (408, 425, 429)
XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3})")
"""In the words of hf_xet, which wraps every answer in a ConnectionError."""
HTTP_ERROR: type[Exception] = client_errors.HTTPError  # type: ignore[attr-defined]
"""Root of what the client's HTTP library raises, whichever that is."""
FAILURES = (HTTP_ERROR, OSError, RuntimeError, ValueError)
"""What huggingface_hub raises: answers and lost connections, local files, failed uploads, refused arguments."""


@dataclass(frozen=True)
class Published:
    """What a push left behind.

    Attributes:
        repo_id: on the Hub, or the `file:` target.
        url: where to look at it.
        revision: the branch or pull request that holds it; None for a folder.
        commit: its hash; None for a folder.
        changed: False where everything was there already and nothing was written.
        files: path -> sha256, as they were read back.
        pr_url: of the pull request, where one was asked for.
        tag: on the commit, where one was asked for.
    """

    repo_id: str
    url: str
    revision: str | None
    commit: str | None
    changed: bool
    files: Mapping[str, str]
    pr_url: str | None = None
    tag: str | None = None


@dataclass(frozen=True)
class _File:
    place: Path
    size: int
    sha256: str
    git: str

    @classmethod
    def of(cls, place: Path) -> _File:
        size = place.stat().st_size
        sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with place.open("rb") as opened:
            while block := opened.read(1 << 20):
                sha256.update(block)
                git.update(block)
        return cls(place, size, sha256.hexdigest(), git.hexdigest())

    def equals(self, there: RepoFile) -> bool:
        """Whether the Hub holds the same bytes: it keeps the sha256 of large files and git's hash of others."""
        if there.lfs:
            return self.sha256 == there.lfs.sha256
        # The client's cache forgets which files are large; of those git's hash is that of a pointer.
        return there.blob_id in (self.git, self._pointer)

    @property
    def _pointer(self) -> str:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(text) + text, usedforsecurity=False).hexdigest()


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    allow: Sequence[str] = (),
    reload_check: Callable[[Path], object] | None = None,
) -> Published:
    """Publish an adapter's folder.

    Args:
        folder: RUN/adapter.
        repo_id: `namespace/name`, or `name` for one of one's own; `file:FOLDER` writes to a folder instead.
        private: of a repository that does not exist yet; others stay what they are.
        revision: branch, made from main where there is none; None is main.
        create_pr: propose the commit instead of making it.
        tag: name for the commit; must not name another one.
        commit_message: first line of the commit.
        commit_description: the rest of it.
        token: as in huggingface_hub; None is `HF_TOKEN` or who is logged in.
        endpoint: address of the Hub; None is `HF_ENDPOINT`.
        allow: see `contents.check_folder`.
        reload_check: called with the folder before anything is sent; raises if the adapter does not load back. None is
            `check_reload`.

    Returns:
        What was published, read back.

    Raises:
        HubError: a door that stayed shut. Nothing is published then, unless the message says otherwise.
    """
    folder = Path(folder)
    if problems := check_folder(folder, allow):
        raise HubError(*problems)
    files = {path: _File.of(place) for path, place in list_files(folder)[0].items()}
    (reload_check or check_reload)(folder)
    check_card(folder)
    if repo_id.startswith(FILE_TARGET):
        if revision or create_pr or tag:
            raise HubError(f"{repo_id}: a folder has no revisions, tags or pull requests; leave them out")
        target = Path(repo_id.removeprefix(FILE_TARGET)).expanduser().absolute()
        hashes = {path: file.sha256 for path, file in files.items()}
        changed = folders.replace(target, {path: file.place for path, file in files.items()}, hashes)
        return Published(repo_id, target.as_uri(), None, None, changed, hashes)
    if create_pr and revision not in (None, MAIN):
        raise HubError(f"revision: {revision}; a pull request is made against {MAIN}: leave it out")
    _refuse_offline("push", f"unset it, or push to a folder: {FILE_TARGET}FOLDER")
    api = _api(token, endpoint)
    with _in_one_line(repo_id):
        if "/" not in repo_id:
            repo_id = f"{_again(repo_id, api.whoami)['name']}/{repo_id}"
        _open_repo(api, repo_id, private)
        branch = revision or MAIN
        known = _check_refs(api, repo_id, branch, tag)
        done = _Push(api, repo_id, branch, files, create_pr)
        if known is not None and not _again(repo_id, lambda: done.is_at(known)):
            raise HubError(f"{repo_id}: tag {tag} is on {known}, which holds other files; choose another tag")
        message = commit_message or f"Upload {artifact.read(folder).task} adapter with peftrec"
        commit, changed = done.run(message, commit_description)
    with _in_one_line(repo_id, f"published as {commit}, but not read back"):
        found = _read_back(api, repo_id, commit, files)
    if tag is not None and known is None:
        with _in_one_line(repo_id, f"published as {commit}, but not tagged"):
            _again(repo_id, lambda: api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True))
    place = f"{api.endpoint}/{repo_id}"
    return Published(repo_id, place, done.revision, commit, changed, found, done.pr_url, tag)


# --- before anything is sent ------------------------------------------------------------------------------------------


def check_reload(
    folder: str | Path, *, base_model: str | Path | None = None, tolerance: float = TOLERANCE, timeout: float = 3600
) -> float:
    """Load the adapter in a fresh process and compare its answers with those that peftrec.json records.

    Args:
        folder: RUN/adapter.
        base_model: as in `Recommender.from_pretrained`.
        tolerance: how far a score may be off.
        timeout: seconds until the process is given up.

    Returns:
        The largest difference.

    Raises:
        HubError: the adapter does not load, answers otherwise, or records no answers.
    """
    folder = Path(folder)
    expected = [probe.score for probe in artifact.read(folder).probes]
    if not expected:
        raise HubError(f"{folder / artifact.FILE}: no probes to check the adapter by; expected some; train it again")
    command = [sys.executable, "-W", "ignore", "-m", "peftrec.reload", str(folder)]
    command += ["--base-model", str(base_model)] if base_model is not None else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise HubError(f"{folder}: not loaded within {timeout:g} s in a fresh process; try it alone") from None
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["no message"]
    if done.returncode:
        raise HubError(f"{folder}: does not load in a fresh process: {lines[-1]}")
    found = json.loads(lines[-1])
    worst = max(abs(float(one) - other) for one, other in zip(found, expected, strict=True))
    if not worst <= tolerance:  # also where a score is not a number
        raise HubError(
            f"{folder}: reloaded, the scores are up to {worst:.2g} off those in {artifact.FILE}; expected at most "
            f"{tolerance:g}; the files are of different runs, or the base model is another: save the adapter again"
        )
    return worst


def check_card(folder: str | Path) -> None:
    """Check the metadata of README.md as far as that goes without the Hub; no card is fine.

    Raises:
        HubError: the Hub would not take it.
    """
    path = Path(folder) / CARD
    if not path.is_file():
        return
    try:
        ModelCard(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise HubError(f"{path}: metadata: {_line(error)}; render the card again, or mend it") from None


# --- one commit -------------------------------------------------------------------------------------------------------


def _open_repo(api: HfApi, repo_id: str, private: bool) -> None:
    """Find the repository, or make it."""
    try:
        found = _again(repo_id, lambda: api.model_info(repo_id))
    except RepositoryNotFoundError:
        _again(repo_id, lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        return
    if private and not found.private:
        _tell(f"{repo_id}: is there already, and public: everyone will see this push")


def _check_refs(api: HfApi, repo_id: str, branch: str, tag: str | None) -> str | None:
    """Make the branch where there is none; the commit that `tag` is on, if it is on one."""
    if branch == MAIN and tag is None:
        return None
    refs = _again(repo_id, lambda: api.list_repo_refs(repo_id))
    tags = {one.name: one.target_commit for one in refs.tags}
    if branch not in {MAIN, *(one.name for one in refs.branches)} and not branch.startswith("refs/pr/"):
        if branch in tags or constants.REGEX_COMMIT_OID.fullmatch(branch):
            raise HubError(f"{repo_id}: {branch} is a tag or a commit; expected a branch, which can move; name one")
        _again(repo_id, lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))
    return tags.get(tag) if tag is not None else None


class _Push:
    """One commit that makes a branch hold exactly these files; made once, however often the connection is lost.

    Attributes:
        revision: the branch, or the pull request once there is one.
        pr_url: of the latter.
    """

    def __init__(self, api: HfApi, repo_id: str, branch: str, files: Mapping[str, _File], create_pr: bool) -> None:
        self.api, self.repo_id, self.branch, self.files, self.create_pr = api, repo_id, branch, files, create_pr
        self.revision = branch
        self.pr_url: str | None = None
        self.parent: str | None = None  # once there is something to commit
        self.pulls: set[str] = set()

    def run(self, message: str, description: str | None) -> tuple[str, bool]:
        """The commit, and whether it is a new one."""
        found = _again(self.repo_id, lambda: self._attempt(message, description))
        return found, self.parent is not None

    def is_at(self, commit: str) -> bool:
        """Whether `commit` is what the push would come to."""
        return self._head(self.branch) == commit and not any(self._difference(commit))

    def _attempt(self, message: str, description: str | None) -> str:
        head = self._head(self.branch)
        add, delete = self._difference(head)
        if not add and not delete:  # also what an attempt did whose answer was lost
            return head
        if self.parent is None:
            self.parent, self.pulls = head, self._pulls()
        elif self.create_pr and (landed := self._landed()):
            return landed
        if head != self.parent:
            raise self._overtaken(head)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(path, str(self.files[path].place)) for path in add),
            *(CommitOperationDelete(path, is_folder=False) for path in delete),
        ]
        try:
            with _warnings_told(self.repo_id):
                done = self.api.create_commit(
                    self.repo_id,
                    operations,
                    commit_message=message,
                    commit_description=description,
                    revision=self.branch,
                    create_pr=self.create_pr,
                    parent_commit=head,
                )
        except HfHubHTTPError as error:
            if error.response.status_code not in (409, 412):
                raise
            now = self._head(self.branch)
            if not any(self._difference(now)):
                return now
            raise self._overtaken(now) from error
        if self.create_pr:
            self.revision, self.pr_url = done.pr_revision or self.branch, done.pr_url
        return str(done.oid)

    def _head(self, revision: str) -> str:
        return str(self.api.model_info(self.repo_id, revision=revision).sha)

    def _difference(self, commit: str) -> tuple[list[str], list[str]]:
        """Files to add or change, and files of an earlier adapter to take away."""
        there = _tree(self.api, self.repo_id, commit)
        add = [path for path, file in self.files.items() if path not in there or not file.equals(there[path])]
        return add, sorted(path for path in there if is_ours(path) and path not in self.files)

    def _pulls(self) -> set[str]:
        if not self.create_pr:
            return set()
        refs = self.api.list_repo_refs(self.repo_id, include_pull_requests=True)
        return {one.ref for one in refs.pull_requests or []}

    def _landed(self) -> str | None:
        """The commit of a pull request that an earlier attempt made without hearing of it."""
        for ref in sorted(self._pulls() - self.pulls):
            commit = self._head(ref)
            if not any(self._difference(commit)):
                self.revision = ref
                self.pr_url = f"{self.api.endpoint}/{self.repo_id}/discussions/{ref.rpartition('/')[2]}"
                return commit
        return None

    def _overtaken(self, head: str) -> HubError:
        return HubError(
            f"{self.repo_id}: somebody committed {head} to {self.branch} meanwhile; expected {self.parent}; nothing "
            "was published: look at that commit, and push again"
        )


def _tree(api: HfApi, repo_id: str, commit: str) -> dict[str, RepoFile]:
    listed = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    return {one.path: one for one in listed if isinstance(one, RepoFile)}


def _read_back(api: HfApi, repo_id: str, commit: str, files: Mapping[str, _File]) -> dict[str, str]:
    """Download every file of the commit and compare it; the sha256 of each."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="peftrec-") as scratch:
        for path, file in files.items():
            place = Path(_again(repo_id, lambda path=path: _download(api, repo_id, path, commit, scratch)))  # type: ignore[misc]
            found[path] = _File.of(place).sha256
            if found[path] != file.sha256:
                raise HubError(
                    f"{repo_id}: {path} of {commit} has sha256 {found[path]}; expected {file.sha256}; it is published: "
                    "did the folder change meanwhile? push again"
                )
            place.unlink()
    return found


def _download(api: HfApi, repo_id: str, path: str, commit: str, folder: str) -> str:
    return str(api.hf_hub_download(repo_id, path, revision=commit, local_dir=folder))


# --- pull -------------------------------------------------------------------------------------------------------------


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

    Nothing but an adapter's files is downloaded, and no code is run. Under `HF_HUB_OFFLINE` it is what was pulled
    before.

    Args:
        repo_id: `namespace/name`, or `file:FOLDER`.
        revision: branch, tag or commit; None is main.
        local_dir: put the files there instead of into the cache.
        cache_dir: as in huggingface_hub; None is `HF_HUB_CACHE`.
        token: as in huggingface_hub; None is `HF_TOKEN` or who is logged in.
        endpoint: address of the Hub; None is `HF_ENDPOINT`.

    Returns:
        The adapter's folder, which is not to be written to unless it is `local_dir`.

    Raises:
        HubError: no such repository or revision, no connection, or files that are not an adapter's or not safe to read.
    """
    if repo_id.startswith(FILE_TARGET):
        folder = Path(repo_id.removeprefix(FILE_TARGET)).expanduser().absolute()
        if problems := check_folder(folder, allow=None):
            raise HubError(*(f"{repo_id}: {problem}" for problem in problems))
        return folder
    wanted = revision or MAIN
    with _in_one_line(repo_id):
        if constants.is_offline_mode():
            folder, there = _cached(repo_id, wanted, local_dir, cache_dir)
            _check_remote(repo_id, there)
        else:
            folder, there = _fetched(_api(token, endpoint), repo_id, wanted, local_dir, cache_dir)
        _check_pulled(repo_id, folder, there)
    return folder


def _fetched(
    api: HfApi, repo_id: str, revision: str, local_dir: str | Path | None, cache_dir: str | Path | None
) -> tuple[Path, dict[str, RepoFile]]:
    commit = _again(repo_id, lambda: str(api.model_info(repo_id, revision=revision).sha))
    there = _again(repo_id, lambda: _tree(api, repo_id, commit))
    _check_remote(repo_id, there)
    exactly = [glob.escape(path) for path in there if kind_of(path)]

    def download(revision: str) -> Path:
        found = api.snapshot_download(
            repo_id, revision=revision, allow_patterns=exactly, local_dir=local_dir, cache_dir=cache_dir
        )
        return Path(found)

    folder = _again(repo_id, lambda: download(revision))  # by its name, which the cache remembers for offline days
    if local_dir is None and folder.name != commit:  # the branch has moved since
        folder = _again(repo_id, lambda: download(commit))
    return folder, there


def _cached(
    repo_id: str, revision: str, local_dir: str | Path | None, cache_dir: str | Path | None
) -> tuple[Path, dict[str, RepoFile]]:
    try:
        listed = get_cached_repo_tree(repo_id, revision=revision, local_dir=local_dir, cache_dir=cache_dir)
        folder = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=[glob.escape(one.path) for one in listed if kind_of(one.path)],
            local_files_only=True,
            local_dir=local_dir,
            cache_dir=cache_dir,
        )
    except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
        raise HubError(
            f"{repo_id}: {revision} was not pulled here before, and HF_HUB_OFFLINE is set; unset it, or pull it first"
        ) from None
    return Path(folder), {one.path: one for one in listed}


def _check_remote(repo_id: str, there: Mapping[str, RepoFile]) -> None:
    if problems := check_remote({path: one.size for path, one in there.items()}):
        raise HubError(*(f"{repo_id}: {problem}" for problem in problems))


def _check_pulled(repo_id: str, folder: Path, there: Mapping[str, RepoFile]) -> None:
    problems = []
    for path, one in there.items():
        if kind_of(path) is None:
            continue
        file = _File.of(folder / path)
        if file.equals(one):
            problems += check_file(path, file.place, allow=None)
        else:
            problems.append(f"{path}: not what the Hub announced; remove {file.place}, and pull again")
    if problems:
        raise HubError(*(f"{repo_id}: {problem}" for problem in problems))
    try:
        artifact.read(folder)
    except ModelError as error:
        raise HubError(f"{repo_id}: {error}") from None


# --- talking to the Hub -----------------------------------------------------------------------------------------------


def _api(token: str | bool | None, endpoint: str | None) -> HfApi:
    return HfApi(endpoint, token, library_name="peftrec", library_version=version("peftrec"))


def _refuse_offline(verb: str, todo: str) -> None:
    if constants.is_offline_mode():
        raise HubError(f"{verb}: HF_HUB_OFFLINE is set; expected a connection to the Hub; {todo}")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _warnings_told(repo_id: str) -> Iterator[None]:
    """The client's warnings, such as what the Hub thinks of the card, as lines."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for one in caught:
        if one.category is UserWarning:  # others are not for who pushes
            _tell(f"{repo_id}: {_line(one.message)}")


def _again(repo_id: str, action: Callable[[], T]) -> T:
    """What `action` returns, tried again where the Hub is busy or the connection is lost."""
    for number, wait in enumerate(WAITS, start=2):
        try:
            return action()
        except FAILURES as error:
            asked = _seconds_to_wait(error)
            if asked is None or asked > LONGEST_WAIT:
                raise
            wait = max(wait, asked)
            _tell(f"{repo_id}: {_reason(error)}; trying again in {wait:g} s ({number} of {len(WAITS) + 1})")
            time.sleep(wait)
    return action()


def _seconds_to_wait(error: BaseException) -> float | None:
    """How long the Hub asks to wait, 0 where it does not say; None where waiting does not help."""
    for one in _chain(error):
        if isinstance(one, HfHubHTTPError):
            after = one.response.headers.get("Retry-After", "")
            return (float(after) if after.isdigit() else 0.0) if _passes(one.response.status_code) else None
        if isinstance(one, (ConnectionError, TimeoutError)) and not isinstance(one, OfflineModeIsEnabled):
            found = XET_STATUS.search(str(one))
            return 0.0 if found is None or _passes(int(found[1])) else None
        lost = isinstance(one, HTTP_ERROR) or (type(one) is OSError and one.errno is None)  # the latter: cut short
        if lost or isinstance(one, json.JSONDecodeError):
            return 0.0
    return None


def _passes(status: int) -> bool:
    """Whether an answer may be another one later."""
    return status in TRANSIENT or status >= 500


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _reason(error: BaseException) -> str:
    for one in _chain(error):
        if isinstance(one, HfHubHTTPError):
            return f"the Hub answers HTTP {one.response.status_code}"
    *_, root = _chain(error)
    return f"connection lost ({_line(root) or type(root).__name__})"


@contextmanager
def _in_one_line(repo_id: str, state: str | None = None) -> Iterator[None]:
    """Turn what the client raises into one line that says what to do."""
    try:
        yield
    except FAILURES as error:
        line = _explain(error)
        raise HubError(f"{repo_id}: {f'{state}: ' if state else ''}{line}") from error


def _explain(error: BaseException) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; expected a connection to the Hub; unset it"
    if isinstance(error, HFValidationError):
        return f"{_line(error)}; expected namespace/name"
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, LocalTokenNotFoundError):
        return f"the Hub must know who asks; {log_in}"
    if type(error) is ValueError:  # the card's metadata, or an argument
        return _line(error)
    if isinstance(error, RevisionNotFoundError):
        return "no such revision; expected a branch, a tag or a commit; look at the repository's page"
    answered = next((one for one in _chain(error) if isinstance(one, HfHubHTTPError)), None)
    if answered is not None:
        status = answered.response.status_code
        if isinstance(answered, RepositoryNotFoundError):
            return (
                f"no such repository, or not for who asks (HTTP {status}); check the name; for a private one {log_in}"
            )
        if status == 401:
            return f"the Hub does not know who asks (HTTP 401); {log_in}"
        if status == 403:
            return "not allowed (HTTP 403); use a token that may write there, or another namespace"
        text = answered.server_message or _line(answered)
        return f"the Hub answers HTTP {status} ({_line(text)})" + (
            "; try again later" if _seconds_to_wait(error) is not None else ""
        )
    if "/xet-" in str(error):
        return f"{_line(error)}; for a Hub without Xet set HF_HUB_DISABLE_XET=1"
    if _seconds_to_wait(error) is not None:
        return f"{_reason(error)}; expected a connection to the Hub; check the network and HF_ENDPOINT, and try again"
    return _line(error)


def _line(what: object) -> str:
    return " ".join(str(what).split())[:300]
