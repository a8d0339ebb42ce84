"""Doing something after another package's import: once, only then, and without a trace in that package."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

from peftrec.imports import after_import

NAME = "a_package_to_wait_for"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An importable package that nobody has imported; its file, to write other code into."""
    finders = list(sys.meta_path)
    folder = tmp_path / NAME
    folder.mkdir()
    (folder / "__init__.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder / "__init__.py"
    sys.modules.pop(NAME, None)
    sys.meta_path[:] = finders


@pytest.fixture
def fired() -> list[int]:
    """The package's `value` at each call of the action."""
    return []


@pytest.fixture
def action(fired: list[int]) -> Callable[[], None]:
    return lambda: fired.append(sys.modules[NAME].value)


def test_fires_once_after_the_import(package: Path, fired: list[int], action: Callable[[], None]) -> None:
    finders = list(sys.meta_path)
    after_import(NAME, action)
    importlib.import_module("json.tool")
    assert importlib.util.find_spec(NAME) is not None
    assert fired == []
    module = importlib.import_module(NAME)
    assert fired == [1]
    importlib.reload(module)
    assert fired == [1]
    assert sys.meta_path == finders
    assert type(module.__loader__) is type(module.__spec__.loader) is SourceFileLoader


def test_fires_now_if_the_package_is_there(package: Path, fired: list[int], action: Callable[[], None]) -> None:
    finders = list(sys.meta_path)
    importlib.import_module(NAME)
    after_import(NAME, action)
    assert fired == [1]
    assert sys.meta_path == finders


def test_waits_while_the_import_fails(package: Path, fired: list[int], action: Callable[[], None]) -> None:
    package.write_text("raise RuntimeError('not yet')\n")
    after_import(NAME, action)
    with pytest.raises(RuntimeError, match="not yet"):
        importlib.import_module(NAME)
    assert fired == []
    package.write_text("value = 22  # of another size, so that no cached code is used\n")
    importlib.import_module(NAME)
    assert fired == [22]


def test_what_the_action_raises_comes_out_of_the_import(package: Path) -> None:
    def refuse() -> None:
        raise RuntimeError("refused")

    after_import(NAME, refuse)
    with pytest.raises(RuntimeError, match="refused"):
        importlib.import_module(NAME)


def test_package_that_is_nowhere(fired: list[int], action: Callable[[], None]) -> None:
    finders = list(sys.meta_path)
    after_import(NAME, action)
    try:
        with pytest.raises(ModuleNotFoundError, match=NAME):
            importlib.import_module(NAME)
        assert fired == []
    finally:
        sys.meta_path[:] = finders


def test_two_that_wait_and_a_finder_that_asks_them(
    package: Path, fired: list[int], action: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asker:
        """Another library's hook, which asks all finders itself."""

        asking = False

        def find_spec(
            self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
        ) -> ModuleSpec | None:
            if name != NAME or self.asking:
                return None
            self.asking = True
            try:
                return importlib.util.find_spec(name)
            finally:
                self.asking = False

    after_import(NAME, action)
    monkeypatch.setattr(sys, "meta_path", [Asker(), *sys.meta_path])
    after_import(NAME, action)
    importlib.import_module(NAME)
    assert fired == [1, 1]


@pytest.mark.parametrize("early", [True, False], ids=["before-the-import", "during-the-import"])
def test_another_thread_imports(
    package: Path, fired: list[int], action: Callable[[], None], monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    gate = ModuleType("gate_of_this_test")
    gate.begun, gate.go = threading.Event(), threading.Event()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, gate.__name__, gate)
    package.write_text(f"import {gate.__name__} as gate\ngate.begun.set()\ngate.go.wait(30)\nvalue = 3\n")
    if early:
        after_import(NAME, action)
    other = threading.Thread(target=importlib.import_module, args=(NAME,))
    other.start()
    assert gate.begun.wait(30)
    waiting = threading.Thread(target=lambda: early or after_import(NAME, action))
    waiting.start()
    waiting.join(0.05)
    assert fired == []
    gate.go.set()
    other.join(30)
    waiting.join(30)
    assert fired == [3]
