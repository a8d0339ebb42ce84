"""LoRA that starts from the base weights instead of from zero: PiSSA and LoftQ, both with the base left as it is.

PiSSA (Meng et al. 2024, arXiv:2404.02948) trains the weights' largest singular values and vectors: W x becomes
R x + s B A x, where s B A is the principal part at the start, s B0 A0, and R the rest. PEFT writes R into the base
model. Here the same sum is taken apart as W x + s (B A - B0 A0) x, which is a LoRA update of twice the rank whose
second half is fixed. So the base model keeps its weights to the last bit, and what is saved is plain LoRA on these.

LoftQ (Li et al. 2023, arXiv:2310.08659, one iteration) starts from the best low-rank approximation of what 4 bits lost.

An adapter on top of an earlier one is the same sum with the earlier update as the fixed part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from peftrec.errors import ModelError

SWEEPS = 16  # power iterations of the randomized decomposition; PiSSA's own fast setting


class Stacked(nn.Module):
    """One factor of the update: the trained matrix, and a fixed one beside it.

    Args:
        start: where the trained one begins, (r, in) or (out, r).
        first: the fixed one, (q, in) or (out, q).
        dim: along which the rank runs, 0 of A and 1 of B.
        factor: of the fixed one.
    """

    first: torch.Tensor

    def __init__(self, start: torch.Tensor, first: torch.Tensor, dim: int, factor: float = 1.0) -> None:
        super().__init__()
        self.dim, self.factor = dim, factor
        self.trained = nn.Parameter(start.clone())
        self.register_buffer("first", first.clone())

    @property
    def weight(self) -> torch.Tensor:
        """Both parts, (r + q, in) or (out, r + q)."""
        return torch.cat((self.trained, self.factor * self.first), dim=self.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., r + q), or (..., r + q) -> (..., out)."""
        return F.linear(x, self.weight)


def from_principal_part(attached: Any) -> None:
    """Make a fresh LoRA model one of PiSSA, in place.

    Raises:
        ModelError: the rank is larger than a layer.
    """
    for name, layer, weight in _layers(attached):
        up, down = _factors(weight, name, layer)
        layer.lora_A["default"] = Stacked(down, down, 0)
        layer.lora_B["default"] = Stacked(up, up, 1, -1.0)


def on_top_of(attached: Any, earlier: Mapping[str, torch.Tensor], scaling: float) -> None:
    """Put a fresh LoRA model on top of an earlier one that stays as it is, in place: W x + s B A x + s1 B1 A1 x.

    Args:
        attached: the LoRA model.
        earlier: the state dict of the earlier adapter, as PEFT saves it, on the same layers.
        scaling: s1, by which its update is multiplied.
    """
    for name, layer, weight in _layers(attached):
        fixed = {
            part: earlier[f"base_model.model.{name}.lora_{part}.weight"].to(weight.device, torch.float32)
            for part in "AB"
        }
        own = {part: getattr(layer, f"lora_{part}")["default"].weight.detach() for part in "AB"}
        layer.lora_A["default"] = Stacked(own["A"], fixed["A"], 0)
        layer.lora_B["default"] = Stacked(own["B"], fixed["B"], 1, scaling / layer.scaling["default"])


def from_quantization_error(attached: Any, original: Any) -> None:
    """Let a fresh LoRA model on a 4-bit base start where it is closest to the unquantized one, in place.

    Args:
        attached: the LoRA model.
        original: the base model with its weights as they were.

    Raises:
        ModelError: the rank is larger than a layer.
    """
    for name, layer, weight in _layers(attached):
        before = original.get_submodule(name).weight.detach().to(weight)
        if torch.equal(before, weight):  # not quantized: from an update of zero no step leads away
            continue
        up, down = _factors(before - weight, name, layer)
        layer.lora_A["default"].weight.data.copy_(down)
        layer.lora_B["default"].weight.data.copy_(up)


def _layers(attached: Any) -> Iterator[tuple[str, Any, torch.Tensor]]:
    """Name, LoRA layer and base weights (out, in) in float32 of each layer with an update."""
    from peft.tuners.lora import Linear, LoraLayer
    from peft.utils.integrations import dequantize_module_weight

    for name, layer in list(attached.base_model.model.named_modules()):
        if not isinstance(layer, LoraLayer):
            continue
        base: Any = layer.get_base_layer()
        if layer.lora_A.keys() != {"default"}:
            raise ModelError(
                f"adapter.variant: {name} is of type {type(base).__name__}; pissa and loftq take linear layers only; "
                "choose other target_modules"
            )
        weight = dequantize_module_weight(base).detach().float()
        yield name, layer, weight.T if isinstance(layer, Linear) and layer.fan_in_fan_out else weight


def _factors(matrix: torch.Tensor, name: str, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, r) and (r, in) whose product, times the layer's scale, is the principal part of `matrix`."""
    r, scale = layer.r["default"], layer.scaling["default"]
    if r > min(matrix.shape):
        raise ModelError(
            f"adapter.r: {r}; {name} has {min(matrix.shape)} dimensions, and this variant takes its principal ones; "
            "lower it"
        )
    left, values, right = torch.svd_lowrank(matrix, r, SWEEPS)
    root = (values / scale).sqrt()
    return left * root, (right * root).T.contiguous()


def fixed_halves(model: Any) -> dict[str, torch.Tensor]:
    """The fixed matrices beside the trained ones, by name; empty for most models."""
    return {
        f"{name}.first": module.first.detach() for name, module in model.named_modules() if isinstance(module, Stacked)
    }


def plain_lora(model: Any, config: Any, state: dict[str, torch.Tensor]) -> None:
    """Rewrite PEFT's config and state dict of a model with `Stacked` parts, in place, as what it is: plain LoRA."""
    stacked = {name: module for name, module in model.named_modules() if isinstance(module, Stacked)}
    for name, module in stacked.items():
        key = name.removesuffix(".default")
        for part in ("trained", "first"):
            del state[f"{key}.{part}"]
        state[f"{key}.weight"] = module.weight.detach()
    if stacked:
        scale = scaling(config)
        config.r = next(module.weight.shape[module.dim] for module in stacked.values())
        alpha = scale * (math.sqrt(config.r) if config.use_rslora else config.r)
        config.lora_alpha = round(alpha) if math.isclose(alpha, round(alpha)) else alpha


def scaling(config: Any) -> float:
    """By which PEFT multiplies a LoRA update."""
    return float(config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r))
