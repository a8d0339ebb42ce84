"""Adversarial training on the input embeddings by the fast gradient method.

After a backward pass each row's embeddings are moved by `epsilon` along their gradient, which is where the loss grows
fastest, and the same batch is learned from once more (Miyato, Dai and Goodfellow, "Adversarial training methods for
semi-supervised text classification", ICLR 2017, section 3; here both passes weigh the same).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def watched(embeddings: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect what the embeddings put out, (B, T, H) for each call, with the gradient that a backward pass finds."""
    outputs: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if output.requires_grad:
            output.retain_grad()
        else:  # frozen embeddings
            output.requires_grad_()
        outputs.append(output)
        return output

    handle = embeddings.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


@contextmanager
def moved(embeddings: nn.Module, outputs: list[torch.Tensor], epsilon: float) -> Iterator[None]:
    """Add to each call's output `epsilon` times the unit vector of the gradient that it had, row by row.

    Args:
        embeddings: the model's.
        outputs: what `watched` collected; calls come in the same order.
        epsilon: length (L2 norm) of the move of a row, all its tokens together.
    """
    moves = [_move(one.grad, epsilon) for one in outputs]

    def shift(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        move = moves.pop(0)
        return output if move is None else output + move.to(output.dtype)

    handle = embeddings.register_forward_hook(shift)
    try:
        yield
    finally:
        handle.remove()


def _move(gradient: torch.Tensor | None, epsilon: float) -> torch.Tensor | None:
    if gradient is None:
        return None
    length = gradient.float().flatten(1).norm(dim=1)[:, None, None]
    # A row that asks nothing has no gradient, and stays where it is.
    return torch.where(length > 0, epsilon * gradient.float() / length.clamp_min(1e-30), 0.0)
