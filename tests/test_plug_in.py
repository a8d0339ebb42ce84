"""The pages of docs/plug-in do what they say: every command and snippet of theirs runs, on tiny models."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from saved import save_run, tiny_bert

from peftrec.cli import main

ROOT = Path(__file__).parents[1]
# A Space's page has a browser to itself: tests/test_space.py.
PAGES = sorted(page for page in (ROOT / "docs" / "plug-in").glob("*.md") if page.stem != "space")
FENCE = re.compile(r"^```(sh|python)\n(.*?)^```", flags=re.S | re.M)


def test_every_page_has_something_to_run() -> None:
    assert {page.stem for page in PAGES} == {"export", "lenskit", "scikit-learn", "tables", "transformers"}
    for page in PAGES:
        assert FENCE.search(page.read_text(encoding="utf-8")), page.name


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:lenskit")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_runs(
    page: Path,
    tiny_llama_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if page.stem == "lenskit" and find_spec("lenskit") is None:
        pytest.skip("LensKit is not installed")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    save_run(tiny_llama_folder, Path("runs/ml-100k-click-lora-demo"), data_name="ml-100k")
    if page.stem == "transformers":
        bert = tiny_bert(tmp_path / "bert")
        save_run(bert, Path("runs/ml-100k-click-encoder"), head="classifier", data_name="ml-100k", max_tokens=120)
    names: dict[str, Any] = {"__name__": "page"}
    printed = 0
    for language, text in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(text, page.name, "exec"), names)
            printed += len(capsys.readouterr().out)
            continue
        for line in text.splitlines():
            command, *words = shlex.split(line)
            assert command == "peftrec"
            assert main(words) == 0, capsys.readouterr().err
    assert printed > 0
