"""Attention for CPUs: plain matrix products over blocks of queries, each with no more keys than one of them sees.

PyTorch's fused kernel for CPUs takes half of a training step here. Products and a softmax over the blocks that a mask
leaves do the same work in less time: docs/benchmarks.md has the ratios. The query heads of one key head lie under one
another, which makes fewer and larger products and needs no copies of the keys.
Accelerators keep the fused kernels that transformers chooses.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

NAME = "peftrec_blocks"
QUERY_BLOCKS = {torch.float32: 64, torch.bfloat16: 128}
"""Queries of a block: fewer leave out more of what is hidden, more make larger products, which bfloat16's need."""
LEAST_HIDDEN = 64  # keys: for fewer it does not pay to gather those that are seen


@dataclass(frozen=True)
class Block:
    """Some queries, and the keys that they see.

    Attributes:
        queries: a range of them.
        keys: a range, or the places of those that one of the queries sees where many between them are hidden.
        masked: of these keys the range in which the mask is not 0 for all queries.
        mask: that part of it, (B or 1, 1, queries, masked keys).
    """

    queries: slice
    keys: slice | torch.Tensor
    masked: slice
    mask: torch.Tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]
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
        module: the attention layer (for whether it trains).
        query: (B, heads, Q, D).
        key: (B, key heads, K, D).
        value: as `key`.
        attention_mask: additive, (B or 1, 1, Q, K).
        scaling: factor on the products; the usual 1 / sqrt(D) if None.
        dropout: on the weights, while training.
        **kwargs: what other kernels take.

    Returns:
        (B, Q, heads, D), and no weights.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rate = dropout if module.training else 0.0
    found: torch.Tensor = _Blocks.apply(query, key, value, scale, rate, _blocks(attention_mask))  # type: ignore[no-untyped-call]
    return found, None


def _blocks(mask: torch.Tensor) -> list[Block]:
    """What there is to compute under a mask; looked up once, since all layers of a model have the same one."""
    known: list[Block] | None = getattr(mask, "_blocks", None)
    if known is None:
        cuts = [*range(0, mask.shape[2], QUERY_BLOCKS.get(mask.dtype, 128)), mask.shape[2]]
        known = [_block(mask, slice(begin, end)) for begin, end in pairwise(cuts)]
        mask._blocks = known  # type: ignore[attr-defined]
    return known


def _block(mask: torch.Tensor, queries: slice) -> Block:
    part = mask[:, :, queries]
    places = (part > torch.finfo(mask.dtype).min / 2).flatten(0, 2).any(dim=0).nonzero()[:, 0]
    first, last = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 1)  # padding: any answer will do
    keys = slice(first, last) if last - first < len(places) + LEAST_HIDDEN else places
    odd = (part[..., keys] != 0).flatten(0, 2).any(dim=0).nonzero()[:, 0]
    masked = slice(int(odd[0]), int(odd[-1]) + 1) if len(odd) else slice(0, 0)
    return Block(queries, keys, masked, part[..., keys][..., masked].contiguous())


class _Blocks(torch.autograd.Function):
    """Forward and backward of all blocks; nothing as large as the row's square is made but the weights."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        dropout: float,
        blocks: list[Block],
    ) -> torch.Tensor:
        batch, heads, length, size = query.shape
        key_heads, total = key.shape[1:3]
        groups = heads // key_heads
        query = query.reshape(batch, key_heads, groups, length, size)
        key = key.reshape(batch * key_heads, total, size)
        value = value.reshape(batch * key_heads, total, size)
        out = query.new_empty(batch, length, heads, size)
        trains = any(ctx.needs_input_grad)
        kept: list[torch.Tensor] = []
        for one in blocks:
            count = one.queries.stop - one.queries.start
            asked = query.new_empty(batch, key_heads, groups, count, size)
            torch.mul(query[:, :, :, one.queries], scale, out=asked)
            asked = asked.view(batch * key_heads, groups * count, size)
            weights = torch.bmm(asked, key[:, one.keys].transpose(1, 2))
            weights.view(batch, heads, count, -1)[..., one.masked] += one.mask
            weights = torch.softmax(weights, dim=-1)
            used = weights
            if dropout:
                drawn = torch.empty_like(weights).bernoulli_(1 - dropout).div_(1 - dropout)
                used = weights * drawn
                kept.append(drawn)
            read = torch.bmm(used, value[:, one.keys])
            out[:, one.queries] = read.view(batch, heads, count, size).transpose(1, 2)
            if trains:
                kept += [asked, weights]
        if trains:
            ctx.save_for_backward(key, value, *kept)
            ctx.shape, ctx.scale, ctx.dropout, ctx.blocks = query.shape, scale, dropout, blocks
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        key, value, *kept = ctx.saved_tensors
        batch, key_heads, groups, length, size = ctx.shape
        heads, total = key_heads * groups, key.shape[1]
        gradient = gradients[0].reshape(batch, length, key_heads, groups, size)
        of_query = key.new_empty(batch, length, heads, size)
        # (D, K), so that the longer side of the products lies last: a tenth faster.
        of_key, of_value = key.new_zeros(2, batch * key_heads, size, total)
        for one in reversed(ctx.blocks):
            count = one.queries.stop - one.queries.start
            weights, asked = kept.pop(), kept.pop()
            drawn = kept.pop() if ctx.dropout else None
            told = gradient[:, one.queries].permute(0, 2, 3, 1, 4).reshape(batch * key_heads, -1, size)
            used = weights if drawn is None else weights * drawn
            of_value[..., one.keys] += torch.bmm(told.transpose(1, 2), used)
            of_weights = torch.bmm(told, value[:, one.keys].transpose(1, 2))
            if drawn is not None:
                of_weights *= drawn
            of_products = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_key[..., one.keys] += torch.bmm(asked.transpose(1, 2), of_products)
            back = torch.bmm(of_products, key[:, one.keys]).mul_(ctx.scale)
            of_query[:, one.queries] = back.view(batch, heads, count, size).transpose(1, 2)
        of_key, of_value = (one.view(batch, key_heads, size, total).transpose(2, 3) for one in (of_key, of_value))
        return of_query.transpose(1, 2), of_key, of_value, None, None, None


def register() -> str:
    """Make the kernel known to transformers under `NAME`, which is returned."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, block_attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    return NAME
