"""The short ways compute what the long ones do: outputs, gradients, and nothing where they do not apply."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftrec import adapters, config, fused, scorer

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
TYPES = [torch.float32, torch.bfloat16]


def layer_norm_of(dtype: torch.dtype) -> Any:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(24, eps=1e-5).requires_grad_(False)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    return norm.to(dtype)


def short_and_long(module: Any) -> tuple[Any, Any]:
    """The module with what `install` mixes into it, and as it was."""
    short = copy.deepcopy(module)
    fused.install(nn.ModuleList([short]))
    return short, module


def gradients(module: Any, x: torch.Tensor, direction: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output, and the gradients of the input and of all that trains."""
    x = x.detach().requires_grad_()
    out = module(x)
    trained = [p for _, p in sorted(module.named_parameters()) if p.requires_grad]
    return out, list(torch.autograd.grad(out, [x, *trained], direction))


def lora_layer(dtype: torch.dtype, **options: Any) -> Any:
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    base = nn.Linear(24, 40, bias=options.pop("bias", False)).to(dtype).requires_grad_(False)
    wanted = LoraConfig(r=4, lora_alpha=6, **options)
    layer = Linear(base, "default", r=4, lora_alpha=6, config=wanted)
    nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    return layer.train()


def near(dtype: torch.dtype) -> dict[str, float]:
    """Of tensors whose values are about 1; bfloat16 has 8 bits, and sums round twice."""
    return {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.04, "rtol": 0.03}


def test_by_hand() -> None:
    """One input of 1 and 2: W x = 5, A x = 3, B = 2, scaling 1.5: 5 + 9."""
    layer = lora_layer(torch.float32)
    short, _ = short_and_long(layer)
    with torch.no_grad():
        for weight in (short.base_layer.weight, short.lora_A["default"].weight, short.lora_B["default"].weight):
            weight.zero_()
        short.base_layer.weight[0, :2] = torch.tensor([1.0, 2.0])
        short.lora_A["default"].weight[0, :2] = 1.0
        short.lora_B["default"].weight[0, 0] = 2.0
    x = torch.zeros(1, 24, requires_grad=True)
    x.data[0, :2] = torch.tensor([1.0, 2.0])
    out = short(x)
    assert out[0].tolist() == [14.0] + [0.0] * 39
    out[0, 0].backward()
    # Each input has its weight, and 1.5 * 2 * 1 beside it; B has 1.5 * A x, A has 1.5 * B * x.
    assert x.grad is not None
    assert x.grad[0, :3].tolist() == [4.0, 5.0, 0.0]
    assert short.lora_B["default"].weight.grad[0].tolist() == [4.5, 0.0, 0.0, 0.0]
    assert short.lora_A["default"].weight.grad[0, :3].tolist() == [3.0, 6.0, 0.0]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_lora_trains_as_pefts(dtype: torch.dtype, bias: bool) -> None:
    short, long = short_and_long(lora_layer(dtype, bias=bias))
    assert isinstance(short, fused.LowRank)
    assert not isinstance(long, fused.LowRank)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 7, 24, generator=generator).to(dtype)
    direction = torch.randn(2, 7, 40, generator=generator).to(dtype)
    (ours, of_ours), (theirs, of_theirs) = (gradients(one, x, direction) for one in (short, long))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, **near(dtype))
    assert len(of_ours) == 3
    for one, other in zip(of_ours, of_theirs, strict=True):
        assert one.dtype == other.dtype
        scale = float(other.float().std())
        torch.testing.assert_close(one.float() / scale, other.float() / scale, **near(dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens", [3, 100])
def test_lora_scores_as_pefts(dtype: torch.dtype, tokens: int) -> None:
    short, long = short_and_long(lora_layer(dtype))
    x = torch.randn(tokens, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    short.eval(), long.eval()
    with torch.no_grad():
        ours, theirs = short(x), long(x)
    # The products are in float32 in both; in bfloat16 a sum that lies between two values may go either way.
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 2**-7)
    if dtype == torch.bfloat16:
        assert (ours == theirs).float().mean() > 0.95


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "dropout": (lambda: lora_layer(torch.float32, lora_dropout=0.5), lambda layer: layer),
    "dora": (lambda: lora_layer(torch.float32, use_dora=True), lambda layer: layer),
    "bias": (lambda: lora_layer(torch.float32, bias=True, lora_bias=True), lambda layer: layer),
    "disabled": (lambda: lora_layer(torch.float32), lambda layer: layer.enable_adapters(False)),
    "merged": (lambda: lora_layer(torch.float32), lambda layer: layer.merge()),
    "none active": (lambda: lora_layer(torch.float32), lambda layer: layer.set_adapter([])),
    "another active": (lambda: lora_layer(torch.float32), lambda layer: setattr(layer, "_active_adapter", "other")),
    "narrow": (lambda: lora_layer(torch.float32).to(torch.bfloat16), lambda layer: layer),
}


@pytest.mark.parametrize("case", CASES)
def test_other_lora_is_left_to_peft(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    make, change = CASES[case]
    short, long = short_and_long(make())
    monkeypatch.setattr(fused._LowRank, "apply", lambda *_: pytest.fail("the short way was taken"))
    found = []
    for layer in (short, long):
        change(layer)
        torch.manual_seed(0)
        x = torch.randn(3, 24, dtype=layer.base_layer.weight.dtype)
        found.append(layer(x))
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", TYPES)
def test_norms_are_the_same_and_so_are_their_gradients(dtype: torch.dtype) -> None:
    short, long = short_and_long(layer_norm_of(dtype))
    assert isinstance(short, fused.RootMeanSquare)
    generator = torch.Generator().manual_seed(1)
    x, direction = (torch.randn(2, 5, 24, generator=generator).to(dtype) for _ in range(2))
    (ours, (of_ours,)), (theirs, (of_theirs,)) = (gradients(one, x, direction) for one in (short, long))
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(of_ours, of_theirs, **near(dtype))


def test_a_norm_that_trains_has_a_gradient() -> None:
    short, long = short_and_long(layer_norm_of(torch.float32))
    for norm in (short, long):
        norm.weight.requires_grad_(True)
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    ours, theirs = (gradients(norm, x, torch.ones(3, 24))[1] for norm in (short, long))
    assert len(ours) == 2
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def test_norms_of_another_kind_stay() -> None:
    """Gemma's adds 1 to its weight."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    other = GemmaRMSNorm(24).requires_grad_(False)
    other.variance_epsilon = other.eps
    assert not isinstance(short_and_long(other)[0], fused.RootMeanSquare)


@pytest.mark.parametrize("family", ["tiny_llama_folder", "tiny_qwen2_folder"])
def test_a_whole_model(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    load_tiny: Callable[..., Any],
    family: str,
) -> None:
    """Names, gradients and scores of an attached adapter are those of PEFT."""
    folder: Path = request.getfixturevalue(family)
    wanted = config.Adapter(r=4, target_modules=PROJECTIONS)
    ours = adapters.attach(load_tiny(folder), wanted, base_name="tiny", seed=1)
    monkeypatch.setattr(fused, "install", lambda model: None)
    theirs = adapters.attach(load_tiny(folder), wanted, base_name="tiny", seed=1)
    assert any(isinstance(module, fused.LowRank) for module in ours.modules())
    assert any(isinstance(module, fused.RootMeanSquare) for module in ours.modules())
    assert not any(isinstance(module, fused.LowRank) for module in theirs.modules())
    ids = torch.randint(2, 320, (2, 30), generator=torch.Generator().manual_seed(0))
    found = []
    for model in (ours, theirs):
        torch.manual_seed(2)
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.2)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model.train()
        model(input_ids=ids).logits.square().sum().backward()
        after = model.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        with torch.inference_mode():
            found.append((before.keys(), trained, model.eval()(input_ids=ids).logits))
    (names, of_ours, scores), (other_names, of_theirs, other_scores) = found
    assert names == other_names
    torch.testing.assert_close(scores, other_scores, atol=1e-5, rtol=1e-5)
    # In float32 either is off by up to some 1e-4 of the largest gradient, which way depends on the processor.
    kept = {name: gradient.double() for name, gradient in of_theirs.items()}
    exact = theirs.double().train()
    exact.zero_grad()
    exact(input_ids=ids).logits.square().sum().backward()
    for name, parameter in exact.named_parameters():
        if parameter.requires_grad:
            scale = float(parameter.grad.abs().max())
            assert scale > 0
            for found_one in (of_ours[name].double(), kept[name]):
                torch.testing.assert_close(found_one / scale, parameter.grad / scale, atol=1e-3, rtol=0)


def test_merged_and_unloaded_it_is_the_base_model(load_tiny: Callable[..., Any], tiny_llama_folder: Path) -> None:
    model = adapters.attach(load_tiny(tiny_llama_folder), config.Adapter(r=4), base_name="tiny", seed=1)
    ids = torch.tensor([[0, 30, 40, 50]])
    with torch.inference_mode():
        for name, parameter in model.eval().named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
        attached = model(input_ids=ids).logits
        with model.disable_adapter():
            plain = model(input_ids=ids).logits
        merged = model.merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(merged, attached, atol=1e-4, rtol=1e-4)
    assert (plain - attached).abs().max() > 0.1


@pytest.mark.parametrize("family", ["tiny_llama_folder", "tiny_qwen2_folder"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_read_positions_alone(
    request: pytest.FixtureRequest, load_tiny: Callable[..., Any], family: str, checkpointing: bool
) -> None:
    """Outputs and gradients are those of all positions; behind the last attention only read ones are computed."""
    folder: Path = request.getfixturevalue(family)
    model = adapters.attach(load_tiny(folder), config.Adapter(r=4), base_name="tiny", seed=1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    model.train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(2, 320, (2, 20), generator=torch.Generator().manual_seed(0))
    places = torch.zeros(2, 20, dtype=torch.bool)
    places[0, [3, 9]] = places[1, 19] = True
    causal = torch.ones(20, 20, dtype=torch.bool).tril().expand(2, 20, 20)
    (last,) = (module for module in model.modules() if isinstance(module, fused.LastLayer))
    seen: list[int] = []
    last.mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:-1].numel()))
    found = []
    for short in (True, False):
        mask = scorer._additive(causal, torch.float32)
        if short:
            reads = fused.read_at(mask, places)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        out = reads.of(logits) if short else logits[places]
        model.zero_grad()
        out.square().sum().backward()
        found.append((out, [p.grad for p in model.parameters() if p.requires_grad]))
    assert reads.taken
    assert set(seen) == {3, 40}
    (ours, of_ours), (theirs, of_theirs) = found
    assert ours.shape == (3, 2)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for one, other in zip(of_ours, of_theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_nothing_to_read(load_tiny: Callable[..., Any], tiny_llama_folder: Path) -> None:
    model = load_tiny(tiny_llama_folder)
    mask = torch.zeros(1, 1, 4, 4)
    reads = fused.read_at(mask, torch.zeros(1, 4, dtype=torch.bool))
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[0, 30, 40, 50]]), attention_mask=mask).logits
    assert not reads.taken
    assert logits.shape[:2] == (1, 4)
    assert reads.of(logits).shape[0] == 0
