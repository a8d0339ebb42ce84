"""Adapters: nothing changes when one is attached, the base is never touched, and what is saved comes back equal."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftrec import adapters, config
from peftrec.errors import ModelError

IDS = torch.tensor([[0, 30, 40, 50, 60, 70]])
BASE = "someone/tiny"


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def nudge(model: Any) -> None:
    """Give the adapter other weights than its initial ones, as training does."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def base(load_tiny: Callable[..., Any], tiny_llama_folder: Path) -> Any:
    return load_tiny(tiny_llama_folder)


@pytest.mark.parametrize(
    "adapter",
    [config.Adapter(r=4), config.Adapter(r=4, use_rslora=True), config.Adapter(r=4, use_dora=True)],
    ids=["lora", "rslora", "dora"],
)
def test_nothing_changes_at_the_start(base: Any, adapter: config.Adapter) -> None:
    before = logits(base)
    attached = adapters.attach(base, adapter, base_name=BASE, seed=1)
    torch.testing.assert_close(logits(attached), before, atol=2e-5, rtol=1e-5)
    nudge(attached)
    assert not torch.allclose(logits(attached), before, atol=1e-2)
    with attached.disable_adapter():
        torch.testing.assert_close(logits(attached), before, atol=0, rtol=0)


def test_only_the_adapter_trains(base: Any) -> None:
    attached = adapters.attach(base, config.Adapter(r=4, target_modules=["q_proj", "v_proj"]), base_name=BASE, seed=1)
    trained = {name for name, parameter in attached.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained)
    # Two layers; q is 32 -> 32, v is 32 -> 16: r * (in + out) each.
    assert adapters.trainable_parameters(attached) == 2 * 4 * ((32 + 32) + (32 + 16))


def test_seed_decides_the_initial_weights(load_tiny: Callable[..., Any], tiny_llama_folder: Path) -> None:
    def first(seed: int) -> torch.Tensor:
        attached = adapters.attach(load_tiny(tiny_llama_folder), config.Adapter(r=4), base_name=BASE, seed=seed)
        return next(p.detach().clone() for n, p in attached.named_parameters() if "lora_A" in n)

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


@pytest.mark.parametrize("targets", [["nothing_like_it"], "nothing_like_it"])
def test_targets_that_match_nothing(base: Any, targets: Any) -> None:
    with pytest.raises(ModelError, match=r"adapter.target_modules: .*nothing_like_it.* matches nothing.*q_proj"):
        adapters.attach(base, config.Adapter(target_modules=targets), base_name=BASE, seed=1)


@pytest.fixture
def saved(base: Any, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    attached = adapters.attach(base, config.Adapter(r=4), base_name=BASE, seed=1)
    nudge(attached)
    adapters.save(attached, tmp_path)
    return tmp_path, logits(attached)


def test_saved_adapter_loads_equal(
    saved: tuple[Path, torch.Tensor], load_tiny: Callable[..., Any], tiny_llama_folder: Path
) -> None:
    folder, expected = saved
    assert torch.equal(logits(adapters.load(load_tiny(tiny_llama_folder), folder)), expected)


def test_saved_adapter_holds_no_base_weights_and_no_path(saved: tuple[Path, torch.Tensor]) -> None:
    folder, _ = saved
    weights = load_file(folder / "adapter_model.safetensors")
    assert all("lora_" in name for name in weights)
    assert adapters.file_bytes(folder) == (folder / "adapter_model.safetensors").stat().st_size
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE


def test_fresh_process_gives_equal_scores(
    saved: tuple[Path, torch.Tensor], tiny_llama_folder: Path, codec: Any
) -> None:
    folder, expected = saved
    code = (
        "import json, sys, torch\n"
        "from peftrec import adapters, backbone, config, scorer\n"
        "base, adapter, answers, ids = sys.argv[1:]\n"
        "model = backbone.load(config.Model(name=base, dtype='float32')).model\n"
        "model = adapters.load(scorer.answer_only(model, json.loads(answers)), adapter)\n"
        "with torch.inference_mode():\n"
        "    print(json.dumps(model(input_ids=torch.tensor(json.loads(ids))).logits.tolist()))\n"
    )
    arguments = [str(tiny_llama_folder), str(folder), json.dumps(codec.answers), json.dumps(IDS.tolist())]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout.splitlines()[-1])), expected, atol=1e-6, rtol=1e-6)


class TestRefused:
    def test_no_adapter_there(self, base: Any, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="no adapter_config"):
            adapters.load(base, tmp_path)

    @pytest.mark.parametrize("change", ["missing", "extra", "smaller"])
    def test_weights_that_are_not_whole(
        self, saved: tuple[Path, torch.Tensor], load_tiny: Callable[..., Any], tiny_llama_folder: Path, change: str
    ) -> None:
        folder, _ = saved
        file = folder / "adapter_model.safetensors"
        weights = load_file(file)
        name = sorted(weights)[0]
        if change == "missing":
            del weights[name]
        elif change == "extra":
            weights[name.replace("layers.0", "layers.7")] = weights[name].clone()
        else:
            weights[name] = weights[name][:, :5].contiguous()
        save_file(weights, file)
        with pytest.raises(ModelError, match=str(folder)) as caught:
            adapters.load(load_tiny(tiny_llama_folder), folder)
        assert "\n" not in str(caught.value)

    def test_other_base_model(
        self, saved: tuple[Path, torch.Tensor], load_tiny: Callable[..., Any], tiny_gpt2_folder: Path
    ) -> None:
        with pytest.raises(ModelError, match="does not fit"):
            adapters.load(load_tiny(tiny_gpt2_folder), saved[0])

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"peft_type": "NONE_SUCH"}', '{"peft_type": "LORA", "r": "x"}'])
    def test_config_that_is_none(
        self, saved: tuple[Path, torch.Tensor], load_tiny: Callable[..., Any], tiny_llama_folder: Path, text: str
    ) -> None:
        (saved[0] / "adapter_config.json").write_text(text)
        with pytest.raises(ModelError, match=str(saved[0])) as caught:
            adapters.load(load_tiny(tiny_llama_folder), saved[0])
        assert "\n" not in str(caught.value)

    def test_weights_that_are_no_safetensors(
        self, saved: tuple[Path, torch.Tensor], load_tiny: Callable[..., Any], tiny_llama_folder: Path
    ) -> None:
        (saved[0] / "adapter_model.safetensors").write_bytes(b"not a file of tensors")
        with pytest.raises(ModelError, match="does not fit"):
            adapters.load(load_tiny(tiny_llama_folder), saved[0])
