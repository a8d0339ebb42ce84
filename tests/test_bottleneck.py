"""Bottleneck adapters: nothing changes when they are attached, PEFT's own functions handle them, the formulas hold."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import tuners_utils
from torch import nn
from transformers import AutoConfig, AutoModel

import peftrec
from peftrec.bottleneck import (
    PLACES,
    VARIANTS,
    BottleneckConfig,
    BottleneckLayer,
    BottleneckModel,
    BottleneckType,
)
from peftrec.errors import ModelError

# PEFT asks transformers something by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

IDS = torch.tensor([[3, 14, 15, 9, 2, 6], [5, 35, 8, 9, 7, 9]])
KINDS = ("llama", "qwen2", "mistral", "gpt2", "bert", "t5")
LAYERS = 2
# Hidden size 16, factor 4: 16 -> 4 with bias, 4 -> 16 with bias.
ONE_PLACE = 16 * 4 + 4 + 4 * 16 + 16


def shape(kind: str, **more: Any) -> Any:
    """A config of hidden size 16, MLP size 32 and two layers, under the names that the architecture has for them."""
    names = {
        "gpt2": {"n_embd": 16, "n_inner": 32, "n_layer": LAYERS, "n_head": 2},
        "distilbert": {"dim": 16, "hidden_dim": 32, "n_layers": LAYERS, "n_heads": 2},
        "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": LAYERS, "num_heads": 2},
        "bart": {
            **{f"{side}_layers": LAYERS for side in ("encoder", "decoder")},
            **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
            **{f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")},
            "d_model": 16,
        },
        "opt": {
            "hidden_size": 16,
            "word_embed_proj_dim": 16,
            "ffn_dim": 32,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
        },
    }
    usual = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    family = {"mt5": "t5", "umt5": "t5", "mbart": "bart"}.get(kind, kind)
    fields = {
        "vocab_size": 40,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        **names.get(family, usual),
        **more,
    }
    if family not in names:
        fields = {"num_key_value_heads": 2, "head_dim": 8, **fields}
    return AutoConfig.for_model(kind, **fields)


def build(kind: str, auto: Any = AutoModel, **more: Any) -> Any:
    """A random model whose weights are wide enough for every place to matter; the same one at each call."""
    torch.manual_seed(1)
    model = auto.from_config(shape(kind, **more)).float()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
    return model.eval()


def of_kind(kind: str) -> Any:
    if kind == "t5":
        from transformers import T5EncoderModel

        torch.manual_seed(1)
        return T5EncoderModel(shape("t5")).eval()
    from transformers import AutoModelForCausalLM

    return build(kind, AutoModel if kind == "bert" else AutoModelForCausalLM)


def config(variant: str = "houlsby", **more: Any) -> BottleneckConfig:
    return BottleneckConfig(**{"variant": variant, "reduction_factor": 4, **more})


def output(model: Any) -> torch.Tensor:
    """Logits (2, 6, 40), or last hidden state (2, 6, 16)."""
    with torch.no_grad():
        return model(input_ids=IDS)[0]


def nudge(model: Any, name: str = "default", seed: int = 7) -> Any:
    """Give an adapter other weights than its initial ones, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def trainable(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def places(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, BottleneckLayer)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_at_the_start_and_only_the_adapter_trains(kind: str, variant: str) -> None:
    base = of_kind(kind)
    before, weights = output(base), {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, config(variant, dropout=0.1))
    assert torch.equal(output(model), before)
    assert trainable(model) == ONE_PLACE * LAYERS * (2 if variant == "houlsby" else 1)
    assert all("bottleneck_" in name for name, p in model.named_parameters() if p.requires_grad)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    model.train()
    torch.manual_seed(0)
    for _ in range(16):
        # Each sequence is to give what the other one gave.
        loss = (model(input_ids=IDS)[0] - before.flip(0)).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        optimizer.step()
    assert max(losses[-2:]) < 0.75 * losses[0]

    model.eval()
    assert not torch.allclose(output(model), before, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(output(model), before)
    after = model.unload().state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], value) for name, value in weights.items())


@pytest.mark.parametrize("kind", sorted(PLACES))
def test_places_of_every_known_architecture(kind: str) -> None:
    both_sides = kind in ("t5", "mt5", "umt5", "bart", "mbart")
    mlps = LAYERS * (2 if both_sides else 1)
    # A decoder layer of these looks at itself and at the encoder.
    attentions = LAYERS * (3 if both_sides else 1)
    more = {"is_gated_act": False} if kind in ("t5", "mt5", "umt5") else {}
    inputs = {"input_ids": IDS, **({"decoder_input_ids": IDS} if both_sides else {})}
    with torch.no_grad():
        before = build(kind, **more)(**inputs)[0]
        for variant, count in (("houlsby", attentions + mlps), ("pfeiffer", mlps), ("parallel", mlps)):
            if variant == "parallel" and PLACES[kind].beside is None:
                with pytest.raises(ModelError, match=rf"in {kind} the MLP is not one module.*use houlsby or pfeiffer"):
                    get_peft_model(build(kind, **more), config(variant))
                continue
            model = get_peft_model(build(kind, **more), config(variant))
            assert len(places(model)) == count
            assert torch.equal(model(**inputs)[0], before)
            assert not torch.allclose(nudge(model)(**inputs)[0], before, atol=1e-3)
            after_attention = [name for name in places(model) if "att" in name.lower().rsplit(".layer", 1)[-1]]
            assert len(after_attention) == (attentions if variant == "houlsby" else 0)


def test_parameters_of_one_place() -> None:
    counts = {factor: trainable(get_peft_model(of_kind("llama"), config("pfeiffer", reduction_factor=factor)))
              for factor in (1, 4, 32)}  # fmt: skip
    assert ONE_PLACE == 148
    # The bottleneck is as wide as the model, a quarter of it, and at least one value.
    assert counts == {
        1: 2 * (2 * (16 * 16 + 16)),
        4: 2 * 148,
        32: 2 * (16 * 1 + 1 + 1 * 16 + 16),
    }


class Block(nn.Module):
    """y = (x0 + x1, x0 - x1), and one position."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(2, 2, bias=False)
        self.projection.weight.data = torch.tensor([[1.0, 1.0], [1.0, -1.0]])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection(x)


def by_hand(**fields: Any) -> Any:
    """A model of one block whose adapter is relu(h . (1, -2) + 0.5) * (3, -1) + (0.25, 0)."""
    model = get_peft_model(Block(), BottleneckConfig(reduction_factor=2, target_modules=["projection"], **fields))
    layer = model.base_model.model.projection
    layer.bottleneck_down["default"].weight.data = torch.tensor([[1.0, -2.0]])
    layer.bottleneck_down["default"].bias.data = torch.tensor([0.5])
    layer.bottleneck_up["default"].weight.data = torch.tensor([[3.0], [-1.0]])
    layer.bottleneck_up["default"].bias.data = torch.tensor([0.25, 0.0])
    return model.eval()


X = torch.tensor([[4.0, 1.0]])  # the block makes (5, 3) of it


def test_behind_the_block_by_hand() -> None:
    # relu(5 - 6 + 0.5) = 0: only the last bias is left.
    assert by_hand(variant="pfeiffer")(X).tolist() == [[5.25, 3.0]]
    # tanh(-0.5) = -0.46211716
    expected = [[5 + 0.25 - 3 * 0.46211716, 3 + 0.46211716]]
    torch.testing.assert_close(by_hand(variant="houlsby", non_linearity="tanh")(X), torch.tensor(expected))


def test_beside_the_block_by_hand() -> None:
    # relu(4 - 2 + 0.5) = 2.5 -> (7.75, -2.5), times 4.
    assert by_hand(variant="parallel", scaling=4.0)(X).tolist() == [[5 + 31.0, 3 - 10.0]]


def test_several_active_adapters_add_up() -> None:
    model = by_hand(variant="parallel")
    model.add_adapter("behind", replace(config("pfeiffer", target_modules=["projection"]), reduction_factor=2))
    layer = model.base_model.model.projection
    layer.bottleneck_up["behind"].bias.data = torch.tensor([100.0, 200.0])
    model.base_model.set_adapter(["default", "behind"])
    assert model(X).tolist() == [[5 + 7.75 + 100, 3 - 2.5 + 200]]


def test_beside_berts_mlp_comes_before_its_norm() -> None:
    base = of_kind("bert")
    model = nudge(get_peft_model(base, config("parallel", scaling=2.0)))
    place = base.encoder.layer[0].output
    assert isinstance(place, BottleneckLayer)
    inner, x = torch.randn(1, 3, 32), torch.randn(1, 3, 16)
    adapter = place.bottleneck_up["default"](torch.relu(place.bottleneck_down["default"](x)))
    expected = place.base_layer.LayerNorm(place.base_layer.dense(inner) + 2.0 * adapter + x)
    torch.testing.assert_close(place(inner, x), expected)
    with model.disable_adapter():
        torch.testing.assert_close(place(inner, x), place.base_layer(inner, x), atol=0, rtol=0)


def test_dropout_works_in_training_only() -> None:
    model = by_hand(variant="parallel", dropout=0.5)
    assert model(X).tolist() == [[12.75, 0.5]]
    torch.manual_seed(0)
    drawn = {tuple(model.train()(X)[0].tolist()) for _ in range(30)}
    # The one unit is dropped, or counts twice.
    assert drawn == {(5.25, 3.0), (5 + 15.25, 3 - 5.0)}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_equal(kind: str, variant: str, tmp_path: Path) -> None:
    model = nudge(get_peft_model(of_kind(kind), config(variant, non_linearity="silu", scaling=0.5)))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(of_kind(kind), tmp_path)
    assert torch.equal(output(loaded), output(model))
    assert trainable(loaded) == 0
    again = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(again, BottleneckConfig)
    assert (again.variant, again.non_linearity, again.scaling) == (variant, "silu", 0.5)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "BOTTLENECK"


def test_loaded_without_memory_for_initial_weights(tmp_path: Path) -> None:
    model = nudge(get_peft_model(of_kind("llama"), config()))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(of_kind("llama"), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(output(loaded), output(model))


def test_several_adapters_on_one_model(tmp_path: Path) -> None:
    before = output(of_kind("llama"))
    model = nudge(get_peft_model(of_kind("llama"), config("pfeiffer"), adapter_name="one"), "one", seed=1)
    one = output(model)
    model.add_adapter("two", config("houlsby", reduction_factor=2))
    nudge(model, "two", seed=2)
    assert torch.equal(output(model), one)
    # Adding another adapter does not set it to train.
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"one"}
    model.set_adapter("two")
    two = output(model)
    assert not torch.allclose(two, one, atol=1e-2)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"two"}
    model.save_pretrained(tmp_path, save_embedding_layers=False)

    loaded = PeftModel.from_pretrained(of_kind("llama"), tmp_path / "two", adapter_name="two")
    missing = loaded.load_adapter(tmp_path / "one", "first")
    assert not missing.unexpected_keys
    assert torch.equal(output(loaded), two)
    loaded.set_adapter("first")
    assert torch.equal(output(loaded), one)

    with pytest.warns(UserWarning, match="two was active and is deleted; one is active now"):
        model.delete_adapter("two")
    assert model.active_adapters == ["one"]
    assert torch.equal(output(model), one)
    assert not [name for name in model.state_dict() if ".two." in name]
    model.delete_adapter("one")
    # PEFT's outermost module asks for an adapter that there must be; the one below is what runs.
    assert torch.equal(output(model.base_model), before)
    model.add_adapter("three", config())
    model.set_adapter("three")
    assert torch.equal(output(model), before)


@pytest.mark.parametrize("rest", [("y", "z"), ("z", "y")])
def test_one_adapter_follows_a_deleted_one_everywhere(rest: tuple[str, str]) -> None:
    model = get_peft_model(of_kind("llama"), config("pfeiffer"), adapter_name="x")
    for name, variant in zip(rest, ("parallel", "houlsby"), strict=True):
        model.add_adapter(name, config(variant))
    with pytest.warns(UserWarning, match=f"x was active and is deleted; {rest[0]} is active now"):
        model.delete_adapter("x")
    assert model.active_adapters == [rest[0]]
    assert len(places(model)) == 2 * LAYERS
    assert all(model.get_submodule(name).active_adapters == [rest[0]] for name in places(model))


def test_modules_to_save_come_along(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    def classifier() -> Any:
        return build("bert", AutoModelForSequenceClassification, num_labels=5)

    before = classifier()
    model = get_peft_model(classifier(), config("pfeiffer", task_type="SEQ_CLS"))
    # 16 -> 5 with bias.
    assert trainable(model) == LAYERS * ONE_PLACE + 16 * 5 + 5
    assert torch.equal(output(model), output(before))
    nudge(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(classifier(), tmp_path)
    assert torch.equal(output(loaded), output(model))
    assert not torch.allclose(loaded.base_model.model.classifier.weight, before.classifier.weight)


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_are_float32_on_a_bfloat16_base(variant: str) -> None:
    base = of_kind("llama").bfloat16()
    before = output(base)
    model = get_peft_model(base, config(variant))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert output(model).dtype == torch.bfloat16
    assert torch.equal(output(model), before)
    nudge(model)(input_ids=IDS)[0].float().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    same = get_peft_model(of_kind("llama").bfloat16(), config(variant), autocast_adapter_dtype=False)
    assert {p.dtype for p in same.parameters()} == {torch.bfloat16}
    assert output(same).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_gradients_with_checkpointing(kind: str) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        model = nudge(get_peft_model(of_kind(kind), config("parallel")))
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        model(input_ids=IDS)[0].square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(checkpointed[name], gradient)


@pytest.mark.parametrize("variant", VARIANTS)
def test_generating_with_and_without_cache(variant: str) -> None:
    model = nudge(get_peft_model(of_kind("llama"), config(variant, task_type="CAUSAL_LM")))
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = [model.generate(input_ids=IDS, use_cache=cache, **settings) for cache in (True, False)]
    assert made[0].shape == (2, 11)
    assert torch.equal(*made)
    with model.disable_adapter():
        assert not torch.equal(model.generate(input_ids=IDS, **settings), made[0])


@pytest.mark.filterwarnings("ignore")  # what bitsandbytes says of a CPU is not ours
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", [4, 8])
def test_on_a_quantized_base(bits: int, variant: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # Weights are quantized by blocks of 64 values, and multiplied by blocks of 32 rows.
    build("llama", AutoModelForCausalLM, hidden_size=64, intermediate_size=128, head_dim=32).save_pretrained(tmp_path)
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    quantization = BitsAndBytesConfig(**(four if bits == 4 else {"load_in_8bit": True}))
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, dtype=torch.float32).eval()
    assert type(base.model.layers[0].mlp.down_proj).__name__ == {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    before = output(base)
    # Taken now, because the first pass may put them in an order that this processor is quick with.
    packed = {name: value.clone() for name, value in base.named_parameters() if not value.is_floating_point()}
    assert len(packed) == 7 * LAYERS
    model = get_peft_model(base, config(variant))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(output(model), before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(input_ids=IDS).logits.flatten(0, 1), IDS.flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    with model.disable_adapter():
        assert torch.equal(output(model), before)
    unwrapped = dict(model.unload().named_parameters())
    assert all(torch.equal(unwrapped[name], value) for name, value in packed.items())


class TestRefused:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"variant": "serial"}, "variant is 'serial'; expected one of houlsby, pfeiffer, parallel"),
            ({"reduction_factor": 0}, "reduction_factor is 0; expected a whole number from 1"),
            ({"reduction_factor": 2.5}, "reduction_factor is 2.5"),
            ({"non_linearity": "elu"}, "non_linearity is 'elu'; expected one of relu, gelu, silu, tanh"),
            ({"non_linearity": ["relu"]}, "non_linearity is"),
            ({"dropout": 1.0}, r"dropout is 1.0; expected a number in \[0, 1\)"),
            ({"scaling": float("nan")}, "scaling is nan; expected a finite number"),
        ],
    )
    def test_values(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ModelError, match=message):
            BottleneckConfig(**fields)

    def test_merging(self) -> None:
        model = nudge(get_peft_model(of_kind("llama"), config()))
        before = output(model)
        for merge in (model.merge_adapter, model.merge_and_unload, model.get_submodule(places(model)[0]).merge):
            with pytest.raises(ModelError, match="a bottleneck is not linear") as caught:
                merge()
            assert "\n" not in str(caught.value)
        model.unmerge_adapter()
        assert torch.equal(output(model), before)

    def test_unknown_architecture(self) -> None:
        base = build("gptj", n_embd=16, n_layer=LAYERS, n_head=2, rotary_dim=4)
        with pytest.raises(ModelError, match=r"no places are known for the architecture 'gptj'.*set target_modules"):
            get_peft_model(base, config())
        model = get_peft_model(base, config("pfeiffer", target_modules=["mlp"]))
        assert places(model) == [f"base_model.model.h.{layer}.mlp" for layer in range(LAYERS)]

    def test_model_without_an_architecture(self) -> None:
        with pytest.raises(ModelError, match="set target_modules"):
            get_peft_model(Block(), config())

    def test_place_of_unknown_width(self) -> None:
        with pytest.raises(ModelError, match="outer is a Block, whose output has no known width"):
            get_peft_model(nn.ModuleDict({"outer": Block()}), config("pfeiffer", target_modules=["outer"]))

    def test_beside_what_changes_the_width(self) -> None:
        with pytest.raises(ModelError, match="down_proj is a Linear of 32 values in and 16 out"):
            get_peft_model(of_kind("llama"), config("parallel", target_modules=["down_proj"]))

    def test_beside_what_changes_the_width_and_has_an_adapter_behind_it(self) -> None:
        model = get_peft_model(of_kind("llama"), config("pfeiffer", target_modules=["down_proj"]))
        with pytest.raises(ModelError, match="down_proj is a Linear of 32 values in and 16 out"):
            model.add_adapter("second", config("parallel", target_modules=["self_attn.o_proj", "down_proj"]))
        assert not [name for name in model.state_dict() if ".second." in name]

    def test_place_that_returns_more_than_one_tensor(self) -> None:
        model = get_peft_model(of_kind("llama"), config("pfeiffer", target_modules=["self_attn"]))
        with pytest.raises(ModelError, match="LlamaAttention returns a tuple; expected one tensor"):
            output(model)

    @pytest.mark.parametrize(("first", "second"), [("pfeiffer", "parallel"), ("parallel", "pfeiffer")])
    def test_adapters_within_one_another(self, first: str, second: str) -> None:
        model = nudge(get_peft_model(of_kind("bert"), config(first)))
        before = output(model)
        with pytest.raises(ModelError, match=r"layer.0.output.dense lies within encoder.layer.0.output, and both"):
            model.add_adapter("second", config(second))
        assert list(model.peft_config) == ["default"]
        assert torch.equal(output(model), before)

    def test_places_within_one_another(self) -> None:
        with pytest.raises(ModelError, match=r"mlp.down_proj lies within layers.0.mlp"):
            get_peft_model(build("llama"), config("pfeiffer", target_modules=["mlp", "down_proj"]))


class TestRegistration:
    LOAD = (
        "import sys, torch\n"
        "from transformers import LlamaForCausalLM\n"
        "model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])\n"
        "ids = torch.tensor([[3, 14, 15, 9, 2, 6], [5, 35, 8, 9, 7, 9]])\n"
        "with torch.no_grad():\n"
        "    torch.save(model(input_ids=ids).logits, sys.argv[3])\n"
    )

    @pytest.mark.parametrize(
        "imports",
        [
            "import sys, peftrec\nassert not {'torch', 'peft'} & sys.modules.keys()\nimport peft\n",
            "import peft\nimport peftrec\n",
        ],
        ids=["peftrec-first", "peft-first"],
    )
    def test_plain_imports_are_enough(self, imports: str, tmp_path: Path) -> None:
        base = of_kind("llama")
        base.save_pretrained(tmp_path / "base")
        model = nudge(get_peft_model(base, config()))
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        arguments = [str(tmp_path / name) for name in ("base", "adapter", "logits.pt")]
        done = subprocess.run(
            [sys.executable, "-c", imports + self.LOAD, *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(peftrec.__file__).parents[1],
        )
        assert done.returncode == 0, done.stderr
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), output(model), atol=1e-6, rtol=1e-6)

    def test_a_peft_that_does_not_fit_stays_importable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "peftrec.bottleneck")
        monkeypatch.setitem(sys.modules, "peft.tuners.tuners_utils", None)
        with pytest.warns(UserWarning, match=r"cannot take bottleneck adapters \(.*tuners_utils.*expected peft>=0.21"):
            peftrec._add_bottleneck()

    def test_module_that_is_being_imported_is_not_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "peftrec.bottleneck", None)  # importing it now would raise
        peftrec._add_bottleneck()
        assert sys.modules["peftrec.bottleneck"] is None


class TestWhatWeUseOfPeft:
    """A canary: PEFT's semi-private interface as this module uses it. Where it moved, the module must follow."""

    def test_version(self) -> None:
        assert peft.__version__.startswith("0.21."), "read tuners_utils.py of the new version, then move the bound"

    def test_the_three_mappings(self) -> None:
        for mapping, ours, theirs in (
            (PEFT_TYPE_TO_CONFIG_MAPPING, BottleneckConfig, peft.LNTuningConfig),
            (PEFT_TYPE_TO_TUNER_MAPPING, BottleneckModel, peft.LNTuningModel),
            (PEFT_TYPE_TO_PREFIX_MAPPING, "bottleneck_", "ln_tuning_"),
        ):
            assert mapping["LN_TUNING"] == theirs
            assert mapping["BOTTLENECK"] == mapping[BottleneckType.BOTTLENECK] == ours
        assert "BOTTLENECK" not in peft.PeftType.__members__, "PEFT has this type itself now: take another name"

    @pytest.mark.parametrize(
        ("owner", "method", "parameters"),
        [
            (tuners_utils.BaseTuner, "_prepare_adapter_config", ["self", "peft_config", "model_config"]),
            (tuners_utils.BaseTuner, "_prepare_model", ["self", "peft_config", "model"]),
            (tuners_utils.BaseTuner, "_check_target_module_exists", ["peft_config", "key"]),
            (tuners_utils.BaseTuner, "_replace_module", ["self", "parent", "child_name", "new_module", "child"]),
            (tuners_utils.BaseTuner, "delete_adapter", ["self", "adapter_name"]),
            (tuners_utils.BaseTuner, "set_adapter", ["self", "adapter_name", "inference_mode"]),
            (tuners_utils.BaseTunerLayer, "merge", ["self", "safe_merge", "adapter_names"]),
            (tuners_utils.BaseTunerLayer, "unmerge", ["self"]),
            (tuners_utils.BaseTunerLayer, "_get_base_layer_device_and_dtype", ["self", "base_layer"]),
            (tuners_utils.BaseTunerLayer, "_cast_input_dtype", ["self", "x", "dtype"]),
            (
                tuners_utils.BaseTunerLayer,
                "_move_adapter_to_device_of_base_layer",
                ["self", "adapter_name", "device"],
            ),
        ],
    )
    def test_methods_have_their_parameters(self, owner: type, method: str, parameters: list[str]) -> None:
        assert list(inspect.signature(getattr(owner, method)).parameters) == parameters

    def test_every_method_that_we_override_is_still_one(self) -> None:
        for ours, theirs in ((BottleneckModel, tuners_utils.BaseTuner), (BottleneckLayer, tuners_utils.BaseTunerLayer)):
            own = {name for name, value in vars(ours).items() if inspect.isfunction(value)}
            missing = own - {"__init__", "forward", "add", "_plus", "_width"} - set(dir(theirs))
            assert not missing
            assert own & set(dir(theirs))
        passed = {"peft_config", "adapter_name", "target", "target_name", "parent", "current_key"}
        required = inspect.signature(tuners_utils.BaseTuner._create_and_replace).parameters.values()
        names = {p.name for p in required if p.default is p.empty and p.name != "self"}
        assert names == passed
