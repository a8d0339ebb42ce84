"""Clicks by matrix factorisation: the formula of `peftrec/rating_baselines.py` on answers of no and yes, as log-odds.

Answers are scaled to a deviation of one, so that the penalties that fit ratings fit them too. What the factorisation
says becomes log-odds by two numbers fitted on the validation rows.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from peftrec import rating_baselines
from peftrec.baselines import History, Ties, platt
from peftrec.errors import ModelError
from peftrec.factors import Floats
from peftrec.rating_baselines import Order, RatingPrior, RatingSettings

if TYPE_CHECKING:
    from peftrec.split import Log

_LARGEST = 1e6


@dataclass(frozen=True)
class ClickFactors:
    """The items' side after all training events, small enough to travel with an adapter.

    Attributes:
        factors: predicts answers between its bounds, a like being the upper one.
        slope: of the log-odds.
        intercept: of the log-odds.
    """

    factors: RatingPrior
    slope: float
    intercept: float

    def scores(
        self, history_items: Sequence[Any], history_labels: Sequence[float], candidate_items: Sequence[Any]
    ) -> Floats:
        """Log-odds for candidates of one person, equal to `mf` of a frozen test row with this history.

        Args:
            history_items: item ids that the person has met, shape (h,); may be empty.
            history_labels: 0 or 1 for each, shape (h,).
            candidate_items: item ids to score, shape (c,).

        Returns:
            Shape (c,).
        """
        answers = [label * self.factors.bounds[1] for label in history_labels]
        return self.slope * self.factors.scores(history_items, answers, candidate_items) + self.intercept

    def to_json(self) -> str:
        """One JSON object; `from_json` gives an equal prior back."""
        return json.dumps(
            {"factors": json.loads(self.factors.to_json()), "slope": self.slope, "intercept": self.intercept}
        )

    @classmethod
    def from_json(cls, text: str) -> ClickFactors:
        """Read what `to_json` wrote.

        Raises:
            ModelError: anything else.
        """
        try:
            found = json.loads(text)
            if set(found) != {field.name for field in dataclasses.fields(cls)}:
                raise ValueError(f"keys {sorted(found)}")
            slope, intercept = float(found["slope"]), float(found["intercept"])
            if not (abs(slope) <= _LARGEST and abs(intercept) <= _LARGEST):
                raise ValueError("a number out of range")
            return cls(RatingPrior.from_json(json.dumps(found["factors"])), slope, intercept)
        except (ValueError, TypeError, RecursionError) as error:
            raise ModelError(
                f"prior: {error}; expected factors, slope and intercept; fetch the adapter again"
            ) from None


@dataclass(frozen=True)
class Predictions:
    """Scores of every row of a log.

    Attributes:
        scores: log-odds, float64 (n,).
        prior: the same for whomever the adapter meets later.
        settings: what was chosen on the validation rows.
    """

    scores: Floats
    prior: ClickFactors
    settings: dict[str, Any]


def predict(
    log: Log,
    history: History,
    ties: Ties = "isolate",
    order: Order = "time",
    settings: RatingSettings | None = None,
    seed: int = 13,
) -> Predictions:
    """Score all rows by what is known of each; arguments as in `rating_baselines.predict`.

    Args:
        log: all splits, with items.
        history: what validation and test rows know of their user.
        ties: whether a row knows its user's events of the same timestamp that stand before it.
        order: what training rows know of their user.
        settings: chosen on the validation rows if left out.
        seed: draws the groups of users and the factors that fits start from.
    """
    deviation = float(log.label[log.split == 0].std()) or 1.0
    like = np.float32(1 / deviation)
    answers = dataclasses.replace(log, rating=log.label * like, scale=(0.0, float(like)))
    found = rating_baselines.predict(answers, history, ties, order, settings, seed, names=("mf",))
    prior = rating_baselines.fit_prior(answers, "mf", found.settings, seed)
    raw, valid = found.scores["mf"], log.split == 1
    slope, intercept = platt(raw[valid], log.label[valid] == 1, centre=1 / (2 * deviation), slope=4 * deviation)
    chosen = dataclasses.asdict(found.settings) | {"slope": slope, "intercept": intercept}
    return Predictions(slope * raw + intercept, ClickFactors(prior, slope, intercept), chosen)
