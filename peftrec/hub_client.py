"""Talking to the Hub through huggingface_hub: what is tried again, what is told, and every failure in one line."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants
from huggingface_hub import errors as client_errors
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from peftrec.errors import HubError
from peftrec.values import is_repo_id

T = TypeVar("T")
MAIN = constants.DEFAULT_REVISION
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each further attempt, where the Hub does not say how long."""
LONGEST_WAIT = 300.0
TRANSIENT = (408, 425, 429)
MOST_FILES = 10_000
"""In a repository; nobody reads a longer list to find an adapter in it."""
XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3})")
"""In the words of hf_xet, which wraps every answer in a ConnectionError."""
HTTP_ERROR: type[Exception] = client_errors.HTTPError  # type: ignore[attr-defined]
"""Root of what the client's HTTP library raises, whichever that is."""
FAILURES = (HTTP_ERROR, OSError, RuntimeError, ValueError)
"""What huggingface_hub raises: answers and lost connections, local files, failed uploads, refused arguments."""


def connect(token: str | bool | None, endpoint: str | None) -> HfApi:
    """The client; None is what the environment says (`HF_TOKEN` or who is logged in, `HF_ENDPOINT`)."""
    return HfApi(endpoint, token, library_name="peftrec", library_version=version("peftrec"))


@dataclass(frozen=True)
class Content:
    """A file's bytes as the Hub knows them.

    Attributes:
        place: where it is.
        size: bytes.
        sha256: of its bytes.
        git: hash that git gives them.
    """

    place: Path
    size: int
    sha256: str
    git: str

    @classmethod
    def of(cls, place: Path) -> Content:
        """Read a file."""
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


def list_tree(api: HfApi, repo_id: str, commit: str) -> dict[str, RepoFile]:
    """Path -> facts of every file of a commit.

    Raises:
        HubError: it has more than anybody would look at.
    """
    listed = list(islice(api.list_repo_tree(repo_id, recursive=True, revision=commit), MOST_FILES + 1))
    if len(listed) > MOST_FILES:
        raise HubError(f"{repo_id}: more than {MOST_FILES:,} files; expected an adapter; use another repository")
    return {one.path: one for one in listed if isinstance(one, RepoFile)}


def refuse_unnamed(repo_id: str, expected: str) -> None:
    """Raise a HubError where what should be a repository of somebody's has no owner, or a name that cannot be."""
    if "/" not in repo_id or not is_repo_id(repo_id):
        raise HubError(f"{one_line(repo_id)}: expected {expected}, such as me/films; write whose it is")


def refuse_offline(verb: str, todo: str) -> None:
    """Raise a HubError where `HF_HUB_OFFLINE` forbids what follows."""
    if constants.is_offline_mode():
        raise HubError(f"{verb}: HF_HUB_OFFLINE is set; expected a connection to the Hub; {todo}")


def tell(text: str) -> None:
    """Say something to who waits."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def warnings_told(repo_id: str) -> Iterator[None]:
    """The client's warnings, such as what the Hub thinks of the card, as lines."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for one in caught:
        if one.category is UserWarning:  # others are not for who pushes
            tell(f"{repo_id}: {one_line(one.message)}")


def again(repo_id: str, action: Callable[[], T]) -> T:
    """What `action` returns, tried again where the Hub is busy or the connection is lost."""
    for number, wait in enumerate(WAITS, start=2):
        try:
            return action()
        except FAILURES as error:
            asked = _seconds_to_wait(error)
            if asked is None or asked > LONGEST_WAIT:
                raise
            wait = max(wait, asked)
            tell(f"{repo_id}: {_reason(error)}; trying again in {wait:g} s ({number} of {len(WAITS) + 1})")
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
    return f"connection lost ({one_line(root) or type(root).__name__})"


@contextmanager
def in_one_line(repo_id: str, state: str | None = None) -> Iterator[None]:
    """Turn what the client raises into one line that says what to do."""
    try:
        yield
    except FAILURES as error:
        reason = _explain(error)
        raise HubError(f"{repo_id}: {f'{state}: ' if state else ''}{reason}") from error


def _explain(error: BaseException) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; expected a connection to the Hub; unset it"
    if isinstance(error, HFValidationError):
        return f"{one_line(error)}; expected namespace/name"
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, LocalTokenNotFoundError):
        return f"the Hub must know who asks; {log_in}"
    if type(error) is ValueError:  # the card's metadata, or an argument
        return one_line(error)
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
        text = answered.server_message or one_line(answered)
        return f"the Hub answers HTTP {status} ({one_line(text)})" + (
            "; try again later" if _seconds_to_wait(error) is not None else ""
        )
    if "/xet-" in str(error):
        return f"{one_line(error)}; for a Hub without Xet set HF_HUB_DISABLE_XET=1"
    if _seconds_to_wait(error) is not None:
        return f"{_reason(error)}; expected a connection to the Hub; check the network and HF_ENDPOINT, and try again"
    return one_line(error)


def one_line(what: object) -> str:
    """Text of others as one line of at most 300 characters, without what a terminal would obey."""
    text = " ".join(str(what).split())[:300]
    return "".join(character if character.isprintable() else "?" for character in text)
