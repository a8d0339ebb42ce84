"""What is measured beside the model, and the prior that it may build on: one entrance for both tasks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from peftrec import baselines, blend, boosting, bpmf, classical, click_factors, lstm_clicks, rating_baselines
from peftrec.baselines import History, Prior, Shrinkage
from peftrec.blend import BlendedPrior
from peftrec.bpmf import BpmfPrior
from peftrec.click_factors import ClickFactors
from peftrec.errors import DataError, ModelError
from peftrec.rating_baselines import RatingPrior

if TYPE_CHECKING:
    from peftrec.config import Recipe
    from peftrec.split import Log


SavedPrior = Prior | ClickFactors | RatingPrior | BpmfPrior | BlendedPrior


@dataclass(frozen=True)
class Opponents:
    """Scores of every row of a log by counting alone, each knowing of a row what the model knows.

    Attributes:
        scores: baseline -> (n,), those of the recipe and `global_mean`; NaN where one says nothing of training rows.
        prior: what the model's score builds on, (n,), float32, or None.
        saved_prior: the same for whomever the adapter meets later, or None.
        settings: what was chosen for them on the validation rows.
    """

    scores: dict[str, npt.NDArray[np.float64]]
    prior: npt.NDArray[np.float32] | None
    saved_prior: SavedPrior | None
    settings: dict[str, Any] = field(default_factory=dict)


def prior_from_json(task: Literal["click", "rating"], text: str) -> SavedPrior:
    """The saved prior of an adapter for this task.

    Raises:
        ModelError: the text is none.
    """
    if f'"{blend.NAME}"' in text[:20]:
        blended = BlendedPrior.from_json(text, partial(prior_from_json, task))
        if (blended.bounds is None) is not (task == "click") or isinstance(blended.prior, BlendedPrior):
            raise ModelError(f"prior: a blend of another kind than one for {task}; fetch the adapter again")
        return blended
    if f'"{bpmf.NAME}"' in text[:20]:
        prior = BpmfPrior.from_json(text)
        if (prior.log_odds is None) is (task == "click"):
            raise ModelError(f"prior: of another task than {task}; fetch the adapter again")
        return prior
    if task == "rating":
        return RatingPrior.from_json(text)
    return (ClickFactors if '"factors"' in text[:20] else Prior).from_json(text)


def check(recipe: Recipe) -> None:
    """See whether the libraries are there that the recipe's baselines need.

    Raises:
        ConfigError: one is not.
    """
    classical.check(recipe.eval.baselines)
    boosting.check(recipe.eval.baselines)


def measure(log: Log, recipe: Recipe, items: History | None = None) -> Opponents:
    """The baselines and the prior of a recipe.

    Args:
        log: all splits.
        recipe: its task, score, evaluation, order of training and seed count.
        items: what held-out rows know of items; if left out, as of their user, and of records training alone.

    Raises:
        ConfigError: a baseline needs a library that is not installed.
        DataError: the log is too large for a baseline.
    """
    evaluation, kind = recipe.eval, recipe.score.prior
    items = items or (None if log.asked is None else "frozen")
    check(recipe)
    blends = (blend.NAME,) if recipe.score.blend else ()
    wanted = dict.fromkeys((*evaluation.baselines, *blends, "global_mean", *(() if kind == "none" else (kind,))))
    saved: SavedPrior | None = None
    clicks: baselines.Predictions | None = None
    if recipe.task == "click":
        clicks = baselines.predict(log, evaluation.history, evaluation.ties, items=items)
        found, settings = clicks.scores, dataclasses.asdict(clicks.shrinkage)
        if "mf" in wanted and len(log.items):
            mf = click_factors.predict(log, evaluation.history, evaluation.ties, recipe.train.order, seed=recipe.seed)
            found, settings = {**found, "mf": mf.scores}, {**settings, "mf": mf.settings}
            saved = mf.prior if kind == "mf" else None
        if "lstm" in wanted and len(log.items):
            lstm = lstm_clicks.predict(log, evaluation.history, evaluation.ties, seed=recipe.seed)
            found, settings = {**found, "lstm": lstm.scores}, {**settings, "lstm": lstm.settings}
        if kind == "bias":
            saved = baselines.fit_prior(log, clicks.shrinkage)
    else:
        ratings = rating_baselines.predict(
            log, evaluation.history, evaluation.ties, recipe.train.order, seed=recipe.seed, names=tuple(wanted)
        )
        found, settings = ratings.scores, dataclasses.asdict(ratings.settings)
        if kind in ("bias", "mf"):
            saved = rating_baselines.fit_prior(log, kind, ratings.settings, recipe.seed)
    if bpmf.NAME in wanted and len(log.items):
        ways = evaluation.history, evaluation.ties, recipe.train.order
        item_mean = (found["item_mean"], _item_mean(log, clicks.shrinkage)) if clicks else None
        bayes = bpmf.predict(log, *ways, item_mean, recipe.seed, training=kind == bpmf.NAME, items=items)
        found, settings = {**found, bpmf.NAME: bayes.scores}, {**settings, bpmf.NAME: bayes.settings}
        saved = _loadable(bayes.prior) if kind == bpmf.NAME else saved
    prior = None if kind == "none" else found[kind]
    if blends and prior is not None and saved is not None:
        mixed = blend.predict(
            log,
            evaluation.history,
            evaluation.ties,
            items or evaluation.history,
            (prior, saved),
            clicks=recipe.task == "click",
        )
        prior, saved = mixed.scores, mixed.prior
        found, settings = {**found, blend.NAME: prior}, {**settings, blend.NAME: mixed.settings}
    others = classical.predict(log, evaluation.baselines, evaluation.history, evaluation.ties, recipe.task, recipe.seed)
    found, settings = {**found, **others.scores}, {**settings, **dict(others.settings)}
    if boosting.NAME in wanted and (log.item >= 0).any():
        trees = boosting.predict(log, evaluation.history, evaluation.ties, recipe.task, recipe.seed, items)
        found, settings = {**found, boosting.NAME: trees.scores}, {**settings, boosting.NAME: trees.settings}
    reported = {
        name: found[name] for name in wanted if name in found and (name != kind or name in evaluation.baselines)
    }
    return Opponents(reported, None if prior is None else prior.astype(np.float32), saved, settings)


def _loadable(prior: BpmfPrior) -> BpmfPrior:
    """The prior, if it will be taken for one when it is read again: this is to be known before anything is trained."""
    try:
        return BpmfPrior.from_json(prior.to_json())
    except (ModelError, ValueError) as error:
        raise DataError(f"score.prior: {bpmf.NAME} of these events has numbers too large to save; choose mf") from error


def _item_mean(log: Log, shrinkage: Shrinkage) -> Prior:
    """The item mean of all training events."""
    return baselines.fit_prior(log, Shrinkage(item=shrinkage.item_mean))
