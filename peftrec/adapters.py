"""Attach trainable parameters to a frozen base model, save them, and put them back.

The same parameters have three forms: attached to a model; saved for others, in PEFT's own files (under `full` as the
model's weights); and in a checkpoint, where training needs more than what is saved in the end.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from peftrec import adalora, config, fused, lora_start, methods, quantized, virtual_tokens
from peftrec.compatibility import REFUSED_TYPES
from peftrec.errors import ConfigError, ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FULL = "model.safetensors"
CHECKPOINT = "trained.safetensors"
SAMPLED = 1024
HARMLESS_STARTS = (True, False, "gaussian", "orthogonal")
"""Values of `init_lora_weights` that leave the base model as it is."""
ALLOCATOR = "allocator:"  # in front of what AdaLoRA's schedule keeps in a checkpoint

# What a broken file raises depends on what is wrong with it.
BROKEN = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, OSError, SafetensorError)


def attach(
    model: Any,
    adapter: config.Adapter,
    *,
    base_name: str,
    seed: int,
    steps: int | None = None,
    original: Callable[[], Any] | None = None,
    opening: Callable[[int], Sequence[int]] | None = None,
) -> Any:
    """Freeze `model` and add the recipe's adapter to it; under `full` it is the model itself that trains, in float32.

    Args:
        model: a transformers model, changed in place. Of its parts only a head may be trainable; it is then trained and
            saved with the adapter.
        adapter: the recipe's section; its method must train something.
        base_name: what the adapter's config shall name as its base model (a Hub id, never a local path).
        seed: seeds the adapter's initial weights.
        steps: optimizer steps of the run (`adalora`).
        original: loads the base model unquantized (variant `loftq`).
        opening: token ids of a text of at least so many tokens, as which the virtual tokens of a causal model begin
            (`prefix`, `p_tuning`); None, or no tokens, is noise.

    Raises:
        ConfigError: PEFT has no such method or setting, or it is none that can be trained here.
        ModelError: `target_modules` match nothing in this model, or it is too small for the settings.
    """
    assert adapter.method != "none"
    torch.manual_seed(seed)
    if adapter.method == "full":
        return model.float().requires_grad_(True)
    wanted = methods.peft_config(adapter, model, steps=steps)
    before = [(p, _sample(p)) for p in model.parameters()]
    try:
        attached = _wrap(model, wanted)
    except (ValueError, TypeError) as error:
        raise ModelError(_no_place(model, adapter, error)) from error
    if _has_changed(attached, before):
        raise ConfigError(
            f"adapter.fields: {adapter.peft_type} changes the base model's weights; expected an adapter that fits the "
            "base model as it is; choose other settings, or a method of peftrec's own"
        )
    if adapter.variant == "pissa":
        lora_start.from_principal_part(attached)
    if adapter.variant == "loftq":
        assert original is not None
        lora_start.from_quantization_error(attached, original())
    # A projection has no way back from keys and values. What an LSTM says of two tokens is so alike at first that only
    # large weights tell them apart, from which it does not learn.
    reads = (adapter.method == "prefix" and not adapter.prefix_projection) or (
        adapter.method == "p_tuning" and adapter.encoder_reparameterization_type == "MLP"
    )
    reads &= methods.task_type(model) == "CAUSAL_LM"
    if reads and opening is not None and (text := opening(adapter.num_virtual_tokens)):
        virtual_tokens.start_as_text(attached, torch.tensor(text))
    _check_trained(attached)
    attached.peft_config["default"].base_model_name_or_path = base_name
    return attached


def _has_changed(attached: Any, before: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    """Whether a parameter of the base model is not there any more, or not what its sample was."""
    there = {id(p) for p in attached.parameters()}
    return any(id(p) not in there or not torch.equal(_sample(p), values) for p, values in before)


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    """Bytes of a parameter that show whether somebody has changed it; quantized values need be no numbers."""
    flat = parameter.detach().flatten()
    return flat[:: max(1, len(flat) // SAMPLED)].clone().view(torch.uint8)


def _wrap(model: Any, wanted: Any) -> Any:
    """PEFT's model class for this task around `model`, with our forward where virtual tokens are put in front."""
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    made = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(wanted.task_type, PeftModel)
    if wanted.is_prompt_learning:
        made = virtual_tokens.with_virtual_tokens(made)
    packed = set(map(id, quantized.layers(model).values()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attached = made(model, wanted)
    if wanted.is_prompt_learning:
        virtual_tokens.list_embeddings_once(attached)
    for name, parameter in attached.named_parameters():
        if name.endswith(".ranknum.default"):  # AdaLoRA's constant, which PEFT thaws when it casts it to float32
            parameter.requires_grad_(False)
    for name, module in attached.named_modules():
        if name.endswith("ln_tuning_layers.default"):
            _in_float32(module)
        if isinstance(module, BaseTunerLayer) and id(module.get_base_layer()) in packed:
            # Some of PEFT's layers answer in float32, which the next layer cannot take.
            module.register_forward_hook(lambda _, inputs, output: output.to(inputs[0].dtype))
    fused.install(attached)
    return attached


class _Rounded(nn.Module):
    """Mixed into a layer norm whose trained values are float32: it reckons with them in the base model's type."""

    reckons_in: torch.dtype

    @property
    def weight(self) -> torch.Tensor | None:
        return self._rounded("weight")

    @property
    def bias(self) -> torch.Tensor | None:
        return self._rounded("bias")

    def _rounded(self, name: str) -> torch.Tensor | None:
        value = self._parameters.get(name)
        return None if value is None else value.to(self.reckons_in)


def _in_float32(norm: nn.Module) -> None:
    """Let a layer norm of 16 bits train in float32, as PEFT does for all other methods.

    In bfloat16 the values next to 1 are 0.004 away: an optimizer's step would be lost. What the base model, and plain
    PEFT on it, would compute with the same weights stays as it is.
    """
    (reckons_in,) = {parameter.dtype for parameter in norm.parameters()}
    if reckons_in != torch.float32:
        norm.float().__class__ = type(type(norm).__name__, (_Rounded, type(norm)), {"reckons_in": reckons_in})


def _no_place(model: Any, adapter: config.Adapter, error: Exception) -> str:
    said = methods.one_line(error)
    if adapter.method == "other":
        return f"adapter.fields: PEFT cannot put {adapter.peft_type} into {type(model).__name__} ({said}); change them"
    if adapter.method in ("prefix", "prompt", "p_tuning"):
        return f"adapter.method: {adapter.method} does not fit {type(model).__name__} ({said}); choose another one"
    fitting = methods.is_norm if adapter.method == "ln_tuning" else methods.is_linear
    also = "all-linear or " if adapter.method in ("lora", "adalora") else ""
    return (
        f"adapter.target_modules: {adapter.target_modules!r} matches nothing in {type(model).__name__}; use {also}some "
        f"of {', '.join(methods.endings(model, fitting))} ({said})"
    )


def _check_trained(attached: Any) -> None:
    trained = {name: p for name, p in attached.named_parameters() if p.requires_grad}
    if not trained:
        raise ConfigError("adapter: nothing in it is trained; choose another method, or other settings")
    coarse = next((n for n, p in trained.items() if p.dtype != torch.float32 and "modules_to_save" not in n), None)
    if coarse:
        raise ConfigError(
            f"adapter: PEFT trains {coarse} in {str(trained[coarse].dtype).removeprefix('torch.')}, whose values are "
            "too far apart for an optimizer's steps; set model.dtype: float32"
        )


# --- for others -------------------------------------------------------------------------------------------------------


def save(model: Any, folder: str | Path, name: str = "default") -> None:
    """Write the adapter to `folder`, as PEFT does; of a model without adapter, the weights of the whole model.

    A PiSSA adapter is written as the plain LoRA update that it is to the base model.

    The embedding layers are never part of the adapter, and saying so keeps PEFT from asking the Hub about the base
    model's vocabulary: a finished run must not be lost to a network error.

    Args:
        model: with its adapters.
        folder: made if need be.
        name: which of them, as PEFT knows it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not hasattr(model, "peft_config"):
        _write({name: p.detach() for name, p in model.named_parameters()}, folder / FULL)
        return
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    described = copy.deepcopy(model.peft_config[name])
    described.inference_mode = True
    lora_start.plain_lora(model, described, state)
    _write(state, folder / WEIGHTS)
    described.save_pretrained(str(folder))


def _write(state: dict[str, torch.Tensor], path: Path) -> None:
    path.touch()
    mode = path.stat().st_mode
    # The format refuses tensors that share memory or are views.
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, path, {"format": "pt"})
    path.chmod(mode)  # as open as the other files: the library lets nobody else read what it writes


def load(model: Any, folder: str | Path) -> Any:
    """Put what `save` wrote onto its base model, for inference.

    Raises:
        ModelError: the folder holds nothing that can be read, or its weights do not fit this model.
    """
    folder = Path(folder)
    if is_whole(folder):
        return _load_full(model, folder)
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder}: no {CONFIG}; expected a folder that a peftrec run wrote (RUN/adapter)")
    from peft import get_peft_model_state_dict

    expected = read_config(folder)
    before = [(p, _sample(p)) for p in model.parameters()]
    try:
        loaded = _wrap(model, expected)
        found = _names(folder / WEIGHTS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = get_peft_model_state_dict(loaded, save_embedding_layers=False).keys()
            if found == wanted:
                loaded.load_adapter(str(folder), "default", torch_device=str(model.device))
    except BROKEN as error:
        raise ModelError(
            f"{folder}: the adapter does not fit {type(model).__name__} ({methods.one_line(error)}); load it on the "
            "base model that peftrec.json names"
        ) from error
    _check_names(folder / WEIGHTS, found, set(wanted))
    if _has_changed(loaded, before):
        raise ModelError(
            f"{folder / CONFIG}: {expected.peft_type.value} with these settings changes the base model's weights; "
            "expected an adapter that fits the base model as it is; use PEFT itself"
        )
    return loaded.eval()


def is_whole(folder: Path) -> bool:
    """Whether `save` wrote the weights of a whole model there (`full`), which stands on no base model."""
    return (folder / FULL).is_file() and not (folder / CONFIG).is_file()


def read_config(folder: Path) -> Any:
    """PEFT's config of a saved adapter.

    Raises:
        ModelError: there is none, it cannot be read, or it names what a stranger's file must not.
    """
    from peft import PeftConfig

    path = folder / CONFIG
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = PeftConfig.from_pretrained(str(folder))
        kind = str(found.peft_type.value)
    except BROKEN as error:
        raise ModelError(
            f"{path}: cannot be read ({type(error).__name__}: {methods.one_line(error)}); expected what PEFT wrote; "
            "fetch the adapter again"
        ) from error
    # A stranger's file must name neither code nor further files.
    if kind in REFUSED_TYPES or getattr(found, "megatron_config", None):
        what = kind if kind in REFUSED_TYPES else "a megatron_config"
        raise ModelError(f"{path}: {what}; expected a method that peftrec trains; use PEFT itself")
    start = getattr(found, "init_lora_weights", True)
    if start not in HARMLESS_STARTS:
        raise ModelError(
            f"{path}: init_lora_weights is {start!r}, which changes the base model's weights; expected an adapter that "
            "fits the base model as it is; use PEFT itself"
        )
    # With this no method looks for what its training started from, such as a text and its tokenizer.
    found.inference_mode = True
    if found.is_prompt_learning:  # these follow from the model, and those of another one shall not fit
        found.num_layers = found.token_dim = found.num_attention_heads = None
    return found


def _load_full(model: Any, folder: Path) -> Any:
    path = folder / FULL
    if quantized.layers(model):
        raise ModelError(f"{path}: weights of a whole model, for a base that is quantized; load it unquantized")
    model = model.float()
    parameters = dict(model.named_parameters())
    try:
        found = _names(path)
        if found == parameters.keys():
            _copy(load_file(path), parameters)
    except BROKEN as error:
        raise ModelError(
            f"{path}: the weights do not fit {type(model).__name__} ({methods.one_line(error)}); load them on the base "
            "model that peftrec.json names"
        ) from error
    _check_names(path, found, set(parameters))
    return model.eval()


def _names(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def _check_names(path: Path, found: set[str], expected: set[str]) -> None:
    odd = sorted(found ^ expected)
    if odd:
        raise ModelError(f"{path}: {len(odd)} keys missing or unexpected, e.g. {odd[0]}; the file is not whole")


def _copy(state: dict[str, torch.Tensor], into: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in into.items():
            if tensor.shape != state[name].shape:
                raise ValueError(f"{name} is {tuple(state[name].shape)}, the model's is {tuple(tensor.shape)}")
            tensor.copy_(state[name])


# --- in a checkpoint --------------------------------------------------------------------------------------------------


def training_state(model: Any) -> dict[str, torch.Tensor]:
    """Everything that training changes or that it started from at random, by name.

    PEFT's own files do not do for this: they lack the networks through which virtual tokens are trained, and what
    AdaLoRA has pruned or measured.
    """
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    state |= lora_start.fixed_halves(model)
    if adalora.is_adaptive(model):
        state |= {ALLOCATOR + name: tensor for name, tensor in adalora.allocator_state(model).items()}
    return state


def save_checkpoint(model: Any, folder: str | Path) -> None:
    """Write `training_state` to `folder`."""
    _write(training_state(model), Path(folder) / CHECKPOINT)


def load_checkpoint(model: Any, folder: str | Path) -> None:
    """Put back what `save_checkpoint` wrote, onto a model with the same adapter attached.

    Raises:
        ModelError: the file cannot be read, or is that of another adapter.
    """
    path = Path(folder) / CHECKPOINT
    into = {name: tensor for name, tensor in training_state(model).items() if not name.startswith(ALLOCATOR)}
    try:
        state = load_file(path, device=str(model.device))
        allocator = {n.removeprefix(ALLOCATOR): state.pop(n) for n in list(state) if n.startswith(ALLOCATOR)}
        if state.keys() == into.keys():
            _copy(state, into)
    except BROKEN as error:
        raise ModelError(f"{path}: cannot be used ({methods.one_line(error)}); remove this checkpoint") from error
    _check_names(path, set(state), set(into))
    if adalora.is_adaptive(model):
        adalora.restore_allocator(model, allocator)


def put_back(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Let a model be again what `training_state` found, whose tensors `state` holds copies of."""
    _copy(state, training_state(model))


def average_checkpoints(model: Any, folders: Sequence[str | Path]) -> None:
    """Put the mean of several checkpoints of one run onto its model: each weight by itself.

    Raises:
        ModelError: one cannot be read, or is that of another adapter.
    """
    total: dict[str, torch.Tensor] = {}
    for folder in folders:
        load_checkpoint(model, folder)
        for name, tensor in training_state(model).items():
            total[name] = total.get(name, torch.zeros_like(tensor, dtype=torch.float64)) + tensor.double() / len(
                folders
            )
    put_back(model, total)


# --- figures ----------------------------------------------------------------------------------------------------------


def trainable_parameters(model: Any) -> int:
    """Number of parameters that training changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def file_bytes(folder: str | Path) -> int:
    """Size of what `save` wrote, bytes, without its config."""
    found = (Path(folder) / name for name in (WEIGHTS, FULL))
    return next(path.stat().st_size for path in found if path.is_file())
