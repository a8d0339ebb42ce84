"""Recommenders from the Hub, by its own client in processes of their own, against a server in this one."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import READ, HubServer
from samples import FILMS
from test_recommender import save_adapter

from peftrec import artifact, contents, hub, loading
from peftrec.errors import HubError, ModelError
from peftrec.recommender import Recommender

BASE, REPO = "me/tiny", "me/films"
HISTORY, CANDIDATES = ["Heat (1995):yes", "Fargo (1996):no"], ["Sabrina (1954)", "187 (1997)", "Babe"]
ASK = """
import json, sys, warnings
warnings.simplefilter("error")
from peftrec import Recommender, adapters, backbone, config
options, history, candidates, other = json.loads(sys.argv[1])
found = Recommender.from_pretrained(**options)
if other:
    found.load_adapter(**other)
scores = found.score(history, candidates, adapter=other and other["name"]).tolist()
print(json.dumps([scores, found._base.base.revision]))
"""


def files_of(folder: Path) -> dict[str, bytes]:
    return {path: file.read_bytes() for path, file in contents.list_files(folder)[0].items()}


@pytest.fixture(scope="module")
def site(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A Hub with a base model that has moved on, and two revisions of an adapter that was trained on its first commit.

    What is on it is private: who asks must say who it is, for the base model, too.
    """
    top = tmp_path_factory.mktemp("site")
    with HubServer() as running:
        base = {path.name: path.read_bytes() for path in tiny_llama_folder.iterdir()}
        first = running.put(BASE, base, private=True)
        for tag, seed in (("v1", 3), ("v2", 4)):
            folder = save_adapter(tiny_llama_folder, top / tag, seed=seed)
            about = artifact.read(folder)
            named = dataclasses.replace(about.base_model, name=BASE, hub_id=BASE, revision=first)
            artifact.write(folder, dataclasses.replace(about, base_model=named), artifact.read_prior(folder, about))
            commit = running.put(REPO, files_of(folder), private=True)
            running.repos[REPO].tags[tag] = commit
        other = {**base, "model.safetensors": base["model.safetensors"][:-64] + bytes(64)}
        assert running.put(BASE, other) != first
        yield running


@pytest.fixture(scope="module")
def expected(site: HubServer, tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Scores by each revision's files, loaded from folders."""
    found = {}
    for tag in ("v1", "v2"):
        folder = tmp_path_factory.mktemp("expected") / tag
        (folder).mkdir()
        for path, content in site.files(REPO, tag).items():
            (folder / path).write_bytes(content)
        loaded = Recommender.from_pretrained(folder, items=FILMS, base_model=tiny_llama_folder, strict=True)
        found[tag] = loaded.score(HISTORY, CANDIDATES)
    return found


@pytest.fixture
def run(site: HubServer, tmp_path: Path) -> Callable[..., Any]:
    """Start Python with a cache of its own and what the environment says; the result of its last line."""
    FILMS.write_csv(tmp_path / "films.csv")

    def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        site.log.clear()
        told = {
            **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
            "HF_HOME": str(tmp_path / "home"),
            "HF_ENDPOINT": site.url,
            "HF_HUB_DISABLE_XET": "1",
            **environment,
        }
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, env=told, cwd=tmp_path, timeout=240
        )

    return run


def ask(run: Callable[..., Any], *, other: dict[str, Any] | None = None, environment: Any = (), **options: Any) -> Any:
    """Scores, and the commit of the base model that gave them."""
    told = {"adapter": REPO, "items": "films.csv", "strict": True, **options}
    done = run(["-c", ASK, json.dumps([told, HISTORY, CANDIDATES, other])], **dict(environment))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def downloads(site: HubServer) -> list[str]:
    return [line for line in site.log if (line.startswith("GET") and "/resolve/" in line) or "/lfs/" in line]


@pytest.mark.slow
def test_from_the_hub_and_from_its_cache(
    site: HubServer, run: Callable[..., Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    scores, commit = ask(run, revision="v1", token=READ)
    np.testing.assert_allclose(scores, expected["v1"], atol=1e-6)
    assert commit == artifact.read(tmp_path / next(cached(tmp_path))).base_model.revision
    fetched = downloads(site)
    assert len([line for line in fetched if REPO in line and "peftrec.json" in line]) == 1
    assert any(BASE in line and commit in line for line in fetched)
    # Once more with a connection: only another adapter is downloaded, for the base model that is there.
    other = {"adapter": REPO, "name": "b", "revision": "v2", "token": READ, "items": "films.csv"}
    scores, _ = ask(run, revision="v1", token=READ, other=other)
    tags = site.repos[REPO].tags
    assert {line.split("/resolve/")[1].split("/")[0] for line in downloads(site) if "/resolve/" in line} == {tags["v2"]}
    np.testing.assert_allclose(scores, expected["v2"], atol=1e-6)
    # And without one.
    offline = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    scores, _ = ask(run, revision="v2", environment=offline)
    np.testing.assert_allclose(scores, expected["v2"], atol=1e-6)
    assert site.log == []
    done = run(["-m", "peftrec", "recommend", REPO, "--revision", "v1", "--items", "films.csv", "--json"], **offline)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["recommended"]) == FILMS.height
    done = run(["-m", "peftrec", "recommend", REPO, "--revision", "v3"], **offline)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{REPO}: v3 was not pulled here before, and HF_HUB_OFFLINE is set")
    assert len(done.stderr.splitlines()) == 1


def cached(home: Path) -> Iterator[Path]:
    return (path.parent for path in home.glob("home/hub/models--me--films/snapshots/*/peftrec.json"))


@pytest.mark.slow
def test_a_token_stays_with_its_endpoint(
    site: HubServer, run: Callable[..., Any], expected: dict[str, Any], tiny_llama_folder: Path
) -> None:
    """An adapter of another Hub: who asks there is nobody's business where the base model comes from."""
    elsewhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    options = {"revision": "v1", "token": READ, "endpoint": site.url, "cache_dir": "kept"}
    scores, _ = ask(run, **options, base_model=str(tiny_llama_folder), environment=elsewhere)
    np.testing.assert_allclose(scores, expected["v1"], atol=1e-6)
    told = {"adapter": REPO, "items": "films.csv", "strict": True, **options}
    done = run(["-c", ASK, json.dumps([told, HISTORY, CANDIDATES, None])], HF_HUB_DISABLE_IMPLICIT_TOKEN="1")
    assert done.returncode != 0
    assert "me/tiny at revision" in done.stderr


@pytest.mark.slow
def test_the_commit_of_a_base_model_is_recorded(site: HubServer, run: Callable[..., Any]) -> None:
    code = (
        "import sys; from peftrec import backbone, config\n"
        "load = lambda revision: backbone.load(config.Model(name='me/tiny', revision=revision, dtype='float32'))\n"
        "print(load(None).base.revision, load('main').base.revision, load(sys.argv[1]).base.revision)"
    )
    repo = site.repos[BASE]
    head = repo.branches["main"]
    first = repo.commits[head].parent
    assert first
    done = run(["-c", code, first], HF_TOKEN=READ)
    assert done.stdout.split() == [head, head, first], done.stderr


# --- what a name means ------------------------------------------------------------------------------------------------


def test_where_an_adapter_is_looked_for(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulled: list[Any] = []

    def pull(name: str, revision: str | None = None, **how: Any) -> Path:
        pulled.append((name, revision))
        return tmp_path / "pulled"

    monkeypatch.setattr(hub, "pull", pull)
    run, inner = tmp_path / "run", tmp_path / "run" / "adapter"
    save_adapter(tiny_llama_folder, inner)
    for name in (run, str(run), inner, str(inner)):
        assert loading.find(name) == inner
    monkeypatch.chdir(tmp_path)
    assert loading.find("run/adapter") == Path("run/adapter")  # a folder before a Hub id
    assert loading.find("not/there/either") == Path("not/there/either")
    assert pulled == []
    assert loading.find("me/films", "v1") == tmp_path / "pulled"
    assert loading.find(f"file:{inner}") == tmp_path / "pulled"
    assert pulled == [("me/films", "v1"), (f"file:{inner}", None)]
    for name in (str(inner), f"file:{inner}", "films"):
        with pytest.raises(ModelError, match="revision v1; a folder has no revisions; leave it out, or name a Hub id"):
            loading.find(name, "v1")


def test_a_mistyped_folder_is_no_riddle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HubError, match=r"runs/typo: .*HF_HUB_OFFLINE is set.* \(nor is there a folder runs/typo\)"):
        Recommender.from_pretrained("runs/typo")
    with pytest.raises(ModelError, match=r"no such folder; expected a folder with an adapter"):
        Recommender.from_pretrained("typo")
    (tmp_path / "runs").mkdir()  # now it can only be one of the runs there, and nobody asks the Hub
    with pytest.raises(ModelError, match=r"runs/typo: no such folder, though there is runs; expected a folder with an"):
        Recommender.from_pretrained("runs/typo")


def test_a_run_and_a_file_target(tiny_llama_folder: Path, tmp_path: Path) -> None:
    folder = save_adapter(tiny_llama_folder, tmp_path / "run" / "adapter")
    ways = [folder, tmp_path / "run", f"file:{folder}"]
    found = [
        Recommender.from_pretrained(one, items=FILMS, base_model=tiny_llama_folder).score(HISTORY, CANDIDATES)
        for one in ways
    ]
    assert np.ptp(found, axis=0).max() == 0
    shutil.copy(folder / "adapter_model.safetensors", folder / "weights.bin")
    with pytest.raises(HubError, match=r"weights\.bin: a format that can run code"):
        Recommender.from_pretrained(f"file:{folder}", items=FILMS, base_model=tiny_llama_folder)


@pytest.mark.parametrize(
    ("trained", "able", "expected"),
    [
        ("bfloat16", {}, "float32"),
        ("bfloat16", {"avx512_bf16": True}, "bfloat16"),
        ("float32", {"avx512_bf16": True}, "float32"),
        ("float16", {}, "float16"),
    ],
)
def test_the_type_of_the_training_where_the_processor_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: str, able: dict[str, bool], expected: str
) -> None:
    wanted: list[str] = []

    def load(model: Any, *args: Any, **kwargs: Any) -> None:
        wanted.append(model.dtype)
        raise ModelError("far enough")

    monkeypatch.setattr(loading.backbone, "load", load)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    about: Any = SimpleNamespace(base_model=SimpleNamespace(name="base", revision=None, dtype=trained, fingerprint="0"))
    monkeypatch.setattr(loading, "target_of", lambda about: None)
    with pytest.raises(ModelError, match="far enough"):
        loading.load_base(about, tmp_path, device="cpu")
    assert wanted == [expected]
