"""AdaLoRA inside Trainer: ranks are taken away on schedule, stay away, and the penalty counts once a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_train import changed, mean_loss, train_data, valid_data

from peftrec import adalora, adapters, config, scorer
from peftrec import train as training
from peftrec.errors import ConfigError
from peftrec.split import Log
from peftrec.target import Target
from peftrec.timeline import collate

ADAPTER = config.Adapter(
    method="adalora", init_r=6, target_r=2, tinit=2, tfinal=3, deltaT=2, target_modules=["q_proj", "v_proj"]
)
STEPS = 12
MODULES = 4


@pytest.mark.parametrize(
    ("steps", "tinit", "tfinal", "expected"),
    [(100, 0.1, 0.3, (10, 30)), (7, 0.1, 0.3, (0, 2)), (100, 5, 20, (5, 20)), (1, 0.9, 0.9, (0, 0))],
)
def test_phases(steps: int, tinit: float, tfinal: float, expected: tuple[int, int]) -> None:
    assert adalora.phases(steps, tinit, tfinal) == expected


@pytest.fixture(scope="module")
def log(make_random_log: Callable[..., Log]) -> Log:
    return make_random_log(11, users=6, events=10)


@pytest.fixture
def attach(load_tiny: Callable[..., Any], tiny_llama_folder: Path) -> Callable[..., Any]:
    def make(adapter: config.Adapter = ADAPTER, steps: int = STEPS, **options: Any) -> Any:
        base = load_tiny(tiny_llama_folder, **options)
        return adapters.attach(base, adapter, base_name="tiny", seed=3, steps=steps)

    return make


@pytest.fixture
def fit(attach: Callable[..., Any], log: Log, codec: Any, questions: Any) -> Callable[..., Any]:
    def run(folder: Path, **options: Any) -> tuple[Any, training.Fitted]:
        model = attach()
        fitted = training.fit(
            model,
            train_data(log, codec, questions),
            valid_data(log, codec, questions),
            Target(),
            mean_loss(log),
            train=changed(max_steps=STEPS, **options),
            folder=folder,
            seed=3,
        )
        return model, fitted

    return run


def kept(model: Any) -> list[int]:
    """Directions that are left, by module."""
    return [int((p != 0).sum()) for name, p in model.named_parameters() if ".lora_E." in name]


class Ranks(training.Progress):
    """Directions left after each step, over all modules."""

    def __init__(self) -> None:
        super().__init__()
        self.left: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.left.append(sum(kept(model)))


def test_ranks_fall_by_the_cubic_schedule(
    monkeypatch: pytest.MonkeyPatch, fit: Callable[..., Any], tmp_path: Path
) -> None:
    ranks = Ranks()
    monkeypatch.setattr(training, "Progress", lambda: ranks)
    model, _ = fit(tmp_path / "checkpoints", evals=0)
    first, last = 6 * MODULES, 2 * MODULES
    expected = []
    for step in range(1, STEPS + 1):
        if step > 2 and step <= STEPS - 3 and (step % 2 == 0 or step == STEPS - 3):
            left = 1 - (step - 2) / (STEPS - 3 - 2)
            expected.append(int((first - last) * left**3 + last))
        else:
            expected.append(expected[-1] if expected else first)
    assert ranks.left == expected
    assert ranks.left[-1] == sum(kept(model)) == last
    adapters.save(model, tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / adapters.WEIGHTS)
    assert sum(len(tensor) for name, tensor in saved.items() if "lora_E" in name) == last


def test_what_is_validated_is_what_is_saved(
    attach: Callable[..., Any],
    load_tiny: Callable[..., Any],
    tiny_llama_folder: Path,
    log: Log,
    codec: Any,
    questions: Any,
    tmp_path: Path,
) -> None:
    """Also between two allocations, where PEFT alone would let the optimizer revive what the file leaves out."""
    model = attach()
    ids = torch.tensor([[0, 30, 40, 50]])
    passes = 0

    def save_and_load(rows: np.ndarray, outputs: np.ndarray) -> dict[str, float]:
        nonlocal passes
        passes += 1
        adapters.save(model, tmp_path / "adapter")
        loaded = adapters.load(load_tiny(tiny_llama_folder), tmp_path / "adapter")
        model.eval()
        with torch.inference_mode():
            found, expected = (one(input_ids=ids).logits for one in (loaded, model))
        model.train()
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        return mean_loss(log)(rows, outputs)

    training.fit(
        model,
        train_data(log, codec, questions),
        valid_data(log, codec, questions),
        Target(),
        save_and_load,
        train=changed(max_steps=STEPS, evals=STEPS),
        folder=tmp_path / "checkpoints",
        seed=3,
    )
    assert passes == STEPS


def test_the_penalty_is_the_one_of_peft(attach: Callable[..., Any]) -> None:
    model = attach(answers=False)
    ids = torch.tensor([[0, 30, 40, 50, 60]])
    with_it = model(input_ids=ids, labels=ids).loss
    found = adalora.penalty(model)
    model.peft_config["default"].orth_reg_weight = 0.0
    torch.testing.assert_close(found, with_it - model(input_ids=ids, labels=ids).loss, atol=1e-5, rtol=1e-5)
    assert found > 0.1
    found.backward()
    assert all(bool(p.grad.any()) for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name)


def test_the_penalty_counts_once_a_step_however_many_batches(
    fit: Callable[..., Any], attach: Callable[..., Any], log: Log, codec: Any, questions: Any, tmp_path: Path
) -> None:
    data = train_data(log, codec, questions)
    found = []
    for batch, accumulated in ((len(data), 1), (1, len(data))):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        _, fitted = fit(tmp_path / str(batch), evals=0, **options)
        found.append(next(entry["loss"] for entry in fitted.log if "loss" in entry))
    model = attach()
    events = collate([data[i] for i in range(len(data))])
    with torch.no_grad():
        plain = scorer.interaction_loss(model, events, torch.float32, Target(), int((events["labels"] >= 0).sum()))
        expected = float(plain + adalora.penalty(model))
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_too_few_steps(attach: Callable[..., Any]) -> None:
    attach(steps=6)
    with pytest.raises(ConfigError, match=r"adapter.tinit: 2 and adapter.tfinal 3 of 5 steps leave none"):
        attach(steps=5)


def test_nothing_to_drive_elsewhere(tiny_model: Any) -> None:
    assert not adalora.is_adaptive(tiny_model)
