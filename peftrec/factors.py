"""Ratings as `mean + effect of the item + [1, factors of the item] . part of the user`, each part a ridge fit.

Items are fitted once (alternating effects, then factors by alternating least squares on what these leave). The part of
a user is solved from the events that are known of that user, so it follows whatever a row may know: all of them, all
but the row itself, or those before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from peftrec.draws import stream

Floats = npt.NDArray[np.float64]
Codes = npt.NDArray[Any]

_EFFECT_ROUNDS = 10
_FACTOR_ROUNDS = 12
# Systems solved at once, and rows summed at once: enough to hide the calls, small enough for any machine.
_BLOCK = 1024


@dataclass(frozen=True)
class Penalties:
    """Ridge penalties; each is worth that many events that agree with zero (of factors: of factor one).

    Attributes:
        item: on the effect of an item.
        user: on the intercept of a user.
        factor: on factors of items and users.
    """

    item: float
    user: float
    factor: float

    def of_user(self, factors: int) -> Floats:
        """Penalties (1 + factors,) on a user's part."""
        return np.array([self.user, *[self.factor] * factors])


@dataclass(frozen=True)
class Items:
    """What is known of items.

    Attributes:
        mean: mean rating.
        effect: what the item adds (items + 1,); the last is zero, where the code -1 of no item finds it.
        factors: (items + 1, k), the last zero in the same way.
    """

    mean: float
    effect: Floats
    factors: Floats

    def base(self, item: Codes) -> Floats:
        """Ratings of a user of whom nothing is known, (n,) codes -> (n,)."""
        base: Floats = self.mean + self.effect[item]
        return base

    def design(self, item: Codes) -> Floats:
        """What a user's part is multiplied with, (n,) codes -> (n, 1 + k)."""
        design = np.ones((len(item), 1 + self.factors.shape[1]))
        design[:, 1:] = self.factors[item]
        return design


def fit_items(
    user: Codes,
    item: Codes,
    rating: Floats,
    mean: float,
    sizes: tuple[int, int],
    k: int,
    penalties: Penalties,
    seed: int,
) -> Items:
    """Effects and factors of items from the given events; items without an event get zeros.

    Args:
        user: codes (n,) from 0.
        item: codes (n,) from -1, which stands for no item.
        rating: (n,).
        mean: what effects are deviations from.
        sizes: numbers of users and items.
        k: number of factors; 0 fits effects alone.
        penalties: see there.
        seed: draws the factors that the rounds start from.
    """
    known = item >= 0
    user, item, residual = user[known], item[known], rating[known] - mean
    of_item, of_user = _effects(user, item, residual, sizes, penalties)
    factors = np.zeros((sizes[1] + 1, k))
    if k and len(residual):
        residual = residual - of_item[item] - of_user[user]
        factors[:-1] = _factors(user, item, residual, sizes, k, penalties.factor, seed)
    return Items(mean, np.append(of_item, 0.0), factors)


def solve(design: Floats, value: Floats, penalty: Floats) -> Floats:
    """Ridge solution (d,) of (n, d) and (n,) under penalties (d,); zeros where there are no rows."""
    solution = np.linalg.solve(design.T @ design + np.diag(penalty), value @ design)
    return np.asarray(solution, dtype=np.float64)


def leave_one_out(design: Floats, value: Floats, penalty: Floats) -> Floats:
    """What the ridge fit of all other rows says of each row, (n, d) and (n,) -> (n,).

    No fit is repeated: with leverage h, the fit without the row says `(fitted - h value) / (1 - h)` (Hastie, Tibshirani
    and Friedman, The Elements of Statistical Learning, 7.10).
    """
    weights = design @ np.linalg.inv(design.T @ design + np.diag(penalty))
    leverage = np.sum(weights * design, axis=1)
    left_out: Floats = (weights @ (value @ design) - leverage * value) / (1 - leverage)
    return left_out


def solved_earlier(
    design: Floats, value: Floats, known: npt.NDArray[np.int64], wanted: npt.NDArray[np.bool_], penalty: Floats
) -> Floats:
    """The ridge fit of the rows before each row.

    Args:
        design: (n, d), in order of time.
        value: (n,).
        known: how many of the first rows each row knows (n,), never falling and never itself.
        wanted: rows for which it is asked (n,).
        penalty: (d,).

    Returns:
        Solutions for the wanted rows, in their order, (wanted rows, d).
    """
    moments, of_row = np.unique(known[wanted], return_inverse=True)
    solutions = np.empty((len(moments), design.shape[1]))
    gram: Floats = np.diag(penalty)
    product: Floats = np.zeros(design.shape[1])
    # Sums up to each row, a block of rows at a time, so that memory does not grow with the user.
    for start in range(0, len(value), _BLOCK):
        rows = design[start : start + _BLOCK]
        grams = _running(gram, rows[:, :, None] * rows[:, None, :])
        products = _running(product, rows * value[start : start + _BLOCK, None])
        here = (moments >= start) & (moments < start + len(rows))
        at = moments[here] - start
        solutions[here] = np.linalg.solve(grams[at], products[at][:, :, None])[:, :, 0]
        gram, product = grams[-1], products[-1]
    return solutions[of_row]


def _running(first: Floats, terms: Floats) -> Floats:
    """Sums of `first` and the terms before each place, and of all: (b, ...) -> (b + 1, ...)."""
    return np.cumsum(np.concatenate([first[None], terms]), axis=0)


def _effects(
    user: Codes, item: Codes, residual: Floats, sizes: tuple[int, int], penalties: Penalties
) -> tuple[Floats, Floats]:
    """Effects of items and users, each the ridge fit given the other."""
    users, items = sizes
    of_item, of_user = np.zeros(items), np.zeros(users)
    item_weight = np.bincount(item, minlength=items) + penalties.item
    user_weight = np.bincount(user, minlength=users) + penalties.user
    for _ in range(_EFFECT_ROUNDS):
        of_item = np.bincount(item, residual - of_user[user], items) / item_weight
        of_user = np.bincount(user, residual - of_item[item], users) / user_weight
    return of_item, of_user


def _factors(
    user: Codes, item: Codes, residual: Floats, sizes: tuple[int, int], k: int, penalty: float, seed: int
) -> Floats:
    """Factors of items (items, k) by alternating least squares."""
    users, items = sizes
    generator = stream(seed, "factors")
    of_items: Floats = generator.random((items, k)) - 0.5
    by_user, by_item = _Grouped(user, item, residual, users), _Grouped(item, user, residual, items)
    for _ in range(_FACTOR_ROUNDS):
        of_items = by_item.solve(by_user.solve(of_items, penalty), penalty)
    return of_items


class _Grouped:
    """Events by one side (`key`), to solve that side's factors given those of the other."""

    def __init__(self, key: Codes, other: Codes, value: Floats, size: int):
        order = np.argsort(key, kind="stable")
        self._start = np.searchsorted(key[order], np.arange(size + 1)).tolist()
        self._other, self._value = other[order], value[order]

    def solve(self, factors: Floats, penalty: float) -> Floats:
        """Factors (keys, k) from those of the other side; a key without events gets zeros."""
        size, k = len(self._start) - 1, factors.shape[1]
        solved = np.empty((size, k))
        for first in range(0, size, _BLOCK):
            block = range(first, min(first + _BLOCK, size))
            grams, products = np.empty((len(block), k, k)), np.empty((len(block), k))
            for place, key in enumerate(block):
                rows = slice(self._start[key], self._start[key + 1])
                design = factors[self._other[rows]]
                grams[place] = design.T @ design
                products[place] = self._value[rows] @ design
            grams += penalty * np.eye(k)
            solved[block.start : block.stop] = np.linalg.solve(grams, products[:, :, None])[:, :, 0]
        return solved
