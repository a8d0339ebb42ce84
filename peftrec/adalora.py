"""AdaLoRA's rank schedule inside Trainer (Zhang et al. 2023, arXiv:2303.10512).

PEFT has the method; whoever trains has to call it after each optimizer step, while the gradients are still there, and
to add its penalty to a loss that is not the model's own.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

AVERAGES = ("exp_avg_ipt", "exp_avg_unc")  # the allocator's running means: a weight's importance and its spread
PATTERN = "rank_pattern"


def is_adaptive(model: Any) -> bool:
    """Whether this is a model whose ranks are to be driven."""
    return hasattr(getattr(model, "base_model", None), "rankallocator")


def phases(steps: int, tinit: float, tfinal: float) -> tuple[int, int]:
    """Steps before the first rank is taken away and after the last one, of a run of `steps`; shares round down."""
    first, last = (int(part * steps) if part < 1 else int(part) for part in (tinit, tfinal))
    return first, last


class RankSchedule(TrainerCallback):  # type: ignore[misc]
    """Takes ranks away after optimizer steps, and keeps them away until ranks are dealt again.

    PEFT lets the optimizer revive a pruned direction between two allocations; what is then validated would not be what
    is saved.
    """

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """One step of the schedule: the optimizer has moved, the gradients are not yet zeroed."""
        tuner = model.base_model
        tuner.update_and_allocate(state.global_step + 1)
        pattern = tuner.peft_config["default"].rank_pattern
        if pattern:
            tuner.rankallocator.mask_using_rank_pattern(tuner.model, pattern)


def penalty(model: Any) -> torch.Tensor:
    """What PEFT adds to a model's own loss: the weighted mean distance of the factors from orthogonal ones."""
    factors = [
        parameter if ".lora_A." in name else parameter.T
        for name, parameter in model.named_parameters()
        if (".lora_A." in name or ".lora_B." in name) and parameter.requires_grad
    ]
    distances = [torch.linalg.norm(f @ f.T - torch.eye(len(f), dtype=f.dtype, device=f.device)) for f in factors]
    weight: float = model.peft_config["default"].orth_reg_weight
    return weight * torch.stack(distances).mean()


def allocator_state(model: Any) -> dict[str, torch.Tensor]:
    """What the schedule remembers between steps, as named tensors for a checkpoint."""
    tuner = model.base_model
    state = {
        f"{kind}:{name}": tensor.detach().clone()
        for kind in AVERAGES
        for name, tensor in getattr(tuner.rankallocator, kind).items()
    }
    pattern = tuner.peft_config["default"].rank_pattern or {}
    return state | {f"{PATTERN}:{name}": torch.tensor(kept) for name, kept in pattern.items()}


def restore_allocator(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Put back what `allocator_state` gave."""
    tuner = model.base_model
    found: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in (*AVERAGES, PATTERN)}
    for key, tensor in state.items():
        kind, _, name = key.partition(":")
        found[kind][name] = tensor
    for kind in AVERAGES:
        setattr(tuner.rankallocator, kind, found[kind])
    # The allocator starts a parameter's means anew unless it has this, which the next step overwrites.
    tuner.rankallocator.ipt = {name: torch.zeros_like(tensor) for name, tensor in found[AVERAGES[0]].items()}
    tuner.peft_config["default"].rank_pattern = {n: kept.tolist() for n, kept in found[PATTERN].items()} or None
