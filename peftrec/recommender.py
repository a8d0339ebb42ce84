"""Recommender: saved adapters on one base model, asked about people and items by their names.

r = Recommender.from_pretrained("me/films", revision="v1")  # or "runs/ml-100k-click-lora"
r.score(["Toy Story (1995):yes", "GoldenEye (1995):no"], ["Heat (1995)", "Babe (1995)"])
r.rank(["Toy Story (1995):yes"], k=10)
r.load_adapter("me/books", "books")
r.score(["Dune:yes"], ["Emma"], adapter="books")
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TypedDict

from peftrec import adapters, loading, side_vectors
from peftrec import artifact as artifacts
from peftrec.artifact import Artifact, PromptFormat
from peftrec.backbone import Backbone
from peftrec.catalogue import Catalogue, check_list
from peftrec.embeddings import Embedder, Reading
from peftrec.errors import DataError, ModelError
from peftrec.features import FeatureRecommender
from peftrec.loaded_adapter import Event, Floats, LoadedAdapter, Question, Recommendation
from peftrec.opponents import SavedPrior
from peftrec.prompts import Codec, WholeText
from peftrec.schema import nearest
from peftrec.shortlist import Shortlist, Shortlister
from peftrec.side_vectors import Sources
from peftrec.similarity import Measure
from peftrec.target import Target

__all__ = ["DEFAULT", "Event", "Floats", "Recommendation", "Recommender", "Request"]

DEFAULT = "default"
"""Name of the adapter that answers where a request names none."""


class Request(TypedDict, total=False):
    """One of several requests, with what `Recommender.score` takes; `history` and `candidates` must be there."""

    history: Sequence[Any]
    candidates: Sequence[Any]
    user: Any
    adapter: str | None


class Recommender:
    """Scores and ranks items for a person by that person's history.

    A score is the log-odds that the person likes the item, or the rating that the person would give, as the adapter's
    task has it.

    Most people want `from_pretrained`; the constructor takes parts that are already loaded.

    A history is a list, oldest first, and may be empty. Its entries are `"Toy Story (1995):yes"`, pairs such as
    `("Toy Story (1995)", "yes")` or `(1, 0)`, or dicts with `label` or `rating`: see `catalogue.read_history`. Titles
    and ids are looked up in the items table: see `catalogue.Catalogue.find`. Its oldest events are left out where it is
    longer than the prompt.

    Several adapters may stand on the base model, which is in memory once (`load_adapter`). Each has a prompt, a task, a
    prior and an items table of its own, and each request may name one. Any number of threads may ask, load and unload
    at the same time: a request is answered by the adapter that had the name when it began.

    Args:
        about: the adapter's `peftrec.json`.
        model: base model with adapter and answer head.
        tokenizer: the base model's.
        items: the items table, or None.
        prior: what is added to the model's score, or None.
        side: the adapter's side vectors, or None.
        base: what `model` was made from, for more adapters to stand on; None takes no more.

    Raises:
        ModelError: the tokenizer gives the answers other ids than the adapter was trained with, or the prompt is longer
            than the model.
        DataError: the items table lacks a column that the prompt shows.
    """

    def __init__(
        self,
        about: Artifact,
        model: Any,
        tokenizer: Any,
        *,
        items: Any = None,
        prior: SavedPrior | None = None,
        side: Sources | None = None,
        base: Backbone | None = None,
    ) -> None:
        self._base = base
        self._adapters = {DEFAULT: LoadedAdapter(about, model, tokenizer, items, prior, side)}
        self._change = Lock()
        self._shortlister = Shortlister(base)

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | Path,
        *,
        revision: str | None = None,
        items: Any = None,
        columns: dict[str, str] | None = None,
        base_model: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        prior: bool = True,
        strict: bool = False,
        trust_remote_code: bool = False,
        quantize: Literal["4bit", "8bit"] | None = None,
        token: str | bool | None = None,
        endpoint: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> Recommender:
        """Load an adapter that peftrec saved.

        Under `HF_HUB_OFFLINE` nothing is downloaded, and what was loaded before is found again.

        Args:
            adapter: a run's folder or the adapter's in it, `namespace/name` on the Hub, or `file:FOLDER`.
            revision: branch, tag or commit on the Hub; None is main.
            items: the items table (a file, a polars or a pandas frame); None takes that of the data set that the
                adapter was trained on where peftrec knows it by name, else there is none.
            columns: our name -> name in the items table.
            base_model: a folder, Hub id or packaged model to use instead of the one that the adapter names, which is
                taken at the revision that it was trained on; not needed while the adapter lies in the folder of its
                run, whose recipe knows.
            device: as in torch; None is the GPU if there is one.
            dtype: of the base weights, float32, bfloat16 or float16; None is that of the training, but float32 for
                bfloat16 where the processor cannot compute in it.
            prior: whether the saved prior is added to the model's score; without it a calibration is left out, too.
            strict: refuse a base model with other weights than those of the training; else warn, and say how far the
                adapter's recorded scores are from what it answers here.
            trust_remote_code: run Python code that comes with the base model; no file can say so, only the caller.
            quantize: load the base model in 4 or 8 bits, whatever it was trained in: less memory, other scores.
            token: for the Hub, as in huggingface_hub; None is `HF_TOKEN` or who is logged in. Not sent for the base
                model where there is an `endpoint`.
            endpoint: address of the Hub that has the adapter; None is `HF_ENDPOINT`, which has the base model anyway.
            cache_dir: where pulled adapters are kept; None is `HF_HUB_CACHE`.

        Raises:
            ModelError: no adapter in the folder, or it does not fit the base model.
            HubError: the adapter is not on the Hub, or not safe to read.
            AssetError: a packaged base model or a named data set cannot be fetched.
            DataError: the items table cannot be used.
        """
        folder = loading.find(adapter, revision, token=token, endpoint=endpoint, cache_dir=cache_dir)
        about = artifacts.read(folder)
        saved_prior = artifacts.read_prior(folder, about) if prior else None
        about = about if prior else artifacts.uncalibrated(about)
        sources = side_vectors.read(folder, about)
        table = loading.read_table(items, columns, about)
        base = loading.load_base(
            about,
            folder,
            base_model=base_model,
            dtype=dtype,
            device=device,
            quantize=quantize,
            trust_remote_code=trust_remote_code,
            token=token if endpoint is None else None,
        )
        differs = loading.difference_of_bases(about, base)
        if differs and strict:
            raise ModelError(f"{differs}; load that base model, or load without strict")
        model = loading.put_on(base, folder, about, sources)
        whole = adapters.is_whole(folder)
        rest = {"items": table, "prior": saved_prior, "side": sources}
        made = cls(about, model, base.tokenizer, **rest, base=None if whole else base)
        if differs:
            warnings.warn(f"{differs}; {loading.difference_of_scores(made._adapter(None))}", stacklevel=2)
        return made

    @classmethod
    def from_features(
        cls,
        model: str | Path | Embedder | None,
        items: Any,
        *,
        item: str = "{title}",
        vectors: Any = None,
        columns: dict[str, str] | None = None,
        reading: Reading | None = None,
        profile: Literal["mean", "text"] = "mean",
        user: str | None = None,
        like_at: float | None = 4.0,
        half_life: float | None = None,
        similarity: Measure = "cosine",
        centre: bool = True,
        cache: bool = True,
    ) -> FeatureRecommender:
        """A recommender without training: people and items are compared by the vectors of their texts.

        Args:
            model: a base model or an adapter (see `Embedder.from_pretrained`), a loaded `Embedder`, or None where
                `vectors` are given and nothing else is to be read.
            items: the items table (a file, a polars or a pandas frame), or the name of a data set.
            item: template of an item's text over the table's columns.
            vectors: the items' vectors, if they are made already: a file of `peftrec embed`, a `VectorTable`, or a
                matrix with one row for each item.
            columns: our name -> name in the items table.
            reading: how the model's layers become one vector; None is the mean of the last layer.
            profile: a person is the weighted `mean` of the vectors of what was liked, or one `text`.
            user: template of a person's text: `{liked}`, columns of the items table, and what the caller tells of the
                person (see `ProfileText`); None is `{liked}`.
            like_at: the lowest rating that is a like.
            half_life: in events, see `profiles.weights`; None is no end.
            similarity: cosine, dot, euclidean or pearson.
            centre: take the items' mean vector from every vector first: what all of them share says nothing.
            cache: whether vectors of the items are looked up and kept in the cache folder.

        Raises:
            ModelError: the model cannot be loaded, or cannot read texts in this way.
            AssetError: a packaged model or a named data set cannot be fetched.
            DataError: the table or the vectors cannot be used.
        """
        return FeatureRecommender.load(
            model,
            items,
            item=item,
            vectors=vectors,
            columns=columns,
            reading=reading,
            profile=profile,
            user=user,
            like_at=like_at,
            half_life=half_life,
            similarity=similarity,
            centre=centre,
            cache=cache,
        )

    # --- several adapters ---------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> Mapping[str, LoadedAdapter]:
        """What is loaded at this moment, by name; the first is `default`."""
        return dict(self._adapters)

    def load_adapter(
        self,
        adapter: str | Path,
        name: str,
        *,
        revision: str | None = None,
        items: Any = None,
        columns: dict[str, str] | None = None,
        prior: bool = True,
        strict: bool = True,
        token: str | bool | None = None,
        endpoint: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        """Load one more adapter of the same base model, which is not loaded again, or put it in the place of another.

        Requests that are under way are answered by the adapter that they began with. If it cannot be loaded, nothing
        changes.

        Args:
            adapter: as in `from_pretrained`, as all that is not described here.
            name: what requests call it; whatever had this name is replaced.
            revision: as there.
            items: as there.
            columns: as there.
            prior: as there.
            strict: refuse an adapter that was trained on other weights; else warn as `from_pretrained` does.
            token: as there.
            endpoint: as there.
            cache_dir: as there.

        Raises:
            ModelError: it was trained on another base model, with a head of another kind (answer tokens, or a head that
                is trained), or under `full`; or this recommender has no base model to put it on.
            HubError: it is not on the Hub, or not safe to read.
            AssetError: a named data set cannot be fetched.
            DataError: the items table cannot be used.
        """
        if not name or not isinstance(name, str):
            raise ModelError(f"name: {name!r}; expected what requests shall call the adapter")
        if self._base is None:
            raise ModelError(
                f"{name}: this recommender is one whole model (full, or made from parts), and has no base model for "
                "more adapters; load it by itself: Recommender.from_pretrained"
            )
        folder = loading.find(adapter, revision, token=token, endpoint=endpoint, cache_dir=cache_dir)
        if adapters.is_whole(folder):
            raise ModelError(
                f"{adapter}: trained under full, so it is a whole model and no adapter for a base model; load it by "
                "itself: Recommender.from_pretrained"
            )
        about = artifacts.read(folder)
        differs = loading.difference_of_bases(about, self._base)
        if differs and strict:
            raise ModelError(f"{differs}; load it with a base model of its own, or with strict=False")
        saved_prior = artifacts.read_prior(folder, about) if prior else None
        about = about if prior else artifacts.uncalibrated(about)
        sources = side_vectors.read(folder, about)
        loaded = LoadedAdapter(
            about,
            loading.put_on(self._base, folder, about, sources),
            self._base.tokenizer,
            loading.read_table(items, columns, about),
            saved_prior,
            sources,
        )
        if differs:
            warnings.warn(f"{differs}; {loading.difference_of_scores(loaded)}", stacklevel=2)
        with self._change:
            self._adapters = {**self._adapters, name: loaded}

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; its memory is free once the requests that it is answering are.

        Raises:
            ModelError: there is none of this name, or it is `default`.
        """
        with self._change:
            self._adapter(name)
            if name == DEFAULT:
                raise ModelError(
                    f"{DEFAULT}: it answers requests that name no adapter; load another one in its place: "
                    f"load_adapter(…, {DEFAULT!r})"
                )
            self._adapters = {key: one for key, one in self._adapters.items() if key != name}

    def _adapter(self, name: str | None) -> LoadedAdapter:
        return _named(self._adapters, name)

    # --- the default adapter ------------------------------------------------------------------------------------------

    @property
    def artifact(self) -> Artifact:
        """Its `peftrec.json`."""
        return self._adapter(None).artifact

    @property
    def model(self) -> Any:
        """Base model with adapter and answer head."""
        return self._adapter(None).model

    @property
    def prompt(self) -> PromptFormat:
        """How it is asked."""
        return self._adapter(None).prompt

    @property
    def codec(self) -> Codec | WholeText:
        """Its prompt under the tokenizer."""
        return self._adapter(None).codec

    @property
    def prior(self) -> SavedPrior | None:
        """What is added to the model's score."""
        return self._adapter(None).prior

    @property
    def target(self) -> Target:
        """What its scores mean."""
        return self._adapter(None).target

    @property
    def catalogue(self) -> Catalogue:
        """Its items."""
        return self._adapter(None).catalogue

    @property
    def own_prompts(self) -> bool:
        """Whether it was trained on ready-made prompts, which know neither items nor histories."""
        return self._adapter(None).own_prompts

    # --- requests -----------------------------------------------------------------------------------------------------

    def score(
        self, history: Sequence[Any], candidates: Sequence[Any], user: Any = None, *, adapter: str | None = None
    ) -> Floats:
        """Log-odds that the person likes each candidate, or predicted ratings, (number of candidates,).

        A candidate's score depends neither on the other candidates nor on their order.

        Args:
            history: what the person met, oldest first.
            candidates: titles, item ids or dicts. For an adapter of ready-made prompts: dicts with `instruction` and
                `input`, and no history.
            user: what is known of the person, where the adapter's prompt shows that: a dict of columns as in
                `artifact.prompt.user`, or the text; for an adapter with vectors of people `{"vector": [numbers]}`; None
                is nothing.
            adapter: name of a loaded adapter; None is `default`.

        Raises:
            DataError: an entry that cannot be read, or an item id that is not in the items table.
            ModelError: no such adapter.
        """
        check_list(candidates, "candidates")
        asked = self._adapter(adapter)
        return asked.score([asked.question(history, candidates, user)])[0]

    def item_ids(
        self, history: Sequence[Any], candidates: Sequence[Any], *, adapter: str | None = None
    ) -> list[str | None]:
        """Which items a history and candidates mean, as ids in text; None is an item that has none.

        Args:
            history: as in `score`, as all others.
            candidates: as there.
            adapter: as there.

        Raises:
            DataError: an entry that cannot be read, or an item id that is not in the items table.
            ModelError: no such adapter.
        """
        question = self._adapter(adapter).question(history, candidates)
        items = [*(event.item for event in question.events), *question.candidates]
        return [None if item.item_id is None else str(item.item_id) for item in items]

    def score_many(self, requests: Sequence[Request]) -> list[Floats]:
        """What `score` gives for each request, in their order.

        Short requests to one adapter are computed together, which takes a fraction of the time; in float32 the scores
        are those of single requests to 1e-5.

        Args:
            requests: dicts with `history` and `candidates` and, where wanted, `adapter` and `user`.

        Raises:
            DataError: a request that is none, or as `score`; the message begins with its place.
            ModelError: no such adapter.
        """
        if isinstance(requests, (str, Mapping)):
            raise DataError(f"requests: {requests!r}; expected a list; put it in a list")
        loaded = self._adapters
        asked: dict[str, dict[int, Question]] = {}
        for i, request in enumerate(requests):
            try:
                _check_keys(request)
                name = request.get("adapter") or DEFAULT
                one = _named(loaded, name)
                question = one.question(request["history"], request["candidates"], request.get("user"))
            except (DataError, ModelError) as error:
                raise type(error)(f"requests[{i}]: {error}") from None
            asked.setdefault(name, {})[i] = question
        found = {
            i: scores
            for name, questions in asked.items()
            for i, scores in zip(questions, loaded[name].score(list(questions.values())), strict=True)
        }
        return [found[i] for i in range(len(requests))]

    def probability(
        self, history: Sequence[Any], candidates: Sequence[Any], user: Any = None, *, adapter: str | None = None
    ) -> Floats:
        """Chance that the person likes each candidate, (number of candidates,); otherwise as `score`.

        Raises:
            DataError: the adapter predicts ratings.
        """
        check_list(candidates, "candidates")
        asked = self._adapter(adapter)
        return asked.probability(asked.question(history, candidates, user))

    def rank(
        self,
        history: Sequence[Any],
        candidates: Sequence[Any] | None = None,
        k: int = 10,
        exclude_seen: bool = True,
        user: Any = None,
        *,
        adapter: str | None = None,
        shortlist: int | Shortlist | None = None,
    ) -> list[Recommendation]:
        """The `k` best candidates, best first.

        Args:
            history: what the person met, oldest first.
            candidates: as in `score`; None is the whole items table.
            k: how many; fewer where there are fewer candidates.
            exclude_seen: leave out what is in the history.
            user: as in `score`.
            adapter: as in `score`.
            shortlist: score so many candidates only, chosen as the module `shortlist` says, for catalogues of
                thousands; None scores all of them, and finds the best ones for certain.

        Raises:
            DataError: as `score`, or neither candidates nor an items table are given.
            ModelError: no such adapter.
        """
        asked = self._adapter(adapter)
        question = asked.question(history, candidates, user, unseen=exclude_seen)
        if shortlist is None:
            return asked.rank(question, k)
        how = shortlist if isinstance(shortlist, Shortlist) else Shortlist(shortlist)
        return self._shortlister.rank(asked, question, k, how)

    def events(self, history: Sequence[Any], *, adapter: str | None = None) -> list[Event]:
        """The history as it is understood: which items were meant, and whether each was liked or how it was rated.

        Raises:
            DataError: an entry that cannot be read.
            ModelError: no such adapter.
        """
        return self._adapter(adapter).events(history)

    def probe_scores(self, *, adapter: str | None = None) -> Floats:
        """What is answered here to the questions that the adapter recorded with their scores, (number of probes,).

        The prior is left out, as in `artifact.probes`.

        Raises:
            ModelError: no such adapter.
        """
        return self._adapter(adapter).probe_scores()


def _named(adapters: Mapping[str, LoadedAdapter], name: str | None) -> LoadedAdapter:
    found = adapters.get(DEFAULT if name is None else name)
    if found is None:
        raise ModelError(f"adapter: no {name!r} is loaded; expected one of {', '.join(adapters)}; load_adapter it")
    return found


def _check_keys(request: Any) -> None:
    expected = "expected a dict with history and candidates"
    if not isinstance(request, dict):
        raise DataError(f"{request!r}; {expected}")
    for key in request:
        if key not in Request.__annotations__:
            close = nearest(str(key), [*Request.__annotations__])
            raise DataError(f"unknown key {key!r}; " + (f"did you mean {close}?" if close else expected))
    for key in ("history", "candidates"):
        if request.get(key) is None:
            raise DataError(f"no {key}; {expected}")
