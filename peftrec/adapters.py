"""Attach trainable parameters to a frozen base model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from peftrec import config
from peftrec.errors import ModelError


def attach(model: Any, adapter: config.Adapter, *, base_name: str, seed: int) -> Any:
    """Freeze `model` and add the recipe's adapter to it.

    Args:
        model: a causal language model; it is changed in place.
        adapter: the recipe's section; its method must train something.
        base_name: what the adapter's config shall name as its base model (a Hub id, never a local path).
        seed: seeds the adapter's initial weights.

    Raises:
        ModelError: `target_modules` match nothing in this model.
    """
    from peft import LoraConfig, get_peft_model

    assert adapter.method == "lora", adapter.method
    torch.manual_seed(seed)
    targets = adapter.target_modules
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
    )
    try:
        attached = get_peft_model(model, lora)
    except ValueError as error:
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        raise ModelError(
            f"adapter.target_modules: {targets!r} matches nothing in {type(model).__name__}; "
            f"use all-linear or some of {', '.join(linear)} ({' '.join(str(error).split())[:120]})"
        ) from error
    attached.peft_config["default"].base_model_name_or_path = base_name
    return attached


def save(model: Any, folder: str | Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` to `folder`.

    The embedding layers are never part of the adapter, and saying so keeps PEFT from asking the Hub about the base
    model's vocabulary: a finished run must not be lost to a network error.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, save_embedding_layers=False)


def load(model: Any, folder: str | Path) -> Any:
    """Put a saved adapter onto its base model, for inference.

    Raises:
        ModelError: the folder holds no adapter that can be read, or its weights do not fit this model.
    """
    from peft import PeftConfig, PeftModel
    from safetensors import SafetensorError

    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder}: no adapter_config.json; expected a folder that a peftrec run wrote (RUN/adapter)")
    # What a broken file raises depends on what is wrong with it.
    broken = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, OSError, SafetensorError)
    try:
        expected = PeftConfig.from_pretrained(str(folder))
    except broken as error:
        raise ModelError(
            f"{folder}/adapter_config.json: cannot be read ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:160]}); expected what PEFT wrote; fetch the adapter again"
        ) from error
    try:
        loaded = PeftModel(model, expected)
        missing = loaded.load_adapter(str(folder), "default")
    except broken as error:
        raise ModelError(
            f"{folder}: the adapter does not fit {type(model).__name__} ({' '.join(str(error).split())[:200]}); "
            "load it on the base model that peftrec.json names"
        ) from error
    lost = [key for key in missing.missing_keys if "lora_" in key]
    if lost or missing.unexpected_keys:
        keys = [*lost, *missing.unexpected_keys]
        raise ModelError(f"{folder}: {len(keys)} keys missing or unexpected, e.g. {keys[0]}; the file is not whole")
    return loaded.eval()


def trainable_parameters(model: Any) -> int:
    """Number of parameters that training changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def file_bytes(folder: str | Path) -> int:
    """Size of the saved adapter weights, bytes."""
    return (Path(folder) / "adapter_model.safetensors").stat().st_size
