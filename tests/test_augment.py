"""Options against overfitting that change what a training window shows: what is drawn, and that nothing else moves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from peftrec import encode
from peftrec.augment import Augment
from peftrec.config import Prompt, Recipe, parse_recipe
from peftrec.errors import ConfigError
from peftrec.side_vectors import BITS, MarkedWindows
from peftrec.sight import training_sight
from peftrec.split import Log
from peftrec.timeline import TimelineWindows, WindowDataset, Wordings

OTHER = "Films of one viewer:"


def recipe(**sections: Any) -> Recipe:
    return parse_recipe({"data": {"name": "ml-100k"}, "output_dir": "x", **sections}, "recipe")


@pytest.fixture(scope="module")
def log(make_log: Callable[..., Log]) -> Log:
    """Two people; the first has events at 0, 5, 5, 30, 31 and 100 seconds, the second at 0 and 1."""
    return make_log([0] * 6 + [1] * 2, [0, 5, 5, 30, 31, 100, 0, 1], [0, 1, 1, 0, 1, 0, 1, 0])


def windows(log: Log, codec: Any, questions: Any, augment: Augment | None, **more: Any) -> TimelineWindows:
    headers = more.pop("headers", ())
    room = max(map(len, headers), default=None)
    settings = {"max_tokens": 300, "overlap": 0, "fill": False, "header_room": room, **more}
    made = TimelineWindows(log, codec, questions, training_sight(log), **settings)
    if augment is not None:
        made.vary(augment, headers, single=bool(more.get("single")))
    return made


def shown(arrays: dict[str, np.ndarray], log: Log) -> list[tuple[int, bool]]:
    """The log's row and visibility of each event of a window, in reading order."""
    found = []
    for event in range(1, int(arrays["event"].max()) + 1):
        of_event = arrays["event"] == event
        (row,) = arrays["row"][of_event & (arrays["row"] >= 0)]
        found.append((int(row), bool(arrays["visible"][of_event][0])))
    return found


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_near_events_change_places_within_their_group() -> None:
    seconds = np.array([0, 5, 5, 30, 31, 100])
    augment = Augment(seed=1, shuffle_within=10)
    drawn = {tuple(augment.order(epoch, 0, seconds).tolist()) for epoch in range(60)}
    # Groups by hand: 0, 5 and 5 are within 10 seconds of 0; 30 and 31; 100 alone.
    assert {tuple(sorted(one[:3])) for one in drawn} == {(0, 1, 2)}
    assert {tuple(sorted(one[3:5])) for one in drawn} == {(3, 4)}
    assert {one[5] for one in drawn} == {5}
    assert len(drawn) == 12  # all 3! x 2 orders, in 60 draws
    assert Augment(seed=1).order(0, 0, seconds).tolist() == [0, 1, 2, 3, 4, 5]
    still = {tuple(augment.order(epoch, 0, seconds[:3], still=1).tolist()) for epoch in range(30)}
    assert still == {(0, 1, 2), (1, 0, 2)}


def test_a_group_ends_so_many_seconds_after_its_first_event() -> None:
    """Steps of 6 seconds would otherwise chain a whole evening into one group."""
    orders = [Augment(1, shuffle_within=10).order(epoch, 0, np.arange(0, 24, 6)).tolist() for epoch in range(30)]
    assert {tuple(sorted(one[:2])) for one in orders} == {(0, 1)}


def test_dropout_hides_its_share_and_sampling_keeps_its_number() -> None:
    visible = np.array([True] * 900 + [False] * 100)
    dropped = Augment(seed=1, history_dropout=0.3).visible(0, 0, visible)
    assert abs(dropped[:900].mean() - 0.7) < 0.04
    assert not dropped[900:].any()
    sampled = Augment(seed=1, history_sample=8).visible(0, 0, visible)
    assert sampled.sum() == 8
    assert not sampled[900:].any()
    counts = sum(Augment(seed=1, history_sample=8).visible(epoch, 0, visible[:16]) for epoch in range(400))
    assert (np.abs(counts / 400 - 0.5) < 0.1).all()  # each of 16 as often as any other
    assert Augment(seed=1, history_sample=8).visible(0, 0, visible[:5]).all()
    assert Augment(seed=1, history_dropout=0.99).visible(0, 0, np.ones(5, dtype=bool), still=2)[3:].all()


def test_draws_depend_on_seed_epoch_and_window_alone() -> None:
    visible = np.ones(40, dtype=bool)

    def drawn(seed: int, epoch: int, window: int) -> tuple[bool, ...]:
        return tuple(Augment(seed, history_dropout=0.5).visible(epoch, window, visible).tolist())

    assert drawn(1, 2, 3) == drawn(1, 2, 3)
    assert len({drawn(*one) for one in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2))}) == 5
    both = Augment(1, history_dropout=0.5, shuffle_within=9).visible(2, 3, visible)
    assert tuple(both.tolist()) == drawn(1, 2, 3)  # one option does not move what another draws


def test_wordings_are_drawn_evenly() -> None:
    drawn = [Augment(seed=1, wordings=3).wording(epoch, 5) for epoch in range(300)]
    assert (np.abs(np.bincount(drawn) / 300 - 1 / 3) < 0.1).all()


# --- what a window shows ----------------------------------------------------------------------------------------------


def test_a_hidden_event_is_asked_and_not_seen(log: Log, codec: Any, questions: Any) -> None:
    plain = windows(log, codec, questions, None)
    hidden = windows(log, codec, questions, Augment(seed=3, history_dropout=0.5))
    for index in range(len(plain)):
        before, after = plain.arrays(index), hidden.arrays(index)
        assert [row for row, _ in shown(before, log)] == [row for row, _ in shown(after, log)]
        assert (before["input_ids"] == after["input_ids"]).all()
    some = shown(hidden.arrays(0), log)
    assert 0 < sum(seen for _, seen in some) < len(some)
    # Positions count what can be seen, as in a prompt without the hidden events.
    arrays = hidden.arrays(0)
    first_unseen = next(place for place, (_, seen) in enumerate(some) if not seen)
    starts = [int(arrays["position_ids"][arrays["event"] == event][0]) for event in range(1, len(some) + 1)]
    lengths = [int((arrays["event"] == event).sum()) for event in range(1, len(some) + 1)]
    later = next(k for k in range(first_unseen + 1, len(some)) if log.timestamp[k] > log.timestamp[first_unseen])
    seen_before = [k for k in range(later) if some[k][1] and log.timestamp[k] < log.timestamp[later]]
    assert starts[later] == len(codec.header) + sum(lengths[k] for k in seen_before)


def test_what_is_neither_seen_nor_asked_takes_no_room(log: Log, codec: Any, questions: Any) -> None:
    size = {"max_tokens": 80, "overlap": 60}
    plain = windows(log, codec, questions, None, **size)
    later = next(index for index, span in enumerate(plain.spans.tolist()) if span[1] > span[0])
    hidden = windows(log, codec, questions, Augment(seed=1, history_dropout=0.999), **size)
    asked = [row for row in plain.arrays(later)["row"].tolist() if row >= 0]
    arrays = hidden.arrays(later)
    assert [row for row in arrays["row"].tolist() if row >= 0] == asked
    assert int(arrays["event"].max()) == len(asked) < int(plain.arrays(later)["event"].max())


def test_events_change_places_and_times_stay(log: Log, codec: Any, questions: Any) -> None:
    moved = windows(log, codec, questions, Augment(seed=1, shuffle_within=10))
    plain, orders = windows(log, codec, questions, None).arrays(0), set()
    for epoch in range(12):
        moved.epoch = epoch
        arrays = moved.arrays(0)
        rows = [row for row, _ in shown(arrays, log)]
        orders.add(tuple(rows))
        assert sorted(rows[:3]) == [0, 1, 2]
        assert sorted(rows[3:5]) == [3, 4]
        times = [int(arrays["time"][arrays["event"] == event][0]) for event in range(1, 7)]
        assert times == [int(plain["time"][plain["event"] == event][0]) for event in range(1, 7)]
    assert len(orders) > 3


def test_a_lone_question_stays_behind_its_history(log: Log, codec: Any, questions: Any) -> None:
    single = windows(log, codec, questions, Augment(seed=1, shuffle_within=1000, history_sample=1), single=True)
    for index, span in enumerate(single.spans.tolist()):
        arrays = single.arrays(index)
        (row,) = (row for row in arrays["row"].tolist() if row >= 0)
        assert row == span[2]
        assert arrays["row"][arrays["event"] == arrays["event"].max()].max() == row
        assert int(arrays["event"].max()) <= 2  # one event of its history and itself


def test_a_header_is_drawn_and_the_first_stays_for_evaluation(log: Log, codec: Any, questions: Any) -> None:
    headers = [codec.header, codec.prompt(OTHER + "\n")]
    worded = windows(log, codec, questions, Augment(seed=1, wordings=2), headers=headers)
    begins = set()
    for epoch in range(10):
        worded.epoch = epoch
        arrays = worded.arrays(0)
        begins.add(tuple(arrays["input_ids"][arrays["event"] == 0].tolist()))
        assert len(arrays["input_ids"]) <= worded.lengths[0]
    assert begins == {tuple(one) for one in headers}
    assert codec.header == headers[0]


def test_vectors_beside_the_text_go_with_their_events(log: Log, codec: Any, questions: Any) -> None:
    numbers = np.arange(1, len(log) + 1)
    moved = windows(log, codec, questions, Augment(seed=1, shuffle_within=10, history_dropout=0.3))
    marked = MarkedWindows(moved, numbers)
    for epoch in range(6):
        marked.epoch = epoch
        arrays = marked.arrays(0)
        found = [int(one) for one in (arrays["input_ids"] >> BITS) if one]
        rows = [row for row, _ in shown(arrays, log)]
        assert found == [row + 1 for row in rows]
        assert rows == marked.shown(0).tolist()


def test_an_epoch_is_the_same_whoever_reads_it(log: Log, codec: Any, questions: Any) -> None:
    augment = Augment(seed=1, history_dropout=0.5, shuffle_within=10)
    one, other = (WindowDataset(windows(log, codec, questions, augment), log.label, None, 300) for _ in range(2))
    for data in (one, other):
        data.set_epoch(4)
    assert all((one[0][key] == other[0][key]).all() for key in one[0])
    other.set_epoch(5)
    assert any(len(one[0][key]) != len(other[0][key]) or (one[0][key] != other[0][key]).any() for key in one[0])
    plain = WindowDataset(windows(log, codec, questions, None), log.label, None, 300)
    before = plain[0]
    plain.set_epoch(5)
    assert all((before[key] == plain[0][key]).all() for key in before)


# --- in a recipe ------------------------------------------------------------------------------------------------------


def test_a_recipe_that_asks_for_nothing_draws_nothing() -> None:
    assert Augment.of(recipe()) is None
    asked = recipe(
        train={"history_dropout": 0.2, "history_sample": 5, "shuffle_within": 60}, prompt={"paraphrases": ["A"]}
    )
    assert Augment.of(asked) == Augment(13, 0.2, 5, 60, 2)


def test_templates_are_drawn(log: Log, tokenizer: Any) -> None:
    prompt = Prompt(
        layout="pointwise",
        template="{history}Next: {item}",
        paraphrases=["So far: {history}Now {item}"],
        max_tokens=200,
    )
    encoder = encode.Encoder(log, prompt, tokenizer, "isolate")
    augment = Augment(seed=1, wordings=2)
    data, own = encoder.train(None, augment), encoder.train(None)
    assert isinstance(data.windows, Wordings)
    assert [(a, b) for a, b in zip(data.windows.lengths, own.windows.lengths, strict=True) if a < b] == []
    texts = set()
    for epoch in range(12):
        data.set_epoch(epoch)
        texts.add(tokenizer.decode(data.windows.arrays(3)["input_ids"], skip_special_tokens=True))
    assert len(texts) == 2
    assert {text.startswith("So far: ") for text in texts} == {True, False}
    evaluated = encoder.evaluate(np.arange(8), "streaming", None)
    assert not isinstance(evaluated.windows, Wordings)


def test_headers_are_drawn(log: Log, tokenizer: Any) -> None:
    encoder = encode.Encoder(log, Prompt(paraphrases=[OTHER], max_tokens=200, overlap=20), tokenizer, "isolate")
    data = encoder.train(None, Augment(seed=1, wordings=2))
    begins = set()
    for epoch in range(10):
        data.set_epoch(epoch)
        begins.add(tokenizer.decode(data[0]["input_ids"], skip_special_tokens=True).splitlines()[0])
    assert begins == {encoder.codec.header_text.strip(), OTHER}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"train": {"history_dropout": 0.1}, "prompt": {"layout": "pointwise", "template": "{history}{item}"}},
         "train.history_dropout: does nothing under prompt.template"),
        ({"train": {"shuffle_within": 9, "order": "random"}, "eval": {"history": "frozen"}},
         "train.shuffle_within: does nothing under train.order: random"),
        ({"prompt": {"layout": "pointwise", "template": "{history}{item}", "paraphrases": ["{item} only"]}},
         "prompt.paraphrases: '{item} only'; expected {history}, {item} in it"),
        ({"prompt": {"layout": "pointwise", "template": "{history}{item}", "paraphrases": ["{history}{item.x}"]}},
         "is not a plain {column}; expected a template"),
        ({"train": {"average_checkpoints": 5}}, "train.average_checkpoints: 5; a run saves as many checkpoints"),
        ({"train": {"average_checkpoints": 2}, "adapter": {"method": "adalora"}}, "its ranks differ"),
        ({"train": {"fgm_epsilon": 1, "torch_compile": True}}, "train.fgm_epsilon: 1.0; it moves embeddings"),
        ({"prompt": {"paraphrases": ["A"]}, "adapter": {"method": "none"}}, "prompt.paraphrases: does nothing under"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(**sections)
    assert any(said in line for line in str(caught.value).splitlines()), str(caught.value)


def test_the_defaults_change_nothing(log: Log, codec: Any, questions: Any) -> None:
    nothing = dataclasses.replace(Augment(seed=1))
    one, other = windows(log, codec, questions, nothing).arrays(0), windows(log, codec, questions, None).arrays(0)
    assert all((one[key] == other[key]).all() for key in one)
