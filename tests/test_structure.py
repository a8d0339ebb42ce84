"""The shape of the package: which way imports point, what is exported, and what importing costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import peftrec

PACKAGE = Path(peftrec.__file__).parent

# Data flows down this list, and a module imports only from above itself.
ORDER = (
    "errors",
    "imports",
    "schema",
    "values",
    "draws",
    "compatibility",
    "coherence",
    "config",
    "assets",
    "kept",
    "tables",
    "side_files",
    "datasets",
    "record_events",
    "negatives",
    "sources",
    "interactions",
    "split",
    "prepared",
    "prompts",
    "ranking",
    "similarity",
    "profiles",
    "graph",
    "user_groups",
    "exposure",
    "metrics",
    "bootstrap",
    "baselines",
    "factors",
    "bayes_factors",
    "rating_baselines",
    "click_factors",
    "people",
    "classical",
    "lstm_clicks",
    "boosting",
    "bpmf",
    "blend",
    "opponents",
    "retrieval",
    "side_als",
    "calibration",
    "target",
    "artifact",
    "catalogue",
    "augment",
    "sight",
    "packing",
    "timeline",
    "side_vectors",
    "encode",
    "attention",
    "fused",
    "quantized",
    "heads",
    "backbone",
    "processes",
    "bottleneck",
    "virtual_tokens",
    "adalora",
    "lora_start",
    "methods",
    "adapters",
    "side",
    "scorer",
    "dealer",
    "fgm",
    "align_losses",
    "align",
    "train",
    "record",
    "looks",
    "score_figures",
    "figures",
    "report",
    "citations",
    "card_text",
    "card_facts",
    "card_metadata",
    "card_sections",
    "card_limits",
    "card",
    "leaks",
    "patterns",
    "file_checks",
    "contents",
    "hub_client",
    "folders",
    "hub_checks",
    "hub_push",
    "hub_pull",
    "hub_info",
    "hub",
    "loaded_adapter",
    "loading",
    "embeddings",
    "vector_files",
    "features",
    "shortlist",
    "earlier",
    "teachers",
    "few_shot",
    "pretraining",
    "transfer_report",
    "recommender",
    "ensemble",
    "handover",
    "retrieval_run",
    "histories",
    "pairs",
    "scoring",
    "ray_data",
    "pipelines",
    "frames",
    "estimator",
    "lenskit_scorer",
    "export",
    "merge",
    "reload",
    "space_app",
    "space",
    "embed",
    "cli_options",
    "cli_features",
    "cli_recommend",
    "cli_publish",
    "cli",
    "__main__",
)
# These import late so that they start quickly: the command line what a verb needs, the package what is asked for.
LATE = ("cli_recommend", "cli_publish", "cli_features", "__init__")
HEAVY = ("torch", "transformers", "peft", "polars", "numpy", "datasets", "matplotlib", "huggingface_hub", "accelerate")


def stage(module: str) -> str:
    """`datasets.ml_100k` and `datasets` are one stage, and so are all packages."""
    return module.split(".")[0]


def sources() -> dict[str, Path]:
    """Module name below `peftrec` -> file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


def imported(source: str, module: str, *, is_package: bool = False) -> Iterator[tuple[str, bool]]:
    """Modules below `peftrec` that `source` imports, and whether it does so inside a function."""
    names = {name for name in sources() if name != "__init__"}
    tree = ast.parse(source)
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for inner in ast.walk(node)
    }
    package = ["peftrec", *module.split(".")] if is_package else ["peftrec", *module.split(".")][:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            targets = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            if target.split(".")[0] != "peftrec":
                continue
            below = target.split(".")[1:]
            while below and ".".join(below) not in names:
                below.pop()
            yield ".".join(below) or "__init__", id(node) in late


def test_the_import_reader_sees_every_form() -> None:
    source = """
import peftrec.split
from peftrec import config, metrics as m
from peftrec.errors import DataError
from . import prompts
from .train import fit
if TYPE_CHECKING:
    from peftrec.scorer import Scorer
def f():
    from peftrec.cli import main
    import polars
"""
    early = [(name, False) for name in ("split", "config", "metrics", "errors", "prompts", "train", "scorer")]
    assert sorted(imported(source, "baselines")) == sorted([*early, ("cli", True)])
    assert list(imported("from .. import errors", "datasets.ml_100k")) == [("errors", False)]
    assert list(imported("from ..errors import DataError", "datasets", is_package=True)) == [("errors", False)]


@pytest.mark.parametrize("module", [name for name in sources() if name != "__init__"])
def test_no_module_imports_downstream(module: str) -> None:
    path = sources()[module]
    assert stage(module) in ORDER, f"{module}: not in the order of the stages; give it its place in ORDER"
    own = ORDER.index(stage(module))
    for target, late in imported(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py"):
        assert target != "__init__", f"{module} imports the package itself; import the module that defines the name"
        assert stage(target) in ORDER, f"{target}: not in the order of the stages; give it its place in ORDER"
        assert stage(target) == stage(module) or ORDER.index(stage(target)) < own, f"{module} imports {target}"
        assert not late or module in LATE, f"{module} imports {target} inside a function, which hides a cycle"


def test_exported_names_exist() -> None:
    assert set(peftrec.__all__) == {"Recommender", "load_recipe", "__version__"}
    assert set(peftrec.__all__) <= set(dir(peftrec))
    from peftrec.config import load_recipe

    assert peftrec.load_recipe is load_recipe
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", peftrec.__version__)
    with pytest.raises(AttributeError, match="module 'peftrec' has no attribute 'Recomender'"):
        _ = peftrec.Recomender


def test_recommender_is_exported() -> None:
    assert peftrec.Recommender is import_module("peftrec.recommender").Recommender


@pytest.mark.parametrize("statement", ["import peftrec", "import peftrec.config", "import peftrec.cli"])
def test_importing_loads_nothing_heavy(statement: str) -> None:
    code = f"import sys; {statement}; print(*sorted({set(HEAVY)!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.split() == []


def test_python_m_peftrec_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "peftrec", "--help"], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert "usage: peftrec" in done.stdout
