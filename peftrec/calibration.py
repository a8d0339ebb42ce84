"""Scores that mean what they say: a rising curve, fitted on the validation rows, that they go through at the end.

Log-odds of clicks come out too bold or too shy where training stopped early or late, and a mean of ratings is drawn to
the middle. The curve puts that right and leaves the order as it is, so AUC and the ranking stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Literal

import numpy as np
import numpy.typing as npt

from peftrec.baselines import logistic
from peftrec.errors import ConfigError

Floats = npt.NDArray[np.float64]
Knots = tuple[tuple[float, float], ...]
"""Points of a curve that rises from each to the next; beyond the first and the last it goes on with slope one."""

MOST_KNOTS = 200
FEW = 500
"""Rows below which a curve of any form may cost more than it mends: 200 rows made the log loss of fair scores .012
worse, 1,000 rows .004."""
FAR = 100.0
"""Log-odds beyond which nobody asks."""


def check(kind: str) -> None:
    """See whether scikit-learn is there, if `kind` needs it.

    Raises:
        ConfigError: it is not.
    """
    if kind == "isotonic":
        _isotonic()


def fit(kind: Literal["temperature", "isotonic"], task: str, score: npt.ArrayLike, truth: npt.ArrayLike) -> Knots:
    """The curve that makes `score` fit `truth` best.

    * `temperature` (clicks; Guo et al. 2017): log-odds times one number, by maximum likelihood with a unit prior at 1.
    * `isotonic` (Zadrozny and Elkan 2002): the best rising steps, their middles joined by lines so that no two scores
      become one. A step's chance is that of its rows with half a like and half a dislike more.

    Args:
        kind: of the curve.
        task: click or rating.
        score: log-odds, or ratings, (n,).
        truth: labels, or ratings, (n,).
    """
    score, truth = (np.asarray(one, dtype=np.float64) for one in (score, truth))
    if kind == "temperature":
        slope = max(1e-3, float(logistic(score[:, None], truth > 0, np.ones(1))[0]))
        return ((-FAR, -FAR * slope), (FAR, FAR * slope))
    steps = _isotonic()(increasing=True).fit(score, truth).predict(score)
    _, step = np.unique(steps, return_inverse=True)
    rows = np.bincount(step)
    middle, mean = (np.bincount(step, one) / rows for one in (score, truth))
    if task == "click":
        likes = (mean * rows + 0.5) / (rows + 1)
        mean = np.log(likes / (1 - likes))
    knots: list[tuple[float, float]] = []
    for x, y in zip(middle.tolist(), mean.tolist(), strict=True):
        if not knots or (x > knots[-1][0] and y > knots[-1][1]):  # half a like more can turn two steps round
            knots.append((x, y))
    chosen = np.unique(np.linspace(0, len(knots) - 1, MOST_KNOTS).round().astype(int))
    return tuple(knots[place] for place in chosen.tolist())


def warnings(kind: str, rows: int) -> list[str]:
    """What is to be said of a curve that was fitted on so many rows."""
    if kind != "isotonic" or rows >= FEW:
        return []
    return [
        f"score.calibration: isotonic on {rows} validation rows follows their noise; expected {FEW} or more: raise "
        "eval.max_valid_rows or data.split.valid, or choose temperature"
    ]


def calibrated(score: Floats, knots: Sequence[tuple[float, float]]) -> Floats:
    """The scores (n,) through the curve; without knots as they are."""
    if not len(knots):
        return score
    x, y = np.asarray(knots, dtype=np.float64).T
    beyond = np.minimum(score - x[0], 0) + np.maximum(score - x[-1], 0)
    found: Floats = np.interp(score, x, y) + beyond
    return found


def _isotonic() -> type:
    try:
        found: type = import_module("sklearn.isotonic").IsotonicRegression
    except ImportError as error:
        raise ConfigError(
            f"score.calibration: isotonic needs scikit-learn, which cannot be imported ({error}); expected the "
            "extra 'sklearn': run pip install 'peftrec[sklearn]', or choose temperature"
        ) from None
    return found
