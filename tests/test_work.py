"""How much is computed, in tokens and forwards: what a clock would show in seconds, without a clock's noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from samples import FILMS
from test_recommender import save_adapter
from torch.utils._python_dispatch import TorchDispatchMode

from peftrec import adapters, config, fused, scorer
from peftrec import train as training
from peftrec.recommender import Recommender
from peftrec.sight import training_sight
from peftrec.split import Log
from peftrec.target import Target
from peftrec.timeline import TimelineWindows, WindowDataset

VOCABULARY = 320  # of the tiny models; nothing else in these tests has this size


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Tokens of each forward through the model's layers."""
    found: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: found.append(inputs[0].numel()))
    try:
        yield found
    finally:
        hook.remove()


class Widths(TorchDispatchMode):
    """Names of the operations, backward ones too, that make something as wide as the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.wide: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor) and VOCABULARY in one.shape:
                self.wide.add(str(func))
        return out


def dataset(log: Log, codec: Any, questions: Any, tokens: int, **options: Any) -> WindowDataset:
    options = {"overlap": 0, "fill": False, **options}
    windows = TimelineWindows(log, codec, questions, training_sight(log), max_tokens=tokens, **options)
    return WindowDataset(windows, log.label, None, tokens)


def fit(model: Any, data: WindowDataset, folder: Path) -> training.Fitted:
    how = config.Train(evals=0, gradient_accumulation_steps=1)
    return training.fit(model, data, data, Target(), lambda *_: {}, train=how, folder=folder, seed=1)


@pytest.fixture
def log(make_log: Callable[..., Log]) -> Log:
    """Two people with ten events each, none at the same time, of one film: all take equally many tokens."""
    return make_log([0] * 10 + [1] * 10, list(range(20)), [1, 0] * 10, item=[0] * 20)


@pytest.fixture
def trained(load_tiny: Callable[..., Any], tiny_llama_folder: Path) -> Any:
    return adapters.attach(load_tiny(tiny_llama_folder), config.Adapter(r=4), base_name="tiny", seed=1)


class TestTraining:
    def test_an_event_goes_through_the_model_once(
        self, log: Log, trained: Any, codec: Any, questions: Any, tmp_path: Path
    ) -> None:
        header, event = len(codec.header), int(questions.lengths[0]) + codec.tail_length
        data = dataset(log, codec, questions, 1500)
        with counted(trained) as tokens:
            fitted = fit(trained, data, tmp_path)
        assert fitted.events == 20
        assert sum(tokens) == fitted.tokens == 2 * header + 20 * event

    def test_the_last_layer_feeds_forward_what_is_read(
        self, log: Log, trained: Any, codec: Any, questions: Any, tmp_path: Path
    ) -> None:
        (last,) = (module for module in trained.modules() if isinstance(module, fused.LastLayer))
        found: list[int] = []
        last.mlp.register_forward_hook(lambda _, inputs, __: found.append(inputs[0].shape[:-1].numel()))
        fitted = fit(trained, dataset(log, codec, questions, 1500), tmp_path)
        assert sum(found) == fitted.events == 20

    def test_the_overlap_is_all_that_is_read_again(
        self, log: Log, trained: Any, codec: Any, questions: Any, tmp_path: Path
    ) -> None:
        header, event = len(codec.header), int(questions.lengths[0]) + codec.tail_length
        # Six events a window: 0-5; 4 and 5 again with 6-9. Two windows for each person.
        data = dataset(log, codec, questions, header + 6 * event, overlap=2 * event)
        with counted(trained) as tokens:
            fit(trained, data, tmp_path)
        assert sum(tokens) == 2 * (2 * header + (10 + 2) * event)

    def test_one_prompt_an_event_costs_a_multiple(self, log: Log, codec: Any, questions: Any) -> None:
        header, event = len(codec.header), int(questions.lengths[0]) + codec.tail_length
        apart = dataset(log, codec, questions, 1500, fill=True, single=True)
        assert apart.events == 20
        assert apart.tokens == 20 * header + 2 * sum(range(1, 11)) * event

    def test_the_vocabulary_is_never_multiplied(
        self, log: Log, trained: Any, codec: Any, questions: Any, tmp_path: Path
    ) -> None:
        with Widths() as widths:
            fit(trained, dataset(log, codec, questions, 1500), tmp_path)
        assert not widths.wide

    def test_a_plain_model_would_be_noticed(self, load_tiny: Callable[..., Any], tiny_llama_folder: Path) -> None:
        model = load_tiny(tiny_llama_folder, answers=False)
        with Widths() as widths, torch.inference_mode():
            model(input_ids=torch.tensor([[0, 30, 40]]))
        assert widths.wide


@pytest.fixture(scope="module")
def recommender(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    folder = save_adapter(tiny_llama_folder, tmp_path_factory.mktemp("adapter"))
    return Recommender.from_pretrained(folder, base_model=tiny_llama_folder, items=FILMS, prior=False)


class TestScoring:
    def request(self, recommender: Recommender, candidates: int) -> tuple[list[Any], list[str], int]:
        """A history of four events, titles that are in no table, and the tokens that both take together."""
        history = [(10, 1), (11, 0), (12, 1), (13, 1)]
        titles = [f"Film {number:03}" for number in range(candidates)]
        codec = recommender.codec
        told = [event.item.text for event in recommender.events(history)]
        pieces = codec.questions([*told, *(f"{title} ()" for title in titles)], 32)
        return history, titles, len(codec.header) + 4 * codec.tail_length + sum(map(len, pieces))

    def test_history_and_candidates_are_read_once(self, recommender: Recommender) -> None:
        history, titles, together = self.request(recommender, 30)
        titles = [f"{title} ()" for title in titles]
        with counted(recommender.model) as tokens:
            scores = recommender.score(history, titles)
        assert len(scores) == 30
        assert sum(tokens) == together < scorer_chunk()
        assert len(tokens) <= 2  # the history, and all candidates at once

    def test_many_candidates_share_forwards(self, recommender: Recommender) -> None:
        history, titles, together = self.request(recommender, 300)
        with counted(recommender.model) as tokens:
            recommender.score(history, [f"{title} ()" for title in titles])
        assert sum(tokens) == together
        full = together / scorer_chunk()
        assert full > 2
        assert len(tokens) <= 1 + np.ceil(full * 1.05)  # a chunk may have room for less than a candidate

    def test_the_vocabulary_is_never_multiplied(self, recommender: Recommender) -> None:
        history, titles, _ = self.request(recommender, 30)
        with Widths() as widths:
            recommender.score(history, titles)
        assert not widths.wide


def scorer_chunk() -> int:
    """Candidate tokens in one forward."""
    import inspect

    size: int = inspect.signature(scorer.score_candidates).parameters["chunk_tokens"].default
    return size
