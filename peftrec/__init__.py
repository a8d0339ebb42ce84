"""Parameter-efficient fine-tuning of language models for recommendation.

Exports load on first use, so that `import peftrec` and the command line start without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftrec.config import load_recipe
    from peftrec.recommender import Recommender

    __version__: str

__all__ = ["Recommender", "__version__", "load_recipe"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("peftrec")
    if name == "Recommender":
        from peftrec.recommender import Recommender

        return Recommender
    if name == "load_recipe":
        from peftrec.config import load_recipe

        return load_recipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
