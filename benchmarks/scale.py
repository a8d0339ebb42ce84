"""Interactions -> training windows: seconds and peak memory of each stage, on generated interactions of several sizes.

    python benchmarks/scale.py                                    # 1, 10 and 32 million events
    python benchmarks/scale.py --events 1_000_000 2_000_000       # other sizes
    python benchmarks/scale.py --write                            # and put table and picture into docs/benchmarks.md

Each size is measured in processes of its own: one that reads the tables, as recipes/finetune.py does in front of the
model; one that finds the result in files; and one of those under a limit of memory. The tokenizer is a byte-level BPE
that is trained on the generated titles.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from pages import PAGE, put
from transformers import AutoTokenizer

from peftrec import baselines, config, encode, interactions, kept, prepared, split
from peftrec.datasets import DATASETS

GIGABYTE = 1e9
READ_ROWS = 1000  # packed rows made into arrays
SIZES = (1_000_000, 10_000_000, 32_000_000)
EVENTS_OF_USER = 156
PICTURE = PAGE.with_name("benchmarks-scale.png")

READ, SPLIT, TOKENS, WINDOWS, KEEP = (
    "read, check, code ids",
    "split: sort, temporal",
    "tokenize: each item once",
    "windows cut and packed",
    "keep it all in files",
)
STAGES = (READ, SPLIT, TOKENS, WINDOWS, KEEP)
ARRAYS, AGAIN, COUNTING = f"arrays of {READ_ROWS:,} rows", "again, from the files", "baselines, streaming"


# --- data -------------------------------------------------------------------------------------------------------------


def generate(folder: Path, events: int, users: int, items: int, seed: int) -> None:
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
    """Words of ml-100k's titles put together anew, as many as one of them has, with a year."""
    titles = [title.split() for title in DATASETS["ml-100k"].load().items["title"].to_list()]
    words = np.array([word for title in titles for word in title])
    length = np.array([len(title) for title in titles])[random.integers(0, len(titles), count)]
    drawn = np.split(words[random.integers(0, len(words), int(length.sum()))], np.cumsum(length)[:-1])
    year = random.integers(1930, 2025, count)
    return [f"{' '.join(title)} ({year[i]})" for i, title in enumerate(drawn)]


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
    """Seconds and peak bytes of each stage, those of the stages within it left out."""

    seconds: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    _open: list[str] = field(default_factory=list)
    _since: float = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a block."""
        self._note()
        gc.collect()
        self._open.append(name)
        self._note(begin=True)
        try:
            yield
        finally:
            self._note()
            self._open.pop()
            self._note(begin=True)

    def of(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function, measured at each call."""

        @wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        return measured

    def _note(self, begin: bool = False) -> None:
        now = time.perf_counter()
        if self._open and not begin:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
            self.bytes[name] = max(self.bytes.get(name, 0), peak_bytes())
        reset_peak()
        self._since = time.perf_counter()


def reset_peak() -> None:
    """Let the peak begin at the memory in use, where the system can (Linux); elsewhere peaks are those so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes() -> int:
    """The most memory that this process had in use since `reset_peak`."""
    try:
        return _status("VmHWM")
    except OSError:
        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def own_bytes() -> int:
    """Memory in use that is this process's own, no view of a file (Linux)."""
    return _status("RssAnon")


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, name
    return int(found[1]) * 1024


def measure(folder: Path, tokenizer_folder: str) -> dict[str, Any]:
    """The stages in front of the model, the first time: a dict that JSON can hold."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    stages = Stages()
    # The parts of what a recipe calls, measured where they are called.
    interactions.load = stages.of(interactions.load, READ)
    split.split = stages.of(split.split, SPLIT)
    kept._write = stages.of(kept._write, KEEP)
    source = _source(folder)
    with stages.stage(READ):  # with hashes of the files
        data, log = prepared.load(source, 13)
    with stages.stage(TOKENS):
        encoder = encode.Encoder(log, config.Prompt(), tokenizer, "isolate")
    with stages.stage(WINDOWS):
        train = encoder.train(None)
    with stages.stage(ARRAYS):
        read = _read_rows(train)
    facts = {
        "warnings": list(data.warnings),
        "splits": np.bincount(log.split).tolist(),
        "events": len(log),
        "users": len(log.user_ids),
        "items": log.items.height,
        "tokens": train.tokens,
        "windows": len(train.windows),
        "rows": len(train),
        "read": read,
        "full": train.tokens / (len(train) * config.Prompt().max_tokens),
        "kept": sum(path.stat().st_size for path in (folder / "home").rglob("*") if path.is_file()),
    }
    with stages.stage(COUNTING):
        baselines.predict(log, "streaming")
    return {"seconds": stages.seconds, "bytes": stages.bytes, **facts}


def again(folder: Path, tokenizer_folder: str, limit: int | None = None) -> dict[str, Any]:
    """The same from the files, with at most `limit` bytes of memory of its own."""
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    begin = time.perf_counter()
    _, log = prepared.load(_source(folder), 13)
    train = encode.Encoder(log, config.Prompt(), tokenizer, "isolate").train(None)
    seconds = time.perf_counter() - begin
    own = own_bytes()
    return {"seconds": seconds, "read": _read_rows(train), "own": max(own, own_bytes())}


def _source(folder: Path) -> config.Data:
    return config.Data(
        interactions=str(folder / "interactions.parquet"), items=str(folder / "items.parquet"), like_at=4.0
    )


def _read_rows(train: Any) -> int:
    picked = np.random.default_rng(0).permutation(len(train))[:READ_ROWS]
    return sum(int((train[int(index)]["row"] >= 0).sum()) for index in picked)


def save_tokenizer(folder: Path) -> None:
    """Train a tokenizer on the generated titles."""
    titles = pl.read_parquet(folder / "items.parquet")["title"].to_list()
    small_tokenizer(titles).save_pretrained(folder / "tokenizer")


# --- processes --------------------------------------------------------------------------------------------------------


def apart(function: Callable[..., Any], *args: Any, environment: dict[str, str] | None = None) -> Any:
    """What the function returns, called in a process of its own; None if that ended badly."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        answer = Path(name) / "answer.json"
        process = context.Process(target=_answer, args=(answer, function, args, environment or {}))
        process.start()
        process.join()
        return json.loads(answer.read_text()) if process.exitcode == 0 else None


def _answer(answer: Path, function: Callable[..., Any], args: tuple[Any, ...], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    answer.write_text(json.dumps(function(*args)))


def one_size(folder: Path, events: int, given: argparse.Namespace) -> dict[str, Any]:
    """All figures of one size."""
    shape = (events, max(1, events // EVENTS_OF_USER), given.items, given.seed)
    if not (folder / "interactions.parquet").exists():
        folder.mkdir(parents=True, exist_ok=True)
        apart(generate, folder, *shape)
    tokenizer = str(folder / "tokenizer")
    if not Path(tokenizer).exists():
        apart(save_tokenizer, folder)
    home = {"PEFTREC_HOME": str(folder / "home"), "PEFTREC_PREPARED": "1000"}
    found = apart(measure, folder, tokenizer, environment=home)
    if found is None:
        raise SystemExit(f"{events:,} events: the measurement failed")
    limit = round(given.limit * GIGABYTE)
    found["again"] = apart(again, folder, tokenizer, environment=home)
    found["limited"] = apart(again, folder, tokenizer, limit, environment=home)
    off = {**home, "PEFTREC_PREPARED": "off"}
    found["off"] = apart(again, folder, tokenizer, limit, environment=off) is not None
    found["megabytes"] = (folder / "interactions.parquet").stat().st_size / 1e6
    print(json.dumps({"asked": events, **found}), flush=True)
    return found


# --- report -----------------------------------------------------------------------------------------------------------


def slope(sizes: list[int], values: list[float]) -> float:
    """Of a line through the points on a log-log plot: 1 is linear growth."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def section(found: dict[int, dict[str, Any]], given: argparse.Namespace) -> str:
    sizes = list(found)
    heads = " | ".join(f"{size / 1e6:g} M: s | GB" for size in sizes)
    lines = [f"| stage | {heads} | slope of seconds |", f"|---|{'---:|' * (2 * len(sizes) + 1)}"]

    def line(name: str, seconds: list[float], peak: list[float], bold: str = "") -> None:
        cells = " | ".join(f"{s:.1f} | {b / GIGABYTE:.2f}" for s, b in zip(seconds, peak, strict=True))
        grows = f"{slope(sizes, seconds):.2f}" if len(sizes) > 1 else "-"
        lines.append(f"| {bold}{name}{bold} | {cells} | {grows} |")

    def of(name: str) -> tuple[list[float], list[float]]:
        return [found[n]["seconds"][name] for n in sizes], [found[n]["bytes"][name] for n in sizes]

    for name in STAGES:
        line(name, *of(name))
    line("to training windows", *totals(found), bold="**")
    line(AGAIN, [found[n]["again"]["seconds"] for n in sizes], [found[n]["again"]["own"] for n in sizes])
    line(ARRAYS, *of(ARRAYS))
    line(COUNTING, *of(COUNTING))
    seconds, _ = totals(found)
    ratios = ", ".join(f"{s / found[n]['again']['seconds']:.0f}x" for n, s in zip(sizes, seconds, strict=True))
    largest = found[sizes[-1]]
    bounded = {n: found[n]["limited"] for n in sizes}
    held = "; ".join(
        f"{n / 1e6:g} M: from the files {'runs' if bounded[n] else 'fails'}, from the tables without files "
        f"{'runs' if found[n]['off'] else 'fails'}"
        for n in sizes
    )
    return (
        f"Generated interactions, rows in no order, {EVENTS_OF_USER} a user in the mean, {given.items:,} items "
        f"({largest['megabytes']:,.0f} MB of Parquet for the largest), on {hardware()}. "
        f"The largest gives {largest['windows']:,} windows in {largest['rows']:,} rows of {config.Prompt().max_tokens} "
        f"tokens, {largest['full']:.1%} full, {largest['tokens']:,} tokens.\n\n" + "\n".join(lines) + "\n\n"
        "Memory is that of the whole process at its highest during the stage, the libraries and what earlier stages "
        "keep included; for the second time it is the process's own, without views of files. Baselines are counted "
        "beside the model and are no part of the sum.\n\n"
        f"The second time is {ratios} faster. The files take {largest['kept'] / GIGABYTE:.2f} GB for the largest "
        f"({largest['kept'] / largest['events']:.0f} bytes an event). With {given.limit:g} GB of memory of its own "
        f"(RLIMIT_DATA), {held}.\n\n"
        "![Seconds and memory against interactions](benchmarks-scale.png)"
    )


def totals(found: dict[int, dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Seconds and peak bytes of all stages to the windows, by size."""
    return (
        [sum(one["seconds"][name] for name in STAGES) for one in found.values()],
        [max(one["bytes"][name] for name in STAGES) for one in found.values()],
    )


def draw(found: dict[int, dict[str, Any]], path: Path) -> None:
    """Seconds and memory on log-log axes, with a line of slope 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = list(found)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    seconds, _ = totals(found)
    for name in STAGES:
        left.plot(sizes, [found[n]["seconds"][name] for n in sizes], "o-", lw=1, ms=4, label=name)
        right.plot(sizes, [found[n]["bytes"][name] / GIGABYTE for n in sizes], "o-", lw=1, ms=4, label=name)
    left.plot(sizes, seconds, "ko-", label="all")
    left.plot(sizes, [seconds[-1] * n / sizes[-1] for n in sizes], "k:", label="slope 1")
    right.plot(sizes, [found[n]["again"]["own"] / GIGABYTE for n in sizes], "ks--", ms=4, label=AGAIN)
    for axis, name in ((left, "seconds"), (right, "peak memory (GB)")):
        axis.set(xscale="log", yscale="log", xlabel="interactions", ylabel=name)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def hardware() -> str:
    model = platform.processor() or platform.machine()
    if (cpus := Path("/proc/cpuinfo")).exists():
        found = re.search(r"model name\s*:\s*(.+)", cpus.read_text())
        model = found[1] if found else model
    return f"{os.cpu_count()} cores ({model}, {pl.thread_pool_size()} polars threads)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, nargs="+", default=SIZES)
    parser.add_argument("--items", type=int, default=60_000)
    parser.add_argument("--limit", type=float, default=1.0, help="gigabytes of own memory of the limited process")
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--folder", type=Path, help="keep the generated tables here, and use what lies here")
    parser.add_argument("--generate", action="store_true", help="only make the tables in --folder")
    parser.add_argument("--write", action="store_true", help="put table and picture into docs/benchmarks.md")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="peftrec-scale-") as scratch:
        found = {}
        for events in given.events:
            folder = (given.folder or Path(scratch)) / str(events)
            if given.generate:
                folder.mkdir(parents=True, exist_ok=True)
                shape = (events, max(1, events // EVENTS_OF_USER), given.items, given.seed)
                apart(generate, folder, *shape)
                continue
            shutil.rmtree(folder / "home", ignore_errors=True)
            found[events] = one_size(folder, events, given)
    if not found:
        return
    text = section(found, given)
    print(f"\n{text}")
    if given.write:
        draw(found, PICTURE)
        put("scale", text)


if __name__ == "__main__":
    main()
