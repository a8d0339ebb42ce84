"""The recipe's section `adapter` as PEFT's configs: defaults by architecture, and any other method as data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peftrec import adapters, coherence, config, methods, scorer
from peftrec.compatibility import OWN_METHODS, REFUSED_TYPES
from peftrec.errors import ConfigError, ModelError

SMALL: dict[str, Any] = {"vocab_size": 320, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}
LLAMA_LIKE: dict[str, Any] = {
    **SMALL,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BERT_LIKE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
T5_LIKE: dict[str, Any] = {
    **SMALL,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 1,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", LLAMA_LIKE),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", LLAMA_LIKE),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**LLAMA_LIKE, "head_dim": 8}),
    "mistral": ("MistralConfig", "MistralForCausalLM", LLAMA_LIKE),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {**SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "bert": ("BertConfig", "BertForSequenceClassification", BERT_LIKE),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5_LIKE),
    "t5-encoder": ("T5Config", "T5EncoderModel", T5_LIKE),
}
# Modules of two layers that PEFT's defaults (or what stands in for them) match.
EXPECTED = {
    "llama": {"ia3": 6, "ln_tuning": 5, "adalora": 4},
    "qwen2": {"ia3": 6, "ln_tuning": 2, "adalora": 4},
    "qwen3": {"ia3": 6, "ln_tuning": 2, "adalora": 4},
    "mistral": {"ia3": 6, "ln_tuning": 5, "adalora": 4},
    "gpt2": {"ia3": 4, "ln_tuning": 5, "adalora": 2},
    "bert": {"ia3": 8, "ln_tuning": 5, "adalora": 4},
    "t5": {"ia3": 2 * 3 + 2 * 5, "ln_tuning": 5 + 7, "adalora": 2 * 6 + 2 * 10},
    "t5-encoder": {"ia3": 2 * 3, "ln_tuning": 5, "adalora": 2 * 6},
}
TASKS = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM", "t5-encoder": "FEATURE_EXTRACTION"}


def build(name: str) -> Any:
    import transformers

    shape, model, values = MODELS[name]
    torch.manual_seed(1)
    return getattr(transformers, model)(getattr(transformers, shape)(**values)).requires_grad_(False)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["ia3", "ln_tuning", "adalora"])
def test_defaults_by_architecture(name: str, method: Any) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapter = config.Adapter(method=method)
    attached = adapters.attach(build(name), adapter, base_name="x", seed=1, steps=10)
    found = [module for module in attached.modules() if isinstance(module, BaseTunerLayer)]
    assert len(found) == EXPECTED[name][method]
    assert attached.peft_config["default"].task_type == TASKS.get(name, "CAUSAL_LM")


@pytest.mark.parametrize("method", ["lora", "bottleneck", "prefix", "prompt", "p_tuning", "ia3", "ln_tuning"])
def test_a_classification_head_is_saved_with_the_adapter(tmp_path: Path, method: Any) -> None:
    from safetensors.torch import load_file

    model = build("bert")
    model.classifier.requires_grad_(True)
    model.bert.pooler.requires_grad_(True)
    adapter = config.Adapter(method=method, encoder_hidden_size=8 if method == "p_tuning" else None)
    attached = adapters.attach(model, adapter, base_name="x", seed=1)
    with torch.no_grad():
        for parameter in attached.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    adapters.save(attached, tmp_path)
    heads = [name for name in load_file(tmp_path / adapters.WEIGHTS) if "classifier" in name or "pooler" in name]
    assert len(heads) == 4
    again = build("bert")
    again.classifier.requires_grad_(True)
    again.bert.pooler.requires_grad_(True)
    loaded = adapters.load(again, tmp_path)
    ids = torch.tensor([[5, 30, 40]])
    with torch.inference_mode():
        found, expected = (m.eval()(input_ids=ids, attention_mask=ids > 0).logits for m in (loaded, attached))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_an_architecture_that_peft_does_not_know() -> None:
    import transformers

    shape = transformers.OlmoConfig(**LLAMA_LIKE)
    model = transformers.OlmoForCausalLM(shape).requires_grad_(False)
    for method, named in (("ia3", "down_proj"), ("adalora", "down_proj")):
        with pytest.raises(ModelError, match=rf"no defaults of {method} for the architecture 'olmo'; .*{named}"):
            adapters.attach(model, config.Adapter(method=method), base_name="x", seed=1, steps=10)  # type: ignore[arg-type]


# --- any other method -------------------------------------------------------------------------------------------------

# What the tiny model's small layers need.
FIELDS: dict[str, dict[str, Any]] = {
    "ADAPTION_PROMPT": {"adapter_len": "4", "adapter_layers": "2"},
    "C3A": {"block_size": "8"},
    "FOURIERFT": {"n_frequency": "50"},
    "MISS": {"r": "8"},
    "PSOFT": {"r": "8"},
    "ROAD": {"group_size": "8"},
    "SHIRA": {"r": "4"},
    "TRAINABLE_TOKENS": {"token_indices": ["30", "40"]},
    "VBLORA": {"vector_length": "8", "num_vectors": "20"},
    "WAVEFT": {"n_frequency": "50"},
}
IDS = torch.tensor([[0, 30, 40, 50, 60, 70, 80]])
LOWEST = torch.finfo(torch.float32).min


def every_type() -> list[str]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    names = {str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    return sorted(names - REFUSED_TYPES.keys() - OWN_METHODS.keys())


def causal(length: int) -> torch.Tensor:
    return torch.full((length, length), LOWEST).triu(1)[None, None]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("peft_type", every_type())
def test_any_other_method_trains_and_comes_back(
    load_tiny: Callable[..., Any], tiny_llama_folder: Path, tmp_path: Path, peft_type: str
) -> None:
    adapter = config.Adapter(method="other", peft_type=peft_type, fields=FIELDS.get(peft_type, {}))
    attached = adapters.attach(load_tiny(tiny_llama_folder), adapter, base_name="x", seed=1)
    attached.eval()  # some methods draw while they train
    base = {name: p.detach().clone() for name, p in load_tiny(tiny_llama_folder).named_parameters()}
    optimizer = torch.optim.AdamW([p for p in attached.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        found = attached(input_ids=IDS, attention_mask=causal(7)).logits[0]
        loss = torch.nn.functional.cross_entropy(found, torch.arange(7) % 2)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    apart = causal(7)
    apart[..., 4:, :4] = LOWEST
    with torch.inference_mode():
        whole = attached(input_ids=IDS, attention_mask=causal(7)).logits
        places = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
        packed = attached(input_ids=IDS, attention_mask=apart, position_ids=places).logits
        alone = [attached(input_ids=part, attention_mask=causal(part.shape[1])).logits for part in IDS.split(4, dim=1)]
        torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=1e-4, rtol=1e-4)
        adapters.save(attached, tmp_path)
        loaded = adapters.load(load_tiny(tiny_llama_folder), tmp_path)
        assert torch.equal(loaded(input_ids=IDS, attention_mask=causal(7)).logits, whole)
    now = {id(p): p for p in attached.parameters()}.values()
    for tensor in base.values():
        assert any(p.shape == tensor.shape and torch.equal(p, tensor) for p in now)


@pytest.mark.parametrize(
    ("peft_type", "fields", "message"),
    [
        ("VERRA", {}, "adapter.peft_type: 'VERRA'; PEFT has no such method; did you mean VERA?"),
        ("zzz", {}, "adapter.peft_type: 'zzz'; PEFT has no such method; expected one of ADALORA, "),
        ("VERA", {"rank": "4"}, "adapter.fields.rank: VERA has no such setting; "),
        ("VERA", {"d_inital": "1"}, "adapter.fields.d_inital: VERA has no such setting; did you mean d_initial?"),
        ("VERA", {"r": "many"}, "adapter.fields.r: 'many'; expected a whole number"),
        ("VERA", {"r": "1.5"}, "adapter.fields.r: '1.5'; expected a whole number"),
        ("VERA", {"r": True}, "adapter.fields.r: true; expected a whole number"),
        ("VERA", {"save_projection": "yes"}, "adapter.fields.save_projection: 'yes'; expected true or false"),
        ("LORA", {"layers_pattern": "x"}, "adapter.fields: When `layers_pattern` is specified, `layers_to_transform`"),
        (
            "LORA",
            {"init_lora_weights": "gausian"},
            "adapter.fields.init_lora_weights: 'gausian'; expected true or false",
        ),
        (
            "LORA",
            {"eva_config": {"rho": "2"}},
            "adapter.fields.eva_config: {'rho': '2'}; expected nothing that a recipe",
        ),
        ("LORA", {"task_type": "SEQ_CLS"}, "adapter.fields.task_type: a setting that no recipe makes; "),
        ("LORA", {"megatron_core": "os"}, "adapter.fields.megatron_core: a setting that no recipe makes; "),
        ("LORA", {"inference_mode": True}, "adapter.fields.inference_mode: a setting that no recipe makes; "),
        ("PROMPT_TUNING", {"tokenizer_name_or_path": "x"}, "adapter.fields.tokenizer_name_or_path: a setting that no"),
        ("PREFIX_TUNING", {"num_layers": "3"}, "adapter.fields.num_layers: a setting that no recipe makes; "),
    ],
)
def test_what_peft_does_not_have(peft_type: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        methods.check(config.Adapter(method="other", peft_type=peft_type, fields=fields))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_settings_get_the_types_that_peft_declares(tiny_model: Any) -> None:
    fields = {
        "r": "8",
        "lora_dropout": "1e-1",
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj"],
        "layers_to_transform": ["0", "1"],
        "rank_pattern": {"q_proj": "4"},
        "init_lora_weights": "gaussian",
        "layers_pattern": None,
        "bias": "none",
    }
    adapter = config.Adapter(method="other", peft_type="lora", fields=fields)
    found = methods.peft_config(adapter, tiny_model)
    assert (found.r, found.lora_dropout, found.use_rslora) == (8, 0.1, True)
    assert (found.target_modules, found.layers_to_transform) == ({"q_proj", "v_proj"}, [0, 1])
    assert (found.rank_pattern, found.init_lora_weights, found.layers_pattern) == ({"q_proj": 4}, "gaussian", None)
    assert isinstance(found.r, int)
    assert found.task_type == "CAUSAL_LM"


def test_one_target_module_may_be_text(tiny_model: Any) -> None:
    adapter = config.Adapter(method="other", peft_type="VERA", fields={"target_modules": "q_proj", "r": "4"})
    assert methods.peft_config(adapter, tiny_model).target_modules == "q_proj"


def test_other_that_does_not_fit_the_model(load_tiny: Callable[..., Any], tiny_llama_folder: Path) -> None:
    adapter = config.Adapter(method="other", peft_type="MISS", fields={"r": "64"})
    with pytest.raises(ModelError, match=r"adapter.fields: PEFT cannot put MISS into LlamaForCausalLM \(.*\); change"):
        adapters.attach(load_tiny(tiny_llama_folder), adapter, base_name="x", seed=1)


def test_bare_base_model_has_no_answer_head_to_train(tiny_model: Any) -> None:
    assert methods._heads(tiny_model) == []
    assert isinstance(tiny_model.get_output_embeddings(), scorer.AnswerHead)


PAGE = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")


def test_the_page_names_each_methods_keys() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| `")]
    found = {row[0].strip("`"): tuple(row[1].replace("`", "").split()) for row in rows[1:]}
    assert found == {name: keys for name, keys in coherence.METHOD_KEYS.items() if name in found}
    assert found.keys() == coherence.METHOD_KEYS.keys()


def test_the_page_names_every_refused_type() -> None:
    assert all(name in PAGE for name in REFUSED_TYPES)
