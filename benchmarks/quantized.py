"""What quantizing the packaged base model saves and costs: memory, speed, and AUC after the demo's training.

    python benchmarks/quantized.py --write                 # both parts; about 25 minutes on two free cores
    python benchmarks/quantized.py --parts cost --write    # memory and speed; 2 minutes
    python benchmarks/quantized.py --parts auc --write     # trains three times, 90 steps each, and scores four times

Memory is measured in a process for each setting. Speed is measured in turn in one process, a step of each setting in
each round. The AUC part trains recipes/configs/ml-100k/click_lora_demo.yaml.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from pages import put
from scale import hardware, peak_bytes, reset_peak

from peftrec import (
    adapters,
    backbone,
    config,
    encode,
    interactions,
    opponents,
    quantized,
    record,
    scorer,
    split,
    train,
)
from peftrec.bootstrap import bootstrap
from peftrec.draws import drawn_order
from peftrec.target import Target

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "recipes/configs/ml-100k/click_lora_demo.yaml"
SETTINGS = {"bfloat16": "", "4-bit": "model.load_in_4bit", "8-bit": "model.load_in_8bit"}
WHOLE_BASE = "4-bit, scored on the bfloat16 base"
TOKENS, FEW = 512, 16  # in a row: as in the demo, and so few that activations hardly count
MEGABYTE = 1e6


# --- memory and speed -------------------------------------------------------------------------------------------------


def recipe_of(name: str) -> config.Recipe:
    option = [f"--{SETTINGS[name]}", "true"] if SETTINGS[name] else []
    return config.load_recipe(DEMO, option)


class Trainee:
    """The demo's model and adapter in one setting, with its optimizer."""

    def __init__(self, name: str) -> None:
        recipe = recipe_of(name)
        loaded = backbone.load(recipe.model)
        self.base = loaded.base
        no, yes = (loaded.tokenizer(text, add_special_tokens=False).input_ids[0] for text in (" no", " yes"))
        model = scorer.answer_only(loaded.model, [no, yes])
        self.model = adapters.attach(model, recipe.adapter, base_name=loaded.base.hub_id, seed=recipe.seed)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=5e-4)
        self.ids = torch.randint(1000, 40_000, (1, TOKENS), generator=torch.Generator().manual_seed(1))

    def step(self, tokens: int = TOKENS) -> None:
        """One optimizer step on one row, with an answer at every tenth token."""
        logits = self.model.train()(input_ids=self.ids[:, :tokens]).logits[0, 9::10]
        torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)) % 2).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.inference_mode()
    def score(self) -> None:
        """One forward pass."""
        self.model.eval()(input_ids=self.ids)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes, by what holds them.

    Attributes:
        linear: the layers that can be quantized, with their scales and tables.
        other: embeddings, norms, answer rows.
        training: adapter, its gradients and AdamW's two moments.
        peak: most memory that the process had in use in three training steps on a row of `FEW` tokens, less what it
            had before the model.
        peak_row: the same on a row of `TOKENS` tokens.
        linear_parameters: in `linear`.
        fingerprint: of the base model.
    """

    linear: int
    other: int
    training: int
    peak: int
    peak_row: int
    linear_parameters: int
    fingerprint: str


def measure_memory(name: str) -> Memory:
    backbone.quiet()
    import peft  # noqa: F401  (before the model, so that libraries are not counted)

    before = resident_bytes()
    one = Trainee(name)
    layers = {id(layer) for layer in linear_layers(one.model)}
    held: dict[bool, dict[int, int]] = {True: {}, False: {}}
    for module in one.model.modules():
        for tensor in tensors(module):
            if not tensor.requires_grad and not hasattr(module, "base_layer"):
                storage = tensor.untyped_storage()
                held[id(module) in layers][storage.data_ptr()] = storage.nbytes()
    adapter = sum(parameter.numel() * parameter.element_size() for parameter in one.trained)
    peaks = []
    for tokens in (FEW, TOKENS):
        give_back()
        reset_peak()
        for _ in range(3):
            one.step(tokens)
        peaks.append(peak_bytes() - before)
    moments = sum(
        value.numel() * value.element_size()
        for state in one.optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    )
    return Memory(
        linear=sum(held[True].values()),
        other=sum(held[False].values()),
        training=2 * adapter + moments,
        peak=peaks[0],
        peak_row=peaks[1],
        linear_parameters=sum(layer.in_features * layer.out_features for layer in linear_layers(one.model)),
        fingerprint=one.base.fingerprint,
    )


def linear_layers(model: Any) -> list[Any]:
    """The base model's own, whether quantized or not."""
    if found := quantized.layers(model):
        return list(found.values())
    return [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lora_" not in n]


def tensors(module: Any) -> Iterator[torch.Tensor]:
    """All that a module holds itself; bitsandbytes keeps scales beside the parameters."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
    weight, state = getattr(module, "weight", None), getattr(module, "state", None)
    packed = getattr(weight, "quant_state", None)
    beside = [getattr(weight, "SCB", None), getattr(state, "SCB", None)]
    for one in (packed, getattr(packed, "state2", None)):
        beside += [getattr(one, part, None) for part in ("absmax", "code", "offset")]
    yield from (one for one in beside if torch.is_tensor(one))


def resident_bytes() -> int:
    give_back()
    reset_peak()
    return peak_bytes()


def give_back() -> None:
    """Let the C library return what was freed, where it can (glibc): what loading left is not the model's."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def measure_speed(rounds: int) -> dict[str, tuple[float, float]]:
    """Tokens a second of each setting: (trained, scored), medians over rounds in which all take their turn."""
    trainees = {name: Trainee(name) for name in SETTINGS}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in SETTINGS}
    for one in trainees.values():
        one.step()
        one.score()
    for _ in range(rounds):
        for name, one in trainees.items():
            begin = time.perf_counter()
            one.step()
            middle = time.perf_counter()
            one.score()
            seconds[name].append((middle - begin, time.perf_counter() - middle))
    return {
        name: tuple(TOKENS / statistics.median(column) for column in zip(*pairs, strict=True))  # type: ignore[misc]
        for name, pairs in seconds.items()
    }


def cost(rounds: int) -> str:
    context = multiprocessing.get_context("spawn")
    memory = {}
    for name in SETTINGS:
        with context.Pool(1) as pool:
            memory[name] = pool.apply(measure_memory, (name,))
        print(f"{name}: {memory[name]}", flush=True)
    assert len({one.fingerprint for one in memory.values()}) == 1
    speed = measure_speed(rounds)
    whole = memory["bfloat16"]
    lines = [
        "| base model | linear layers (MB) | embeddings, norms (MB) | all weights (MB) | of bfloat16 | "
        f"adapter, gradients, AdamW (MB) | all of it, of bfloat16 | peak, {FEW} tokens (MB) | "
        f"peak, {TOKENS} tokens (MB) | trained (tokens/s) | scored (tokens/s) |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, one in memory.items():
        weights, full = one.linear + one.other, whole.linear + whole.other
        cells = [
            *(f"{part / MEGABYTE:.1f}" for part in (one.linear, one.other, weights)),
            f"{weights / full:.1%}",
            f"{one.training / MEGABYTE:.1f}",
            f"{(weights + one.training) / (full + whole.training):.1%}",
            *(f"{peak / MEGABYTE:.0f}" for peak in (one.peak, one.peak_row)),
            *(f"{rate:.0f}" for rate in speed[name]),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    bits = 8 * memory["4-bit"].linear / whole.linear_parameters
    return "\n".join(lines) + (
        f"\n\n{whole.linear_parameters / 1e6:.0f} million parameters are in linear layers, which alone are quantized "
        f"({bits:.2f} bits each in 4-bit, scales included); the {whole.other / 2e6:.0f} million in the embeddings stay "
        "in bfloat16. Weights, adapter and optimizer are counted tensor by tensor. A peak is the most that three steps "
        f"on one row need above the process without a model: with {FEW} tokens next to nothing are activations, with "
        f"{TOKENS} most are. Tokens a second: medians of {rounds} rounds, in turn, on {hardware()} with "
        f"{torch.get_num_threads()} threads."
    )


# --- AUC --------------------------------------------------------------------------------------------------------------


def fine_tune(name: str, folder: Path, steps: int | None) -> Path:
    run = folder / (name if steps is None else f"{name}-{steps}")
    command = [sys.executable, str(ROOT / "recipes/finetune.py"), "--config", str(DEMO), "--output_dir", str(run)]
    if SETTINGS[name]:
        command += [f"--{SETTINGS[name]}", "true"]
    if steps is not None:
        command += ["--train.max_steps", str(steps)]
    if not (run / "run.json").is_file():
        subprocess.run([*command, *(["--resume"] if run.exists() else [])], check=True, cwd=ROOT)
    return run


def on_the_whole_base(run: Path) -> dict[str, np.ndarray]:
    """Scores by a run's adapter on the base model as it is, in the order of the run's predictions."""
    recipe = config.load_recipe(run / "config.yaml")
    data = interactions.load(recipe.data, recipe.seed, recipe.task)
    log = split.split(data, recipe.data.split, recipe.seed)
    prior = opponents.measure(log, recipe).prior
    loaded = backbone.load(dataclasses.replace(recipe.model, load_in_4bit=False, load_in_8bit=False))
    encoder = encode.Encoder(log, recipe.prompt, loaded.tokenizer, recipe.eval.ties, task=recipe.task)
    model = adapters.load(scorer.answer_only(loaded.model, encoder.codec.answers), run / "adapter")
    drawn = drawn_order(len(log.user_ids), recipe.seed, "evaluated users")
    tested = encode.whole_users(np.flatnonzero(log.split == split.TEST), log.user, recipe.eval.max_test_rows, drawn)
    rows, outputs = train.score(
        model, encoder.evaluate(tested, recipe.eval.history, prior), description="score on the whole base"
    )
    target = Target()
    return {
        "user_id": log.user_ids.gather(log.user[rows]).to_numpy(),
        "score": target.measure(outputs, None if prior is None else prior[rows])[0],
        "score_no_prior": target.measure(outputs)[0],
    }


def auc(folder: Path, steps: int | None) -> str:
    runs = {name: fine_tune(name, folder, steps) for name in SETTINGS}
    tables = {name: record.read_predictions(run).filter(pl.col("split") == "test") for name, run in runs.items()}
    rows = tables["bfloat16"].select("user_id", "item_id", "timestamp", "label")
    assert all(table.select(rows.columns).equals(rows) for table in tables.values())
    scores = {
        part: {name: table[part].to_numpy() for name, table in tables.items()}
        for part in ("score", "score_no_prior", "base_score")
    }
    moved = on_the_whole_base(runs["4-bit"])
    assert rows["user_id"].to_list() == moved["user_id"].tolist()
    for part in ("score", "score_no_prior"):
        scores[part][WHOLE_BASE] = moved[part]
    measured = {
        part: bootstrap(rows["label"].to_numpy(), {**by_name}, rows["user_id"].to_list())
        for part, by_name in scores.items()
    }
    lines = [
        "| trained on | AUC | minus bfloat16 | AUC, no prior | minus bfloat16 | AUC, untrained base | log loss | "
        "minutes of training |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in (*SETTINGS, WHOLE_BASE):
        cells = []
        for part in ("score", "score_no_prior"):
            found = measured[part].intervals[name]["auc"]
            cells.append(f"{found.point:.4f} [{found.low:.3f}, {found.high:.3f}]")
            cells.append("-" if name == "bfloat16" else minus(measured[part].differences[name]["auc"]))
        trained = name in SETTINGS
        cells.append(f"{measured['base_score'].intervals[name]['auc'].point:.4f}" if trained else "-")
        cells.append(f"{measured['score'].intervals[name]['log_loss'].point:.4f}")
        seconds = record.read_record(runs[name]).train["seconds"] if trained else 0
        cells.append(f"{seconds / 60:.1f}" if trained else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    correlation = np.corrcoef(scores["score_no_prior"]["4-bit"], scores["score_no_prior"][WHOLE_BASE])[0, 1]
    away = np.abs(scores["score_no_prior"]["4-bit"] - scores["score_no_prior"][WHOLE_BASE]).mean()
    facts = record.read_record(runs["bfloat16"])
    return "\n".join(lines) + (
        f"\n\n{facts.train['steps']} steps of the demo's recipe, seed {facts.seed}; {rows.height:,} test rows of "
        f"{rows['user_id'].n_unique()} people; [low, high]: 95 % over resamples of the people, differences on the same "
        f"rows and resamples. The last line is the adapter that was trained on the 4-bit base: on the bfloat16 base "
        f"its log-odds without the prior are {away:.2f} away on average and correlate by {correlation:.3f}. On "
        f"{hardware()}."
    )


def minus(difference: Any) -> str:
    """A paired difference; `bootstrap` takes each scorer off the first."""
    return f"{-difference.point:+.4f} [{-difference.high:+.3f}, {-difference.low:+.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["cost", "auc"], default=["cost", "auc"])
    parser.add_argument("--rounds", type=int, default=7, help="of the speed measurement")
    parser.add_argument("--max-steps", type=int, help="of each training; the demo's if left out")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/quantized", help="where the trained runs are kept")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    arguments = parser.parse_args()
    backbone.quiet()
    backbone.use_all_cores(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    for part in arguments.parts:
        text = cost(arguments.rounds) if part == "cost" else auc(arguments.runs, arguments.max_steps)
        print(f"\n{text}\n", flush=True)
        if arguments.write:
            put(f"quantized-{part}", text)


if __name__ == "__main__":
    main()
