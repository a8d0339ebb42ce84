"""Scores: one event knows what it may know, however the tokens are cut, packed, batched or cached."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftrec import scorer
from peftrec.errors import ModelError
from peftrec.prompts import Pieces
from peftrec.sight import Sight, evaluation_sight, training_sight
from peftrec.split import Log
from peftrec.target import Target
from peftrec.timeline import TimelineWindows, WindowDataset, collate

WAYS = ["train", "streaming", "frozen"]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def sight_of(log: Log, way: str, liked: bool = False, ordered: bool = False) -> Sight:
    if way == "train":
        return training_sight(log, liked_only=liked, ordered_ties=ordered)
    rows = np.flatnonzero(log.split > 0)
    return evaluation_sight(log, rows, streaming=way == "streaming", liked_only=liked, ordered_ties=ordered)


def dataset(log: Log, codec: Any, questions: Any, sight: Sight, tokens: int = 1500, **options: Any) -> WindowDataset:
    options = {"overlap": 0, "fill": True, **options}
    windows = TimelineWindows(log, codec, questions, sight, max_tokens=tokens, **options)
    return WindowDataset(windows, log.label, None, tokens)


def log_odds(outputs: Any) -> Any:
    return outputs[..., 1] - outputs[..., 0]


def scores_of(model: Any, data: WindowDataset) -> dict[int, float]:
    rows, outputs = scorer.score_rows(model, data, range(len(data)))
    return dict(zip(rows.tolist(), log_odds(outputs).tolist(), strict=True))


def same(found: dict[int, float], expected: dict[int, float]) -> None:
    assert found.keys() == expected.keys()
    rows = sorted(found)
    np.testing.assert_allclose([found[r] for r in rows], [expected[r] for r in rows], **CLOSE)


def text_before(log: Log, row: int, past: list[int], header: str, titles: list[str]) -> str:
    lines = [f"{titles[log.item[i]]}:{(' no', ' yes')[log.label[i]]}\n" for i in past]
    return header + "".join(lines) + titles[log.item[row]] + ":"


class TestAnswerHead:
    @pytest.mark.parametrize("folder", ["tiny_llama_folder", "tiny_gpt2_folder", "tiny_qwen2_folder"])
    def test_equals_those_rows_of_the_whole_output(
        self, request: pytest.FixtureRequest, load_tiny: Callable[..., Any], codec: Any, folder: str
    ) -> None:
        path: Path = request.getfixturevalue(folder)
        ids = torch.tensor([[0, 30, 40, 50]])
        with torch.inference_mode():
            whole = load_tiny(path, answers=False)(input_ids=ids).logits
            rows = load_tiny(path)(input_ids=ids).logits
        assert rows.shape == (1, 4, 2)
        torch.testing.assert_close(rows, whole[..., codec.answers])

    def test_bias_of_the_output_counts(self) -> None:
        output = torch.nn.Linear(3, 5)
        head = scorer.AnswerHead(output, [4, 1])
        hidden = torch.randn(2, 6, 3)
        torch.testing.assert_close(head(hidden), output(hidden)[..., [4, 1]])

    def test_nothing_to_train_or_save(self) -> None:
        head = scorer.AnswerHead(torch.nn.Linear(3, 5).bfloat16(), [0, 1])
        assert not list(head.parameters())
        assert not head.state_dict()
        assert head(torch.randn(1, 1, 3).bfloat16()).dtype == torch.float32

    def test_a_model_without_output_matrix(self, tiny_llama_folder: Path) -> None:
        from transformers import AutoModel

        with pytest.raises(ModelError, match="no output matrix"):
            scorer.answer_only(AutoModel.from_pretrained(tiny_llama_folder), [1, 2])


def test_sight_mask_by_hand() -> None:
    # Header, A at time 1 (hidden from others), B and C tied at 2, D at 3, then another window and padding.
    batch = {
        "event": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0]]),
        "time": torch.tensor([[0, 1, 2, 2, 3, 0, 1, 0]]),
        "segment": torch.tensor([[0, 0, 0, 0, 0, 1, 1, -1]]),
        "visible": torch.tensor([[True, False, True, True, True, True, True, False]]),
    }
    seen = (scorer.sight_mask(batch, torch.float32)[0, 0] == 0).int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0, 0, 0],
        [1, 0, 0, 1, 0, 0, 0, 0],
        [1, 0, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("folder", ["tiny_llama_folder", "tiny_gpt2_folder", "tiny_qwen2_folder"])
def test_without_ties_it_is_a_plain_causal_forward_of_the_text(
    request: pytest.FixtureRequest,
    load_tiny: Callable[..., Any],
    make_random_log: Callable[..., Log],
    codec: Any,
    questions: Any,
    tokenizer: Any,
    header: str,
    titles: list[str],
    folder: str,
    way: str,
) -> None:
    path: Path = request.getfixturevalue(folder)
    log = make_random_log(3, users=2, events=6, moments=10)
    log = dataclasses.replace(log, timestamp=np.arange(12), split=np.tile([0, 0, 0, 1, 2, 2], 2).astype(np.int8))
    found = scores_of(load_tiny(path), dataset(log, codec, questions, sight_of(log, way), 500))
    plain = load_tiny(path, attention="eager", answers=False)
    expected = {}
    for row in found:
        mine = [i for i in range(12) if log.user[i] == log.user[row]]
        past = [i for i in mine if (log.split[i] == 0 if way == "frozen" else i < row)]
        text = text_before(log, row, past, header, titles)
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.inference_mode():
            logits = plain(input_ids=torch.tensor([ids])).logits[0, -1]
        expected[row] = float(logits[codec.answers[1]] - logits[codec.answers[0]])
    same(found, expected)


@given(seed=st.integers(0, 9999), way=st.sampled_from(WAYS), liked=st.booleans(), ordered=st.booleans())
@settings(max_examples=15)
def test_timeline_equals_one_prompt_per_event(
    make_random_log: Callable[..., Log],
    tiny_model: Any,
    codec: Any,
    questions: Any,
    seed: int,
    way: str,
    liked: bool,
    ordered: bool,
) -> None:
    log = make_random_log(seed, users=2, events=6, moments=5)
    sight = sight_of(log, way, liked, ordered)
    whole = dataset(log, codec, questions, sight)
    single = dataset(log, codec, questions, sight, single=True)
    assert len(single.windows) == sight.read.sum()
    same(scores_of(tiny_model, whole), scores_of(tiny_model, single))


def test_packed_rows_equal_windows_alone(
    make_random_log: Callable[..., Log], tiny_model: Any, codec: Any, questions: Any
) -> None:
    log = make_random_log(5)
    sight = sight_of(log, "streaming")
    packed = dataset(log, codec, questions, sight)
    alone = dataset(log, codec, questions, sight)
    alone.rows = [[index] for index in range(len(alone.windows))]
    assert len(packed) < len(alone)
    same(scores_of(tiny_model, packed), scores_of(tiny_model, alone))


def test_batched_rows_equal_rows_alone(
    make_random_log: Callable[..., Log], tiny_model: Any, codec: Any, questions: Any
) -> None:
    data = dataset(make_random_log(6), codec, questions, sight_of(make_random_log(6), "streaming"))
    data.rows = [[index] for index in range(len(data.windows))]
    batch = collate([data[index] for index in range(len(data))])
    with torch.inference_mode():
        scores = log_odds(scorer.read_outputs(tiny_model, batch, torch.float32))
    rows = batch["row"][batch["labels"] >= 0].tolist()
    assert len({len(data[index]["row"]) for index in range(len(data))}) > 1  # so that there is padding
    same(dict(zip(rows, scores.tolist(), strict=True)), scores_of(tiny_model, data))


def test_padding_is_finite_in_bfloat16(
    make_random_log: Callable[..., Log],
    load_tiny: Callable[..., Any],
    tiny_llama_folder: Path,
    codec: Any,
    questions: Any,
) -> None:
    log = make_random_log(6)
    data = dataset(log, codec, questions, sight_of(log, "streaming"))
    data.rows = [[index] for index in range(len(data.windows))]
    model = load_tiny(tiny_llama_folder, dtype="bfloat16")
    with torch.inference_mode():
        scores = log_odds(scorer.read_outputs(model, collate([data[i] for i in range(len(data))]), torch.bfloat16))
    assert torch.isfinite(scores).all()


class TestNoLeak:
    """Change everything that an event must not know: its score stays."""

    def changed(self, log: Log, row: int, way: str, ordered: bool) -> Log:
        """The log with other labels and other films of equal length wherever `row` must not look."""
        index = np.arange(len(log.user))
        earlier = index < row if ordered else log.timestamp < log.timestamp[row]
        if way == "frozen":
            earlier = log.split == 0
        hidden = (log.user != log.user[row]) | ~earlier
        label = np.where(hidden, 1 - log.label, log.label).astype(np.int8)
        item = np.where(hidden & (index != row), log.item ^ 1, log.item).astype(np.int32)
        assert (label != log.label).sum() > 1
        return dataclasses.replace(log, label=label, item=item)

    @given(
        seed=st.integers(0, 9999),
        way=st.sampled_from(WAYS),
        ordered=st.booleans(),
        tokens=st.sampled_from([60, 100, 1500]),
        single=st.booleans(),
        which=st.integers(0, 99),
    )
    @settings(max_examples=30)
    def test_of_labels_and_films(
        self,
        make_random_log: Callable[..., Log],
        tiny_model: Any,
        codec: Any,
        questions: Any,
        seed: int,
        way: str,
        ordered: bool,
        tokens: int,
        single: bool,
        which: int,
    ) -> None:
        log = make_random_log(seed, users=2, events=8, moments=6)
        read = np.flatnonzero(log.split == 0 if way == "train" else log.split > 0)
        if len(read) == 0:
            return
        row = int(read[which % len(read)])
        found = [
            scores_of(
                tiny_model,
                dataset(one, codec, questions, sight_of(one, way, False, ordered), tokens, overlap=20, single=single),
            )[row]
            for one in (log, self.changed(log, row, way, ordered))
        ]
        np.testing.assert_allclose(found[0], found[1], atol=1e-5, rtol=0)

    @given(seed=st.integers(0, 9999), way=st.sampled_from(WAYS), which=st.integers(0, 99))
    @settings(max_examples=15)
    def test_of_labels_where_only_the_liked_are_shown(
        self,
        make_random_log: Callable[..., Log],
        tiny_model: Any,
        codec: Any,
        questions: Any,
        seed: int,
        way: str,
        which: int,
    ) -> None:
        log = make_random_log(seed, users=2, events=8, moments=6)
        read = np.flatnonzero(log.split == 0 if way == "train" else log.split > 0)
        if len(read) == 0:
            return
        row = int(read[which % len(read)])
        found = [
            scores_of(tiny_model, dataset(one, codec, questions, sight_of(one, way, True)))[row]
            for one in (log, self.changed(log, row, way, False))
        ]
        np.testing.assert_allclose(found[0], found[1], atol=1e-5, rtol=0)

    def test_can_fail(self, make_log: Callable[..., Log], tiny_model: Any, codec: Any, questions: Any) -> None:
        """The same change to an *earlier* event does move the score."""
        found = []
        for label in (0, 1):
            log = make_log([0, 0], [1, 2], [label, 1])
            found.append(scores_of(tiny_model, dataset(log, codec, questions, training_sight(log)))[1])
        assert abs(found[0] - found[1]) > 0.01


class TestScoreCandidates:
    @pytest.fixture
    def log(self, make_log: Callable[..., Log]) -> Log:
        return make_log([0] * 7, [1, 2, 3, 9, 9, 9, 9], [1, 0, 1, 0, 1, 1, 0], split=[0, 0, 0, 2, 2, 2, 2])

    def parts(self, log: Log, codec: Any, questions: Any) -> tuple[np.ndarray, Pieces]:
        past = list(codec.header)
        pieces = [questions.flat[questions.start[i] : questions.start[i + 1]].tolist() for i in log.item]
        for row in range(3):
            past += pieces[row] + codec.tail(int(log.label[row]))
        return np.asarray(past), Pieces.of(pieces[3:])

    @pytest.mark.parametrize("folder", ["tiny_llama_folder", "tiny_gpt2_folder", "tiny_qwen2_folder"])
    @pytest.mark.parametrize("chunk_tokens", [1, 25, 1024])
    def test_equals_the_packed_way(
        self,
        request: pytest.FixtureRequest,
        load_tiny: Callable[..., Any],
        log: Log,
        codec: Any,
        questions: Any,
        folder: str,
        chunk_tokens: int,
    ) -> None:
        model = load_tiny(request.getfixturevalue(folder))
        history, candidates = self.parts(log, codec, questions)
        found = log_odds(scorer.score_candidates(model, history, candidates, chunk_tokens=chunk_tokens))
        expected = scores_of(model, dataset(log, codec, questions, sight_of(log, "frozen")))
        np.testing.assert_allclose(found, [expected[row] for row in (3, 4, 5, 6)], **CLOSE)

    def test_order_of_candidates_does_not_matter(self, tiny_model: Any, log: Log, codec: Any, questions: Any) -> None:
        history, candidates = self.parts(log, codec, questions)
        lists = [candidates.flat[a:b].tolist() for a, b in zip(candidates.start, candidates.start[1:], strict=False)]
        found = scorer.score_candidates(tiny_model, history, candidates)
        back = scorer.score_candidates(tiny_model, history, Pieces.of(lists[::-1]))
        np.testing.assert_allclose(found, back[::-1], **CLOSE)

    def test_another_model_begins_anew(
        self,
        tiny_model: Any,
        load_tiny: Callable[..., Any],
        tiny_llama_folder: Path,
        log: Log,
        codec: Any,
        questions: Any,
    ) -> None:
        history, candidates = self.parts(log, codec, questions)
        other = load_tiny(tiny_llama_folder)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.1)
        with scorer.continued_histories():
            scorer.score_candidates(tiny_model, history, candidates)
            found = scorer.score_candidates(other, history, candidates)
        np.testing.assert_array_equal(found, scorer.score_candidates(other, history, candidates))

    def test_empty_history_and_no_candidates(self, tiny_model: Any, log: Log, codec: Any, questions: Any) -> None:
        _, candidates = self.parts(log, codec, questions)
        cold = scorer.score_candidates(tiny_model, np.asarray(codec.header), candidates)
        assert np.isfinite(cold).all()
        assert len(scorer.score_candidates(tiny_model, np.asarray(codec.header), Pieces.of([]))) == 0


class TestLoss:
    def test_by_hand(self, make_log: Callable[..., Log], tiny_model: Any, codec: Any, questions: Any) -> None:
        log = make_log([0, 0, 1], [1, 2, 1], [1, 0, 1])
        data = dataset(log, codec, questions, training_sight(log))
        data.prior = np.array([0.5, -1.0, 2.0], dtype=np.float32)
        scores = scores_of(tiny_model, data)  # without the prior
        total = [scores[row] + data.prior[row] for row in range(3)]
        expected = sum(np.log1p(np.exp(-s if y else s)) for s, y in zip(total, log.label, strict=True)) / 6
        with torch.inference_mode():
            loss = scorer.interaction_loss(tiny_model, collate([data[0]]), torch.float32, Target(), 6)
        assert len(data) == 1
        np.testing.assert_allclose(float(loss), expected, rtol=1e-4)
