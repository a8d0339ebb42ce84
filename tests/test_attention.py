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
    monkeypatch.setitem(attention.QUERY_BLOCKS, torch.float32, 8)  # several blocks, the last not full
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


def segments(lengths: list[int]) -> torch.Tensor:
    """Additive mask of texts side by side, each causal in itself."""
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = (number[:, None] == number[None]).tril()
    return torch.zeros(1, 1, *seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


def test_hidden_keys_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 8 over texts of 8, 8, and 4 and 4 tokens: each has no keys but its own 8."""
    monkeypatch.setitem(attention.QUERY_BLOCKS, torch.float32, 8)
    blocks = attention._blocks(segments([8, 8, 4, 4]))
    assert [one.queries for one in blocks] == [slice(0, 8), slice(8, 16), slice(16, 24)]
    assert [one.keys for one in blocks] == [slice(0, 8), slice(8, 16), slice(16, 24)]
    # Nothing is hidden from the first key of a text on; the eighth is hidden from all but one, the first from none.
    assert [one.masked for one in blocks] == [slice(1, 8), slice(1, 8), slice(0, 8)]


def test_a_mask_is_looked_at_once() -> None:
    mask = segments([6, 4])
    assert attention._blocks(mask) is attention._blocks(mask)


@pytest.mark.parametrize("least", [1, 64])
def test_keys_with_a_gap_between_them(monkeypatch: pytest.MonkeyPatch, least: int) -> None:
    """Candidates see the history and themselves; what lies between is gathered away, or masked."""
    monkeypatch.setitem(attention.QUERY_BLOCKS, torch.float32, 4)
    monkeypatch.setattr(attention, "LEAST_HIDDEN", least)
    event = torch.tensor([0] * 6 + [1] * 4 + [2] * 4 + [3] * 4)
    seen = ((event[:, None] == event[None]) | (event[None] == 0)).tril()
    mask = torch.zeros(1, 1, 18, 18).masked_fill(~seen, torch.finfo(torch.float32).min)
    gathered = [one.keys for one in attention._blocks(mask) if isinstance(one.keys, torch.Tensor)]
    assert [keys.tolist() for keys in gathered][-1:] == ([[*range(6), *range(14, 18)]] if least == 1 else [])
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, heads, 18, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2)]
    expected = F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    found = run((*parts, mask))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    direction = torch.randn(expected.shape, generator=generator)
    for ours, theirs in zip(
        torch.autograd.grad(found, parts, direction), torch.autograd.grad(expected, parts, direction), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_dropout_has_the_gradient_of_what_it_dropped() -> None:
    """With values of which the gradient is known: the output is linear in them, so the slope is the output itself."""
    *parts, mask = random_case(6, 6, 2)
    value = parts[2].requires_grad_()
    torch.manual_seed(0)
    out = run((*parts, mask), training=True, dropout=0.5)
    (of_value,) = torch.autograd.grad(out.sum(), value)
    torch.testing.assert_close((of_value * value).sum(), out.sum())
    query = parts[0].detach().double().requires_grad_()
    others = [part.detach().double() for part in (parts[1], parts[2], mask)]

    def dropped(asked: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return run((asked, *others), training=True, dropout=0.5)

    assert torch.autograd.gradcheck(dropped, (query,), fast_mode=True)


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
