"""The recipe's `adapter` section -> PEFT's config of the method, with defaults by the architecture of the model."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import nn

from peftrec import adalora, config
from peftrec.coherence import METHOD_KEYS
from peftrec.errors import ConfigError, ModelError
from peftrec.schema import nearest, show

PEFT_TYPES = {
    "lora": "LORA",
    "adalora": "ADALORA",
    "bottleneck": "BOTTLENECK",
    "prefix": "PREFIX_TUNING",
    "prompt": "PROMPT_TUNING",
    "p_tuning": "P_TUNING",
    "ia3": "IA3",
    "ln_tuning": "LN_TUNING",
}
"""Methods of a recipe -> PEFT's names."""

# A recipe says what to train, never which model it is, which mode, or which code and files to load.
OURS = ("task_type", "peft_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping")
OTHERS = re.compile("path|tokenizer|megatron|runtime_config|peft_version")
THE_MODELS = ("token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")


def task_type(model: Any) -> str:
    """PEFT's name for what kind of model this is."""
    if type(model).__name__.endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    if not hasattr(model, "prepare_inputs_for_generation"):
        return "FEATURE_EXTRACTION"
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def peft_config(adapter: config.Adapter, model: Any, *, steps: int | None = None) -> Any:
    """PEFT's config of the recipe's method.

    What trains in `model` already is a head: it is trained on and saved with the adapter.

    Args:
        adapter: the recipe's section; its method must be one of PEFT's.
        model: the base model.
        steps: optimizer steps of the run; AdaLoRA's schedule needs them.

    Raises:
        ConfigError: `peft_type` or `fields` name what PEFT does not have.
        ModelError: PEFT has no defaults for this architecture.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    method = adapter.method
    common: dict[str, Any] = {"task_type": task_type(model), "modules_to_save": _heads(model) or None}
    if method == "other":
        return _other(adapter, common)
    # The recipe's names are PEFT's, whose configs are files that know lists and no tuples.
    section = {key: getattr(adapter, key) for key in METHOD_KEYS[method]}
    given = {key: [*value] if isinstance(value, tuple | list) else value for key, value in section.items()}
    if method == "lora":
        variant = given.pop("variant")
        given |= {"use_rslora": variant == "rslora", "use_dora": variant == "dora"}
        given["target_modules"] = given["target_modules"] or "all-linear"
    elif method == "bottleneck":
        given["variant"] = given["variant"] or "houlsby"
    elif "target_modules" in given:
        given["target_modules"] = given["target_modules"] or _default_targets(method, model)
    if method == "adalora":
        assert steps is not None
        given |= {"total_step": steps, **_schedule(adapter, steps)}
    return PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPES[method]](**common, **given)


def _schedule(adapter: config.Adapter, steps: int) -> dict[str, int]:
    """AdaLoRA's phases in steps."""
    tinit, tfinal = adalora.phases(steps, adapter.tinit, adapter.tfinal)
    if tinit + tfinal >= steps:
        raise ConfigError(
            f"adapter.tinit: {tinit} and adapter.tfinal {tfinal} of {steps} steps leave none to take ranks "
            "away; lower them, or train longer"
        )
    return {"tinit": tinit, "tfinal": tfinal}


def _heads(model: Any) -> list[str]:
    """Names of the largest parts of a model that train already as a whole."""
    found: list[str] = []
    for name, part in model.named_modules():
        parameters = list(part.parameters())
        if (
            parameters
            and all(p.requires_grad for p in parameters)
            and not name.startswith(tuple(f"{n}." for n in found))
        ):
            found.append(name)
    return found


def check(adapter: config.Adapter) -> None:
    """Check what can be checked of the section without a model.

    Raises:
        ConfigError: `peft_type` or `fields` name what PEFT does not have.
    """
    if adapter.method == "other":
        _other(adapter, {})


def _default_targets(method: str, model: Any) -> list[str] | None:
    """Modules that PEFT names for this architecture (None leaves it to PEFT), or the nearest thing that it has.

    Raises:
        ModelError: there is none.
    """
    from peft.utils import constants

    kind = model.config.model_type
    known: Mapping[str, Any] = {
        "ia3": constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
        "ln_tuning": constants.TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING,
        "adalora": constants.TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING,
    }[method]
    lora: dict[str, list[str]] = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    if kind in known:
        return None
    if method == "ln_tuning" and (norms := endings(model, is_norm)):
        return norms
    if method == "adalora" and kind in lora:
        return lora[kind]
    raise ModelError(
        f"adapter.target_modules: PEFT has no defaults of {method} for the architecture {kind!r}; name modules, such "
        f"as {', '.join(endings(model, is_norm if method == 'ln_tuning' else is_linear))}"
    )


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a layer norm of any make."""
    return "norm" in type(module).__name__.lower() and isinstance(getattr(module, "weight", None), nn.Parameter)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, quantized or not."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def endings(model: Any, wanted: Any) -> list[str]:
    """Last parts of the names of all modules that are `wanted`."""
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if wanted(module)})


# --- any other method of PEFT -----------------------------------------------------------------------------------------


def _other(adapter: config.Adapter, common: Mapping[str, Any]) -> Any:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    types = {str(kind.value): made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    name = (adapter.peft_type or "").upper()
    if name not in types:
        close = nearest(name, list(types))
        hint = f"did you mean {close}?" if close else f"expected one of {', '.join(sorted(types))}"
        raise ConfigError(f"adapter.peft_type: {show(adapter.peft_type)}; PEFT has no such method; {hint}")
    made = types[name]
    hints = get_type_hints(made)
    kept = (*OURS, *THE_MODELS)
    allowed = [f.name for f in dataclasses.fields(made) if f.init and f.name not in kept and not OTHERS.search(f.name)]
    values: dict[str, Any] = {}
    for key, value in adapter.fields.items():
        if key not in allowed:
            close = nearest(key, allowed)
            hint = f"did you mean {close}?" if close else f"expected one of {', '.join(allowed)}"
            found = "a setting that no recipe makes" if key in hints else f"{name} has no such setting"
            raise ConfigError(f"adapter.fields.{key}: {found}; {hint}")
        try:
            values[key] = _typed(value, hints[key])
        except ValueError as error:
            raise ConfigError(f"adapter.fields.{key}: {error}") from None
    if "modules_to_save" in allowed and common.get("modules_to_save"):
        values["modules_to_save"] = [*common["modules_to_save"], *(values.get("modules_to_save") or [])]
    if "num_virtual_tokens" in allowed:
        values.setdefault("num_virtual_tokens", config.Adapter.num_virtual_tokens)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return made(**values, task_type=common.get("task_type"))
    except (ValueError, TypeError, ModelError) as error:
        raise ConfigError(f"adapter.fields: {one_line(error)}; expected what PEFT's {made.__name__} takes") from error


def one_line(error: Exception) -> str:
    """What a library says, on one line of bounded length."""
    return " ".join(str(error).split())[:200].rstrip(". ")


def _typed(value: Any, hint: Any) -> Any:
    """Plain data as PEFT's annotation has it; a recipe's numbers are text until somebody says what they are.

    Raises:
        ValueError: what was found and what was expected.
    """
    options = _options(hint)
    if value is None and (NoneType in options or Any in options):
        return None
    for option in options:
        shape, inner = get_origin(option) or option, get_args(option)
        if isinstance(value, list) and shape is list:
            return [_typed(one, inner[0] if inner else Any) for one in value]
        if isinstance(value, dict) and shape is dict:
            return {key: _typed(one, inner[1] if inner else Any) for key, one in value.items()}
    if isinstance(value, bool) and (bool in options or Any in options):
        return value
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return _scalar(value, options)
    raise ValueError(f"{show(value)}; expected {_described(options)}")


def _scalar(value: str | float, options: Sequence[Any]) -> Any:
    number = _number(value)
    if number is not None and (int in options or Any in options) and number == int(number) and "." not in str(value):
        return int(number)
    if number is not None and (float in options or Any in options):
        return number
    choices = [choice for option in options if get_origin(option) is Literal for choice in get_args(option)]
    choices += [
        one.value for option in options if isinstance(option, type) and issubclass(option, Enum) for one in option
    ]
    if isinstance(value, str) and (value in choices or (not choices and (str in options or Any in options))):
        return value
    close = nearest(value, choices) if isinstance(value, str) else None
    raise ValueError(f"{show(value)}; expected {_described(options)}" + (f"; did you mean {close}?" if close else ""))


def _number(value: str | float) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _options(hint: Any) -> list[Any]:
    """The alternatives of an annotation, one level deep."""
    return [*get_args(hint)] if get_origin(hint) in (Union, UnionType) else [hint]


def _described(options: Sequence[Any]) -> str:
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        NoneType: "null",
        Any: "plain data",
    }
    found: list[str] = []
    for option in options:
        shape = get_origin(option) or option
        if shape is Literal:
            found += map(str, get_args(option))
        elif isinstance(shape, type) and issubclass(shape, Enum):
            found += [str(one.value) for one in shape]
        else:
            found.append(
                {list: "a list", dict: "a mapping"}.get(shape) or words.get(shape, "nothing that a recipe can say")
            )
    return " or ".join(dict.fromkeys(found))
