"""One attention layer of the packaged base model on a CPU, forward and backward: our kernel against PyTorch's.

    python benchmarks/attention.py [--rounds 7] [--write]

Both get the same timeline mask; they run in turn, and the ratio is the median over the pairs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from pages import put

from peftrec.attention import block_attention

HEADS, KEY_HEADS, SIZE, LAYERS = 9, 3, 64, 30  # SmolLM2-135M


def fused(module: object, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor):
    groups = HEADS // KEY_HEADS
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask), None


def causal(tokens: int) -> torch.Tensor:
    hidden = ~torch.ones(tokens, tokens, dtype=torch.bool).tril()
    lowest = torch.finfo(torch.bfloat16).min
    return torch.zeros(tokens, tokens, dtype=torch.bfloat16).masked_fill(hidden, lowest)[None, None]


def seconds(kernel: Callable[..., tuple[torch.Tensor, None]], mask: torch.Tensor) -> float:
    tokens = mask.shape[-1]
    shapes = [(1, heads, tokens, SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    query, key, value = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
    begin = time.perf_counter()
    out, _ = kernel(SimpleNamespace(training=True), query, key, value, mask)
    out.sum().backward()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    arguments = parser.parse_args()
    lines = ["| tokens in a row | fused (ms a layer) | blocks (ms a layer) | fused / blocks |", "|---:|---:|---:|---:|"]
    for tokens in (256, 512, 1024):
        mask = causal(tokens)  # all layers of a model share one, and what is looked up in it
        pairs = [(seconds(fused, mask), seconds(block_attention, mask)) for _ in range(arguments.rounds + 2)][2:]
        ratio = statistics.median(a / b for a, b in pairs)
        fused_ms, block_ms = (1000 * statistics.median(column) for column in zip(*pairs, strict=True))
        lines.append(f"| {tokens:,} | {fused_ms:.1f} | {block_ms:.1f} | {ratio:.2f}x |")
    lines += [
        "",
        f"bfloat16, forward and backward, median of {arguments.rounds} pairs on {torch.get_num_threads()} threads.",
    ]
    print("\n".join(lines))
    if arguments.write:
        put("attention", "\n".join(lines))


if __name__ == "__main__":
    main()
