"""A Hub in this process, for tests: the HTTP interface that huggingface_hub's own client speaks, and faults to order.

    with HubServer() as hub:
        hub.fail("POST .*/commit/", status=503)
        hub_client.push(folder, "me/films", token=WRITE, endpoint=hub.url)
        hub.files("me/films")

State lives in memory: repositories with commits, branches, tags and pull requests, and one store of large files. A
commit happens whole under one lock or not at all. Large files travel as Git LFS does; the Xet protocol is not spoken:
a client that has it must be told not to use it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

WRITE, READ, OTHER = "hub_write", "hub_read", "hub_other"
TOKENS = {WRITE: ("me", True), READ: ("me", False), OTHER: ("other", True)}
"""Token -> who holds it, and whether it may write."""

LARGE = re.compile(r"\.(safetensors|bin|pt|pkl|png|h5|onnx)$")
"""Files that the Hub keeps as LFS objects, as its first `.gitattributes` says."""
LARGE_BYTES = 10_000_000
PIECE = 1 << 16
PAGE = 2
DATE = "2026-01-02T03:04:05.000Z"
FIRST_FILES = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}


@dataclass(frozen=True)
class Blob:
    """One file's content, as a plain git object or as a pointer to a large one."""

    content: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        header = "version https://git-lfs.github.com/spec/v1"
        return f"{header}\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()

    @property
    def oid(self) -> str:
        stored = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        if self.lfs:
            found["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return found


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    files: Mapping[str, Blob]
    message: str


@dataclass
class Repo:
    private: bool
    owner: str
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> str:
        for known in (self.branches, self.tags, self.pulls):
            if revision in known:
                return known[revision]
        if revision in self.commits:
            return revision
        raise Refusal(404, "Invalid rev id: " + revision, "RevisionNotFound")

    def commit(self, parent: str | None, files: Mapping[str, Blob], message: str) -> str:
        listing = json.dumps([len(self.commits), parent, message, {path: blob.oid for path, blob in files.items()}])
        oid = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, dict(files), message)
        return oid


class Refusal(Exception):  # noqa: N818 (it is an answer, not a failure of this server)
    """An answer that is an error, in the Hub's form."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.reply = Reply(status, {"error": message}, {"X-Error-Message": message})
        if code:
            self.reply.headers["X-Error-Code"] = code


@dataclass
class Reply:
    status: int = 200
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)

    def encoded(self) -> bytes:
        if isinstance(self.body, bytes):
            return self.body
        self.headers.setdefault("Content-Type", "application/json; charset=utf-8")
        return json.dumps(self.body).encode()


@dataclass
class Fault:
    """What goes wrong with requests whose `METHOD /path` matches.

    Attributes:
        match: regular expression.
        times: how often it happens.
        status: answer with this and do nothing.
        headers: of that answer, such as Retry-After in seconds.
        cut_request: close the connection after so many bytes of the request's body; nothing is done.
        lose_answer: do what was asked, then close the connection without an answer.
        cut_answer: do what was asked, and close the connection after so many bytes of the answer's body.
        delay: seconds between pieces of the answer's body.
        piece: bytes of such a piece.
        before: called before the request is handled.
    """

    match: str
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_request: int | None = None
    lose_answer: bool = False
    cut_answer: int | None = None
    delay: float = 0.0
    piece: int = PIECE
    before: Callable[[], None] | None = None


class HubServer:
    """The server; a context manager that runs it in a thread.

    Attributes:
        url: where it listens, for HF_ENDPOINT.
        repos: repo id -> repository.
        objects: sha256 -> large file.
        log: `METHOD /path` of every request so far, query left out.
        faults: yet to happen, first match first.
        draw: asked for a fault where none of `faults` matches.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.log: list[str] = []
        self.faults: list[Fault] = []
        self.draw: Callable[[str], Fault | None] | None = None
        self.lock = threading.RLock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.close_all()
        self._server.server_close()

    def fail(self, match: str, **how: Any) -> None:
        """Order a fault; see `Fault`."""
        self.faults.append(Fault(match, **how))

    def put(self, repo_id: str, files: Mapping[str, bytes], *, private: bool = False, branch: str = "main") -> str:
        """Commit `files` on top of the branch, whatever they are called: how somebody else writes to the Hub."""
        with self.lock:
            repo = self.repos.get(repo_id) or self.create(repo_id, private)
            parent = repo.branches[branch]
            blobs = {path: Blob(content, bool(LARGE.search(path))) for path, content in files.items()}
            self.objects |= {blob.sha256: blob.content for blob in blobs.values() if blob.lfs}
            repo.branches[branch] = repo.commit(parent, {**repo.commits[parent].files, **blobs}, "by hand")
            return repo.branches[branch]

    def create(self, repo_id: str, private: bool) -> Repo:
        repo = self.repos[repo_id] = Repo(private, repo_id.split("/")[0])
        first = {path: Blob(content) for path, content in FIRST_FILES.items()}
        repo.branches["main"] = repo.commit(None, first, "initial commit")
        return repo

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Path -> content at a revision, without what the Hub itself wrote."""
        with self.lock:
            repo = self.repos[repo_id]
            blobs = repo.commits[repo.resolve(revision)].files
        return {path: blob.content for path, blob in blobs.items() if path not in FIRST_FILES}

    def commits(self, repo_id: str, revision: str = "main") -> list[str]:
        """Messages from the newest commit to the first."""
        with self.lock:
            repo, found = self.repos[repo_id], []
            oid: str | None = repo.resolve(revision)
            while oid is not None:
                found.append(repo.commits[oid].message)
                oid = repo.commits[oid].parent
            return found

    def fault(self, request: str) -> Fault | None:
        with self.lock:
            self.log.append(request)
            for one in self.faults:
                if re.search(one.match, request):
                    one.times -= 1
                    if not one.times:
                        self.faults.remove(one)
                    return one
            return self.draw(request) if self.draw else None


@dataclass
class Request:
    hub: HubServer
    method: str
    path: str
    query: dict[str, str]
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def user(self, *, write: bool = False) -> str | None:
        """Who asks; None where nobody says.

        Raises:
            Refusal: an unknown token, or one that may not write.
        """
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        name, may_write = TOKENS[token] if token else (None, False)
        if write and name is None:
            raise Refusal(401, "Invalid username or password.")
        if write and not may_write:
            raise Refusal(403, "You don't have the required permissions: use a token with write access")
        return name

    def repo(self, repo_id: str, *, write: bool = False) -> Repo:
        user, repo = self.user(), self.hub.repos.get(repo_id)
        if repo is None or (repo.private and repo.owner != user):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write:
            self.user(write=True)
        return repo


# --- what the Hub answers ---------------------------------------------------------------------------------------------


def _whoami(request: Request) -> Reply:
    user = request.user()
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    return Reply(body={"type": "user", "name": user, "orgs": []})


def _create(request: Request) -> Reply:
    user, wanted = request.user(write=True), request.json
    owner = wanted.get("organization") or user
    repo_id = f"{owner}/{wanted['name']}"
    if wanted.get("type") == "space" and not wanted.get("sdk"):
        raise Refusal(400, "sdk is required for a Space")
    if owner != user:
        raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner}")
    if repo_id in request.hub.repos:
        refusal = Refusal(409, "You already created this model repo")
        refusal.reply.body["url"] = f"{request.hub.url}/{repo_id}"  # which the client then takes
        raise refusal
    request.hub.create(repo_id, wanted.get("visibility") == "private")
    return Reply(body={"url": f"{request.hub.url}/{repo_id}", "name": repo_id, "id": repo_id})


def _validate_yaml(request: Request) -> Reply:
    """Far less than the Hub checks: whether there is metadata, and that its top level reads `key: value`."""
    content = request.json["content"]
    found = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", content, re.DOTALL)
    if found is None:
        return Reply(body={"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
    wrong = [line for line in found[1].splitlines() if not re.match(r"(\s|-|#|[\w-]+:|$)", line)]
    errors = [{"message": f"bad indentation of a mapping entry: {line}"} for line in wrong]
    return Reply(400 if errors else 200, {"errors": errors, "warnings": []})


def _info(request: Request, repo_id: str, revision: str = "main") -> Reply:
    repo = request.repo(repo_id)
    commit = repo.commits[repo.resolve(revision)]
    siblings = [{"rfilename": path} for path in commit.files]
    facts = {"id": repo_id, "modelId": repo_id, "sha": commit.oid, "private": repo.private, "siblings": siblings}
    return Reply(body={**facts, "tags": [], "downloads": 0, "likes": 0})


def _tree(request: Request, repo_id: str, revision: str) -> Reply:
    repo = request.repo(repo_id)
    files = repo.commits[repo.resolve(revision)].files
    folders = {path.rsplit("/", 1)[0] for path in files if "/" in path}
    found = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
    return Reply(body=[*found, *(blob.entry(path) for path, blob in files.items())])


def _refs(request: Request, repo_id: str) -> Reply:
    repo = request.repo(repo_id)

    def listed(refs: Mapping[str, str], prefix: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": prefix + name, "targetCommit": oid} for name, oid in refs.items()]

    found = {"branches": listed(repo.branches, "refs/heads/"), "tags": listed(repo.tags, "refs/tags/"), "converts": []}
    if "include_prs" in request.query:
        found["pullRequests"] = listed(repo.pulls, "")
    return Reply(body=found)


def _commits(request: Request, repo_id: str, revision: str) -> Reply:
    """The newest first, in pages of two: the client must follow the links."""
    repo = request.repo(repo_id)
    found, oid = [], repo.resolve(revision)
    while oid:
        commit = repo.commits[oid]
        title, _, message = commit.message.partition("\n\n")
        found.append({"id": oid, "title": title, "message": message, "date": DATE, "authors": [{"user": repo.owner}]})
        oid = commit.parent or ""
    return _page(request, found, f"{request.hub.url}/api/models/{repo_id}/commits/{quote(revision, safe='')}")


def _models(request: Request) -> Reply:
    user, author = request.user(), request.query.get("author")
    found = []
    for repo_id, repo in request.hub.repos.items():
        if repo.owner == author and (not repo.private or repo.owner == user):
            facts = _info(request, repo_id).body
            found.append({**facts, "lastModified": DATE})
    return _page(request, found, f"{request.hub.url}/api/models", author=author or "", full="true")


def _page(request: Request, found: list[Any], place: str, **query: str) -> Reply:
    start = int(request.query.get("p", 0))
    more = {**query, "p": str(start + PAGE)}
    headers = {"Link": f'<{place}?{urlencode(more)}>; rel="next"'} if start + PAGE < len(found) else {}
    return Reply(body=found[start : start + PAGE], headers=headers)


def _branch(request: Request, repo_id: str, name: str) -> Reply:
    repo = request.repo(repo_id, write=True)
    if name in repo.branches:
        raise Refusal(409, "Reference already exists")
    if name.startswith("refs/"):
        raise Refusal(400, "Invalid reference for a branch")
    repo.branches[name] = repo.resolve(request.json.get("startingPoint", "main"))
    return Reply()


def _tag(request: Request, repo_id: str, revision: str) -> Reply:
    repo, name = request.repo(repo_id, write=True), request.json["tag"]
    if name in repo.tags:
        raise Refusal(409, "Tag reference exists already")
    repo.tags[name] = repo.resolve(revision)
    return Reply()


def _preupload(request: Request, repo_id: str, revision: str) -> Reply:
    repo = request.repo(repo_id, write=True)
    there = repo.commits[repo.resolve(revision)].files
    answers = []
    for one in request.json["files"]:
        path, old = one["path"], there.get(one["path"])
        mode = "lfs" if LARGE.search(path) or one["size"] > LARGE_BYTES else "regular"
        oid = None if old is None else old.sha256 if old.lfs else old.oid
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return Reply(body={"files": answers})


def _lfs_batch(request: Request, repo_id: str) -> Reply:
    request.repo(repo_id, write=True)
    found = []
    for one in request.json["objects"]:
        href = f"{request.hub.url}/lfs/{one['oid']}"
        actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        found.append(one if one["oid"] in request.hub.objects else {**one, "actions": actions})
    return Reply(body={"transfer": "basic", "objects": found})


def _lfs_put(request: Request, oid: str) -> Reply:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refusal(400, "the content does not have the hash that was announced")
    request.hub.objects[oid] = request.body
    return Reply()


def _lfs_verify(request: Request, oid: str) -> Reply:
    if len(request.hub.objects.get(oid, b"")) != request.json["size"]:
        raise Refusal(404, "no such object")
    return Reply()


def _commit(request: Request, repo_id: str, revision: str) -> Reply:
    repo = request.repo(repo_id, write=True)
    head = repo.resolve(revision)
    lines = [json.loads(line) for line in request.body.splitlines()]
    header, files = lines[0]["value"], dict(repo.commits[head].files)
    if header.get("parentCommit", head) != head:
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    for line in lines[1:]:
        kind, value = line["key"], line["value"]
        path = value["path"]
        if kind == "file":
            files[path] = Blob(base64.b64decode(value["content"]))
        elif kind == "lfsFile":
            if value["oid"] not in request.hub.objects:
                raise Refusal(400, f"{path}: LFS pointer to a file that does not exist")
            files[path] = Blob(request.hub.objects[value["oid"]], lfs=True)
        elif path not in files:
            raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        else:
            del files[path]
    pull_request = "create_pr" in request.query
    if not pull_request and revision not in repo.branches and revision not in repo.pulls:
        raise Refusal(400, "Invalid reference: commits go to a branch")
    oid = repo.commit(head, files, "\n\n".join(filter(None, (header["summary"], header.get("description")))))
    answer = {"commitUrl": f"{request.hub.url}/{repo_id}/commit/{oid}", "commitOid": oid}
    if pull_request:
        number = len(repo.pulls) + 1
        repo.pulls[f"refs/pr/{number}"] = oid
        answer["pullRequestUrl"] = f"{request.hub.url}/{repo_id}/discussions/{number}"
    else:
        (repo.branches if revision in repo.branches else repo.pulls)[revision] = oid
    return Reply(body=answer)


def _file(request: Request, repo_id: str, revision: str, path: str) -> Reply:
    repo = request.repo(repo_id)
    commit = repo.commits[repo.resolve(revision)]
    blob = commit.files.get(path)
    if blob is None:
        refusal = Refusal(404, "Entry not found", "EntryNotFound")
        refusal.reply.headers["X-Repo-Commit"] = commit.oid
        raise refusal
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.sha256 if blob.lfs else blob.oid}"'}
    headers["Accept-Ranges"] = "bytes"
    if blob.lfs:
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(blob.content))}
    if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")):
        first, last = int(wanted[1]), int(wanted[2] or len(blob.content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(blob.content)}"
        return Reply(206, blob.content[first : last + 1], headers)
    return Reply(200, blob.content, headers)


_MODEL = "/api/(?:models|spaces)/([^/]+/[^/]+)"
ROUTES: tuple[tuple[str, str, Callable[..., Reply]], ...] = (
    ("GET", "/api/whoami-v2", _whoami),
    ("POST", "/api/repos/create", _create),
    ("POST", "/api/validate-yaml", _validate_yaml),
    ("GET", "/api/models", _models),
    ("GET", _MODEL, _info),
    ("GET", f"{_MODEL}/revision/([^/]+)", _info),
    ("GET", f"{_MODEL}/tree/([^/]+)", _tree),
    ("GET", f"{_MODEL}/refs", _refs),
    ("GET", f"{_MODEL}/commits/([^/]+)", _commits),
    ("POST", f"{_MODEL}/branch/([^/]+)", _branch),
    ("POST", f"{_MODEL}/tag/([^/]+)", _tag),
    ("POST", f"{_MODEL}/preupload/([^/]+)", _preupload),
    ("POST", f"{_MODEL}/commit/([^/]+)", _commit),
    ("POST", r"/(?:spaces/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", _lfs_batch),
    ("PUT", "/lfs/([0-9a-f]{64})", _lfs_put),
    ("POST", "/lfs/([0-9a-f]{64})/verify", _lfs_verify),
    ("GET", "/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _file),
)


def answer(request: Request) -> Reply:
    """What the Hub says to a request; requests are handled one after the other."""
    method = "GET" if request.method == "HEAD" else request.method
    for wanted, pattern, handle in ROUTES:
        if wanted == method and (found := re.fullmatch(pattern, request.path)):
            try:
                with request.hub.lock:
                    return handle(request, *map(unquote, found.groups()))
            except Refusal as refusal:
                return refusal.reply
    return Refusal(404, f"no such page: {request.method} {request.path}").reply


# --- sockets ----------------------------------------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    hub: HubServer

    def __init__(self, *args: Any) -> None:
        self.open: set[socket.socket] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def close_all(self) -> None:
        """End connections that clients keep open; the thread of each then closes it."""
        for one in list(self.open):
            with suppress(OSError):  # the client was faster
                one.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body of an answer are two writes: else the second waits for 40 ms
    server: _Server
    no_fault: ClassVar[Fault] = Fault("")

    def log_message(self, *_: Any) -> None:
        pass

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        fault = self.server.hub.fault(f"{self.command} {url.path}") or self.no_fault
        body = b"".join(self._body(fault.cut_request))
        if fault.cut_request is not None:
            return self._hang_up()
        if fault.before:
            fault.before()
        if fault.status is not None:
            reply = Refusal(fault.status, "ordered by the test").reply
            return self._send(replace(reply, headers={**reply.headers, **fault.headers}), fault)
        reply = answer(Request(self.server.hub, self.command, url.path, query, self.headers, body))  # type: ignore[arg-type]
        return self._hang_up() if fault.lose_answer else self._send(reply, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815 (http.server's names)

    def _body(self, most: int | None) -> Iterator[bytes]:
        """The request's body in pieces, at most `most` bytes of it."""
        left = self._announced() if most is None else min(most, self._announced())
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked" and most is None:
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        while left > 0 and (piece := self.rfile.read(min(left, PIECE))):
            left -= len(piece)
            yield piece

    def _announced(self) -> int:
        return int(self.headers.get("Content-Length") or 0)

    def _send(self, reply: Reply, fault: Fault) -> None:
        content = reply.encoded()
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = content if fault.cut_answer is None else content[: fault.cut_answer]
        size = fault.piece if fault.delay else max(len(sent), 1)
        for start in range(0, len(sent), size):
            self.wfile.write(sent[start : start + size])
            time.sleep(fault.delay)
        if len(sent) < len(content):
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):  # the client was faster
            self.connection.shutdown(socket.SHUT_RDWR)
