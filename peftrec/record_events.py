"""Ready-made prompts taken apart into the events that they tell of.

A prompt that lists what a person liked, what that person did not, and one title that is asked for, holds as many
answered events as it lists titles. As events they are learned from one by one, counted for priors and baselines, and
written by the recipe's own prompt. The form is TALLRec's (Bao et al., 2023, arXiv:2305.00447); the words that open its
three parts can be others.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

import numpy as np
import polars as pl

from peftrec.errors import DataError

# A title ends at the quotation mark behind which the part ends or a list goes on, so it may hold such marks itself.
_TITLE = re.compile(r'"(.+?)"(?=\s*(?:[,.;?!)]|$|written by\b|by\b|and\b))', re.DOTALL)
_MOST = 1 << 16  # events of one record


def events_of(
    records: pl.DataFrame, where: str, before: int, marks: Mapping[str, str]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The events that records tell of, and the items; each record is a person of its own.

    Args:
        records: `input` and `label`; `timestamp` and `split` where the source has them.
        where: the source's name, for errors.
        before: records in the sources before this one.
        marks: the words behind which the `liked` and the `disliked` titles stand, and the `target`.

    Returns:
        Events, one record after another, the target last: `user_id` (the record's number from 1 over all sources),
        `item_id` (the title), `label`, `timestamp` (numbers; records follow one another by their own times, else as
        they stand), `target`, and `split` if `records` has it. How liked and other titles followed one another is not
        told, so it is drawn by the record's text. And the items, `item_id` and `title`.

    Raises:
        DataError: a record without a target, or a part with a text but no title in quotation marks.
    """
    titles, labels, sizes = [], [], []
    for number, (text, answer) in enumerate(records.select("input", "label").iter_rows(), start=1):
        parts = _parts(text, marks, f"{where}: input of record {number}")
        told = [*((title, 1) for title in parts["liked"]), *((title, 0) for title in parts["disliked"])]
        told.sort(key=lambda one: hashlib.sha256(f"{one[0]}\n{text}".encode()).digest())
        told.append((parts["target"][0], answer))
        titles += [title for title, _ in told]
        labels += [label for _, label in told]
        sizes.append(len(told))
    size = np.asarray(sizes, dtype=np.int64)
    record = np.repeat(np.arange(len(size)), size)
    place = np.arange(len(record)) - np.repeat(np.cumsum(size) - size, size)
    rank = np.arange(len(size))
    if "timestamp" in records.columns:
        rank = np.argsort(np.argsort(records["timestamp"].to_numpy(), kind="stable"))
    events = pl.DataFrame(
        {
            "user_id": before + record + 1,
            "item_id": titles,
            "label": pl.Series(labels, dtype=pl.Int8),
            "timestamp": (before + rank[record]) * _MOST + place,
            "target": place == size[record] - 1,
            **({"split": records["split"].to_numpy()[record]} if "split" in records.columns else {}),
        }
    )
    items = events.select("item_id").unique(maintain_order=True)
    return events, items.with_columns(title=pl.col("item_id"))


def _parts(text: str, marks: Mapping[str, str], where: str) -> dict[str, list[str]]:
    """The titles of each part of one record."""
    at = sorted((text.find(mark), name) for name, mark in marks.items() if mark in text)
    ends = [start for start, _ in at[1:]] + [len(text)]
    parts: dict[str, list[str]] = {name: [] for name in marks}
    for (start, name), end in zip(at, ends, strict=False):  # no mark at all has an end, too
        part = text[start + len(marks[name]) : end].strip()
        parts[name] = _TITLE.findall(part)
        if not parts[name] and any(map(str.isalnum, part)):
            raise DataError(f"{where}: {part[:40]!r} behind {marks[name]!r}; expected titles in quotation marks")
    if not parts["target"]:
        raise DataError(
            f"{where}: no title behind {marks['target']!r}; expected one in quotation marks; say in data.record_marks "
            "which words stand in front of it"
        )
    return parts
