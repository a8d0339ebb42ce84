"""Language modelling with an adapter: the loss in parts is the whole one, and texts that were read surprise less."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from saved import tiny_bert
from torch.nn import functional as F

from peftrec import adapters, backbone, config, earlier, encode, pretraining, scorer
from peftrec.errors import ConfigError, ModelError
from peftrec.target import Target

ROOT = Path(__file__).parents[1]
TEXTS = [f"{film} ({year})" for film in ("Heat", "Toy Story", "Sabrina") for year in range(1980, 2000)]


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def recipe_for(base: Path, **changes: Any) -> config.Recipe:
    values = {
        "data": {"name": "ml-100k"},
        "prompt": {"max_tokens": 64, "overlap": 8},
        "model": {"name": str(base), "dtype": "float32"},
        "adapter": {"r": 4, "lora_alpha": 8},
        "train": {"max_steps": 40, "learning_rate": 1e-2, "gradient_accumulation_steps": 1},
        "output_dir": "x",
    }
    return config.parse_recipe({**values, **changes}, "r")


def test_chunks_are_the_whole_loss_and_its_gradient() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(11, 8, requires_grad=True), torch.nn.Linear(8, 30)
    words = torch.randint(0, 30, (11,))
    whole = F.cross_entropy(head(hidden), words, reduction="sum")
    (expected,) = torch.autograd.grad(whole, hidden)
    found = pretraining.chunked_loss(hidden, words, head, chunk=4)
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(torch.autograd.grad(found, hidden)[0], expected)
    assert pretraining.chunked_loss(hidden[:0], words[:0], head).item() == 0


def test_no_more_logits_at_a_time_than_a_chunk() -> None:
    seen = []
    head = torch.nn.Linear(4, 9)
    head.register_forward_hook(lambda _, __, output: seen.append(len(output)))
    pretraining.chunked_loss(
        torch.randn(10, 4, requires_grad=True), torch.zeros(10, dtype=torch.long), head, 4
    ).backward()
    assert seen[:3] == [4, 4, 2]
    assert sorted(seen[3:]) == [2, 4, 4], "made again for the backward pass"


def test_the_loss_is_transformers_own(tiny_llama_folder: Path) -> None:
    language = pretraining.load(recipe_for(tiny_llama_folder))
    assert (language.objective, language.new_head) == ("causal", False)
    ids = torch.randint(2, 320, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[1, 7:] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    total, count = pretraining.text_loss(language.model, dict(batch), "causal")
    expected = language.model(**batch).loss
    assert count == 11 + 6
    torch.testing.assert_close(total / count, expected)


def test_blocks_hold_every_text_once(tokenizer: Any) -> None:
    found = pretraining.blocks(TEXTS, tokenizer, 40)
    assert max(map(len, found)) <= 40
    assert {block[0] for block in found} == {tokenizer.bos_token_id}
    lines = "".join(tokenizer.decode(block[1:]) for block in found).splitlines()
    assert lines == TEXTS
    (cut,) = pretraining.blocks(["a long text " * 20], tokenizer, 16)
    assert len(cut) == 16


@pytest.mark.parametrize("head", ["tokens", "linear"])
def test_a_causal_model_learns_its_texts_and_a_recipe_starts_there(
    head: Any, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(tiny_llama_folder, score={"head": head})
    language = pretraining.load(recipe)
    model, found = pretraining.learn(language, TEXTS, recipe, tmp_path / "trainer")
    assert found.loss_after < found.loss_before - 0.5
    adapters.save(model, tmp_path / "adapter")
    base = backbone.load(recipe.model, Target(head=head, offset=(0.0,) * (2 if head == "tokens" else 1)))
    assert base.base.fingerprint == language.base.fingerprint
    codec = encode.task_codec(base.tokenizer, "click", (0.0, 1.0))
    fresh = adapters.attach(scorer.with_head(base.model, head, codec.answers), recipe.adapter, base_name="x", seed=1)
    earlier.take_over(fresh, earlier.Earlier("a", tmp_path / "adapter", base.base, None), "click")
    query = "model.layers.0.self_attn.q_proj"
    ours, theirs = (one.base_model.model.get_submodule(query).lora_B["default"].weight for one in (fresh, model))
    assert torch.equal(ours, theirs)
    assert ours.abs().max() > 0


def test_an_encoder_fills_in_words_through_a_head_that_is_not_kept(tmp_path: Path) -> None:
    from transformers import BertModel

    base = tiny_bert(tmp_path / "base")
    BertModel.from_pretrained(base).save_pretrained(base)  # the checkpoint of a sentence encoder has no such head
    recipe = recipe_for(
        base, prompt={"layout": "pointwise", "max_tokens": 64}, score={"head": "classifier"}, adapter={"r": 4}
    )
    language = pretraining.load(recipe)
    assert (language.objective, language.new_head) == ("masked", True)
    model, found = pretraining.learn(language, TEXTS, recipe, tmp_path / "trainer")
    assert found.loss_after < found.loss_before - 0.3
    adapters.save(model, tmp_path / "adapter")
    from safetensors.torch import load_file

    assert {key.split(".")[-2] for key in load_file(tmp_path / "adapter" / adapters.WEIGHTS)} == {"lora_A", "lora_B"}
    loaded = backbone.load(recipe.model, Target(head="classifier"))
    assert loaded.base.fingerprint == language.base.fingerprint
    fresh = adapters.attach(loaded.model, recipe.adapter, base_name="x", seed=1)
    earlier.take_over(fresh, earlier.Earlier("a", tmp_path / "adapter", loaded.base, None), "click")
    query = "bert.encoder.layer.0.attention.self.query"
    ours, theirs = (one.base_model.model.get_submodule(query).lora_B["default"].weight for one in (fresh, model))
    assert torch.equal(ours, theirs)
    assert ours.abs().max() > 0


def test_what_cannot_be_pretrained(tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"adapter.method: prefix; pretraining takes lora, bottleneck, ia3, ln_tuning"
    ):
        pretraining.check(recipe_for(tiny_llama_folder, adapter={"method": "prefix"}))
    with pytest.raises(ConfigError, match=r"model: quantized; pretraining loads it whole"):
        pretraining.check(recipe_for(tiny_llama_folder, model={"load_in_4bit": True}))
    monkeypatch.setattr(pretraining, "LOGITS_CHANGED_BY", ("hidden_size",))
    with pytest.raises(ModelError, match=r"makes words by more than one layer on its last states \(hidden_size\)"):
        pretraining.load(recipe_for(tiny_llama_folder))


def test_the_recipe(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pl.DataFrame({"words": [*TEXTS, None, "", TEXTS[0]]}).write_csv(tmp_path / "texts.csv")
    (tmp_path / "r.yaml").write_text(
        f"data: {{name: ml-100k}}\nmodel: {{name: {tiny_llama_folder}, dtype: float32}}\nadapter: {{r: 2}}\n"
        f"prompt: {{max_tokens: 64, overlap: 8}}\ntrain: {{max_steps: 2}}\noutput_dir: {tmp_path / 'read'}\n"
    )
    main = script("pretrain").main
    words = ["pretrain.py", "--config", str(tmp_path / "r.yaml"), "--texts", str(tmp_path / "texts.csv")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(Exception, match=r"--column: no column 'text' in .*texts.csv \(words\)"):
        main()
    monkeypatch.setattr(sys, "argv", [*words, "--column", "words"])
    main()
    start = earlier.read(str(tmp_path / "read"))
    about = earlier.read_pretrained(start.folder)
    assert (about.texts, about.objective, about.sha256) == (len(TEXTS), "causal", pretraining.hash_of(TEXTS))
    assert f"start: {{adapter: {tmp_path / 'read'}}}" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*words, "--column", "words", "--resume"])
    main()
    assert "this run has ended" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*words, "--column", "words", "--train.max_steps", "3", "--resume"])
    with pytest.raises(ConfigError, match="holds something else"):
        main()
