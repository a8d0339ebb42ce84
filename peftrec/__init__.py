"""Parameter-efficient fine-tuning of language models for recommendation.

Exports load on first use, so that `import peftrec` and the command line start without torch. Once PEFT is imported, it
knows the bottleneck adapters of `peftrec.bottleneck`; once `transformers.pipelines` is, it knows the task
`recommendation` of `peftrec.pipelines`.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

from peftrec.imports import after_import, around_import, compile_later, import_later, scan_once

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


# Importing PEFT imports bitsandbytes, which misses optional CPU kernels aloud, and whose 8-bit layers say at every call
# that they cast to float16.
for _part in ("backends.cpu.ops", "autograd._functions"):
    logging.getLogger(f"bitsandbytes.{_part}").setLevel(logging.CRITICAL)


def _add_bottleneck() -> None:
    # A thread that imports the module now waits for PEFT's import to end, and that one must not wait for the thread.
    if "peftrec.bottleneck" in sys.modules:
        return
    try:
        import peftrec.bottleneck  # noqa: F401
    except (ImportError, AttributeError, TypeError) as error:
        import warnings

        # PEFT stays usable without us.
        warnings.warn(
            f"peftrec: this peft cannot take bottleneck adapters ({error}); expected peft>=0.21,<0.22; install that",
            stacklevel=2,
        )


def _add_pipeline() -> None:
    if "peftrec.pipelines" not in sys.modules:  # else it is just importing transformers' pipelines
        import peftrec.pipelines  # noqa: F401


around_import("bitsandbytes", compile_later)
# How objects in pictures are matched, which transformers imports with every model.
for _part in ("deformable_detr", "for_object_detection", "grounding_dino", "lw_detr", "rf_detr", "rt_detr"):
    import_later(f"transformers.loss.loss_{_part}", "scipy.optimize")
after_import("transformers.utils.import_utils", scan_once)
after_import("peft", _add_bottleneck)
after_import("transformers.pipelines", _add_pipeline)
