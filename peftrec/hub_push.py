"""Publishing: everything that can be wrong is looked at first, then one commit, which is read back."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import GitRefs

from peftrec import artifact, folders, record
from peftrec.contents import check_folder, list_files
from peftrec.errors import HubError
from peftrec.file_checks import CARD, is_ours
from peftrec.hub_checks import check_card, check_reload, describe_check
from peftrec.hub_client import (
    MAIN,
    Content,
    again,
    connect,
    in_one_line,
    list_tree,
    refuse_offline,
    tell,
    warnings_told,
)
from peftrec.values import FILE_TARGET, REPO_ID, is_repo_id


@dataclass(frozen=True)
class Difference:
    """What a push does to what is there: path -> bytes, of deleted files those that are freed."""

    added: Mapping[str, int]
    changed: Mapping[str, int]
    deleted: Mapping[str, int]

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.deleted)


NOTHING = Difference({}, {}, {})


@dataclass(frozen=True)
class Published:
    """What a push left behind, or would.

    Attributes:
        repo_id: on the Hub, or the `file:` target.
        url: where to look at it.
        revision: the branch or pull request that holds it; None for a folder.
        commit: its hash; None for a folder, and where nothing is there yet.
        changed: False where everything was there already and nothing was written.
        files: path -> sha256, as they were read back.
        difference: to what was there before.
        private: whether only some may see it; None for a folder.
        pr_url: of the pull request, where one was asked for.
        tag: on the commit, where one was asked for.
        dry_run: True where this is a plan: nothing was written.
        off: largest difference that the reload check found; None where none was made.
        probes: how many recorded answers it compared.
    """

    repo_id: str
    url: str
    revision: str | None
    commit: str | None
    changed: bool
    files: Mapping[str, str]
    difference: Difference = NOTHING
    private: bool | None = None
    pr_url: str | None = None
    tag: str | None = None
    dry_run: bool = False
    off: float | None = None
    probes: int = 0


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
    dry_run: bool = False,
    confirm: Callable[[Published], bool] | None = None,
    reload_check: Callable[[Path], float | None] | None = None,
) -> Published:
    """Publish an adapter's folder.

    Args:
        folder: a run's, or its adapter's.
        repo_id: `namespace/name`, or `name` for one of one's own; `file:FOLDER` writes to a folder instead.
        private: of a repository that does not exist yet; others stay what they are.
        revision: branch, made from main where there is none; None is main.
        create_pr: propose the commit instead of making it.
        tag: name for the commit; must not name another one.
        commit_message: first line of the commit.
        commit_description: the rest of it; what the reload found is added.
        token: as in huggingface_hub; None is `HF_TOKEN` or who is logged in.
        endpoint: address of the Hub; None is `HF_ENDPOINT`.
        allow: see `contents.check_folder`.
        dry_run: do everything up to the commit, and nothing that anybody else would see.
        confirm: asked with the plan, before anything is written; False leaves it at the plan.
        reload_check: called with the folder before anything is sent; raises if the adapter does not load back, and
            returns how far its scores are off. None is `check_reload`.

    Returns:
        What was published, read back; under `dry_run` what would be.

    Raises:
        HubError: a door that stayed shut. Nothing is published then, unless the message says otherwise.
    """
    if not is_repo_id(repo_id):
        raise HubError(f"{repo_id}: expected {REPO_ID}; choose such a name")
    target = (
        Path(repo_id.removeprefix(FILE_TARGET)).expanduser().absolute() if repo_id.startswith(FILE_TARGET) else None
    )
    if target is not None:
        if revision or create_pr or tag:
            raise HubError(f"{repo_id}: a folder has no revisions, tags or pull requests; leave them out")
        folders.adapter_in(target)  # raises where it holds other things
    else:
        if create_pr and revision not in (None, MAIN):
            raise HubError(f"revision: {revision}; a pull request is made against {MAIN}: leave it out")
        refuse_offline("push", f"unset it, or push to a folder: {FILE_TARGET}FOLDER")
    folder = adapter_folder(folder)
    if problems := check_folder(folder, allow, _users(folder)):
        raise HubError(*problems)
    files = {path: Content.of(place) for path, place in list_files(folder)[0].items()}
    check_card(folder)
    off = (reload_check or check_reload)(folder)
    probes = 0 if off is None else len(artifact.read(folder).recorded)
    if target is not None:
        return replace(_to_folder(repo_id, target, files, dry_run, confirm), off=off, probes=probes)
    api = connect(token, endpoint)
    with in_one_line(repo_id):
        if "/" not in repo_id:
            repo_id = f"{again(repo_id, api.whoami)['name']}/{repo_id}"
        push = _Push(api, repo_id, revision or MAIN, files, create_pr)
        if dry_run or confirm is not None:
            plan = replace(push.plan(private, tag), off=off, probes=probes)
            if dry_run or (confirm is not None and not confirm(plan)):
                return plan
        visible = _open_repo(api, repo_id, private)
        known = push.check_refs(tag)
        message = commit_message or f"Upload {artifact.read(folder).task} adapter with peftrec"
        commit, changed = push.run(message, _described(commit_description, off, probes, files))
    with in_one_line(repo_id, f"published as {commit}, but not read back"):
        found = _read_back(api, repo_id, commit, files)
    if tag is not None and known is None:
        with in_one_line(repo_id, f"published as {commit}, but not tagged"):
            again(repo_id, lambda: api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True))
    place = f"{api.endpoint}/{repo_id}"
    done = Published(repo_id, place, push.revision, commit, changed, found, push.difference, visible, push.pr_url, tag)
    return replace(done, off=off, probes=probes)


def adapter_folder(folder: str | Path) -> Path:
    """The adapter's folder of a run, or `folder` itself."""
    folder = Path(folder)
    inner = folder / "adapter"
    return inner if (inner / artifact.FILE).is_file() and not (folder / artifact.FILE).exists() else folder


def _users(folder: Path) -> frozenset[str]:
    """The people whom the run beside this adapter was measured on; nobody where there is no run."""
    run = folder.absolute().parent
    if not (run / record.PREDICTIONS).is_file():
        return frozenset()
    return frozenset(map(str, record.read_predictions(run)["user_id"].unique()))


def _described(description: str | None, off: float | None, probes: int, files: Mapping[str, Content]) -> str | None:
    if off is None:
        return description
    told = describe_check(off, probes, {path: file.sha256 for path, file in files.items()})
    return f"{description}\n\n{told}" if description else told


def _to_folder(
    repo_id: str,
    target: Path,
    files: Mapping[str, Content],
    dry_run: bool,
    confirm: Callable[[Published], bool] | None,
) -> Published:
    hashes = {path: file.sha256 for path, file in files.items()}
    there = {path: Content.of(place) for path, place in folders.adapter_in(target).items()}
    difference = Difference(
        {path: file.size for path, file in files.items() if path not in there},
        {path: file.size for path, file in files.items() if path in there and there[path].sha256 != file.sha256},
        {path: file.size for path, file in there.items() if path not in files},
    )
    done = Published(repo_id, target.as_uri(), None, None, bool(difference), hashes, difference)
    plan = replace(done, dry_run=True)
    if dry_run or (confirm is not None and not confirm(plan)):
        return plan
    if difference:
        folders.replace(target, files)
    return done


# --- one commit -------------------------------------------------------------------------------------------------------


def _open_repo(api: HfApi, repo_id: str, private: bool) -> bool:
    """Find the repository, or make it; whether it is private."""
    try:
        found = again(repo_id, lambda: api.model_info(repo_id))
    except RepositoryNotFoundError:
        again(repo_id, lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        return private
    if private and not found.private:
        tell(f"{repo_id}: is there already, and public: everyone will see this push")
    return bool(found.private)


class _Push:
    """One commit that makes a branch hold exactly these files; made once, however often the connection is lost.

    Attributes:
        revision: the branch, or the pull request once there is one.
        pr_url: of the latter.
        difference: what the commit does.
    """

    def __init__(self, api: HfApi, repo_id: str, branch: str, files: Mapping[str, Content], create_pr: bool) -> None:
        self.api, self.repo_id, self.branch, self.files, self.create_pr = api, repo_id, branch, files, create_pr
        self.revision = branch
        self.pr_url: str | None = None
        self.difference = NOTHING
        self.parent: str | None = None  # once there is something to commit
        self.pulls: set[str] = set()

    def plan(self, private: bool, tag: str | None) -> Published:
        """What would be published, found by reading only."""
        if CARD in self.files:
            text = self.files[CARD].place.read_text(encoding="utf-8")
            with warnings_told(self.repo_id):  # the question with which the client begins a commit
                again(self.repo_id, lambda: self.api._validate_yaml(text))
        hashes = {path: file.sha256 for path, file in self.files.items()}
        place = f"{self.api.endpoint}/{self.repo_id}"
        try:
            visible = bool(again(self.repo_id, lambda: self.api.model_info(self.repo_id)).private)
        except RepositoryNotFoundError:
            head, difference = None, self._to(None)
        else:
            private, known = visible, self._refs(tag)
            # A branch that is not there yet will begin at main.
            start = self.branch if known is None or self._is_branch(known) else MAIN
            head = again(self.repo_id, lambda: self._head(start))
            difference = again(self.repo_id, lambda: self._to(head))
            self._check_tag(known, tag)
        changed = bool(difference)
        return Published(
            self.repo_id, place, self.branch, head, changed, hashes, difference, private, None, tag, dry_run=True
        )

    def check_refs(self, tag: str | None) -> str | None:
        """Make the branch where there is none; the commit that `tag` is on, if it is on one.

        Raises:
            HubError: the branch is none, or the tag is on other files.
        """
        known = self._refs(tag)
        if known is None:
            return None
        if not self._is_branch(known):
            again(self.repo_id, lambda: self.api.create_branch(self.repo_id, branch=self.branch, exist_ok=True))
        return self._check_tag(known, tag)

    def _refs(self, tag: str | None) -> GitRefs | None:
        """Branches and tags, where there is a question about them."""
        if self.branch == MAIN and tag is None:
            return None
        known = again(self.repo_id, lambda: self.api.list_repo_refs(self.repo_id))
        names = {one.name for one in known.tags}
        if not self._is_branch(known) and (self.branch in names or constants.REGEX_COMMIT_OID.fullmatch(self.branch)):
            raise HubError(
                f"{self.repo_id}: {self.branch} is a tag or a commit; expected a branch, which can move; name one"
            )
        return known

    def _is_branch(self, known: GitRefs) -> bool:
        there = {MAIN, *(one.name for one in known.branches)}
        return self.branch in there or self.branch.startswith("refs/pr/")

    def _check_tag(self, known: GitRefs | None, tag: str | None) -> str | None:
        found = {one.name: one.target_commit for one in known.tags}.get(tag or "") if known else None
        if found is not None and not again(self.repo_id, lambda: self._is_at(found)):
            raise HubError(f"{self.repo_id}: tag {tag} is on {found}, which holds other files; choose another tag")
        return found

    def _is_at(self, commit: str) -> bool:
        """Whether `commit` is what the push would come to."""
        return self._head(self.branch) == commit and not self._to(commit)

    def run(self, message: str, description: str | None) -> tuple[str, bool]:
        """The commit, and whether it is a new one."""
        found = again(self.repo_id, lambda: self._attempt(message, description))
        return found, self.parent is not None

    def _attempt(self, message: str, description: str | None) -> str:
        head = self._head(self.branch)
        difference = self._to(head)
        if not difference:  # also what an attempt did whose answer was lost
            return head
        if self.parent is None:
            self.parent, self.pulls, self.difference = head, self._pulls(), difference
        elif self.create_pr and (landed := self._landed()):
            return landed
        if head != self.parent:
            raise self._overtaken(head)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(
                CommitOperationAdd(path, str(self.files[path].place))
                for path in (*difference.added, *difference.changed)
            ),
            *(CommitOperationDelete(path, is_folder=False) for path in difference.deleted),
        ]
        try:
            with warnings_told(self.repo_id):
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
            if not self._to(now):
                return now
            raise self._overtaken(now) from error
        if self.create_pr:
            self.revision, self.pr_url = done.pr_revision or self.branch, done.pr_url
        return str(done.oid)

    def _head(self, revision: str) -> str:
        return str(self.api.model_info(self.repo_id, revision=revision).sha)

    def _to(self, commit: str | None) -> Difference:
        """From a commit (None: an empty repository) to these files; of others only an earlier adapter's go."""
        there = {} if commit is None else list_tree(self.api, self.repo_id, commit)
        return Difference(
            {path: file.size for path, file in self.files.items() if path not in there},
            {path: file.size for path, file in self.files.items() if path in there and not file.equals(there[path])},
            {path: there[path].size for path in sorted(there) if is_ours(path) and path not in self.files},
        )

    def _pulls(self) -> set[str]:
        if not self.create_pr:
            return set()
        refs = self.api.list_repo_refs(self.repo_id, include_pull_requests=True)
        return {one.ref for one in refs.pull_requests or []}

    def _landed(self) -> str | None:
        """The commit of a pull request that an earlier attempt made without hearing of it."""
        for ref in sorted(self._pulls() - self.pulls):
            commit = self._head(ref)
            if not self._to(commit):
                self.revision = ref
                self.pr_url = f"{self.api.endpoint}/{self.repo_id}/discussions/{ref.rpartition('/')[2]}"
                return commit
        return None

    def _overtaken(self, head: str) -> HubError:
        return HubError(
            f"{self.repo_id}: somebody committed {head} to {self.branch} meanwhile; expected {self.parent}; nothing "
            "was published: look at that commit, and push again"
        )


def _read_back(api: HfApi, repo_id: str, commit: str, files: Mapping[str, Content]) -> dict[str, str]:
    """Download every file of the commit and compare it; the sha256 of each."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="peftrec-") as scratch:
        for path, file in files.items():
            place = Path(again(repo_id, lambda path=path: _download(api, repo_id, path, commit, scratch)))  # type: ignore[misc]
            found[path] = Content.of(place).sha256
            if found[path] != file.sha256:
                raise HubError(
                    f"{repo_id}: {path} of {commit} has sha256 {found[path]}; expected {file.sha256}; it is published: "
                    "did the folder change meanwhile? push again"
                )
            place.unlink()
    return found


def _download(api: HfApi, repo_id: str, path: str, commit: str, folder: str) -> str:
    return str(api.hf_hub_download(repo_id, path, revision=commit, local_dir=folder))
