"""Two processes against one on the same cores: events learned a second, metrics, and how long processes wait.

    python benchmarks/processes.py [--rounds 3] [--steps 12] [--write]

Speed is measured in turn (one, two, one, two, …): the demo's model and rows, two rows a step, once by one process with
two threads and once by two processes with one thread each, as `recipes/accelerate/cpu.yaml` and `multi_cpu.yaml` start
them; the median of the pairs' ratios counts. Both then score the same test rows with the same untrained weights. The
share of time that processes wait is counted in tokens: of every step, what the slowest process computes times their
number, less what all of them compute.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from pages import put
from scale import hardware

from peftrec import adapters, backbone, config, encode, interactions, metrics, processes, scorer, split, train
from peftrec.dealer import StepSampler
from peftrec.draws import drawn_order
from peftrec.target import Target

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "recipes/configs/ml-100k/click_lora_demo.yaml"
SETTINGS = {1: "cpu", 2: "multi_cpu"}
CORES = 2
WORLDS = (2, 4, 8)
WINDOW = 1024  # tokens at most, as in recipes/configs/ml-100k/click_lora.yaml


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timed pairs")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of two rows, each time")
    parser.add_argument("--test-rows", type=int, default=300, help="test rows at most, of whole users")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    recipe = config.load_recipe(DEMO, ["--train.gradient_accumulation_steps", "2"])
    if arguments.worker:
        work(recipe, arguments.worker, arguments.steps, arguments.test_rows)
        return
    found: dict[int, list[dict[str, Any]]] = {world: [] for world in SETTINGS}
    for turn in range(arguments.rounds):
        for world in SETTINGS:
            found[world].append(launch(world, turn, arguments.steps, arguments.test_rows))
            print(f"{world} processes: {found[world][-1]['rate']:.1f} events/s", flush=True)
    ratios = [two["rate"] / one["rate"] for one, two in zip(found[1], found[2], strict=True)]
    one, two = found[1][0], found[2][0]
    apart = {key: abs(one["metrics"][key] - two["metrics"][key]) for key in ("auc", "uauc", "log_loss")}
    lines = [
        "| processes x threads | events learned a second, median | test AUC | uauc | log loss |",
        "|---|---:|---:|---:|---:|",
    ]
    for world, runs in found.items():
        m = runs[0]["metrics"]
        lines.append(
            f"| {world} x {CORES // world} | {statistics.median(run['rate'] for run in runs):.1f} "
            f"| {m['auc']:.6f} | {m['uauc']:.6f} | {m['log_loss']:.6f} |"
        )
    lines += [
        "",
        f"Two processes over one: median {statistics.median(ratios):.2f}x of {len(ratios)} pairs "
        f"({', '.join(f'{ratio:.2f}' for ratio in ratios)}), {arguments.steps} steps of two rows each time; training "
        f"losses differ by {max(abs(a - b) for a, b in zip(one['losses'], two['losses'], strict=True)):.1e} at most. "
        f"{one['rows']:,} test rows scored by both with the same weights, in float32: metrics differ by "
        f"{max(apart.values()):.1e} at most. {hardware()}.",
        "",
        *idle_table(recipe),
    ]
    print("\n".join(lines))
    if arguments.write:
        put("processes", "\n".join(lines))


def launch(world: int, turn: int, steps: int, rows: int) -> dict[str, Any]:
    """One worker group, started the way a user starts it."""
    with tempfile.TemporaryDirectory() as folder:
        settings = ROOT / f"recipes/accelerate/{SETTINGS[world]}.yaml"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(settings)]
        command += ["--num_cpu_threads_per_process", str(CORES // world), __file__, "--worker", folder]
        subprocess.run([*command, "--steps", str(steps), "--test-rows", str(0 if turn else rows)], check=True)
        found: dict[str, Any] = json.loads(Path(folder, "found.json").read_text())
    assert found["world"] == world, found
    return found


def work(recipe: config.Recipe, folder: Path, steps: int, rows: int) -> None:
    """What each process does: train a few steps, and in the first round score."""
    state = processes.group()
    backbone.quiet()
    backbone.use_all_cores(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    data = interactions.load(recipe.data, recipe.seed, recipe.task)
    log = split.split(data, recipe.data.split, recipe.seed)
    drawn = drawn_order(len(log.user_ids), recipe.seed, "evaluated users")
    asked = encode.whole_users(np.flatnonzero(log.split == split.TEST), log.user, rows or 1, drawn)
    found: dict[str, Any] = {"world": state.num_processes, "rows": len(asked)}
    if rows:
        loaded = backbone.load(dataclasses.replace(recipe.model, dtype="float32"))
        encoder = encode.Encoder(log, recipe.prompt, loaded.tokenizer, recipe.eval.ties)
        model = scorer.answer_only(loaded.model, encoder.codec.answers)
        test = encoder.evaluate(asked, recipe.eval.history, None)
        read, outputs = train.score(model, test, description="score", processes=state)
        score = Target().measure(outputs)[0]
        measured = metrics.click_metrics(log.label[read], score, log.user[read])
        found["metrics"] = {key: measured[key] for key in ("auc", "uauc", "log_loss")}
    loaded = backbone.load(recipe.model)
    encoder = encode.Encoder(log, recipe.prompt, loaded.tokenizer, recipe.eval.ties)
    model = scorer.answer_only(loaded.model, encoder.codec.answers)
    model = adapters.attach(model, recipe.adapter, base_name=loaded.base.hub_id, seed=recipe.seed)
    how = dataclasses.replace(recipe.train, max_steps=steps, evals=0, logging_steps=1)
    learned = encoder.train(None)
    fitted = train.fit(
        model, learned, learned, Target(), lambda *_: {}, train=how, folder=folder / "run", seed=recipe.seed
    )
    found |= {"rate": fitted.events_per_second, "losses": [line["loss"] for line in fitted.log if "loss" in line]}
    if state.is_main_process:
        (folder / "found.json").write_text(json.dumps(found))
    state.wait_for_everyone()


def idle_table(recipe: config.Recipe) -> list[str]:
    """How long processes wait in an epoch over ml-100k, before and after packing and dealing."""
    data = interactions.load(recipe.data, recipe.seed, recipe.task)
    log = split.split(data, recipe.data.split, recipe.seed)
    prompt = dataclasses.replace(recipe.prompt, max_tokens=WINDOW)
    tokenizer = backbone.load(recipe.model).tokenizer
    packed = encode.Encoder(log, prompt, tokenizer, recipe.eval.ties).train(None)
    windows = list(packed.windows.lengths)
    table = [
        "| processes | a window each, by chance | a packed row each, by chance | four packed rows each, dealt |",
        "|---:|---:|---:|---:|",
    ]
    for world in WORLDS:
        shares = [
            by_chance(windows, world, recipe.seed),
            by_chance(packed.lengths, world, recipe.seed),
            dealt(packed.lengths, 4, world, recipe.seed),
        ]
        table.append(f"| {world} | {' | '.join(f'{share:.1%}' for share in shares)} |")
    shortest, longest = min(windows), max(windows)
    return [
        f"Share of time that processes wait for the slowest, in an epoch over ml-100k: {len(windows):,} windows of "
        f"{shortest} to {longest} tokens, in {len(packed):,} packed rows.",
        "",
        *table,
    ]


def by_chance(costs: list[int], world: int, seed: int) -> float:
    """Idle share where each process takes the next one of the drawn order."""
    order = np.random.default_rng(seed).permutation(costs)
    steps = [order[begin : begin + world] for begin in range(0, len(order), world)]
    return 1 - sum(costs) / (world * sum(int(step.max()) for step in steps))


def dealt(costs: list[int], each: int, world: int, seed: int) -> float:
    """Idle share where a step's rows are dealt by their lengths."""
    sampler = StepSampler(costs, batch=1, passes=each * world, seed=seed, world=world)
    slowest = sum(
        max(sum(costs[row] for batch in sampler.share(step, rank) for row in batch) for rank in range(world))
        for step in sampler.steps()
    )
    return 1 - sum(costs) / (world * slowest)


if __name__ == "__main__":
    main()
