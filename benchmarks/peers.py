"""Side by side with what people would use instead: training, scoring, this machine's ceiling, and where the time goes.

    make bench                                                    # builds both environments, measures, writes the page
    python benchmarks/peers.py [--only training scoring ceiling profile paper] [--rounds 5] [--write]
    python benchmarks/peers.py --device cuda                      # the same tables of a GPU

The peers run in an environment of their own (benchmarks/requirements-peers.txt), in a process that stays, and so do we.
Both are asked in turn, so that neither imports nor loading are timed and both meet the same machine; a first round
warms up. A ratio is taken within a round; medians of the rounds are shown, with the smallest and the largest. Both have
the same base model, LoRA, people, events, number of threads and type of numbers: the one that `model.dtype: auto` takes
here. A section is written as soon as it is measured; `--only` measures the others later.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import paper
import peers_tables as tables
from pages import put
from workers import Worker

HERE = Path(__file__).parent
SECTIONS = ("training", "scoring", "ceiling", "profile", "paper")
WITH_PEERS = {"training", "scoring"}
PICTURE = HERE.parent / "docs/benchmarks-peers.png"

ROWS = 1  # timeline rows of 1,024 tokens in a round
CANDIDATES, HISTORY = 100, 50
SHORT = 10  # events of history, and candidates, of a short request


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections to measure")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count, behind one that warms up")
    parser.add_argument(
        "--events", type=int, default=4, help="that a peer learns in a round, from the shortest prompt to the longest"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4], help="batch sizes that peers may try")
    parser.add_argument("--requests", type=int, default=16, help="timed for p50 and p99, at least")
    parser.add_argument("--users", type=int, nargs="+", default=tables.USERS, help="who ask at the same moment")
    parser.add_argument(
        "--asked",
        type=int,
        default=4,
        help=f"candidates that a peer is asked; its time is for {CANDIDATES}, in proportion",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=_cores(), help="of either side")
    parser.add_argument("--peers-python", type=Path, default=HERE.parent / ".venv-peers/bin/python")
    parser.add_argument("--write", action="store_true", help="put tables and picture into docs/")
    options = parser.parse_args()
    needs_peers = bool(WITH_PEERS & set(options.only))
    if needs_peers and not options.peers_python.exists():
        raise SystemExit(
            f"{options.peers_python}: not found; expected the peers' environment: build it with `make bench`"
        )
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="peftrec-peers-") as folder:
        ours = _start(sys.executable, "peers_ours", folder, options)
        theirs = None
        try:
            facts = ours.ask("setup", device=options.device, folder=folder)
            if needs_peers:
                theirs = _start(options.peers_python, "peers_theirs", folder, options)
                told = {key: facts[key] for key in ("base", "encoder", "lora", "dtype")}
                facts["versions"] = theirs.ask(
                    "setup", device=options.device, adapter=str(Path(folder, "causal")), **told
                )
            ways: dict[str, Callable[..., Any]] = {
                "training": training,
                "scoring": scoring,
                "ceiling": ceiling,
                "profile": profile,
                "paper": lambda *_: paper.estimate(facts["timeline_tokens"], facts["pointwise_tokens"]),
            }
            for name in options.only:
                measured[name] = ways[name](ours, theirs, facts, options)
                text = getattr(tables, name)(measured[name], facts, options)
                print(f"\n## {name}\n\n{text}", flush=True)
                if options.write:
                    put(f"peers_{name}", text)
        finally:
            for worker in (ours, theirs):
                if worker is not None:
                    worker.close()
    if options.write and measured.keys() >= WITH_PEERS:
        tables.picture(PICTURE, measured["training"], measured["scoring"])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(python: str | Path, name: str, folder: str, options: argparse.Namespace) -> Worker:
    environment = {
        "OMP_NUM_THREADS": str(options.threads),
        "POLARS_MAX_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true" if options.device == "cpu" else "false",
    }
    return Worker(Path(python), HERE / f"{name}.py", Path(folder, f"{name}.log"), environment)


def in_turn(rounds: int, ways: dict[str, Callable[[], dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Each way once a round; the first round does not count."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            once = way()
            print(f"{'warm-up' if turn == 0 else f'round {turn}'}: {name}: {once['seconds']:.2f} s", flush=True)
            if turn:
                found[name].append(once)
    return found


def best(sizes: Sequence[int], way: Callable[[int], dict[str, Any]]) -> int:
    """The size with which `way` takes the least time."""
    if len(sizes) == 1:
        return sizes[0]
    way(sizes[0])  # the first call pays for more than its size
    took = {size: way(size)["seconds"] for size in sizes}
    print("batch sizes: " + ", ".join(f"{size}: {seconds:.2f} s" for size, seconds in took.items()), flush=True)
    return min(took, key=lambda size: took[size])


def training(ours: Worker, theirs: Worker, facts: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds, events and tokens of each trainer, by round."""
    del facts
    rows = ours.ask("prompts", events=options.events)
    single = best(options.batches, lambda size: theirs.ask("sft", rows=rows, batch=size, packing=False))
    packed = best(options.batches[:1], lambda size: theirs.ask("sft", rows=rows, batch=size, packing=True))
    padded = best(options.batches, lambda size: theirs.ask("loop", rows=rows, batch=size))
    names = {
        tables.TIMELINE: lambda: ours.ask("fit", layout="timeline", size=ROWS),
        tables.PLAIN: lambda: ours.ask("fit", layout="timeline", size=ROWS, model="plain"),
        f"TRL SFTTrainer, batches of {single}": lambda: theirs.ask("sft", rows=rows, batch=single, packing=False),
        tables.POINTWISE: lambda: ours.ask("fit", layout="pointwise", size=options.events),
        f"TRL SFTTrainer, packing, batches of {packed}": lambda: theirs.ask(
            "sft", rows=rows, batch=packed, packing=True
        ),
        f"transformers + PEFT loop, batches of {padded}": lambda: theirs.ask("loop", rows=rows, batch=padded),
    }
    return in_turn(options.rounds, names)


def scoring(ours: Worker, theirs: Worker, facts: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each scorer by round; our seconds by size; an encoder's; whether the scores are the same."""
    asked = ours.ask("request", kind="causal", number=0, history=HISTORY, candidates=CANDIDATES)
    texts = asked.pop("texts")[: options.asked]
    told = {"prompts": texts, "answers": facts["answers"]}
    size = best(options.batches, lambda batch: theirs.ask("forward", batch=batch, keep=1, **told))

    def whole(found: dict[str, Any]) -> dict[str, Any]:
        return {**found, "seconds": found["seconds"] * CANDIDATES / options.asked}

    ways = {
        tables.OURS: lambda: ours.ask("score", kind="causal", **asked),
        "transformers pipeline, one token": lambda: whole(theirs.ask("written", prompts=texts, batch=size)),
        "generate with scores": lambda: whole(theirs.ask("generated", batch=size, **told)),
        "forward": lambda: whole(theirs.ask("forward", batch=size, keep=0, **told)),
        tables.KEEP_ONE: lambda: whole(theirs.ask("forward", batch=size, keep=1, **told)),
    }
    found: dict[str, Any] = {"causal": in_turn(options.rounds, ways), "batch": size}
    found["scores"] = [found["causal"][name][-1]["scores"][: options.asked] for name in (tables.OURS, tables.KEEP_ONE)]

    asked = ours.ask("request", kind="encoder", number=0, history=HISTORY, candidates=CANDIDATES)
    pairs = asked.pop("texts")
    batch = best([8, 32], lambda size: theirs.ask("pairs", texts=pairs, batch=size))
    found["encoder"] = in_turn(
        options.rounds,
        {
            tables.OURS: lambda: ours.ask("score", kind="encoder", **asked),
            f"CrossEncoder, batches of {batch}": lambda: theirs.ask("pairs", texts=pairs, batch=batch),
        },
    )

    def seconds(number: int, history: int, candidates: int) -> float:
        asked = ours.ask("request", kind="causal", number=number, history=history, candidates=candidates)
        del asked["texts"]
        took: float = ours.ask("score", kind="causal", **asked)["seconds"]
        return took

    found["waits"] = {
        (users, history, candidates): [
            wait
            for turn in range(-(-options.requests // users))
            for wait in ours.ask("burst", users=users, begin_at=turn * users, history=history, candidates=candidates)
        ]
        for history, candidates in ((HISTORY, CANDIDATES), (SHORT, SHORT))
        for users in options.users
    }
    # In turn as well: what disturbs the machine for a while then disturbs all sizes.
    candidates: dict[int, list[float]] = {size: [] for size in tables.MANY_CANDIDATES}
    history: dict[int, list[float]] = {size: [] for size in tables.LONG_HISTORIES}
    for turn in range(min(options.rounds, 3)):
        for size in candidates:
            candidates[size].append(seconds(turn, HISTORY, size))
        for size in history:
            history[size].append(seconds(turn, size, CANDIDATES))
    return {**found, "candidates": candidates, "history": history}


def ceiling(ours: Worker, theirs: Any, facts: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What matrix products and copies reach, and what training and scoring reach of that, by round.

    The type that is the faster one in a first look is the ceiling, whatever type we train in.
    """
    del theirs
    ask = partial(ours.ask, "ceiling", shape=facts["shape"])
    first = ask(tokens=tables.FIRST_LOOK, types=tables.TYPES)
    best_type = max(tables.TYPES, key=lambda one: tables.speed(first, one))
    rows = {"timeline": ROWS, "short": 2 * ROWS}
    parts: dict[str, Callable[[], dict[str, Any]]] = {"ceiling": partial(ask, tokens=1024, types=[best_type])}
    for layout, count in rows.items():
        parts[f"training {layout}"] = partial(ours.ask, "fit", layout=layout, size=count)
        parts[f"forward {layout}"] = partial(ours.ask, "read", layout=layout, rows=count)
    found: dict[str, Any] = {name: [] for name in parts}
    for turn in range(options.rounds + 1):
        for name, part in parts.items():
            once = part()
            if turn:
                found[name].append(once)
    return {"first": first, "type": best_type, **found}


def profile(ours: Worker, *_: Any) -> dict[str, Any]:
    """Milliseconds of the parts of one training step."""
    found: dict[str, Any] = ours.ask("profile", steps=2)
    return found


if __name__ == "__main__":
    main()
