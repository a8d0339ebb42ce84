"""Where the time of a training step goes, by PyTorch's profiler.

In the forward pass each operation belongs to the innermost module that has a name here. In the backward pass it belongs
to where the operation belonged whose gradient it is: autograd gives both the same number. Of a LoRA layer's products
those with its rank as a side are LoRA's, the others the base model's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from peftrec import scorer
from peftrec.target import Target

PARTS = {
    "matmul": "matrix products with the base model's weights",
    "attention": "attention: products, softmax, mask, rotation of positions",
    "LoRA": "LoRA: its products, casts and sums",
    "head": "answer rows, loss, and the mask of sight",
    "optimizer": "gradient clipping and optimizer",
    "rest": "the rest: norms, activations, residuals, embeddings",
}
MARK = "part:"
OWN_GRADIENTS = {"_BlocksBackward": "attention", "_RootMeanSquareBackward": "rest", "_LowRankBackward": "LoRA"}


def part_of(name: str, module: nn.Module) -> str | None:
    """The part that a module is, None where it is as its parent."""
    if isinstance(module, scorer.AnswerHead):
        return "head"
    if "lora_" in name:
        return "LoRA"
    if isinstance(module, nn.Linear):
        return "matmul"
    if hasattr(module, "lora_A"):
        return "LoRA"
    return "attention" if name.endswith("self_attn") else None


def of_training(model: Any, batch: dict[str, torch.Tensor], steps: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each part in a step over one row; those of the profiler itself are among them.

    Returns:
        `parts`: part -> milliseconds a step.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()

    def step() -> None:
        with record_function(MARK + "head"):  # modules inside have their own part
            loss = scorer.interaction_loss(model, batch, model.dtype, Target(), int((batch["labels"] >= 0).sum()))
        loss.backward()
        with record_function(MARK + "optimizer"):
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    step()
    hooks = [handle for name, module in model.named_modules() for handle in _marks(name, module)]
    on_gpu = model.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    try:
        with torch.profiler.profile(activities=kinds, record_shapes=True) as profiled:
            for _ in range(steps):
                step()
    finally:
        for hook in hooks:
            hook.remove()
    ranks = {side for module in model.modules() for side in getattr(module, "r", {}).values()}
    milliseconds = _sums(profiled.events(), on_gpu, ranks)
    return {"parts": {part: milliseconds[part] / steps for part in PARTS}}


def _marks(name: str, module: nn.Module) -> Iterable[Any]:
    part = part_of(name, module)
    if name == "":
        part = "rest"  # what no module inside takes
    if part is None:
        return []
    ranges: list[Any] = []

    def enter(*_: Any) -> None:
        ranges.append(record_function(MARK + part))
        ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        ranges.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def _sums(events: Any, on_gpu: bool, ranks: set[int]) -> dict[str, float]:
    """Milliseconds by part; `ranks` are those of LoRA."""
    forward: dict[int, str] = {}
    found: dict[str, float] = defaultdict(float)
    for event in sorted(events, key=lambda one: one.time_range.start):
        part, backward = _enclosing(event)
        if event.name.startswith("aten::") and not backward and event.sequence_nr >= 0:
            forward[event.sequence_nr] = part or "rest"  # the last one with a number is the one that autograd notes
        if part is None:
            part = _of_gradient(backward, forward) if backward else "rest"
        if part == "LoRA" and event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            sides = {side for shape in event.input_shapes for side in shape}
            part = "LoRA" if sides & ranks else "matmul"
        # Only parameters of the adapter gather gradients, an operation without a number.
        found[part] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000
    return found


def _of_gradient(backward: Any, forward: dict[int, str]) -> str:
    # Our own gradients come from operations that have no number in the forward pass.
    own = (part for name, part in OWN_GRADIENTS.items() if backward.name.endswith(f" {name}"))
    return next(own, forward.get(backward.sequence_nr, "LoRA"))


def _enclosing(event: Any) -> tuple[str | None, Any]:
    """The part that encloses an event, or the gradient that it is part of."""
    while event is not None:
        if event.name.startswith(MARK):
            return event.name.removeprefix(MARK), None
        if event.name.startswith("autograd::engine::evaluate_function"):
            return None, event
        event = event.cpu_parent
    return None, None
