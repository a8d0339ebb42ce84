"""How far apart two domains are in a model's states, and how well a state tells what comes next: losses as functions.

Each is differentiable and 0, or what chance gives, where there is nothing to learn. Too few rows to say anything give
0, with a gradient of 0, so that a pass without events is a pass like any other.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F

WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Widths of the kernels of `mmd`, as multiples of the mean squared distance."""
STEEPNESS = 10.0


def strength(progress: float, ramp: float) -> float:
    """From 0 at the start to 1: `2 / (1 + exp(-10 p)) - 1` (Ganin et al., JMLR 2016, section 5.2.2).

    Args:
        progress: share of the run that is over.
        ramp: share of the run after which p is 1; 0 gives 1 from the start.
    """
    p = min(1.0, progress / ramp) if ramp else math.inf
    return 2.0 / (1.0 + math.exp(-STEEPNESS * p)) - 1.0


def alike_in_size(source: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both (n, d) and (m, d), in float32, divided by the root mean square of all their numbers.

    Base models differ in the size of their states; behind this a weight means the same for all. The gradient goes
    through the divisor, so that no loss of the two is lowered by making all states smaller.
    """
    source, target = source.float(), target.float()
    together = torch.cat((source, target))
    size = together.square().mean().clamp_min(1e-24).sqrt() if together.numel() else 1.0
    return source / size, target / size


def coral(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared Frobenius distance of the covariances, over 4 d^2 (Sun and Saenko, Deep CORAL, ECCV 2016, equation 1).

    Args:
        source: states (n, d).
        target: states (m, d).
    """
    if min(len(source), len(target)) < 2:
        return nothing(source, target)
    gap = _covariance(source) - _covariance(target)
    return gap.square().sum() / (4 * source.shape[1] ** 2)


def _covariance(states: torch.Tensor) -> torch.Tensor:
    centred = states - states.mean(dim=0)
    return centred.T @ centred / (len(states) - 1)


def mmd(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared maximum mean discrepancy under the mean of Gaussian kernels (Long et al., ICML 2015, section 3).

    A kernel is `exp(-distance^2 / width)`; `WIDTHS` says how wide, against the mean squared distance between any two
    states. The gradient goes through that, too: drawing all states together lowers nothing.

    Args:
        source: states (n, d).
        target: states (m, d).
    """
    if not (len(source) and len(target)):
        return nothing(source, target)
    states = torch.cat((source, target))
    squares = states.square().sum(dim=1)
    distance = (squares[:, None] + squares[None, :] - 2 * states @ states.T).clamp_min(0)
    pairs = max(1, len(states) * (len(states) - 1))
    unit = (distance.sum() / pairs).clamp_min(1e-12)
    kernel = torch.stack([torch.exp(-distance / (width * unit)) for width in WIDTHS]).mean(dim=0)
    n = len(source)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return -ctx.factor * gradients[0], None


def reverse(states: torch.Tensor, factor: float) -> torch.Tensor:
    """The states as they are, whose gradient is multiplied by `-factor` on its way back (Ganin et al. 2016)."""
    found: torch.Tensor = _Reversed.apply(states, factor)  # type: ignore[no-untyped-call]
    return found


def tell_apart(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross entropy of telling the domains apart, each domain with half of the weight; log 2 is chance.

    Args:
        source: log-odds of being of the source (n,).
        target: the same of the target's states (m,).
    """
    if not (len(source) and len(target)):
        return nothing(source, target)
    return (F.softplus(-source).mean() + F.softplus(target).mean()) / 2


def info_nce(scores: torch.Tensor, answer: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Cross entropy of finding each row's answer among its candidates (van den Oord et al. 2018, equation 4).

    Args:
        scores: of each candidate (n, m).
        answer: index of the right one (n,).
        among: which candidates count, the right one among them (n, m).
    """
    if not len(scores):
        return scores.sum()
    return F.cross_entropy(scores.masked_fill(~among, -math.inf), answer)


def nothing(*states: torch.Tensor) -> torch.Tensor:
    """0 with a gradient of 0 for each of the tensors."""
    return torch.stack([one.sum() * 0 for one in states]).sum()
