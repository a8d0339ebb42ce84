"""Push and pull against a server in this process, through huggingface_hub's own client."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_helpers import REPO, contents_of, send, write_adapter
from hub_server import OTHER, READ, WRITE, Fault, HubServer
from huggingface_hub import constants

from peftrec import artifact, folders, hub, hub_push
from peftrec.artifact import Probe
from peftrec.contents import check_folder
from peftrec.errors import HubError
from peftrec.hub import pull, push


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "changed", 1)


# --- there and back ---------------------------------------------------------------------------------------------------


def test_what_is_pushed_is_pulled(server: HubServer, adapter: Path) -> None:
    done = send(adapter, commit_message="First films")
    assert contents_of(adapter) == server.files(REPO)
    assert done.files == {path: hashlib.sha256(data).hexdigest() for path, data in contents_of(adapter).items()}
    assert (done.repo_id, done.url, done.revision, done.changed) == (REPO, f"{server.url}/{REPO}", "main", True)
    assert done.commit == server.repos[REPO].branches["main"]
    assert server.commits(REPO) == ["First films", "initial commit"]
    assert server.repos[REPO].private
    large = {path for path, blob in server.repos[REPO].commits[done.commit].files.items() if blob.lfs}
    assert large == {"adapter_model.safetensors", "figures/calibration.png"}
    folder = pull(REPO, token=WRITE)
    assert {path: (folder / path).read_bytes() for path in done.files} == contents_of(adapter)
    assert artifact.read(folder) == artifact.read(adapter)
    assert folder.name == done.commit


def test_the_same_again_is_no_commit(server: HubServer, adapter: Path) -> None:
    first = send(adapter)
    server.log.clear()
    again = send(adapter)
    assert dataclasses.replace(again, changed=True, difference=first.difference) == first
    assert not again.changed
    assert len(server.commits(REPO)) == 2
    assert not [line for line in server.log if "/commit/" in line or line.startswith("PUT")]


def test_a_change_is_one_commit_that_sends_what_changed(server: HubServer, adapter: Path, changed: Path) -> None:
    send(adapter)
    server.put(REPO, {"NOTES.md": b"mine", "vocab.txt": b"old tokenizer"})
    server.log.clear()
    done = send(changed)
    assert done.changed
    assert server.files(REPO) == {**contents_of(changed), "NOTES.md": b"mine"}  # an old tokenizer would be loaded
    assert len(server.commits(REPO)) == 4
    assert sum(line.startswith("PUT /lfs/") for line in server.log) == 1  # the figure is the same


def test_branches_tags_and_pull_requests(server: HubServer, adapter: Path, changed: Path) -> None:
    first = send(adapter, tag="v1")
    second = send(changed, revision="wide", tag="v2")
    assert (second.revision, second.tag) == ("wide", "v2")
    assert server.repos[REPO].tags == {"v1": first.commit, "v2": second.commit}
    assert server.files(REPO) == contents_of(adapter)
    assert server.files(REPO, "wide") == contents_of(changed)
    assert not send(adapter, tag="v1").changed
    with pytest.raises(HubError, match=r"tag v1 is on \w+, which holds other files; choose another tag"):
        send(changed, tag="v1")
    assert server.files(REPO) == contents_of(adapter)
    proposed = send(changed, create_pr=True)
    assert (proposed.revision, proposed.pr_url) == ("refs/pr/1", f"{server.url}/{REPO}/discussions/1")
    assert server.files(REPO) == contents_of(adapter)
    assert server.files(REPO, "refs/pr/1") == contents_of(changed)
    for revision in ("wide", "v2", second.commit, "refs/pr/1"):
        assert (pull(REPO, revision, token=WRITE) / "README.md").read_text() == (changed / "README.md").read_text()
    with pytest.raises(HubError, match="v1 is a tag or a commit; expected a branch"):
        send(changed, revision="v1")
    with pytest.raises(HubError, match="a pull request is made against main"):
        send(changed, revision="wide", create_pr=True)


def test_names_and_who_may(server: HubServer, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert send(adapter, "films").repo_id == REPO
    with pytest.raises(HubError, match=r"films: the Hub does not know who asks \(HTTP 401\); log in .* HF_TOKEN"):
        send(adapter, "films", token="hub_wrong")
    with pytest.raises(HubError, match=r"films: the Hub must know who asks; log in .* HF_TOKEN"):
        send(adapter, "films", token=None)
    with pytest.raises(HubError, match=r"me/new: not allowed \(HTTP 403\); use a token that may write there"):
        send(adapter, "me/new", token=READ)
    with pytest.raises(HubError, match=r"me/films: not allowed \(HTTP 403\)"):  # private: for others it does not exist
        send(adapter, token=OTHER)
    with pytest.raises(HubError, match=r"expected namespace/name"):
        send(adapter, "me/films/again")
    for token in (False, OTHER):
        with pytest.raises(HubError, match=r"me/films: no such repository, or not for who asks \(HTTP 40[14]\)"):
            pull(REPO, token=token)
    with pytest.raises(HubError, match="no such revision; expected a branch, a tag or a commit"):
        pull(REPO, "v9", token=READ)
    capsys.readouterr()
    server.repos[REPO].private = False
    send(adapter)
    assert capsys.readouterr().err == "me/films: is there already, and public: everyone will see this push\n"
    send(adapter, "me/open", private=False)
    assert not server.repos["me/open"].private
    assert server.files(REPO) == server.files("me/open") == contents_of(adapter)


def test_the_environment_is_respected(server: HubServer, adapter: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from peftrec import hub
if sys.argv[1] == "push":
    done = hub.push({str(adapter)!r}, "me/films", reload_check=lambda folder: None)
    print(done.url)
print(hub.pull("me/films"))
"""

    def run(verb: str, **environment: str) -> subprocess.CompletedProcess[str]:
        settings = {"HF_ENDPOINT": server.url, "HF_TOKEN": WRITE, "HF_HOME": str(tmp_path / "home")}
        settings |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **environment}
        command = [sys.executable, "-c", code, verb]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings})

    done = run("push")
    assert done.returncode == 0, done.stderr
    url, folder = done.stdout.split()
    assert url == f"{server.url}/me/films"
    assert Path(folder).is_relative_to(tmp_path / "home")
    server.log.clear()
    offline = run("pull", HF_HUB_OFFLINE="1")
    assert (offline.stdout.strip(), server.log) == (folder, []), offline.stderr
    elsewhere = run("pull", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "other"))
    assert "main was not pulled here before, and HF_HUB_OFFLINE is set; unset it" in elsewhere.stderr
    refused = run("push", HF_HUB_OFFLINE="1")
    assert "HubError: push: HF_HUB_OFFLINE is set; expected a connection to the Hub; unset it" in refused.stderr


def test_pull_into_a_folder(server: HubServer, adapter: Path, tmp_path: Path) -> None:
    server.put(REPO, {**contents_of(adapter), "LICENSE": b"text", "notes/plan.txt": b"later"})
    folder = pull(REPO, local_dir=tmp_path / "mine")
    assert folder == tmp_path / "mine"
    assert contents_of(folder) == contents_of(adapter)
    assert not (folder / "LICENSE").exists()
    assert check_folder(folder) == []  # what the client keeps beside the files is no obstacle to a push
    assert send(folder, "me/copy").changed


# --- the doors before sending -----------------------------------------------------------------------------------------


def test_nothing_is_sent_if_the_adapter_does_not_load_back(server: HubServer, adapter: Path) -> None:
    def refuse(folder: Path) -> None:
        raise HubError(f"{folder.name}: off")

    with pytest.raises(HubError, match="adapter: off"):
        send(adapter, reload_check=refuse)
    (adapter / "trained.pt").write_bytes(b"\x80")
    with pytest.raises(HubError, match=r"trained\.pt: a format that can run code"):
        send(adapter)
    assert (server.repos, [line for line in server.log if "harnesses" not in line]) == ({}, [])


def test_a_card_that_the_hub_refuses(server: HubServer, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (adapter / "README.md").write_text("---\nmodel-index: 3\n---\n")
    with pytest.raises(HubError, match=r"README.md: metadata: .*; render the card again"):
        send(adapter)
    assert not server.repos
    (adapter / "README.md").write_text("---\nlicense: mit\n? x\n: y\n---\n")  # YAML, but not to this Hub's taste
    with pytest.raises(HubError, match=r"^me/films: Invalid metadata in README.md. - bad indentation .*: \? x [^\n]*$"):
        send(adapter)
    assert server.files(REPO) == {}
    (adapter / "README.md").write_text("# Films\n")
    capsys.readouterr()
    assert send(adapter).changed
    assert "empty or missing yaml metadata in repo card" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("repo_id", "how", "message"),
    [
        ("file:{}/site", {"tag": "v1"}, "a folder has no revisions, tags or pull requests"),
        ("file:{}/site", {"revision": "x"}, "a folder has no revisions, tags or pull requests"),
        ("file:{}/site", {"create_pr": True}, "a folder has no revisions, tags or pull requests"),
        ("file:{}", {}, "holds other things than an adapter"),
        (REPO, {"create_pr": True, "revision": "x"}, "a pull request is made against main"),
        (REPO, {}, "push: HF_HUB_OFFLINE is set"),
    ],
)
def test_what_is_refused_anyway_waits_for_no_reload(
    adapter: Path, tmp_path: Path, repo_id: str, how: dict[str, Any], message: str
) -> None:
    """The environment of these tests is offline: HF_HUB_OFFLINE is set."""
    with pytest.raises(HubError, match=message):
        send(adapter, repo_id.format(tmp_path), reload_check=lambda _: pytest.fail("was loaded"), **how)


def test_what_the_reload_found_is_told(server: HubServer, adapter: Path, tmp_path: Path) -> None:
    for target in (REPO, f"file:{tmp_path / 'site'}"):
        for how in ({"dry_run": True}, {"confirm": lambda plan: False}, {}, {}):
            done = send(adapter, target, reload_check=lambda _: 0.25, **how)
            assert (done.off, done.probes) == (0.25, 1)
        unchecked = send(adapter, target)
        assert (unchecked.off, unchecked.probes) == (None, 0)


# --- faults -----------------------------------------------------------------------------------------------------------

STEPS = {
    "find": rf"GET /api/models/{REPO}$",
    "make": "POST /api/repos/create",
    "head": "GET .*/revision/main",
    "tree": "GET .*/tree/",
    "card": "POST /api/validate-yaml",
    "preupload": "POST .*/preupload/main",
    "batch": "POST .*/objects/batch",
    "upload": "PUT /lfs/",
    "verify": "POST /lfs/.*/verify",
    "commit": "POST .*/commit/main",
    "metadata": "HEAD .*/resolve/",
    "download": "GET .*/resolve/",
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "fault",
    [{"status": 429, "headers": {"Retry-After": "7"}}, {"status": 503}, {"cut_request": 100}, {"lose_answer": True}],
    ids=["429", "503", "cut", "lost"],
)
def test_every_step_is_tried_again(
    server: HubServer,
    adapter: Path,
    slept: list[float],
    step: str,
    fault: dict[str, Any],
) -> None:
    once = (step, fault) == ("commit", {"lose_answer": True})  # what was done is not asked for again
    server.fail(STEPS[step], times=1 if once else 2, **fault)
    done = send(adapter)
    assert server.faults == []
    assert done.changed
    assert server.files(REPO) == contents_of(adapter)
    assert server.commits(REPO)[1:] == ["initial commit"]  # one commit, also where the answer to it was lost
    if fault.get("status") == 429:
        assert min(slept) >= 7
    assert slept


@pytest.mark.parametrize("fault", [{"status": 503}, {"cut_request": 50}], ids=["503", "cut"])
def test_a_hub_that_stays_down_leaves_the_old_revision(
    server: HubServer,
    adapter: Path,
    changed: Path,
    slept: list[float],
    capsys: pytest.CaptureFixture[str],
    fault: dict[str, Any],
) -> None:
    first = send(adapter)
    server.fail("POST .*/commit/", times=1000, **fault)
    with pytest.raises(HubError, match=r"^me/films: .*(HTTP 503|connection lost).*try again[^\n]*$"):
        send(changed)
    assert server.repos[REPO].branches["main"] == first.commit
    assert slept == [1, 2, 4, 8, 16]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert all(line.startswith("me/films: ") and "; trying again in " in line for line in lines)
    assert lines[-1].endswith("in 16 s (6 of 6)")


def test_a_wait_that_is_too_long_is_not_waited(server: HubServer, adapter: Path, slept: list[float]) -> None:
    server.fail("POST /api/repos/create", status=429, headers={"Retry-After": "4000"})
    with pytest.raises(HubError, match=r"the Hub answers HTTP 429 .*; try again later"):
        send(adapter)
    assert slept == []


def test_a_lost_answer_to_a_pull_request_is_one_pull_request(server: HubServer, adapter: Path, changed: Path) -> None:
    send(adapter)
    server.fail("POST .*/commit/", lose_answer=True)
    done = send(changed, create_pr=True)
    assert (done.revision, done.pr_url) == ("refs/pr/1", f"{server.url}/{REPO}/discussions/1")
    assert list(server.repos[REPO].pulls.values()) == [done.commit]
    assert server.files(REPO, "refs/pr/1") == contents_of(changed)


def test_lost_answers_to_branch_and_tag(server: HubServer, adapter: Path) -> None:
    server.fail("POST .*/branch/", lose_answer=True)
    server.fail("POST .*/tag/", lose_answer=True)
    done = send(adapter, revision="wide", tag="v1")
    assert server.repos[REPO].tags == {"v1": done.commit}
    assert server.files(REPO, "wide") == contents_of(adapter)


def test_somebody_else_commits_meanwhile(server: HubServer, adapter: Path, changed: Path) -> None:
    send(adapter)
    server.fail("POST .*/commit/", before=lambda: server.put(REPO, {"README.md": b"theirs"}) and None)
    with pytest.raises(HubError, match=r"somebody committed \w{40} to main meanwhile; .*nothing was published") as told:
        send(changed)
    theirs = server.repos[REPO].branches["main"]
    assert theirs in str(told.value)
    assert server.files(REPO) == {**contents_of(adapter), "README.md": b"theirs"}
    assert send(changed).changed
    assert server.files(REPO) == contents_of(changed)


def test_somebody_else_commits_between_two_attempts(server: HubServer, adapter: Path, changed: Path) -> None:
    send(adapter)
    server.fail("POST .*/commit/", status=503, before=lambda: server.put(REPO, {"README.md": b"theirs"}) and None)
    with pytest.raises(HubError, match="somebody committed"):
        send(changed)
    assert server.files(REPO) == {**contents_of(adapter), "README.md": b"theirs"}


@pytest.mark.parametrize("status", [401, 403, 404])
@pytest.mark.parametrize("step", ["preupload", "batch", "upload", "commit"])
def test_a_refusal_is_final(
    server: HubServer, adapter: Path, changed: Path, slept: list[float], step: str, status: int
) -> None:
    first = send(adapter)
    slept.clear()
    server.fail(STEPS[step], status=status, times=1000)
    with pytest.raises(HubError, match=rf"^me/films: [^\n]*\(?HTTP {status}[^\n]*$"):
        send(changed)
    assert slept == []
    assert server.repos[REPO].branches["main"] == first.commit


def test_published_but_not_read_back(server: HubServer, adapter: Path) -> None:
    server.fail("HEAD .*/resolve/", status=403, times=1000)
    with pytest.raises(HubError, match=r"me/films: published as \w{40}, but not read back: not allowed"):
        send(adapter)
    assert server.files(REPO) == contents_of(adapter)


def test_what_comes_back_must_be_what_was_sent(server: HubServer, adapter: Path) -> None:
    def spoil() -> None:
        oid = server.repos[REPO].branches["main"]
        commit = server.repos[REPO].commits[oid]
        blob = dataclasses.replace(commit.files["README.md"], content=b"# other")
        server.repos[REPO].commits[oid] = dataclasses.replace(commit, files={**commit.files, "README.md": blob})

    server.fail("HEAD .*/resolve/", before=spoil)
    with pytest.raises(HubError, match=r"README.md of \w+ has sha256 \w+; expected \w+; it is published"):
        send(adapter)


def test_a_hub_without_xet(
    server: HubServer, adapter: Path, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(HubError, match=r"me/films: .*404 Not Found.*; for a Hub without Xet set HF_HUB_DISABLE_XET=1$"):
        send(adapter)
    assert (slept, server.files(REPO)) == ([], {})


def test_slow_bytes_and_cut_downloads(server: HubServer, adapter: Path, tmp_path: Path) -> None:
    send(adapter)
    server.fail("GET .*/resolve/.*safetensors", delay=0.01, piece=2000)
    server.fail("GET .*/resolve/.*safetensors", cut_answer=5000)
    for name in ("slow", "cut"):
        folder = pull(REPO, token=WRITE, local_dir=tmp_path / name, cache_dir=tmp_path / f"cache-{name}")
        assert contents_of(folder) == contents_of(adapter)
    assert server.faults == []


@pytest.mark.parametrize(
    "fault",
    [{"status": 429, "headers": {"Retry-After": "1"}}, {"status": 503}, {"lose_answer": True}],
    ids=["429", "503", "lost"],
)
@pytest.mark.parametrize("step", ["head", "tree", "metadata", "download"])
def test_a_pull_is_tried_again(server: HubServer, adapter: Path, step: str, fault: dict[str, Any]) -> None:
    server.put(REPO, contents_of(adapter))
    server.fail(STEPS[step], times=2, **fault)
    folder = pull(REPO)
    assert {path: (folder / path).read_bytes() for path in contents_of(adapter)} == contents_of(adapter)
    assert server.faults == []


def test_pushes_under_random_faults(server: HubServer, tmp_path: Path) -> None:
    """Each ends published whole, or leaves what was there; nobody ever sees a half, and no commit is made twice.

    PEFTREC_PUSHES=200 makes it the measurement that docs/publishing.md tells of.
    """
    pushes = int(os.environ.get("PEFTREC_PUSHES", 40))
    rng = random.Random(5)
    versions = [contents_of(write_adapter(tmp_path / str(value), value)) for value in range(4)]
    whole = [*versions, {}]
    halves: list[str] = []  # what a request found, by whomever: the server's threads cannot fail the test
    rate = 0.0

    def there() -> dict[str, bytes]:
        return server.files(REPO) if REPO in server.repos else {}

    def draw(request: str) -> Fault | None:
        if there() not in whole:
            halves.append(request)
        if rng.random() >= rate:
            return None
        return rng.choice(
            [
                Fault("", status=429, headers={"Retry-After": "1"}),
                Fault("", status=503),
                Fault("", status=403),
                Fault("", cut_request=rng.choice([0, 10, 1000])),
                Fault("", lose_answer=True),
                Fault("", cut_answer=rng.choice([0, 20])),
            ]
        )

    server.draw = draw
    outcomes: dict[str, int] = dict.fromkeys(("published", "not at all", "published, not read back", "no answer"), 0)
    for number in range(pushes):
        value, before = number % len(versions), there()
        rate = rng.choice([0.02, 0.1, 0.4])
        try:
            done = send(tmp_path / str(value))
        except HubError as error:
            said = str(error).startswith(f"{REPO}: published as ")
            assert there() == versions[value] if said else there() in (before, versions[value])
            kept = "not at all" if there() == before else "no answer"  # its last attempt may have arrived all the same
            outcomes["published, not read back" if said else kept] += 1
        else:
            assert there() == versions[value]
            assert done.changed == (before != versions[value])
            outcomes["published"] += 1
    assert halves == []
    assert sum(outcomes.values()) == pushes
    print(f"{pushes} pushes: {outcomes}, half-published: {len(halves)}")
    assert min(outcomes["published"], outcomes["not at all"], outcomes["published, not read back"]) > pushes // 20
    repo, history = server.repos[REPO], [server.files(REPO)]
    oid = repo.commits[repo.branches["main"]].parent
    while oid is not None:
        history.append(server.files(REPO, oid))
        oid = repo.commits[oid].parent
    assert history[-1] == {}
    assert all(one in versions for one in history[:-1])
    assert all(one != older for one, older in itertools.pairwise(history))


# --- folders as targets -----------------------------------------------------------------------------------------------


def test_a_folder_as_target(adapter: Path, changed: Path, tmp_path: Path) -> None:
    target = tmp_path / "site" / "films"
    done = send(adapter, f"file:{target}")
    assert (done.changed, done.commit, done.revision, done.url) == (True, None, None, target.as_uri())
    assert contents_of(target) == contents_of(adapter)
    moment = (target / "README.md").stat().st_mtime_ns
    assert not send(adapter, f"file:{target}").changed
    assert (target / "README.md").stat().st_mtime_ns == moment
    (changed / "figures" / "calibration.png").unlink()
    assert send(changed, f"file:{target}").changed
    assert contents_of(target) == contents_of(changed)
    assert pull(f"file:{target}") == target
    assert [path.name for path in target.parent.iterdir()] == ["films"]
    with pytest.raises(HubError, match="a folder has no revisions"):
        send(adapter, f"file:{target}", tag="v1")


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("links", [True, False])
def test_what_git_keeps_in_a_folder_stays(
    adapter: Path, changed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, links: bool
) -> None:
    """A clone of a repository of the Hub is the usual case of a target that is a folder."""
    if not exchange:
        monkeypatch.setattr("peftrec.folders._exchange", lambda new, target: False)
    if not links:
        monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError(18, "no links here")))
    target = tmp_path / "clone"
    git = ["git", "-C", str(target), "-c", "user.name=Ann", "-c", "user.email=ann@example.org"]
    target.mkdir()
    subprocess.run([*git, "init", "-q"], check=True)
    (target / ".gitattributes").write_text("*.safetensors -text\n")
    assert send(adapter, f"file:{target}").changed  # a clone of an empty repository
    (target / ".gitignore").symlink_to(".git/info/exclude")
    (target / ".cache" / "huggingface").mkdir(parents=True)
    (target / ".cache" / "huggingface" / "x.lock").write_text("kept")
    (target / ".cache" / "old").symlink_to("nowhere")
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    assert send(changed, f"file:{target}", dry_run=True).difference.deleted == {}
    assert send(changed, f"file:{target}").changed
    assert pull(f"file:{changed}", local_dir=target) == target
    assert contents_of(target) == contents_of(changed)
    listed = subprocess.run([*git, "diff", "--name-only"], check=True, capture_output=True, text=True).stdout
    differing = {path for path, content in contents_of(adapter).items() if contents_of(changed)[path] != content}
    assert set(listed.split()) == differing
    subprocess.run([*git, "fsck", "--strict"], check=True, capture_output=True)
    assert (target / ".cache" / "old").readlink() == Path("nowhere")
    assert (target / ".gitignore").readlink() == Path(".git/info/exclude")
    assert (target / ".gitattributes").read_text() == "*.safetensors -text\n"
    assert (target / ".cache" / "huggingface" / "x.lock").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "changed", "clone"]


@pytest.mark.parametrize("exchange", [True, False])
def test_an_interrupted_write_leaves_the_old_folder(
    adapter: Path, changed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    target = tmp_path / "films"
    send(adapter, f"file:{target}")
    if not exchange:
        monkeypatch.setattr("peftrec.folders._exchange", lambda new, target: False)
    full = OSError(28, "No space left on device")
    rename, copy = Path.rename, folders.shutil.copyfile

    def failing(self: Path, to: Path) -> Path:
        if self.name == "new":
            raise full
        return rename(self, to)

    def stuck(source: Path, to: Path) -> None:
        if source.name == "tokenizer.json":
            raise full
        copy(source, to)

    if exchange:
        monkeypatch.setattr("peftrec.folders.shutil.copyfile", stuck)
    else:
        monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(HubError, match=r"films: cannot be written \(No space left on device\); choose another folder"):
        send(changed, f"file:{target}")
    assert contents_of(target) == contents_of(adapter)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "changed", "films"]
    monkeypatch.undo()
    if not exchange:
        monkeypatch.setattr("peftrec.folders._exchange", lambda new, target: False)
    assert send(changed, f"file:{target}").changed
    assert contents_of(target) == contents_of(changed)


def test_ctrl_c_between_two_renames(
    adapter: Path, changed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "films"
    send(adapter, f"file:{target}")
    rename = Path.rename

    def interrupted(self: Path, to: Path) -> Path:
        if self.name == "new":
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr("peftrec.folders._exchange", lambda new, target: False)
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        send(changed, f"file:{target}")
    assert contents_of(target) == contents_of(adapter)


def test_a_folder_with_other_things_is_not_replaced(adapter: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years")
    with pytest.raises(HubError, match=r"holds other things than an adapter \(thesis.tex\); choose another folder"):
        send(adapter, f"file:{home}")
    assert [path.name for path in home.iterdir()] == ["thesis.tex"]
    with pytest.raises(HubError, match=r"thesis\.tex: not a folder"):
        send(adapter, f"file:{home / 'thesis.tex'}")


# --- the reload -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_adapter(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter on a tiny model, with the answers that it gives."""
    from test_recommender import save_adapter

    from peftrec import reload

    folder = save_adapter(tiny_llama_folder, tmp_path_factory.mktemp("real") / "adapter")
    probes = [Probe([("Heat (1995)", 1)], "Babe (1995)", 0.0), Probe([], "187", 0.0)]
    about = dataclasses.replace(artifact.read(folder), probes=probes)
    prior = artifact.read_prior(folder, about)
    artifact.write(folder, about, prior)
    scores = reload.scores(folder, tiny_llama_folder)
    answered = [dataclasses.replace(probe, score=score) for probe, score in zip(probes, scores, strict=True)]
    artifact.write(folder, dataclasses.replace(about, probes=answered), prior)
    return folder


def test_a_fresh_process_gets_the_recorded_scores(real_adapter: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    about = artifact.read(real_adapter)
    scores = [probe.score for probe in about.probes]
    assert abs(scores[0] - scores[1]) > 1e-2
    assert hub.check_reload(real_adapter, base_model=tiny_llama_folder) <= 1e-5
    prior = artifact.read_prior(real_adapter, about)
    off = [about.probes[0], dataclasses.replace(about.probes[1], score=scores[1] + 0.01)]
    artifact.write(real_adapter, dataclasses.replace(about, probes=off), prior)
    try:
        with pytest.raises(HubError, match=r"the scores are up to 0\.01 off those in peftrec\.json; expected at most"):
            hub.check_reload(real_adapter, base_model=tiny_llama_folder)
        with pytest.raises(HubError, match=r"does not load in a fresh process: .*nowhere"):
            hub.check_reload(real_adapter, base_model=tmp_path / "nowhere")
        artifact.write(real_adapter, dataclasses.replace(about, probes=[]), prior)
        with pytest.raises(HubError, match=r"no probes, which .* --config .*config\.yaml --overwrite$"):
            hub.check_reload(real_adapter)
    finally:
        artifact.write(real_adapter, about, prior)


def test_push_reloads_by_default_and_pulled_scores_are_equal(
    server: HubServer, real_adapter: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftrec import reload

    asked: list[Path] = []
    monkeypatch.setattr(hub_push, "check_reload", asked.append)
    push(real_adapter, REPO, token=WRITE)
    assert asked == [real_adapter]
    folder = pull(REPO, token=WRITE)
    found = reload.scores(folder, tiny_llama_folder)
    assert found == pytest.approx([probe.score for probe in artifact.read(real_adapter).probes], abs=1e-6)
