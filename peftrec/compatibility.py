"""What cannot work together, known before any model is loaded: one row for each rule.

A row names the key that has to change, the keys it clashes with, when it does, and why. `RULES` are about a recipe
alone, `LAUNCH_RULES` about a recipe and how accelerate was told to run it. What depends on the model itself (target
modules that match nothing, a window longer than its positions) is checked when it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

from peftrec.schema import show

VARIANTS = {
    "lora": ("plain", "rslora", "dora", "pissa", "loftq"),
    "bottleneck": ("houlsby", "pfeiffer", "parallel"),
}
"""Values of `adapter.variant`, the default first."""

REFUSED_TYPES = {
    "CARTRIDGE": "its prefix is made from a long text; use method: prefix",
    "CPT": "it has a loss of its own; use method: prompt",
    "LILY": "it looks at all tokens of a row at once, also at later ones and at other people's; use method: lora",
    "MULTITASK_PROMPT_TUNING": "it needs a task for each row; use method: prompt",
    "POLY": "it needs a task for each row; use method: lora",
    "SHADOW": "its second network knows no cache; use method: lora",
    "XLORA": "it mixes adapters that are trained already; use method: lora",
}
"""PEFT's methods that nothing here can train or load: name -> why, and what to do instead."""

OWN_METHODS = {
    "ADALORA": "its ranks need a schedule; use method: adalora",
    "BOTTLENECK": "it has a method of its own; use method: bottleneck",
}
"""PEFT's names of methods that are not to be had under `other`."""


@dataclass(frozen=True)
class Rule:
    """Two or more settings that exclude each other.

    Attributes:
        key: the setting to name in the error.
        others: the settings that it clashes with.
        applies: whether a recipe has them.
        text: why not, and what to change.
    """

    key: str
    others: tuple[str, ...]
    applies: Callable[[Any], bool]
    text: str


def _peft_type(recipe: Any) -> str:
    """PEFT's name of the method where the recipe gives that; else nothing."""
    return (recipe.adapter.peft_type or "").upper() if recipe.adapter.method == "other" else ""


def _no_step_left(recipe: Any) -> bool:
    """Whether tinit and tfinal surely take up the whole run; shares of a run of unknown length might not."""
    adapter, steps = recipe.adapter, recipe.train.max_steps
    parts = [part * steps if part < 1 else part for part in (adapter.tinit, adapter.tfinal)]
    known = steps > 0 and sum(map(int, parts)) >= steps
    return bool(known or (adapter.tinit < 1 and adapter.tfinal < 1 and adapter.tinit + adapter.tfinal >= 1))


def _forgets_its_training(recipe: Any) -> bool:
    """Whether a saved adapter of this method lacks something that was trained with it, or is none."""
    adapter = recipe.adapter
    return adapter.method in ("adalora", "p_tuning", "full", "other") or (
        adapter.method == "prefix" and bool(adapter.prefix_projection)
    )


def _quantized(recipe: Any) -> bool:
    return bool(recipe.model.load_in_4bit or recipe.model.load_in_8bit)


def _side(key: str, applies: Callable[[Any], bool] = lambda recipe: True) -> Callable[[Any], bool]:
    return lambda recipe: bool(getattr(recipe.side, key)) and applies(recipe)


def _aligns(applies: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda recipe: recipe.align.used and applies(recipe)


def _both(first: Callable[[Any], bool], second: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda recipe: first(recipe) and second(recipe)


def _foreign_variant(method: str) -> Callable[[Any], bool]:
    return lambda recipe: recipe.adapter.method == method and recipe.adapter.variant not in (None, *VARIANTS[method])


def _of_type(name: str) -> Callable[[Any], bool]:
    return lambda recipe: _peft_type(recipe) == name


SIDE_RULES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (
        ("data.records",),
        lambda recipe: recipe.data.prompts is not None,
        "ready-made prompts (data.records) have no items; leave it out",
    ),
    (
        ("prompt.template", "prompt.layout"),
        lambda recipe: recipe.prompt.layout == "pointwise" and recipe.prompt.template is not None,
        "a template says nowhere where an event's vectors would stand; remove prompt.template, or leave this out",
    ),
    (
        ("adapter.method",),
        lambda recipe: recipe.adapter.method == "none",
        "nothing is trained under adapter.method: none, and an untrained projector adds nothing; leave it out",
    ),
    (
        ("adapter.method",),
        lambda recipe: recipe.adapter.method == "full",
        "adapter.method: full is saved as a model for anybody, which has no place for projectors; train an adapter",
    ),
)
"""What side vectors of any source cannot stand with: the other keys, when, and why."""

NAMES_ADAPTERS: dict[str, Callable[[Any], bool]] = {
    "start.adapter": lambda recipe: recipe.start.adapter is not None,
    "train.teachers": lambda recipe: bool(recipe.train.teachers),
}
"""Keys that name earlier adapters -> whether the recipe does."""

RULES = (
    *(
        Rule(
            "adapter.variant",
            ("adapter.method",),
            _foreign_variant(method),
            f"adapter.method: {method} has {', '.join(own)}; choose one of them",
        )
        for method, own in VARIANTS.items()
    ),
    Rule(
        "adapter.variant",
        ("adapter.method", "model.load_in_4bit"),
        lambda recipe: recipe.adapter.variant == "loftq" and not recipe.model.load_in_4bit,
        "it makes up for what 4 bits lose; set model.load_in_4bit: true, or another variant",
    ),
    Rule(
        "adapter.variant",
        ("adapter.method", "model.load_in_8bit"),
        lambda recipe: recipe.adapter.variant in ("dora", "pissa") and recipe.model.load_in_8bit,
        "it reads the base weights, which PEFT cannot take out of 8 bits; set model.load_in_4bit, or another variant",
    ),
    Rule(
        "adapter.method",
        ("model.load_in_4bit", "model.load_in_8bit"),
        lambda recipe: recipe.adapter.method == "full" and _quantized(recipe),
        "quantized weights cannot be trained; leave out model.load_in_4bit and load_in_8bit, or train an adapter",
    ),
    *(
        Rule(
            key,
            ("adapter.method", "adapter.prefix_projection"),
            _both(named, _forgets_its_training),
            "what is saved under this adapter.method is not all that its training needs; take lora, bottleneck, prefix "
            f"without projection, prompt, ia3 or ln_tuning, or remove {key}",
        )
        for key, named in NAMES_ADAPTERS.items()
    ),
    *(
        Rule(
            key,
            ("adapter.variant", "adapter.method"),
            _both(named, lambda recipe: recipe.adapter.variant in ("pissa", "loftq")),
            f"these variants start from the base weights; set adapter.variant: plain, or remove {key}",
        )
        for key, named in NAMES_ADAPTERS.items()
    ),
    Rule(
        "train.teachers",
        ("start.stack",),
        lambda recipe: bool(recipe.train.teachers) and recipe.start.stack,
        "a stacked adapter (start.stack) is saved in another shape than it is trained in; leave one of them out",
    ),
    Rule(
        "train.teachers",
        ("align.kind",),
        lambda recipe: bool(recipe.train.teachers) and recipe.align.used,
        "another domain's events (align.kind) have no teacher; leave one of them out",
    ),
    Rule(
        "start.stack",
        ("adapter.method", "adapter.variant"),
        lambda recipe: (
            recipe.start.stack
            and (recipe.adapter.method != "lora" or recipe.adapter.variant not in (None, "plain", "rslora"))
        ),
        "only plain LoRA can stand on another one and be saved as one; set adapter.method: lora and adapter.variant: "
        "plain or rslora, or leave it out",
    ),
    Rule(
        "score.head",
        ("adapter.method",),
        lambda recipe: recipe.adapter.method == "none" and recipe.score.head != "tokens",
        "such a head has to be trained; set it to tokens, or train an adapter",
    ),
    Rule(
        "adapter.target_r",
        ("adapter.init_r", "adapter.method"),
        lambda recipe: recipe.adapter.method == "adalora" and recipe.adapter.target_r >= recipe.adapter.init_r,
        "no rank is left to take away; set it below adapter.init_r",
    ),
    Rule(
        "adapter.tinit",
        ("adapter.tfinal", "adapter.method", "train.max_steps"),
        lambda recipe: recipe.adapter.method == "adalora" and _no_step_left(recipe),
        "together with adapter.tfinal it takes up the whole run, and no step is left to take ranks away; lower them",
    ),
    Rule(
        "adapter.peft_type",
        ("adapter.method",),
        lambda recipe: recipe.adapter.method == "other" and recipe.adapter.peft_type is None,
        "adapter.method: other needs PEFT's name of the method, such as VERA; add it",
    ),
    *(Rule("adapter.peft_type", (), _of_type(name), text) for name, text in {**REFUSED_TYPES, **OWN_METHODS}.items()),
    Rule(
        "train.gradient_checkpointing",
        ("adapter.method", "adapter.peft_type"),
        lambda recipe: (
            recipe.train.gradient_checkpointing
            and (recipe.adapter.method == "prefix" or _peft_type(recipe) == "PREFIX_TUNING")
        ),
        "a prefix lives in the cache, which is not kept for recomputing; set it to false, or use method: prompt",
    ),
    Rule(
        "train.average_checkpoints",
        ("adapter.method",),
        lambda recipe: recipe.train.average_checkpoints > 1 and recipe.adapter.method == "adalora",
        "its ranks differ from one checkpoint to the next; set it to 1, or use method: lora",
    ),
    Rule(
        "train.average_checkpoints",
        ("train.evals",),
        lambda recipe: recipe.train.average_checkpoints > (recipe.train.evals or 4),
        "a run saves as many checkpoints as train.evals says (4 where that is 0); lower it, or raise train.evals",
    ),
    Rule(
        "train.fgm_epsilon",
        ("train.torch_compile",),
        lambda recipe: recipe.train.fgm_epsilon > 0 and recipe.train.torch_compile,
        "it moves embeddings between two passes, which a compiled model does not let it; remove one of them",
    ),
    Rule(
        "align.kind",
        ("prompt.layout",),
        _aligns(lambda recipe: recipe.prompt.layout == "pointwise"),
        "it looks at the states of a timeline's events; set prompt.layout: timeline, or leave align out",
    ),
    Rule(
        "align.kind",
        ("side.als", "side.items", "side.users"),
        _aligns(lambda recipe: recipe.side.used),
        "the other domain has no side vectors, which alone would tell it apart; leave side or align out",
    ),
    Rule(
        "align.kind",
        ("train.torch_compile",),
        _aligns(lambda recipe: recipe.train.torch_compile),
        "it looks at states inside the model, which a compiled model does not let it; remove one of them",
    ),
    Rule(
        "align.kind",
        ("train.order",),
        lambda recipe: recipe.align.kind == "cpc" and recipe.train.order == "random",
        "it asks for the item that comes next, which a random order does not know; set train.order: time, or another "
        "kind",
    ),
    *(
        Rule(f"side.{key}", others, _side(key, applies), text)
        for key in ("als", "items", "users")
        for others, applies, text in SIDE_RULES
    ),
    Rule(
        "score.blend",
        ("train.order",),
        lambda recipe: recipe.score.blend and recipe.train.order == "random",
        "under train.order: random events know later ones, and none is the latest; set it to time, or leave this out",
    ),
    Rule(
        "side.als",
        ("train.order",),
        _side("als", lambda recipe: recipe.train.order == "random"),
        "a person's factors follow from what came before, and train.order: random has no before; set it to time, or "
        "leave this out",
    ),
)


@dataclass(frozen=True)
class Launch:
    """How accelerate was told to run a recipe.

    Attributes:
        engine: plain (every process has the whole model), fsdp or deepspeed.
        processes: how many there are.
        mixed_precision: accelerate's setting.
    """

    engine: str
    processes: int
    mixed_precision: str = "no"


@dataclass(frozen=True)
class LaunchRule:
    """A setting that excludes a way to launch.

    Attributes:
        key: the setting to name in the error.
        applies: whether recipe and launch exclude each other.
        text: why, and what to change; may name the attributes of `Launch` in braces.
    """

    key: str
    applies: Callable[[Any, Launch], bool]
    text: str


LAUNCH_RULES = (
    LaunchRule(
        "train.gradient_accumulation_steps",
        lambda recipe, launch: (
            recipe.adapter.method != "none" and recipe.train.gradient_accumulation_steps % launch.processes != 0
        ),
        "{processes} processes share the forward passes of a step; make it a multiple of {processes}, or start another "
        "number of processes",
    ),
    LaunchRule(
        "model.dtype",
        lambda recipe, launch: launch.engine == "deepspeed" and recipe.model.dtype not in ("auto", "bfloat16"),
        "DeepSpeed computes in one type for model and adapter; set it to bfloat16, or launch without DeepSpeed",
    ),
    LaunchRule(
        "model.dtype",
        lambda recipe, launch: launch.engine != "deepspeed" and launch.mixed_precision != "no",
        "accelerate's mixed_precision is {mixed_precision}, which would round the answers too; model.dtype alone says "
        "what is computed in: set mixed_precision to 'no'",
    ),
    LaunchRule(
        "score.head",
        lambda recipe, launch: launch.engine == "deepspeed" and recipe.score.head != "tokens",
        "such a head computes in float32, where DeepSpeed has one type; set it to tokens, or launch without DeepSpeed",
    ),
    *(
        LaunchRule(
            f"side.{key}",
            lambda recipe, launch, key=key: launch.engine != "plain" and bool(getattr(recipe.side, key)),  # type: ignore[misc]
            "its projectors stand at the embeddings, which {engine} cuts into shards; launch with multi_gpu.yaml",
        )
        for key in ("als", "items", "users")
    ),
    LaunchRule(
        "adapter.method",
        lambda recipe, launch: launch.engine != "plain" and recipe.adapter.method == "none",
        "only what is trained is cut into shards by {engine}; launch with multi_gpu.yaml",
    ),
    LaunchRule(
        "eval.base_model",
        lambda recipe, launch: launch.engine != "plain" and recipe.adapter.method == "full" and recipe.eval.base_model,
        "it is scored before {engine} cuts the model into shards; set it to false",
    ),
    LaunchRule(
        "train.teachers",
        lambda recipe, launch: launch.engine != "plain" and bool(recipe.train.teachers),
        "they are asked before {engine} cuts the model into shards; launch with multi_gpu.yaml",
    ),
    LaunchRule(
        "model.load_in_8bit",
        lambda recipe, launch: launch.engine != "plain" and recipe.model.load_in_8bit,
        "8-bit weights cannot be cut into shards; set model.load_in_4bit instead, or launch with multi_gpu.yaml",
    ),
    LaunchRule(
        "adapter.method",
        lambda recipe, launch: launch.engine != "plain" and recipe.adapter.method == "adalora",
        "it takes ranks away from whole matrices, which {engine} cuts into shards; use lora, or multi_gpu.yaml",
    ),
    LaunchRule(
        "train.average_checkpoints",
        lambda recipe, launch: launch.engine != "plain" and recipe.train.average_checkpoints > 1,
        "{engine} keeps checkpoints in shards, which are not averaged; set it to 1, or launch with multi_gpu.yaml",
    ),
    LaunchRule(
        "align.kind",
        lambda recipe, launch: launch.engine != "plain" and recipe.align.used,
        "what is trained beside the adapter cannot be cut into shards by {engine}; launch with multi_gpu.yaml",
    ),
    LaunchRule(
        "train.fgm_epsilon",
        lambda recipe, launch: launch.engine != "plain" and recipe.train.fgm_epsilon > 0,
        "{engine} expects one backward pass for each forward batch; set it to 0, or launch with multi_gpu.yaml",
    ),
)


def launch_conflicts(recipe: Any, launch: Launch) -> Iterator[str]:
    """One line for each launch rule that is broken."""
    for rule in LAUNCH_RULES:
        if rule.applies(recipe, launch):
            text = rule.text.format(**vars(launch))
            yield f"{rule.key}: {_value(recipe, rule.key)}; {text}"


def conflicts(recipe: Any) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """The rules that a recipe breaks: the key to name, the other keys involved, and the error text."""
    for rule in RULES:
        if rule.applies(recipe):
            yield rule.key, rule.others, f"{_value(recipe, rule.key)}; {rule.text}"


def _value(recipe: Any, key: str) -> str:
    return show(reduce(getattr, key.split("."), recipe)).strip("'")
