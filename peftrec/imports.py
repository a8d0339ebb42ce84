"""Do something as soon as another package has been imported, without importing it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from threading import local
from types import ModuleType
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


class _Watcher:
    """A finder that leaves the finding to the others and follows what they find."""

    def __init__(self, package: str, action: Callable[[], None]) -> None:
        self._package, self._action = package, action
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
            spec.loader = _Loader(spec.loader, self.fire)  # type: ignore[assignment]
        return spec

    def fire(self) -> None:
        try:
            sys.meta_path.remove(self)
        except ValueError:  # another thread was first
            return
        self._action()


class _Loader:
    """The package's own loader in everything, except that a call follows once the package has run."""

    def __init__(self, loader: Any, then: Callable[[], None]) -> None:
        self._loader, self._then = loader, then

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._then()
