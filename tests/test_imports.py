"""Doing something after another package's import: once, only then, and without a trace in that package."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

from peftrec.imports import after_import, around_import, compile_later, import_later, without_collection

NAME = "a_package_to_wait_for"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An importable package that nobody has imported; its file, to write other code into."""
    known, finders = sys.meta_path, list(sys.meta_path)  # a test may put another list in its place
    folder = tmp_path / NAME
    folder.mkdir()
    (folder / "__init__.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder / "__init__.py"
    sys.modules.pop(NAME, None)
    known[:] = finders


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


def test_around_the_first_import_only(package: Path, fired: list[int]) -> None:
    @contextmanager
    def around() -> Iterator[None]:
        assert not hasattr(sys.modules[NAME], "value")
        yield
        fired.append(sys.modules[NAME].value)

    finders = list(sys.meta_path)
    around_import(NAME, around)
    assert fired == []
    module = importlib.import_module(NAME)
    assert fired == [1]
    around_import(NAME, around)
    importlib.reload(module)
    assert fired == [1]
    assert set(sys.meta_path) <= set(finders)


def test_a_function_is_imported_when_it_is_called(package: Path) -> None:
    large = package.with_name("large.py")
    large.write_text("def double(x, times=2):\n    return times * x\n")
    package.write_text(f"from json import dumps\nfrom {NAME}.large import double\nimport math\n")
    import_later(NAME, f"{NAME}.large")
    module = importlib.import_module(NAME)
    assert f"{NAME}.large" not in sys.modules
    assert (module.dumps([1]), module.math.floor(1.5)) == ("[1]", 1)
    assert (module.double.__name__, module.double(4), module.double(4, times=3)) == ("double", 8, 12)
    assert sys.modules.pop(f"{NAME}.large").double is not module.double
    assert module.__dict__["__builtins__"] is sys.modules["builtins"]


def test_what_is_there_is_taken_as_it_is(package: Path) -> None:
    package.write_text("from json.tool import main\n")
    real = importlib.import_module("json.tool")
    import_later(NAME, "json.tool")
    assert importlib.import_module(NAME).main is real.main


def test_transformers_looks_through_its_sources_once() -> None:
    code = (
        "import peftrec, transformers, transformers.models.llama as one;"
        "from transformers.utils.import_utils import create_import_structure_from_path as scan;"
        "folder = one.__path__[0];"
        "print(scan.cache_info().hits, scan(folder) == scan.__wrapped__(folder) != {})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found_again, same = done.stdout.split()
    assert int(found_again) > 100
    assert same == "True"


def test_compiles_when_called(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    compiled: list[tuple[object, dict[str, object]]] = []

    def compile_now(function: object, **settings: object) -> object:
        compiled.append((function, settings))
        return function

    monkeypatch.setattr(torch, "compile", compile_now)
    module = torch.nn.Linear(1, 1)

    def double(x: int) -> int:
        """Twice."""
        return 2 * x

    with compile_later():
        later = torch.compile(double, dynamic=False)

        @torch.compile(dynamic=True)
        def triple(x: int) -> int:
            return 3 * x

        assert compiled == []
        assert torch.compile(module) is module
    assert torch.compile is compile_now
    assert compiled == [(module, {})]
    assert (later.__name__, later.__doc__) == ("double", "Twice.")
    assert [later(2), later(3), triple(2)] == [4, 6, 6]
    assert [settings for _, settings in compiled] == [{}, {"dynamic": False}, {"dynamic": True}]


def test_the_collector_rests_while_something_loads() -> None:
    assert gc.isenabled()
    before = gc.get_freeze_count()
    with without_collection():
        assert not gc.isenabled()
        made = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(made)
    gc.unfreeze()
    with pytest.raises(KeyError), without_collection():
        raise KeyError
    assert gc.isenabled()


# Each takes from a tenth of a second to several, and answering needs none of them.
IDLE = (
    *("datasets", "matplotlib", "numpy.f2py", "pandas", "ray", "scipy", "sklearn", "tensorboard"),
    "torch._inductor.compile_fx",
)


def test_a_recommender_imports_nothing_idle() -> None:
    imports = "sys, peftrec.recommender, transformers.models.llama.modeling_llama"
    code = f"import {imports}; print(*sorted({set(IDLE)!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
