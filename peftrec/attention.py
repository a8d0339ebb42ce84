"""Attention for CPUs: plain matrix products over blocks of queries, each of which stops at the last key it may see.

PyTorch's fused kernel for CPUs takes half of a training step here. Two bfloat16 products and a softmax over the lower
triangle's blocks do the same work in less time: docs/benchmarks.md has the ratios.
Accelerators keep the fused kernels that transformers chooses.
"""

from __future__ import annotations

from typing import Any

import torch

NAME = "peftrec_blocks"
QUERY_BLOCK = 256


def block_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' interface wants it.

    Args:
        module: the attention layer (for its number of query heads to a key head, and whether it trains).
        query: (B, heads, Q, D).
        key: (B, key heads, K, D); the last Q keys are the queries' own.
        value: as `key`.
        attention_mask: additive and causal, (B, 1, Q, K).
        scaling: factor on the products; the usual 1 / sqrt(D) if None.
        dropout: on the weights, while training.
        **kwargs: what other kernels take.

    Returns:
        (B, Q, heads, D), and no weights.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    attention_mask = attention_mask.to(query.dtype)
    past = key.shape[2] - query.shape[2]
    out = []
    for begin in range(0, query.shape[2], QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, query.shape[2])
        seen = past + end
        weights = query[:, :, begin:end] @ key[:, :, :seen].transpose(-1, -2)
        weights = weights + attention_mask[:, :, begin:end, :seen]
        weights = torch.softmax(weights, dim=-1)
        weights = torch.nn.functional.dropout(weights, dropout, module.training)
        out.append(weights @ value[:, :, :seen])
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


def register() -> str:
    """Make the kernel known to transformers under `NAME`, which is returned."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, block_attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    return NAME
