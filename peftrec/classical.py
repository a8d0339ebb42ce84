"""Classical recommenders out of scikit-surprise: item k-NN, SVD and SVD++, each knowing what the model knows of a row.

The library fits the items' side (effects, factors or similarities) on the training events. The user's side is solved
from the events known of that user at that moment, so nobody needs to be known from training:

* `svd`, `svdpp`: intercept and factors of the user by a ridge fit, which SVD++ draws to the sum of what the user's
  items say by having been chosen (Koren, "Factorization meets the neighborhood", KDD 2008, section 4), `svd` to zero;
* `item_knn`: the shrunk mean of what the item effects leave, and around it the nearest known items (Koren, "Factor in
  the neighbors", TKDD 2010, formula 3), with the library's own constants. For a user with training events this is the
  library's own prediction.

A validation or test row knows all training events of its user (`history` "frozen"), or the strictly earlier ones of
whichever split ("streaming"). Clicks are fitted as 0 and 1 even where ratings stand behind them, because a prompt shows
no more than that, and become log-odds by two numbers fitted on the validation rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from peftrec.baselines import History, Ties, platt
from peftrec.errors import ConfigError, DataError
from peftrec.people import Person, Places, held_people

if TYPE_CHECKING:
    from peftrec.split import Log

Floats = npt.NDArray[np.float64]
Task = Literal["click", "rating"]

NAMES = ("item_knn", "svd", "svdpp")
MOST_ITEMS = 7_000
"""`item_knn` compares all items of the training events in tables of 40 bytes a pair: 2 GB at this many."""
MOST_EVENTS = 10_000_000
"""The library keeps events as Python tuples, some 200 bytes each: 2 GB at this many."""
MOST_PAIRS = 500_000_000
"""`svdpp` reads all of a user's events at each of them, 20 times over: some minutes for so many pairs; a tenth of
that in `item_knn`."""

_NEAREST_GRID = (20, 40, 80)
_REGULARISATION_GRID = (0.05, 0.1, 0.15)
_FACTOR_PENALTY_GRID = (3.0, 6.0, 10.0, 15.0, 25.0, 40.0)
_FIRST_FACTOR_PENALTY = 10.0
_INTERCEPT_PENALTY = 4.0
_USER_SHRINKAGE = 15  # events at zero, as in the library's own effects, which `item_knn` starts from
_BLOCK = 1024


@dataclass(frozen=True)
class Predictions:
    """Scores of the held-out rows of a log.

    Attributes:
        scores: baseline -> float64 (n,): predicted ratings within the scale, or log-odds of a like; nan in training
            rows. A log without items has none.
        settings: baseline -> what was chosen for it on the validation rows.
    """

    scores: dict[str, Floats]
    settings: dict[str, dict[str, float]]


def check(names: Sequence[str]) -> None:
    """See whether the library is there, if one of `names` needs it.

    Raises:
        ConfigError: it is not.
    """
    if wanted := [name for name in names if name in NAMES]:
        optional("surprise", "scikit-surprise", wanted)


def predict(
    log: Log, names: Sequence[str], history: History, ties: Ties = "isolate", task: Task = "rating", seed: int = 13
) -> Predictions:
    """Score all validation and test rows by what is known of each.

    Args:
        log: all splits.
        names: baselines; those that are not in `NAMES` are left to others.
        history: what validation and test rows know of their user, see the module's text.
        ties: "order" lets a row know the events of its own user that share its timestamp and stand before it.
        task: whether scores are ratings, or log-odds.
        seed: draws the factors that a fit starts from.

    Raises:
        ConfigError: the library is not installed.
        DataError: the log is too large for one of them.
    """
    names = [name for name in NAMES if name in names]
    if not names:
        return Predictions({}, {})
    surprise = optional("surprise", "scikit-surprise", names)
    if not len(log.items):
        return Predictions({}, {})
    known = _Known(log, history, ties)
    for name in names:
        _check_size(name, known)
    scores, settings = {}, {}
    for name in names:
        predicted, settings[name] = _FIT[name](surprise, known, seed)
        if task == "click":
            slope, intercept = platt(predicted[known.valid], log.label[known.valid] == 1)
            settings[name] |= {"slope": slope, "intercept": intercept}
            scores[name] = slope * predicted + intercept
        else:
            scores[name] = np.clip(predicted, log.scale[0], log.scale[-1])
    return Predictions(scores, settings)


def optional(module: str, package: str, names: Sequence[str]) -> Any:
    """A module of the extra `baselines`, which the opponents `names` need.

    Raises:
        ConfigError: it cannot be imported.
    """
    try:
        return import_module(module)
    except ImportError as error:
        found = str(error).partition("\n")[0]
        raise ConfigError(
            f"eval.baselines: {', '.join(names)} cannot be fitted, for {package} cannot be imported ({found}); "
            "expected the extra 'baselines': run pip install 'peftrec[baselines]', or leave them out"
        ) from None


class _Known:
    """The training events, and what each held-out row knows of its user.

    Values are centred and scaled to a deviation of one, so that one set of penalties fits every scale.
    """

    def __init__(self, log: Log, history: History, ties: Ties):
        self._log, self._history, self._ties = log, history, ties
        self._train, self.held, self.valid = log.split == 0, log.split != 0, log.split == 1
        answer = np.asarray(log.scale)[log.label]
        fitted_on = self._train & (log.item >= 0)
        learned = answer[fitted_on] if fitted_on.any() else np.asarray(log.scale)
        self._mean, self._deviation = float(learned.mean()), float(learned.std()) or 1.0
        self.value: Floats = (answer - self._mean) / self._deviation
        # Only items of training events have a place of their own; all others share the last one, which is all zeros.
        items, place = np.unique(log.item[fitted_on], return_inverse=True)
        self.items = len(items)
        self.place = np.full(len(log.items) + 1, self.items)
        self.place[items] = np.arange(self.items)
        self.place = self.place[log.item]
        _, user, self.events_of_user = np.unique(log.user[fitted_on], return_inverse=True, return_counts=True)
        self._triples = user.tolist(), place.tolist(), self.value[fitted_on].tolist()
        self.empty = not fitted_on.any()

    def trainset(self, library: Any) -> Any:
        """The training events as the library wants them."""
        of_user, of_item = defaultdict(list), defaultdict(list)
        for user, item, value in zip(*self._triples, strict=True):
            of_user[user].append((item, value))
            of_item[item].append((user, value))
        return library.Trainset(
            of_user, of_item, len(self.events_of_user), self.items, len(self._triples[0]), (-np.inf, np.inf), {}, {}
        )

    def predict(self, told: Callable[[Person], Floats], rows: npt.NDArray[np.bool_]) -> Floats:
        """What `told` says of the held-out `rows` in units of the scale (n,); nan elsewhere."""
        found = np.full(len(self._log), np.nan)
        for person in held_people(self._log, rows, self._history, self._ties):
            found[person.rows] = self._mean + self._deviation * told(person)
        return found

    def best(self, candidates: dict[Any, Callable[[Person], Floats]], first: Any) -> Any:
        """The key with the lowest squared error on validation rows; `first` where there are none."""
        if not self.valid.any():
            return first
        answer = self._mean + self._deviation * self.value[self.valid]

        def error(key: Any) -> float:
            return float(np.mean((self.predict(candidates[key], self.valid)[self.valid] - answer) ** 2))

        return min(candidates, key=error)


@dataclass(frozen=True)
class _Factors:
    """The items' side of a factorisation; the last row of each is zero.

    Attributes:
        effect: (items + 1,).
        factors: (items + 1, k).
        chosen: what having been chosen says of a user's factors (items + 1, k); zeros without such a term.
    """

    known: _Known
    effect: Floats
    factors: Floats
    chosen: Floats

    def told(self, factor_penalty: float) -> Callable[[Person], Floats]:
        """Predictions under a ridge penalty on the user's factors."""
        penalty = np.full(1 + self.factors.shape[1], factor_penalty)
        penalty[0] = _INTERCEPT_PENALTY
        return lambda person: self._of_person(person, penalty)

    def _of_person(self, person: Person, penalty: Floats) -> Floats:
        place = self.known.place
        moments, of_row = np.unique(person.known, return_inverse=True)
        users = self._users(person.events, moments, penalty)
        told: Floats = self.effect[place[person.rows]] + np.sum(self._design(person.rows) * users[of_row], axis=1)
        return told

    def _users(self, events: Places, moments: Places, penalty: Floats) -> Floats:
        """The user's part (m, 1 + k) after the first so many events, for ascending moments (m,)."""
        place, width = self.known.place[events], len(penalty)
        design, residual = self._design(events), self.known.value[events] - self.effect[place]
        chosen, counted = self.chosen[place], place < self.known.items
        gram, product, centre = np.diag(penalty), np.zeros(width), np.zeros(width)
        users, last, count = np.empty((len(moments), width)), 0, 0
        for index, moment in enumerate(moments.tolist()):
            new = slice(last, moment)
            gram = gram + design[new].T @ design[new]
            product = product + residual[new] @ design[new]
            centre[1:] += chosen[new].sum(axis=0)
            count += int(counted[new].sum())
            users[index] = np.linalg.solve(gram, product + penalty * centre / np.sqrt(max(count, 1)))
            last = moment
        return users

    def _design(self, rows: Places) -> Floats:
        """What the user's part is multiplied with, (r,) -> (r, 1 + k)."""
        design = np.ones((len(rows), 1 + self.factors.shape[1]))
        design[:, 1:] = self.factors[self.known.place[rows]]
        return design


@dataclass(frozen=True)
class _Neighbours:
    """The items' side of k-NN; the last row of each is zero.

    Attributes:
        effect: (items + 1,).
        similarity: (items + 1, items + 1); neighbours are those above zero.
    """

    known: _Known
    effect: Floats
    similarity: Floats

    def told(self, nearest: int) -> Callable[[Person], Floats]:
        """Predictions from so many nearest items."""
        return lambda person: self._of_person(person, nearest)

    def _of_person(self, person: Person, nearest: int) -> Floats:
        place = self.known.place
        items, met = place[person.rows], place[person.events]
        residual = self.known.value[person.events] - self.effect[met]
        sums = np.concatenate(([0.0], np.cumsum(residual)))
        told: Floats = sums[person.known] / (person.known + _USER_SHRINKAGE)
        for start in range(0, len(items), _BLOCK):
            block = slice(start, start + _BLOCK)
            is_known = np.arange(len(met)) < person.known[block, None]
            weight = np.where(is_known, np.maximum(self.similarity[items[block, None], met], 0.0), 0.0)
            if len(met) > nearest:
                cut = np.partition(weight, len(met) - nearest, axis=1)[:, len(met) - nearest]
                weight[weight < cut[:, None]] = 0.0
            total = weight.sum(axis=1)
            around = weight @ residual - total * told[block]
            told[block] += np.divide(around, total, out=np.zeros_like(total), where=total > 0)
        told += self.effect[items]
        return told


def _item_knn(library: Any, known: _Known, seed: int) -> tuple[Floats, dict[str, float]]:
    similarity, effect = np.zeros((known.items + 1, known.items + 1)), np.zeros(known.items + 1)
    if not known.empty:
        fitted = library.KNNBaseline(
            sim_options={"name": "pearson_baseline", "user_based": False},
            bsl_options={"reg_u": _USER_SHRINKAGE},
            verbose=False,
        ).fit(known.trainset(library))
        similarity[:-1, :-1], effect[:-1] = fitted.sim, fitted.bi
    model = _Neighbours(known, effect, similarity)
    nearest = known.best({k: model.told(k) for k in _NEAREST_GRID}, first=40)
    return known.predict(model.told(nearest), known.held), {"nearest": nearest}


def _svd(library: Any, known: _Known, seed: int) -> tuple[Floats, dict[str, float]]:
    models = {
        each: _factors(
            known, library, library.SVD(n_factors=50, n_epochs=40, lr_all=0.01, reg_all=each, random_state=seed)
        )
        for each in _REGULARISATION_GRID
    }
    first = {each: model.told(_FIRST_FACTOR_PENALTY) for each, model in models.items()}
    regularisation = known.best(first, first=0.1)
    predicted, settings = _with_penalty(known, models[regularisation])
    return predicted, {"regularisation": regularisation, **settings}


def _svdpp(library: Any, known: _Known, seed: int) -> tuple[Floats, dict[str, float]]:
    # The library's own defaults, with which its published figures were made: one fit takes as long as a dozen of `svd`.
    return _with_penalty(known, _factors(known, library, library.SVDpp(random_state=seed, cache_ratings=True)))


def _with_penalty(known: _Known, model: _Factors) -> tuple[Floats, dict[str, float]]:
    grid = {each: model.told(each) for each in _FACTOR_PENALTY_GRID}
    penalty = known.best(grid, first=_FIRST_FACTOR_PENALTY)
    return known.predict(grid[penalty], known.held), {"factor_penalty": penalty}


def _factors(known: _Known, library: Any, algorithm: Any) -> _Factors:
    """The items' side that the library's algorithm learns."""
    k = algorithm.n_factors
    effect, factors, chosen = np.zeros(known.items + 1), np.zeros((known.items + 1, k)), np.zeros((known.items + 1, k))
    if not known.empty:
        algorithm.fit(known.trainset(library))
        effect[:-1], factors[:-1] = algorithm.bi, algorithm.qi
        if hasattr(algorithm, "yj"):
            chosen[:-1] = algorithm.yj
    return _Factors(known, effect, factors, chosen)


_FIT: dict[str, Callable[[Any, _Known, int], tuple[Floats, dict[str, float]]]] = {
    "item_knn": _item_knn,
    "svd": _svd,
    "svdpp": _svdpp,
}


def _check_size(name: str, known: _Known) -> None:
    """Refuse what would fill the memory or take a day.

    Raises:
        DataError: says what is too large.
    """
    events = int(known.events_of_user.sum())
    pairs = int(np.sum(known.events_of_user.astype(np.int64) ** 2))
    sizes = {
        "item_knn": (
            (known.items, MOST_ITEMS, "items in training"),
            (pairs, 10 * MOST_PAIRS, "pairs of events of a user"),
        ),
        "svd": ((events, MOST_EVENTS, "training events"),),
        "svdpp": ((events, MOST_EVENTS, "training events"), (pairs, MOST_PAIRS, "pairs of events of a user")),
    }
    for found, most, what in sizes[name]:
        if found > most:
            raise DataError(f"eval.baselines: {name} with {found:,} {what}; expected at most {most:,}; leave it out")
