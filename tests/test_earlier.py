"""An earlier adapter as a start: its scores are the first ones, stacked it stays as it is; strangers are refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from saved import save_adapter, tiny_bert

from peftrec import adapters, artifact, backbone, cli, config, earlier, encode, scorer
from peftrec.errors import ModelError
from peftrec.merge import merge
from peftrec.target import Target

IDS = torch.tensor([[0, 30, 40, 50, 60, 70]])
METHODS = {
    "lora": config.Adapter(r=4, lora_alpha=8),
    "dora": config.Adapter(r=4, variant="dora"),
    "bottleneck": config.Adapter(method="bottleneck", reduction_factor=4),
    "prefix": config.Adapter(method="prefix", num_virtual_tokens=3),
    "prompt": config.Adapter(method="prompt", num_virtual_tokens=3),
    "ia3": config.Adapter(method="ia3"),
    "ln_tuning": config.Adapter(method="ln_tuning"),
}


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def fresh(folder: Path, adapter: config.Adapter, head: Any = "tokens") -> Any:
    loaded = backbone.load(config.Model(name=str(folder), dtype="float32"), Target(head=head))
    answers = encode.task_codec(loaded.tokenizer, "click", (0.0, 1.0)).answers
    model = scorer.with_head(loaded.model, head, answers)
    return adapters.attach(model, adapter, base_name="x", seed=9)


def saved_again(model: Any, base: Path, folder: Path) -> torch.Tensor:
    """Logits of the model that others load from what `model` saves."""
    adapters.save(model, folder)
    loaded = backbone.load(config.Model(name=str(base), dtype="float32"))
    answers = encode.task_codec(loaded.tokenizer, "click", (0.0, 1.0)).answers
    return logits(adapters.load(scorer.answer_only(loaded.model, answers), folder))


@pytest.fixture(scope="module")
def lora(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> earlier.Earlier:
    folder = save_adapter(tiny_llama_folder, tmp_path_factory.mktemp("lora"), METHODS["lora"])
    return earlier.read(str(folder))


@pytest.mark.parametrize("method", METHODS)
def test_the_first_scores_are_the_earlier_ones(method: str, tiny_llama_folder: Path, tmp_path: Path) -> None:
    folder = save_adapter(tiny_llama_folder, tmp_path / "old", METHODS[method])
    model = fresh(tiny_llama_folder, METHODS[method])
    untrained, learning = logits(model), {n for n, p in model.named_parameters() if p.requires_grad}
    earlier.take_over(model, earlier.read(str(folder)), "click")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == learning
    found = logits(model)
    assert not torch.allclose(found, untrained, atol=1e-3)
    torch.testing.assert_close(found, saved_again(model, tiny_llama_folder, tmp_path / "new"))
    old, new = (load_file(tmp_path / name / adapters.WEIGHTS) for name in ("old", "new"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)


@pytest.mark.parametrize("variant", ["plain", "rslora"])
def test_a_stacked_adapter_trains_above_a_frozen_one(
    variant: Any, lora: earlier.Earlier, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    """Another rank and scale on top; saved, both are one plain LoRA."""
    alone = fresh(tiny_llama_folder, METHODS["lora"])
    earlier.take_over(alone, lora, "click")
    model = fresh(tiny_llama_folder, config.Adapter(r=2, lora_alpha=5, variant=variant))
    earlier.take_over(model, lora, "click", stacked=True)
    torch.testing.assert_close(logits(model), logits(alone), atol=1e-4, rtol=1e-4)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"trained"}
    for parameter in trained.values():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    moved = logits(model)
    assert not torch.allclose(moved, logits(alone), atol=1e-3)
    torch.testing.assert_close(saved_again(model, tiny_llama_folder, tmp_path), moved, atol=1e-4, rtol=1e-4)
    assert json.loads((tmp_path / adapters.CONFIG).read_text())["r"] == 6
    fixed = load_file(tmp_path / adapters.WEIGHTS)
    old = load_file(lora.folder / adapters.WEIGHTS)
    for key, tensor in old.items():
        if "lora_A" in key:  # the last rows are the earlier ones, untouched
            assert torch.equal(fixed[key][2:], tensor)


def test_checkpoints_keep_what_a_stacked_adapter_stands_on(
    lora: earlier.Earlier, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    model = fresh(tiny_llama_folder, METHODS["lora"])
    earlier.take_over(model, lora, "click", stacked=True)
    adapters.save_checkpoint(model, tmp_path)
    again = fresh(tiny_llama_folder, METHODS["lora"])
    earlier.take_over(again, lora, "click", stacked=True)
    for name, parameter in again.named_parameters():
        if name.endswith("trained"):
            parameter.data.zero_()
    adapters.load_checkpoint(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (config.Adapter(r=8, lora_alpha=8), "has r 4, the recipe's adapter 8; set adapter.r to the same"),
        (config.Adapter(r=4), "has lora_alpha 8, the recipe's adapter 32; set adapter.lora_alpha to the same"),
        (config.Adapter(r=4, lora_alpha=8, variant="dora"), "has use_dora False, the recipe's adapter True"),
        (config.Adapter(method="ia3"), "is LORA, the recipe's method is IA3; set adapter.method to the same"),
        (
            config.Adapter(r=4, lora_alpha=8, target_modules=["q_proj"]),
            "trains other layers than the recipe's adapter (base_model.model.model.layers.0.mlp",
        ),
    ],
)
def test_other_adapters_are_refused(
    adapter: config.Adapter, message: str, lora: earlier.Earlier, tiny_llama_folder: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        earlier.take_over(fresh(tiny_llama_folder, adapter), lora, "click")
    assert str(caught.value).startswith(f"start.adapter: {lora.name} {message}")
    assert "\n" not in str(caught.value)


def test_other_base_models_answers_and_heads_are_refused(lora: earlier.Earlier, tiny_llama_folder: Path) -> None:
    loaded = backbone.load(config.Model(name=str(tiny_llama_folder), dtype="float32"))
    codec = encode.task_codec(loaded.tokenizer, "click", (0.0, 1.0))
    earlier.check(lora, "click", loaded.base, Target(), codec)
    other = dataclasses.replace(loaded.base, fingerprint="0" * 64)
    with pytest.raises(
        ModelError, match=r"with fingerprint [0-9a-f]{16}, and model.name .* has 0{16}; expected the same"
    ):
        earlier.check(lora, "click", other, Target(), codec)
    swapped = encode.task_codec(loaded.tokenizer, "click", (0.0, 1.0), answers=[" yes", " no"])
    with pytest.raises(ModelError, match=r"the recipe's answers are \[' yes', ' no'\]"):
        earlier.check(lora, "click", loaded.base, Target(), swapped)
    with pytest.raises(ModelError, match=r"has score.head: tokens, the recipe linear; set it to tokens"):
        earlier.check(lora, "click", loaded.base, Target(head="linear", offset=(0.0,)), codec)
    # Ratings have other answers by nature.
    stars = encode.task_codec(loaded.tokenizer, "rating", (1.0, 2.0, 3.0))
    earlier.check(lora, "rating", loaded.base, Target("rating", scale=(1.0, 2.0, 3.0), offset=(0.0,) * 3), stars)


def test_a_trained_head_goes_on_with_its_task_and_stays_behind_with_another(tmp_path: Path) -> None:
    base = tiny_bert(tmp_path / "base")
    adapter = config.Adapter(r=4, lora_alpha=8)
    old = earlier.read(str(save_adapter(base, tmp_path / "old", adapter, head="classifier", prior=None)))
    state = load_file(old.folder / adapters.WEIGHTS)
    (head,) = [key for key in state if key.endswith("classifier.weight")]
    for task, taken in (("click", True), ("rating", False)):
        loaded = backbone.load(config.Model(name=str(base), dtype="float32"), Target(head="classifier"))
        model = adapters.attach(loaded.model, adapter, base_name="x", seed=9)
        before = model.base_model.model.classifier.modules_to_save["default"].weight.clone()
        earlier.take_over(model, old, task)
        found = model.base_model.model.classifier.modules_to_save["default"].weight
        assert torch.equal(found, state[head] if taken else before)
        query = model.base_model.model.bert.encoder.layer[0].attention.self.query.lora_B["default"].weight
        assert torch.equal(query, state[head.replace("classifier", "bert.encoder.layer.0.attention.self.query.lora_B")])


def test_facts_name_no_folder_of_this_machine(lora: earlier.Earlier) -> None:
    found = lora.facts()
    assert "/" not in found["name"]
    assert len(found["sha256"]) == 64


def test_validate_looks_into_a_local_start(
    lora: earlier.Earlier, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"data: {{name: ml-100k}}\nadapter: {{r: 4, lora_alpha: 8}}\nstart: {{adapter: {lora.name}}}\noutput_dir: x\n"
    )
    assert cli.main(["validate", str(recipe)]) == 0
    assert f"start    {lora.name}" in capsys.readouterr().out
    assert cli.main(["validate", str(recipe), "--adapter.r", "8", "--start.stack", "true"]) == 0
    for change, message in {
        ("--adapter.r", "8"): "has r 4, the recipe's adapter 8; set adapter.r to the same",
        ("--adapter.method", "prompt"): "is LORA, the recipe's method is PROMPT_TUNING",
        ("--start.adapter", f"{lora.name}/nowhere"): "no such folder",
    }.items():
        more = ["--adapter.r", "null", "--adapter.lora_alpha", "null"] if change[1] == "prompt" else []
        assert cli.main(["validate", str(recipe), *change, *more]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["validate", str(recipe), "--start.adapter", "me/films"]) == 0, "the Hub is not asked"


def test_a_broken_or_foreign_folder(tmp_path: Path, load_tiny: Callable[..., Any]) -> None:
    (tmp_path / earlier.PRETRAINED).write_text('{"objective": "spoken"}')
    with pytest.raises(ModelError, match=r"missing; it has no default: add it; make it again with recipes/pretrain.py"):
        earlier.read(str(tmp_path))
    (tmp_path / earlier.PRETRAINED).write_text("{")
    with pytest.raises(ModelError, match=r"not JSON .*; make it again"):
        earlier.read(str(tmp_path))
    with pytest.raises(ModelError, match="no such folder"):
        earlier.read(str(tmp_path / "nowhere"))


def test_side_vectors_stay_behind(lora: earlier.Earlier, tmp_path: Path) -> None:
    shutil.copytree(lora.folder, tmp_path / "a")
    assert lora.about is not None
    artifact.write(tmp_path / "a", dataclasses.replace(lora.about, side=["als"]), None)
    with pytest.raises(ModelError, match=r"a was trained with side vectors, whose projectors would be lost"):
        earlier.read(str(tmp_path / "a"))
    with pytest.raises(ModelError, match=r"a: it has side vectors; expected adapters without any"):
        merge([lora.folder, tmp_path / "a"], tmp_path / "out")


def test_every_field_of_a_base_is_kept(tmp_path: Path) -> None:
    base = artifact.Base("tiny", "me/tiny", "f" * 8, 12, "float32")
    about = earlier.Pretrained(base, "causal", 3, "0", 10, 2.0, 1.5, "1.0")
    earlier.write_pretrained(tmp_path, about)
    assert earlier.read_pretrained(tmp_path) == about
