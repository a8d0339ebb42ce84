"""A recommender without training: people and items by the vectors of their texts.

r = Recommender.from_features("all-minilm-l6-v2", "films.csv", item="{title} ({year}), {genres}")
r.rank(["Toy Story (1995):yes", "GoldenEye (1995):no"], k=10)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import polars as pl

from peftrec import vector_files
from peftrec.catalogue import Catalogue, Item, check_list, read_answers, read_items
from peftrec.datasets import DATASETS
from peftrec.embeddings import Embedder, Reading
from peftrec.errors import DataError
from peftrec.loaded_adapter import Event, Recommendation
from peftrec.profiles import Liked, ProfileText, mean_vector, weights
from peftrec.similarity import Floats, Index, Measure, Vectors, normalized
from peftrec.vector_files import VectorTable

Profile = Literal["mean", "text"]
PROFILES: tuple[Profile, ...] = get_args(Profile)
TEXT = "{liked}"


class FeatureRecommender:
    """Scores and ranks items for a person by how near their vectors are to those of what the person liked.

    `score`, `rank` and `events` are called as those of `Recommender`. A score is a similarity, not a chance. New people
    and new items need no more than their texts: a candidate that is not in the items table is embedded when it is asked
    for.

    Most people want `Recommender.from_features`, which describes the arguments.

    Args:
        items: the items table.
        vectors: of the items table's rows, (N, D).
        embedder: makes vectors of texts that are not in the table; None where there is no model.
        item: template of an item's text.
        profile: `mean` or `text`.
        user: template of a person's text.
        like_at: the lowest rating that is a like.
        half_life: in events.
        similarity: how vectors are compared.
        centre: take the items' mean from every vector.

    Raises:
        DataError: an argument out of range, or vectors that do not fit the items table.
    """

    def __init__(
        self,
        items: pl.DataFrame,
        vectors: Vectors,
        embedder: Embedder | None = None,
        *,
        item: str = "{title}",
        profile: Profile = "mean",
        user: str | None = None,
        like_at: float | None = 4.0,
        half_life: float | None = None,
        similarity: Measure = "cosine",
        centre: bool = True,
    ) -> None:
        if profile not in PROFILES:
            raise DataError(f"profile: {profile!r}; expected one of {', '.join(PROFILES)}")
        if profile == "text" and embedder is None:
            raise DataError("profile: 'text' needs a model that reads it, and there are vectors only; take mean")
        if len(vectors) != items.height or not len(vectors):
            raise DataError(
                f"vectors: {len(vectors)} for {items.height} items; expected one for each, and at least one"
            )
        weights([], None, like_at, half_life)
        self.catalogue = Catalogue(items, item, ids_matter=False)
        self.embedder, self.profile, self.like_at, self.half_life = embedder, profile, like_at, half_life
        self._person = ProfileText(user or TEXT, items)
        self._mean = vectors.mean(axis=0) if centre else None
        self._index = Index(self._placed(vectors), similarity)

    @classmethod
    def load(
        cls,
        model: str | Path | Embedder | None,
        items: Any,
        *,
        item: str = "{title}",
        vectors: str | Path | VectorTable | npt.ArrayLike | None = None,
        columns: dict[str, str] | None = None,
        reading: Reading | None = None,
        cache: bool = True,
        **options: Any,
    ) -> FeatureRecommender:
        """See `Recommender.from_features`."""
        table = read_table(items, columns)
        if model is None and vectors is None:
            raise DataError("from_features: neither a model nor vectors; expected one of them; name a model")
        embedder = model if isinstance(model, Embedder) or model is None else Embedder.from_pretrained(model, reading)
        if vectors is None:
            assert embedder is not None
            found = embedder.embed(Catalogue(table, item).texts, cache=cache)
        elif isinstance(vectors, (str, Path)):
            found = vector_files.read(vectors).of(table["item_id"], str(vectors))
        elif isinstance(vectors, VectorTable):
            found = vectors.of(table["item_id"], "vectors")
        else:
            found = np.asarray(vectors, dtype=np.float32)
        if embedder is not None and found.ndim == 2 and found.shape[1] != embedder.size:
            raise DataError(
                f"vectors: of {found.shape[1]} dimensions; {embedder.name} makes {embedder.size}; expected vectors of "
                "that model: name it, or leave the model out"
            )
        return cls(table, found, embedder, item=item, **options)

    def events(self, history: Sequence[Any]) -> list[Event]:
        """The history as it is understood: which items were meant, and whether each was liked.

        Raises:
            DataError: an entry that cannot be read.
        """
        return [event for event, _ in self._graded(history)]

    def score(self, history: Sequence[Any], candidates: Sequence[Any], user: Any = None) -> Floats:
        """How alike the person and each candidate are, (number of candidates,); higher is more.

        Args:
            history: what the person met, oldest first, as in `Recommender.score`; ratings weigh by how high they are.
            candidates: titles, item ids or dicts.
            user: what else is known of the person: a text, or a dict of what the profile's template shows.

        Raises:
            DataError: an entry that cannot be read, or nothing is known that the person likes.
        """
        check_list(candidates, "candidates")
        found = [self.catalogue.find(entry, f"candidates[{i}]") for i, entry in enumerate(candidates)]
        return self._scores(self._graded(history), found, user)

    def rank(
        self,
        history: Sequence[Any],
        candidates: Sequence[Any] | None = None,
        k: int = 10,
        exclude_seen: bool = True,
        user: Any = None,
        *,
        threshold: float | None = None,
    ) -> list[Recommendation]:
        """The `k` most similar candidates, best first.

        Args:
            history: as in `score`.
            candidates: as in `score`; None is the whole items table.
            k: how many; fewer where there are fewer candidates.
            exclude_seen: leave out what is in the history.
            user: as in `score`.
            threshold: leave out candidates that are less similar than this.

        Raises:
            DataError: as `score`.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise DataError(f"k: {k!r}; expected a whole number from 1")
        events = self._graded(history)
        seen = {event.item.key for event, _ in events} if exclude_seen else set()
        if candidates is None:
            rows = [key for key in seen if isinstance(key, int)]
            (best,) = self._index.nearest(self._vector(events, user)[None], k, threshold=threshold, exclude=[rows])
            pairs = [
                (self.catalogue.at(row), score) for row, score in zip(best.rows.tolist(), best.scores, strict=True)
            ]
        else:
            if isinstance(candidates, (str, Mapping)):
                raise DataError(f"candidates: {candidates!r}; expected a list; put it in a list")
            asked = [self.catalogue.find(entry, f"candidates[{i}]") for i, entry in enumerate(candidates)]
            left = [one for one in asked if one.key not in seen]
            scores = self._scores(events, left, user)
            order = [i for i in np.argsort(-scores, kind="stable") if threshold is None or scores[i] >= threshold]
            pairs = [(left[i], scores[i]) for i in order[:k]]
        return [Recommendation(one.given, one.item_id, one.text, float(score)) for one, score in pairs]

    def profile_text(self, history: Sequence[Any], user: Any = None) -> str:
        """The person as text, as `profile: text` reads it.

        Raises:
            DataError: an entry that cannot be read.
        """
        return self._text(self._graded(history), user)

    def _graded(self, history: Sequence[Any]) -> list[tuple[Event, float]]:
        """Each event with its weight."""
        read = read_answers(history, self.like_at, ["no", "yes"])
        found = [(self.catalogue.find(entry, f"history[{i}]"), label) for i, (entry, label, _) in enumerate(read)]
        ratings = [np.nan if rating is None else rating for _, _, rating in read]
        weight = weights([label for _, label in found], ratings, self.like_at, self.half_life)
        return [(Event(item, label), one) for (item, label), one in zip(found, weight.tolist(), strict=True)]

    def _scores(self, events: Sequence[tuple[Event, float]], asked: Sequence[Item], user: Any) -> Floats:
        if not asked:
            return np.zeros(0)
        vectors = self._vectors(asked)
        scores = Index(vectors, self._index.measure).similarity(self._vector(events, user)[None])[0]
        return np.asarray(scores, dtype=np.float64)

    def _vector(self, events: Sequence[tuple[Event, float]], user: Any) -> Vectors:
        """The person's vector, (D,)."""
        if self.profile == "text":
            text = self._text(events, user)
            if text:
                return np.asarray(self._embedded([text])[0])
        else:
            liked = [(event.item, weight) for event, weight in events if weight > 0]
            parts = [self._vectors([item for item, _ in liked])] if liked else []
            weight = [one for _, one in liked]
            # What is said of a person counts as much as one thing that the person liked.
            if about := self._said(user):
                parts, weight = [*parts, self._embedded([about])], [*weight, 1.0]
            if parts:
                return mean_vector(np.concatenate(parts), np.asarray(weight))
        raise DataError(
            f"history: {len(events)} events, none of them liked, and nothing is said of the person; expected at least "
            "one like, or a text: user='…'"
        )

    def _said(self, user: Any) -> str:
        return self._person([], user) if isinstance(user, Mapping) else " ".join(str(user or "").split())

    def _text(self, events: Sequence[tuple[Event, float]], user: Any) -> str:
        liked = [Liked(event.item.text, event.item.row, weight) for event, weight in events if weight > 0]
        if isinstance(user, Mapping) or user is None:
            return self._person(liked, user)
        return " ".join([self._said(user), self._person(liked)]).strip()

    def _vectors(self, items: Sequence[Item]) -> Vectors:
        """The vectors of items, (n, D); those that are not in the table are embedded."""
        found = np.zeros((len(items), self._index.vectors.shape[1]), dtype=np.float32)
        # A dict may show its own words of an item that the table has: what is said counts.
        at = {
            i: one.row
            for i, one in enumerate(items)
            if one.row is not None and one.text == self.catalogue.texts[one.row]
        }
        found[list(at)] = self._index.vectors[list(at.values())]
        new = [i for i in range(len(items)) if i not in at]
        if new:
            found[new] = self._embedded([items[i].text for i in new])
        return found

    def _embedded(self, texts: list[str]) -> Vectors:
        if self.embedder is None:
            raise DataError(
                f"{texts[0]!r}: not in the items table, and there is no model to read it; expected items of the table; "
                "name a model"
            )
        return self._placed(self.embedder.embed(texts, cache=False))

    def _placed(self, vectors: Vectors) -> Vectors:
        return vectors if self._mean is None else normalized(vectors - self._mean)


def read_table(items: Any, columns: dict[str, str] | None = None) -> pl.DataFrame:
    """The items table of a named data set, a file or a frame.

    Raises:
        AssetError: the named data set cannot be fetched.
        DataError: the table cannot be used.
    """
    named = DATASETS.get(items) if isinstance(items, str) else None
    table = read_items(items if named is None else named.load().items, None if named else columns)
    if not table.height:
        raise DataError("items: no rows; expected at least one item")
    return table
