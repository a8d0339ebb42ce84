"""Another domain beside the training data: its events without answers, and the loss that brings it nearer.

Each row that is learned from has a row of the other domain beside it in the same forward pass. That one is drawn by
seed, epoch and row alone, and a pass's loss weighs as much as its share of the step's events: so a step is the same
however many processes share it, and a run that is resumed goes on as it would have gone on.

A history has to show answers, and those of the other domain are not to be known. So each of its people is shown with
the answers of one of the source, in their order: form and moods of a history are the same on both sides, and say
nothing of the other domain's items.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from peftrec import align_losses, config, interactions, sources
from peftrec.artifact import public_name
from peftrec.augment import Augment
from peftrec.draws import drawn_order
from peftrec.encode import Encoder
from peftrec.errors import DataError
from peftrec.split import TRAIN, Log, split
from peftrec.timeline import NO_LABEL, TimelineWindows, WindowDataset, collate

HIDDEN = 64
"""Width of the layer between of what tells the domains apart."""
PART = "alignment"
"""Name under which a model holds, while it trains, what is trained beside its adapter."""

Row = dict[str, np.ndarray]


# --- the other domain's events ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Other:
    """Another domain, read.

    Attributes:
        log: its training events with lent answers.
        sha256: of the values of its tables.
        warnings: what was left out or assumed, one line each.
    """

    log: Log
    sha256: str
    warnings: tuple[str, ...]


def data_of(recipe: config.Recipe) -> config.Data:
    """The section `data` that the other domain's events are read by."""
    ours, other = recipe.data, recipe.align.target
    if other.name is None and other.interactions is None:
        return dataclasses.replace(ours, items_where=other.items_where)
    named = {one.name: getattr(other, one.name) for one in dataclasses.fields(other)}
    return config.Data(split=ours.split, sample_users=ours.sample_users, **named)


def check(recipe: config.Recipe, shown: Sequence[str]) -> None:
    """Check the files of the other domain and their columns; no row is read but the first.

    Args:
        recipe: with `align`.
        shown: columns of the items table that the prompt shows.

    Raises:
        DataError: as `sources.check`.
    """
    with _under_its_name():
        sources.check(data_of(recipe), shown, None)


def unanswered(recipe: config.Recipe, source: Log) -> Other:
    """The other domain's training events, by the recipe's split of it, with answers that source people gave.

    Raises:
        AssetError, DataError: the tables cannot be fetched or used.
    """
    data = data_of(recipe)
    with _under_its_name():
        found = interactions.load(data, recipe.seed, None)
        log = split(found, data.split, recipe.seed, answered=False)
    lent = with_lent_answers(log.keep(log.split == TRAIN), source, recipe.seed)
    return Other(lent, found.sha256, tuple(map(_with_its_name, found.warnings)))


def with_lent_answers(log: Log, source: Log, seed: int) -> Log:
    """The log with the answers of the source's training events: each person's are those of one of the source.

    They come in their order, and over again for somebody with more events; all of the source's people lend theirs to
    equally many, drawn by `seed`.

    Args:
        log: whose own answers are overwritten.
        source: the log that is learned from.
        seed: draws who lends to whom.
    """
    train = np.flatnonzero(source.split == TRAIN)
    _, first, count = np.unique(source.user[train], return_index=True, return_counts=True)
    lender = drawn_order(len(log.user_ids), seed, "lent answers") % len(first)
    place = np.arange(len(log)) - np.searchsorted(log.user, log.user)  # of the event within its person's
    whose = lender[log.user]
    lent = source.label[train[first[whose] + place % count[whose]]]
    return dataclasses.replace(log, label=lent, rating=None, scale=source.scale, liked_from=source.liked_from, key=None)


@contextmanager
def _under_its_name() -> Iterator[None]:
    """Let errors name the keys of `align.target`."""
    try:
        yield
    except DataError as error:
        raise DataError("\n".join(map(_with_its_name, str(error).split("\n")))) from error


def _with_its_name(line: str) -> str:
    keys = "|".join(field.name for field in dataclasses.fields(config.OtherDomain))
    named = re.sub(rf"\bdata\.({keys})\b", r"align.target.\1", line)
    return named if named.startswith("align.target") else f"align.target: {named}"


# --- beside the training rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alignment:
    """What a run aligns with.

    Attributes:
        how: the recipe's section.
        rows: the other domain's windows.
        seed: draws which of them stands beside which row, and the first weights of what is trained along.
        sha256: of the values of the other domain's tables.
    """

    how: config.Align
    rows: WindowDataset
    seed: int
    sha256: str = ""

    @classmethod
    def of(cls, recipe: config.Recipe, other: Other, tokenizer: Any) -> Alignment:
        """What a recipe asks for, whose training rows vary as those of the other domain do.

        Raises:
            DataError: the prompt does not go with the other domain's items.
        """
        shuffle = recipe.seed if recipe.train.order == "random" else None
        with _under_its_name():
            encoder = Encoder(other.log, recipe.prompt, tokenizer, recipe.eval.ties, task=recipe.task, shuffle=shuffle)
        return cls(recipe.align, encoder.train(None, Augment.of(recipe)), recipe.seed, other.sha256)

    def facts(self) -> dict[str, Any]:
        """What a run says of it, without folders of this machine."""
        other = self.how.target
        source = other.name or other.interactions
        return {
            "kind": self.how.kind,
            "weight": self.how.weight,
            "ramp": self.how.ramp,
            "data": "the same data" if source is None else public_name(source),
            "sha256": self.sha256,
            "items_where": other.items_where,
            "events": self.rows.events,
        }

    def beside(self, source: WindowDataset) -> Pairs:
        """The rows to learn from, each with one of the other domain."""
        return Pairs(source, self.rows, self.seed)

    def attach(self, model: Any) -> None:
        """Give a model what is trained beside its adapter, so that optimizer, processes and checkpoints know of it."""
        inner = _inner(model)
        width = inner.get_input_embeddings().weight.shape[1]
        text = inner.config.get_text_config()
        states: int = getattr(text, "word_embed_proj_dim", text.hidden_size)  # OPT leads its last layer back to these
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            part: nn.Module = nn.Identity()
            if self.how.kind == "adversarial":
                part = nn.Sequential(nn.Linear(states, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
            elif self.how.kind == "cpc":
                part = nn.Linear(states, width, bias=False)
                nn.init.zeros_(part.weight)
        setattr(model, PART, part.to(model.device))

    @contextmanager
    def attached(self, model: Any) -> Iterator[None]:
        """The same for a while: behind it the model is what it was, with another adapter."""
        self.attach(model)
        try:
            yield
        finally:
            delattr(model, PART)

    def loss(self, model: Any, batch: dict[str, torch.Tensor], states: torch.Tensor, progress: float) -> torch.Tensor:
        """The loss of one forward pass, a number.

        Args:
            model: that has `attach`'s part.
            batch: from `Pairs.collate`.
            states: at its read positions (N, H).
            progress: share of the run that is over.
        """
        share = self.how.weight * align_losses.strength(progress, self.how.ramp)
        part = getattr(model, PART)
        asked = batch["labels"][batch["reads"]] >= 0
        if self.how.kind == "cpc":
            return share * self._next_items(model, batch, states[~asked].float())
        source, target = align_losses.alike_in_size(states[asked], states[~asked])
        if self.how.kind == "coral":
            return share * align_losses.coral(source, target)
        if self.how.kind == "mmd":
            return share * align_losses.mmd(source, target)
        # What tells apart learns from the first step on; it is its adversary that begins slowly.
        reversal = align_losses.strength(progress, self.how.ramp)
        told = [part(align_losses.reverse(one, reversal))[:, 0] for one in (source, target)]
        return self.how.weight * align_losses.tell_apart(*told)

    def _next_items(self, model: Any, batch: dict[str, torch.Tensor], states: torch.Tensor) -> torch.Tensor:
        """How badly the state at each event (M, H) of the other domain tells which item of its row comes next."""
        line, place = torch.nonzero(batch["reads"] & (batch["labels"] < 0), as_tuple=True)
        segment = batch["segment"][line, place]
        now = torch.nonzero((line[1:] == line[:-1]) & (segment[1:] == segment[:-1]))[:, 0]  # another one follows
        windows = self.rows.windows
        assert isinstance(windows, TimelineWindows)
        items = windows.log.item[batch["row"][line, place].cpu().numpy()]
        code = torch.as_tensor(items, device=states.device)
        vectors = F.normalize(_centred(_vectors(model, windows, items, states.device)), dim=1)
        scores = getattr(model, PART)(F.normalize(states[now], dim=1)) @ vectors.T
        following = torch.arange(len(code), device=states.device)[None, :] == now[:, None] + 1
        # An event of the same item, the one just read or the one to find, is no wrong answer.
        other = (code[None, :] != code[now][:, None]) & (code[None, :] != code[now + 1][:, None])
        among = following | (other & (line[None, :] == line[now][:, None]))
        return align_losses.info_nce(scores, now + 1, among)


def _centred(vectors: torch.Tensor) -> torch.Tensor:
    return vectors - vectors.mean(dim=0)


def _vectors(model: Any, windows: TimelineWindows, items: np.ndarray, device: torch.device) -> torch.Tensor:
    """The mean embedding of each item's text (M, E), without a gradient: what is predicted shall not follow."""
    pieces = [np.asarray(windows.questions[item], dtype=np.int64) for item in items.tolist()]
    if not pieces:
        return torch.zeros(0, _inner(model).get_input_embeddings().weight.shape[1], device=device)
    ids = torch.as_tensor(np.concatenate(pieces), device=device)
    starts = torch.as_tensor(np.cumsum([0, *map(len, pieces[:-1])]), device=device)
    weight = _inner(model).get_input_embeddings().weight.detach()
    return F.embedding_bag(ids, weight, starts, mode="mean").float()


@dataclass
class Pairs:
    """Rows to learn from, each with one of another domain, as a data set.

    Attributes:
        source: what is learned from.
        target: the other domain's rows.
        seed: draws, in each epoch, which stands beside which; each is as often there as any other.
    """

    source: WindowDataset
    target: WindowDataset
    seed: int

    def __post_init__(self) -> None:
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the pairs, and the forms of all rows, of this epoch from now on."""
        self.source.set_epoch(epoch)
        self.target.set_epoch(epoch)
        self._order = drawn_order(len(self.target), self.seed, f"align, epoch {epoch}")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Row, Row]:
        return self.source[index], self.target[int(self._order[index % len(self._order)])]

    def blank(self) -> tuple[Row, Row]:
        """A pair that asks nothing."""
        return self.source.blank(), self.target.blank()

    @staticmethod
    def collate(pairs: Sequence[tuple[Row, Row]]) -> dict[str, Any]:
        """Pairs as one batch: first the rows to learn from, then the others, which have no labels.

        `reads` (B, T) are the read positions of all.
        """
        source, target = zip(*pairs, strict=True)
        batch = collate([*source, *target])
        batch["reads"] = batch["labels"] >= 0
        batch["labels"][len(source) :] = NO_LABEL
        return batch


# --- states -----------------------------------------------------------------------------------------------------------


def _inner(model: Any) -> Any:
    """The transformers model below an adapter."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


@contextmanager
def watched(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collect the last states, before the head, of each forward pass: (B, T, H), or (1, N, H) of read positions."""
    found: list[torch.Tensor] = []
    # Not its base_model, which OPT's head passes by.
    handle = _inner(model).get_decoder().register_forward_hook(lambda _, __, output: found.append(output[0]))
    try:
        yield found
    finally:
        handle.remove()


def at_reads(hidden: torch.Tensor, reads: torch.Tensor) -> torch.Tensor:
    """The states (N, H) at the read positions (B, T).

    Args:
        hidden: from `watched`; virtual tokens may stand in front.
        reads: true at read positions (B, T).
    """
    count = int(reads.sum())
    if hidden.shape[:2] == (1, count) and count:  # the last layer was computed there alone
        return hidden[0]
    return hidden[:, hidden.shape[1] - reads.shape[1] :][reads]
