"""What peftrec knows of a named data set: how to load it, and the facts that a model card states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftrec.datasets.files import matching
from peftrec.errors import DataError

if TYPE_CHECKING:
    import polars as pl


Found = Mapping[str, list[Path]]
"""Each of a data set's files by the name under which it is published."""


@dataclass(frozen=True)
class Tables:
    """A data set's tables under our column names, one row per event and item, not checked yet.

    Attributes:
        interactions: `user_id`, `item_id`, `rating` or `label`, and `timestamp` where there are times.
        items: `item_id`, `title` and more.
        warnings: What was left out, one counted line each.
    """

    interactions: pl.DataFrame
    items: pl.DataFrame
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Graph:
    """A knowledge graph of the items: `triples` (head, relation, tail) and `links` (item_id, entity)."""

    triples: pl.DataFrame
    links: pl.DataFrame


@dataclass(frozen=True)
class Dataset:
    """One named data set.

    Attributes:
        name: What `data.name` takes.
        description: One line for `peftrec datasets`.
        read: Makes the tables of the files that were found; where there are no `files` it fetches them itself.
        read_users: The same for what is told of the users, one row per `user_id`; None where nothing is.
        load_graph: Reads the items' knowledge graph, as `Graph`; None where there is none.
        files: What has to be in `data.folder`, as published, with `*` for what differs; none where `read` fetches.
        parts: Whether several files of one name belong together.
        like_at: Rating from which an event counts as liked, unless the recipe says otherwise; None where there are
            labels and no ratings.
        rating_range: Lowest and highest rating of the scale; None where there are none, or counts without an end.
        rating: What the rating is, as in "plays", where it is none that a person gave.
        timed: Whether events have times.
        homepage: Where the data set is described.
        license: What its owners allow, in a sentence.
        citation: The reference that its owners ask for.
        language: Language of the items' texts (ISO 639-1).
    """

    name: str
    description: str
    read: Callable[[Found], Tables]
    like_at: float | None
    rating_range: tuple[float, float] | None
    homepage: str
    license: str
    citation: str
    language: str
    read_users: Callable[[Found], pl.DataFrame] | None = None
    load_graph: Callable[[], Graph] | None = None
    files: tuple[str, ...] = ()
    parts: bool = False
    rating: str | None = None
    timed: bool = True

    @property
    def scale(self) -> str:
        """Which events count as liked, in words."""
        if self.like_at is None:
            return "labels, no ratings"
        if self.rating_range is None:
            return f"liked from {self.like_at:g} {self.rating}"
        low, high = self.rating_range
        return f"liked from {self.like_at:g} on a scale from {low:g} to {high:g}"

    @property
    def fetched(self) -> bool:
        """Whether it can be had without a folder."""
        return not self.files

    def find(self, folder: str | None) -> Found:
        """The files in `data.folder`.

        Raises:
            DataError: The folder or a file is missing, or the data set is fetched and needs none.
        """
        if self.fetched:
            if folder is not None:
                raise DataError(f"data.folder: {folder}; {self.name} is fetched and needs none; remove it")
            return {}
        todo = (
            f"expected the folder with {' and '.join(self.files)}, as published at {self.homepage}: download and "
            "unpack them, and set data.folder"
        )
        if folder is None:
            raise DataError(f"data.folder: missing; {self.name} cannot be fetched; {todo}")
        found = matching(Path(folder).expanduser(), self.files)
        if missing := [name for name in self.files if not found[name]]:
            raise DataError(f"data.folder: {folder}: no {' and no '.join(missing)}; {todo}")
        for name, paths in found.items():
            if len(paths) > 1 and not self.parts:
                raise DataError(f"data.folder: {folder}: {len(paths)} files {name}; expected one; name its own folder")
        return found

    def load(self, folder: str | None = None) -> Tables:
        """The tables; `folder` as `data.folder`.

        Raises:
            AssetError: They cannot be fetched.
            DataError: A file is missing or not as published.
        """
        return self.read(self.find(folder))

    def load_users(self, folder: str | None = None) -> pl.DataFrame | None:
        """The users table, or None where nothing is told of the users."""
        return None if self.read_users is None else self.read_users(self.find(folder))
