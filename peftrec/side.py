"""Side vectors inside the model: a small trained projector adds them to the token that ends an event's question.

The token is the placeholder: its embedding plus what the projectors make of the event's vectors. A second network adds
to the outputs that are read at that token, because what vectors say by themselves takes long to learn through all
layers. Both begin at zero, so training starts from the plain prompt, and an event without vectors is plain text for
ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from peftrec import config
from peftrec.errors import ModelError
from peftrec.side_vectors import BITS, FILE, OfRun, Sources, Table, tensors

MOST_HIDDEN = 8192
"""Width of a projector's hidden layer: it is made before anybody can see whether the weights fit it."""
PROJECTOR, READOUT = "projector.", "readout."

_ID = (1 << BITS) - 1
"""The bits of a token's own id."""
_ASKED: ContextVar[Table | None] = ContextVar("_ASKED", default=None)
_OFF: ContextVar[bool] = ContextVar("_OFF", default=False)


class SideTokens(nn.Module):
    """The networks, two for each source; what they give for an event is added up over the sources.

    Args:
        sizes: source -> numbers of its vectors.
        hidden: width of the layer between.
        width: of the model's embeddings.
        outputs: of the model's head.
        dropout: share of the events whose vectors are left out in training.
    """

    def __init__(self, sizes: Mapping[str, int], hidden: int, width: int, outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.table: Table | None = None
        self.projectors = nn.ModuleDict({name: _network(size, hidden, width) for name, size in sizes.items()})
        self.readouts = nn.ModuleDict({name: _network(size, hidden, outputs) for name, size in sizes.items()})

    def thinned(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids of any shape, in training without the numbers of events that are drawn to be plain text."""
        if not (self.training and self.dropout):
            return ids
        dropped = torch.rand(ids.shape, device=ids.device) < self.dropout
        return torch.where(dropped, ids & _ID, ids)

    def forward(self, embedded: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings (…, H) with what the projectors make of the vectors in the ids (…) added."""
        return self._added(self.projectors, embedded, ids)

    def read(self, outputs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The head's outputs (N, K) with what the vectors in the ids (N,), which are read there, say themselves."""
        return self._added(self.readouts, outputs, ids)

    def _added(self, networks: nn.ModuleDict, values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        numbers = ids >> BITS
        soft = numbers > 0
        table = _ASKED.get() or self.table
        if _OFF.get() or table is None:  # nobody asks with vectors
            return values
        told = numbers[soft].cpu().numpy()
        place = np.searchsorted(table.numbers, told)
        # Also without any number: every process has to use every parameter.
        added = torch.zeros(len(told), values.shape[-1], device=values.device)
        for name, network in networks.items():
            part = table.parts[name]
            row = part.row[place]
            known = np.flatnonzero(row >= 0)
            vectors = torch.from_numpy(part.vectors[row[known]]).to(values.device)
            added = added.index_add(0, torch.from_numpy(known).to(values.device), network(vectors))
        return torch.index_put(values, (soft,), added.to(values.dtype), accumulate=True)


def _network(size: int, hidden: int, width: int) -> nn.Sequential:
    last = nn.Linear(hidden, width, bias=False)
    nn.init.zeros_(last.weight)
    return nn.Sequential(nn.Linear(size, hidden), nn.GELU(), last)


class SideEmbedding(nn.Module):
    """Mixed into a model's input embeddings: ids may hold the numbers of vectors."""

    side: SideTokens

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, T, H) of ids (B, T)."""
        return self.side(super().forward(input_ids & _ID), input_ids)  # type: ignore[no-any-return]


def attach(model: Any, vectors: OfRun, how: config.Side, outputs: int, *, seed: int) -> SideTokens:
    """Give a model networks for the side vectors of a run, which train in float32.

    Args:
        model: with its adapter attached, changed in place.
        vectors: of the run.
        how: the recipe's section.
        outputs: of the model's head.
        seed: of the first weights.
    """
    made = _put_in(model, _sizes(vectors.sources), how.hidden_size, outputs, how.dropout, seed)
    made.table = vectors.table
    return made


def _sizes(sources: Sources) -> dict[str, int]:
    return {name: len(source.scaling.mean) for name, source in sources.items()}


def _put_in(
    model: Any, sizes: Mapping[str, int], hidden: int, outputs: int, dropout: float = 0.0, seed: int = 0
) -> SideTokens:
    embeddings = model.get_input_embeddings()
    width = embeddings.weight.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = SideTokens(sizes, hidden, width, outputs, dropout)
    embeddings.side = made.to(embeddings.weight.device).train(embeddings.training)
    # A class of its own, and not a wrapper: PEFT holds on to this very module.
    embeddings.__class__ = type(type(embeddings).__name__, (SideEmbedding, type(embeddings)), {})
    return made


def of(model: Any) -> SideTokens | None:
    """The networks of a model, if it has any."""
    inner = getattr(model, "module", model)  # of DistributedDataParallel
    found = getattr(inner.get_input_embeddings(), "side", None)
    return found if isinstance(found, SideTokens) else None


@contextmanager
def asked(table: Table | None) -> Iterator[None]:
    """Within, in this thread, numbers are those of `table`."""
    token = _ASKED.set(table)
    try:
        yield
    finally:
        _ASKED.reset(token)


@contextmanager
def off() -> Iterator[None]:
    """Within, in this thread, events are plain text."""
    token = _OFF.set(True)
    try:
        yield
    finally:
        _OFF.reset(token)


# --- files ------------------------------------------------------------------------------------------------------------


def save(model: Any, folder: str | Path, sources: Sources) -> None:
    """Write vectors, their statistics and the networks to `folder`, whole or not at all."""
    made = of(model)
    assert made is not None
    # Readouts are called projectors too: an earlier peftrec, which has none, then refuses the file.
    state: dict[str, torch.Tensor] = {PROJECTOR + name: p for name, p in made.projectors.named_parameters()}
    state |= {PROJECTOR + READOUT + name: p for name, p in made.readouts.named_parameters()}
    state = {name: p.detach().cpu().contiguous() for name, p in state.items()}
    state |= {name: torch.from_numpy(np.array(values)) for name, values in tensors(sources).items()}
    path, scratch = Path(folder) / FILE, Path(folder) / f".{FILE}"
    scratch.touch()
    mode = scratch.stat().st_mode
    save_file(state, scratch, {"format": "pt"})
    scratch.chmod(mode)  # as open as the other files: the library lets nobody else read what it writes
    scratch.replace(path)


def load(model: Any, folder: str | Path, sources: Sources, outputs: int) -> None:
    """Put the saved networks into a model that has its adapter and a head of so many outputs.

    Raises:
        ModelError: they do not fit it.
    """
    path = Path(folder) / FILE
    try:
        state = {
            name.removeprefix(PROJECTOR): tensor
            for name, tensor in load_file(path).items()
            if name.startswith(PROJECTOR)
        }
        readouts = {name.removeprefix(READOUT): state.pop(name) for name in list(state) if name.startswith(READOUT)}
        hidden = {len(tensor) for name, tensor in state.items() if name.endswith(".0.bias")}
        if len(hidden) != 1 or not 1 <= max(hidden) <= MOST_HIDDEN:
            raise ValueError(f"hidden layers of {sorted(hidden)}")
        made = _put_in(model, _sizes(sources), hidden.pop(), outputs)
        made.projectors.load_state_dict(state)
        if readouts:  # an earlier peftrec saved none, and those that are zero add nothing
            made.readouts.load_state_dict(readouts)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ModelError(
            f"{path}: its projectors do not fit this base model ({reason}); load the adapter on the one that "
            "peftrec.json names"
        ) from error
    model.eval()
