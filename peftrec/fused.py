"""The same arithmetic in fewer passes over memory, for models whose dense layers stand on a CPU.

There a training step spends a fifth of its time on small products and element by element: PEFT casts every input of a
LoRA layer to float32 and back, and autograd goes through a norm in nine steps. `install` mixes other forwards into such
layers. Names, parameters, state and what is saved stay; where something is not as expected (another device, quantized
or sharded weights, dropout, several adapters at once, a variant of LoRA) a layer is what it was.

The last layer's feed-forward part is computed where somebody reads alone, on any device: behind it no position sees
another one.

Scores are PEFT's: without gradients LoRA's products are in float32 as there. While training they are in the base
model's type, as under autocast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

PLAIN_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""Layers that add attention and then a feed-forward part to their input, each behind a norm, and do nothing else."""


def install(model: Any) -> None:
    """Let norms, LoRA layers and the last layer of a model take the short way where there is one, in place.

    Args:
        model: base model with or without adapter; what has a short way already is left alone.
    """
    from peft.tuners.lora.layer import Linear

    last = None
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear:
            _mix(module, LowRank)
        elif _is_rms_norm(module):
            _mix(module, RootMeanSquare)
        elif type(module).__name__ in PLAIN_LAYERS:
            last = module
    if last is not None and not isinstance(last, LastLayer):
        _mix(last, LastLayer)


def _mix(module: nn.Module, mixin: type[nn.Module]) -> None:
    # A class of its own, and not a wrapper: PEFT, DDP and FSDP look for modules by type and name.
    kind = type(module)
    module.__class__ = type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})


def _plain(*tensors: torch.Tensor) -> bool:
    """Whether tensors are on the CPU, whole and of a type that their products are fast in, and nobody compiles them."""
    return not torch.compiler.is_compiling() and all(
        type(one) in (torch.Tensor, nn.Parameter)
        and one.device.type == "cpu"
        and one.dtype in (torch.bfloat16, torch.float32)
        for one in tensors
    )


class LowRank(nn.Module):
    """Mixed into PEFT's LoRA layer around a dense linear layer."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As PEFT's."""
        layer: Any = self
        active = layer.active_adapters
        found: torch.Tensor
        if args or kwargs or len(active) != 1 or not _is_simple(layer, active[0], x):
            found = super().forward(x, *args, **kwargs)
            return found
        base, first, second = layer.base_layer, layer.lora_A[active[0]].weight, layer.lora_B[active[0]].weight
        scaling = layer.scaling[active[0]]
        if layer.training and torch.is_grad_enabled():
            found = _LowRank.apply(x, base.weight, base.bias, first, second, scaling)  # type: ignore[no-untyped-call]
            return found
        if x.dtype == torch.float32:  # no pass over memory for the sum
            flat = x.reshape(-1, x.shape[-1])
            found = F.linear(flat, base.weight, base.bias)
            found.addmm_(F.linear(flat, first), second.t(), alpha=scaling)
            return found.view(*x.shape[:-1], second.shape[0])
        update = F.linear(F.linear(x.float(), first), second)
        return torch.add(F.linear(x, base.weight, base.bias), update, alpha=scaling).to(x.dtype)


def _is_simple(layer: Any, name: str, x: torch.Tensor) -> bool:
    """Whether all that a LoRA layer does is to add one product of two matrices to that of its frozen base."""
    if name not in layer.lora_A or name in layer.lora_variant or layer.disable_adapters or layer.merged:
        return False
    base, first, second = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    return (
        type(first) is type(second) is nn.Linear
        and _plain(x, base.weight, first.weight, second.weight)
        and x.dtype == base.weight.dtype
        and first.weight.dtype == torch.float32
        and base.weight.dim() == first.weight.dim() == second.weight.dim() == 2  # DeepSpeed leaves empty ones behind
        and first.bias is second.bias is None
        and not base.weight.requires_grad
        and not (layer.training and getattr(layer.lora_dropout[name], "p", 0))
        and not torch.is_autocast_enabled("cpu")
    )


def _merged(weight: torch.Tensor, first: torch.Tensor, second: torch.Tensor, scaling: float) -> torch.Tensor:
    """W + s B A. Adding so small a product to a wide output takes a fourth of the base product's time, to W a fiftieth.

    In float32 alone: in bfloat16 an update that is small beside W would be rounded away. And while training alone: it
    does not pay for a few tokens, and two ways would give one prompt two scores.
    """
    return torch.addmm(weight, second, first, alpha=scaling)


class _LowRank(torch.autograd.Function):
    """x W' + b + s (x A') B', all products in the type of x, and their gradients but those of W and b."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        first: torch.Tensor,
        second: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.scaling = scaling
        if x.dtype == torch.float32:
            out = F.linear(flat, _merged(weight, first, second, scaling), bias)
            ctx.save_for_backward(flat, weight, first.t(), second * scaling, None)
            return out.view(*x.shape[:-1], -1)
        down = first.to(x.dtype).t().contiguous()  # (in, r): this way round the product takes two thirds of the time
        up = (second * scaling).to(x.dtype)  # (out, r)
        inner = flat @ down
        out = F.linear(flat, weight, bias).addmm_(inner, up.t())
        ctx.save_for_backward(flat, weight, down, up, inner)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, weight, down, up, inner = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, up.shape[0])
        of_inner = gradient @ up
        of_first = (of_inner.t() @ flat).float()
        of_second = (gradient.t() @ (flat @ down if inner is None else inner)).float().mul_(ctx.scaling)
        of_x = None
        if ctx.needs_input_grad[0]:
            if inner is None:
                of_x = gradient @ torch.addmm(weight, up, down.t())
            else:
                of_x = (gradient @ weight).addmm_(of_inner, down.t())
            of_x = of_x.view(*gradients[0].shape[:-1], -1)
        return of_x, None, None, of_first, of_second, None


class RootMeanSquare(nn.Module):
    """Mixed into a norm that divides by the root of the mean square, with a weight that is not trained."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As the module's own."""
        norm: Any = self
        if torch.is_grad_enabled() and hidden_states.requires_grad and _fits(norm, hidden_states):
            found: torch.Tensor = _root_mean_square(hidden_states, norm)
        else:
            found = super().forward(hidden_states)
        return found


def _fits(norm: Any, x: torch.Tensor) -> bool:
    return not norm.weight.requires_grad and x.dtype == norm.weight.dtype and _plain(x, norm.weight)


def _root_mean_square(x: torch.Tensor, norm: Any) -> torch.Tensor:
    found: torch.Tensor = _RootMeanSquare.apply(x, norm.weight, norm.variance_epsilon)  # type: ignore[no-untyped-call]
    return found


def _is_rms_norm(module: Any) -> bool:
    """Whether a module is such a norm, which its name does not tell: some add 1 to the weight, or round elsewhere."""
    weight = getattr(module, "weight", None)
    named = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    if not named or weight is None or isinstance(module, RootMeanSquare):
        return False
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(4, *weight.shape, generator=generator).to(weight.dtype)
    if not _fits(module, probe):
        return False
    with torch.no_grad():
        return torch.equal(module(probe), _root_mean_square(probe, module))


class _RootMeanSquare(torch.autograd.Function):
    """x / sqrt(mean x^2 + epsilon), rounded to the type of x, times the weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = x.float()
        factor = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, factor)
        return weight * (wide * factor).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, factor = ctx.saved_tensors
        back = (gradients[0] * weight).float()
        normed = x * factor  # in float32, as the factor is
        along = torch.linalg.vecdot(back, normed).unsqueeze(-1).div_(x.shape[-1])
        return back.addcmul_(normed, along, value=-1).mul_(factor).to(x.dtype), None, None


@dataclass
class Reads:
    """Where a batch is read.

    Attributes:
        places: true at read positions, (B, T).
        taken: whether the model's outputs are those of the read positions alone, (1, N, K).
    """

    places: torch.Tensor
    taken: bool = False

    def fit(self, hidden: torch.Tensor) -> bool:
        """Whether they are positions of these hidden states (B, T, H), one at least."""
        return self.places.shape == hidden.shape[:2] and bool(self.places.any())

    def of(self, outputs: torch.Tensor) -> torch.Tensor:
        """The outputs (N, K) at the N read positions."""
        return outputs[0] if self.taken else outputs[self.places]


def read_at(mask: torch.Tensor, places: torch.Tensor) -> Reads:
    """Say, to the layers that are called with this mask, where the outputs are read.

    Args:
        mask: additive, (B, 1, T, K).
        places: true at read positions, (B, T).
    """
    # The mask reaches every layer as it is, also when a checkpointed one is computed again.
    mask._reads = reads = Reads(places)  # type: ignore[attr-defined]
    return reads


class LastLayer(nn.Module):
    """Mixed into one of `PLAIN_LAYERS`."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> torch.Tensor:
        """As the module's own, (B, T, H); or (1, N, H) where `read_at` said which N positions are read."""
        # Compiled code would be made anew for each number of read positions.
        reads: Reads | None = None if torch.compiler.is_compiling() else getattr(attention_mask, "_reads", None)
        if reads is None or not reads.fit(hidden_states):
            found: torch.Tensor = super().forward(hidden_states, attention_mask=attention_mask, **kwargs)
            return found
        layer: Any = self
        attended, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(hidden_states), attention_mask=attention_mask, **kwargs
        )
        kept = (hidden_states + attended)[reads.places][None]
        reads.taken = True
        return kept + layer.mlp(layer.post_attention_layernorm(kept))  # type: ignore[no-any-return]
