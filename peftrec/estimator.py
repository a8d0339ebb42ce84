"""A recommender as a scikit-learn classifier, for sklearn's own evaluation tools.

like = RecommenderClassifier("runs/ml-100k-click-lora/adapter", history=log)
CalibrationDisplay.from_estimator(like, pairs, labels)
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from peftrec import tables
from peftrec.errors import ConfigError, DataError
from peftrec.frames import known_with, score
from peftrec.metrics import chances
from peftrec.pairs import SCORED, Known
from peftrec.recommender import Recommender

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
except ImportError as _missing:
    raise ConfigError(
        "peftrec.estimator: scikit-learn is not installed; install it: pip install 'peftrec[sklearn]'"
    ) from _missing

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class RecommenderClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Whether people like items, by an adapter that is trained already.

    `X` is a polars or pandas frame. Its rows are pairs with `user_id`, `item_id` and optionally `timestamp`, whose
    histories are looked up in the log as `frames.score_frame` does, or questions with `history` (a list as in
    `Recommender.score`) and `candidate`.

    Args:
        recommender: an adapter's folder, a Hub id, or a loaded `Recommender`, for which clones share the model.
        history: the log of pairs, see `frames.score_frame`.
        columns: our name -> name in the pairs, in the log or in both.

    Attributes:
        classes_: 0 and 1, where 1 is a like.
    """

    _of: Any = None  # the parameters for which `_loaded` was loaded
    _loaded: Any = None

    def __init__(self, recommender: Any, history: Any = None, columns: Any = None) -> None:
        self.recommender = recommender
        self.history = history
        self.columns = columns

    @property
    def classes_(self) -> Ints:
        """Not liked and liked."""
        return np.arange(2)

    def fit(self, X: Any = None, y: Any = None) -> RecommenderClassifier:  # noqa: N803
        """Load the adapter; nothing is learned from `X` and `y`.

        Raises:
            PeftrecError: the adapter cannot be loaded, or the log cannot be read.
        """
        self._ready()
        return self

    def predict_proba(self, X: Any) -> Floats:  # noqa: N803
        """Chances that each item is not liked, and that it is, (n, 2).

        Raises:
            DataError: `X` or the log cannot be used; see `frames.score_frame`.
        """
        liked = chances(self.decision_function(X))
        return np.column_stack((1 - liked, liked))

    def decision_function(self, X: Any) -> Floats:  # noqa: N803
        """Log-odds that each item is liked, (n,).

        Raises:
            DataError: as `predict_proba`.
        """
        recommender, known = self._ready()
        found = tables.frame_columns(X, "X")
        if "candidate" in found and "user_id" not in found:
            return _questions(recommender, X)
        if known is None:
            raise DataError("X: pairs of users and items, but there is no log; give history=… a frame of events")
        pairs = X[[name for name in X.columns if name not in SCORED]]
        return score(recommender, pairs, known, "X")["score"].to_numpy(writable=True)

    def predict(self, X: Any) -> Ints:  # noqa: N803
        """1 for each item that is more likely liked than not, else 0, (n,).

        Raises:
            DataError: as `predict_proba`.
        """
        return (self.decision_function(X) > 0).astype(np.int64)

    def _ready(self) -> tuple[Recommender, Known | None]:
        """The recommender and the log's events, loaded once for the parameters as they are now."""
        given = (self.recommender, self.history, self.columns)
        if self._of is None or any(a is not b for a, b in zip(self._of, given, strict=True)):
            loaded = self.recommender
            if not isinstance(loaded, Recommender):
                if not isinstance(loaded, (str, Path)):
                    raise DataError(
                        f"recommender: {type(loaded).__name__}; expected an adapter's folder, a Hub id or a Recommender"
                    )
                loaded = Recommender.from_pretrained(loaded)
            if loaded.artifact.task == "rating":
                raise DataError("recommender: this adapter predicts ratings, which are no classes; use score_frame")
            known = None if self.history is None else known_with(loaded, self.history, self.columns)
            self._of, self._loaded = given, (loaded, known)
        ready: tuple[Recommender, Known | None] = self._loaded
        return ready

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_clone__(self) -> RecommenderClassifier:
        # sklearn would copy the whole model.
        return type(self)(**self.get_params(deep=False))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name not in ("_of", "_loaded")}


def _questions(recommender: Recommender, frame: Any) -> Floats:
    """Rows that bring their own history; neighbours with the same one are asked together."""
    if "history" not in frame.columns:
        found = ", ".join(map(str, frame.columns))
        raise DataError(f"X: no column 'history' (found {found}); expected each question's own events; add it")
    past, asked = list(frame["history"]), list(frame["candidate"])
    past = [
        one.tolist() if hasattr(one, "tolist") else one.to_list() if hasattr(one, "to_list") else one for one in past
    ]
    scores = np.zeros(len(asked))
    for _, group in groupby(range(len(asked)), key=lambda row: repr(past[row])):
        rows = list(group)
        scores[rows] = recommender.score(past[rows[0]], [asked[row] for row in rows])
    return scores
