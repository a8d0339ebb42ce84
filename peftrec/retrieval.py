"""One liked item that was held out, among items that its user never met: at which place does a scorer put it?

Each user has one question, the same for every scorer: the latest test event that was liked, at its own moment, and
beside it items that the user meets nowhere in the log. A scorer knows of the user what the recipe's history says, and
of items the training events, as a saved prior does: no candidate and no other user's question is known to anybody.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from peftrec.baselines import History
from peftrec.bootstrap import Bootstrap, UserMeans, resample
from peftrec.draws import drawn_order
from peftrec.errors import DataError
from peftrec.ranking import Bools, Floats, Ints
from peftrec.split import TEST, TRAIN, Log

K = 10
METRICS = ("hr@10", "ndcg@10", "mrr", "novelty", "popularity")
MOST_PAIRS = 5_000_000
"""Candidates of all questions together: each is a row of some hundred bytes while the baselines are computed."""


@dataclass(frozen=True)
class Questions:
    """What is asked: for each user one liked row of the log, and candidates in an order drawn by lot.

    Attributes:
        row: held-out rows of the log (q,), one for each user asked.
        start: where each question's candidates begin, and the number of all (q + 1,).
        item: candidates, codes of items (m,).
        liked: which candidate is the held-out one (m,), one for each question.
    """

    row: Ints
    start: Ints
    item: Ints
    liked: Bools

    def __len__(self) -> int:
        return len(self.row)

    @property
    def question(self) -> Ints:
        """Number of each candidate's question (m,)."""
        return np.repeat(np.arange(len(self.row)), np.diff(self.start))


def draw(log: Log, users: int, among: int | None, history: History, seed: int) -> Questions:
    """The questions of so many users who have a liked test event behind something that may be known of them.

    Users, candidates and their order depend on the seed and the log alone: whom else is asked changes nothing.

    Args:
        log: all events, with items.
        users: how many at most, drawn by the seed.
        among: candidates beside the held-out item, drawn by the seed; None is all that the user never met.
        history: what is known of a user: strictly earlier events ("streaming"), or training events ("frozen").
        seed: of users and candidates.

    Raises:
        DataError: nobody can be asked, or there are too many candidates.
    """
    row_of = _latest_liked(log, history, seed)
    asked = [user for user in drawn_order(len(log.user_ids), seed, "ranked users").tolist() if row_of[user] >= 0]
    if not asked:
        raise DataError(
            "ranking: nobody has a liked test event of a new item behind events that are known; expected some to ask "
            "for; see data.split and eval.history"
        )
    asked, items = sorted(asked[:users]), log.items.height
    if len(asked) * min(among or items, items) > MOST_PAIRS:
        raise DataError(
            f"ranking: {len(asked)} users and {items:,} items are more than {MOST_PAIRS:,} pairs; ask for fewer users"
        )
    row = row_of[asked]
    start = np.searchsorted(log.user, np.arange(len(log.user_ids) + 1))
    parts = []
    for one in row.tolist():
        user = int(log.user[one])
        unmet = np.ones(items, dtype=bool)
        own = slice(start[user], start[user + 1])
        met = log.item[own][log.met[own]]
        unmet[met[met >= 0]] = False
        order = drawn_order(items, seed, f"ranked items of {log.user_ids[user]}")
        others = order[unmet[order]][:among]
        place = np.empty(items, dtype=np.int64)
        place[drawn_order(items, seed, f"places for {log.user_ids[user]}")] = np.arange(items)
        candidates = np.append(others, log.item[one])
        parts.append(candidates[np.argsort(place[candidates])])
    item = np.concatenate(parts)
    sizes = [len(part) for part in parts]
    return Questions(row, np.cumsum([0, *sizes]), item, item == np.repeat(log.item[row], sizes))


def as_rows(log: Log, questions: Questions) -> tuple[Log, Ints]:
    """The log with every candidate as a test row of its user at the question's moment, and which rows those are (m,).

    Their answers say nothing. Whatever held-out event of these users would come at that moment or later is left out, so
    that no row of the log knows a candidate, nor does one candidate know another while ties are isolated.
    """
    moment = np.full(len(log.user_ids), np.iinfo(np.int64).max)
    moment[log.user[questions.row]] = log.timestamp[questions.row]
    before = (log.split == TRAIN) | (log.timestamp < moment[log.user])
    # What was drawn for a person is a candidate, and no answer of that person.
    kept = np.flatnonzero(before & (log.met | ~np.isin(log.user, log.user[questions.row])))
    source = np.concatenate((kept, questions.row[questions.question]))
    new = np.arange(len(source)) >= len(kept)
    item = np.concatenate((log.item[kept], questions.item)).astype(log.item.dtype)
    order = np.lexsort((log.timestamp[source], log.user[source]))
    where = np.empty(len(order), dtype=np.int64)
    where[order] = np.arange(len(order))
    source, new = source[order], new[order]
    rating = None if log.rating is None else np.where(new, log.scale[0], log.rating[source]).astype(np.float32)
    rows = replace(
        log,
        user=log.user[source],
        item=item[order],
        timestamp=log.timestamp[source],
        label=np.where(new, 0, log.label[source]).astype(np.int8),
        rating=rating,
        split=np.where(new, TEST, log.split[source]).astype(np.int8),
        asked=None if log.asked is None else log.asked[source],  # of a candidate, the held-out target's
    )
    return rows, where[len(kept) :]


def known_rows(log: Log, row: int, history: History) -> Ints:
    """What is known of the user of a question about `row`: rows of the log, in order of time."""
    own = np.arange(*np.searchsorted(log.user, [log.user[row], log.user[row] + 1]))
    seen = (log.split[own] == TRAIN) if history == "frozen" else (log.timestamp[own] < log.timestamp[row])
    known: Ints = own[seen & log.met[own]]
    return known


@dataclass(frozen=True)
class Places:
    """What several scorers made of the same questions.

    Attributes:
        users: number of questions.
        candidates: mean number of candidates of a question.
        offered: different items among all candidates.
        found: `METRICS` of each scorer with intervals, and differences of the first one to the others.
        covered: scorer -> different items in all the users' best ten.
    """

    users: int
    candidates: float
    offered: int
    found: Bootstrap
    covered: dict[str, int]


def measure(
    log: Log,
    questions: Questions,
    scores: Mapping[str, npt.ArrayLike],
    history: History,
    resamples: int = 1000,
    seed: int = 13,
) -> Places:
    """How well each scorer places the held-out items, and what it puts into people's best ten.

    * `hr@10`: share of users whose item is among their best ten; `ndcg@10`: 1 / log2(1 + place) where it is, else 0;
      `mrr`: 1 / place. Where scores tie, the mean over the places that the tied candidates share, so that a scorer that
      ties everything is worth an order drawn by lot.
    * `novelty`: mean self-information of the ten, log2 of (training users + 1) / (those of them who met the item + 1),
      in bits (Vargas and Castells, RecSys 2011).
    * `popularity`: mean training events of the ten over those of what is known of the users; 1 is as popular as what
      people chose themselves (popularity lift: Abdollahpouri et al., 2020, who subtract 1).

    Ties within the ten are broken by lot, in one way for all scorers.

    Args:
        log: all events.
        questions: as drawn from it.
        scores: scorer -> score of each candidate (m,).
        history: as in `draw`.
        resamples: of the users, behind each interval (95 %).
        seed: of the resamples.

    Raises:
        DataError: a score is NaN or infinite.
    """
    learned = (log.split == TRAIN) & (log.item >= 0) & log.met
    events = np.bincount(log.item[learned], minlength=log.items.height)
    pairs = np.unique(log.user[learned].astype(np.int64) * log.items.height + log.item[learned])
    met_by = np.bincount(pairs % log.items.height, minlength=log.items.height)
    information = np.log2((len(np.unique(log.user[learned])) + 1) / (met_by + 1))
    chosen = [log.item[known_rows(log, row, history)] for row in questions.row.tolist()]
    usual = np.array([events[own[own >= 0]].mean() if (own >= 0).any() else math.nan for own in chosen])
    has_usual, ones = np.isfinite(usual), np.ones(len(questions))
    scorers, covered = {}, {}
    for name, given in scores.items():
        score = np.asarray(given, dtype=np.float64)
        if not np.isfinite(score).all():
            raise DataError(f"ranking: {name} has scores that are NaN or infinite; every candidate needs a finite one")
        best = _best(score, questions)
        _, own = np.unique(questions.question[best], return_inverse=True)
        per_user = np.bincount(own)
        means = {
            "novelty": np.bincount(own, information[questions.item[best]]) / per_user,
            "popularity": np.bincount(own, events[questions.item[best]]) / per_user,
        }
        parts = {metric: (value, ones) for metric, value in {**place_figures(score, questions), **means}.items()}
        parts["popularity"] = (np.where(has_usual, means["popularity"], 0.0), np.where(has_usual, usual, 0.0))
        scorers[name] = UserMeans(parts)
        covered[name] = len(np.unique(questions.item[best]))
    found = resample(scorers, len(questions), len(questions), resamples if len(questions) > 1 else 0, seed)
    offered = len(np.unique(questions.item))
    return Places(len(questions), len(questions.item) / len(questions), offered, found, covered)


def place_figures(score: Floats, questions: Questions) -> dict[str, Floats]:
    """`hr@10`, `ndcg@10` and `mrr` of each question, (q,) each, for scores of all candidates (m,)."""
    question = questions.question
    own = score[questions.liked][question]  # one for each question, in their order
    above = np.bincount(question, score > own)
    upto = above + np.bincount(question, score == own)
    places = np.arange(1, int(np.diff(questions.start).max(initial=0)) + 1)
    gains = {"hr@10": places <= K, "ndcg@10": (places <= K) / np.log2(1 + places), "mrr": 1 / places}
    found = {}
    for name, gain in gains.items():
        sums = np.concatenate(([0.0], np.cumsum(gain)))
        found[name] = (sums[upto.astype(np.int64)] - sums[above.astype(np.int64)]) / (upto - above)
    return found


def _best(score: Floats, questions: Questions) -> Ints:
    """The K best candidates of each question; of equal ones the first."""
    order = np.lexsort((-score, questions.question))
    place = np.arange(len(order)) - questions.start[questions.question[order]]
    best: Ints = order[place < K]
    return best


def _latest_liked(log: Log, history: History, seed: int) -> Ints:
    """For each user the row to ask for, or -1 (users,): the latest one that can be; of one moment, one drawn by lot."""
    first = np.full(len(log.user_ids), np.iinfo(np.int64).max)
    seen = log.met & (log.split == TRAIN) if history == "frozen" else log.met
    np.minimum.at(first, log.user[seen], log.timestamp[seen])
    known = first[log.user] < (np.iinfo(np.int64).max if history == "frozen" else log.timestamp)
    _, pair, times = np.unique(
        log.user.astype(np.int64) * (log.items.height + 1) + log.item, return_inverse=True, return_counts=True
    )
    fit = (log.item >= 0) & log.liked & known & (times[pair] == 1)
    rows = log.rows(TEST)
    rows = rows[fit[rows]]
    lot = np.empty(len(log), dtype=np.int64)
    lot[drawn_order(len(log), seed, "ranked rows")] = np.arange(len(log))
    found = np.full(len(log.user_ids), -1, dtype=np.int64)
    rows = rows[np.lexsort((lot[rows], log.timestamp[rows]))]
    found[log.user[rows]] = rows  # the last assignment of a user stays
    return found
