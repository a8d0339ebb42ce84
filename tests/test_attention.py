"""The CPU kernel equals PyTorch's own, forward and backward, alone and inside models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from peftrec import attention


def random_case(
    queries: int, keys: int, key_heads: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key, value and a random additive mask below the diagonal, whose diagonal is always seen."""
    generator = torch.Generator().manual_seed(queries + keys)
    query = torch.randn(2, 4, queries, 8, generator=generator)
    key, value = (torch.randn(2, key_heads, keys, 8, generator=generator) for _ in range(2))
    past = keys - queries
    causal = torch.ones(queries, keys, dtype=torch.bool).tril(past)
    own = torch.eye(queries, keys, dtype=torch.bool).roll(past, dims=1)
    seen = causal & ((torch.rand(2, 1, queries, keys, generator=generator) < 0.5) | own)
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(dtype).min)
    return tuple(part.to(dtype) for part in (query, key, value, mask))  # type: ignore[return-value]


def run(parts: tuple[torch.Tensor, ...], training: bool = False, **options: Any) -> torch.Tensor:
    out, weights = attention.block_attention(SimpleNamespace(training=training), *parts, **options)
    assert weights is None
    return out


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (20, 20), (5, 17), (1, 9)])
def test_equals_sdpa(monkeypatch: pytest.MonkeyPatch, queries: int, keys: int, key_heads: int) -> None:
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)  # several blocks, the last not full
    parts = [part.requires_grad_(part.shape[-1] == 8) for part in random_case(queries, keys, key_heads)[:3]]
    mask = random_case(queries, keys, key_heads)[3]
    expected = F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    found = run((*parts, mask))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    for ours, theirs in zip(
        torch.autograd.grad(found, parts, direction), torch.autograd.grad(expected, parts, direction), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_scaling_is_used() -> None:
    query, key, value, mask = random_case(6, 6, 2)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.9, enable_gqa=True)
    torch.testing.assert_close(run((query, key, value, mask), scaling=0.9), expected.transpose(1, 2))


def test_bfloat16_is_finite_and_near() -> None:
    parts = random_case(12, 12, 2, torch.bfloat16)
    exact = random_case(12, 12, 2)
    found = run(parts)
    assert found.dtype == torch.bfloat16
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.float(), run(exact), atol=0.05, rtol=0.05)


def test_a_mask_in_another_type() -> None:
    """Under autocast a float32 model's mask meets queries in bfloat16."""
    *parts, mask = random_case(12, 12, 2, torch.bfloat16)
    found = run((*parts, mask.float()))
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, run((*parts, mask)))


def test_dropout_only_in_training() -> None:
    parts = random_case(6, 6, 2)
    torch.testing.assert_close(run(parts, dropout=0.5), run(parts))
    torch.manual_seed(0)
    assert not torch.allclose(run(parts, training=True, dropout=0.5), run(parts))


@pytest.mark.parametrize("folder", ["tiny_llama_folder", "tiny_gpt2_folder", "tiny_qwen2_folder"])
def test_models_score_as_with_the_eager_kernel(
    request: pytest.FixtureRequest, load_tiny: Callable[..., Any], folder: str
) -> None:
    path: Path = request.getfixturevalue(folder)
    ids = torch.randint(2, 320, (2, 40), generator=torch.Generator().manual_seed(0))
    ours = load_tiny(path, answers=False)
    assert ours.config._attn_implementation == attention.NAME
    theirs = load_tiny(path, attention="eager", answers=False)
    with torch.inference_mode():
        torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=2e-4, rtol=1e-4)
