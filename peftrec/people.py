"""What a row may know of its own user, for models that read a person's events one after another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from peftrec.baselines import History, Ties

if TYPE_CHECKING:
    from peftrec.split import Log

Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Person:
    """One user's events as the user's rows to score know them.

    Attributes:
        events: rows of the log that may be known (h,), in the order in which they become known.
        rows: rows of the log to score (w,).
        known: how many of the first events each of them knows (w,), never falling.
    """

    events: Places
    rows: Places
    known: Places


def held_people(log: Log, rows: npt.NDArray[np.bool_], history: History, ties: Ties) -> Iterator[Person]:
    """Each user who has one of the validation and test `rows` (n,), with the events that `history` lets them know."""
    if history == "streaming":
        return _people(log, rows, np.ones(len(log), dtype=bool), ties)
    return _people(log, rows, log.split == 0, None)


def training_people(log: Log, ties: Ties) -> Iterator[Person]:
    """Each user who has a training event; each of them knows the earlier ones."""
    return _people(log, log.split == 0, log.split == 0, ties)


def _people(
    log: Log, rows: npt.NDArray[np.bool_], readable: npt.NDArray[np.bool_], ties: Ties | None
) -> Iterator[Person]:
    """With no rule for ties a row knows all readable events, whenever they were."""
    start = np.searchsorted(log.user, np.arange(len(log.user_ids) + 1))
    for user in np.unique(log.user[rows]):
        own = np.arange(start[user], start[user + 1])
        wanted, events = own[rows[own]], own[readable[own]]
        known: npt.NDArray[Any]
        if ties is None:
            known = np.full(len(wanted), len(events))
        elif ties == "order":
            known = np.searchsorted(events, wanted)
        else:
            known = np.searchsorted(log.timestamp[events], log.timestamp[wanted], side="left")
        yield Person(events, wanted, known)
