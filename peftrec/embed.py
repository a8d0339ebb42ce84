"""Tables -> a file of vectors: of items by their texts, or of users by what they liked and what is known of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from tqdm.auto import tqdm

from peftrec import backbone, config, interactions, processes, tables, vector_files
from peftrec.datasets import DATASETS
from peftrec.embeddings import Embedder, Reading
from peftrec.errors import ConfigError, DataError
from peftrec.features import TEXT, Profile, read_table
from peftrec.interactions import Interactions, sorted_order
from peftrec.profiles import Liked, ProfileText, mean_vector, weights
from peftrec.prompts import item_texts
from peftrec.similarity import Floats, Vectors, normalized
from peftrec.vector_files import VectorTable


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to embed with what; paths as the command line has them.

    Attributes:
        model: see `Embedder.from_pretrained`.
        output: a `.parquet` or `.safetensors` file.
        items: a named data set, which brings its events and users too, or an items table.
        of: what gets vectors.
        item: template of an item's text.
        history: log of the events, for users.
        users: users table, for users.
        profile: users as the `mean` of the items' vectors, or as one `text`.
        user: template of a user's text; under `mean` that text counts as one like more.
        like_at: the lowest rating that is a like.
        half_life: see `profiles.weights`.
        columns: our name -> name in these tables.
        reading: how texts become vectors.
        dtype: of the weights.
        revision: of the model on the Hub.
        base_model: to use instead of an adapter's own.
        batch_tokens: tokens of one forward pass.
        cache: whether the cache is used.
    """

    model: str
    output: str
    items: str
    of: Literal["items", "users"] = "items"
    item: str = "{title}"
    history: str | None = None
    users: str | None = None
    profile: Profile = "mean"
    user: str | None = None
    like_at: float | None = None
    half_life: float | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    reading: Reading = field(default_factory=Reading)
    dtype: str | None = None
    revision: str | None = None
    base_model: str | None = None
    batch_tokens: int = 4096
    cache: bool = True


@dataclass(frozen=True)
class Texts:
    """What the job's tables say.

    Attributes:
        ids: of what gets vectors.
        texts: to be read.
        shares: user's row, text's row and weight of each text that a vector is the mean of, (n,) each; None where each
            text has a vector of its own.
        left_out: users of whom nothing is known.
    """

    ids: pl.Series
    texts: list[str]
    shares: tuple[np.ndarray, np.ndarray, Floats] | None = None
    left_out: int = 0


def embed(job: Job, say: Callable[[str], object] = print) -> Path:
    """Write the file of vectors; processes that `accelerate launch` started share the texts, and the main one writes.

    Args:
        job: what to do.
        say: called with each line that people may want to read, by the main process.

    Returns:
        The file.

    Raises:
        PeftrecError: what the job names cannot be used, or the file cannot be written.
    """
    state = processes.group()
    backbone.quiet()
    if processes.launched():
        backbone.use_all_cores(processes.on_this_machine())
    path = vector_files.check_path(job.output)
    _check(job, state.num_processes)
    read = _users(job) if job.of == "users" else _items(job)
    embedder = Embedder.from_pretrained(
        job.model, job.reading, revision=job.revision, base_model=job.base_model, dtype=job.dtype
    )
    with tqdm(
        total=len(set(read.texts)), desc="embed", unit=" texts", disable=None if state.is_main_process else True
    ) as bar:
        share = (state.process_index, state.num_processes)
        vectors = embedder.embed(
            read.texts, batch_tokens=job.batch_tokens, cache=job.cache, share=share, progress=bar.update
        )
    state.wait_for_everyone()
    if state.is_main_process:
        if state.num_processes > 1:
            vectors = embedder.embed(read.texts, batch_tokens=job.batch_tokens)  # what the others made is in the cache
        if read.shares is not None:
            vectors = _means(read, vectors, normalize=job.reading.normalize)
        vector_files.write(path, VectorTable(read.ids, vectors, _about(job, embedder)))
        for line in _lines(job, embedder, read):
            say(line)
    state.wait_for_everyone()
    return path


def _lines(job: Job, embedder: Embedder, read: Texts) -> list[str]:
    left = f"; {read.left_out:,} of whom nothing is known are left out" if read.left_out else ""
    how = f"{embedder.reading.pooling} of layer {embedder.reading.layer}"
    return [f"{job.output}: {len(read.ids):,} {job.of}, {embedder.size} dimensions ({embedder.name}, {how}){left}"]


def _check(job: Job, count: int) -> None:
    """Whether the options go together.

    Raises:
        ConfigError: they do not.
    """
    problems = []
    if job.batch_tokens < 1:
        problems.append(f"--batch-tokens: {job.batch_tokens}; expected a whole number from 1")
    if count > 1 and not job.cache:
        problems.append(f"--no-cache: {count} processes share their vectors through the cache; leave --no-cache out")
    if job.columns and job.items in DATASETS:
        problems.append(f"--columns: {job.items} is a data set by name, whose columns are known; leave --columns out")
    if job.of == "items":
        given = {"--history": job.history, "--users": job.users, "--user": job.user, "--half-life": job.half_life}
        problems += [
            f"{name}: means nothing to items; add --of users" for name, one in given.items() if one is not None
        ]
    elif job.items not in DATASETS and job.history is None:
        problems.append("--of users: no --history; expected a log of what they liked; add --history FILE")
    elif job.items in DATASETS and (job.history or job.users):
        problems.append(f"--items: {job.items} brings its own events and users; leave --history and --users out")
    if problems:
        raise ConfigError(*problems)


def _items(job: Job) -> Texts:
    table = _table(job)
    return Texts(table["item_id"], item_texts(table, job.item))


def _table(job: Job) -> pl.DataFrame:
    """The items table; of the columns that are renamed, those count that it has."""
    if job.items in DATASETS:
        return read_table(job.items)
    found = tables.column_names(tables.scan(job.items), job.items)
    return read_table(job.items, {ours: theirs for ours, theirs in job.columns.items() if theirs in found})


def _users(job: Job) -> Texts:
    data = _load(job)
    template = job.user or (TEXT if job.profile == "text" else None)
    person = None if template is None else ProfileText(template, data.items)
    titles = item_texts(data.items, job.item)
    people = data.users.to_dicts() if data.users is not None else [{}] * len(data.user_ids)
    events = data.events[sorted_order(data.events["user"].to_numpy(), data.events["timestamp"].to_numpy())]
    rated = "rating" in events.columns
    texts: list[str] = list(titles) if job.profile == "mean" else []
    known: list[int] = []
    owner: list[int] = []
    part: list[int] = []
    heavy: list[float] = []
    for (user,), own in events.group_by("user", maintain_order=True):
        rows = own["item"].to_numpy()
        rating = own["rating"].to_numpy() if rated else None
        weight = weights(own["label"].to_numpy(), rating, data.like_at, job.half_life)
        liked = [Liked(titles[row], int(row), float(one)) for row, one in zip(rows, weight, strict=True) if one > 0]
        shown = person(liked if job.profile == "text" else [], people[int(str(user))]) if person is not None else ""
        pairs = [(one.row, one.weight) for one in liked if one.row is not None] if job.profile == "mean" else []
        if shown:
            texts.append(shown)
            pairs.append((len(texts) - 1, 1.0))
        if pairs:
            owner += [len(known)] * len(pairs)
            part += [row for row, _ in pairs]
            heavy += [one for _, one in pairs]
            known.append(int(str(user)))
    if not known:
        raise DataError(f"{data.name}: nobody likes anything, and nothing is told of anybody; expected some likes")
    ids = data.user_ids[known].alias("user_id")
    shares = (np.asarray(owner), np.asarray(part), np.asarray(heavy)) if job.profile == "mean" else None
    return Texts(ids, texts, shares, len(data.user_ids) - len(known))


def _load(job: Job) -> Interactions:
    """The events, in which a like is known, with the users' columns that the template shows."""
    if job.items in DATASETS:
        named = config.Data(name=job.items, like_at=job.like_at)
    else:
        # Any split but one by time does without timestamps; nothing is split here.
        named = config.Data(
            interactions=job.history,
            items=job.items,
            users=job.users,
            columns=dict(job.columns),
            like_at=job.like_at,
            split=config.Split(kind="kfold"),
        )
    table = _table(job)
    shown = ProfileText(job.user, table).of_users if job.user else []
    if shown and named.users is None and named.name is None:
        raise ConfigError(
            f"--user: {{{shown[0]}}} is no column of {job.items}; expected a users table; add --users FILE"
        )
    return interactions.load(named, seed=0, with_users=dict.fromkeys(shown, "--user") or None)


def _means(read: Texts, vectors: Vectors, *, normalize: bool) -> Vectors:
    assert read.shares is not None
    owner, part, heavy = read.shares
    bounds = np.searchsorted(owner, np.arange(len(read.ids) + 1))
    found = np.stack(
        [mean_vector(vectors[part[begin:end]], heavy[begin:end]) for begin, end in pairwise(bounds.tolist())]
    )
    return normalized(found) if normalize else found


def _about(job: Job, embedder: Embedder) -> dict[str, str]:
    """How the vectors were made, for the file."""
    reading = embedder.reading
    return {
        "model": Path(job.model).name if Path(job.model).is_dir() else job.model,
        "fingerprint": str(embedder.fingerprint),
        "pooling": str(reading.pooling),
        "layer": str(reading.layer),
        "normalized": str(reading.normalize).lower(),
        "item": job.item,
        **({"profile": job.profile, "user": job.user or ""} if job.of == "users" else {}),
    }
