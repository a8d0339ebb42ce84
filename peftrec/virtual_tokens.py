"""Virtual tokens under our masks: prefix, prompt and p-tuning where a row holds several prompts and a cache its past.

PEFT puts trained tokens in front of one prompt with a mask of two dimensions. A packed row has a mask of four,
positions of its own and several prompts, and a history is computed once for many candidates. Here the virtual tokens
stand once in front of the whole row, every real token sees all of them, and each prompt's positions begin behind them,
at `num_virtual_tokens`: there PEFT and transformers put the first real token of a prompt that stands alone. So a prompt
has one score, alone or packed, at once or behind a cache, here or under plain PEFT.

Masks, positions and logits speak of real tokens only, whatever the method.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class VirtualTokens(nn.Module):
    """What is mixed into PEFT's model class; without a mask of four dimensions its own forward takes over."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's output behind the virtual tokens; its logits are (B, T, K), those of the real tokens.

        Args:
            input_ids: real tokens (B, T).
            attention_mask: additive (B, 1, T, P + T), where P real tokens are in the cache.
            position_ids: of the real tokens within their prompts, (B, T); None counts on from the cache.
            past_key_values: a cache, or None. An empty one takes in the virtual tokens; any other holds them already.
            **kwargs: what else the base model takes.
        """
        if attention_mask is None or attention_mask.dim() != 4 or input_ids is None:
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        model: Any = self
        count: int = model.active_peft_config.num_virtual_tokens
        held = past_key_values is not None and past_key_values.get_seq_length() > 0
        mask = F.pad(attention_mask, (count, 0))  # 0 is what may be seen
        if position_ids is not None:
            position_ids = position_ids + count
        if model.active_peft_config.peft_type.value == "PREFIX_TUNING":
            if not held:
                past_key_values = _filled(past_key_values, model.get_prompt(len(input_ids)))
            return model.base_model(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        real = model.word_embeddings(input_ids)
        if held:
            count = 0
        else:
            real = torch.cat((model.get_prompt(len(input_ids)).to(real), real), dim=1)
            mask = torch.cat((_own_rows(count, mask), mask), dim=2)
            if position_ids is not None:
                virtual = torch.arange(count, device=position_ids.device).expand(len(position_ids), -1)
                position_ids = torch.cat((virtual, position_ids), dim=1)
        output = model.base_model(
            inputs_embeds=real,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        output.logits = output.logits[:, count:]
        return output


def _own_rows(count: int, mask: torch.Tensor) -> torch.Tensor:
    """What the virtual tokens themselves see, (B, 1, count, columns of `mask`): those before them, no real token."""
    hidden = torch.ones(count, mask.shape[-1], dtype=torch.bool, device=mask.device).triu(1)
    rows = torch.zeros(hidden.shape, dtype=mask.dtype, device=mask.device)
    return rows.masked_fill_(hidden, torch.finfo(mask.dtype).min).expand(len(mask), 1, -1, -1)


def _filled(cache: Any, prefix: Any) -> Any:
    """The caller's empty cache with the prefix's keys and values in it; the prefix itself where there is none."""
    if cache is None:
        return prefix
    for index, layer in enumerate(prefix.layers):
        cache.update(layer.keys, layer.values, index)
    return cache


def with_virtual_tokens(plain: type) -> type:
    """PEFT's model class `plain` for prompt learning, with our forward."""
    return type(plain.__name__, (VirtualTokens, plain), {})


def start_as_text(model: Any, ids: torch.Tensor) -> None:
    """Let virtual tokens begin as a text: a prefix as the keys and values that the base model keeps of it, p-tuning's
    network as one that gives its embeddings.

    PEFT begins with noise, which disturbs the base model, and the way back takes many steps; Li and Liang,
    Prefix-Tuning (2021), section 7.4, saw the same where data are few.

    Args:
        model: PEFT's model around a causal base model, with a prefix that is not projected, or p-tuning by an MLP.
        ids: the text; of it as many tokens as there are virtual ones are taken, over again if it is shorter.
    """
    size = model.active_peft_config.num_virtual_tokens
    ids = ids.repeat(-(-size // len(ids)))[:size].to(model.device)
    if model.active_peft_config.peft_type.value == "P_TUNING":
        _give(model.prompt_encoder["default"], model.word_embeddings(ids).detach())
        return
    from peft import initialize_kv_prefix_from_past_key_values

    with torch.no_grad(), model.disable_adapter():
        kept = model(input_ids=ids[None], use_cache=True).past_key_values
    layers = [(layer.keys, layer.values) for layer in kept.layers]
    initialize_kv_prefix_from_past_key_values(model, past_key_values=layers)


@torch.no_grad()
def _give(encoder: Any, wanted: torch.Tensor) -> None:
    """Change the last layer of p-tuning's network as little as can be so that it gives `wanted`, (tokens, width)."""
    last = encoder.mlp_head[-1]
    seen: list[torch.Tensor] = []
    watch = last.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0][0]))
    given = encoder(torch.arange(len(wanted), device=wanted.device)[None])[0]
    watch.remove()
    # Where the layer before is narrower than there are tokens, no layer gives them all: then the nearest.
    last.weight += torch.linalg.lstsq(seen[0].double(), (wanted - given).double(), driver="gelsd").solution.T.float()


def list_embeddings_once(model: Any) -> None:
    """Keep PEFT's second name of the base model's embeddings out of the list of modules: FSDP takes it for a tensor."""
    embeddings = model._modules.pop("word_embeddings")
    model.__dict__["word_embeddings"] = embeddings


def count(model: Any) -> int:
    """Virtual tokens in front of every row of this model; 0 where its adapter has none."""
    found: int = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", 0)
    return found
