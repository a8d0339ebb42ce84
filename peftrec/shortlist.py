"""Large catalogues: a few candidates are chosen, and only these are scored by the model.

The model's scores are learned while they are made. The first candidates are the prior's best ones or, without a prior,
drawn ones; then a ridge regression of what the model has said beyond the prior, on vectors of the items' texts, points
to the next ones; and so on. What is ranked in the end has the model's own scores.

Similarity of a candidate to what the person liked would be simpler, but a trained scorer does not follow it:
docs/features.md has the figures, and docs/decisions/015 the reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from peftrec import embeddings, scorer
from peftrec.backbone import Backbone
from peftrec.catalogue import Item
from peftrec.embeddings import Embedder, Reading
from peftrec.errors import DataError
from peftrec.loaded_adapter import LoadedAdapter, Question, Recommendation
from peftrec.similarity import Floats, Rows, Vectors, normalized

SEED = 13
RIDGE = 1.0  # of vectors of length one


@dataclass(frozen=True)
class Shortlist:
    """How candidates are chosen.

    Attributes:
        n: candidates that the model scores.
        rounds: how often the next ones are chosen by what the model said of the first ones; 0 is never.
        layer: of the base model, for the items' vectors: 0 is its embedding matrix, which is read without a forward
            pass; a deeper one knows the items better, and reads all of them once (see `Reading`).
    """

    n: int
    rounds: int = 4
    layer: int = 0


def choose(
    score: Callable[[Rows], Floats], vectors: Vectors, prior: Floats | None, how: Shortlist
) -> tuple[Rows, Floats]:
    """Score `how.n` candidates, the most promising ones as far as can be told.

    Args:
        score: rows of candidates (m,) -> the model's scores with the prior (m,).
        vectors: of all candidates, (N, D).
        prior: of all candidates, (N,), or None.
        how: how many, in how many rounds.

    Returns:
        The rows that were scored, and their scores, (how.n,) each.
    """
    total = len(vectors)
    base = np.zeros(total) if prior is None else np.asarray(prior, dtype=np.float64)
    drawn = np.random.Generator(np.random.PCG64(SEED)).random(total)
    order = np.argsort(drawn if prior is None else -base, kind="stable")
    ends = np.linspace(0, min(how.n, total), how.rounds + 2).round().astype(int)[1:]
    rows = order[: ends[0]]
    scores = score(rows)
    for end in ends[1:]:
        if end == len(rows):
            continue
        promise = base + _predicted(vectors, rows, scores - base[rows])
        promise[rows] = -np.inf
        new = np.argsort(-promise, kind="stable")[: end - len(rows)]
        rows, scores = np.append(rows, new), np.append(scores, score(new))
    return rows, scores


def _predicted(vectors: Vectors, rows: Rows, values: Floats) -> Floats:
    """What a ridge regression on the vectors of `rows` says of all of them, (N,)."""
    if not len(rows):
        return np.zeros(len(vectors))
    known = vectors[rows].astype(np.float64)
    mean, middle = known.mean(axis=0), values.mean()
    centred = known - mean
    # As many equations as rows that were scored, which are fewer than those of the dimensions as a rule.
    weight = centred.T @ np.linalg.solve(centred @ centred.T + RIDGE * np.eye(len(rows)), values - middle)
    found: Floats = vectors @ weight.astype(np.float32) + (middle - mean @ weight)
    return found


class Shortlister:
    """Chooses among the candidates of several adapters on one base model; keeps their catalogues' vectors in memory.

    Args:
        base: the base model, or None where the adapters' own models are whole ones.
    """

    def __init__(self, base: Backbone | None) -> None:
        self._base = base
        self._kept: WeakKeyDictionary[LoadedAdapter, dict[int, Vectors]] = WeakKeyDictionary()

    def rank(self, asked: LoadedAdapter, question: Question, k: int, how: Shortlist) -> list[Recommendation]:
        """As `LoadedAdapter.rank`, with `how.n` of the candidates scored.

        Raises:
            DataError: the adapter was trained on ready-made prompts, or `how` is out of range.
            ModelError: no such layer.
        """
        _check(how, k)
        if asked.own_prompts:
            raise DataError(
                "shortlist: this adapter was trained on ready-made prompts, which name no items; leave it out"
            )
        if len(question.candidates) <= how.n:
            return asked.rank(question, k)
        candidates = question.candidates

        def score(rows: Rows) -> Floats:
            part = replace(question, candidates=[candidates[row] for row in rows.tolist()])
            return asked.score([part])[0]

        with scorer.continued_histories():
            vectors = self._vectors(asked, candidates, how.layer)
            rows, scores = choose(score, vectors, asked.prior_scores(question), how)
        return asked.best([candidates[row] for row in rows.tolist()], scores, k)

    def _vectors(self, asked: LoadedAdapter, candidates: Sequence[Item], layer: int) -> Vectors:
        table = asked.catalogue.texts
        rows = [-1 if one.row is None or one.text != table[one.row] else one.row for one in candidates]
        if min(rows) < 0:
            found = self._embedder(asked, layer).embed([one.text for one in candidates], cache=False)
            return normalized(found - found.mean(axis=0))
        kept = self._kept.setdefault(asked, {})
        if layer not in kept:
            found = self._embedder(asked, layer).embed(table, cache=self._base is not None and layer != 0)
            kept[layer] = normalized(found - found.mean(axis=0))
        return kept[layer][rows]

    def _embedder(self, asked: LoadedAdapter, layer: int) -> Embedder:
        base = self._base
        model: Any = asked.model if base is None else base.model
        told = [] if base is None else embeddings.made_by(base)
        name = asked.artifact.base_model.name
        # An item is shorter than the whole prompt, and a prompt fits the model.
        reading = Reading(layer=layer, normalize=False, max_tokens=min(Reading.max_tokens, asked.prompt.max_tokens))
        return Embedder(model, asked.codec.tokenizer, asked.prompt.kind, told, reading, name=name)


def _check(how: Shortlist, k: int) -> None:
    for name, value, least in (("n", how.n, 1), ("rounds", how.rounds, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise DataError(f"shortlist: {name} {value!r}; expected a whole number from {least}")
    if isinstance(k, int) and k > how.n:
        raise DataError(f"shortlist: {how.n} candidates for the {k} best; expected at least as many; raise it")
