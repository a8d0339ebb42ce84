"""A person as text or as a vector: what was liked, weighted by how much and how long ago, and what else is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from peftrec.errors import ConfigError, DataError
from peftrec.prompts import plain_value
from peftrec.similarity import Floats, Vectors
from peftrec.values import placeholders

LIKED = "liked"
"""The placeholder of a profile's template that shows the items that were liked."""

MOST_ITEMS, MOST_VALUES = 10, 5


def weights(
    label: npt.ArrayLike, rating: npt.ArrayLike | None, like_at: float | None, half_life: float | None = None
) -> Floats:
    """How much each event of a person counts in the profile, (n,).

    A like counts 1, and 1 more for each rating point above `like_at`; what was not liked counts nothing. With a half
    life, an event counts half as much as one that came `half_life` events later. Events and not days are counted, since
    people rate hundreds of items in one evening.

    Args:
        label: 0 or 1, oldest event first, (n,).
        rating: what was given, (n,), nan where only the label is known; or None.
        like_at: the lowest rating that is a like.
        half_life: in events; None is no end.

    Raises:
        DataError: `half_life` is not above 0.
    """
    if half_life is not None and not half_life > 0:
        raise DataError(f"half_life: {half_life!r}; expected a number of events above 0, or None")
    liked = np.asarray(label, dtype=np.float64)
    found: Floats = (liked > 0).astype(np.float64)
    if rating is not None and like_at is not None:
        above = np.asarray(rating, dtype=np.float64) - like_at
        found *= 1 + np.where(np.isfinite(above), np.maximum(above, 0), 0)
    if half_life is not None:
        found *= 0.5 ** (np.arange(len(found))[::-1] / half_life)
    return found


def mean_vector(vectors: Vectors, weight: Floats) -> Vectors:
    """The weighted mean of vectors, (n, D) and (n,) -> (D,); 0 where nothing has weight."""
    total = float(weight.sum())
    mean = weight @ vectors.astype(np.float64) / (total or 1.0)
    return np.asarray(mean, dtype=np.float32)


@dataclass(frozen=True)
class Liked:
    """One event of a person, for a profile's text.

    Attributes:
        text: the item as it is shown.
        row: the item's row in the items table, None where it is not there.
        weight: of `weights`.
    """

    text: str
    row: int | None
    weight: float


class ProfileText:
    """People as texts by a template.

    `{liked}` shows the items of most weight, later ones first where they weigh the same; a column of the items table
    (`{genres}`) its values of most weight, each item's being separated by commas or bars; any other name is a column of
    the users table, or a key of what the caller tells of the person.

    Args:
        template: such as `"Likes {genres}: {liked}"`.
        items: the items table, or None.
        most_items: shown at most.
        most_values: of one column.

    Raises:
        ConfigError: the template cannot be read or shows nothing.
    """

    def __init__(
        self,
        template: str,
        items: pl.DataFrame | None,
        most_items: int = MOST_ITEMS,
        most_values: int = MOST_VALUES,
    ) -> None:
        try:
            names = list(dict.fromkeys(placeholders(template)))
        except ValueError as error:
            raise ConfigError(f"profile: {template!r}: {error}") from None
        if not names:
            raise ConfigError(
                f"profile: {template!r} shows nothing of a person; expected {{{LIKED}}}, {{column}} of the items table "
                "or of the users table in it"
            )
        self.template, self.names = template, names
        self._most_items, self._most_values = most_items, most_values
        columns = [] if items is None else [name for name in names if name in items.columns and name != LIKED]
        self._values = {name: _values(items[name]) for name in columns} if items is not None else {}

    @property
    def of_users(self) -> list[str]:
        """Placeholders that no item fills."""
        return [name for name in self.names if name != LIKED and name not in self._values]

    def __call__(self, events: Sequence[Liked], about: Mapping[str, Any] | None = None) -> str:
        """A person's text; empty where nothing that the template shows is known.

        Args:
            events: oldest first.
            about: column -> what is known of the person.
        """
        known = about or {}
        shown = {name: plain_value(known.get(name)) for name in self.of_users}
        later = list(reversed(events))
        if LIKED in self.names:
            shown[LIKED] = "; ".join(_heaviest(((one.text, one.weight) for one in later), self._most_items))
        for name, values in self._values.items():
            pairs = ((value, one.weight) for one in later if one.row is not None for value in values[one.row])
            shown[name] = ", ".join(_heaviest(pairs, self._most_values))
        if not any(shown.values()):
            return ""
        return " ".join(self.template.format(**shown).split())


def _values(column: pl.Series) -> list[list[str]]:
    """Of each row, its values as texts."""
    found = []
    for value in column.to_list():
        parts = value if isinstance(value, list) else plain_value(value).replace("|", ",").split(",")
        found.append([text for part in parts if (text := plain_value(part).strip())])
    return found


def _heaviest(pairs: Iterable[tuple[str, float]], most: int) -> list[str]:
    """The texts whose weights sum to most, the first ones first where they are equal."""
    total: dict[str, float] = {}
    for text, weight in pairs:
        total[text] = total.get(text, 0.0) + weight
    return [text for text in sorted(total, key=lambda text: -total[text]) if total[text] > 0][:most]
