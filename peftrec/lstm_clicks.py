"""The click model that many people know: embeddings of user and item, an LSTM over a person's events, a sigmoid.

At each event the LSTM reads the user's and the item's embedding beside the answer. The chance that an item is liked is
read from the state before the item's moment, beside both embeddings, so that no answer of the same time or of a later
one is known: what is known of a row is what the language model knows of it. Users and items without a training event
share one embedding, which is trained in the place of ids that are hidden at random.

Training is plain data parallelism over accelerate's processes: everybody draws the same steps and computes a share of
each, and gradients are added up, so that two processes find what one finds.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from peftrec.baselines import Floats, History, Ties
from peftrec.metrics import mean_log_loss
from peftrec.people import Person, held_people, training_people

if TYPE_CHECKING:
    from peftrec.split import Log

UNKNOWN = 0
"""Code of a user or an item without a training event."""

_TOKENS = 40_000  # events of a batch that is scored


@dataclass(frozen=True)
class Settings:
    """Size of the network and of its training; no figure of it was chosen on test rows.

    Attributes:
        width: of each embedding.
        hidden: of the LSTM's state.
        learning_rate: of Adam.
        weight_decay: of AdamW.
        hide_users: share of the sequences that are read without the user.
        hide_items: share of the events that are read, and of the items that are asked for, without the item.
        longest: events of a training sequence; longer histories are cut.
        batch: sequences of a step.
        epochs: at most.
        patience: epochs without a lower log loss on the validation rows before training ends.
    """

    width: int = 32
    hidden: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    hide_users: float = 0.5
    hide_items: float = 0.1
    longest: int = 256
    batch: int = 32
    epochs: int = 40
    patience: int = 4


@dataclass(frozen=True)
class Predictions:
    """Scores of the held-out rows of a log.

    Attributes:
        scores: log-odds of a like, float64 (n,); nan in training rows.
        settings: of the network, the epochs that were kept and its log loss on the validation rows.
        counts: rows of the log that were scored, and training events of an epoch, over all processes.
    """

    scores: Floats
    settings: dict[str, Any]
    counts: dict[str, int]


def predict(
    log: Log, history: History, ties: Ties = "isolate", settings: Settings | None = None, seed: int = 13
) -> Predictions:
    """Train on the training events, stop by the validation rows, and score all validation and test rows.

    Args:
        log: all splits, with items.
        history: what validation and test rows know of their user.
        ties: "order" lets a row know the events of its own user that share its timestamp and stand before it.
        settings: of the network and its training.
        seed: of weights, order and hidden ids.
    """
    import torch
    from accelerate import PartialState

    settings = settings or Settings()
    state = PartialState(cpu=not torch.cuda.is_available())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        codes = _Codes(log)
        network = _network(codes, settings).to(state.device)
    pieces = [piece for person in training_people(log, ties) for piece in _cut(person, settings.longest)]
    held, valid = (list(held_people(log, rows, history, ties)) for rows in (log.split != 0, log.split == 1))
    events = [0]

    def loss_on_valid() -> float:
        found, _ = _score(network, codes, valid, state)
        rows = log.split == 1
        return mean_log_loss(log.label[rows], found[rows])

    best, best_loss, kept, waited = copy.deepcopy(network.state_dict()), np.inf, 0, 0
    step = _stepper(network, codes, settings, state)
    for epoch in range(settings.epochs if pieces else 0):
        generator = torch.Generator().manual_seed(seed + epoch)
        order = torch.randperm(len(pieces), generator=generator).tolist()
        events[0] = 0
        for begin in range(0, len(order), settings.batch):
            events[0] += step([pieces[i] for i in order[begin : begin + settings.batch]], generator)
        loss = loss_on_valid() if valid else -epoch
        waited = 0 if loss < best_loss else waited + 1
        if loss < best_loss:
            best, best_loss, kept = copy.deepcopy(network.state_dict()), loss, epoch + 1
        if waited >= settings.patience:
            break
    network.load_state_dict(best)
    scores, scored = _score(network, codes, held, state)
    scores[log.split == 0] = np.nan
    chosen = {**dataclasses.asdict(settings), "best_epoch": kept, "valid_log_loss": float(best_loss) if valid else None}
    return Predictions(scores, chosen, {"scored": scored, "events": events[0]})


class _Codes:
    """Users and items of the training events as codes from 1; all others are `UNKNOWN`."""

    def __init__(self, log: Log) -> None:
        train = log.split == 0
        self.label: Floats = log.label.astype(np.float64)
        self.user, self.users = self._known(log.user, train, len(log.user_ids))
        self.item, self.items = self._known(log.item, train & (log.item >= 0), len(log.items))

    @staticmethod
    def _known(code: npt.NDArray[Any], rows: npt.NDArray[np.bool_], size: int) -> tuple[npt.NDArray[np.int64], int]:
        table = np.full(size + 1, UNKNOWN)  # the code -1 of no item finds the last place
        present = np.unique(code[rows])
        table[present] = np.arange(1, len(present) + 1)
        return table[code], len(present) + 1


def _network(codes: _Codes, settings: Settings) -> Any:
    from torch import nn

    width, hidden = settings.width, settings.hidden
    return nn.ModuleDict(
        {
            "user": nn.Embedding(codes.users, width),
            "item": nn.Embedding(codes.items, width),
            "lstm": nn.LSTM(2 * width + 1, hidden, batch_first=True),
            "head": nn.Sequential(nn.Linear(2 * width + hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)),
        }
    )


def _cut(person: Person, longest: int) -> list[Person]:
    """A training sequence in pieces, each of which begins with an empty state; rows are the events themselves."""
    pieces = []
    for begin in range(0, len(person.events), longest):
        piece = slice(begin, begin + longest)
        pieces.append(Person(person.events[piece], person.rows[piece], np.maximum(person.known[piece] - begin, 0)))
    return pieces


def _log_odds(network: Any, batch: dict[str, Any]) -> Any:
    """Log-odds (B, W) of the asked items."""
    import torch

    user = network["user"](batch["user"])[:, None]  # (B, 1, width)
    read = network["item"](batch["read"])
    told = torch.cat((user.expand_as(read), read, batch["answer"][..., None]), dim=2)
    states, _ = network["lstm"](told)
    states = torch.cat((torch.zeros_like(states[:, :1]), states), dim=1)  # state k knows the first k events
    before = states.gather(1, batch["known"][..., None].expand(-1, -1, states.shape[2]))
    asked = network["item"](batch["asked"])
    return network["head"](torch.cat((user.expand_as(asked), asked, before), dim=2))[..., 0]


def _batch(people: Sequence[Person], codes: _Codes, device: Any) -> dict[str, Any]:
    """Arrays (B, H) of what is read and (B, W) of what is asked, padded at the right; `row` is -1 there."""
    import torch

    def padded(parts: Sequence[npt.NDArray[Any]], fill: int = 0) -> Any:
        longest = max(1, *(len(part) for part in parts))
        rows = [np.pad(part, (0, longest - len(part)), constant_values=fill) for part in parts]
        return torch.from_numpy(np.stack(rows)).to(device)

    return {
        "user": torch.tensor([int(codes.user[person.rows[0]]) for person in people], device=device),
        "read": padded([codes.item[person.events] for person in people]),
        "answer": padded([2 * codes.label[person.events] - 1 for person in people]).float(),
        "known": padded([person.known for person in people]),
        "asked": padded([codes.item[person.rows] for person in people]),
        "label": padded([codes.label[person.rows] for person in people]).float(),
        "row": padded([person.rows for person in people], fill=-1),
    }


def _stepper(network: Any, codes: _Codes, settings: Settings, state: Any) -> Callable[[list[Person], Any], int]:
    """What makes one optimizer step out of a batch that all processes share; returns its events over all of them."""
    import torch
    from accelerate.utils import reduce
    from torch import nn

    optimizer = torch.optim.AdamW(
        network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, foreach=False
    )

    def step(people: list[Person], generator: Any) -> int:
        batch = _batch(people, codes, state.device)
        for name, share in (
            ("user", settings.hide_users),
            ("read", settings.hide_items),
            ("asked", settings.hide_items),
        ):
            # Drawn for the whole step, so that it is the same however many processes share it.
            hidden = torch.rand(batch[name].shape, generator=generator) < share
            batch[name] = batch[name].masked_fill(hidden.to(state.device), UNKNOWN)
        total = int((batch["row"] >= 0).sum())
        mine = {name: part[state.process_index :: state.num_processes] for name, part in batch.items()}
        optimizer.zero_grad()
        if len(mine["user"]):
            read = mine["row"] >= 0
            losses = nn.functional.binary_cross_entropy_with_logits(
                _log_odds(network, mine)[read], mine["label"][read], reduction="sum"
            )
            torch.autograd.backward(losses / total)
        parameters = list(network.parameters())
        parts = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
        flat = reduce(torch.cat([part.flatten() for part in parts]), "sum")
        for one, gradient in zip(parameters, flat.split([part.numel() for part in parts]), strict=True):
            one.grad = gradient.view_as(one)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return total

    return step


def _score(network: Any, codes: _Codes, people: Sequence[Person], state: Any) -> tuple[Floats, int]:
    """Log-odds (n,) of the people's rows, zero elsewhere, and how many there were; each process takes its share."""
    import torch
    from accelerate.utils import reduce

    scores, counted = torch.zeros(len(codes.label), dtype=torch.float64), torch.zeros(1)
    mine = sorted(people, key=lambda person: len(person.events))[state.process_index :: state.num_processes]
    with torch.inference_mode():
        while mine:
            # Neighbours in length, so that little is padding.
            size = max(1, _TOKENS // max(1, len(mine[-1].events) + len(mine[-1].rows)))
            part, mine = mine[-size:], mine[:-size]
            batch = _batch(part, codes, state.device)
            asked = batch["row"] >= 0
            scores[batch["row"][asked].cpu()] = _log_odds(network, batch)[asked].double().cpu()
            counted += int(asked.sum())
    found = reduce(torch.cat((scores, counted.double())).to(state.device), "sum").cpu().numpy()
    return found[:-1].copy(), int(found[-1])
