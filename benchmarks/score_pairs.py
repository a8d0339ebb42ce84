"""Pairs scored a second by `score_pairs` against `Recommender.score` pair by pair, on the same pairs in turn.

    python benchmarks/score_pairs.py ADAPTER [--users 5] [--rounds 3] [--write]

Two tables over ml-100k: 20 candidates for each user behind 30 events, all at one time; and the same pairs, which
are the users' own next events, each at its own time. Each round draws other users.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from pages import put
from scale import hardware

from peftrec import backbone
from peftrec.datasets import DATASETS
from peftrec.histories import Histories
from peftrec.pairs import score_pairs
from peftrec.recommender import Recommender

PAGE = Path(__file__).parent.parent / "docs/scoring.md"
EVENTS, CANDIDATES = 30, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="of ml-100k, such as runs/ml-100k-click-lora-demo/adapter")
    parser.add_argument("--users", type=int, default=5, help="of a round")
    parser.add_argument("--rounds", type=int, default=3, help="timed pairs of each table")
    parser.add_argument("--write", action="store_true", help="put the table into docs/scoring.md")
    given = parser.parse_args()
    backbone.quiet()
    tables = DATASETS["ml-100k"].load()
    recommender = Recommender.from_pretrained(given.adapter)
    assert recommender.catalogue.items is not None
    events = tables.interactions.sort("user_id", "timestamp", maintain_order=True)
    log = Histories.read(events, recommender.artifact, recommender.catalogue.items)
    lengths = events.group_by("user_id", maintain_order=True).len().filter(pl.col("len") >= EVENTS + CANDIDATES)
    people = np.random.default_rng(13).permutation(lengths["user_id"].to_numpy())
    lines = [
        "| pairs | pair by pair, a second | together, a second | ratio: median (lowest to highest) | forward passes |",
        "|---|---:|---:|---:|---:|",
    ]
    far = 0.0
    for name, at_once in (
        ("a user's 20 candidates at one time", True),
        ("a user's 20 later events, each at its time", False),
    ):
        slow, fast, passes = [], [], [0, 0]
        for turn in range(given.rounds):
            users = people[turn * given.users : (turn + 1) * given.users]
            pairs = asked(events.filter(pl.col("user_id").is_in(users.tolist())), at_once=at_once)
            singly, seconds, calls = timed(recommender, lambda pairs=pairs: one_by_one(recommender, pairs, log))
            slow.append(len(pairs) / seconds)
            passes[0] += calls
            joined, seconds, calls = timed(
                recommender, lambda pairs=pairs: score_pairs(recommender, pairs, log)["score"].to_numpy()
            )
            fast.append(len(pairs) / seconds)
            passes[1] += calls
            far = max(far, float(np.abs(singly - joined).max()))
            print(f"{name}: {slow[-1]:.2f} and {fast[-1]:.2f} pairs/s, {far:.3f} apart", flush=True)
        ratios = sorted(after / before for before, after in zip(slow, fast, strict=True))
        middle = [statistics.median(figures) for figures in (slow, fast, ratios)]
        lines.append(
            f"| {name} | {middle[0]:.1f} | {middle[1]:.1f} | {middle[2]:.1f}x "
            f"({ratios[0]:.1f} to {ratios[-1]:.1f}) | {passes[0]:,} and {passes[1]:,} |"
        )
    size = given.users * CANDIDATES
    lines += [
        "",
        f"Histories of {EVENTS} to {EVENTS + CANDIDATES - 1} events of ml-100k; {given.rounds} rounds of {size} pairs "
        f"for each table, both ways in turn; scores of the two differ by {far:.3f} at most (log-odds, "
        f"{recommender.model.dtype}). "
        f"{torch.get_num_threads()} threads, {hardware()}.",
    ]
    print("\n".join(lines))
    if given.write:
        put("scoring", "\n".join(lines), PAGE)


def asked(events: pl.DataFrame, *, at_once: bool) -> pl.DataFrame:
    """Each user's events but the first `EVENTS`, up to `CANDIDATES` of them, at their own times or the first's."""
    later = events.group_by("user_id", maintain_order=True).agg(
        pl.col("item_id", "timestamp").slice(EVENTS, CANDIDATES)
    )
    if at_once:
        return later.with_columns(pl.col("timestamp").list.first()).explode("item_id")
    return later.explode("item_id", "timestamp")


def one_by_one(recommender: Recommender, pairs: pl.DataFrame, log: Histories) -> Any:
    """The scores of `Recommender.score`, asked for one pair after another."""
    first, last = log.before(pairs["user_id"], pairs["timestamp"].to_numpy())
    return np.array(
        [
            recommender.score(log.entries(begin, end), [item])[0]
            for begin, end, item in zip(first.tolist(), last.tolist(), pairs["item_id"].to_list(), strict=True)
        ]
    )


def timed(recommender: Recommender, score: Callable[[], Any]) -> tuple[Any, float, int]:
    """Scores, seconds, and how many forward passes they took."""
    calls = []
    handle = recommender.model.register_forward_pre_hook(lambda *_: calls.append(1))
    begin = time.perf_counter()
    scores = score()
    seconds = time.perf_counter() - begin
    handle.remove()
    return scores, seconds, len(calls)


if __name__ == "__main__":
    main()
