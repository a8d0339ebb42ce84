"""Virtual tokens: a prompt has one score, packed or alone, at once or behind a cache, here or under plain PEFT."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peftrec import adapters, backbone, config, scorer, virtual_tokens
from peftrec.prompts import Pieces
from peftrec.sight import evaluation_sight
from peftrec.split import Log
from peftrec.target import Target
from peftrec.timeline import TimelineWindows, WindowDataset, collate

COUNT = 5
METHODS = {
    "prefix": config.Adapter(method="prefix", num_virtual_tokens=COUNT),
    "prefix_projection": config.Adapter(
        method="prefix", num_virtual_tokens=COUNT, prefix_projection=True, encoder_hidden_size=8
    ),
    "prompt": config.Adapter(method="prompt", num_virtual_tokens=COUNT),
    "p_tuning": config.Adapter(method="p_tuning", num_virtual_tokens=COUNT, encoder_hidden_size=8),
    "p_tuning_lstm": config.Adapter(
        method="p_tuning", num_virtual_tokens=COUNT, encoder_reparameterization_type="LSTM", encoder_hidden_size=8
    ),
}
FOLDERS = ["tiny_llama_folder", "tiny_gpt2_folder", "tiny_qwen2_folder"]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def build(load_tiny: Callable[..., Any], request: pytest.FixtureRequest) -> Callable[..., Any]:
    """A tiny model with virtual tokens that are large enough to be seen in every score."""

    def make(method: str, folder: str = "tiny_llama_folder", attention: str = "sdpa") -> Any:
        base = load_tiny(request.getfixturevalue(folder), attention=attention)
        model = adapters.attach(base, METHODS[method], base_name="someone/tiny", seed=1)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
        return model.eval()

    return make


@pytest.fixture
def log(make_random_log: Callable[..., Log]) -> Log:
    """Two people, no ties: each event's prompt is a plain text."""
    drawn = make_random_log(3, users=2, events=6, moments=10)
    return dataclasses.replace(drawn, timestamp=np.arange(12), split=np.tile([0, 0, 0, 1, 2, 2], 2).astype(np.int8))


def packed(log: Log, codec: Any, questions: Any, tokens: int = 800) -> WindowDataset:
    sight = evaluation_sight(log, np.flatnonzero(log.split > 0), streaming=True)
    windows = TimelineWindows(log, codec, questions, sight, max_tokens=tokens, overlap=0, fill=True)
    return WindowDataset(windows, log.label, None, tokens)


def outputs_of(model: Any, data: WindowDataset) -> dict[int, list[float]]:
    rows, outputs = scorer.score_rows(model, data, range(len(data)))
    return dict(zip(rows.tolist(), outputs.tolist(), strict=True))


def prompt_of(log: Log, row: int, codec: Any, questions: Any) -> list[int]:
    """Token ids of one event's whole prompt: header, what the person met before, and the question."""
    pieces = [questions.flat[questions.start[i] : questions.start[i + 1]].tolist() for i in log.item]
    past = [i for i in range(len(log.user)) if log.user[i] == log.user[row] and log.timestamp[i] < log.timestamp[row]]
    known = [token for i in past for token in [*pieces[i], *codec.tail(int(log.label[i]))]]
    return [*codec.header, *known, *pieces[row]]


@pytest.mark.parametrize("folder", FOLDERS)
@every_method
def test_packed_rows_score_as_plain_peft_scores_each_prompt_alone(
    request: pytest.FixtureRequest,
    build: Callable[..., Any],
    tmp_path: Path,
    log: Log,
    codec: Any,
    questions: Any,
    method: str,
    folder: str,
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = build(method, folder)
    data = packed(log, codec, questions)
    assert len(data) == 1, "both people in one row"
    found = outputs_of(model, data)
    adapters.save(model, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(folder), attn_implementation="eager")
    plain = PeftModel.from_pretrained(base, tmp_path).eval()
    for row, outputs in found.items():
        ids = torch.tensor([prompt_of(log, row, codec, questions)])
        with torch.inference_mode():
            logits = plain(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1, codec.answers]
        np.testing.assert_allclose(outputs, logits, **CLOSE)


@every_method
def test_they_matter(build: Callable[..., Any], log: Log, codec: Any, questions: Any, method: str) -> None:
    """Without this the tests of equality could not fail."""
    model, data = build(method), packed(log, codec, questions)
    found = outputs_of(model, data)
    with model.disable_adapter():
        without = outputs_of(model, data)
    assert min(np.abs(np.subtract(found[row], without[row])).max() for row in found) > 0.01
    assert outputs_of(model, data) == found


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("chunk_tokens", [1, 25, 1024])
@every_method
def test_candidates_behind_a_cached_history(
    build: Callable[..., Any], log: Log, codec: Any, questions: Any, method: str, folder: str, chunk_tokens: int
) -> None:
    model = build(method, folder)
    row = int(np.flatnonzero(log.split == 2)[0])
    pieces = [questions.flat[a:b].tolist() for a, b in zip(questions.start, questions.start[1:], strict=False)]
    whole = prompt_of(log, row, codec, questions)
    history = np.asarray(whole[: len(whole) - len(pieces[log.item[row]])])
    found = scorer.score_candidates(model, history, Pieces.of(pieces[:4]), chunk_tokens=chunk_tokens)
    for piece, outputs in zip(pieces[:4], found, strict=True):
        ids = torch.tensor([[*history.tolist(), *piece]])
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
        np.testing.assert_allclose(outputs, logits, **CLOSE)


@pytest.mark.parametrize("folder", FOLDERS)
@every_method
def test_a_history_that_goes_on_from_the_last_one(
    build: Callable[..., Any], log: Log, codec: Any, questions: Any, method: str, folder: str
) -> None:
    """Longer, shorter, another one behind the same header, the same again, and one that shares nothing."""
    model = build(method, folder)
    pieces = [questions.flat[a:b].tolist() for a, b in zip(questions.start, questions.start[1:], strict=False)]
    header, asked = list(codec.header), Pieces.of(pieces[:2])
    lines = [[*piece, *codec.tail(1)] for piece in pieces[:3]]
    histories = [
        [*header, *lines[0]],
        [*header, *lines[0], *lines[1]],
        [*header, *lines[0]],
        [*header, *lines[2]],
        [*header, *lines[2]],
        lines[1],
    ]
    alone = [scorer.score_candidates(model, np.asarray(one), asked) for one in histories]
    with scorer.continued_histories():
        together = [scorer.score_candidates(model, np.asarray(one), asked) for one in histories]
    np.testing.assert_allclose(together, alone, **CLOSE)
    assert np.abs(alone[0] - alone[1]).max() > 0.01


@every_method
def test_candidates_without_any_history(build: Callable[..., Any], questions: Any, method: str) -> None:
    """The first chunk of candidates then fills the cache, and the next one must not fill it again."""
    model = build(method)
    pieces = [questions.flat[a:b].tolist() for a, b in zip(questions.start, questions.start[1:], strict=False)]
    none = np.zeros(0, dtype=np.int64)
    at_once, by_one = (
        scorer.score_candidates(model, none, Pieces.of(pieces), chunk_tokens=tokens) for tokens in (1024, 1)
    )
    np.testing.assert_allclose(at_once, by_one, **CLOSE)


@every_method
def test_the_cache_holds_them_once(build: Callable[..., Any], method: str) -> None:
    from transformers import DynamicCache

    model = build(method)
    cache = DynamicCache(config=model.config)
    ids = torch.arange(30, 38)[None]
    causal = torch.full((8, 8), torch.finfo(torch.float32).min).triu(1)[None, None]
    with torch.inference_mode():
        whole = model(input_ids=ids, attention_mask=causal).logits
        first = model(
            input_ids=ids[:, :5], attention_mask=causal[:, :, :5, :5], past_key_values=cache, use_cache=True
        ).logits
        assert cache.get_seq_length() == COUNT + 5
        rest = model(
            input_ids=ids[:, 5:], attention_mask=causal[:, :, 5:], past_key_values=cache, use_cache=True
        ).logits
    assert cache.get_seq_length() == COUNT + 8
    assert whole.shape == (1, 8, 2)
    torch.testing.assert_close(torch.cat((first, rest), dim=1), whole, **CLOSE)


@every_method
def test_rows_of_a_batch_do_not_mix(build: Callable[..., Any], method: str) -> None:
    model = build(method)
    ids = torch.tensor([[30, 40, 50, 60], [70, 80, 90, 99]])
    causal = torch.full((4, 4), torch.finfo(torch.float32).min).triu(1).expand(2, 1, 4, 4)
    with torch.inference_mode():
        both = model(input_ids=ids, attention_mask=causal).logits
        alone = [model(input_ids=row[None], attention_mask=causal[:1]).logits for row in ids]
    torch.testing.assert_close(both, torch.cat(alone), **CLOSE)


@every_method
def test_blocks_of_queries_beside_the_ordinary_kernel(build: Callable[..., Any], method: str) -> None:
    """The CPU kernel stops each block at its last key: the virtual tokens stand before all of them."""
    ids = torch.randint(2, 320, (1, 600), generator=torch.Generator().manual_seed(2))
    causal = torch.full((600, 600), torch.finfo(torch.float32).min).triu(1)[None, None]
    with torch.inference_mode():
        found, expected = (
            build(method, attention=kernel)(input_ids=ids, attention_mask=causal).logits for kernel in ("sdpa", "eager")
        )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@every_method
def test_only_they_are_trained(build: Callable[..., Any], log: Log, codec: Any, questions: Any, method: str) -> None:
    model = build(method).train()
    outputs = scorer.read_outputs(model, collate([packed(log, codec, questions)[0]]), torch.float32)
    outputs.pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("prompt_encoder" in name)
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # Two layers, keys and values, 2 heads of 8.
        ("prefix", COUNT * 2 * 2 * 16),
        # Embeddings of 16, which a network of 8 in the middle turns into the above.
        ("prefix_projection", COUNT * 16 + (16 * 8 + 8) + (8 * 64 + 64)),
        ("prompt", COUNT * 32),
        ("p_tuning", COUNT * 32 + (32 * 8 + 8) + (8 * 8 + 8) + (8 * 32 + 32)),
    ],
)
def test_trainable_parameters(build: Callable[..., Any], method: str, expected: int) -> None:
    model = build(method)
    assert adapters.trainable_parameters(model) == expected
    assert virtual_tokens.count(model) == COUNT


def test_other_models_have_none(tiny_model: Any) -> None:
    assert virtual_tokens.count(tiny_model) == 0


@pytest.mark.parametrize("method", [name for name in METHODS if not name.startswith("prefix")])
def test_checkpointing_changes_no_gradient(
    build: Callable[..., Any], log: Log, codec: Any, questions: Any, method: str
) -> None:
    batch = collate([packed(log, codec, questions)[0]])
    found = []
    for checkpointing in (False, True):
        model = build(method).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        scorer.read_outputs(model, batch, torch.float32).pow(2).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, **CLOSE)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_a_trained_head_reads_the_real_tokens_only(
    request: pytest.FixtureRequest, tmp_path: Path, log: Log, codec: Any, questions: Any, method: str
) -> None:
    """A causal model with a classifier in place of answer tokens."""
    target = Target("click", "classifier", "cross_entropy", (0.0, 1.0), (0.0, 0.0))
    base = config.Model(name=str(request.getfixturevalue("tiny_llama_folder")), dtype="float32")
    model = adapters.attach(backbone.load(base, target).model, METHODS[method], base_name="x", seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    model.eval()
    found = outputs_of(model, packed(log, codec, questions))
    for row, outputs in found.items():
        ids = torch.tensor([prompt_of(log, row, codec, questions)])
        causal = torch.full((ids.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)[None, None]
        with torch.inference_mode():
            alone = model(input_ids=ids, attention_mask=causal).logits
        assert alone.shape == (1, ids.shape[1], 2)
        np.testing.assert_allclose(outputs, alone[0, -1], **CLOSE)
    adapters.save(model, tmp_path)
    loaded = adapters.load(backbone.load(base, target).model, tmp_path)
    assert outputs_of(loaded, packed(log, codec, questions)) == found
    assert max(abs(no - yes) for no, yes in found.values()) > 0.1


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("words", [[5, 9, 7, 11, 3, 8, 2], [5, 9, 7]], ids=["longer", "shorter"])
@pytest.mark.parametrize("method", ["prefix", "p_tuning"])
def test_virtual_tokens_begin_as_a_text(
    load_tiny: Callable[..., Any], request: pytest.FixtureRequest, folder: str, method: str, words: list[int]
) -> None:
    """Before any training the model reads a prompt as if the text stood in front of it."""
    base = load_tiny(request.getfixturevalue(folder))
    text = (words * 2)[:COUNT]
    prompt = [4, 6, 10]
    with torch.inference_mode():
        expected = base(input_ids=torch.tensor([text + prompt])).logits[:, COUNT:]
        bare = base(input_ids=torch.tensor([prompt])).logits
    asked: list[int] = []
    model = adapters.attach(
        base, METHODS[method], base_name="x", seed=1, opening=lambda tokens: asked.append(tokens) or words
    ).eval()
    with torch.inference_mode():
        found = model(input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, 3)).logits[:, -3:]
    assert asked == [COUNT]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert float((bare - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("method", ["prefix_projection", "p_tuning_lstm"])
def test_other_virtual_tokens_begin_as_they_are_drawn(
    load_tiny: Callable[..., Any], tiny_llama_folder: Path, method: str
) -> None:
    drawn = [
        adapters.attach(
            load_tiny(tiny_llama_folder), METHODS[method], base_name="x", seed=1, opening=opening
        ).prompt_encoder.state_dict()
        for opening in (None, lambda tokens: [1] * tokens)
    ]
    assert drawn[0].keys() == drawn[1].keys() != set()
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
