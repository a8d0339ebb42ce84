"""Bayesian matrix factorisation: factors of items that know how sure they are, in one closed form for any person.

The model is that of BPMF (Salakhutdinov and Mnih, "Bayesian probabilistic matrix factorization using Markov chain Monte
Carlo", ICML 2008), where the mean of an item's factors follows from what is known of the item and that of a person's
from what the person chose (Simm et al., "Macau: scalable Bayesian factorization with high-dimensional side
information", MLSP 2017). Gibbs sampling draws items, people and all variances in turn.

A draw makes the answers of a person to all items jointly normal. The draws are averaged into one such normal: its mean
is an effect of each item and its leanings to what the person chose, its covariance is cut to a few factors. So what a
person will answer is a ridge fit of the events that are known of that person, as in `peftrec/factors.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from peftrec.draws import stream

Floats = npt.NDArray[np.float64]
Codes = npt.NDArray[Any]

FACTORS, TRAITS, KEPT_FACTORS = 10, 20, 16
"""Of items and people while sampling; numbers that say what was chosen; factors of the averaged covariance."""

_FIRST_ROUNDS, _ROUNDS = 25, 24  # that are forgotten, and that are averaged
_SIDE_PENALTY = 5.0  # on weights of side information, in units of the factors' own variance
_POWER_ROUNDS = 12
_RARE = 10.0  # events at the centre that an item's traits start from
_UNLEANING = 1.0  # events by which an item's leanings start from nothing
_LARGEST_TRAIT = 100.0  # of an item that one person alone has met, among very many people
_LEAST_BETWEEN = 0.01  # of what differs within people: less than that between them is taken for noise
_ROUNDING = 1e-12
_DIGITS = 6
# Systems solved at once, and rows summed at once: enough to hide the calls, small enough for any machine.
_BLOCK = 1024


@dataclass(frozen=True)
class Posterior:
    """What is known of items; the last row of each is that of an unknown item, all zeros.

    Answers are `mean + deviation * (effect + leanings . traits of the person + factors . part of the person)`. The
    traits of a person are the sum of those of the items met, divided by their number plus `shrinkage`; the part of the
    person is the ridge fit, with a penalty of one, of what effects and leanings leave of the known answers.

    Attributes:
        mean: mean answer.
        deviation: of the answers.
        effect: (items + 1,).
        factors: (items + 1, r), in units of the noise.
        traits: (items + 1, d).
        leanings: (items + 1, d).
        shrinkage: events of no kind that a person's traits start from (d,).
    """

    mean: float
    deviation: float
    effect: Floats
    factors: Floats
    traits: Floats
    leanings: Floats
    shrinkage: Floats

    def told(self, met: Codes, answers: Floats, asked: Codes) -> Floats:
        """Answers (a,) that a person will give to the items `asked` (a,), after these answers (h,) to `met` (h,)."""
        person = self.traits[met].sum(axis=0) / (len(met) + self.shrinkage)
        design, residual = self.factors[met], self._standard(answers) - self.effect[met] - self.leanings[met] @ person
        part = np.linalg.solve(design.T @ design + np.eye(design.shape[1]), residual @ design)
        return self._answers(self.effect[asked] + self.leanings[asked] @ person + self.factors[asked] @ part)

    def left_out(self, met: Codes, answers: Floats) -> Floats:
        """What `told` says of each event from all the others of the person, (n,) and (n,) -> (n,).

        No fit is repeated: see `factors.leave_one_out`. Here the person's traits change with the event left out, too.
        """
        traits, design, leanings = self.traits[met], self.factors[met], self.leanings[met]
        person = (traits.sum(axis=0) - traits) / (len(met) - 1 + self.shrinkage)
        residual = self._standard(answers) - self.effect[met]
        weights = design @ np.linalg.inv(design.T @ design + np.eye(design.shape[1]))
        leverage, leaning = np.sum(weights * design, axis=1), np.sum(leanings * person, axis=1)
        fitted = weights @ (residual @ design) - np.sum(weights @ (design.T @ leanings) * person, axis=1)
        part = (fitted - leverage * (residual - leaning)) / (1 - leverage)
        return self._answers(self.effect[met] + leaning + part)

    def from_earlier(self, met: Codes, answers: Floats, known: npt.NDArray[np.int64], asked: Codes) -> Floats:
        """What `told` says of each item asked about from the first so many events.

        Args:
            met: items in order of time (n,).
            answers: (n,).
            known: how many of the events each question knows (a,), never falling.
            asked: items (a,).
        """
        moments, of_row = np.unique(known, return_inverse=True)
        traits, design, leanings = self.traits[met], self.factors[met], self.leanings[met]
        residual = self._standard(answers) - self.effect[met]
        width = design.shape[1]
        people, parts = np.empty((len(moments), len(self.shrinkage))), np.empty((len(moments), width))
        person, gram, product = np.zeros(len(self.shrinkage)), np.eye(width), np.zeros(width)
        crossed, last = np.zeros((width, len(self.shrinkage))), 0
        # Sums up to a number of moments at once, so that memory does not grow with the user.
        for first in range(0, len(moments), _BLOCK):
            ends = moments[first : first + _BLOCK]
            new = slice(last, int(ends[-1]))
            at = ends - last
            here = slice(first, first + len(ends))
            grams = _sums(gram, design[new], design[new], at)
            products = _sums(product[:, None], design[new], residual[new, None], at)[:, :, 0]
            crosses = _sums(crossed, design[new], leanings[new], at)
            sums = _sums(person[:, None], traits[new], np.ones((int(ends[-1]) - last, 1)), at)[:, :, 0]
            people[here] = sums / (ends[:, None] + self.shrinkage)
            wanted = products - np.einsum("mrd,md->mr", crosses, people[here])
            parts[here] = np.linalg.solve(grams, wanted[:, :, None])[:, :, 0]
            person, gram, product, crossed, last = sums[-1], grams[-1], products[-1], crosses[-1], int(ends[-1])
        leaning = np.sum(self.leanings[asked] * people[of_row], axis=1)
        return self._answers(self.effect[asked] + leaning + np.sum(self.factors[asked] * parts[of_row], axis=1))

    def penalised(self, penalty: float) -> Posterior:
        """The same with another penalty on the part of a person than one: factors in other units do it."""
        return replace(self, factors=np.round(self.factors / np.sqrt(penalty), _DIGITS))

    def _standard(self, answers: Floats) -> Floats:
        return (answers - self.mean) / self.deviation

    def _answers(self, standard: Floats) -> Floats:
        found: Floats = self.mean + self.deviation * standard
        return found


def fit(user: Codes, item: Codes, answer: Floats, known: Floats, middle: float, seed: int) -> Posterior:
    """Learn items from the given events.

    Args:
        user: codes (n,) from 0.
        item: codes (n,) from -1, which stands for no item.
        answer: (n,).
        known: side information on each item, in numbers around one (items, g).
        middle: the mean answer where there are no events.
        seed: draws the samples.
    """
    events = item >= 0
    mean = float(answer.mean()) if len(answer) else middle
    deviation = float(answer.std()) if len(answer) else 1.0
    deviation = deviation if deviation > 0 else 1.0
    _, user = np.unique(user[events], return_inverse=True)
    item, value = item[events], (answer[events] - mean) / deviation
    items = len(known)
    if not len(value):
        nothing = np.zeros((items + 1, 0))
        return Posterior(mean, deviation, np.zeros(items + 1), nothing, nothing, nothing, np.zeros(0))
    traits = _traits(user, item, items, seed)
    draws = _draws(user, item, value, known, traits, seed)
    # Whoever chose an item that nobody else has met liked it better than others of such a taste would.
    met = np.bincount(item, minlength=items)
    leanings = draws.leanings * (met / (met + _UNLEANING))[:, None]
    return Posterior(
        mean,
        deviation,
        _kept(draws.effect),
        _kept(draws.factors(item)),
        _kept(traits.of_items),
        _kept(leanings),
        traits.shrinkage,
    )


@dataclass(frozen=True)
class _Traits:
    """What was chosen, in a few numbers.

    Attributes:
        of_items: centred, in units of how people differ (items, d).
        shrinkage: (d,).
        of_people: of each user after all its events (users, d).
        beside: of items as side information on them (items, d).
    """

    of_items: Floats
    shrinkage: Floats
    of_people: Floats
    beside: Floats


def _traits(user: Codes, item: Codes, items: int, seed: int) -> _Traits:
    """Correspondence analysis of who met what; a few events say less of a person, by as much as people differ."""
    users = int(user.max()) + 1
    of_user, of_item = np.bincount(user), np.bincount(item, minlength=items)
    d = min(TRAITS, users, items)
    by_user, by_item = _Grouped(user, users), _Grouped(item, items)
    weight_user, weight_item = 1 / np.sqrt(of_user)[:, None], 1 / np.sqrt(of_item + _RARE)[:, None]
    found = stream(seed, "traits").standard_normal((items, d))
    for _ in range(_POWER_ROUNDS):
        people = weight_user * by_user.sums(weight_item * found, item)
        found, _ = np.linalg.qr(weight_item * by_item.sums(weight_user * people, user))
    found = found * weight_item
    own = by_user.sums(found, item) / of_user[:, None]
    centre = own.mean(axis=0)
    squares = of_item @ found**2
    within = np.maximum(squares - of_user @ own**2, 0.0) / max(len(item) - users, 1)
    between = np.mean((own - centre) ** 2, axis=0) - within * np.mean(1 / of_user)
    # Where all people are alike, what rounding leaves of their differences is no difference.
    nothing = _ROUNDING * squares / len(item) + np.finfo(float).tiny
    between = np.maximum(np.maximum(between, _LEAST_BETWEEN * within), nothing)
    met = (of_item > 0)[:, None]
    traits = np.where(met, (found - centre) / np.sqrt(between), 0.0)
    beside = np.where(met, (found - centre) / np.sqrt(within + between), 0.0)
    shrinkage = np.round(np.maximum(within / between, 1.0), _DIGITS)
    traits = np.round(np.clip(traits, -_LARGEST_TRAIT, _LARGEST_TRAIT), _DIGITS).astype(np.float64)
    return _Traits(traits, shrinkage, by_user.sums(traits, item) / (of_user[:, None] + shrinkage), beside)


class _Draws:
    """Sums over the draws."""

    def __init__(self, items: int, traits: int):
        self._number = 0
        self._effect, self._leanings = np.zeros(items), np.zeros((items, traits))
        self._covariance: list[Floats] = []

    def add(self, mean: Floats, drawn: Floats, weights: Floats, spread: Floats, noise: float) -> None:
        """One draw.

        Args:
            mean: of the items' effects and factors given the rest (items, 1 + k).
            drawn: (items, 1 + k).
            weights: of people's traits, the first that of nothing, in a person's intercept and factors (1 + d, 1 + k).
            spread: root of the covariance of people around these (1 + k, 1 + k).
            noise: deviation of answers.
        """
        self._number += 1
        leanings = _with_one(mean) @ weights.T
        self._effect += mean[:, 0] + leanings[:, 0]
        self._leanings += leanings[:, 1:]
        self._covariance.append(_with_one(drawn) @ spread / noise)

    @property
    def effect(self) -> Floats:
        """(items,)."""
        return self._effect / self._number

    @property
    def leanings(self) -> Floats:
        """(items, d)."""
        return self._leanings / self._number

    def factors(self, item: Codes) -> Floats:
        """Of the averaged covariance, best where events are, (items, r)."""
        root = np.concatenate(self._covariance, axis=1) / np.sqrt(self._number)
        weighted = np.sqrt(np.bincount(item, minlength=len(root)) + 1.0)[:, None] * root
        _, directions = np.linalg.eigh(weighted.T @ weighted)
        found: Floats = root @ directions[:, ::-1][:, :KEPT_FACTORS]
        return found


def _draws(user: Codes, item: Codes, value: Floats, known: Floats, traits: _Traits, seed: int) -> _Draws:
    """Gibbs sampling of items, people and variances."""
    generator = stream(seed, "draws")
    users, items, k = len(traits.of_people), len(known), FACTORS
    count = np.log1p(np.bincount(item, minlength=items))[:, None]
    ones = np.ones((max(users, items), 1))
    of_people = np.concatenate([ones[:users], traits.of_people], axis=1)
    of_items = np.concatenate([ones[:items], count - count.mean(), traits.beside, known], axis=1)
    by_user, by_item = _Grouped(user, users), _Grouped(item, items)
    person, film = generator.standard_normal((users, 1 + k)) / 10, generator.standard_normal((items, 1 + k)) / 10
    draws, precision = _Draws(items, traits.of_people.shape[1]), 1.0
    for number in range(_FIRST_ROUNDS + _ROUNDS):
        weights, inverse = _hyper(generator, film, of_items)
        left = value - person[user, 0]
        mean, film = by_item.draw(generator, _with_one(person), user, left, precision, inverse, of_items @ weights)
        weights, inverse = _hyper(generator, person, of_people)
        if number >= _FIRST_ROUNDS:
            spread = np.linalg.cholesky(np.linalg.inv(inverse))
            draws.add(mean, film, weights, spread, 1 / np.sqrt(precision))
        left = value - film[item, 0]
        _, person = by_user.draw(generator, _with_one(film), item, left, precision, inverse, of_people @ weights)
        error = left - np.sum(_with_one(film)[item] * person[user], axis=1)
        precision = generator.gamma(len(error) / 2 + 1) / (np.sum(error**2) / 2 + 1)
    return draws


def _hyper(generator: np.random.Generator, drawn: Floats, known: Floats) -> tuple[Floats, Floats]:
    """Weights of side information (g, 1 + k), and the precision of what they leave (1 + k, 1 + k)."""
    rows, width = drawn.shape
    gram = known.T @ known + _SIDE_PENALTY * np.eye(known.shape[1])
    mean = np.linalg.solve(gram, known.T @ drawn)
    left = drawn - known @ mean
    scatter = np.eye(width) + left.T @ left + _SIDE_PENALTY * mean.T @ mean
    precision = _wishart(generator, rows + width, np.asarray(np.linalg.inv(scatter), dtype=np.float64))
    spread = np.linalg.cholesky(np.linalg.inv(gram)), np.linalg.cholesky(np.linalg.inv(precision))
    return mean + spread[0] @ generator.standard_normal(mean.shape) @ spread[1].T, precision


def _wishart(generator: np.random.Generator, freedom: int, scale: Floats) -> Floats:
    """A draw by Bartlett's decomposition."""
    size = len(scale)
    root = np.tril(generator.standard_normal((size, size)), -1)
    root[np.diag_indices(size)] = np.sqrt(generator.chisquare(freedom - np.arange(size)))
    root = np.linalg.cholesky(scale) @ root
    return np.asarray(root @ root.T, dtype=np.float64)


class _Grouped:
    """Events by one side, to sum over them and to draw that side given the other."""

    def __init__(self, key: Codes, size: int):
        self._order = np.argsort(key, kind="stable")
        self._start = np.searchsorted(key[self._order], np.arange(size + 1)).tolist()
        self._key, self._size = key, size

    def sums(self, value: Floats, other: Codes) -> Floats:
        """Of the other sides' values (others, d) over the events of each key, (keys, d)."""
        columns = [np.bincount(self._key, column[other], self._size) for column in value.T]
        return np.stack(columns, axis=1)

    def draw(
        self,
        generator: np.random.Generator,
        factors: Floats,
        other: Codes,
        value: Floats,
        precision: float,
        inverse: Floats,
        mean: Floats,
    ) -> tuple[Floats, Floats]:
        """Mean and a draw of each key's part, (keys, 1 + k) each.

        Args:
            generator: draws.
            factors: of the other side, with one in front (others, 1 + k).
            other: the other side of each event (n,).
            value: what this side has to explain (n,).
            precision: of the values.
            inverse: precision of the parts (1 + k, 1 + k).
            mean: of the parts (keys, 1 + k).
        """
        design, value = factors[other[self._order]], value[self._order]
        means, drawn = np.empty_like(mean), np.empty_like(mean)
        for first in range(0, self._size, _BLOCK):
            block = range(first, min(first + _BLOCK, self._size))
            here = slice(block.start, block.stop)
            grams, products = np.empty((len(block), *inverse.shape)), mean[here] @ inverse
            for place, key in enumerate(block):
                rows = slice(self._start[key], self._start[key + 1])
                grams[place] = design[rows].T @ design[rows]
                products[place] += precision * (value[rows] @ design[rows])
            grams *= precision
            grams += inverse
            means[here] = np.linalg.solve(grams, products[:, :, None])[:, :, 0]
            noise = generator.standard_normal((len(block), len(inverse), 1))
            roots = np.linalg.cholesky(grams).transpose(0, 2, 1)
            drawn[here] = means[here] + np.linalg.solve(roots, noise)[:, :, 0]
        return means, drawn


def _with_one(parts: Floats) -> Floats:
    """Effects and factors (n, 1 + k) as the other side's intercepts and factors meet them: one, and the factors."""
    design = parts.copy()
    design[:, 0] = 1.0
    return design


def _sums(first: Floats, left: Floats, right: Floats, ends: npt.NDArray[np.int64]) -> Floats:
    """`first` and the products of the rows before each end, (n, r) and (n, d) -> (ends, r, d)."""
    found = np.empty((len(ends), *first.shape))
    total, last = first, 0
    for place, end in enumerate(ends.tolist()):
        total = total + left[last:end].T @ right[last:end]
        found[place], last = total, end
    return found


def _kept(rows: Floats) -> Floats:
    """As they travel, with a row of zeros for an unknown item: the run and what is saved use the same numbers."""
    return np.concatenate([np.round(rows, _DIGITS), np.zeros((1, *rows.shape[1:]))])
