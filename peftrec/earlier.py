"""An earlier adapter as what training starts from: found, refused where it does not fit, and taken over or built upon.

It comes from a run, from pretraining on text (which has no answers yet), from a merge or from the Hub.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from peftrec import adapters, artifact, lora_start
from peftrec.backbone import BaseModel
from peftrec.config import Adapter, Recipe
from peftrec.errors import ModelError
from peftrec.loading import find as find_folder
from peftrec.loading import is_hub_id
from peftrec.methods import PEFT_TYPES, one_line
from peftrec.prompts import Codec, WholeText
from peftrec.schema import Reader
from peftrec.target import Target

PRETRAINED = "pretrained.json"
MOST_BYTES = 1_000_000

# What two adapters of one method must have in common, and the recipe's key for it; other settings matter in training
# alone, or show in the shapes of the weights.
_ALIKE = {
    "r": "adapter.r",
    "lora_alpha": "adapter.lora_alpha",
    "use_rslora": "adapter.variant",
    "use_dora": "adapter.variant",
    "variant": "adapter.variant",
    "reduction_factor": "adapter.reduction_factor",
    "non_linearity": "adapter.non_linearity",
    "num_virtual_tokens": "adapter.num_virtual_tokens",
}

FREE_BELOW_ANOTHER = ("r", "lora_alpha", "use_rslora")


@dataclass(frozen=True)
class Pretrained:
    """What `recipes/pretrain.py` says of an adapter that has learned texts and no answers: its `pretrained.json`."""

    base_model: artifact.Base
    objective: Literal["causal", "masked"]
    texts: int
    """Different ones that it was trained on."""
    sha256: artifact.Name
    """Of these texts."""
    tokens: int
    """Read in training, repetitions counted."""
    loss_before: float
    """Mean over the tokens of texts held back, of the base model."""
    loss_after: float
    """The same of the trained adapter."""
    peftrec_version: artifact.Name


@dataclass(frozen=True)
class Earlier:
    """An adapter that training starts from, or learns from.

    Attributes:
        name: as the recipe has it.
        folder: where it lies here.
        base: the base model that it was trained on.
        about: its `peftrec.json`; None of one that was pretrained on text.
        key: the recipe's key that names it, for errors.
    """

    name: str
    folder: Path
    base: artifact.Base
    about: artifact.Artifact | None
    key: str = "start.adapter"

    def facts(self) -> dict[str, str]:
        """What a run says of it: its name without folders of this machine, and the hash of its weights."""
        digest = hashlib.sha256((self.folder / adapters.WEIGHTS).read_bytes()).hexdigest()
        run = self.name.removesuffix("/adapter") if self.folder.name == "adapter" else self.name
        return {"name": artifact.public_name(run), "sha256": digest}


def find(recipe: Recipe) -> Earlier | None:
    """The adapter that `start.adapter` names, on this machine or pulled from the Hub; None where it names none.

    Raises:
        HubError: it is not on the Hub, or not safe to read.
        ModelError: there is no such folder, or it holds no adapter to start from.
    """
    if recipe.start.adapter is None:
        return None
    start = read(recipe.start.adapter, recipe.start.revision)
    check_method(start, recipe)
    return start


def check_method(start: Earlier, recipe: Recipe) -> None:
    """Check that an earlier adapter is of the recipe's method and has its settings.

    Raises:
        ModelError: it does not.
    """
    free = FREE_BELOW_ANOTHER if recipe.start.stack else ()
    _check_alike(start, _settings(recipe.adapter), adapters.read_config(start.folder), free)


def is_local(recipe: Recipe) -> bool:
    """Whether `start.adapter` names no adapter on the Hub."""
    return not is_hub_id(recipe.start.adapter or "")


def _settings(adapter: Adapter) -> Any:
    """What of the recipe's adapter must be the earlier one's, under PEFT's names."""
    lora, virtual = adapter.method == "lora", adapter.method in ("prefix", "prompt")
    of_bottleneck = {
        "variant": adapter.variant or "houlsby",
        "reduction_factor": adapter.reduction_factor,
        "non_linearity": adapter.non_linearity,
    }
    return SimpleNamespace(
        peft_type=SimpleNamespace(value=PEFT_TYPES[adapter.method]),
        **({"r": adapter.r, "lora_alpha": adapter.lora_alpha} if lora else {}),
        **({"use_rslora": adapter.variant == "rslora", "use_dora": adapter.variant == "dora"} if lora else {}),
        **(of_bottleneck if adapter.method == "bottleneck" else {}),
        **({"num_virtual_tokens": adapter.num_virtual_tokens} if virtual else {}),
    )


def read(name: str, revision: str | None = None, key: str = "start.adapter") -> Earlier:
    """The adapter of this name; `key` is the recipe's that names it.

    Raises:
        HubError: as `find`.
        ModelError: as `find`.
    """
    folder = find_folder(name, revision)
    if (folder / "adapter" / PRETRAINED).is_file():
        folder /= "adapter"
    if (folder / PRETRAINED).is_file():
        return Earlier(name, folder, read_pretrained(folder).base_model, None, key)
    about = artifact.read(folder)
    if adapters.is_whole(folder):
        raise ModelError(f"{key}: {name} is a whole model (adapter.method: full); expected an adapter")
    if about.side:
        raise ModelError(f"{key}: {name} was trained with side vectors, whose projectors would be lost; name another")
    return Earlier(name, folder, about.base_model, about, key)


def check(start: Earlier, task: str, base: BaseModel, target: Target, codec: Codec | WholeText) -> None:
    """Check that an earlier adapter can go on under this base model and these answers.

    Where the task is another one, so are the answers: then the adapter is taken over and a trained head is not.

    Raises:
        ModelError: it was trained on other weights, or to other answers or another head for the same task.
    """
    if base.fingerprint != start.base.fingerprint:
        raise ModelError(
            f"{start.key}: {start.name} was trained on {start.base.name} with fingerprint "
            f"{start.base.fingerprint[:16]}, and model.name {base.name} has {base.fingerprint[:16]}; expected the same "
            "weights; set model.name to that, or name another adapter"
        )
    about = start.about
    if about is None or about.task != task:
        return
    if about.target.head != target.head:
        raise ModelError(
            f"{start.key}: {start.name} has score.head: {about.target.head}, the recipe {target.head}; set it to "
            f"{about.target.head}, or name another adapter"
        )
    if about.prompt.answers != codec.answer_texts or about.prompt.answer_ids != list(codec.answers):
        raise ModelError(
            f"{start.key}: {start.name} answers {about.prompt.answers} (tokens {about.prompt.answer_ids}), the "
            f"recipe's answers are {codec.answer_texts} ({list(codec.answers)}); set prompt.answers to the same, or "
            "name another adapter"
        )


def take_over(model: Any, start: Earlier, task: str, *, stacked: bool = False) -> None:
    """Let a freshly attached adapter start from the earlier one, in place.

    Args:
        model: from `adapters.attach`.
        start: checked by `check`.
        task: the recipe's; the head of another one is left behind.
        stacked: keep the earlier one as it is and train the fresh one on top of it (LoRA).

    Raises:
        ModelError: method, settings or layers differ, or the file cannot be used.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    ours, theirs = model.peft_config["default"], adapters.read_config(start.folder)
    _check_alike(start, ours, theirs, FREE_BELOW_ANOTHER if stacked else ())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = get_peft_model_state_dict(model, save_embedding_layers=False)
    try:
        state = load_file(start.folder / adapters.WEIGHTS)
    except adapters.BROKEN as error:
        raise ModelError(
            f"{start.key}: {start.folder / adapters.WEIGHTS} cannot be read ({one_line(error)}); fetch the adapter "
            "again"
        ) from error
    if start.about is None:
        state = _of_the_trunk(state, fresh)
    if start.about is None or start.about.task != task:
        state = {key: tensor for key, tensor in state.items() if not _in_head(key, theirs)}
        state |= {key: tensor for key, tensor in fresh.items() if _in_head(key, ours)}
    _check_layers(start, state, fresh, any_rank=stacked)
    if stacked:
        lora_start.on_top_of(model, state, lora_start.scaling(theirs))
        state = {key: tensor for key, tensor in state.items() if _in_head(key, ours)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_peft_model_state_dict(model, state)


def _in_head(key: str, config: Any) -> bool:
    return any(f".{head}." in key for head in getattr(config, "modules_to_save", None) or ())


def _of_the_trunk(state: dict[str, torch.Tensor], fresh: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What was pretrained, without the layers that make words, and with a new pooler, which reads a whole text."""
    parts = {key.split(".")[2] for key in fresh}  # of base_model.model.PART
    return {key: tensor for key, tensor in state.items() if key.split(".")[2] in parts} | {
        key: tensor for key, tensor in fresh.items() if ".pooler." in key
    }


def _check_alike(start: Earlier, ours: Any, theirs: Any, free: tuple[str, ...]) -> None:
    if ours.peft_type.value != theirs.peft_type.value:
        raise ModelError(
            f"{start.key}: {start.name} is {theirs.peft_type.value}, the recipe's method is {ours.peft_type.value}; "
            "set adapter.method to the same, or name another adapter"
        )
    for field, key in _ALIKE.items():
        if field in free:
            continue
        mine, found = getattr(ours, field, None), getattr(theirs, field, None)
        if mine != found:
            raise ModelError(
                f"{start.key}: {start.name} has {field} {found}, the recipe's adapter {mine}; set {key} to the same, "
                "or name another adapter"
            )
    if any(getattr(theirs, pattern, None) for pattern in ("rank_pattern", "alpha_pattern")):
        raise ModelError(
            f"{start.key}: {start.name} has ranks of its own for some layers, which no recipe can say; name another "
            "adapter"
        )


def _check_layers(
    start: Earlier, found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], *, any_rank: bool
) -> None:
    odd = sorted(found.keys() ^ wanted.keys())
    if odd:
        whose = "is in it alone" if odd[0] in found else "is missing in it"
        raise ModelError(
            f"{start.key}: {start.name} trains other layers than the recipe's adapter ({odd[0]} {whose}); set "
            "adapter.target_modules to the same, or name another adapter"
        )
    for key, tensor in wanted.items():
        if not any_rank and found[key].shape != tensor.shape:
            raise ModelError(
                f"{start.key}: {start.name} has {key} of shape {tuple(found[key].shape)}, the recipe's adapter of "
                f"{tuple(tensor.shape)}; name another adapter"
            )


# --- pretrained on text -----------------------------------------------------------------------------------------------


def write_pretrained(folder: Path, about: Pretrained) -> None:
    """Write `pretrained.json` beside the adapter."""
    (folder / PRETRAINED).write_text(json.dumps(dataclasses.asdict(about), indent=2, allow_nan=False) + "\n")


def read_pretrained(folder: Path) -> Pretrained:
    """Read and check `pretrained.json`.

    Raises:
        ModelError: it is not what `write_pretrained` writes.
    """
    path = folder / PRETRAINED
    if path.stat().st_size > MOST_BYTES:
        raise ModelError(f"{path}: {path.stat().st_size:,} bytes; expected at most {MOST_BYTES:,}; make it again")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{path}: not JSON ({error}); expected what recipes/pretrain.py wrote; make it again"
        ) from None
    reader = Reader(Pretrained, str(path))
    about = reader.section(Pretrained, found)
    if reader.problems:
        raise ModelError(f"{reader.problems[0]}; make it again with recipes/pretrain.py")
    return about
