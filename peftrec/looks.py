"""What people see of a scorer in tables and figures: its name, and its colour, marker and line, the same everywhere.

The colours are Okabe and Ito's, which the colour-blind can tell apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl

from peftrec.record import ADAPTER, BASE_MODEL, BASE_MODEL_NO_PRIOR, NO_PRIOR

LABELS = {
    ADAPTER: "adapter",
    NO_PRIOR: "adapter, no prior",
    BASE_MODEL: "base model, untrained",
    BASE_MODEL_NO_PRIOR: "base model, no prior",
    "item_mean": "item mean",
    "user_mean": "user mean",
    "bias": "user+item bias",
    "mf": "matrix factorisation",
    "bpmf": "Bayesian MF",
    "blend": "blended prior",
    "item_knn": "item k-NN",
    "svd": "SVD",
    "svdpp": "SVD++",
    "lstm": "LSTM",
    "gbdt": "boosted trees",
    "global_mean": "global mean",
}
"""What people read for a scorer's name; other names are shown as they are."""

FLAT = ("global_mean",)
"""Scorers that give almost every row the same score: nothing to see where rows are ranked or spread out."""

# Colour, marker and line of a scorer; black marks what is no scorer.
_LOOKS = {
    ADAPTER: ("#0072B2", "o", "-"),
    NO_PRIOR: ("#56B4E9", "D", "-"),
    BASE_MODEL: ("#7F7F7F", "s", "-"),
    "bias": ("#D55E00", "^", "--"),
    "item_mean": ("#E69F00", "v", "--"),
    "user_mean": ("#882255", "d", "--"),
    "mf": ("#000000", "*", "-."),
    "bpmf": ("#332288", "p", "-."),
    "blend": ("#999933", "<", "-"),
    "item_knn": ("#44AA99", "h", "-."),
    "svd": ("#AA4499", ">", "-."),
    "svdpp": ("#661100", "8", "-."),
    "lstm": ("#6699CC", "H", "-."),
    "gbdt": ("#DDCC77", "s", "-."),
    "popularity": ("#009E73", "P", ":"),
    "global_mean": ("#CC79A7", "X", ":"),
}
_OTHERS = (("#CC79A7", "X", "-."), ("#009E73", "P", "-."), ("#332288", "p", "-."), ("#E69F00", "<", "-."))
_STYLE: dict[Any, Any] = {
    "font.size": 12,
    "axes.titlesize": 14,
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "legend.fontsize": 11,
    "lines.linewidth": 1.8,
}


def look(name: str, place: int) -> tuple[str, str, str]:
    """Colour, marker and line of the scorer that stands at `place`."""
    return _LOOKS.get(name) or (_LOOKS[ADAPTER] if place == 0 else _OTHERS[place % len(_OTHERS)])


def shown(name: str) -> str:
    """What people read for a scorer's name."""
    return LABELS.get(name, name)


@contextmanager
def style() -> Iterator[None]:
    """Our look, whatever the person's matplotlibrc says, and theirs again afterwards."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield
