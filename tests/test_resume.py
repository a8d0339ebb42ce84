"""Killed and resumed equals never killed, whatever is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_train import adapter_of, changed, equal, losses, mean_loss, train_data, valid_data

from peftrec import adapters, config
from peftrec import train as training
from peftrec.split import Log
from peftrec.target import Target

METHODS = {
    "dora": config.Adapter(r=4, variant="dora"),
    "pissa": config.Adapter(r=4, variant="pissa"),
    "adalora": config.Adapter(
        method="adalora", init_r=6, target_r=3, tinit=0, tfinal=1, deltaT=2, target_modules=["q_proj", "v_proj"]
    ),
    "bottleneck": config.Adapter(method="bottleneck", reduction_factor=4),
    "prefix_projection": config.Adapter(method="prefix", num_virtual_tokens=3, prefix_projection=True),
    "prompt": config.Adapter(method="prompt", num_virtual_tokens=3),
    "p_tuning": config.Adapter(method="p_tuning", num_virtual_tokens=3, encoder_hidden_size=8),
    "ia3": config.Adapter(method="ia3"),
    "ln_tuning": config.Adapter(method="ln_tuning"),
    "vera": config.Adapter(method="other", peft_type="VERA", fields={"r": "8"}),
    "full": config.Adapter(method="full"),
}
STEPS = 6


@pytest.fixture(scope="module")
def log(make_random_log: Callable[..., Log]) -> Log:
    return make_random_log(11, users=6, events=10)


@pytest.mark.parametrize("method", METHODS)
def test_killed_and_resumed_equals_never_killed(
    load_tiny: Callable[..., Any],
    tiny_llama_folder: Path,
    tmp_path: Path,
    log: Log,
    codec: Any,
    questions: Any,
    method: str,
) -> None:
    def run(folder: Path, to_metrics: Any, resume: bool = False) -> tuple[Any, training.Fitted]:
        base = load_tiny(tiny_llama_folder)
        model = adapters.attach(base, METHODS[method], base_name="tiny", seed=3, steps=STEPS)
        fitted = training.fit(
            model,
            train_data(log, codec, questions),
            valid_data(log, codec, questions),
            Target(),
            to_metrics,
            train=changed(max_steps=STEPS, evals=3),
            folder=folder,
            seed=3,
            resume=resume,
        )
        return model, fitted

    passes = 0

    def falling(rows: np.ndarray, outputs: np.ndarray) -> dict[str, float]:
        nonlocal passes
        passes += 1
        return {**mean_loss(log)(rows, outputs), "loss": -float(passes)}

    whole, expected = run(tmp_path / "whole", falling)

    def dies(rows: np.ndarray, outputs: np.ndarray) -> dict[str, float]:
        found = falling(rows, outputs)
        if passes == 2:
            raise KeyboardInterrupt
        return found

    passes = 0
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", dies)
    passes = 1
    resumed, found = run(tmp_path / "killed", falling, resume=True)
    assert losses(found) == losses(expected)
    assert len(losses(found)) == STEPS
    assert equal(adapter_of(resumed), adapter_of(whole))
    ids = torch.tensor([[0, 30, 40, 50]])
    with torch.inference_mode():
        assert torch.equal(*(model.eval()(input_ids=ids).logits for model in (whole, resumed)))


@pytest.mark.parametrize("method", METHODS)
def test_the_best_weights_are_put_back(
    load_tiny: Callable[..., Any],
    tiny_llama_folder: Path,
    tmp_path: Path,
    log: Log,
    codec: Any,
    questions: Any,
    method: str,
) -> None:
    model = adapters.attach(load_tiny(tiny_llama_folder), METHODS[method], base_name="tiny", seed=3, steps=STEPS)
    scripted = iter([0.5, 0.2, 0.9])
    states = []

    def to_metrics(rows: np.ndarray, outputs: np.ndarray) -> dict[str, float]:
        states.append({name: tensor.clone() for name, tensor in adapter_of(model).items()})
        return {"loss": next(scripted)}

    fitted = training.fit(
        model,
        train_data(log, codec, questions),
        valid_data(log, codec, questions),
        Target(),
        to_metrics,
        train=changed(max_steps=STEPS, evals=3),
        folder=tmp_path,
        seed=3,
    )
    assert fitted.best_step == 4
    assert equal(adapter_of(model), states[1])
    assert not equal(states[1], states[2])
