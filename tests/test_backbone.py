"""Base models load frozen, are told apart by their fingerprint, and the wrong ones are refused in one line."""

from __future__ import annotations

import dataclasses
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from peftrec import backbone, config
from peftrec.errors import ModelError


def model_at(folder: Path, **options: str) -> config.Model:
    return dataclasses.replace(config.Model(name=str(folder), dtype="float32"), **options)


def test_a_folder_loads_frozen_and_says_what_it_is(tiny_llama_folder: Path) -> None:
    loaded = backbone.load(model_at(tiny_llama_folder))
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not loaded.model.training
    assert loaded.base.name == tiny_llama_folder.name
    assert loaded.base.parameters == sum(p.numel() for p in loaded.model.parameters())
    assert loaded.tokenizer.bos_token == "<s>"


def test_no_local_path_is_published(tiny_llama_folder: Path) -> None:
    base = backbone.load(model_at(tiny_llama_folder)).base
    assert str(tiny_llama_folder.parent) not in str(dataclasses.asdict(base))


def test_fingerprint_ignores_the_type_and_sees_one_changed_value(tiny_llama_folder: Path) -> None:
    exact = backbone.load(model_at(tiny_llama_folder))
    halved = backbone.load(model_at(tiny_llama_folder, dtype="bfloat16"))
    assert halved.model.dtype == torch.bfloat16
    assert exact.base.fingerprint == halved.base.fingerprint
    with torch.no_grad():
        exact.model.model.norm.weight[0] += 1
    assert backbone.fingerprint(exact.model) != halved.base.fingerprint


class TestDtypeHere:
    @pytest.fixture(autouse=True)
    def _on_a_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)

    @pytest.mark.parametrize(
        ("able", "expected"),
        [
            ({"avx2": True, "avx512_bf16": False}, "float32"),
            ({"avx512_f": True}, "float32"),
            ({"avx512_bf16": True}, "bfloat16"),
            ({"amx_bf16": True}, "bfloat16"),
            ({"neon": True, "bf16": True}, "bfloat16"),
        ],
    )
    def test_auto_is_what_the_processor_has(
        self, monkeypatch: pytest.MonkeyPatch, able: dict[str, bool], expected: str
    ) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
        assert backbone.dtype_here("auto") == expected
        assert [backbone.dtype_here(name) for name in backbone.DTYPES] == list(backbone.DTYPES)

    def test_deepspeed_computes_in_bfloat16(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        assert backbone.dtype_here("auto") == "bfloat16"

    def test_a_gpu_that_emulates_it_has_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
        assert backbone.dtype_here("auto") == "float32"

    def test_a_device_is_asked_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
        assert [backbone.dtype_here("auto", device) for device in (None, "cuda:0", "cpu")] == [
            "bfloat16",
            "bfloat16",
            "float32",
        ]

    @pytest.mark.parametrize("able", [{"avx512_bf16": True}, {}])
    def test_what_was_loaded_is_recorded(
        self, monkeypatch: pytest.MonkeyPatch, tiny_llama_folder: Path, able: dict[str, bool]
    ) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
        loaded = backbone.load(model_at(tiny_llama_folder, dtype="auto"))
        assert loaded.base.dtype == ("bfloat16" if able else "float32")
        assert loaded.model.dtype == backbone.DTYPES[loaded.base.dtype]


def test_models_differ_in_fingerprint(tiny_llama_folder: Path, tiny_qwen2_folder: Path) -> None:
    assert (
        backbone.load(model_at(tiny_llama_folder)).base.fingerprint
        != backbone.load(model_at(tiny_qwen2_folder)).base.fingerprint
    )


def test_weights_that_are_known_are_not_looked_at_again(
    monkeypatch: pytest.MonkeyPatch, tiny_llama_folder: Path
) -> None:
    known = backbone.load(model_at(tiny_llama_folder)).base.fingerprint
    looks: list[str] = []
    monkeypatch.setattr(backbone, "_check_causal", lambda name, *_: looks.append(name))
    for given in (known, "0" * 64, None):
        assert backbone.load(model_at(tiny_llama_folder), known=given).base.fingerprint == known
    assert len(looks) == 2


def test_an_encoder_has_no_next_token(tiny_bert_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"score.head: tokens; .*tiny-bert.* is an encoder.*; expected a causal"):
        backbone.load(model_at(tiny_bert_folder))


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ("BertModel", r"\d+ of its weights are not in the checkpoint"),
        ("BertForMaskedLM", "a token sees those behind it"),
    ],
)
def test_an_encoder_that_passes_for_a_causal_model(
    tiny_bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: str, message: str
) -> None:
    import transformers

    from peftrec import heads

    getattr(transformers, saved)(transformers.BertConfig.from_pretrained(tiny_bert_folder)).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(tiny_bert_folder).save_pretrained(tmp_path)
    monkeypatch.setattr(heads, "kind_of", lambda shape: "causal")
    with pytest.raises(ModelError, match=f"BertLMHeadModel: {message}.*; expected a causal language model, not an en"):
        backbone.load(model_at(tmp_path))


def test_nothing_under_the_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model.name: .* could not be loaded .*; expected a packaged model") as caught:
        backbone.load(model_at(tmp_path / "absent"))
    assert "\n" not in str(caught.value)


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="could not be loaded"):
        backbone.load(model_at(tmp_path))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b"not a file of tensors"),
        ("config.json", b"[]"),
        ("config.json", b'{"model_type": "llama", "num_attention_heads": "four"}'),
        ("config.json", b'{"model_type": "llama", "vocab_size": 320, "hidden_size": 64}'),
        ("tokenizer.json", b"{}"),
    ],
    ids=["weights", "no mapping", "no number", "other shape", "tokenizer"],
)
def test_broken_files(tiny_llama_folder: Path, tmp_path: Path, file: str, content: bytes) -> None:
    shutil.copytree(tiny_llama_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ModelError, match=r"model.name: .* could not be loaded \(") as caught:
        backbone.load(model_at(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_attention_that_is_not_installed(tiny_llama_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"model.attn_implementation: FlashAttention2 .*; install flash-attn, or use"):
        backbone.load(model_at(tiny_llama_folder, attn_implementation="flash_attention_2"))


def test_a_window_longer_than_the_model(load_tiny: Any, tiny_gpt2_folder: Path, tiny_llama_folder: Path) -> None:
    model = load_tiny(tiny_gpt2_folder)
    backbone.check_window(model, 512)
    with pytest.raises(ModelError, match=r"prompt.max_tokens: 513; this GPT2LMHeadModel takes up to 512 tokens"):
        backbone.check_window(model, 513)
    backbone.check_window(load_tiny(tiny_llama_folder), 2048)


def test_packaged_model_has_no_revisions() -> None:
    with pytest.raises(ModelError, match="leave revision empty"):
        backbone.load(config.Model(name="smollm2-135m-instruct", revision="main"))
