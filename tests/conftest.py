"""Tiny models, tokenizers and logs, made in memory: no test needs the network or a download."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, settings

from peftrec.split import Log

# Nothing above imports a Hub client, which would read this once and for all.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Prepared data would fill the cache of whoever runs the tests.
os.environ["PEFTREC_PREPARED"] = "off"

# Two runs with two threads each on two cores wait for each other: a worker and what it starts keep to their own cores.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    number, count = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, cores[number::count] or cores)

# How long an example takes says more of the machine than of the code.
settings.register_profile("peftrec", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("peftrec")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that at the end no worker waits for another's."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


HEADER = "What this person rated, oldest first, and whether they liked each:\n"
# Titles 2k and 2k + 1 have equally many tokens, so that swapping them moves nothing else.
TITLES = [f"{name} ({year})" for name in ("Heat", "Toy Story", "What's Up, Doc?", "Film 12") for year in (1972, 1995)]
CORPUS = [HEADER + "".join(f"{title}: yes\n{title}: no\n" for title in TITLES)] * 3


def byte_level() -> Any:
    """A GPT-2-like tokenizer: bytes, digits one by one, `<s>` in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _fast(tokenizer)


def word_start() -> Any:
    """A Llama-2-like tokenizer: a mark at each word's start, also at the text's; unknown bytes as themselves."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<s>", "</s>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator([line for text in CORPUS for line in text.splitlines()], trainer)
    made = json.loads(tokenizer.to_str())
    vocabulary = made["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    made["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(made))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    return _fast(tokenizer)


def _fast(tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The byte-level tokenizer of the tiny models."""
    return byte_level()


@pytest.fixture(scope="session")
def word_start_tokenizer() -> Any:
    """A tokenizer that marks word starts (SentencePiece)."""
    return word_start()


def _save(model_type: type, model_config: Any, tokenizer: Any, folder: Path) -> Path:
    import torch

    torch.manual_seed(1)
    model_type(model_config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# Wide initial weights make attention far from uniform: what a token may see then changes the scores visibly.
SIZE = {"vocab_size": 320, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


@pytest.fixture(scope="session")
def tiny_llama_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama (hidden 32, 2 layers, 4 heads, 2 key heads, float32) with its tokenizer, as a saved folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        **SIZE,
    )
    return _save(LlamaForCausalLM, shape, tokenizer, tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_gpt2_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2: learned positions, fused projections, tied output matrix."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=512, **SIZE)
    return _save(GPT2LMHeadModel, shape, tokenizer, tmp_path_factory.mktemp("tiny-gpt2"))


@pytest.fixture(scope="session")
def tiny_qwen2_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2: biased projections, an output matrix of its own."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = Qwen2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        **SIZE,
    )
    return _save(Qwen2ForCausalLM, shape, tokenizer, tmp_path_factory.mktemp("tiny-qwen2"))


@pytest.fixture(scope="session")
def tiny_bert_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT without an output layer: an encoder, which has no next token."""
    from transformers import BertConfig, BertModel

    shape = BertConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=320,
        initializer_range=0.3,
    )
    return _save(BertModel, shape, tokenizer, tmp_path_factory.mktemp("tiny-bert"))


def build_log(
    user: list[int], time: list[int], label: list[int], item: list[int] | None = None, split: list[int] | None = None
) -> Log:
    """A Log over `TITLES` from plain lists, which must be sorted by user and time."""
    n = len(user)
    return Log(
        user=np.asarray(user, dtype=np.int32),
        item=np.asarray(item if item is not None else [i % len(TITLES) for i in range(n)], dtype=np.int32),
        timestamp=np.asarray(time, dtype=np.int64),
        label=np.asarray(label, dtype=np.int8),
        rating=None,
        split=np.asarray(split if split is not None else [0] * n, dtype=np.int8),
        user_ids=pl.Series("user_id", [f"u{code}" for code in range(max(user, default=-1) + 1)]),
        items=pl.DataFrame({"item_id": [f"i{code}" for code in range(len(TITLES))], "title": TITLES}),
    )


def random_log(seed: int, users: int = 4, events: int = 12, moments: int = 8) -> Log:
    """`users` x `events` random events at `moments` moments (so with ties); the last fifths are valid and test."""
    rng = np.random.default_rng(seed)
    n = users * events
    time = np.sort(rng.integers(0, moments, (users, events)), axis=1).ravel()
    split = np.select([time >= 0.8 * moments, time >= 0.6 * moments], [2, 1], 0)
    return build_log(
        np.repeat(np.arange(users), events).tolist(),
        time.tolist(),
        rng.integers(0, 2, n).tolist(),
        rng.integers(0, len(TITLES), n).tolist(),
        split.tolist(),
    )


@pytest.fixture(scope="session")
def make_log() -> Callable[..., Log]:
    """Build a Log from lists of user, time, label, item, split."""
    return build_log


@pytest.fixture(scope="session")
def make_random_log() -> Callable[..., Log]:
    """Draw a Log with ties, several users and all splits."""
    return random_log


@pytest.fixture(scope="session")
def header() -> str:
    """The prompt's first line in these tests."""
    return HEADER


@pytest.fixture(scope="session")
def titles() -> list[str]:
    """Item texts, by item code."""
    return TITLES


@pytest.fixture(scope="session")
def codec(tokenizer: Any) -> Any:
    """The prompt over the byte-level tokenizer."""
    from peftrec.prompts import Codec

    return Codec(tokenizer, HEADER, [" no", " yes"])


@pytest.fixture(scope="session")
def questions(codec: Any) -> Any:
    """Pieces of all titles."""
    from peftrec.prompts import Pieces

    return Pieces.of(codec.questions(TITLES, 64))


@pytest.fixture(scope="session")
def load_tiny(codec: Any) -> Callable[..., Any]:
    """Load a tiny model's folder the way a recipe does, with or without its answer head."""
    from peftrec import backbone, config, scorer

    def load(folder: Path, *, attention: Any = "sdpa", dtype: Any = "float32", answers: bool = True) -> Any:
        model = backbone.load(config.Model(name=str(folder), dtype=dtype, attn_implementation=attention)).model
        return scorer.answer_only(model, codec.answers) if answers else model

    return load


@pytest.fixture(scope="session")
def tiny_model(load_tiny: Callable[..., Any], tiny_llama_folder: Path) -> Any:
    """The tiny Llama with its answer head. Shared: tests must not change it."""
    return load_tiny(tiny_llama_folder)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A small adapter's folder, with nothing that could be loaded."""
    from hub_helpers import write_adapter

    return write_adapter(tmp_path / "adapter")


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were slept; nobody does."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    from peftrec import hub_client

    found: list[float] = []
    for module in (hub_client, _http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=found.append))
    return found


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slept: list[float]) -> Iterator[Any]:
    """A Hub in this process; requests go there, and the cache is new."""
    from hub_server import HubServer
    from huggingface_hub import close_session, constants
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    monkeypatch.delenv("HF_TOKEN", raising=False)
    disable_progress_bars()
    with HubServer() as running:
        # As HF_ENDPOINT, HF_HUB_CACHE, HF_HUB_DISABLE_XET and no HF_HUB_OFFLINE would say, had they been set at import.
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        yield running
        close_session()
    enable_progress_bars()
