"""Compare adapter methods on one budget: a table and a picture of quality against what each method costs.

    python recipes/compare_methods.py --config recipes/configs/compare_methods.yaml
    python recipes/compare_methods.py --config … --methods lora ia3 --write

Each method is a run of recipes/finetune.py in OUTPUT_DIR/METHOD, one after the other in a process of its own, so that
peak memory is the method's own. Runs that have ended are not repeated. OUTPUT_DIR/methods.md and methods.png hold the
result; --write also puts them into docs/.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from peftrec import config, record, report, schema
from peftrec.bootstrap import Interval
from peftrec.errors import ConfigError, DataError, as_one_line
from peftrec.looks import style
from peftrec.metrics import HEADLINE

ROOT = Path(__file__).parent.parent
FINETUNE = Path(__file__).with_name("finetune.py")
MEMORY = "peak_memory.json"


@dataclass(frozen=True)
class Method:
    """What one run came to.

    Attributes:
        name: as the config has it.
        trained: trainable parameters; 0 where nothing is trained.
        share: of the base model's parameters.
        size: of the saved adapter, bytes.
        figure: the task's headline metric on the test rows, with its 95 % interval.
        gain: this method minus the one that trains nothing, on the same rows; None where there is no such run.
        events_per_second: learned; None where nothing is.
        memory: highest resident memory of the process, bytes.
    """

    name: str
    trained: int
    share: float
    size: int
    figure: Interval
    gain: Interval | None
    events_per_second: float | None
    memory: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="recipe, changes, output_dir and methods")
    parser.add_argument("--methods", nargs="+", help="which of them; all if left out")
    parser.add_argument("--write", action="store_true", help="put table and picture into docs/")
    arguments = parser.parse_args()
    path = Path(arguments.config)
    plan = schema.read_yaml(path)
    expected = {"recipe", "changes", "output_dir", "methods"}
    if set(plan) != expected:
        raise ConfigError(f"{path}: keys {', '.join(sorted(plan))}; expected {', '.join(sorted(expected))}")
    unknown = set(arguments.methods or ()) - set(plan["methods"])
    if unknown:
        raise ConfigError(f"--methods: {', '.join(sorted(unknown))}; expected some of {', '.join(plan['methods'])}")
    wanted = [name for name in plan["methods"] if arguments.methods is None or name in arguments.methods]
    folder, base = Path(plan["output_dir"]), path.parent / plan["recipe"]
    overrides = {name: _overrides(plan["changes"], plan["methods"][name], folder / name) for name in wanted}
    for words in overrides.values():  # whatever is wrong with one of them is said before the first one runs
        config.load_recipe(base, words)
    found = []
    for name in wanted:
        print(f"\n{name}", flush=True)
        _run(base, overrides[name], folder / name)
        frozen = next((folder / one.name for one in found if not one.trained), None)
        found.append(_measured(name, folder / name, frozen))
    task = config.load_recipe(base, overrides[wanted[0]]).task
    text = table(found, HEADLINE[task])
    print(f"\n{text}")
    (folder / "methods.md").write_text(text + "\n")
    picture(found, HEADLINE[task]).savefig(folder / "methods.png", dpi=150, metadata={"Software": None})
    if arguments.write:
        sys.path.insert(0, str(ROOT / "benchmarks"))
        from pages import put

        put("methods", text, ROOT / "docs/methods.md")
        (ROOT / "docs/methods.png").write_bytes((folder / "methods.png").read_bytes())


def _overrides(changes: Mapping[str, Any], method: Mapping[str, Any], run: Path) -> list[str]:
    """The command line that turns the recipe into this method's."""
    # The recipe's own adapter settings are those of another method.
    reset = {"adapter": {one.name: None for one in dataclasses.fields(config.Adapter) if one.name != "method"}}
    found = {
        f"{section}.{key}": value
        for part in (reset, changes, method)
        for section, keys in part.items()
        for key, value in keys.items()
    }
    if found.get("adapter.method") == "none":  # nothing is trained: what says how would be refused
        found |= {f"train.{one.name}": None for one in dataclasses.fields(config.Train)} | {"eval.base_model": None}
    words = [word for key, value in found.items() for word in (f"--{key}", json.dumps(value))]
    return [*words, "--output_dir", str(run)]


def _run(base: Path, overrides: Sequence[str], run: Path) -> None:
    process = subprocess.Popen([sys.executable, str(FINETUNE), "--config", str(base), *overrides, "--resume"])
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    process.returncode = code
    if code:
        print(f"{run.name} ended with code {code}; the same command continues there", file=sys.stderr)
        sys.exit(code)
    memory = run / MEMORY
    if not memory.is_file():
        memory.write_text(json.dumps({"bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)}))


def _measured(name: str, run: Path, frozen: Path | None) -> Method:
    facts = record.read_record(run)
    key = f"test/{HEADLINE[facts.task]}"
    trained = facts.adapter.get("trainable_parameters", 0)
    low, high = facts.intervals["adapter" if trained else "base_model"][key]
    return Method(
        name,
        trained,
        trained / facts.model["parameters"],
        facts.adapter.get("bytes", 0),
        Interval(facts.metrics[key], low, high),
        _gain(run, frozen, key) if frozen and trained else None,
        facts.train.get("events_per_second"),
        json.loads((run / MEMORY).read_text())["bytes"],
    )


def _gain(run: Path, frozen: Path, key: str) -> Interval:
    ours, theirs = record.read_predictions(run), record.read_predictions(frozen)
    rows = ["user_id", "item_id", "timestamp", "split"]
    if not ours.select(rows).equals(theirs.select(rows)):
        raise DataError(f"{run}: other rows than {frozen} scored; remove both and repeat the command")
    path = run / "config.yaml"
    recipe = config.parse_recipe(schema.read_yaml(path), str(path))
    scale = record.read_record(run).data["scale"] if recipe.task == "rating" else (0.0, 1.0)
    compared = report.compare_predictions(ours.with_columns(base_score=theirs["score"]), recipe, scale=scale)
    return compared.differences[record.BASE_MODEL][key]


def table(methods: Sequence[Method], metric: str) -> str:
    """The methods as a Markdown table."""
    lines = [
        f"| method | trained parameters | share | adapter, MB | test {metric} [95 %] | over none [95 %] | events/s "
        "| peak memory, GB |",
        "|---|---:|---:|---:|---|---|---:|---:|",
    ]
    for one in methods:
        gain = "-" if one.gain is None else _cell(one.gain, "+")
        speed = "-" if one.events_per_second is None else f"{one.events_per_second:.1f}"
        lines.append(
            f"| {one.name} | {one.trained:,} | {one.share:.2%} | {one.size / 1e6:.2f} | {_cell(one.figure)} | {gain} "
            f"| {speed} | {one.memory / 1e9:.2f} |"
        )
    return "\n".join(lines)


def _cell(one: Interval, sign: str = "") -> str:
    return f"{one.point:{sign}.3f} [{one.low:{sign}.3f}, {one.high:{sign}.3f}]"


def picture(methods: Sequence[Method], metric: str) -> Figure:
    """Quality of each method, a line with its interval for each; the share of trained parameters stands beside it."""
    with style():
        figure = Figure(figsize=(8, 1 + 0.32 * len(methods)), layout="constrained")
        axes = figure.subplots()
        for place, one in enumerate(methods):
            point, low, high = one.figure.point, one.figure.low, one.figure.high
            axes.errorbar(point, place, xerr=[[point - low], [high - point]], fmt="o", capsize=3, color="C0")
            if not one.trained:
                axes.axvline(point, color="black", linewidth=1, linestyle=(0, (1, 3)))
        axes.set_yticks(range(len(methods)), [f"{one.name}  {one.share:.2%}" for one in methods])
        axes.invert_yaxis()
        axes.set_xlabel(f"test {metric}, 95 % interval (names: share trained)")
    return figure


if __name__ == "__main__":
    with as_one_line():
        main()
