"""Seconds from a command to its first answer: `--help`, `import peftrec`, and `recommend` for a few candidates.

    python benchmarks/startup.py runs/ml-100k-click-lora-demo
    python benchmarks/startup.py runs/ml-100k-click-lora-demo --before ../older-checkout --write

With `--before` two checkouts of this project are run in turn. Everything is in the disk's cache after a first round,
which is not counted.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from pages import put
from scale import hardware

HERE = Path(__file__).parents[1]
PAGE = HERE / "docs/serving.md"
HISTORY = ("Toy Story (1995):yes", "GoldenEye (1995):no")
CANDIDATES = ("Heat (1995)", "Babe (1995)", "Fargo (1996)")
LEAST = 0.05  # seconds of a package that the table names

# What `peftrec recommend` does, with the time after each step.
STEPS = """
import sys, time
begin = time.perf_counter()
from peftrec.imports import without_collection
with without_collection():
    from peftrec.recommender import Recommender
    imported = time.perf_counter()
    recommender = Recommender.from_pretrained(sys.argv[1])
    loaded = time.perf_counter()
recommender.rank(sys.argv[2:4], sys.argv[4:])
print(imported - begin, loaded - imported, time.perf_counter() - loaded)
"""


# As the command does it: the collector's runs would be counted to whatever module is being loaded.
IMPORTS = """
from peftrec.imports import without_collection
with without_collection():
    from peftrec.recommender import Recommender
"""


def run(checkout: Path, *arguments: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Seconds of a Python process from start to end, and what it said."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=True, cwd=checkout
    )
    return time.perf_counter() - begin, done


def by_package(said: str) -> Counter[str]:
    """Seconds of each top-level package's own modules, from what `-X importtime` says."""
    found: Counter[str] = Counter()
    for own, name in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)", said):
        found[name.split(".")[0]] += int(own) / 1e6
    return found


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="of ml-100k, such as runs/ml-100k-click-lora-demo")
    parser.add_argument("--before", type=Path, help="another checkout of this project, run in turn with this one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/serving.md")
    given = parser.parse_args()
    adapter = str(given.adapter.resolve())
    asked = ["recommend", adapter, "--history", *HISTORY, "--candidates", *CANDIDATES]
    commands = {
        "`peftrec --help`": ["-m", "peftrec", "--help"],
        "`import peftrec`": ["-c", "import peftrec"],
        "`peftrec recommend`, from the command to its end": ["-m", "peftrec", *asked],
    }
    checkouts = {"before": given.before.resolve()} if given.before else {}
    checkouts["now"] = HERE
    seconds: dict[tuple[str, str], list[float]] = {}
    steps: list[list[float]] = []
    for turn in range(given.rounds + 1):
        for when, checkout in checkouts.items():
            for name, command in commands.items():
                took, _ = run(checkout, *command)
                if turn:
                    seconds.setdefault((name, when), []).append(took)
        took, done = run(HERE, "-c", STEPS, adapter, *HISTORY, *CANDIDATES)
        if turn:
            parts = [float(part) for part in done.stdout.split()]
            steps.append([took - sum(parts), *parts])
    _, done = run(HERE, "-X", "importtime", "-c", IMPORTS)
    packages = by_package(done.stderr)

    lines = [f"| seconds: median (lowest to highest) | {' | '.join(checkouts)} |", f"|---|{'---:|' * len(checkouts)}"]
    lines += [f"| {name} | {' | '.join(spread(seconds[name, when]) for when in checkouts)} |" for name in commands]
    names = (
        "Python itself, start and end",
        "imports",
        "items, tokenizer, base model, adapter",
        "history and candidates",
    )
    lines += ["", "| what `recommend` does now | seconds |", "|---|---:|"]
    lines += [f"| {name} | {spread(list(took))} |" for name, took in zip(names, zip(*steps, strict=True), strict=True)]
    large = [(name, took) for name, took in packages.most_common() if took >= LEAST]
    told = ", ".join(f"{name} {took:.2f}" for name, took in large)
    text = "\n".join(lines) + (
        "\n\nSeconds of the imports by package, modules of others that they load not counted, measured one by one "
        f"(`-X importtime`, which slows them down): {told}.\n\nMedians of {given.rounds} rounds in turn, two events "
        f"and {len(CANDIDATES)} candidates, base model and items in the cache, on "
        f"{hardware()}."
    )
    print(text)
    if given.write:
        put("startup", text, PAGE)


if __name__ == "__main__":
    main()
