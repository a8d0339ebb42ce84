"""From an adapter's name to a model that answers: its folder, its base model, and the two put together.

A base model is loaded once for all adapters that stand on it. Each adapter gets a model of its own, whose base weights
are views of the same memory: nothing has to be switched between two requests, and no method is in another one's way.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from peftrec import adapters, artifact, backbone, config, heads, hub, quantized, scorer, side, values
from peftrec.backbone import Backbone
from peftrec.catalogue import read_items
from peftrec.datasets import DATASETS
from peftrec.errors import ConfigError, DataError, HubError, ModelError
from peftrec.loaded_adapter import LoadedAdapter, target_of
from peftrec.schema import read_yaml
from peftrec.side_vectors import Sources

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find(
    adapter: str | Path,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The folder of an adapter, from the Hub where there is no such folder.

    Args:
        adapter: RUN or RUN/adapter, `namespace/name`, or `file:FOLDER`; see `is_hub_id`.
        revision: branch, tag or commit on the Hub; None is main.
        token: as in huggingface_hub.
        endpoint: as in huggingface_hub.
        cache_dir: as in huggingface_hub.

    Raises:
        ModelError: a revision of a folder.
        HubError: it is not on the Hub, or not safe to read.
    """
    name = str(adapter)
    folder = Path(name).expanduser()
    asked = HUB_ID.fullmatch(name) is not None and not folder.is_dir() and revision is not None
    local = name.startswith(values.FILE_TARGET) or not (asked or is_hub_id(name))
    if local and revision is not None:
        raise ModelError(f"{name}: revision {revision}; a folder has no revisions; leave it out, or name a Hub id")
    if name.startswith(values.FILE_TARGET):
        return hub.pull(name)
    if local:
        if HUB_ID.fullmatch(name) and not folder.is_dir():
            raise ModelError(
                f"{name}: no such folder, though there is {folder.parent}; expected a folder with an adapter that "
                "peftrec saved; give a revision (main) too if it is on the Hub"
            )
        inner = folder / "adapter"
        return inner if not (folder / artifact.FILE).is_file() and (inner / artifact.FILE).is_file() else folder
    try:
        return hub.pull(name, revision, token=token, endpoint=endpoint, cache_dir=cache_dir)
    except HubError as error:
        raise HubError(*error.problems[:-1], f"{error.problems[-1]} (nor is there a folder {name})") from error


def is_hub_id(name: str) -> bool:
    """Whether a name is to be looked for on the Hub: it has the form of an id, and is no folder here.

    Where there is a folder `runs`, `runs/typo` is a mistyped path, and asking the Hub for it would take long to say so.
    """
    folder = Path(name).expanduser()
    return HUB_ID.fullmatch(name) is not None and not folder.is_dir() and not folder.parent.is_dir()


def read_table(items: Any, columns: dict[str, str] | None, about: artifact.Artifact) -> Any:
    """The items table that the caller gives, else that of the named data set, else None.

    Raises:
        AssetError: the named data set cannot be fetched.
        DataError: the table cannot be used.
    """
    if items is not None:
        return read_items(items, columns)
    if columns:
        raise DataError(
            f"columns: {columns}; they name columns of an items table; give one (items=…), or leave them out"
        )
    named = DATASETS.get(about.data.name)
    return read_items(named.load().items) if named is not None and named.fetched else None


# --- the base model ---------------------------------------------------------------------------------------------------


def load_base(
    about: artifact.Artifact,
    folder: Path,
    *,
    base_model: str | Path | None = None,
    dtype: str | None = None,
    device: str | None = None,
    quantize: str | None = None,
    trust_remote_code: bool = False,
    token: str | bool | None = None,
) -> Backbone:
    """The base model of an adapter, at the revision that it was trained on.

    Args:
        about: the adapter's `peftrec.json`.
        folder: where that is.
        base_model: see `Recommender.from_pretrained`, as all others.
        dtype: of the base weights; None is that of the training, or float32 where this processor has no bfloat16.
        device: where they go.
        quantize: 4bit or 8bit.
        trust_remote_code: whether the base model's own code may run.
        token: as in huggingface_hub.

    Raises:
        AssetError: a packaged base model cannot be fetched.
        ModelError: it cannot be loaded, or is of another kind.
    """
    if dtype is not None and dtype not in backbone.DTYPES:
        raise ModelError(f"dtype: {dtype!r}; expected one of {', '.join(backbone.DTYPES)}")
    if quantize not in (None, "4bit", "8bit"):
        raise ModelError(f"quantize: {quantize!r}; expected 4bit, 8bit or None")
    named = about.base_model
    chosen = base_model or _base_of_run(folder)
    wanted = config.Model(
        name=named.name if chosen is None else str(chosen),
        revision=named.revision if chosen is None else None,
        dtype=dtype or backbone.dtype_here("auto" if named.dtype == "bfloat16" else named.dtype, device),  # type: ignore[arg-type]
        trust_remote_code=trust_remote_code,
        load_in_4bit=quantize == "4bit",
        load_in_8bit=quantize == "8bit",
    )
    try:
        loaded = backbone.load(wanted, target_of(about), token=token, known=named.fingerprint)
    except ModelError as error:
        if chosen is not None:
            raise
        raise ModelError(f"{error}; or say where it is: base_model=FOLDER (--base-model FOLDER)") from error
    _check_kind(about, loaded, wanted.name)
    if device is not None:
        try:
            loaded.model.to(device)
        except torch.OutOfMemoryError as error:
            raise ModelError(f"device: {device!r} has too little memory for {wanted.name}; load it in 4bit") from error
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(
                f"device: {device!r} ({reason}); expected a device that torch has here, such as cpu"
            ) from error
    return loaded


def _base_of_run(folder: Path) -> str | None:
    """The local base model of the run that the adapter still lies in: `peftrec.json` itself names no path."""
    recipe = folder.parent / "config.yaml"
    if not recipe.is_file():
        return None
    try:
        name = config.parse_recipe(read_yaml(recipe), str(recipe)).model.name
    except ConfigError:  # the file of some other program, or of another version
        return None
    return name if Path(name).is_dir() else None


def _check_kind(about: artifact.Artifact, base: Backbone, name: str) -> None:
    if base.kind != about.prompt.kind:
        raise ModelError(
            f"base model: {name} is of the kind {base.kind}; the adapter was trained on one of the kind "
            f"{about.prompt.kind}; use that"
        )


def difference_of_bases(about: artifact.Artifact, base: Backbone) -> str | None:
    """How the base model's weights differ from those that the adapter was trained on, in words; None if they do not."""
    found, expected = base.base, about.base_model
    if found.fingerprint == expected.fingerprint:
        return None
    return (
        f"base model: {found.name} has weights with fingerprint {found.fingerprint[:16]}; the adapter was trained on "
        f"{expected.name} with {expected.fingerprint[:16]}" + (f" ({expected.note})" if expected.note else "")
    )


def difference_of_scores(adapter: LoadedAdapter) -> str:
    """How far what is answered to the adapter's probes is from what it recorded, in words."""
    recorded = adapter.artifact.recorded
    if not recorded:
        return "it records no scores to compare with: they may differ from the published ones by any amount"
    distance = np.abs(adapter.probe_scores() - recorded)
    unit = "of log-odds" if adapter.artifact.task == "click" else "rating points"
    return (
        f"its {len(recorded)} recorded scores (float32) differ from those here "
        f"({str(adapter.model.dtype).removeprefix('torch.')}) by up to {distance.max():.2g} {unit}, "
        f"{distance.mean():.2g} in the mean"
    )


# --- an adapter on it -------------------------------------------------------------------------------------------------


def put_on(base: Backbone, folder: Path, about: artifact.Artifact, sources: Sources | None = None) -> Any:
    """The model that `about` describes; the base model itself stays as it is, unless the adapter is a whole model.

    Args:
        base: from `load_base`, for this adapter or for another one.
        folder: the adapter's.
        about: its `peftrec.json`.
        sources: its side vectors.

    Raises:
        ModelError: the adapter does not fit the base model.
    """
    _check_kind(about, base, base.base.name)
    target = target_of(about)
    if (target.head != "tokens") is not heads.is_trained(base.model, base.kind):
        raise ModelError(
            f"head: {target.head}; this base model was loaded for "
            f"{'answer tokens' if target.head != 'tokens' else 'a head that is trained'}, which is another model of "
            "transformers; load the adapter by itself: Recommender.from_pretrained"
        )
    if adapters.is_whole(folder):
        model = base.model
    else:
        model = share(base.model)
        if target.head != "tokens":
            heads.resize(model, target.outputs)
    model = adapters.load(scorer.with_head(model, target.head, about.prompt.answer_ids), folder)
    if sources:
        side.load(model, folder, sources, target.outputs)
    return model


def share(model: Any) -> Any:
    """A copy of a model whose parameters and buffers are views of the same memory."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        # A parameter of its own: whoever exchanges its data does so here alone. bitsandbytes' parameters cannot be made
        # from their data, and hold the scales without which that says nothing.
        plain = type(parameter) is nn.Parameter
        memo[id(parameter)] = nn.Parameter(parameter.data, parameter.requires_grad) if plain else parameter
    for layer in quantized.layers(model).values():
        if getattr(layer.weight, "CB", None) is not None:
            layer.init_8bit_state()  # the first use moves it out of the weight, which the copies have in common
        memo |= {id(kept): kept for kept in (getattr(layer, name, None) for name in ("state", "quant_state"))}
    return copy.deepcopy(model, memo)
