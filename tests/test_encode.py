"""Rows of a log by the recipe's template: what fits, what is cut, and what special tokens mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest

from peftrec import config, encode
from peftrec.errors import DataError
from peftrec.split import Log

TEMPLATE = "<s>Films:\n{history}And {item}? Answer:"


def prompts(log: Log, tokenizer: Any, **prompt: Any) -> list[str]:
    """The test rows' prompts as text, special tokens included."""
    wanted = config.Prompt(layout="pointwise", template=TEMPLATE, **prompt)
    data = encode.Encoder(log, wanted, tokenizer, "isolate").evaluate(np.flatnonzero(log.split == 2), "streaming", None)
    return [tokenizer.decode(data[row]["input_ids"]) for row in range(len(data))]


@pytest.fixture
def log(make_log: Callable[..., Log]) -> Log:
    """One person's four films, the last one asked for."""
    return make_log([0] * 4, [1, 2, 3, 4], [1, 0, 1, 1], item=[0, 1, 2, 3], split=[0, 0, 0, 2])


def titled(log: Log, titles: list[str]) -> Log:
    return dataclasses.replace(log, items=pl.DataFrame({"item_id": range(len(titles)), "title": titles}))


def test_a_template_with_all_that_fits(log: Log, tokenizer: Any) -> None:
    log = titled(log, ["Heat", "Toy Story", "Film", "Up"])
    assert prompts(log, tokenizer) == ["<s><s>Films:\nHeat: yes\nToy Story: no\nFilm: yes\nAnd Up? Answer:"]


def test_the_oldest_events_go_first(log: Log, tokenizer: Any) -> None:
    log = titled(log, ["Heat", "Toy Story", "Film", "Up"])
    lines = ["Heat: yes\n", "Toy Story: no\n", "Film: yes\n"]
    suffixes = [f"<s><s>Films:\n{''.join(lines[first:])}And Up? Answer:" for first in (3, 2, 1, 0)]
    found = [prompts(log, tokenizer, max_tokens=room)[0] for room in range(24, 80)]
    kept = [suffixes.index(text) for text in found]
    assert kept == sorted(kept)
    assert set(kept) == {0, 1, 2, 3}
    for room, text in zip(range(24, 80), found, strict=True):
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= room


def test_long_titles_cost_neither_the_candidate_nor_the_beginning(log: Log, tokenizer: Any) -> None:
    log = titled(log, ["Heat " * 50, "Toy Story " * 50, "Film", "What's Up, Doc? " * 50])
    (text,) = prompts(log, tokenizer, max_tokens=64)
    assert text.startswith("<s><s>Films:\n")
    assert "And What's Up" in text
    assert text.endswith("? Answer:")


def test_titles_spell_no_special_token(log: Log, tokenizer: Any) -> None:
    log = titled(log, ["Heat <s>", "</s>", "Film", "Up</s>"])
    (text,) = prompts(log, tokenizer)
    assert text == "<s><s>Films:\nHeat < s>: yes\n< /s>: no\nFilm: yes\nAnd Up< /s>? Answer:"


def test_a_template_without_room_for_the_item(log: Log, tokenizer: Any) -> None:
    with pytest.raises(
        DataError, match=r"prompt.template: with .* and no history it takes \d+ tokens; expected up to 16"
    ):
        prompts(log, tokenizer, max_tokens=16)


@pytest.mark.parametrize(
    ("record", "room", "expected"),
    [
        (("Likes it?", "Heat, Up"), 99, "<s>Likes it?\nHeat, Up\nAnswer:"),
        (("Likes <s>?", "Up</s>"), 99, "<s>Likes < s>?\nUp< /s>\nAnswer:"),
        ((None, "Up"), 99, "<s>\nUp\nAnswer:"),
    ],
)
def test_records(make_log: Callable[..., Log], tokenizer: Any, record: Any, room: int, expected: str) -> None:
    table = pl.DataFrame([record], schema={"instruction": pl.String, "input": pl.String}, orient="row")
    log = dataclasses.replace(make_log([0], [1], [1], item=[-1], split=[2]), prompts=table)
    encoder = encode.Encoder(log, config.Prompt(layout="pointwise", max_tokens=room), tokenizer, "isolate")
    data = encoder.evaluate(np.array([0]), "streaming", None)
    assert tokenizer.decode(data[0]["input_ids"]) == expected
    assert encoder.example() == ([], expected.removeprefix("<s>"))


def test_a_long_record_loses_the_beginning_of_its_input(codec: Any, tokenizer: Any) -> None:
    template = "{instruction}\n{input}\nAnswer:"
    record = {"instruction": "Likes it?", "input": "Heat (1995), " * 20 + "Up"}
    ids = encode.record_ids(codec, template, record, 40)
    text = tokenizer.decode(ids)
    assert len(ids) <= 40
    assert text.startswith("<s>Likes it?\n")
    assert text.endswith("Heat (1995), Up\nAnswer:")
    # An instruction that is too long by itself is cut too: the question stands last.
    ids = encode.record_ids(codec, template, {"instruction": "Likes it? " * 20, "input": "Up"}, 30)
    assert tokenizer.decode(ids).startswith("<s>")
    assert tokenizer.decode(ids).endswith("Answer:")
    assert len(ids) <= 30


def opening_lines(log: Log, tokenizer: Any, tokens: int = 1_000, **prompt: Any) -> list[str]:
    task = "rating" if len(log.scale) > 2 else "click"
    found = encode.Encoder(
        log, config.Prompt(header="Films:", item="{title}", **prompt), tokenizer, "isolate", task=task
    )
    ids = found.opening(tokens)
    header, *lines = tokenizer.decode(ids, skip_special_tokens=True).splitlines() or ["Films:"]
    assert header == "Films:"
    return lines


def test_an_opening_says_what_training_events_say_more_often_of_an_item(
    make_log: Callable[..., Log], tokenizer: Any
) -> None:
    # Half of all training events are likes: of item 0 9 in 10, of item 1 1 in 10, of item 2 one in two; item 3 is liked
    # by all, after training.
    item = [0] * 10 + [1] * 10 + [2] * 2 + [3] * 10
    liked = [1] * 9 + [0] + [1] + [0] * 9 + [1, 0] + [1] * 10
    log = make_log(list(range(32)), [1] * 32, liked, item=item, split=[0] * 22 + [2] * 10)
    titles = log.items["title"].to_list()
    assert opening_lines(log, tokenizer) == [f"{titles[1]}: no", f"{titles[0]}: yes"]
    assert opening_lines(log, tokenizer, history="liked") == [f"{titles[0]}: yes"]
    assert len(opening_lines(log, tokenizer, tokens=6)) == 1
    held_out = dataclasses.replace(log, split=np.full(len(log), 2))
    assert opening_lines(held_out, tokenizer) == []


def test_an_opening_takes_few_events_for_no_agreement(make_log: Callable[..., Log], tokenizer: Any) -> None:
    # Three quarters are likes; item 1's two of two say less than item 0's 28 of 30.
    liked = [1] * 28 + [0] * 2 + [1] * 2 + [0] * 8
    log = make_log(list(range(40)), [1] * 40, liked, item=[0] * 30 + [1] * 2 + [2] * 8, split=[0] * 40)
    titles = log.items["title"].to_list()
    assert opening_lines(log, tokenizer) == [f"{titles[2]}: no", f"{titles[0]}: yes", f"{titles[1]}: yes"]


def test_an_opening_gives_no_answer_that_nobody_gave(make_log: Callable[..., Log], tokenizer: Any) -> None:
    label = [2] * 5 + [0] * 5
    log = make_log(list(range(10)), [1] * 10, label, item=[0] * 5 + [1] * 5, split=[0] * 10)
    log = dataclasses.replace(log, scale=(1.0, 2.0, 3.0), rating=np.array(label) + 1.0)
    titles = log.items["title"].to_list()
    assert opening_lines(log, tokenizer) == [f"{titles[1]}:1", f"{titles[0]}:3"]


def test_records_have_no_opening(make_log: Callable[..., Log], tokenizer: Any) -> None:
    table = pl.DataFrame({"instruction": ["Likes it?"], "input": ["Heat"]})
    log = dataclasses.replace(make_log([0], [1], [1], item=[-1], split=[0]), prompts=table)
    prompt = config.Prompt(layout="pointwise")
    assert encode.Encoder(log, prompt, tokenizer, "isolate").opening(5) == []
