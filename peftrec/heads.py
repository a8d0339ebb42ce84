"""Base models of three kinds and what stands on them, called in one way whatever they are.

`model(input_ids=(B, T), attention_mask=(B, 1, T, T), position_ids=(B, T))` returns logits (B, T, K). A row may hold
several prompts: the mask, 0 where a token may look, keeps them apart, and positions begin anew with each.

* causal: the head at every token;
* encoder: the head of transformers' ForSequenceClassification;
* seq2seq: the decoder's first step.

The two latter get each prompt as a row of its own, padded, and each token of a prompt has its prompt's logits.

Called with a usual mask of two dimensions such a model is what transformers made it: plain PEFT and the
`text-classification` pipeline give the scores that we give.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftrec import config
from peftrec.errors import ConfigError, ModelError
from peftrec.prompts import Kind

WORDS: dict[Kind, str] = {
    "causal": "a causal model",
    "encoder": "an encoder",
    "seq2seq": "an encoder-decoder model",
}


def kind_of(shape: Any) -> Kind:
    """What a model is by its `config.json`, a transformers config; whether "causal" is true, its weights will tell."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if shape.is_encoder_decoder:
        return "seq2seq"
    guesses = shape.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "encoder" if guesses and not getattr(shape, "is_decoder", False) else "causal"


def check(kind: Kind, recipe: config.Recipe) -> None:
    """Check that the recipe goes with this kind of base model.

    Raises:
        ConfigError: what does not, one line each.
    """
    if kind == "causal":
        return
    name, head, method = recipe.model.name, recipe.score.head, recipe.adapter.method
    what = WORDS[kind]
    problems = []
    if recipe.prompt.layout == "timeline":
        problems.append(f"prompt.layout: timeline; {name} is {what}, whose tokens see those behind them; set pointwise")
    if (kind == "encoder") is (head == "tokens"):
        problems.append(_no_such_head(kind, head, name))
    if method in ("prefix", "prompt", "p_tuning"):
        problems.append(
            f"adapter.method: {method}; {name} is {what}, and virtual tokens are for causal models; set another method"
        )
    if recipe.side.used:
        problems.append(f"side: {name} is {what}, which reads texts as a whole; set a causal model, or leave side out")
    if problems:
        raise ConfigError(*problems)


def _no_such_head(kind: Kind, head: str, name: str) -> str:
    if kind == "encoder":
        todo = "has no next token; expected a causal language model, not an encoder; or set classifier or linear"
    else:
        todo = "answers in words; set tokens"
    return f"score.head: {head}; {name} is {WORDS[kind]}, which {todo}"


def model_class(kind: Kind, head: str, name: str) -> Any:
    """The auto class of transformers that loads the base model `name` of this kind with such a head.

    Raises:
        ModelError: there is none.
    """
    import transformers

    if head == "tokens" and kind != "encoder":
        return transformers.AutoModelForCausalLM if kind == "causal" else transformers.AutoModelForSeq2SeqLM
    if head != "tokens" and kind != "seq2seq":
        return transformers.AutoModelForSequenceClassification
    raise ModelError(_no_such_head(kind, head, name))


def prepare(model: Any, kind: Kind, head: str, absent: set[str]) -> Any:
    """Give a model that transformers loaded the forward that is described above, in place.

    A trained head becomes float32 and trainable; its last layer begins at zero, so that training starts from the prior.

    Args:
        model: of `model_class`.
        kind: of the model.
        head: `tokens`, `classifier` or `linear`.
        absent: names of the weights that the checkpoint did not hold.

    Raises:
        ModelError: the checkpoint lacks more than a head, or transformers put a head on that is not known here.
    """
    if head != "tokens":
        _begin_head(model, absent)
    if kind == "seq2seq" and getattr(model.config, "decoder_start_token_id", None) is None:
        raise ModelError(
            f"model.name: the config.json of this {type(model).__name__} has no decoder_start_token_id, with which its "
            "decoder begins; add it"
        )
    if kind == "causal" and head == "tokens":
        return model
    ours = EveryPosition if kind == "causal" else OnePromptEach
    # A class of its own, and not a wrapper: PEFT, DDP and FSDP look for the model's modules and name under this one.
    model.__class__ = type(type(model).__name__, (ours, type(model)), {})
    return model


def is_trained(model: Any, kind: Kind) -> bool:
    """Whether a prepared model has a head that is trained, and not the output matrix of a language model."""
    return kind == "encoder" or isinstance(model, EveryPosition)


def resize(model: Any, outputs: int) -> None:
    """Give a prepared model's trained head another number of outputs, all zero, in place."""
    if outputs == model.config.num_labels:
        return
    parts = _parts(model)
    name, last = [
        (f"{part}.{inner}".rstrip("."), layer)
        for part in parts
        for inner, layer in model.get_submodule(part).named_modules()
        if isinstance(layer, nn.Linear)
    ][-1]
    fresh = nn.Linear(last.in_features, outputs, last.bias is not None, last.weight.device, last.weight.dtype)
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    if name in parts:  # the layer is the head, and prepared to read 16 bits
        fresh.register_forward_pre_hook(_widen)
    model.set_submodule(name, fresh)
    model.config.num_labels = model.num_labels = outputs


def _parts(model: Any) -> list[str]:
    """Names of what stands on the trunk and has weights."""
    trunk = model.base_model_prefix
    return [name for name, part in model.named_children() if name != trunk and any(True for _ in part.parameters())]


def _begin_head(model: Any, absent: set[str]) -> None:
    trunk, parts = model.base_model_prefix, _parts(model)
    if any(name.startswith(f"{trunk}.pooler.") for name in absent):
        parts.insert(0, f"{trunk}.pooler")
    last = [part for name in parts for part in model.get_submodule(name).modules() if isinstance(part, nn.Linear)][-1:]
    if not last or last[0].out_features != model.config.num_labels:
        raise ModelError(
            f"model.name: {type(model).__name__} has no linear layer for {model.config.num_labels} outputs; use "
            "another base model, or score.head: tokens"
        )
    lost = sorted(name for name in absent if not name.startswith(tuple(f"{part}." for part in parts)))
    if lost:
        raise ModelError(
            f"model.name: {len(lost)} weights of {type(model).__name__} are not in the checkpoint, e.g. {lost[0]}; "
            "expected a model that is whole but for its head"
        )
    nn.init.zeros_(last[0].weight)
    if last[0].bias is not None:
        nn.init.zeros_(last[0].bias)
    for name in parts:
        part = model.get_submodule(name)
        part.float().requires_grad_(True)
        # bfloat16 is too coarse to train and to rank by.
        part.register_forward_pre_hook(_widen)


def _widen(part: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (inputs[0].float(), *inputs[1:])


class EveryPosition(nn.Module):
    """Mixed into a causal ForSequenceClassification: under a mask of four dimensions the head is at every position."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's output with logits (B, T, K); with a mask of two dimensions, (B, K) as in transformers."""
        from transformers.modeling_outputs import SequenceClassifierOutputWithPast

        kwargs |= {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        if past_key_values is not None:
            kwargs["past_key_values"] = past_key_values
        if attention_mask is None or attention_mask.dim() != 4:
            return super().forward(position_ids=position_ids, labels=labels, **kwargs)
        model: Any = self
        found = model.base_model(position_ids=position_ids, **{**kwargs, "return_dict": True})
        return SequenceClassifierOutputWithPast(
            logits=model.score(found.last_hidden_state), past_key_values=getattr(found, "past_key_values", None)
        )


class OnePromptEach(nn.Module):
    """Mixed into a model whose tokens see those behind them: it gets each prompt of a row as a row of its own, padded.

    Rows hold prompts of similar length (`packing.alike`), so that little is padding; and attention among the prompts
    of a packed row, computed and then masked, costs more than that.
    """

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's output with logits (B, T, K), equal for all tokens of a prompt; else as in transformers."""
        if token_type_ids is not None:
            kwargs["token_type_ids"] = token_type_ids
        if attention_mask is None or attention_mask.dim() != 4 or input_ids is None:
            if position_ids is not None:
                kwargs["position_ids"] = position_ids
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        model: Any = self
        prompt, place = prompts_of(attention_mask)
        real = place == position_ids  # what fills up a batch has no positions
        shape = (int(prompt.max()) + 1, int(place[real].max()) + 1)

        def apart(tokens: torch.Tensor, filling: int) -> torch.Tensor:
            rows = tokens.new_full(shape, filling)
            rows[prompt[real], place[real]] = tokens[real]
            return rows

        kwargs["input_ids"] = apart(input_ids, model.config.pad_token_id or 0)
        kwargs["attention_mask"] = apart(torch.ones_like(input_ids), 0)
        if token_type_ids is not None:
            kwargs["token_type_ids"] = apart(token_type_ids, 0)
        if model.config.is_encoder_decoder:
            start = model.config.decoder_start_token_id
            kwargs["decoder_input_ids"] = input_ids.new_full((shape[0], 1), start)
        output = super().forward(**kwargs)
        output.logits = output.logits.reshape(shape[0], -1)[prompt]
        return output


def prompts_of(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompts that a mask (B, 1, T, T) of blocks keeps apart: each token's prompt and place in it, (B, T) each."""
    first = (mask[:, 0] == 0).int().argmax(dim=-1)
    index = torch.arange(mask.shape[-1], device=mask.device)
    prompt = (first == index).flatten().cumsum(0).reshape(first.shape) - 1
    return prompt, index - first
