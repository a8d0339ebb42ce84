"""Which items get the best places: how popular they are against what could be chosen, and how many get one at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from peftrec.ranking import Bools, Floats, Ints
from peftrec.split import TEST, TRAIN, Log

K = 10
HEAD = 0.1


def exposure(
    log: Log, rows: npt.ArrayLike, scores: Mapping[str, npt.ArrayLike], *, resamples: int, seed: int
) -> dict[str, Any]:
    """What stands in the ten best-scored test rows of each user.

    Users with ten test rows or fewer are left out, because there nothing is chosen. The head are the tenth of all items
    with the most training events.

    Args:
        log: all events.
        rows: which were scored, indices (m,).
        scores: scorer -> score of each (m,).
        resamples: of the users, behind each interval (95 %).
        seed: of the resamples, which all scorers share.

    Returns:
        `users` and `places` (ten for each), `items` of the catalogue and `candidates`, those in the users' test rows;
        `head` items and their share of the training events (`head_in_log`) and of the users' test rows, a mean over
        users (`head_in_candidates`); and for each of `scorers` its `items`, the head's share of the places
        (`head`), and by how much that is more than in the test rows (`lift`, `low`, `high`). Empty where nobody has
        more than ten test rows, or rows name no items.
    """
    rows = np.asarray(rows, dtype=np.int64)
    chosen = np.flatnonzero((log.split[rows] == TEST) & (log.item[rows] >= 0))
    user = log.user[rows[chosen]]
    chosen = chosen[np.bincount(user, minlength=len(log.user_ids))[user] > K] if len(chosen) else chosen
    if not len(chosen):
        return {}
    item = log.item[rows[chosen]]
    _, user = np.unique(log.user[rows[chosen]], return_inverse=True)
    trained = log.item[(log.split == TRAIN) & (log.item >= 0) & log.met]
    events = np.bincount(trained, minlength=log.items.height)
    head = np.zeros(len(events), dtype=bool)
    head[np.argsort(-events, kind="stable")[: math.ceil(HEAD * len(events))]] = True
    offered = _shares(head[item], user)
    drawn = np.random.default_rng(seed).integers(len(offered), size=(resamples, len(offered)))
    found = {}
    for name, score in scores.items():
        best = _best(np.asarray(score, dtype=np.float64)[chosen], user)
        share = _shares(head[item[best]], user[best])
        lift = (share - offered)[drawn].mean(axis=1)
        low, high = np.quantile(lift, [0.025, 0.975]) if len(offered) > 1 and resamples else (math.nan, math.nan)
        found[name] = {
            "items": len(np.unique(item[best])),
            "head": float(share.mean()),
            "lift": float((share - offered).mean()),
            "low": float(low),
            "high": float(high),
        }
    return {
        "users": len(offered),
        "places": K * len(offered),
        "items": len(events),
        "candidates": len(np.unique(item)),
        "head": int(head.sum()),
        "head_in_log": float(head[trained].mean()),
        "head_in_candidates": float(offered.mean()),
        "scorers": found,
    }


def _best(score: Floats, user: Ints) -> Ints:
    """The K best rows of each user; of equal ones the earlier."""
    order = np.lexsort((-score, user))
    start = np.r_[0, np.flatnonzero(np.diff(user[order])) + 1]
    place = np.arange(len(order)) - np.repeat(start, np.diff(np.r_[start, len(order)]))
    best: Ints = order[place < K]
    return best


def _shares(member: Bools, user: Ints) -> Floats:
    """Share of each user's rows that are members."""
    shares: Floats = np.bincount(user, weights=member) / np.bincount(user)
    return shares
