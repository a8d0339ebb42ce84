"""A Space's folder: what it holds, and its page as people use it, in a browser and through its interface."""

from __future__ import annotations

import asyncio
import dataclasses
import html
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from hub_server import WRITE, HubServer
from huggingface_hub import SpaceCard

from peftrec import Recommender, adapters, artifact, backbone, cli, config, encode, record, scorer, space
from peftrec.baselines import Prior
from peftrec.errors import ConfigError, DataError, HubError, ModelError
from peftrec.target import Target

gradio = pytest.importorskip("gradio", reason="the extra `space` is not installed")
from peftrec import space_app  # noqa: E402 (it imports gradio)

ROOT = Path(__file__).parents[1]
FILMS = [f"Film {k}" for k in range(12)]
HISTORY = ["Film 1:yes", "Film 2:no", "<b>Heat</b>:yes"]
CANDIDATES = ["Film 3", "Film 4", "Film 5", '<i>Babe</i> & Co: "x"']


def recommender_of(log: Any, base: Path, target: Target, **prompt: Any) -> tuple[Recommender, config.Recipe]:
    """A random adapter on a tiny base model, and its recipe."""
    files = {"interactions": "/home/ann/clicks.csv", "items": "/home/ann/films.csv"}
    values = {
        "task": target.task,
        "data": {**files, "users": "/home/ann/users.csv"} if "user" in prompt else files,
        "prompt": {"max_tokens": 200, **({} if "layout" in prompt else {"overlap": 64}), **prompt},
        "model": {"name": str(base), "dtype": "float32"},
        "score": {"head": target.head},
        "output_dir": "x",
    }
    recipe = config.parse_recipe(values, "r")
    loaded = backbone.load(recipe.model, target)
    read = encode.Encoder(log, recipe.prompt, loaded.tokenizer, "isolate", task=target.task, kind=loaded.kind)
    about = artifact.describe(
        recipe,
        read.codec,
        loaded.base,
        target,
        data_name="/home/ann/clicks.csv",
        data_sha256="0",
        like_at=None,
        max_item_tokens=read.max_item_tokens,
        example=([("Heat (1995)", 1)], "Heat (1972)"),
        template=read.template,
        probes=[artifact.Probe([], "x", 0.0), artifact.Probe([("Film 3", 0), ("Film: 12", 1)], "x", 0.0)],
    )
    model = scorer.with_head(loaded.model, target.head, about.prompt.answer_ids)
    model = adapters.attach(model, config.Adapter(r=4), base_name="tiny", seed=1)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:  # B is zero at the start
            parameter.data.normal_(std=0.3)
    return Recommender(about, model, loaded.tokenizer, items=log.items), recipe


@pytest.fixture(scope="module")
def run(tiny_llama_folder: Path, make_random_log: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of clicks on a person's own tables leaves behind, with a prior."""
    folder = tmp_path_factory.mktemp("run")
    items = pl.DataFrame({"item_id": np.arange(12), "title": FILMS, "secret": ["x"] * 12})
    items.write_csv(folder / "films.csv")
    made, recipe = recommender_of(make_random_log(3), tiny_llama_folder, Target())
    adapter = folder / "films" / "adapter"
    adapter.mkdir(parents=True)
    adapters.save(made.model, adapter)
    made.codec.tokenizer.save_pretrained(adapter)
    artifact.write(adapter, made.artifact, Prior(0.4, {"3": 0.9, "4": -0.7, "5": 0.1}, 3.0))
    (folder / "films" / "config.yaml").write_text(config.dump_recipe(recipe))
    empty = "metrics intervals differences baselines slices data prompt adapter train eval hardware"
    facts: dict[str, Any] = {name: {} for name in empty.split()}
    model = {"hub_id": str(tiny_llama_folder)}
    record.write_record(
        folder / "films", record.RunRecord(task="click", seed=13, model=model, versions=record.versions(), **facts)
    )
    return folder / "films"


def settings_of(folder: Path, **changes: Any) -> None:
    path = folder / "space.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- the folder -------------------------------------------------------------------------------------------------------


def test_the_folder(run: Path, tmp_path: Path) -> None:
    (run / "adapter" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Mine\n")
    try:
        written = space.write(
            run, tmp_path / "s", title="Films: *mine*", base_model="me/tiny", items=run / "../films.csv"
        )
    finally:
        (run / "adapter" / "README.md").unlink()
    archive = f"peftrec-{metadata.version('peftrec')}.zip"
    assert written == space.Written(tmp_path / "s", "its files are in the folder", "items.parquet in the folder")
    names = {"app.py", "README.md", "requirements.txt", "space.json", "items.parquet", "adapter", archive}
    assert {path.name for path in written.folder.iterdir()} == names
    for path in (run / "adapter").iterdir():
        assert (written.folder / "adapter" / path.name).read_bytes() == path.read_bytes()
    assert (written.folder / "app.py").read_bytes() == (ROOT / "peftrec" / "space_app.py").read_bytes()
    assert pl.read_parquet(written.folder / "items.parquet").columns == ["title", "item_id"]  # and nobody's secret
    assert json.loads((written.folder / "space.json").read_text()) == {
        "title": "Films: *mine*",
        "repo_id": None,
        "revision": None,
        "base_model": "me/tiny",
    }
    card = SpaceCard((written.folder / "README.md").read_text())
    facts = json.loads((run / "run.json").read_text())
    assert card.data.to_dict() == {
        "title": "Films: *mine*",
        "emoji": "⭐",
        "sdk": "gradio",
        "sdk_version": metadata.version("gradio"),
        "python_version": ".".join(facts["versions"]["python"].split(".")[:2]),
        "app_file": "app.py",
        "license": "apache-2.0",
        "models": ["me/tiny"],
        "tags": ["peftrec", "recommendation"],
    }
    assert "# Films: \\*mine\\*" in card.text
    for path in written.folder.iterdir():
        if path.is_file() and path.suffix != ".zip":
            assert str(run.parent).encode() not in path.read_bytes(), path.name


def test_an_adapter_on_the_hub(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--repo-id", "me/films", "--revision", "v1", "--base-model", "me/tiny"]
    arguments += ["--package", "git+https://example.com/peftrec@v1"]
    assert cli.main(["space", str(run), str(tmp_path / "s"), *arguments]) == 0
    out = capsys.readouterr().out
    assert "me/films, pulled when the app starts" in out
    assert "none: candidates must be typed" in out
    assert {path.name for path in (tmp_path / "s").iterdir()} == {
        "app.py",
        "README.md",
        "requirements.txt",
        "space.json",
    }
    head = yaml.safe_load((tmp_path / "s" / "README.md").read_text().split("---\n")[1])
    assert (head["title"], head["models"]) == ("films", ["me/films", "me/tiny"])
    assert "license" not in head
    lines = (tmp_path / "s" / "requirements.txt").read_text().splitlines()
    assert lines[-1] == "peftrec @ git+https://example.com/peftrec@v1"


def test_the_app_pulls_what_the_settings_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: list[Any] = []
    monkeypatch.setattr(space_app.hub, "pull", lambda *given: found.append(given) or tmp_path / "cache")
    monkeypatch.setattr(space_app.Recommender, "from_pretrained", lambda folder, **how: found.append((folder, how)))
    settings = {"title": "t", "repo_id": "me/films", "revision": "v1", "base_model": None}
    (tmp_path / "space.json").write_text(json.dumps(settings))
    space_app.load(tmp_path)
    assert found == [("me/films", "v1"), (tmp_path / "cache", {"items": None, "base_model": None})]


def test_requirements_are_those_of_the_run() -> None:
    ours = {line.split("==")[0]: line for line in space.requirements({"torch": "2.13.0+cpu", "peft": "0.1.0"})}
    assert ours["torch"] == "torch==2.13.0"  # no index has a build by its name
    (bounds,) = [line for name, line in ours.items() if re.match(r"peft[<>]", name)]
    assert "0.21" in bounds  # the run's version is none that this package takes
    assert ours["gradio"] == f"gradio=={metadata.version('gradio')}"
    assert not any(name.startswith(("pytest", "ruff", "scikit-surprise")) for name in ours)


def test_the_archive_is_the_package(run: Path, tmp_path: Path) -> None:
    folder = space.write(run, tmp_path / "s", base_model="me/tiny").folder
    (archive,) = folder.glob("peftrec-*.zip")
    code = (
        f"import sys; sys.path.insert(0, {str(archive)!r})\n"
        "import importlib.metadata as m, peftrec, peftrec.recommender, peftrec.card\n"
        "peftrec.card._template()\n"
        "licence = m.distribution('peftrec').read_text('licenses/LICENSE') or ''\n"
        "print(peftrec.__file__, peftrec.__version__, len(licence))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    licence = str(len(metadata.distribution("peftrec").read_text("licenses/LICENSE") or ""))
    assert done.stdout.split() == [str(archive / "peftrec" / "__init__.py"), metadata.version("peftrec"), licence]
    again = space.write(run, tmp_path / "s2", base_model="me/tiny").folder / archive.name
    assert again.read_bytes() == archive.read_bytes()  # so that an upload of the same is no change


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ModelError, "the base model was a local folder .* name it by its Hub id"),
        ({"base_model": "/models/tiny"}, ConfigError, "base_model: '/models/tiny'; expected a Hub id"),
        ({"base_model": "me/tiny", "revision": "v1"}, ConfigError, "revision: no repo_id"),
        ({"base_model": "me/tiny", "repo_id": "a/b/c"}, ConfigError, "repo_id: 'a/b/c'; expected namespace/name"),
        ({"base_model": "me/tiny", "items": "films.txt"}, DataError, "films.txt"),
    ],
)
def test_what_is_refused(run: Path, tmp_path: Path, arguments: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        space.write(run, tmp_path / "s", **arguments)
    assert not (tmp_path / "s").exists()


def test_an_adapter_that_may_not_be_published(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "adapter" / "notes.md").write_text("see /home/ann/films")
    with pytest.raises(HubError, match=r"notes\.md: a local path"):
        space.write(tmp_path / "run", base_model="me/tiny")
    assert not (tmp_path / "run" / "space").exists()


def test_without_gradio(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "gradio":
            raise metadata.PackageNotFoundError(name)
        return metadata.distribution(name).version

    monkeypatch.setattr(space.metadata, "version", version)
    with pytest.raises(ConfigError, match=r"gradio: not installed; .* pip install 'peftrec\[space\]'"):
        space.write(run, tmp_path / "s", base_model="me/tiny")


def test_a_folder_is_written_over_on_demand_and_keeps_what_is_not_ours(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "s"
    space.write(run, target, base_model="me/tiny", items=run / "../films.csv")
    (target / ".git").mkdir()
    (target / "notes.txt").write_text("mine")
    (target / "app.py").write_text("edited")
    with pytest.raises(ConfigError, match="not an empty folder; choose another, or overwrite"):
        space.write(run, target, base_model="me/tiny")
    assert (target / "app.py").read_text() == "edited"
    space.write(run, target, base_model="me/tiny", repo_id="me/films", overwrite=True)
    names = {path.name for path in target.iterdir()}
    assert names > {".git", "notes.txt", "app.py"}
    assert names.isdisjoint({"items.parquet", "adapter"})  # of the earlier one
    assert "edited" not in (target / "app.py").read_text()


def test_what_was_not_written_here_is_never_written_over(run: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for target in (run, run / "adapter", run.parent):
        with pytest.raises(ConfigError, match=r"holds the run itself; choose another folder"):
            space.write(run, target, base_model="me/tiny", repo_id="me/films", overwrite=True)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match="none that was written here before; choose another"):
        space.write(run, tmp_path, base_model="me/tiny", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_the_documented_commands_publish_it(run: Path, tmp_path: Path) -> None:
    folder = space.write(run, tmp_path / "films-space", base_model="me/tiny").folder
    page = (ROOT / "docs" / "plug-in" / "space.md").read_text()
    commands = [line.split()[1:] for line in page.splitlines() if re.match(r"hf (repos|upload) ", line)]
    assert [words[0] for words in commands] == ["repos", "upload"]
    with HubServer() as hub:
        changes = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        for words in commands:
            done = subprocess.run(
                [sys.executable, "-m", "huggingface_hub.cli.hf", *words],
                capture_output=True,
                text=True,
                cwd=tmp_path,
                env={**os.environ, **changes, "HF_HOME": str(tmp_path / "home")},
                timeout=300,
                check=False,
            )
            assert done.returncode == 0, done.stdout + done.stderr
        assert hub.repos["me/films-space"].private
        assert len(hub.commits("me/films-space")) == 2  # the Hub's first one, and one with everything
        published = hub.files("me/films-space")
    assert published == {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(run: Path, tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Space whose base model is on this machine."""
    folder = tmp_path_factory.mktemp("space") / "s"
    space.write(run, folder, base_model="me/tiny", items=run / "../films.csv", title="Films & more")
    settings_of(folder, base_model=str(tiny_llama_folder))
    return folder


@pytest.fixture(scope="module")
def recommender(home: Path, tiny_llama_folder: Path) -> Recommender:
    """The same, loaded here."""
    return Recommender.from_pretrained(home / "adapter", items=home / "items.parquet", base_model=tiny_llama_folder)


@pytest.fixture(scope="module")
def url(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the app of `home` listens; a process of its own, as a Space starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "app.log"
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1"}
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "app.py"], cwd=home, stdout=out, stderr=out, env=environment)
    try:
        found, end = f"http://127.0.0.1:{port}", time.monotonic() + 180
        while not answers(found):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield found
        assert "Traceback" not in log.read_text()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def call(url: str, *given: Any) -> str:
    """What the page's interface answers, as any HTTP client asks it."""
    start = f"{url}/gradio_api/call/rate"
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(start, json.dumps({"data": given}).encode(), headers), timeout=60
    ) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{start}/{event}", timeout=60) as answer:
        (last,) = re.findall(r"^event: complete\ndata: (.*)$", answer.read().decode(), flags=re.M)
    (page,) = json.loads(last)
    return str(page)


def cells(page: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(<td.*?)</tr>", page, flags=re.S)
    return [[html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, flags=re.S)] for row in rows]


def expected(recommender: Recommender, *given: Any, **how: Any) -> list[list[str]]:
    best = recommender.rank(*given, **how)
    chances = [f"{one.score:.2f}" if one.probability is None else f"{one.probability:.3f}" for one in best]
    return [[str(place), chance, one.title] for place, (chance, one) in enumerate(zip(chances, best, strict=True), 1)]


def test_the_interface_gives_what_rank_gives(url: str, recommender: Recommender) -> None:
    page = call(url, "\n".join(HISTORY), "\n".join(CANDIDATES), 10)
    assert cells(page) == expected(recommender, HISTORY, CANDIDATES)
    assert "&lt;i&gt;Babe&lt;/i&gt; &amp; Co" in page
    assert "<i>Babe" not in page
    assert "Not in the items table, read as typed: &lt;b&gt;Heat&lt;/b&gt;" in page
    whole = cells(call(url, "Film 1: yes\n\n  Film 2 : no ", "", 5))
    assert whole == expected(recommender, ["Film 1:yes", "Film 2:no"], k=5)
    assert [len(whole), whole[0][0]] == [5, "1"]
    assert len(cells(call(url, "", "", 100))) == 12


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ("Film 1", "history[0]: 'Film 1' has no answer behind a colon; expected 'title:yes' or 'title:no'"),
        ("Film 1: 4", "history[0]: rating 4, but the adapter was trained on labels; say yes or no"),
    ],
)
def test_a_mistake_is_one_line(url: str, history: str, message: str) -> None:
    page = call(url, history, "", 10)
    assert page.startswith(f'<p role="alert">{html.escape(message)}')
    assert page.count("<") == 2


def test_an_app_without_adapter_says_so_in_one_line(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home, tmp_path / "s")
    shutil.rmtree(tmp_path / "s" / "adapter")
    done = subprocess.run(
        [sys.executable, "app.py"], capture_output=True, text=True, cwd=tmp_path / "s", timeout=300, check=False
    )
    assert done.returncode == 2
    assert re.fullmatch(r".*adapter: no such folder; expected a folder with an adapter .*\n", done.stderr)


# --- the page for each kind of adapter --------------------------------------------------------------------------------


@pytest.fixture
def kind_of(
    make_random_log: Callable[..., Any], tiny_llama_folder: Path, tiny_bert_folder: Path
) -> Callable[..., Recommender]:
    """A recommender on a tiny random base model."""

    def kind(target: Target, *, encoder: bool = False, **prompt: Any) -> Recommender:
        log = make_random_log(3)
        if target.task == "rating":
            log = dataclasses.replace(log, label=log.item % len(target.scale), scale=target.scale)
        log = dataclasses.replace(log, users=PEOPLE)
        return recommender_of(log, tiny_bert_folder if encoder else tiny_llama_folder, target, **prompt)[0]

    return kind


def built(recommender: Recommender) -> Any:
    """The page; made within an event loop, because outside of one Gradio opens its own and never closes them."""

    async def build() -> Any:
        return space_app.build(recommender, "Page")

    return asyncio.run(build())


def asked(recommender: Recommender, *given: Any) -> str:
    """What the page's button does with the values of its controls; the way there over HTTP is the same for all."""
    page = built(recommender)
    (rate,) = [one.fn for one in page.fns.values() if one.api_name == "rate"]
    return str(rate(*given))


PEOPLE = pl.DataFrame(
    {"user_id": [f"u{k}" for k in range(4)], "age": [24, 53, 30, 33], "job": ["cook", "vet", "cook", None]}
)
STARS = Target("rating", scale=(0.5, 1.0, 1.5, 2.0), offset=(0.0,) * 4)
PROMPTS = {"layout": "pointwise", "template": "{instruction}\n{input}\nAnswer:"}


def labels(page: Any) -> dict[str, Any]:
    """The page's visible inputs by their label."""
    blocks = [block for block in page.blocks.values() if getattr(block, "interactive", None) is not False]
    return {block.label: block for block in blocks if getattr(block, "label", None) and block.visible}


def test_ratings(kind_of: Callable[..., Recommender], titles: list[str]) -> None:
    recommender = kind_of(STARS)
    assert [answer.strip() for answer in recommender.prompt.answers] == ["A", "B", "C", "D"]  # halves are not one token
    found = labels(built(recommender))
    assert [value for value, _ in found["Rating"].choices] == ["2", "1.5", "1", "0.5"]
    assert [value for value, _ in found["Title"].choices] == titles
    page = asked(recommender, f"{titles[0]}: 1.5\n{titles[1]}:0.5", "", 4)
    assert cells(page) == expected(recommender, [(titles[0], 1.5), (titles[1], 0.5)], k=4)
    assert '<th scope="col">Rating</th>' in page


def test_an_encoder_and_a_person(kind_of: Callable[..., Recommender]) -> None:
    prompt = {"layout": "pointwise", "template": "{user} saw\n{history}\t{item}", "user": "{age}, {job}"}
    recommender = kind_of(Target(head="classifier"), encoder=True, **prompt)
    assert list(labels(built(recommender)))[4:6] == ["Person: age", "Person: job"]
    history, candidates = ["Heat (1972):yes"], ["Heat (1995)", "Film 12 (1995)"]
    pages = [
        asked(recommender, history[0], "\n".join(candidates), 9, *person)
        for person in (("", ""), ("30", ""), ("30", "cook"))
    ]
    for page, user in zip(pages, (None, {"age": "30", "job": None}, {"age": 30, "job": "cook"}), strict=True):
        assert cells(page) == expected(recommender, history, candidates, user=user)
    assert len(set(pages)) == 3


def test_without_titles(kind_of: Callable[..., Recommender]) -> None:
    made = kind_of(Target())
    recommender = Recommender(made.artifact, made.model, made.codec.tokenizer)
    assert type(labels(built(recommender))["Title"]).__name__ == "Textbox"
    assert cells(asked(recommender, "Heat:yes", "Babe\nFargo", 10)) == expected(
        recommender, ["Heat:yes"], ["Babe", "Fargo"]
    )
    assert "candidates: none given, and there is no items table to rank" in asked(recommender, "Heat:yes", "", 10)
    assert "Nothing is left to rate" in asked(recommender, "Heat:yes", "heat", 10)


def test_ready_made_prompts(kind_of: Callable[..., Recommender]) -> None:
    recommender = kind_of(Target(), **{"layout": "pointwise", "template": "{history}{item}:"})
    prompt = dataclasses.replace(recommender.prompt, **PROMPTS)
    about = dataclasses.replace(recommender.artifact, prompt=prompt)
    own = Recommender(about, recommender.model, recommender.codec.tokenizer)
    assert list(labels(built(own)))[:2] == ["Instruction", "Input"]
    page = asked(own, "Like it?", "Heat\n\nand more\n---\nBabe\n---  \n---\nFargo -- x")
    records = [{"instruction": "Like it?", "input": text} for text in ("Heat\n\nand more", "Babe", "Fargo -- x")]
    assert cells(page) == expected(own, [], records)


def test_ambiguous_titles_are_told(kind_of: Callable[..., Recommender]) -> None:
    recommender = kind_of(Target())
    films = pl.DataFrame({"item_id": [1, 2], "title": ["Heat", "Heat"], "year": [1972, 1995]})
    about = dataclasses.replace(
        recommender.artifact, prompt=dataclasses.replace(recommender.prompt, item="{title} ({year})")
    )
    two = Recommender(about, recommender.model, recommender.codec.tokenizer, items=films)
    page = space_app.answered(two, ["Heat:yes"], ["Babe"], 3, None)
    assert "&#x27;Heat&#x27; may be &#x27;Heat (1972)&#x27; or &#x27;Heat (1995)&#x27;; the first is taken" in page


# --- the page in a browser --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium without a window."""
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("no chromium and chromedriver on this machine")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    quiet = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    with tempfile.TemporaryDirectory() as profile:
        for flag in [*quiet.split(), "disable-component-update", "disable-sync", f"user-data-dir={profile}"]:
            options.add_argument(f"--{flag}")
        opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        yield opened
        opened.quit()


def wait(browser: Any, found: Callable[[Any], Any]) -> Any:
    """What `found` returns, once it is anything; the page is drawn anew while one looks at it."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 120, ignored_exceptions=[StaleElementReferenceException]).until(found)


def named(browser: Any, name: str) -> Any:
    """The control on the page with this accessible name."""

    def find(driver: Any) -> Any:
        controls = driver.find_elements("css selector", "input, textarea, button")
        return next((one for one in controls if one.is_displayed() and one.accessible_name.startswith(name)), None)

    return wait(browser, find)


def table(browser: Any) -> list[list[str]]:
    rows = browser.find_elements("css selector", ".rated tbody tr")
    return [[cell.text for cell in row.find_elements("tag name", "td")] for row in rows]


def test_clicks_through_the_page(browser: Any, url: str, recommender: Recommender) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.get(url)
    assert named(browser, "Title").aria_role == "combobox"
    assert browser.title == "Films & more"
    controls = browser.find_elements("css selector", "input, textarea, button")
    assert all(one.accessible_name for one in controls if one.is_displayed())
    for line in HISTORY[:2]:
        title, _, answer = line.rpartition(":")
        named(browser, "Title").send_keys(title, Keys.TAB)  # typed, not clicked
        named(browser, answer).send_keys(Keys.SPACE)
        named(browser, "Add to the history").send_keys(Keys.ENTER)
        wait(browser, lambda _, line=line: line.replace(":", ": ") in named(browser, "History").get_attribute("value"))
    assert named(browser, "History").get_attribute("value") == "Film 1: yes\nFilm 2: no"
    named(browser, "History").send_keys("\n" + HISTORY[2])
    named(browser, "Candidates").send_keys("\n".join(CANDIDATES))
    named(browser, "Rate").click()
    wait(browser, table)
    assert table(browser) == expected(recommender, HISTORY, CANDIDATES)
    assert "read as typed: <b>Heat</b>" in browser.find_element("css selector", ".rated [role=status]").text

    named(browser, "History").send_keys("\nFilm 5")
    named(browser, "Rate").click()
    (alert,) = wait(browser, lambda driver: driver.find_elements("css selector", ".rated [role=alert]"))
    assert alert.text.startswith("history[3]: 'Film 5' has no answer behind a colon; expected 'title:yes'")
    assert table(browser) == []

    named(browser, "Fill in an example").click()
    wait(browser, lambda _: named(browser, "History").get_attribute("value") == "Film 3: no\nFilm: 12: yes")
    assert [one for one in browser.get_log("browser") if one["level"] == "SEVERE"] == []


@pytest.mark.parametrize("look", ["light", "dark"])
def test_the_page_on_a_phone(browser: Any, url: str, look: str) -> None:
    def ask(command: str, **given: Any) -> None:
        browser.execute_cdp_cmd(f"Emulation.{command}", given)

    ask("setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    ask("setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": look}])
    try:
        browser.get(url)
        named(browser, "Candidates").send_keys("Film 1\n" + "Film" * 100)
        named(browser, "Rate").click()
        wait(browser, table)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
        script = "return getComputedStyle(document.querySelector(arguments[0])).getPropertyValue(arguments[1])"
        paper, ink = (
            sum(map(int, re.findall(r"\d+", browser.execute_script(script, *of))[:3]))
            for of in (("body", "background-color"), (".rated td", "color"))
        )
        assert (paper < ink) is (look == "dark")
        assert abs(paper - ink) > 400
    finally:
        ask("clearDeviceMetricsOverride")
        ask("setEmulatedMedia", features=[])


def test_the_page_asks_nobody_else(browser: Any, url: str) -> None:
    """Over all that the tests above did."""
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {one["params"]["request"]["url"] for one in sent if one["method"] == "Network.requestWillBeSent"}
    pages = {one for one in asked if one.startswith(("http:", "https:", "ws:", "wss:"))}
    assert any("gradio_api" in one for one in pages)
    assert {one for one in pages if not one.startswith(f"{url}/")} == set()
