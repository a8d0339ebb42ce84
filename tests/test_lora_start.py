"""PiSSA and LoftQ: where they start, and that the base model keeps its weights to the last bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peftrec import adapters, backbone, config, lora_start
from peftrec.errors import ModelError

IDS = torch.tensor([[0, 30, 40, 50, 60, 70]])
RANK = 4


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def decaying(rows: int, columns: int, seed: int) -> torch.Tensor:
    """A matrix with the singular values 2, 1, 1/2, …"""
    generator = torch.Generator().manual_seed(seed)
    least = min(rows, columns)
    left, right = (torch.linalg.qr(torch.randn(n, least, generator=generator))[0] for n in (rows, columns))
    return left @ torch.diag(2.0 ** (1 - torch.arange(least))) @ right.T


@pytest.fixture
def pissa(load_tiny: Callable[..., Any], tiny_llama_folder: Path) -> Any:
    base = load_tiny(tiny_llama_folder)
    for i, layer in enumerate(base.model.layers):
        layer.self_attn.q_proj.weight.data = decaying(32, 32, i)
    adapter = config.Adapter(r=RANK, lora_alpha=12, variant="pissa", target_modules=["q_proj", "v_proj"])
    return adapters.attach(base, adapter, base_name="x", seed=1)


def test_pissa_trains_the_principal_part(pissa: Any) -> None:
    for layer in pissa.base_model.model.model.layers:
        found = layer.self_attn.q_proj
        up, down = found.lora_B["default"].trained, found.lora_A["default"].trained
        left, values, right = torch.linalg.svd(found.base_layer.weight)
        expected = left[:, :RANK] @ torch.diag(values[:RANK]) @ right[:RANK]
        torch.testing.assert_close(12 / RANK * up @ down, expected, atol=1e-4, rtol=1e-4)
        # Both factors carry the root of each singular value.
        torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1), atol=1e-4, rtol=1e-4)


def test_pissa_moves_as_if_it_stood_in_the_base(pissa: Any) -> None:
    """PEFT's way, with the rest of the weights as the base, has the same gradients."""
    q = pissa.base_model.model.model.layers[0].self_attn.q_proj
    down, up = (part["default"] for part in (q.lora_A, q.lora_B))
    a, b = (part.trained.detach().clone().requires_grad_(True) for part in (down, up))
    rest = q.base_layer.weight - 3 * up.first @ down.first
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(4))
    expected = x @ rest.T + 3 * (x @ a.T) @ b.T
    found = q(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    expected.pow(2).sum().backward()
    found.pow(2).sum().backward()
    torch.testing.assert_close(down.trained.grad, a.grad, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(up.trained.grad, b.grad, atol=1e-3, rtol=1e-4)
    assert not down.first.requires_grad
    assert not up.first.requires_grad


def test_pissa_is_saved_as_plain_lora_of_twice_the_rank(pissa: Any, tmp_path: Path) -> None:
    adapters.save(pissa, tmp_path)
    saved = json.loads((tmp_path / adapters.CONFIG).read_text())
    assert (saved["r"], saved["lora_alpha"], saved["init_lora_weights"]) == (2 * RANK, 24, True)
    weights = load_file(tmp_path / adapters.WEIGHTS)
    assert {name.split(".")[-2] for name in weights} == {"lora_A", "lora_B"}
    for name, tensor in weights.items():
        assert tensor.shape["lora_B" in name] == 2 * RANK
    assert pissa.peft_config["default"].r == RANK, "the model itself can go on training"


def test_pissa_starts_at_the_base_where_weights_lie_the_other_way(
    load_tiny: Callable[..., Any], tiny_gpt2_folder: Path
) -> None:
    before = logits(load_tiny(tiny_gpt2_folder))
    adapter = config.Adapter(r=RANK, variant="pissa")
    attached = adapters.attach(load_tiny(tiny_gpt2_folder), adapter, base_name="x", seed=1)
    torch.testing.assert_close(logits(attached), before, atol=2e-5, rtol=1e-5)
    conv = attached.base_model.model.transformer.h[0].attn.c_attn
    update = conv.scaling["default"] * conv.lora_B["default"].trained @ conv.lora_A["default"].trained
    assert update.shape == conv.base_layer.weight.T.shape
    assert (conv.base_layer.weight.T - update).norm() < conv.base_layer.weight.norm()


def test_pissa_starts_at_a_quantized_base(load_tiny: Callable[..., Any], quantizable: Path) -> None:
    base = backbone.load(config.Model(name=str(quantizable), dtype="float32", load_in_4bit=True)).model
    before = logits(base)
    attached = adapters.attach(base, config.Adapter(r=RANK, variant="pissa"), base_name="x", seed=1)
    torch.testing.assert_close(logits(attached), before, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (config.Adapter(r=20, variant="pissa"), "adapter.r: 20; model.layers.0.self_attn.k_proj has 16 dimensions"),
        (
            config.Adapter(r=2, variant="pissa", target_modules=["embed_tokens"]),
            "adapter.variant: model.embed_tokens is of type Embedding; pissa and loftq take linear layers only",
        ),
    ],
)
def test_layers_without_such_a_part(
    load_tiny: Callable[..., Any], tiny_llama_folder: Path, adapter: config.Adapter, message: str
) -> None:
    with pytest.raises(ModelError) as caught:
        adapters.attach(load_tiny(tiny_llama_folder), adapter, base_name="x", seed=1)
    assert str(caught.value).startswith(message)


@pytest.fixture(scope="module")
def quantizable(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose layers are whole blocks of 64 values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    shape = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    folder = tmp_path_factory.mktemp("quantizable")
    LlamaForCausalLM(shape).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class TestLoftQ:
    ADAPTER = config.Adapter(r=8, lora_alpha=32, variant="loftq")

    def load(self, folder: Path, bits: bool) -> Any:
        return backbone.load(config.Model(name=str(folder), dtype="float32", load_in_4bit=bits)).model

    def test_starts_with_the_best_approximation_of_what_was_lost(self, quantizable: Path) -> None:
        from peft.utils.integrations import dequantize_module_weight

        original = self.load(quantizable, False)
        attached = adapters.attach(
            self.load(quantizable, True), self.ADAPTER, base_name="x", seed=1, original=lambda: original
        )
        layers = 0
        for name, layer in attached.base_model.model.named_modules():
            if not hasattr(layer, "lora_A"):
                continue
            layers += 1
            lost = original.get_submodule(name).weight - dequantize_module_weight(layer.base_layer)
            update = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            # Eckart and Young: no matrix of this rank comes closer than the sum of the other singular values' squares.
            least = torch.linalg.svdvals(lost)[8:].pow(2).sum().sqrt()
            update = update.detach()
            assert lost.norm() > 0
            assert float((lost - update).norm()) == pytest.approx(float(least), rel=0.02)
            assert (lost - update).norm() < 0.9 * lost.norm()
        assert layers == 7

    def test_comes_back_on_the_quantized_base(self, quantizable: Path, tmp_path: Path) -> None:
        original = self.load(quantizable, False)
        attached = adapters.attach(
            self.load(quantizable, True), self.ADAPTER, base_name="x", seed=1, original=lambda: original
        )
        adapters.save(attached, tmp_path)
        loaded = adapters.load(self.load(quantizable, True), tmp_path)
        torch.testing.assert_close(logits(loaded), logits(attached), atol=1e-6, rtol=1e-6)

    def test_a_layer_that_was_not_quantized_starts_like_any_lora(
        self, load_tiny: Callable[..., Any], tiny_llama_folder: Path
    ) -> None:
        """Where nothing was lost, two factors of zero would never move."""
        attached = adapters.attach(load_tiny(tiny_llama_folder), config.Adapter(r=2), base_name="x", seed=1)
        lora_start.from_quantization_error(attached, load_tiny(tiny_llama_folder))
        for name, parameter in attached.named_parameters():
            if "lora_" in name:
                assert bool(parameter.any()) == ("lora_A" in name)
