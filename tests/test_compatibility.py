"""Settings that exclude each other are refused before any model is loaded, in one line that says what to change."""

from __future__ import annotations

from typing import Any

import pytest

from peftrec import compatibility
from peftrec.config import parse_recipe
from peftrec.errors import ConfigError

ALIGN = {"kind": "coral", "target": {"items_where": {"genres": ["Comedy"]}}}
CASES: list[tuple[dict[str, Any], str]] = [
    (
        {"adapter": {"variant": "houlsby"}},
        "adapter.variant: houlsby; adapter.method: lora has plain, rslora, dora, pissa, loftq; choose one of them",
    ),
    (
        {"adapter": {"method": "bottleneck", "variant": "dora"}},
        "adapter.variant: dora; adapter.method: bottleneck has houlsby, pfeiffer, parallel; choose one of them",
    ),
    (
        {"adapter": {"variant": "loftq"}},
        "adapter.variant: loftq; it makes up for what 4 bits lose; set model.load_in_4bit: true, or another variant",
    ),
    ({"adapter": {"variant": "loftq"}, "model": {"load_in_8bit": True}}, "adapter.variant: loftq; it makes up for"),
    ({"adapter": {"variant": "pissa"}, "model": {"load_in_8bit": True}}, "adapter.variant: pissa; it reads the base"),
    ({"adapter": {"variant": "dora"}, "model": {"load_in_8bit": True}}, "adapter.variant: dora; it reads the base"),
    (
        {"adapter": {"method": "full"}, "model": {"load_in_4bit": True}},
        "adapter.method: full; quantized weights cannot",
    ),
    (
        {"adapter": {"method": "full"}, "model": {"load_in_8bit": True}},
        "adapter.method: full; quantized weights cannot",
    ),
    (
        {"adapter": {"method": "adalora", "init_r": 16}},
        "adapter.target_r: 16; no rank is left to take away; set it below adapter.init_r",
    ),
    (
        {"adapter": {"method": "adalora", "tinit": 0.5, "tfinal": 0.5}},
        "adapter.tinit: 0.5; together with adapter.tfinal",
    ),
    (
        {"adapter": {"method": "adalora", "tinit": 90, "tfinal": 0.1}, "train": {"max_steps": 100}},
        "adapter.tinit: 90.0; together with adapter.tfinal it takes up the whole run",
    ),
    ({"adapter": {"method": "none"}, "score": {"head": "linear"}}, "score.head: linear; such a head has to be trained"),
    (
        {"adapter": {"method": "other"}},
        "adapter.peft_type: null; adapter.method: other needs PEFT's name of the method",
    ),
    *(
        ({"adapter": {"method": "other", "peft_type": name.lower()}}, f"adapter.peft_type: {name.lower()}; {text}")
        for name, text in {**compatibility.REFUSED_TYPES, **compatibility.OWN_METHODS}.items()
    ),
    (
        {"adapter": {"method": "prefix"}, "train": {"gradient_checkpointing": True}},
        "train.gradient_checkpointing: true; a prefix lives in the cache, which is not kept for recomputing; set it to",
    ),
    (
        {"adapter": {"method": "other", "peft_type": "prefix_tuning"}, "train": {"gradient_checkpointing": True}},
        "train.gradient_checkpointing: true; a prefix lives in the cache",
    ),
    *(
        (
            {"adapter": method, "start": {"adapter": "x"}},
            "start.adapter: x; what is saved under this adapter.method is not",
        )
        for method in (
            {"method": "p_tuning"},
            {"method": "prefix", "prefix_projection": True},
            {"method": "adalora"},
            {"method": "full"},
            {"method": "other", "peft_type": "VERA"},
        )
    ),
    (
        {"adapter": {"variant": "pissa"}, "start": {"adapter": "x"}},
        "start.adapter: x; these variants start from the base",
    ),
    (
        {"adapter": {"method": "ia3"}, "start": {"adapter": "x", "stack": True}},
        "start.stack: true; only plain LoRA can",
    ),
    (
        {"adapter": {"variant": "dora"}, "start": {"adapter": "x", "stack": True}},
        "start.stack: true; only plain LoRA can",
    ),
    (
        {"adapter": {"method": "adalora"}, "train": {"average_checkpoints": 2}},
        "train.average_checkpoints: 2; its ranks differ from one checkpoint to the next; set it to 1, or use",
    ),
    ({"train": {"average_checkpoints": 5}}, "train.average_checkpoints: 5; a run saves as many checkpoints as"),
    (
        {"train": {"average_checkpoints": 5, "evals": 0}},
        "train.average_checkpoints: 5; a run saves as many checkpoints",
    ),
    (
        {"train": {"fgm_epsilon": 0.5, "torch_compile": True}},
        "train.fgm_epsilon: 0.5; it moves embeddings between two passes, which a compiled model does not let it",
    ),
    (
        {"align": ALIGN, "prompt": {"layout": "pointwise"}},
        "align.kind: coral; it looks at the states of a timeline's events; set prompt.layout: timeline, or",
    ),
    (
        {"start": {"adapter": "y", "stack": True}, "train": {"teachers": ["x"]}},
        "train.teachers: ['x']; a stacked adapter (start.stack) is saved in another shape",
    ),
    (
        {"adapter": {"method": "p_tuning"}, "train": {"teachers": ["x"]}},
        "train.teachers: ['x']; what is saved under this adapter.method is not",
    ),
    (
        {"adapter": {"variant": "pissa"}, "train": {"teachers": ["x"]}},
        "train.teachers: ['x']; these variants start from the base",
    ),
    (
        {"align": ALIGN, "train": {"teachers": ["x"]}},
        "train.teachers: ['x']; another domain's events (align.kind) have",
    ),
    ({"align": ALIGN, "side": {"als": True}}, "align.kind: coral; the other domain has no side vectors"),
    (
        {
            "align": ALIGN | {"kind": "cpc"},
            "train": {"order": "random"},
            "eval": {"history": "frozen"},
            "data": {"name": "ml-100k", "split": {"kind": "kfold"}},
        },
        "align.kind: cpc; it asks for the item that comes next, which a random order does not know; set train.order",
    ),
    ({"align": ALIGN, "train": {"torch_compile": True}}, "align.kind: coral; it looks at states inside the model"),
    (
        {"side": {"als": True}, "adapter": {"method": "full"}},
        "side.als: true; adapter.method: full is saved as a model for anybody",
    ),
    (
        {"side": {"items": "v.npz"}, "adapter": {"method": "none"}},
        "side.items: v.npz; nothing is trained under adapter.method: none",
    ),
    (
        {
            "score": {"prior": "bias", "blend": True},
            "train": {"order": "random"},
            "eval": {"history": "frozen"},
        },
        "score.blend: true; under train.order: random events know later ones",
    ),
    (
        {"side": {"als": True}, "train": {"order": "random"}, "eval": {"history": "frozen"}},
        "side.als: true; a person's factors follow from what came before",
    ),
    (
        {"side": {"users": "v.npz"}, "prompt": {"layout": "pointwise", "template": "{history}{item}:"}},
        "side.users: v.npz; a template says nowhere where an event's vectors would stand",
    ),
    (
        {"side": {"als": True}, "data": {"records": "r.jsonl"}, "prompt": {"layout": "pointwise"}},
        "side.als: true; ready-made prompts (data.records) have no items",
    ),
]

FINE: list[dict[str, Any]] = [
    {"adapter": {"variant": "loftq"}, "model": {"load_in_4bit": True}},
    {"adapter": {"variant": "dora"}, "model": {"load_in_4bit": True}},
    {"adapter": {"variant": "rslora"}, "model": {"load_in_8bit": True}},
    {"adapter": {"method": "full"}},
    {"train": {"average_checkpoints": 4, "evals": 0, "fgm_epsilon": 0.5}},
    {"adapter": {"method": "adalora"}},
    {"adapter": {"method": "adalora", "tinit": 89, "tfinal": 0.1}, "train": {"max_steps": 100}},
    {"adapter": {"method": "adalora", "tinit": 500}},
    {"adapter": {"method": "other", "peft_type": "VERA"}},
    {"adapter": {"method": "prompt"}, "train": {"gradient_checkpointing": True}},
    {"adapter": {"method": "prefix"}},
    {"adapter": {"method": "prefix"}, "start": {"adapter": "x"}},
    {"adapter": {"variant": "dora"}, "start": {"adapter": "x"}},
    {"adapter": {"variant": "rslora"}, "start": {"adapter": "x", "stack": True}},
    {"align": ALIGN, "train": {"gradient_checkpointing": True, "fgm_epsilon": 0.5}, "start": {"adapter": "x"}},
    {"side": {"als": True, "items": ["a.npz", "b.npz"]}, "prompt": {"layout": "pointwise"}},
]


def parse(values: dict[str, Any]) -> Any:
    return parse_recipe({"data": {"name": "ml-100k"}, "output_dir": "runs/x", **values}, "x.yaml")


@pytest.mark.parametrize(("values", "expected"), CASES)
def test_refused_in_one_line(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(values)
    (problem,) = caught.value.problems
    assert problem.startswith(f"x.yaml: {expected}")
    assert "\n" not in problem


@pytest.mark.parametrize("values", FINE)
def test_not_refused(values: dict[str, Any]) -> None:
    assert list(compatibility.conflicts(parse(values))) == []


def test_every_rule_is_tried() -> None:
    """A rule that nothing here breaks might never apply."""
    broken: set[str] = set()
    for values, _ in CASES:
        with pytest.raises(ConfigError) as caught:
            parse(values)
        broken |= {rule.text for rule in compatibility.RULES if any(rule.text in p for p in caught.value.problems)}
    assert broken == {rule.text for rule in compatibility.RULES}


def test_a_mistake_in_one_of_the_keys_is_enough_of_an_error() -> None:
    with pytest.raises(ConfigError) as caught:
        parse({"adapter": {"variant": "loftq"}, "model": {"load_in_4bit": "yes"}})
    (problem,) = caught.value.problems
    assert "true or false" in problem


LAUNCHES: list[tuple[dict[str, Any], tuple[Any, ...], str]] = [
    (
        {"train": {"teachers": ["x"]}},
        ("fsdp", 2),
        "train.teachers: ['x']; they are asked before fsdp cuts the model",
    ),
    (
        {"train": {"gradient_accumulation_steps": 4}},
        ("plain", 3),
        "train.gradient_accumulation_steps: 4; 3 processes share the forward passes of a step; make it a multiple of 3",
    ),
    ({"model": {"dtype": "float32"}}, ("deepspeed", 2), "model.dtype: float32; DeepSpeed computes in one type"),
    (
        {},
        ("plain", 2, "bf16"),
        "model.dtype: auto; accelerate's mixed_precision is bf16, which would round the answers",
    ),
    ({"score": {"head": "linear"}}, ("deepspeed", 2), "score.head: linear; such a head computes in float32"),
    ({"adapter": {"method": "none"}}, ("fsdp", 2), "adapter.method: none; only what is trained is cut into shards"),
    ({"adapter": {"method": "full"}}, ("fsdp", 2), "eval.base_model: true; it is scored before fsdp cuts"),
    ({"model": {"load_in_8bit": True}}, ("fsdp", 2), "model.load_in_8bit: true; 8-bit weights cannot be cut"),
    ({"adapter": {"method": "adalora"}}, ("fsdp", 2), "adapter.method: adalora; it takes ranks away from whole"),
    (
        {"train": {"average_checkpoints": 3}},
        ("fsdp", 2),
        "train.average_checkpoints: 3; fsdp keeps checkpoints in shards, which are not averaged",
    ),
    ({"train": {"fgm_epsilon": 1}}, ("deepspeed", 2), "train.fgm_epsilon: 1.0; deepspeed expects one backward pass"),
    (
        {"align": ALIGN},
        ("fsdp", 2),
        "align.kind: coral; what is trained beside the adapter cannot be cut into shards by",
    ),
    ({"side": {"als": True}}, ("fsdp", 2), "side.als: true; its projectors stand at the embeddings, which fsdp cuts"),
    ({"side": {"items": "v.npz"}}, ("deepspeed", 2), "side.items: v.npz; its projectors stand at the embeddings"),
    ({"side": {"users": "v.npz"}}, ("fsdp", 2), "side.users: v.npz; its projectors stand at the embeddings"),
]


class TestLaunch:
    @pytest.mark.parametrize(("settings", "launch", "text"), LAUNCHES)
    def test_refused(self, settings: dict[str, Any], launch: tuple[Any, ...], text: str) -> None:
        recipe = parse(settings)
        lines = list(compatibility.launch_conflicts(recipe, compatibility.Launch(*launch)))
        (line,) = (line for line in lines if line.startswith(text))
        assert "\n" not in line
        assert "{" not in line

    @pytest.mark.parametrize(("settings", "launch", "text"), LAUNCHES)
    def test_fine_by_one_process(self, settings: dict[str, Any], launch: tuple[Any, ...], text: str) -> None:
        recipe = parse(settings)
        assert list(compatibility.launch_conflicts(recipe, compatibility.Launch("plain", 1))) == []

    def test_nothing_is_trained_and_so_nothing_is_shared(self) -> None:
        recipe = parse({"adapter": {"method": "none"}})
        assert list(compatibility.launch_conflicts(recipe, compatibility.Launch("plain", 3))) == []

    def test_every_rule_has_a_case(self) -> None:
        assert {text.partition(":")[0] for *_, text in LAUNCHES} == {rule.key for rule in compatibility.LAUNCH_RULES}
