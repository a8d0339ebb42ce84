"""On paper: what an 8B model on one H100 could do with the same two layouts. Nothing here is measured.

python benchmarks/peers.py --only paper
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Llama-3.1-8B, from its config.json.
LAYERS, HIDDEN, INNER, KEY = 32, 4096, 14336, 1024
LINEAR = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEY + 3 * HIDDEN * INNER)  # parameters outside the embeddings
LORA = LAYERS * 16 * (4 * HIDDEN + 2 * (HIDDEN + KEY))  # r=16 on queries, keys, values and output

# NVIDIA's data sheet of the H100 SXM: dense bfloat16, and HBM3.
FLOP_A_SECOND = 989e12
BYTES_A_SECOND = 3.35e12
WEIGHT = 2  # bytes, bfloat16

TRAINING, FORWARD = 4, 2  # FLOP for each frozen parameter and token
REACHED_TRAINING, REACHED_FORWARD = 0.35, 0.5  # of the peak: our guess, from what large dense models reach there
ROW = 1024  # tokens, in which attention looks back half on average
EVENTS = 1000
HISTORY, CANDIDATES = 50, 100


def work(what: str, tokens: float, looks_back: float, *, trains: bool, passes: float) -> dict[str, Any]:
    """Floors of a piece of work.

    Args:
        what: its name.
        tokens: that go through the model.
        looks_back: tokens that one attends to, on average.
        trains: with the way back, which needs no gradient of the frozen weights.
        passes: how often all weights are read from memory.
    """
    attention = LAYERS * 4 * HIDDEN * looks_back  # products with keys and with values
    flop = tokens * ((TRAINING if trains else FORWARD) * LINEAR + (3 if trains else 1) * attention)
    moved = passes * LINEAR * WEIGHT
    by_flop, by_bytes = flop / FLOP_A_SECOND, moved / BYTES_A_SECOND
    return {
        "work": what,
        "tokens": tokens,
        "flop": flop,
        "bytes": moved,
        "by_flop": by_flop,
        "by_bytes": by_bytes,
        "expected": max(by_flop / (REACHED_TRAINING if trains else REACHED_FORWARD), by_bytes),
    }


def estimate(timeline: float, pointwise: float) -> list[dict[str, Any]]:
    """Training 1,000 events and scoring 100 candidates, each in both ways.

    Args:
        timeline: tokens that an event takes in the timeline.
        pointwise: tokens that an event takes with a prompt of its own.
    """
    history, asked = HISTORY * timeline, CANDIDATES * timeline
    prompt = history + timeline
    return [
        work(
            f"train {EVENTS:,} events, timeline",
            EVENTS * timeline,
            ROW / 2,
            trains=True,
            passes=2 * EVENTS * timeline / ROW,
        ),
        work(
            f"train {EVENTS:,} events, a prompt each",
            EVENTS * pointwise,
            pointwise / 2,
            trains=True,
            passes=2 * EVENTS * pointwise / ROW,
        ),
        work(f"score {CANDIDATES} candidates, history once", history + asked, history, trains=False, passes=2),
        work(
            f"score {CANDIDATES} candidates, a prompt each",
            CANDIDATES * prompt,
            prompt / 2,
            trains=False,
            passes=max(1, CANDIDATES * prompt / (8 * ROW)),
        ),
    ]


def assumptions(timeline: float, pointwise: float, found: Sequence[dict[str, Any]]) -> str:
    """What the table rests on, and what follows from it."""
    learn, learn_apart, ask, ask_apart = (one["expected"] for one in found)
    adapter = LORA * 16  # weights, gradients and two moments, float32
    return (
        f"Not measured: {LINEAR / 1e9:.2f} billion parameters outside the embeddings, {FLOP_A_SECOND / 1e12:.0f} "
        f"TFLOP/s, {BYTES_A_SECOND / 1e12:.2f} TB/s; {timeline:.1f} tokens an event in the timeline and "
        f"{pointwise:.0f} in a prompt of its own, as counted on ml-100k; rows of {ROW:,} tokens, all weights read once "
        f"forward and once back for each. Expected is {100 * REACHED_TRAINING:.0f} % of the arithmetic in training and "
        f"{100 * REACHED_FORWARD:.0f} % in the forward, a guess: {EVENTS / learn:,.0f} events learned a second against "
        f"{EVENTS / learn_apart:,.0f}, and {1000 * ask:.0f} ms for {CANDIDATES} candidates against "
        f"{1000 * ask_apart:.0f} ms. Linear weights take {LINEAR * WEIGHT / 1e9:.0f} GB; the adapter with gradients "
        f"and AdamW's moments {adapter / 1e9:.1f} GB ({LORA / 1e6:.0f} million parameters in float32)."
    )
