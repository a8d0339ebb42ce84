"""Language modelling with an adapter on unlabelled texts: next tokens for causal models, masked ones for encoders.

Here the whole vocabulary is multiplied, which recommending never does. It is done for a few positions at a time, and
again in the backward pass, so that memory holds the logits of `CHUNK` positions and not of a whole batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import DataCollatorForLanguageModeling, Trainer

from peftrec import adapters, backbone, config, processes, train
from peftrec.draws import drawn_order
from peftrec.errors import ConfigError, DataError, ModelError
from peftrec.target import Target

CHUNK = 128  # positions whose logits are held at once
HELD_BACK = 0.1  # of the texts, to measure on
MASKED = 0.15  # of the tokens, for encoders
METHODS = ("lora", "bottleneck", "ia3", "ln_tuning")
LOGITS_CHANGED_BY = ("final_logit_softcapping", "logit_scale", "logits_scaling")

Objective = Literal["causal", "masked"]


@dataclass(frozen=True)
class LanguageModel:
    """A base model that predicts words, and the same model's facts as training to recommend would state them."""

    model: Any
    tokenizer: Any
    base: backbone.BaseModel
    objective: Objective
    new_head: bool
    """Whether the checkpoint lacks the head that predicts words: then it is trained too, and not kept."""


@dataclass(frozen=True)
class Learned:
    """What a training on texts came to; losses are means over the tokens to predict, in nats."""

    loss_before: float
    loss_after: float
    tokens: int
    seconds: float


def check(recipe: config.Recipe) -> None:
    """Check that the recipe's adapter can be trained on texts.

    Raises:
        ConfigError: its method cannot, or the model is quantized, or there are several processes.
    """
    if recipe.adapter.method not in METHODS:
        raise ConfigError(
            f"adapter.method: {recipe.adapter.method}; pretraining takes {', '.join(METHODS)}; choose one of them"
        )
    if (number := processes.group().num_processes) > 1:
        raise ConfigError(f"accelerate: {number} processes; pretraining runs in one; start it with python")
    if recipe.model.load_in_4bit or recipe.model.load_in_8bit:
        raise ConfigError("model: quantized; pretraining loads it whole; leave load_in_4bit and load_in_8bit out")


def load(recipe: config.Recipe) -> LanguageModel:
    """The recipe's base model with the head that its kind was made with.

    Raises:
        ModelError: it cannot be loaded, or its words are not the head's alone.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    loaded = backbone.load(recipe.model, Target(task=recipe.task, head=recipe.score.head))
    if loaded.kind == "seq2seq":
        raise ModelError(
            f"model.name: {recipe.model.name} is an encoder-decoder model; expected a causal one or an encoder"
        )
    objective: Objective = "causal" if loaded.kind == "causal" else "masked"
    if loaded.kind == "causal" and recipe.score.head == "tokens":
        model, new = loaded.model, False
    else:
        made = AutoModelForCausalLM if loaded.kind == "causal" else AutoModelForMaskedLM
        model, new = backbone.with_language_head(recipe.model, made)
    changed = [name for name in LOGITS_CHANGED_BY if getattr(model.config, name, None) not in (None, 1, 1.0)]
    if changed or len(_heads(model)) != 1:
        raise ModelError(
            f"model.name: {type(model).__name__} makes words by more than one layer on its last states "
            f"({', '.join(changed) or ', '.join(_heads(model))}); pretrain on another base model"
        )
    return LanguageModel(model, loaded.tokenizer, loaded.base, objective, new)


def _heads(model: Any) -> dict[str, nn.Module]:
    """What stands beside the trunk."""
    return {name: part for name, part in model.named_children() if name != model.base_model_prefix}


def blocks(texts: Sequence[str], tokenizer: Any, max_tokens: int) -> list[list[int]]:
    """Texts one after another, each on a line of its own, as token ids of at most `max_tokens`.

    A causal model's block begins with its first token if it has one; an encoder's stands between its special tokens,
    with a separator between texts. A text that is longer by itself is cut.
    """
    first = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    start = [] if first is None else [first]
    end = [] if tokenizer.sep_token_id is None else [tokenizer.sep_token_id]
    line = end or tokenizer("\n", add_special_tokens=False)["input_ids"]
    found: list[list[int]] = []
    block = list(start)
    for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        piece = [*ids[: max_tokens - len(start) - len(line)], *line]
        if len(block) + len(piece) > max_tokens:
            found.append(block)
            block = list(start)
        block += piece
    return [*found, block] if len(block) > len(start) else found


def chunked_loss(hidden: torch.Tensor, labels: torch.Tensor, head: nn.Module, chunk: int = CHUNK) -> torch.Tensor:
    """Sum of the cross entropies of the words at some positions, with the logits of `chunk` of them at a time.

    Args:
        hidden: last states at these positions, (n, H).
        labels: the words, (n,).
        head: last states -> logits of the vocabulary.
        chunk: positions.
    """

    def of(states: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(states).float(), words, reduction="sum")

    total = hidden.new_zeros((), dtype=torch.float32)
    for states, words in zip(torch.split(hidden, chunk), torch.split(labels, chunk), strict=True):
        total = total + checkpoint(of, states, words, use_reentrant=False)
    return total


def text_loss(model: Any, batch: dict[str, torch.Tensor], objective: Objective) -> tuple[torch.Tensor, int]:
    """Sum of the cross entropies over a collated batch, and how many tokens were to be predicted.

    Args:
        model: the language model, with or without an adapter in it.
        batch: from `DataCollatorForLanguageModeling`; labels of -100 are not predicted.
        objective: a causal model predicts at each position the next token.
    """
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    inputs = {key: value.to(inner.device) for key, value in batch.items()}
    labels = inputs.pop("labels")
    options = {"use_cache": False} if objective == "causal" else {}
    hidden = inner.base_model(**inputs, **options).last_hidden_state
    if objective == "causal":
        hidden, labels = hidden[:, :-1], labels[:, 1:]
    wanted = labels != -100
    ((_, head),) = _heads(inner).items()
    return chunked_loss(hidden[wanted], labels[wanted], head), int(wanted.sum())


class TextTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose loss never holds the logits of a whole batch."""

    def __init__(self, *args: Any, objective: Objective, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective: Objective = objective
        self.loss_is_scaled_for_ga = False  # a mean of its own batch, of which Trainer takes the mean over a step's

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Mean over the tokens to be predicted."""
        del return_outputs, num_items_in_batch
        total, count = text_loss(model, inputs, self.objective)
        return total / max(1, count)


def learn(language: LanguageModel, texts: Sequence[str], recipe: config.Recipe, folder: Path) -> tuple[Any, Learned]:
    """Train the recipe's adapter on `texts`; a tenth of them, drawn by the seed, is held back to measure on.

    Args:
        language: from `load`; its model gets the adapter.
        texts: different ones.
        recipe: adapter, training, `prompt.max_tokens` and seed count.
        folder: Trainer's.

    Returns:
        The model with the adapter, and what it came to.

    Raises:
        DataError: fewer than two texts.
        ModelError: the adapter does not fit the model.
    """
    if len(texts) < 2:
        raise DataError(f"texts: {len(texts)} different ones; expected two or more: name another file or template")
    tokenizer, objective = language.tokenizer, language.objective
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    order = [texts[place] for place in drawn_order(len(texts), recipe.seed, "texts").tolist()]
    back = max(1, round(HELD_BACK * len(order)))
    held, shown = (blocks(part, tokenizer, recipe.prompt.max_tokens) for part in (order[:back], order[back:]))
    collate = DataCollatorForLanguageModeling(
        tokenizer, mlm=objective == "masked", **({"mlm_probability": MASKED} if objective == "masked" else {})
    )
    model = adapters.attach(language.model, recipe.adapter, base_name=language.base.hub_id, seed=recipe.seed)
    if language.new_head:
        _thaw_head(model.get_base_model())
    before = _measure(model, held, collate, objective, recipe.seed)
    how = recipe.train
    trainer = TextTrainer(
        model=model,
        args=train.arguments(
            how,
            folder,
            recipe.seed,
            gradient_accumulation_steps=how.gradient_accumulation_steps,
            save_strategy="no",
        ),
        train_dataset=[{"input_ids": ids} for ids in shown],
        data_collator=collate,
        objective=objective,
    )
    result = trainer.train()
    passes = trainer.state.global_step / max(
        1, math.ceil(len(shown) / (how.per_device_train_batch_size * how.gradient_accumulation_steps))
    )
    after = _measure(model, held, collate, objective, recipe.seed)
    tokens = round(sum(map(len, shown)) * passes)
    return model, Learned(before, after, tokens, float(result.metrics["train_runtime"]))


def _thaw_head(model: Any) -> None:
    """Let a head that the checkpoint lacks train, but for what it shares with the embeddings."""
    shared = {id(p) for p in model.get_input_embeddings().parameters()}
    for part in _heads(model).values():
        for parameter in part.parameters():
            if id(parameter) not in shared:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)


@torch.inference_mode()
def _measure(model: Any, held: Sequence[list[int]], collate: Any, objective: Objective, seed: int) -> float:
    """Mean loss over the tokens of the texts held back; the same ones are masked each time."""
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = [text_loss(model, dict(collate([{"input_ids": ids}])), objective) for ids in held]
    model.train(was_training)
    return float(sum(float(total) for total, _ in found) / max(1, sum(count for _, count in found)))


def hash_of(texts: Sequence[str]) -> str:
    """sha256 of texts, whatever their order."""
    return hashlib.sha256("\0".join(sorted(texts)).encode()).hexdigest()
