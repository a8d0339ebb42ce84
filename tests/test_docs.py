"""The pages keep their word: recipes parse, commands and files exist, links lead somewhere, the example data loads."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from peftrec import interactions, split
from peftrec.config import load_recipe, parse_recipe
from peftrec.schema import parse_yaml

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("model_cards/**/*.md")])
YOUR_DATA = ROOT / "docs" / "your-data.md"


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def all_blocks(language: str) -> list[pytest.param]:
    return [
        pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, block in enumerate(blocks(page, language), 1)
    ]


def commands() -> list[list[str]]:
    """Every command of the shell blocks as words, continued lines joined."""
    lines = [line for block in all_blocks("sh") for line in block.values[0].replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@cache
def help_of(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words, "--help"], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


def test_the_pages_hold_what_is_tested() -> None:
    assert len(all_blocks("yaml")) >= 8
    assert {Path(words[0]).name for words in commands()} >= {"make", "peftrec", "accelerate"}


@pytest.mark.parametrize("block", all_blocks("yaml"))
def test_recipes_parse(block: str) -> None:
    assert parse_recipe(parse_yaml(block), "page").output_dir


@pytest.mark.parametrize("block", all_blocks("python"))
def test_python_compiles(block: str) -> None:
    assert compile(block, "page", "exec").co_filename == "page"


@pytest.mark.parametrize("block", all_blocks("json"))
def test_json_parses(block: str) -> None:
    assert json.loads(block)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    named = {word for words in commands() if words[0] == "make" for word in words[1:] if "=" not in word}
    assert {"demo", "test", "lint"} <= named <= targets


@pytest.mark.parametrize("words", [words for words in commands() if Path(words[0]).name == "peftrec"], ids=" ".join)
def test_peftrec_commands_exist(words: list[str]) -> None:
    shown = help_of("-m", "peftrec", words[1])
    for option in [word for word in words if word.startswith("--")]:
        assert option in shown


@pytest.mark.parametrize(
    "words", [words for words in commands() if "launch" in words and "-m" not in words], ids=" ".join
)
def test_launched_files_exist(words: list[str]) -> None:
    files = [word for word in words if word.startswith("recipes/")]
    assert {"recipes/finetune.py", "recipes/embed.py"} & {*files}
    for file in files:
        assert (ROOT / file).is_file(), file
    if "recipes/embed.py" in files:
        return
    config = words[words.index("--config") + 1]
    if config.startswith("recipes/"):
        load_recipe(ROOT / config, words[words.index("--config") + 2 :])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_invented_data_set_trains_both_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tables, recipe_text = blocks(YOUR_DATA, "python")[0], blocks(YOUR_DATA, "yaml")[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(make_tables, "page", "exec"), {})
    Path("my-data/recipe.yaml").write_text(recipe_text, encoding="utf-8")
    recipe = load_recipe("my-data/recipe.yaml")
    data = interactions.load(recipe.data, recipe.seed)
    log = split.split(data, recipe.data.split, recipe.seed)
    assert (len(log), len(log.user_ids), log.items.height) == (3000, 120, 40)
    assert data.warnings == ()
    assert set(log.items.columns) == {"item_id", "title", "cuisine"}
    assert 0.3 < log.label.mean() < 0.7


def test_the_shown_error_is_what_is_said(tmp_path: Path) -> None:
    (shown,) = [line for block in blocks(YOUR_DATA, "text") for line in block.splitlines() if "learning_rat:" in line]
    recipe = blocks(YOUR_DATA, "yaml")[0].replace("learning_rate", "learning_rat")
    (tmp_path / "my-data").mkdir()
    (tmp_path / "my-data" / "recipe.yaml").write_text(recipe, encoding="utf-8")
    code = "from peftrec import load_recipe; load_recipe('my-data/recipe.yaml')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.stderr.splitlines()[-1].partition("ConfigError: ")[2] == shown


def test_pages_have_places_for_every_figure() -> None:
    marks = re.compile(r"<!-- (\w+):(begin|end) -->")
    for page in PAGES:
        found = marks.findall(page.read_text(encoding="utf-8"))
        assert found == [(name, kind) for name, _ in found[::2] for kind in ("begin", "end")], page.name
    assert {name for name, _ in marks.findall((ROOT / "README.md").read_text(encoding="utf-8"))} == {
        "demo",
        "main",
        "bpmf",
        "rating",
    }
