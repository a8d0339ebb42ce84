"""Base model + adapter + answer rows -> scores at read positions: one code path for training, evaluation and serving.

The base model's output matrix is replaced by its few answer rows (`AnswerHead`), so the full vocabulary is never
multiplied, yet the model's own forward (soft-capping, scaling, PEFT, DDP and FSDP wrappers) stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from peftrec import fused, side
from peftrec.errors import ModelError
from peftrec.target import pair_losses
from peftrec.timeline import WindowDataset, collate

if TYPE_CHECKING:
    from peftrec.prompts import Pieces
    from peftrec.target import Target


class AnswerHead(nn.Module):
    """The rows of an output matrix that stand for the answers, (A, H), applied in float32.

    bfloat16 has 8 bits: logits near 20 would come in steps of 0.125, too coarse to rank by. The rows are buffers, not
    parameters, because they are never trained and never saved: they belong to the base model.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, output: nn.Module, answers: Sequence[int]) -> None:
        super().__init__()
        rows = torch.as_tensor(list(answers))
        weight, bias = output.weight, getattr(output, "bias", None)
        assert isinstance(weight, torch.Tensor)
        self.register_buffer("weight", weight.detach()[rows].float(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach()[rows].float(), persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, T, H) -> logits of the answers (B, T, A)."""
        # DeepSpeed casts buffers to the type that it computes in.
        return F.linear(hidden.float(), self.weight.float(), None if self.bias is None else self.bias.float())


def with_head(model: Any, head: str, answers: Sequence[int]) -> Any:
    """The loaded model with the recipe's head: answer rows for `tokens`; one that is trained it has already."""
    return answer_only(model, answers) if head == "tokens" else model


def answer_only(model: Any, answers: Sequence[int]) -> Any:
    """Replace the output matrix of a language model by its answer rows, in place.

    Raises:
        ModelError: the model has no output matrix (it is not a language model that writes).
    """
    output = model.get_output_embeddings()
    if output is None or not hasattr(output, "weight"):
        raise ModelError(
            f"model: {type(model).__name__} has no output matrix to take answers from; use a causal language model"
        )
    model.set_output_embeddings(AnswerHead(output, answers))
    # The answer rows are a copy: tying them back to the input embeddings would undo the replacement.
    model.config.tie_word_embeddings = False
    if hasattr(model, "final_logits_bias"):  # BART adds it to whatever the output matrix gives
        model.final_logits_bias = model.final_logits_bias[:, list(answers)]
    return model


def sight_mask(batch: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The rule of sight as an additive mask (B, 1, T, T): 0 where the query may look, the smallest number elsewhere.

    In a batch without events, which is one of whole texts, all of a segment sees all of it.
    """
    segment = batch["segment"]
    same_segment = segment[:, :, None] == segment[:, None, :]
    if "event" not in batch:
        return _additive(same_segment, dtype)
    event, time, visible = batch["event"], batch["time"], batch["visible"]
    same_event = event[:, :, None] == event[:, None, :]
    earlier = (time[:, None, :] < time[:, :, None]) & visible[:, None, :]
    length = event.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=event.device).tril()
    seen = causal & same_segment & (same_event | earlier)
    return _additive(seen, dtype)


def _additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def read_outputs(model: Any, batch: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The head's outputs (N, K) at the batch's N read positions: `reads` (B, T), or without such, where labels are."""
    return _ask(
        model,
        batch["input_ids"],
        sight_mask(batch, dtype),
        batch["position_ids"],
        batch["reads"] if "reads" in batch else batch["labels"] >= 0,
        use_cache=False,
        **{key: batch[key] for key in ("token_type_ids",) if key in batch},
    )


def _ask(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, places: torch.Tensor, **more: Any
) -> torch.Tensor:
    """The head's outputs (N, K) at the N true `places` (B, T), with what side vectors say there."""
    beside = side.of(model)
    if beside is not None:
        ids = beside.thinned(ids)
    reads = fused.read_at(mask, places)
    outputs = reads.of(model(input_ids=ids, attention_mask=mask, position_ids=positions, **more).logits)
    return outputs if beside is None else beside.read(outputs, ids[places])


@torch.inference_mode()
def score_rows(
    model: Any, data: WindowDataset, indices: Sequence[int], progress: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Ask the packed rows `indices`: rows of the log (n,), int64, and the head's outputs for them (n, K), float32.

    Args:
        model: base model or PEFT model with an answer head.
        data: packed rows.
        indices: which of them.
        progress: called with the number of events after each row.
    """
    was_training = model.training
    model.eval()
    rows, outputs = [np.zeros(0, dtype=np.int64)], []
    for index in indices:
        batch = {key: value.to(model.device) for key, value in collate([data[index]]).items()}
        outputs.append(read_outputs(model, batch, model.dtype).float().cpu().numpy())
        rows.append(batch["row"][batch["labels"] >= 0].cpu().numpy())
        if progress is not None:
            progress(len(rows[-1]))
    model.train(was_training)
    return np.concatenate(rows), np.concatenate(outputs) if outputs else np.zeros((0, 1), dtype=np.float32)


@contextmanager
def continued_histories() -> Iterator[None]:
    """Within, `score_candidates` keeps the last history's cache and reads of the next one only what is new.

    Histories that grow, one person's as of one time after another, are then read once. Scores are the same within
    float tolerance.
    """
    token = _KEPT.set(_Kept())
    try:
        yield
    finally:
        _KEPT.reset(token)


class _Kept:
    """The cache of the history that was asked last: its tokens, (L,), and the model that read them."""

    def __init__(self) -> None:
        self._model: Any = None
        self._cache: Any = None
        self._ids = np.zeros(0, dtype=np.int64)

    def take(self, model: Any, history: np.ndarray) -> tuple[Any, int]:
        """The cache, and how many of the first tokens of `history` it holds; it is given away until `put`."""
        cache, self._cache = self._cache, None
        if cache is None or self._model is not model:
            return None, 0
        both = min(len(history), len(self._ids))
        shared = int(np.append(history[:both] == self._ids[:both], False).argmin())
        if shared == 0:
            return None, 0
        cache.crop(shared - len(self._ids))  # negative: so many tokens from the end
        return cache, shared

    def put(self, model: Any, cache: Any, history: np.ndarray) -> None:
        """Keep the cache of `history`."""
        self._model, self._cache, self._ids = model, cache, history.copy()


_KEPT: ContextVar[_Kept | None] = ContextVar("_KEPT", default=None)


@torch.inference_mode()
def score_candidates(model: Any, history: np.ndarray, candidates: Pieces, *, chunk_tokens: int = 512) -> np.ndarray:
    """Score candidates behind one history: the history is computed once, candidates do not see each other.

    Args:
        model: base model or PEFT model with an `AnswerHead`.
        history: token ids of header and past events, (L,); read in the order in which they stand, so that an event
            sees all events above it.
        candidates: each candidate's `{text}:` pieces.
        chunk_tokens: candidate tokens in one forward, of which the first reads the history, too; more cost more
            attention to candidates that are masked out.

    Returns:
        The head's outputs, (number of candidates, K).
    """
    from transformers import DynamicCache

    model.eval()
    device, past, kept = model.device, len(history), _KEPT.get()
    cache, held = kept.take(model, history) if kept is not None else (None, 0)
    if cache is None:
        cache = DynamicCache(config=model.config)
    outputs = []
    for first, last in _chunks(candidates.lengths, chunk_tokens):
        begin, end = int(candidates.start[first]), int(candidates.start[last])
        new = past - held
        ids = torch.as_tensor(np.concatenate((history[held:], candidates.flat[begin:end])).astype(np.int64))
        starts = torch.as_tensor(candidates.start[first:last] - begin + new, device=device)
        place = torch.arange(len(ids), device=device)
        event = torch.bucketize(place, starts, right=True)  # 0 is the history
        offset = place - torch.cat((starts.new_zeros(1), starts))[event]
        seen = ((event[:, None] == event[None, :]) | (event[None, :] == 0)).tril()
        seen = torch.cat((seen.new_ones(len(ids), held), seen), dim=1)
        mask = _additive(seen[None], model.dtype)
        ends = torch.as_tensor(candidates.start[first + 1 : last + 1] - begin - 1 + new, device=device)
        found = _ask(
            model,
            ids[None].to(device),
            mask,
            (offset + torch.where(event == 0, held, past))[None],
            torch.isin(place, ends)[None],
            past_key_values=cache,
            use_cache=True,
        )
        cache.crop(begin - end)  # negative: so many tokens from the end
        held = past
        outputs.append(found.float().cpu().numpy())
    if kept is not None and outputs:
        kept.put(model, cache, history)
    return np.concatenate(outputs) if outputs else np.zeros((0, 1), dtype=np.float32)


def score_requests(
    model: Any, histories: Sequence[np.ndarray], candidates: Sequence[Pieces], *, row_tokens: int = 256
) -> list[np.ndarray]:
    """What `score_candidates` gives for each of several histories, (number of candidates, K) each.

    Short requests share a row, in which they do not see each other: a forward pass over few tokens takes hardly less
    time than one over some more.

    Args:
        model: base model or PEFT model with an `AnswerHead`.
        histories: as there.
        candidates: each history's candidates.
        row_tokens: requests that share a row have at most so many tokens together.
    """
    lengths = [len(ids) + int(pieces.lengths.sum()) for ids, pieces in zip(histories, candidates, strict=True)]
    found = []
    for first, last in _chunks(np.asarray(lengths, dtype=np.int64), row_tokens):
        if last == first + 1:
            found.append(score_candidates(model, histories[first], candidates[first]))
        else:
            found += _score_together(model, histories[first:last], candidates[first:last])
    return found


@torch.inference_mode()
def _score_together(model: Any, histories: Sequence[np.ndarray], candidates: Sequence[Pieces]) -> list[np.ndarray]:
    model.eval()
    parts, request, piece, place = [], [], [], []  # a piece's number is 0 in a history
    for number, (history, pieces) in enumerate(zip(histories, candidates, strict=True)):
        lengths = pieces.lengths
        parts += [history, pieces.flat]
        request += [number] * (len(history) + len(pieces.flat))
        piece += [np.zeros(len(history), dtype=np.int64), np.repeat(np.arange(len(lengths)) + 1, lengths)]
        begins = np.repeat(pieces.start[:-1], lengths)
        place += [np.arange(len(history)), len(history) + np.arange(len(pieces.flat)) - begins]
    ids, positions, own, whose = (
        torch.as_tensor(np.asarray(one, dtype=np.int64), device=model.device)
        for one in (np.concatenate(parts), np.concatenate(place), np.concatenate(piece), request)
    )
    behind = (own[:, None] == own[None, :]) | (own[None, :] == 0)
    seen = (behind & (whose[:, None] == whose[None, :])).tril()
    mask = _additive(seen[None], model.dtype)
    begins = np.cumsum([0, *(len(part) for part in parts)])[1::2]  # of each request's candidates
    ends = np.concatenate([begin + one.start[1:] - 1 for begin, one in zip(begins, candidates, strict=True)])
    places = torch.zeros(1, len(request), dtype=torch.bool, device=model.device)
    places[0, ends] = True
    outputs = _ask(model, ids[None], mask, positions[None], places, use_cache=False).float().cpu().numpy()
    return np.split(outputs, np.cumsum([len(pieces.lengths) for pieces in candidates])[:-1])


def _chunks(lengths: np.ndarray, budget: int) -> list[tuple[int, int]]:
    """Half-open ranges of consecutive pieces of at most `budget` tokens each (a longer piece stands alone)."""
    ranges, first, used = [], 0, 0
    for index, length in enumerate(lengths.tolist()):
        if index > first and used + length > budget:
            ranges.append((first, index))
            first, used = index, 0
        used += length
    if len(lengths):
        ranges.append((first, len(lengths)))
    return ranges


def interaction_loss(
    model: Any,
    batch: dict[str, torch.Tensor],
    dtype: torch.dtype,
    target: Target,
    items: Any,
    *,
    pairwise: float = 0.0,
) -> torch.Tensor:
    """The target's loss over the batch's read positions, divided by `items`, the events of the whole optimizer step.

    Dividing by events and not by batches makes gradient accumulation and several processes equal one large batch.
    `pairwise` is the weight of `target.pair_losses`: windows are whole in a row, so these split as the others do.
    """
    read = batch["labels"] >= 0
    outputs, prior, label = read_outputs(model, batch, dtype), batch["prior"][read], batch["labels"][read]
    if "reads" in batch:  # also where nothing is to be learned
        outputs = outputs[read[batch["reads"]]]
    taught = batch["taught"][read] if "taught" in batch else None
    total = target.losses(outputs, prior, label, taught).sum()
    if pairwise:
        # Rows hold windows of several people: numbered apart, also from those of the batch's other rows.
        length = read.shape[1]
        window = batch["segment"] + length * torch.arange(len(read), device=read.device)[:, None]
        total = total + pairwise * pair_losses(target.score(outputs, prior), label, window[read])
    loss: torch.Tensor = total / items
    return loss
