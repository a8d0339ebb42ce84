"""How many ways a pattern of module names has, and that those with few are over soon."""

from __future__ import annotations

import math
import re
import time

import pytest

from peftrec.bottleneck import PLACES, VARIANTS
from peftrec.file_checks import MOST_WAYS
from peftrec.patterns import count_ways

USUAL = (
    "q_proj",
    "all-linear",
    r".*\.(q_proj|v_proj)$",
    r"layers\.\d+\.self_attn\..*",
    ".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    r"^model.layers.([0-9]|1[0-5]).self_attn.(q|k|v|o)_proj$",
    r".*\.layers\.(0|1|2)\..*_proj",
    r"model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)",
    ".*attn.*|.*mlp.*",
    ".*[qv]_proj",
    *sorted({places.of(variant) or "" for places in PLACES.values() for variant in VARIANTS}),
)


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_patterns(pattern: str) -> None:
    assert 1 <= count_ways(pattern) <= MOST_WAYS
    re.compile(pattern)


@pytest.mark.parametrize(
    ("pattern", "ways"),
    [
        ("model.layers", 1),
        ("(q|v|q_proj)", 2),  # what begins with q may go on both ways
        ("(q.|v)", 2),
        ("(cross)?attention", 2),
        (r"\d+[0-9]{1,2}", 9),
        (".*x", 10),
        (".*(q|v)", 20),
        (".*.x", 100),
        (".*x?", 200),
        (".*(x)?", 200),
        (r"(.*\.|x.*)y", 110),
        ("(?:.|x)" * 3, 8),
    ],
)
def test_ways_that_can_be_counted_by_hand(pattern: str, ways: int) -> None:
    assert count_ways(pattern) == ways


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+", "(a|b)*", "(ab){2}", "(a", "a)", "[a", "a**", "*", "^*"),
        *(r"(.)\1", "(?=a)", "(?i)a", "(?P<x>a)", "\\", r"\S", "(" * 400 + ")" * 400, "a" * 1001),
    ],
)
def test_what_is_not_counted(pattern: str) -> None:
    assert count_ways(pattern) == math.inf


@pytest.mark.parametrize(
    "pattern",
    [
        *(".*.*.*X", ".*.?.?.?.?.?.?.?X", "(e|ee)" * 20 + "X", "(e|.)" * 20 + "X", r"\w*" * 4 + "X"),
        *(".*e?.*e?.*e?X", "(?:.*|.*)e" * 3 + "X", "e*" * 8 + "X", r"[\w.]+" * 3 + "X", ".{1,40}" * 4 + "X"),
    ],
)
def test_slow_patterns_have_too_many_ways(pattern: str) -> None:
    assert count_ways(pattern) > MOST_WAYS


@pytest.mark.parametrize("pattern", [".*e.*e.*e.*eX", ".*(e|l).*(e|l).*(e|l)X", "(e|.)" * 9 + ".*eX", ".?" * 13 + "X"])
def test_the_slowest_that_pass_are_over_soon(pattern: str) -> None:
    assert 1000 < count_ways(pattern) <= MOST_WAYS
    started = time.perf_counter()
    for name in ("base_model.model.model.layers.11.self_attn.q_proj", "model.decoder.layers.3.encoder_attn_layer_norm"):
        for around in (rf"(.*\.)?({pattern})$", rf"(^|.*\.){pattern}($|\..*)"):  # as PEFT asks
            assert not re.match(around, name)
    assert time.perf_counter() - started < 1  # some milliseconds; a busy machine takes longer
