"""Base models in 4 or 8 bits, by bitsandbytes: how they are loaded, and why no adapter is merged into them.

Linear layers are quantized while they are loaded. Embeddings, norms and the output matrix are not, so that the answers
are read from exact rows. Nothing else prepares such a model for training: `peft.prepare_model_for_kbit_training` casts
whatever was not quantized to float32, which doubles the embeddings, while norms reckon in float32 by themselves, answer
rows and adapters are float32 already, and checkpointing (not reentrant) needs no gradient on its input.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from peftrec import config
from peftrec.errors import ModelError

T = TypeVar("T")


@contextmanager
def loading(
    model: config.Model,
    device: str,
    look: Callable[[torch.Tensor], T],
    auto_class: Any,
    source: str,
    told: Mapping[str, Any],
) -> Iterator[tuple[dict[str, Any], dict[str, T]]]:
    """What to tell `from_pretrained` so that it quantizes, and what becomes of the weights: (options, weights).

    Both are empty where the recipe does not quantize. Otherwise the second fills inside the block: parameter's name ->
    what `look` made of the weight before it was quantized. No file holds these names, which transformers makes by the
    architecture, and all weights at once would need the memory that is to be saved; but transformers converts them
    one by one, and so its two conversions are watched.

    Args:
        model: the recipe's section.
        device: where the model goes; its weights are quantized there.
        look: what to do with a weight, which is gone afterwards.
        auto_class: of transformers, which loads the model.
        source: where it finds it.
        told: what it is told besides, `trust_remote_code` at least.
    """
    if not (model.load_in_4bit or model.load_in_8bit):
        yield {}, {}
        return
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize, Bnb8bitQuantize

    seen: dict[str, T] = {}

    def watched(convert: Callable[..., Any]) -> Callable[..., Any]:
        def look_and_convert(self: Any, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            for name, value in input_dict.items():
                seen[name] = look(value[0] if isinstance(value, list) else value)
            return convert(self, input_dict, *args, **kwargs)

        return look_and_convert

    wanted = BitsAndBytesConfig(
        load_in_4bit=model.load_in_4bit,
        load_in_8bit=model.load_in_8bit,
        bnb_4bit_quant_type=model.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model.bnb_4bit_use_double_quant,
        # One type for all: another compute type would be cast to and fro at each layer, and FSDP shards the packed
        # values only where they are stored in the type of their neighbours.
        bnb_4bit_compute_dtype=model.dtype,
        bnb_4bit_quant_storage=model.dtype,
        llm_int8_skip_modules=_kept_whole(auto_class, source, told),
    )
    untouched = {kind: kind.convert for kind in (Bnb4bitQuantize, Bnb8bitQuantize)}
    try:
        for kind, convert in untouched.items():
            kind.convert = watched(convert)
        yield {"quantization_config": wanted, "device_map": {"": device}}, seen
    finally:
        for kind, convert in untouched.items():
            kind.convert = convert


def _kept_whole(auto_class: Any, source: str, told: Mapping[str, Any]) -> list[str]:
    """Modules that are not quantized: what transformers leaves out, which is the output matrix, and any other head.

    transformers means to leave a model's last layer out, but misses it where it has a bias.
    """
    from transformers import AutoConfig
    from transformers.quantizers.base import get_keys_to_not_convert

    with torch.device("meta"):
        empty = auto_class.from_config(
            AutoConfig.from_pretrained(source, **told), trust_remote_code=told["trust_remote_code"]
        )
    trunk = empty.base_model_prefix
    outside = [name for name, _ in empty.named_children() if name != trunk] if hasattr(empty, trunk) else []
    return [*get_keys_to_not_convert(empty), *outside, f"{trunk}.pooler"]


def layers(model: Any) -> dict[str, Any]:
    """The quantized linear layers of a model, with or without adapters, by name."""
    return {name: layer for name, layer in model.named_modules() if _is_quantized(layer)}


def _is_quantized(layer: Any) -> bool:
    # By name, so that nobody imports bitsandbytes to ask; PEFT's layers around these bear the same names.
    kind = type(layer)
    return kind.__name__ in ("Linear4bit", "Linear8bitLt") and kind.__module__.startswith("bitsandbytes.")


def settle(model: Any, wanted: config.Model, seen: Container[str]) -> str | None:
    """Make a loaded model fit for training and scoring, and say how it is quantized; None where it is not.

    Args:
        model: fresh from `from_pretrained`.
        wanted: the recipe's section.
        seen: names of the weights that were quantized just now.

    Raises:
        ModelError: the recipe wants to quantize what the checkpoint holds quantized, or the output matrix is quantized.
    """
    for layer in layers(model).values():
        # On CPUs with bfloat16 instructions a 4-bit layer repacks itself for good when it is first used in inference.
        # Repacked it rounds its scales, passes no gradient on, and cannot have a width that 32 does not divide.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
        # LLM.int8() computes a column apart if any token of the batch is an outlier there, so that each token's result
        # depends on all others: on SmolLM2 later events moved an answer by a whole unit of log-odds.
        if hasattr(layer, "state"):
            layer.state.threshold = 0.0
    if _is_quantized(model.get_output_embeddings()):
        raise ModelError(
            f"model.name: {wanted.name} has a quantized output matrix; answers are read from its rows, which must be "
            "whole; use the unquantized model with model.load_in_4bit"
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return None
    asked = wanted.load_in_4bit or wanted.load_in_8bit
    if quantizer.pre_quantized and asked:
        key = "load_in_4bit" if wanted.load_in_4bit else "load_in_8bit"
        raise ModelError(
            f"model.{key}: {wanted.name} is a quantized checkpoint already ({_described(model)}); leave {key} out, or "
            "use the unquantized model"
        )
    assert not asked or all(f"{name}.weight" in seen for name in layers(model)), "transformers converts elsewhere"
    for parameter in model.parameters():
        # On a CPU these are views of the checkpoint's file, and would keep all of it in memory.
        if type(parameter) is torch.nn.Parameter and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
    return _described(model)


def _described(model: Any) -> str:
    found = model.hf_quantizer.quantization_config
    if getattr(found, "load_in_4bit", False):
        twice = ", double quantized" if found.bnb_4bit_use_double_quant else ""
        return f"{found.bnb_4bit_quant_type}{twice}, compute {str(found.bnb_4bit_compute_dtype).removeprefix('torch.')}"
    return "int8" if getattr(found, "load_in_8bit", False) else str(getattr(found.quant_method, "value", found))


def merge(model: Any) -> Any:
    """Add an adapter to the weights of its base model; the result is an ordinary model without PEFT.

    A quantized base is refused. PEFT would quantize the sum again, and most of a small update falls below the steps
    between two quantized values: the merged model would score unlike the adapter, without a word.

    Args:
        model: a PEFT model; it is changed in place.

    Raises:
        ModelError: the base model is quantized, or this kind of adapter cannot be merged.
    """
    if found := layers(model):
        raise ModelError(
            f"merge: {len(found)} layers of the base model are quantized, e.g. {next(iter(found))}; the sum would be "
            "rounded to quantized values and score unlike the adapter; load the adapter on the unquantized base model "
            "and merge there"
        )
    if not hasattr(model, "merge_and_unload"):
        kind = next(iter(model.peft_config.values())).peft_type.value
        raise ModelError(f"merge: {kind} is no change of weights; keep the adapter beside its base model")
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(
            f"merge: {' '.join(str(error).split())[:200]}; keep the adapter beside its base model"
        ) from error
