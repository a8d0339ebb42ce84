"""Quantized base models: what stays exact, that they train, and that their adapters fit the model as it is."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from peftrec import Recommender, adapters, backbone, config, quantized, record, scorer
from peftrec.errors import ConfigError, ModelError
from peftrec.target import Target

ROOT = Path(__file__).parents[1]
BITS = {"4-bit": {"load_in_4bit": True}, "8-bit": {"load_in_8bit": True}}
ANSWERS = [30, 40]
IDS = torch.tensor([[0, 30, 40, 50, 60, 70, 80, 90, 100, 110]])

both = pytest.mark.parametrize("bits", BITS.values(), ids=BITS.keys())


@pytest.fixture(scope="session")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama (hidden 64, 2 layers): whole blocks of 64 values, and widths that CPU kernels can repack."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    shape = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        vocab_size=320,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    folder = tmp_path_factory.mktemp("quantizable-llama")
    LlamaForCausalLM(shape).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path, **options: Any) -> backbone.Backbone:
    return backbone.load(config.Model(name=str(folder), **{"dtype": "float32", **options}))


def answering(folder: Path, **options: Any) -> Any:
    return scorer.answer_only(load(folder, **options).model, ANSWERS)


def attached(folder: Path, adapter: config.Adapter | None = None, **options: Any) -> Any:
    chosen = adapter or config.Adapter(r=4, lora_alpha=8)
    return adapters.attach(answering(folder, **options), chosen, base_name="someone/tiny", seed=1)


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=ids).logits.float().clone()


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """16 random prompts (16, 10); the label is in the last token."""
    generator = torch.Generator().manual_seed(3)
    label = torch.arange(16) % 2
    ids = torch.randint(10, 300, (16, 10), generator=generator)
    return torch.cat((ids[:, :-1], 200 + label[:, None]), dim=1), label


def loss_of(model: Any) -> torch.Tensor:
    ids, label = prompts()
    return F.cross_entropy(model(input_ids=ids).logits[:, -1].float(), label)


def fit(model: Any, steps: int = 30) -> tuple[float, float]:
    """Loss before and after; in the middle the model is asked as validation asks it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with torch.inference_mode():
        first = loss_of(model.eval()).item()
    for step in range(steps):
        if step == steps // 2:
            logits(model)
        optimizer.zero_grad()
        loss_of(model.train()).backward()
        optimizer.step()
    with torch.inference_mode():
        return first, loss_of(model.eval()).item()


def stored(model: Any) -> dict[str, bytes]:
    """Everything that the model holds, scales of quantized weights included; packed values may be no numbers."""
    return {
        name: value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, value in model.state_dict().items()
    }


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model.train()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


class TestLoading:
    @both
    @pytest.mark.parametrize("kind", ["tiny_llama_folder", "tiny_qwen2_folder", "tiny_gpt2_folder"])
    def test_it_is_known_as_the_model_that_it_was(
        self, request: pytest.FixtureRequest, kind: str, bits: dict[str, Any]
    ) -> None:
        """Tied and untied output matrix; weights that are quantized the other way round (GPT-2)."""
        tiny = request.getfixturevalue(kind)
        whole, small = load(tiny), load(tiny, **bits)
        assert len(quantized.layers(small.model)) > 0
        assert small.base.quantization is not None
        assert dataclasses.replace(small.base, quantization=None) == whole.base
        assert whole.base.quantization is None
        assert not quantized.layers(whole.model)

    def test_types_and_options_change_the_text_and_not_the_fingerprint(self, folder: Path) -> None:
        plain = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
        found = {
            "nf4, double quantized, compute bfloat16": load(folder, dtype="bfloat16", load_in_4bit=True),
            "fp4, compute float32": load(folder, load_in_4bit=True, **plain),
            "int8": load(folder, load_in_8bit=True),
        }
        for text, loaded in found.items():
            assert loaded.base.quantization == text
            assert loaded.base.fingerprint == load(folder).base.fingerprint

    @both
    def test_another_weight_is_another_fingerprint(self, folder: Path, tmp_path: Path, bits: dict[str, Any]) -> None:
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        weights = load_file(tmp_path / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        assert load(tmp_path, **bits).base.fingerprint != load(folder, **bits).base.fingerprint

    @both
    def test_linear_layers_alone_are_quantized(self, folder: Path, bits: dict[str, Any]) -> None:
        model = load(folder, **bits).model
        linear = {f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")}
        assert {name.rpartition(".")[2] for name in quantized.layers(model)} == linear
        assert len(quantized.layers(model)) == 2 * len(linear)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        whole = load(folder).model
        for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
            assert torch.equal(model.get_parameter(name), whole.get_parameter(name))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_packed_values_are_stored_in_the_type_of_the_others(self, folder: Path, dtype: str) -> None:
        """FSDP shards what lies together as one type."""
        loaded = load(folder, dtype=dtype, load_in_4bit=True)
        assert {parameter.dtype for parameter in loaded.model.parameters()} == {backbone.DTYPES[dtype]}
        assert all(layer.compute_dtype == backbone.DTYPES[dtype] for layer in quantized.layers(loaded.model).values())

    @both
    def test_answers_are_rows_of_the_output_matrix(self, folder: Path, bits: dict[str, Any]) -> None:
        full = logits(load(folder, **bits).model)[..., ANSWERS]
        small = answering(folder, **bits)
        assert torch.equal(small.get_output_embeddings().weight, answering(folder).get_output_embeddings().weight)
        torch.testing.assert_close(logits(small), full, atol=1e-4, rtol=1e-4)

    @both
    def test_scores_are_those_of_the_rounded_weights(self, folder: Path, bits: dict[str, Any]) -> None:
        """Normal weights lose 9 % to the 16 values of nf4, and less than 1 % to 8 bits."""
        from peft.utils.integrations import dequantize_module_weight

        whole, small = answering(folder), answering(folder, **bits)
        before = logits(whole)
        found = logits(small)  # an 8-bit layer has its scales at hand from then
        for name, layer in quantized.layers(small).items():
            weight, rounded = whole.get_parameter(f"{name}.weight"), dequantize_module_weight(layer).detach()
            loss = (rounded - weight).norm() / weight.norm()
            assert 0.08 < loss < 0.1 if bits == BITS["4-bit"] else 0.004 < loss < 0.01
            weight.data = rounded
        # In 8 bits the activations are rounded too.
        close = 1e-5 if bits == BITS["4-bit"] else 0.05
        torch.testing.assert_close(logits(whole), found, atol=close, rtol=close)
        assert 0.002 < (found - before).norm() / before.norm() < 0.3

    @both
    def test_a_token_knows_nothing_of_those_behind_it(self, folder: Path, tmp_path: Path, bits: dict[str, Any]) -> None:
        """Also where some values are so large that LLM.int8() would compute their columns apart, for all tokens."""
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        weights = load_file(tmp_path / "model.safetensors")
        weights["model.layers.0.input_layernorm.weight"] *= 5
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        model = answering(tmp_path, **bits)
        largest: list[float] = []
        hook = model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: largest.append(_[2].max().item()))
        before = logits(model)
        hook.remove()
        assert largest[0] > 6
        other = torch.cat((IDS[:, :5], torch.randint(10, 300, (1, 20))), dim=1)
        torch.testing.assert_close(logits(model, other)[:, :5], before[:, :5], atol=1e-5, rtol=1e-5)

    @pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux")
    @both
    def test_the_file_does_not_stay_in_memory(self, folder: Path, bits: dict[str, Any]) -> None:
        def mapped() -> int:
            return Path("/proc/self/maps").read_text().count(f"{folder}/model.safetensors")

        whole = load(folder)
        assert mapped() > 0
        del whole
        gc.collect()
        assert mapped() == 0
        small = load(folder, **bits)
        assert quantized.layers(small.model)
        assert mapped() == 0

    @both
    def test_encoders_are_refused_all_the_same(
        self, tiny_bert_folder: Path, tmp_path: Path, bits: dict[str, Any]
    ) -> None:
        from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

        BertForMaskedLM(BertConfig.from_pretrained(tiny_bert_folder)).save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(tiny_bert_folder).save_pretrained(tmp_path)
        with pytest.raises(ModelError, match="expected a causal language model, not an encoder"):
            load(tmp_path, **bits)

    @both
    def test_a_loader_that_fails_leaves_no_watch(self, tmp_path: Path, bits: dict[str, Any]) -> None:
        from transformers.integrations.bitsandbytes import Bnb4bitQuantize, Bnb8bitQuantize

        untouched = Bnb4bitQuantize.convert, Bnb8bitQuantize.convert
        with pytest.raises(ModelError, match="could not be loaded"):
            load(tmp_path / "absent", **bits)
        assert (Bnb4bitQuantize.convert, Bnb8bitQuantize.convert) == untouched


class TestHeads:
    """transformers itself quantizes a head that has a bias, and a pooler that is still to be drawn."""

    @pytest.fixture(params=["llama", "bert", "bert without pooler", "roberta"])
    def classifier(self, request: pytest.FixtureRequest, folder: Path, tiny_bert_folder: Path, tmp_path: Path) -> Path:
        from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

        if request.param in ("llama", "bert"):
            return folder if request.param == "llama" else tiny_bert_folder
        shape = BertConfig.from_pretrained(tiny_bert_folder).to_dict()
        if request.param == "roberta":
            RobertaForMaskedLM(RobertaConfig(**{**shape, "model_type": "roberta"})).save_pretrained(tmp_path)
        else:
            BertForMaskedLM(BertConfig(**shape)).save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
        return tmp_path

    @both
    def test_what_is_trained_is_whole(self, classifier: Path, bits: dict[str, Any]) -> None:
        target = Target(head="classifier")
        whole, small = (
            backbone.load(config.Model(name=str(classifier), dtype="float32", **options), target)
            for options in ({}, bits)
        )
        assert dataclasses.replace(small.base, quantization=None) == whole.base
        new = {name for name, parameter in whole.model.named_parameters() if parameter.requires_grad}
        assert {name for name, parameter in small.model.named_parameters() if parameter.requires_grad} == new
        linear = {
            name
            for name, layer in whole.model.named_modules()
            if isinstance(layer, torch.nn.Linear) and f"{name}.weight" not in new and "pooler" not in name
        }
        assert quantized.layers(small.model).keys() == linear

    def test_encoder_decoder(self, tokenizer: Any, tmp_path: Path) -> None:
        from transformers import T5Config, T5ForConditionalGeneration

        shape = T5Config(d_model=64, d_ff=128, d_kv=16, num_layers=1, num_heads=4, vocab_size=320)
        T5ForConditionalGeneration(shape).save_pretrained(tmp_path)
        settings = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**settings, "decoder_start_token_id": 0}))
        tokenizer.save_pretrained(tmp_path)
        whole, small = load(tmp_path), load(tmp_path, load_in_4bit=True)
        assert dataclasses.replace(small.base, quantization=None) == whole.base
        # Self-attention of either side, attention from one to the other, and two MLPs without their last layers, which
        # T5 keeps in float32.
        assert len(quantized.layers(small.model)) == 3 * 4 + 2


class TestQuantizedCheckpoints:
    @pytest.fixture(params=BITS)
    def checkpoint(self, request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Path:
        """A model that somebody published in 4 or 8 bits."""
        loaded = load(folder, **BITS[request.param])
        loaded.model.save_pretrained(tmp_path)
        loaded.tokenizer.save_pretrained(tmp_path)
        return tmp_path

    def test_it_says_what_it_is(self, checkpoint: Path, folder: Path) -> None:
        loaded = load(checkpoint)
        assert loaded.base.quantization in ("nf4, double quantized, compute float32", "int8")
        assert len(quantized.layers(loaded.model)) == 14
        assert loaded.base.parameters == load(folder).base.parameters
        assert loaded.base.fingerprint == load(checkpoint).base.fingerprint
        with pytest.raises(ModelError, match="merge: 14 layers"):
            quantized.merge(attached(checkpoint))

    def test_it_cannot_be_quantized_again(self, checkpoint: Path) -> None:
        with (
            pytest.warns(UserWarning, match="already has a `quantization_config`"),
            pytest.raises(ModelError, match=r"model.load_in_4bit: .* is a quantized checkpoint already \(.*leave"),
        ):
            load(checkpoint, load_in_4bit=True)

    def test_quantized_output_matrix(self, folder: Path) -> None:
        model = load(folder, load_in_4bit=True).model
        model.lm_head = model.model.layers[0].mlp.up_proj
        with pytest.raises(ModelError, match="has a quantized output matrix"):
            quantized.settle(model, config.Model(name="someone/quantized"), ())


class TestTraining:
    @pytest.mark.parametrize(
        ("bits", "variant"),
        [("4-bit", "plain"), ("4-bit", "dora"), ("8-bit", "plain")],
    )
    def test_loss_falls_and_the_base_stays(self, folder: Path, bits: str, variant: Any) -> None:
        model = attached(folder, config.Adapter(r=4, lora_alpha=8, variant=variant), **BITS[bits])
        logits(model)
        before = stored(model)
        first, last = fit(model)
        assert last < first / 4
        after = stored(model)
        assert after.keys() == before.keys()
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {name for name in before if "lora_" in name}

    @both
    def test_nothing_changes_at_the_start(self, folder: Path, bits: dict[str, Any]) -> None:
        before = logits(answering(folder, **bits))
        assert torch.equal(logits(attached(folder, **bits)), before)

    @both
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_gradients_are_the_same_after_inference(self, folder: Path, bits: dict[str, Any], dtype: str) -> None:
        """On some CPUs 4-bit layers would repack themselves, and pass no gradient on from then."""
        model = attached(folder, dtype=dtype, **bits)
        before = gradients(model)
        logits(model)
        after = gradients(model)
        assert all(gradient.abs().max() > 0 for name, gradient in before.items() if "lora_B" in name)
        for name, gradient in before.items():
            assert torch.equal(after[name], gradient), name

    @both
    def test_checkpointing_gives_the_same_gradients(self, folder: Path, bits: dict[str, Any]) -> None:
        model = attached(folder, **bits)
        plain = gradients(model)
        model.gradient_checkpointing_enable()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, plain[name])

    def test_adapters_are_float32_and_the_rest_is_not(self, folder: Path) -> None:
        """`prepare_model_for_kbit_training` would double the embeddings' memory."""
        model = attached(folder, dtype="bfloat16", load_in_4bit=True)
        types = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
        assert types == {True: torch.float32, False: torch.bfloat16}


class TestOtherBase:
    @pytest.fixture(params=BITS)
    def trained(self, request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> tuple[Any, Path, dict[str, Any]]:
        bits = BITS[request.param]
        model = attached(folder, **bits)
        fit(model)
        adapters.save(model, tmp_path)
        return model, tmp_path, bits

    def test_saved_adapter_loads_equal(self, trained: tuple[Any, Path, dict[str, Any]], folder: Path) -> None:
        model, saved, bits = trained
        assert torch.equal(logits(adapters.load(answering(folder, **bits), saved)), logits(model))

    def test_it_works_on_the_unquantized_base(self, trained: tuple[Any, Path, dict[str, Any]], folder: Path) -> None:
        """Which scores differ by what quantizing does to the base, not by more."""
        model, saved, bits = trained
        whole = adapters.load(answering(folder), saved)
        with torch.inference_mode():
            untrained, here, there = loss_of(answering(folder)), loss_of(model.eval()), loss_of(whole)
        assert here < 0.1 * untrained
        assert there < 0.2 * untrained
        ids, _ = prompts()
        difference = (logits(whole, ids) - logits(model, ids)).abs().mean()
        assert (
            0 < difference < 4 * (logits(answering(folder), ids) - logits(answering(folder, **bits), ids)).abs().mean()
        )

    def test_merging_is_refused_and_nothing_happens(self, trained: tuple[Any, Path, dict[str, Any]]) -> None:
        model, _, _ = trained
        before = logits(model)
        with pytest.raises(
            ModelError, match=r"merge: 14 layers .* are quantized.*; load the adapter on the unquantized"
        ):
            quantized.merge(model)
        assert torch.equal(logits(model), before)

    def test_merging_into_the_unquantized_base(self, trained: tuple[Any, Path, dict[str, Any]], folder: Path) -> None:
        _, saved, _ = trained
        model = adapters.load(answering(folder), saved)
        before, base = logits(model), logits(answering(folder))
        merged = quantized.merge(model)
        assert type(merged).__name__ == "LlamaForCausalLM"
        assert not [name for name in merged.state_dict() if "lora_" in name]
        torch.testing.assert_close(logits(merged), before, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(before, base, atol=1e-1)


def test_weights_of_a_whole_model(folder: Path, tmp_path: Path) -> None:
    adapters.save(attached(folder, config.Adapter(method="full")), tmp_path)
    with pytest.raises(ModelError, match="weights of a whole model, for a base that is quantized; load it unquantized"):
        adapters.load(answering(folder, load_in_4bit=True), tmp_path)


def test_merging_what_is_no_change_of_weights(folder: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(load(folder).model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ModelError, match="merge: PROMPT_TUNING is no change of weights"):
        quantized.merge(model)


def test_merging_what_is_not_finite(folder: Path) -> None:
    model = attached(folder)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(torch.nan)
    with pytest.raises(ModelError, match=r"merge: NaNs detected .*; keep the adapter beside"):
        quantized.merge(model)


def test_nobody_hears_of_it(folder: Path) -> None:
    """Neither of kernels that are missing at import, nor of a cast at every call of every 8-bit layer."""
    code = (
        "import sys, torch\n"
        "from peftrec import adapters, backbone, config, scorer\n"
        "for bits in ({'load_in_4bit': True}, {'load_in_8bit': True}):\n"
        "    model = backbone.load(config.Model(name=sys.argv[1], **bits)).model\n"
        "    model = scorer.answer_only(model, [30, 40])\n"
        "    model = adapters.attach(model, config.Adapter(r=4), base_name='someone/tiny', seed=1)\n"
        "    ids = torch.tensor([[0, 30, 40]])\n"
        "    model.train()(input_ids=ids).logits.sum().backward()\n"
        "    with torch.inference_mode():\n"
        "        model.eval()(input_ids=ids)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class TestRecipe:
    def recipe(self, **model: Any) -> dict[str, Any]:
        return {"data": {"name": "ml-100k", "like_at": 4}, "model": model, "output_dir": "runs/x"}

    def test_one_of_the_two(self) -> None:
        with pytest.raises(ConfigError, match=r"model.load_in_8bit: true, and model.load_in_4bit too") as caught:
            config.parse_recipe(self.recipe(load_in_4bit=True, load_in_8bit=True), "here")
        assert str(caught.value).count("\n") == 0

    @pytest.mark.parametrize("bits", [{}, {"load_in_8bit": True}])
    @pytest.mark.parametrize("option", [{"bnb_4bit_quant_type": "nf4"}, {"bnb_4bit_use_double_quant": True}])
    def test_options_of_4_bits_do_nothing_without_them(self, bits: dict[str, Any], option: dict[str, Any]) -> None:
        (key,) = option
        with pytest.raises(ConfigError, match=f"model.{key}: does nothing under model.load_in_4bit: false; remove it"):
            config.parse_recipe(self.recipe(**bits, **option), "here")
        assert key not in config.recipe_to_dict(config.parse_recipe(self.recipe(**bits), "here"))["model"]

    def test_a_recipe_reads_back(self) -> None:
        read = config.parse_recipe(self.recipe(load_in_4bit=True, bnb_4bit_quant_type="fp4"), "here")
        assert read.model.bnb_4bit_use_double_quant
        assert config.parse_recipe(config.recipe_to_dict(read), "there") == read


def finetune(*arguments: Any) -> list[str]:
    return [sys.executable, str(ROOT / "recipes" / "finetune.py"), *map(str, arguments)]


@pytest.fixture(scope="module")
def recipe(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 people, 30 films, 20 ratings each."""
    home = tmp_path_factory.mktemp("own")
    random = np.random.default_rng(5)
    film = np.concatenate([random.permutation(30)[:20] for _ in range(24)])
    table = {
        "user_id": np.repeat(np.arange(24), 20),
        "item_id": film,
        "label": (film % 5 + random.normal(size=len(film)) > 2).astype(int),
        "timestamp": random.permutation(len(film)),
        "title": [f"Film {k}" for k in film],
    }
    pl.DataFrame(table).write_csv(home / "clicks.csv")
    text = f"""
task: click
data: {{interactions: {home}/clicks.csv}}
prompt: {{max_tokens: 128, overlap: 32}}
model: {{name: {folder}, dtype: float32}}
adapter: {{method: lora, r: 4, lora_alpha: 8}}
train: {{learning_rate: 1.0e-2, gradient_accumulation_steps: 1}}
eval: {{bootstrap: 0, recommend_k: 3}}
output_dir: {home}/run
"""
    (home / "recipe.yaml").write_text(text)
    return home / "recipe.yaml"


@pytest.mark.parametrize("bits", ["model.load_in_4bit", "model.load_in_8bit"])
def test_recipe_killed_and_resumed(recipe: Path, folder: Path, tmp_path: Path, bits: str) -> None:
    """A run that was killed ends in the adapter of one that was not, and the adapter serves with and without bits."""
    options = ["--config", recipe, f"--{bits}", "true", "--train.max_steps", 30, "--train.evals", 15]
    subprocess.run(
        finetune(*options, "--output_dir", tmp_path / "whole"), check=True, capture_output=True, timeout=600, cwd=ROOT
    )
    options += ["--output_dir", tmp_path / "killed"]
    process = subprocess.Popen(finetune(*options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    end = time.monotonic() + 300
    while not list((tmp_path / "killed").glob("checkpoints/checkpoint-*/trainer_state.json")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/run.json").exists()
    done = subprocess.run(finetune(*options, "--resume"), capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "MatMul8bitLt" not in done.stderr
    assert "kernels" not in done.stderr

    whole, killed = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("whole", "killed"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, killed[name]), name
    facts = record.read_record(tmp_path / "killed")
    assert facts.model["quantization"] in ("nf4, double quantized, compute float32", "int8")
    assert facts.model["parameters"] == load(folder).base.parameters
    assert facts.model["fingerprint"] == load(folder).base.fingerprint
    about = json.loads((tmp_path / "killed/adapter/peftrec.json").read_text())
    assert about["base_model"]["fingerprint"] == facts.model["fingerprint"]

    asked = [[("Film 3", 1), ("Film 4", 0)], [f"Film {k}" for k in range(30)]]
    scores = {}
    for quantize in (None, "4bit", "8bit"):
        loaded = Recommender.from_pretrained(tmp_path / "killed/adapter", strict=True, quantize=quantize)
        assert bool(quantized.layers(loaded.model)) is (quantize is not None)
        scores[quantize] = loaded.score(*asked)
    for other in ("4bit", "8bit"):
        assert not np.array_equal(scores[other], scores[None])
        assert np.corrcoef(scores[other], scores[None])[0, 1] > 0.8
    with pytest.raises(ModelError, match="quantize: '2bit'; expected 4bit, 8bit or None"):
        Recommender.from_pretrained(tmp_path / "killed/adapter", quantize="2bit")  # type: ignore[arg-type]
