"""push, pull, info and list as commands, and the plan that a push shows before it writes anything."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_helpers import ABOUT, CARD, REPO, contents_of, send, write_adapter
from hub_server import OTHER, WRITE, HubServer
from huggingface_hub import HfApi
from test_card import finished

from peftrec import artifact, card, cli, hub, hub_push
from peftrec.errors import HubError

HASHED = ("adapter_model.safetensors", "peftrec.json")
METRICS = """---
license: mit
base_model: ns/tiny
model-index:
- name: films
  results:
  - task: {type: click-prediction}
    metrics:
    - {type: auc, value: 0.75, name: AUC}
    - {type: auc, value: 0.5, name: AUC (cold_item)}
    - {type: odd, value: .nan}
---
# Films\x1b[31m
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """One command by somebody who may write, without the reload: exit code, stdout and stderr."""
    monkeypatch.setattr(hub, "check_reload", lambda folder, base_model: 2.5e-7)

    def run(*words: Any, token: str = WRITE, answer: str | None = None) -> tuple[int, str, str]:
        monkeypatch.setenv("HF_TOKEN", token)
        stdin = type("Stdin", (), {"isatty": lambda _: answer is not None, "readline": lambda _: answer})()
        monkeypatch.setattr("sys.stdin", stdin)
        code = cli.main(list(map(str, words)))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def writes(server: HubServer) -> list[str]:
    return [line for line in server.log if not line.startswith(("GET", "HEAD")) and "validate-yaml" not in line]


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing(server: HubServer, adapter: Path, tmp_path: Path) -> None:
    plan = send(adapter, dry_run=True, tag="v1", revision="wide")
    assert (writes(server), server.repos) == ([], {})
    sizes = {path: len(data) for path, data in contents_of(adapter).items()}
    assert (plan.difference.added, plan.difference.changed, plan.difference.deleted) == (sizes, {}, {})
    assert (plan.dry_run, plan.changed, plan.private, plan.commit, plan.tag) == (True, True, True, None, "v1")
    done = send(adapter)
    assert (done.dry_run, done.difference) == (False, plan.difference)
    server.put(REPO, {"vocab.txt": b"old", "NOTES.md": b"mine"})
    server.log.clear()
    changed = write_adapter(tmp_path / "changed", 1)
    plan = send(changed, dry_run=True, private=False)
    assert writes(server) == []
    assert plan.private is True  # what is there stays what it is
    assert plan.commit == server.repos[REPO].branches["main"]
    assert set(plan.difference.changed) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "peftrec.json",
    }
    assert (plan.difference.added, plan.difference.deleted) == ({}, {"vocab.txt": 3})
    assert send(changed).difference == plan.difference
    assert not send(changed, dry_run=True).changed


def test_a_dry_run_finds_what_a_push_would(server: HubServer, adapter: Path) -> None:
    send(adapter, tag="v1")
    (adapter / "README.md").write_text(CARD + "more\n")
    with pytest.raises(HubError, match="tag v1 is on"):
        send(adapter, tag="v1", dry_run=True)
    with pytest.raises(HubError, match="v1 is a tag or a commit"):
        send(adapter, revision="v1", dry_run=True)
    (adapter / "README.md").write_text("---\nlicense: mit\n? x\n: y\n---\n")
    with pytest.raises(HubError, match=r"Invalid metadata in README\.md"):
        send(adapter, dry_run=True)
    with pytest.raises(HubError, match=r"a/b/c: expected namespace/name of a model on the Hub"):
        send(adapter, "a/b/c", dry_run=True)


def test_the_plan_of_a_folder(adapter: Path, tmp_path: Path) -> None:
    target = f"file:{tmp_path / 'site'}"
    plan = send(adapter, target, dry_run=True)
    assert not (tmp_path / "site").exists()
    assert plan.difference == send(adapter, target).difference
    (adapter / "figures" / "calibration.png").unlink()
    plan = send(adapter, target, confirm=lambda plan: False)
    assert plan.difference.deleted == {"figures/calibration.png": 48}
    assert (tmp_path / "site" / "figures" / "calibration.png").exists()


# --- commands ---------------------------------------------------------------------------------------------------------


def test_push_asks_first(server: HubServer, adapter: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run("push", adapter, REPO)
    assert (code, out, server.log) == (2, "", [])
    assert err == "push: nobody to ask before publishing; expected a terminal; add --yes, or --dry-run\n"
    code, out, err = run("push", adapter, REPO, answer="n\n")
    assert (code, out, server.repos) == (0, "nothing was published\n", {})
    assert f"{server.url}/{REPO}, main (private)\n  added           " in err
    assert err.endswith("publish this? [y/N] ")
    code, out, err = run("push", adapter, REPO, "--public", "--tag", "v1", "--message", "First", answer="y\n")
    commit = server.repos[REPO].branches["main"]
    assert out == f"{server.url}/{REPO}: published as {commit} of main, tagged v1, read back and equal\n"
    assert "(public: everyone will see it)" in err
    assert not server.repos[REPO].private
    first = server.commits(REPO)[0]
    told = [f"{hashlib.sha256((adapter / name).read_bytes()).hexdigest()} {name}" for name in HASHED]
    assert first == "\n".join(["First\n\nReload check: 1 probes in a fresh process, at most 2.5e-07 off", *told])
    code, out, err = run("push", adapter, REPO, answer="n\n")  # there is nothing to ask about
    assert (code, out) == (0, f"{server.url}/{REPO}: everything was there already ({commit})\n")


def test_push_without_questions(server: HubServer, adapter: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = run("push", adapter, REPO, "--dry-run")
    assert (code, writes(server)) == (0, [])
    assert out.splitlines()[0] == f"{server.url}/{REPO}, main (private)"
    assert "  added           16,460 bytes  adapter_model.safetensors" in out.splitlines()
    (adapter / "README.md").write_text(CARD + "ann@uni.edu")
    code, _, err = run("push", adapter, REPO, "--yes")
    assert (code, err) == (2, "README.md: an e-mail address, 'ann@uni.edu'; remove it, or allow it\n")
    code, out, _ = run("push", adapter, REPO, "--yes", "--json", "--create-pr", "--allow", "ann@uni.edu")
    assert (code, json.loads(out)["pr_url"]) == (0, f"{server.url}/{REPO}/discussions/1")
    assert (json.loads(out)["off"], json.loads(out)["probes"]) == (2.5e-7, 1)
    assert server.repos[REPO].private
    code, _, err = run("push", adapter, "me/new", "--yes", "--allow", "ann@uni.edu", token="hub_wrong")
    assert (code, err.count("\n")) == (2, 1)
    assert "the Hub does not know who asks (HTTP 401); log in" in err


def test_a_pushed_card_names_its_repository(
    server: HubServer, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    mine = finished(tmp_path, {"license": "mit"})
    write_adapter(tmp_path / "whole")
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"):
        shutil.copyfile(tmp_path / "whole" / name, mine / "adapter" / name)
    shutil.rmtree(mine / "figures")
    page = card.write(mine)
    page.write_text(page.read_text() + "\nI like films.\n")
    before = page.read_text()
    assert REPO not in before
    for words in ((REPO, "--dry-run"), (f"file:{tmp_path / 'site'}", "--yes")):
        code, _, err = run("push", mine, *words)
        assert code == 0, err
        assert page.read_text() == before, words
    assert run("push", mine, REPO, "--yes")[0] == 0
    sent = server.files(REPO)["README.md"].decode()
    assert sent == page.read_text() == card.card_of(mine, repo_id=REPO)
    assert f'from_pretrained("{REPO}")' in sent
    assert sent.endswith("\nI like films.\n")
    code, out, _ = run("push", mine, REPO, "--yes")
    assert (code, "everything was there already" in out) == (0, True)


def test_a_card_of_somebody_else_is_pushed_as_it_is(
    server: HubServer, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    mine = write_adapter(tmp_path / "adapter").parent
    (mine / "run.json").write_text("{}")
    assert run("push", mine, REPO, "--yes")[0] == 0
    assert server.files(REPO) == contents_of(mine / "adapter")


def test_pull_prints_the_folder(
    server: HubServer, adapter: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    send(adapter, tag="v1")
    code, out, _ = run("pull", REPO, "--revision", "v1", "--output", tmp_path / "mine")
    assert (code, out) == (0, f"{tmp_path / 'mine'}\n")
    assert contents_of(tmp_path / "mine") == contents_of(adapter)
    code, out, err = run("pull", REPO, token=OTHER)
    assert (code, out, err.count("\n")) == (2, "", 1)
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    code, _, err = run("pull", REPO, "--output", tmp_path / "mine")
    assert (code, (tmp_path / "mine" / "thesis.tex").read_text()) == (2, "years")
    assert "holds other things than an adapter (thesis.tex)" in err


def test_info(server: HubServer, adapter: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    assert run("push", adapter, REPO, "--yes")[0] == 0
    commit = server.put(REPO, {"README.md": METRICS.encode()})  # by hand: no reload check is told of this commit
    (adapter / "README.md").write_text(METRICS)
    server.log.clear()
    code, out, err = run("info", REPO)
    assert (code, err) == (0, "")
    lines = [line.strip() for line in out.splitlines()]
    assert lines[0] == f"{REPO} at {commit[:12]}, private"
    for line in (
        "task      click: whether an item is liked (no/yes; head: tokens)",
        "base      ns/tiny, 0 M parameters, float32, weights ffffffffffff",
        "wants     a history of items with answers; of items: item_id, title; up to 64 tokens (timeline)",
        "checked   when it was pushed: 1 probes in a fresh process, at most 2.5e-07 off",
        "metrics   auc 0.75",
        "license   mit",
    ):
        assert line in lines, line
    assert "\x1b" not in out
    assert not [line for line in server.log if "/resolve/" in line and "safetensors" in line]  # weights stay there
    code, out, _ = run("info", REPO, "--json")
    facts = json.loads(out)
    assert (facts["metrics"], facts["reload_check"], facts["probes"]) == ({"auc": 0.75}, 2.5e-7, 1)
    assert facts["needs"]["items"] == ["item_id", "title"]
    code, out, _ = run("info", adapter)
    assert "1 probes to check it by; nothing is known of a check" in out
    about = artifact.read(adapter)
    assert hub.info(adapter).files == {path: len(data) for path, data in contents_of(adapter).items()}
    assert hub.info(f"file:{adapter}").about == about == hub.info(REPO).about
    for words in (
        ("nobody/nothing",),
        ("films",),
        (tmp_path / "nowhere" / "x",),
        (REPO, "--revision", "v9"),
        (adapter, "--revision", "x"),
    ):
        code, out, err = run("info", *words)
        assert (code, out, err.count("\n")) == (2, "", 1), words


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own, on upload_file
def test_a_check_is_of_the_files_that_are_there(server: HubServer, adapter: Path, tmp_path: Path) -> None:
    """Whoever changes weights, questions, tokenizer or configuration afterwards has no part in it."""
    api = HfApi(server.url, WRITE)
    send(adapter, reload_check=lambda _: 2.5e-7)
    description = api.list_repo_commits(REPO)[0].message
    assert "Reload check: 1 probes" in description
    assert hub.info(REPO, token=WRITE).reload_check == 2.5e-7

    def upload(path: str, content: bytes, told: str = description) -> None:
        (tmp_path / "new").write_bytes(content)
        api.upload_file(
            path_or_fileobj=tmp_path / "new",
            path_in_repo=path,
            repo_id=REPO,
            commit_message="x",
            commit_description=told,
        )

    other = contents_of(write_adapter(tmp_path / "other", 1))
    for path in ("adapter_model.safetensors", "peftrec.json"):
        upload(path, other[path])
        found = hub.info(REPO, token=WRITE)
        assert found.reload_check is None, path
        assert any(
            line.endswith("checked   1 probes to check it by; nothing is known of a check") for line in found.lines()
        )
        upload(path, contents_of(adapter)[path])
        assert hub.info(REPO, token=WRITE).reload_check == 2.5e-7, path
    server.put(REPO, {"README.md": METRICS.encode(), "NOTES.md": b"mine"})
    assert hub.info(REPO, token=WRITE).reload_check == 2.5e-7
    for path in ("adapter_config.json", "vocab.txt"):
        server.put(REPO, {path: other.get(path, b"other words")})
        assert hub.info(REPO, token=WRITE).reload_check is None, path
        send(adapter, reload_check=lambda _: 5e-7)
        assert hub.info(REPO, token=WRITE).reload_check == 5e-7
    upload("NOTES.md", b"x", "Reload check: 99 probes in a fresh process, at most 0.0e+00 off")
    assert hub.info(REPO, token=WRITE).reload_check == 5e-7


@pytest.mark.parametrize("name", ["films", "a/b/c", "me/fi lms"])
def test_a_name_without_an_owner(name: str) -> None:
    with pytest.raises(HubError, match=f"^{name}: expected a folder, or namespace/name, such as me/films"):
        hub.info(name)
    with pytest.raises(HubError, match=f"^{name}: expected namespace/name or file:FOLDER, such as me/films"):
        hub.pull(name)


def test_info_trusts_nobody(server: HubServer, adapter: Path) -> None:
    files = contents_of(adapter)
    for name, content, message in (
        ("adapter_model.bin", b"", "can run code"),
        ("peftrec.json", b"[" * 100_000, "not JSON"),
        ("adapter_config.json", b'{"auto_map": {"a": "b"}}', "names code to run"),
        ("README.md", b"---\nmodel-index: {a: [1, {results: 5}]}\nlicense: [x]\n---\n", None),
    ):
        server.put("evil/x", {**files, name: content})
        if message is None:
            del server.repos["evil/x"]
            server.put("evil/x", {**files, name: content})
            assert hub.info("evil/x").metrics == {}
            continue
        with pytest.raises(HubError, match=message):
            hub.info("evil/x")
        del server.repos["evil/x"]


def test_list(server: HubServer, adapter: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    for number in range(3):  # more than fit on one page of this server
        send(adapter, f"me/films-{number}", private=number == 0)
    server.put("me/other", {"README.md": b"# a model of another kind"})
    code, out, _ = run("list", "me")
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["me/films-0", "private"],
        ["me/films-1", "public"],
        ["me/films-2", "public"],
    ]
    code, out, _ = run("list", "me", "--json", token=OTHER)
    assert [one["repo_id"] for one in json.loads(out)] == ["me/films-1", "me/films-2"]
    assert run("list", "nobody")[1] == "nobody: no adapters that peftrec pushed, or none for who asks\n"


def test_verbs_without_a_connection(adapter: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    """The environment of these tests is offline: HF_HUB_OFFLINE is set."""
    for words in (("push", adapter, REPO, "--yes"), ("info", REPO), ("list", "me"), ("pull", REPO)):
        code, out, err = run(*words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "HF_HUB_OFFLINE is set" in err


def test_a_run_is_found_by_its_folder(server: HubServer, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "run" / "adapter")
    assert hub_push.adapter_folder(tmp_path / "run") == tmp_path / "run" / "adapter"
    assert hub_push.adapter_folder(adapter) == adapter
    assert hub.info(tmp_path / "run").about.data == ABOUT.data
    with pytest.raises(HubError, match="no such folder; expected RUN/adapter of a finished run"):
        send(tmp_path / "nothing")


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_does_what_it_says(
    server: HubServer,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[..., tuple[int, str, str]],
) -> None:
    """Every command of docs/publishing.md in its order, then its Python."""
    page = (Path(__file__).parents[1] / "docs" / "publishing.md").read_text(encoding="utf-8")
    shutil.copytree(adapter, tmp_path / "here" / "runs" / "films" / "adapter")
    monkeypatch.chdir(tmp_path / "here")
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.S | re.M)
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert {words[1] for words in commands} == {"push", "pull", "info", "list"}
    for words in commands:
        assert run(*words[1:])[0] == 0, words
    assert contents_of(Path("films")) == contents_of(Path("mine")) == contents_of(adapter) == server.files(REPO, "v1")
    monkeypatch.setattr(hub_push, "check_reload", lambda folder: 0.0)
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    exec(compile(code, "page", "exec"), {})
    assert len(server.commits(REPO)) == 2  # there already
