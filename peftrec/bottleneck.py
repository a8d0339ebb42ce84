"""Bottleneck adapters as a PEFT method: two small matrices and a non-linearity beside a frozen block.

    houlsby    after attention and after the MLP, before the residual addition (Houlsby et al. 2019, section 2.1)
    pfeiffer   after the MLP only (Pfeiffer et al. 2021)
    parallel   beside the MLP: reads its input, adds to its output (He et al. 2022, section 3.3)

Importing this module makes the method known to PEFT under the type `BOTTLENECK`; `import peftrec` sees to that as soon
as PEFT is imported. From then on `get_peft_model`, `PeftModel.from_pretrained`, `save_pretrained`, `load_adapter`,
`set_adapter`, `disable_adapter` and `delete_adapter` are PEFT's own. Whole modules are wrapped and no base weight is
touched, so that a quantized base works as any other.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from math import isfinite
from typing import Any, NamedTuple, NoReturn

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from peftrec.errors import ModelError

VARIANTS = ("houlsby", "pfeiffer", "parallel")
NON_LINEARITIES: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


class BottleneckType(str, Enum):
    """The one value of `peft_type` that PEFT's own enumeration lacks; PEFT reads its `.value`."""

    BOTTLENECK = "BOTTLENECK"


class Places(NamedTuple):
    """Where an architecture's adapters go: regular expressions for the last part of a module's name.

    Attributes:
        attention: modules whose output is that of an attention block.
        mlp: modules whose output is that of an MLP.
        beside: modules that take what an MLP takes and return what it returns; None where the architecture has none.
    """

    attention: str
    mlp: str
    beside: str | None

    def of(self, variant: str) -> str | None:
        """The `target_modules` of a variant, which must match a module's whole name."""
        ends = {"houlsby": f"{self.attention}|{self.mlp}", "pfeiffer": self.mlp, "parallel": self.beside}[variant]
        return None if ends is None else rf"(?:.*\.)?(?:{ends})"


_LLAMA = Places(r"self_attn\.o_proj", "mlp", "mlp")
# BERT's MLP is two modules, and the second one adds the residual itself.
_BERT = Places(r"(?:cross)?attention\.output\.dense", r"layer\.\d+\.output\.dense", r"layer\.\d+\.output")
_T5 = Places(r"(?:SelfAttention|EncDecAttention)\.o", "DenseReluDense", "DenseReluDense")
# The MLP is two matrices among a layer's other modules: there is nothing to go beside.
_BART = Places(r"(?:self|encoder)_attn\.out_proj", "fc2", None)
PLACES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo", "olmo2", "granite", "phi3"), _LLAMA),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "stablelm", "starcoder2", "eurobert"), _LLAMA),
    "phi": Places(r"self_attn\.dense", "mlp", "mlp"),
    "gpt2": Places(r"(?:attn|crossattention)\.c_proj", "mlp", "mlp"),
    "gpt_neox": Places(r"attention\.dense", "mlp", "mlp"),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie"), _BERT),
    "distilbert": Places(r"attention\.out_lin", "ffn", "ffn"),
    "modernbert": Places(r"attn\.Wo", "mlp", "mlp"),
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
    **dict.fromkeys(("bart", "mbart", "opt"), _BART),
}


@dataclass
class BottleneckConfig(PeftConfig):  # type: ignore[misc]
    """What a bottleneck adapter looks like: x -> scaling * up(dropout(non_linearity(down(x)))).

    Attributes:
        variant: `houlsby`, `pfeiffer` or `parallel`.
        reduction_factor: the bottleneck is the wrapped module's width divided by this, at least 1.
        non_linearity: `relu`, `gelu`, `silu` or `tanh`.
        dropout: share of the bottleneck's units that are dropped while training.
        scaling: factor of what the adapter adds. He et al. use 4 with `parallel`.
        target_modules: the modules to wrap, as names' ends or one regular expression for whole names. Left out, they
            follow from the architecture and the variant.
        modules_to_save: modules of the base model that are trained and saved whole, such as a classification head.

    Raises:
        ModelError: a value that is none of these.
    """

    variant: str = field(default="houlsby")
    reduction_factor: int = field(default=16)
    non_linearity: str = field(default="relu")
    dropout: float = field(default=0.0)
    scaling: float = field(default=1.0)
    target_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BottleneckType.BOTTLENECK
        expected = {
            "variant": (self.variant in VARIANTS, f"one of {', '.join(VARIANTS)}"),
            "reduction_factor": (
                isinstance(self.reduction_factor, int) and self.reduction_factor >= 1,
                "a whole number from 1",
            ),
            "non_linearity": (self.non_linearity in list(NON_LINEARITIES), f"one of {', '.join(NON_LINEARITIES)}"),
            "dropout": (isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1, "a number in [0, 1)"),
            "scaling": (isinstance(self.scaling, (int, float)) and isfinite(self.scaling), "a finite number"),
        }
        for name, (fits, what) in expected.items():
            if not fits:
                raise ModelError(f"bottleneck adapter: {name} is {getattr(self, name)!r}; expected {what}")


class BottleneckLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A module of the base model and the adapters at its place, by name.

    Several active adapters add up: each reads what the base model computes, so their order is of no account.

    Args:
        base_layer: the module to wrap; its output is one tensor (..., width).
        width: size of the adapters' input and output.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_inner", "bottleneck_config")
    # PEFT ships no types, and a torch module's undeclared attribute might be a tensor.
    active_adapters: list[str]
    _cast_input_dtype: Callable[[torch.Tensor, torch.dtype], torch.Tensor]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(self, base_layer: nn.Module, width: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.width = width
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_inner = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_config: dict[str, BottleneckConfig] = {}
        self._adds_residual = "input_tensor" in inspect.signature(base_layer.forward).parameters

    def add(self, name: str, config: BottleneckConfig) -> None:
        """Add an adapter that changes nothing yet: its last matrix is zero."""
        size = max(1, self.width // config.reduction_factor)
        down, up = nn.Linear(self.width, size), nn.Linear(size, self.width)
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)
        self.bottleneck_down[name], self.bottleneck_up[name] = down, up
        self.bottleneck_inner[name] = nn.Sequential(NON_LINEARITIES[config.non_linearity](), nn.Dropout(config.dropout))
        self.bottleneck_config[name] = config
        self._move_adapter_to_device_of_base_layer(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base module's output, (..., width), with what the active adapters add.

        Raises:
            ModelError: the base module returns something else than one tensor.
        """
        active = [] if self.disable_adapters else [n for n in self.active_adapters if n in self.bottleneck_config]
        beside = [name for name in active if self.bottleneck_config[name].variant == "parallel"]
        behind = [name for name in active if name not in beside]
        # A module that adds the residual and normalizes the sum takes the MLP's input as that residual, and what is to
        # stand beside the MLP must come in before the norm.
        if beside and self._adds_residual:
            x, residual, *rest = args
            args, beside = (x, self._plus(residual, residual, beside), *rest), []
        output = self.base_layer(*args, **kwargs)
        if not active:
            return output
        if not isinstance(output, torch.Tensor):
            raise ModelError(
                f"bottleneck adapter: {type(self.base_layer).__name__} returns a {type(output).__name__}; expected one "
                "tensor; set target_modules to the projection that makes the block's output"
            )
        x = args[0] if args else next(iter(kwargs.values()))
        return self._plus(self._plus(output, output, behind), x, beside)

    def _plus(self, output: torch.Tensor, x: torch.Tensor, names: list[str]) -> torch.Tensor:
        total = output
        for name in names:
            down: Any = self.bottleneck_down[name]
            inner = self.bottleneck_inner[name](down(self._cast_input_dtype(x, down.weight.dtype)))
            total = total + self.bottleneck_config[name].scaling * self.bottleneck_up[name](inner)
        return total.to(output.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refused, as `merge_adapter` and `merge_and_unload` are.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            "bottleneck adapter: asked to merge; a bottleneck is not linear, so no weight of the base model can hold "
            "it; keep base and adapter apart"
        )

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> Any:
        # An MLP has no weight of its own; those of its parts are alike.
        parts = (part for part in base_layer.modules() if getattr(part, "weight", None) is not None)
        return super()._get_base_layer_device_and_dtype(next(parts, base_layer))


class BottleneckModel(BaseTuner):  # type: ignore[misc]
    """Puts bottleneck adapters into a model; `get_peft_model` makes one."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def _prepare_adapter_config(self, peft_config: BottleneckConfig, model_config: dict[str, Any]) -> BottleneckConfig:
        if peft_config.target_modules is not None:
            return peft_config
        kind, variant = model_config.get("model_type"), peft_config.variant
        if kind not in PLACES:
            raise ModelError(
                f"bottleneck adapter: no places are known for the architecture {kind!r}; expected one of "
                f"{', '.join(sorted(PLACES))}; set target_modules to the modules that the adapters go to"
            )
        peft_config.target_modules = PLACES[kind].of(variant)
        if peft_config.target_modules is None:
            raise ModelError(
                f"bottleneck adapter: in {kind} the MLP is not one module; variant {variant} needs one to go beside; "
                "use houlsby or pfeiffer"
            )
        return peft_config

    def _prepare_model(self, peft_config: BottleneckConfig, model: nn.Module) -> None:
        """Refuse what cannot work before anything is changed.

        A place inside another is one: PEFT would pass over it, or save it under a name that no fresh model has.
        """
        modules = {name.replace(".base_layer", ""): module for name, module in model.named_modules() if name}
        places = {name for name in modules if self._check_target_module_exists(peft_config, name)}
        for name in sorted(places):
            self._width(modules[name], name, peft_config.variant)
        taken = places | {name for name, module in model.named_modules() if isinstance(module, BottleneckLayer)}
        for name in sorted(taken):
            ends = [i for i, letter in enumerate(name) if letter == "."]
            outer = next((name[:end] for end in ends if name[:end] in taken), None)
            if outer is not None:
                raise ModelError(
                    f"bottleneck adapter: {name} lies within {outer}, and both would be wrapped; expected places side "
                    "by side; choose other target_modules, or the variant of the adapters that the model already has"
                )

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.add(adapter_name, peft_config)
            return
        layer = BottleneckLayer(target, self._width(target, current_key, peft_config.variant))
        layer.add(adapter_name, peft_config)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Modules are wrapped and come back whole: there are no weights to hand over, as PEFT's own method does.
        setattr(parent, child_name, new_module)

    def _width(self, target: nn.Module, name: str, variant: str) -> int:
        # Linear and its quantized kin; GPT-2's Conv1D.
        takes = getattr(target, "in_features", getattr(target, "nx", None))
        gives = getattr(target, "out_features", getattr(target, "nf", None))
        where = f"bottleneck adapter: {name} is a {type(target).__name__}"
        if variant == "parallel" and takes != gives:
            raise ModelError(
                f"{where} of {takes} values in and {gives} out; expected as many out as in, to go beside it; choose "
                "other target_modules"
            )
        if gives is None:
            config: Any = getattr(self.model, "config", None)
            text = config.get_text_config() if hasattr(config, "get_text_config") else config
            gives = getattr(text, "hidden_size", None)
        if gives is None:
            raise ModelError(
                f"{where}, whose output has no known width; expected a projection, or a model whose config says "
                "hidden_size; choose other target_modules"
            )
        return int(gives)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it alone was active, the first of the others becomes active."""
        others = [name for name in self.peft_config if name != adapter_name]
        if self.active_adapters == [adapter_name] and others:
            # Left to itself, each place would choose among the adapters that it holds, and not all hold the same.
            warnings.warn(f"{adapter_name} was active and is deleted; {others[0]} is active now", stacklevel=3)
            self.set_adapter(others[0])
        super().delete_adapter(adapter_name)


PEFT_TYPE_TO_CONFIG_MAPPING[BottleneckType.BOTTLENECK] = BottleneckConfig
PEFT_TYPE_TO_TUNER_MAPPING[BottleneckType.BOTTLENECK] = BottleneckModel
PEFT_TYPE_TO_PREFIX_MAPPING[BottleneckType.BOTTLENECK] = BottleneckModel.prefix
