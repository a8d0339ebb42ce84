"""Collaborative vectors of events: what a factorisation of the answers knows of the item and, by then, of the person.

The formula is that of `peftrec/factors.py`. An event's vector is the effect and the factors of its item, the part of
its user solved from the events before it, the products of both factor by factor, and what all of this adds up to in
matrix factorisation: a small projector soon learns to weigh numbers, and takes long to learn to multiply.

No vector knows an answer that is still to be given: docs/decisions/018-side-vectors.md says how, and why it matters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from peftrec import factors, rating_baselines
from peftrec.baselines import History, Ties
from peftrec.draws import drawn_order
from peftrec.factors import Floats, Items, Penalties
from peftrec.side_files import Singles

if TYPE_CHECKING:
    from peftrec.split import Log

_GROUPS = 5


@dataclass(frozen=True)
class Factors:
    """The items' side after all training events, and how a person's side follows from a history.

    Attributes:
        items: effects and factors; the last row, of zeros, is that of an unknown item.
        values: what each answer counts as (A,).
        user_penalty: ridge penalty on a person's intercept.
        factor_penalty: the same on a person's factors.
    """

    items: Items
    values: Floats
    user_penalty: float
    factor_penalty: float

    @property
    def size(self) -> int:
        """Numbers of a vector."""
        return 3 * int(self.items.factors.shape[1]) + 3

    def _penalty(self) -> Floats:
        return Penalties(0.0, self.user_penalty, self.factor_penalty).of_user(self.items.factors.shape[1])

    def vectors(self, history: npt.NDArray[np.int64], answers: Sequence[int], candidates: Any) -> Singles:
        """Vectors of one person's events and candidates, (h + c, size).

        Args:
            history: rows of items met, oldest first (h,); -1 is an unknown item.
            answers: index of each one's answer (h,).
            candidates: rows of items in question (c,).
        """
        design = self.items.design(history)
        value = self.values[np.asarray(answers, dtype=np.int64)] - self.items.base(history)
        every = np.ones(len(history), dtype=bool)
        before = factors.solved_earlier(design, value, np.arange(len(history)), every, self._penalty())
        now = factors.solve(design, value, self._penalty())
        person = np.concatenate([before, np.broadcast_to(now, (len(candidates), len(now)))])
        return _joined(self.items, np.concatenate([history, np.asarray(candidates, dtype=np.int64)]), person)


def _joined(items: Items, item: Any, person: Floats) -> Singles:
    of_item = items.factors[item]
    both = of_item * person[:, 1:]
    effect = items.effect[item][:, None]
    told = effect + person[:, :1] + both.sum(axis=1, keepdims=True)
    return np.concatenate([effect, of_item, person, both, told], axis=1).astype(np.float32)


@dataclass(frozen=True)
class Fitted:
    """Vectors of all events of a log, each as training and as evaluation show it.

    Attributes:
        factors: for whomever the adapter meets later.
        training: (n, size); zeros but for training rows.
        in_training: whether a row has such a vector (n,).
        evaluation: (n, size).
        in_evaluation: whether a row has such a vector (n,).
        settings: of the factorisation, chosen on the validation rows.
    """

    factors: Factors
    training: Singles
    in_training: npt.NDArray[np.bool_]
    evaluation: Singles
    in_evaluation: npt.NDArray[np.bool_]
    settings: rating_baselines.RatingSettings


def fit(log: Log, task: Literal["click", "rating"], history: History, ties: Ties, seed: int) -> Fitted:
    """Factorise the training answers, and make a vector for every event.

    Args:
        log: all splits, with items.
        task: clicks are scaled to a deviation of one, so that penalties mean the same for both.
        history: what validation and test rows know of their user.
        ties: whether a row knows its user's events of the same timestamp that stand before it.
        seed: draws the groups of users and the factors that fits start from.
    """
    train = log.split == 0
    scale = np.asarray(log.scale, dtype=np.float64)
    values = scale / (float(log.label[train].std()) or 1.0) if task == "click" else scale
    rating = values[log.label]
    answers = replace(log, rating=rating.astype(np.float32), scale=tuple(values.tolist()))
    settings = rating_baselines.predict(answers, history, ties, "time", None, seed, names=("mf",)).settings
    sizes = (len(log.user_ids), len(log.items))
    penalties = Penalties(settings.item, settings.user, settings.factor_penalty)

    def items_of(rows: npt.NDArray[np.bool_]) -> tuple[Items, npt.NDArray[np.bool_]]:
        mean = float(rating[rows].mean()) if rows.any() else float(values.mean())
        found = factors.fit_items(
            log.user[rows], log.item[rows], rating[rows], mean, sizes, settings.factors, penalties, seed
        )
        return found, np.bincount(log.item[rows], minlength=sizes[1]) > 0

    whole, met = items_of(train)
    person = Factors(whole, values, settings.user, settings.factor_penalty)
    events = _Events(log, rating, train, history, ties, person._penalty())
    training = np.zeros((len(log), person.size), dtype=np.float32)
    in_training = np.zeros(len(log), dtype=bool)
    for rows in _groups(log, train, seed):
        if not rows.any():
            continue
        items, known = items_of(train & ~rows)
        items = replace(items, factors=items.factors @ _rotation(items.factors, whole.factors))
        training[rows] = _joined(items, log.item[rows], events.earlier(items, rows, train)[rows])
        in_training[rows] = known[log.item[rows]]
    evaluation = _joined(whole, log.item, events.evaluated(whole))
    return Fitted(person, training, in_training, evaluation, met[log.item], settings)


def _groups(log: Log, train: npt.NDArray[np.bool_], seed: int) -> Iterator[npt.NDArray[np.bool_]]:
    """Training rows of each group of users."""
    group = np.empty(len(log.user_ids), dtype=np.int64)
    group[drawn_order(len(group), seed, "side groups")] = np.arange(len(group)) % _GROUPS
    return (train & (group[log.user] == number) for number in range(_GROUPS))


def _rotation(factors_: Floats, onto: Floats) -> Floats:
    """The rotation (k, k) that brings factors nearest to others (Procrustes); predictions do not change by it."""
    left, _, right = np.linalg.svd(factors_.T @ onto)
    return np.asarray(left @ right, dtype=np.float64)


class _Events:
    """A user's part at each event of a log, (n, 1 + k)."""

    def __init__(
        self, log: Log, rating: Floats, train: npt.NDArray[np.bool_], history: History, ties: Ties, penalty: Floats
    ) -> None:
        self.log, self.rating, self.train, self.history, self.ties = log, rating, train, history, ties
        self.penalty = penalty
        self.start = np.searchsorted(log.user, np.arange(len(log.user_ids) + 1))

    def evaluated(self, items: Items) -> Floats:
        """Of all rows, as an evaluated row and its history show them."""
        every = np.ones(len(self.log), dtype=bool)
        if self.history == "streaming":
            return self.earlier(items, every, every)
        found = self.earlier(items, self.train, self.train)
        for user in np.unique(self.log.user[~self.train]):
            events = np.arange(self.start[user], self.start[user + 1])
            design, value = self._of(items, events[self.train[events]])
            found[events[~self.train[events]]] = factors.solve(design, value, self.penalty)
        return found

    def earlier(self, items: Items, rows: npt.NDArray[np.bool_], known: npt.NDArray[np.bool_]) -> Floats:
        """Of `rows` (n,), which are among the `known`, by the known events before each; zeros elsewhere."""
        found: Floats = np.zeros((len(self.log), len(self.penalty)))
        for user in np.unique(self.log.user[rows]):
            events = np.arange(self.start[user], self.start[user + 1])
            events = events[known[events]]
            wanted = rows[events]
            design, value = self._of(items, events)
            time = self.log.timestamp[events]
            before = np.arange(len(events)) if self.ties == "order" else np.searchsorted(time, time, side="left")
            found[events[wanted]] = factors.solved_earlier(design, value, before, wanted, self.penalty)
        return found

    def _of(self, items: Items, events: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
        item = self.log.item[events]
        return items.design(item), self.rating[events] - items.base(item)
