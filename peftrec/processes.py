"""The processes that share a run: how many there are, and what each of them holds of the model."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from peftrec import backbone, compatibility, config
from peftrec.errors import ConfigError


def group() -> Any:
    """This run's processes as accelerate knows them (PartialState), which meet on the device that the model goes to.

    Left to itself accelerate looks for GPUs, and where there are none each of several processes takes itself for the
    only one.
    """
    return PartialState(cpu=not backbone.has_gpu())


def launched() -> bool:
    """Whether `accelerate launch` started this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ


def on_this_machine() -> int:
    """How many of the run's processes share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def alone_by_mistake() -> str | None:
    """A line to warn with where accelerate was asked for several processes on the CPU, and started one."""
    # Its launcher of single processes names a meeting point if, and only if, it was asked for several.
    if launched() and "MASTER_PORT" in os.environ and group().num_processes == 1 and not backbone.has_gpu():
        return (
            "accelerate was asked for several processes and started one, as it does for --cpu and MULTI_CPU; the run "
            "goes on with one; for several use --config_file recipes/accelerate/multi_cpu.yaml"
        )
    return None


def check(recipe: config.Recipe) -> None:
    """Whether this recipe can be run by these processes.

    Raises:
        ConfigError: a rule of `compatibility.LAUNCH_RULES` is broken.
    """
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    launch = compatibility.Launch(backbone.engine(), group().num_processes, mixed)
    problems = list(compatibility.launch_conflicts(recipe, launch))
    if problems:
        raise ConfigError(*problems)


def leave() -> None:
    """What follows is one process's own: models are loaded whole again, where DeepSpeed would cut them."""
    if backbone.engine() == "deepspeed":
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def kind(checkpoint: Path) -> str:
    """What wrote a checkpoint: fsdp, deepspeed or plain, each with an optimizer state that the others cannot read."""
    if any(checkpoint.glob("pytorch_model_fsdp*")):
        return "fsdp"
    return "deepspeed" if any(checkpoint.glob("global_step*")) else "plain"


def gather(model: Any) -> Callable[[], None]:
    """Make the trained parameters whole, whoever shards them; all processes must come here together.

    Returns:
        What cuts them into the same shards again.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what the last forward pass left whole must not be replaced
    parts = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and isinstance(parameter, DTensor)
    ]
    shared: dict[int, Any] = {id(parameter): parameter for *_, parameter in parts}  # what is shared stays shared
    whole = {key: nn.Parameter(one.full_tensor().detach().cpu()) for key, one in shared.items()}
    for module, name, parameter in parts:
        setattr(module, name, whole[id(parameter)])
    together = ExitStack()
    partitioned = [one for one in model.parameters() if one.requires_grad and hasattr(one, "ds_id")]
    if partitioned:
        import deepspeed

        together.enter_context(deepspeed.zero.GatheredParameters(partitioned))

    def cut() -> None:
        together.close()
        for module, name, parameter in parts:
            setattr(module, name, parameter)

    return cut
