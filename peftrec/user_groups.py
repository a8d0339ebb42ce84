"""Groups of users by what a users table tells of them, so that a run can say whom it serves worse."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl

from peftrec.ranking import Bools

LEAST_USERS = 5
"""Smaller groups are not formed: their figures would be noise, and point at persons."""
MOST_VALUES = 6
"""Numbers with more different values are cut at their quartiles."""


def user_groups(users: pl.DataFrame, columns: Sequence[str]) -> dict[str, Bools]:
    """Who is in which group, by one column at a time.

    Texts, and numbers of few different values, form a group for each value; other numbers are cut at their quartiles.
    Of whom a column says nothing is in none of its groups.

    Args:
        users: the users table.
        columns: of it.

    Returns:
        `gender=woman`, `age=18 to 24` -> members, one value for each row of `users`.
    """
    found: dict[str, Bools] = {}
    for column in columns:
        for name, members in _groups(users[column]):
            key = f"{column}={name}"
            # Two texts can look alike once they are plain.
            found[key] = found[key] | members if key in found else members
    return {key: members for key, members in found.items() if members.sum() >= LEAST_USERS}


def is_group(name: str, columns: Sequence[str]) -> bool:
    """Whether a slice's name is that of a group by one of these columns."""
    return any(name.startswith(f"{column}=") for column in columns)


def _groups(column: pl.Series) -> Iterator[tuple[str, Bools]]:
    known = column.is_not_null().to_numpy()
    numbers = column.cast(pl.Float64, strict=False)  # a table of one's own holds everything as text
    if numbers.null_count() > column.null_count() or numbers.n_unique() <= MOST_VALUES:
        texts = column.cast(pl.String)
        for value in texts.drop_nulls().unique().sort():
            yield _plain(value), (texts == value).fill_null(False).to_numpy()
        return
    values = numbers.fill_null(0.0).to_numpy()
    place = np.searchsorted(np.unique(np.quantile(values[known], [0.25, 0.5, 0.75])), values, side="left")
    for one in np.unique(place[known]):
        members = known & (place == one)
        yield f"{values[members].min():g} to {values[members].max():g}", members


def _plain(value: str) -> str:
    """What may stand in a table, a figure and a file's column name."""
    return re.sub(r"[^\w .,+-]|_", "-", " ".join(value.split()))[:40].strip() or "-"
