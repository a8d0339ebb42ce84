"""Seconds and peak memory of everything in front of the model, on generated interactions of any number.

    python benchmarks/scale.py                        # 25 million events, 160 thousand users, 60 thousand items
    python benchmarks/scale.py --events 1_000_000     # the same shape, smaller
    python benchmarks/scale.py --write                # and put the table into docs/benchmarks.md

The stages are the ones of recipes/finetune.py, in one process that keeps what the recipe keeps; no model is loaded. The
tokenizer is a byte-level BPE that is trained on the generated titles, or a real one with `--tokenizer FOLDER`.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import platform
import re
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from pages import put

from peftrec import baselines, config, encode, interactions, split, timeline

GIGABYTE = 1e9
MATERIALIZED = 1000  # packed rows made into arrays
SYLLABLES = ("an", "bel", "cor", "da", "el", "fen", "gor", "hal", "in", "jo", "ka", "lum", "mor", "ne", "pa", "ver")


# --- data -------------------------------------------------------------------------------------------------------------


def generate(folder: Path, events: int, users: int, items: int, text_ids: bool, seed: int) -> None:
    """Write interactions.parquet and items.parquet, rows in no order.

    Lengths of users are lognormal (a median of 0.45 of the mean, a few of a hundred times the mean), items have a long
    tail, a third of a user's events share their second with the one before, and ratings are half stars that depend on
    user and item.
    """
    random = np.random.default_rng(seed)
    weight = random.lognormal(0, 1.25, users)
    length = np.maximum(1, np.floor(weight / weight.sum() * (events - users))).astype(np.int64)
    user = np.repeat(np.arange(users, dtype=np.int32), length)
    user = np.concatenate((user, random.integers(0, users, events - len(user), dtype=np.int32)))
    random.shuffle(user)
    gap = np.where(random.random(events) < 1 / 3, 0, random.exponential(2000, events)).astype(np.int64)
    seconds = random.integers(800_000_000, 1_500_000_000, users)[user]
    seconds += _running_by(user, gap)
    # The square sends many events to few items.
    item = (items * random.random(events) ** 2.5).astype(np.int32)
    quality, kindness = random.normal(0, 0.5, items), random.normal(0, 0.5, users)
    stars = 3.5 + quality[item] + kindness[user] + random.normal(0, 0.8, events)
    rating = (np.clip(np.round(stars * 2), 1, 10) / 2).astype(np.float32)
    table = pl.DataFrame({"user_id": user, "item_id": item, "rating": rating, "timestamp": seconds})
    catalogue = pl.DataFrame({"item_id": np.arange(items, dtype=np.int32), "title": _titles(items, random)})
    if text_ids:
        table = table.with_columns(_text("U", "user_id"), _text("B", "item_id"))
        catalogue = catalogue.with_columns(_text("B", "item_id"))
    table.write_parquet(folder / "interactions.parquet")
    catalogue.write_parquet(folder / "items.parquet")


def _running_by(key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Cumulative sum of `value` within each key, (n,)."""
    order = np.argsort(key, kind="stable")
    total = np.cumsum(value[order])
    first = np.flatnonzero(np.diff(key[order], prepend=-1))
    total -= np.repeat(total[first] - value[order][first], np.diff(first, append=len(key)))
    running = np.empty_like(total)
    running[order] = total
    return running


def _titles(count: int, random: np.random.Generator) -> list[str]:
    words = np.array([(a + b).capitalize() for a in SYLLABLES for b in SYLLABLES])
    drawn = words[random.integers(0, len(words), (count, 4))]
    used, year = random.integers(1, 5, count), random.integers(1930, 2025, count)
    return [f"{' '.join(drawn[i, : used[i]])} ({year[i]})" for i in range(count)]


def _text(prefix: str, name: str) -> pl.Expr:
    return (prefix + pl.col(name).cast(pl.String).str.zfill(9)).alias(name)


def small_tokenizer(titles: list[str]) -> Any:
    """A byte-level BPE like those of current models, trained on the titles."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<bos>"], initial_alphabet=alphabet, show_progress=False
    )
    # The answers must be single tokens, so they are in the text often enough.
    lines = [f"{title}:{answer}\n" for title in titles[:20_000] for answer in (" yes", " no")]
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>")


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Stages:
    """What each stage took; rows of the table."""

    rows: list[tuple[str, float, float, float, str]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[list[str]]:
        """Measure a block; what it appends to the list is said of it in the table."""
        gc.collect()
        reset_peak()
        notes: list[str] = []
        begin, cpu_begin = time.perf_counter(), time.process_time()
        yield notes
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu_begin
        peak, note = peak_bytes() / GIGABYTE, ", ".join(notes)
        self.rows.append((name, seconds, cpu, peak, note))
        print(f"{name}: {seconds:.1f} s, {cpu:.1f} s of CPU, {peak:.2f} GB, {note}", flush=True)

    def table(self) -> str:
        """Markdown."""
        _, seconds, cpu, peak, _ = zip(*self.rows, strict=True)
        rows = [*self.rows, ("**all**", sum(seconds), sum(cpu), max(peak), "")]
        lines = ["| stage | seconds | CPU seconds | peak memory (GB) | result |", "|---|---:|---:|---:|---|"]
        return "\n".join(lines + [f"| {n} | {s:.1f} | {c:.1f} | {p:.2f} | {note} |" for n, s, c, p, note in rows])


def reset_peak() -> None:
    """Let the peak begin at the memory in use, where the system can (Linux); elsewhere peaks are those so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes() -> int:
    """The most memory that this process had in use since `reset_peak`."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]
    except (OSError, TypeError):
        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run(folder: Path, tokenizer_folder: str | None) -> Stages:
    stages = Stages()
    source = config.Data(
        interactions=str(folder / "interactions.parquet"), items=str(folder / "items.parquet"), like_at=4.0
    )
    with stages.stage("load: read, check, code ids") as notes:
        data = interactions.load(source, seed=13)
        counts = {"events": data.events.height, "users": len(data.user_ids), "items": data.items.height}
        notes += [f"{count:,} {name}" for name, count in counts.items()]
    with stages.stage("split: sort, temporal") as notes:
        log = split.split(data, source.split, seed=13)
        notes += [f"{name} {rows:,}" for name, rows in zip(split.SPLITS, np.bincount(log.split), strict=True)]
    with stages.stage("baselines: streaming, shrinkage chosen") as notes:
        known = baselines.predict(log, "streaming")
        prior = known.scores["bias"].astype(np.float32)
        notes += [f"{name} {value:g}" for name, value in asdict(known.shrinkage).items()]
    with stages.stage("tokens: each item once") as notes:
        tokenizer = load_tokenizer(tokenizer_folder, log.items["title"].to_list())
        encoder = encode.Encoder(log, config.Prompt(), tokenizer, "isolate")
        tokens = encoder.questions.lengths
        notes += [f"{tokens.sum():,} tokens", f"{tokens.mean():.1f} an item"]
    with stages.stage("training: windows cut and packed") as notes:
        train = encoder.train(prior)
        notes += sizes(train)
    with stages.stage(f"training: arrays of {MATERIALIZED:,} rows") as notes:
        picked = np.random.default_rng(0).permutation(len(train))[:MATERIALIZED]
        read = sum(int((train[int(index)]["row"] >= 0).sum()) for index in picked)
        notes += [f"{read:,} events read"]
    with stages.stage("test: windows cut and packed") as notes:
        notes += sizes(encoder.evaluate(np.flatnonzero(log.split == split.TEST), "streaming", prior))
    return stages


def load_tokenizer(folder: str | None, titles: list[str]) -> Any:
    if folder is None:
        return small_tokenizer(titles)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def sizes(packed: timeline.WindowDataset) -> list[str]:
    full = packed.tokens / (len(packed) * config.Prompt().max_tokens)
    counts = {"events read": packed.events, "windows": len(packed.windows), "rows": len(packed)}
    return [*(f"{count:,} {name}" for name, count in counts.items()), f"{full:.1%} full"]


# --- report -----------------------------------------------------------------------------------------------------------


def section(stages: Stages, arguments: argparse.Namespace, megabytes: float) -> str:
    command = f"python benchmarks/scale.py --events {arguments.events:_} --ids {arguments.ids}"
    return (
        f"{arguments.events:,} generated interactions of {arguments.users:,} users and {arguments.items:,} items, "
        f"{arguments.ids} ids, rows in no order ({megabytes:,.0f} MB of Parquet), on {hardware()}. "
        f"Made by `{command} --write`.\n\n{stages.table()}\n\n"
        "Memory is that of the whole process at its highest during the stage: what earlier stages keep and the "
        "libraries are in it."
    )


def hardware() -> str:
    model = platform.processor() or platform.machine()
    if (cpus := Path("/proc/cpuinfo")).exists():
        found = re.search(r"model name\s*:\s*(.+)", cpus.read_text())
        model = found[1] if found else model
    return f"{os.cpu_count()} cores ({model}, {pl.thread_pool_size()} polars threads)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=25_000_000)
    parser.add_argument("--users", type=int, help="one for 156 events if left out")
    parser.add_argument("--items", type=int, default=60_000)
    parser.add_argument("--ids", choices=["integer", "text"], default="integer")
    parser.add_argument("--tokenizer", help="folder of a tokenizer; trained on the titles if left out")
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    arguments = parser.parse_args()
    arguments.users = arguments.users or max(1, arguments.events * 160_000 // 25_000_000)
    with tempfile.TemporaryDirectory(prefix="peftrec-scale-") as name:
        folder = Path(name)
        # In a process of its own, so that its memory is not counted.
        shape = (arguments.events, arguments.users, arguments.items, arguments.ids == "text", arguments.seed)
        maker = multiprocessing.get_context("spawn").Process(target=generate, args=(folder, *shape))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit(f"generating failed (exit code {maker.exitcode})")
        megabytes = (folder / "interactions.parquet").stat().st_size / 1e6
        stages = run(folder, arguments.tokenizer)
    text = section(stages, arguments, megabytes)
    print(f"\n{text}")
    if arguments.write:
        put("scale", text)


if __name__ == "__main__":
    main()
