"""Do something around another package's import, or as soon as it has ended, without importing it."""

from __future__ import annotations

import builtins
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache, partial, wraps
from importlib import import_module
from importlib.machinery import ModuleSpec
from threading import local
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any


def after_import(package: str, action: Callable[[], None]) -> None:
    """Call `action` once, when `package` has been imported: now, if it already is.

    Asking where the package is (`importlib.util.find_spec`) is no import and calls nothing.
    """
    watcher = _Watcher(package, action)
    # In this order, because another thread may import the package in between.
    sys.meta_path.insert(0, watcher)
    if package in sys.modules:
        import_module(package)  # waits for a thread that is at it
        watcher.fire()


def around_import(package: str, manager: Callable[[], AbstractContextManager[None]]) -> None:
    """Let whoever imports `package` first do so within `manager()`; where it has been imported, nothing happens."""
    if package not in sys.modules:
        sys.meta_path.insert(0, _Watcher(package, lambda: None, lambda _: manager()))


def import_later(module: str, wanted: str) -> None:
    """Let the functions that `module` imports from `wanted` be such that import it when they are called.

    For `from wanted import f` at the top of a module of somebody else's; where `wanted` or the module has been imported
    already, nothing happens. No other module is concerned.
    """
    if module not in sys.modules:
        sys.meta_path.insert(0, _Watcher(module, lambda: None, partial(_functions_later, wanted)))


@contextmanager
def _functions_later(wanted: str, module: ModuleType) -> Iterator[None]:
    ordinary = builtins.__import__

    def function(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return getattr(import_module(wanted), name)(*args, **kwargs)

        call.__name__ = name
        return call

    def import_here(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if level or name != wanted or not fromlist or wanted in sys.modules:
            return ordinary(name, globals, locals, fromlist, level)
        return SimpleNamespace(**{one: function(one) for one in fromlist})

    # The module's own view of the builtins, so that no other thread's imports are concerned.
    module.__dict__["__builtins__"] = {**vars(builtins), "__import__": import_here}
    try:
        yield
    finally:
        module.__dict__["__builtins__"] = builtins


def scan_once() -> None:
    """Let transformers remember, while it is imported, what it found in the folders of its own source files.

    It looks for names to export in the folders of 500 models, twice, and remembers 128 of them: too few for the second
    time to find any.
    """
    module: Any = sys.modules["transformers.utils.import_utils"]
    scan: Any = getattr(module, "create_import_structure_from_path", None)
    if hasattr(scan, "cache_info"):  # else it is of another version
        module.create_import_structure_from_path = lru_cache(maxsize=None)(scan.__wrapped__)


@contextmanager
def compile_later() -> Iterator[None]:
    """In this block `torch.compile` only notes functions, and compiles them when they are called.

    bitsandbytes compiles its 8-bit optimizers' steps when it is imported, and PEFT imports it: a second for what few
    ever call.
    """
    import torch

    now = torch.compile

    def later(function: Any = None, **settings: Any) -> Any:
        if function is None:
            return partial(later, **settings)
        if not isinstance(function, FunctionType):
            return now(function, **settings)
        made: list[Callable[..., Any]] = []

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not made:
                made.append(now(function, **settings))
            return made[0](*args, **kwargs)

        return call

    torch.compile = later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = now


@contextmanager
def without_collection() -> Iterator[None]:
    """In this block Python's garbage collector rests, and later leaves alone what the block has made.

    For what is loaded once and stays: the collector would look through thousands of new modules again and again.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if enabled:
            gc.enable()


class _Watcher:
    """A finder that leaves the finding to the others and follows what they find."""

    def __init__(
        self,
        package: str,
        action: Callable[[], None],
        manager: Callable[[ModuleType], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._package, self._action, self._manager = package, action, manager
        self._asking = local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # Another package's finder may ask the others too: without this guard the two would ask each other for ever.
        if fullname != self._package or getattr(self._asking, "now", False):
            return None
        self._asking.now = True
        try:
            others = (finder for finder in list(sys.meta_path) if finder is not self)
            spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        finally:
            self._asking.now = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.fire, self._manager)  # type: ignore[assignment]
        return spec

    def fire(self) -> None:
        try:
            sys.meta_path.remove(self)
        except ValueError:  # another thread was first
            return
        self._action()


class _Loader:
    """The package's own loader in everything, except that a call follows once the package has run."""

    def __init__(
        self, loader: Any, then: Callable[[], None], manager: Callable[[ModuleType], AbstractContextManager[Any]]
    ) -> None:
        self._loader, self._then, self._manager = loader, then, manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        with self._manager(module):
            self._loader.exec_module(module)
        self._then()
