"""What people say -> items and answers: titles, ids and dicts are looked up in an items table, histories are parsed."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from peftrec import tables
from peftrec.errors import DataError
from peftrec.prompts import item_texts
from peftrec.values import placeholders

WORDS = {"yes": 1, "like": 1, "liked": 1, "true": 1, "no": 0, "dislike": 0, "disliked": 0, "false": 0}
YEAR = re.compile(r"\s*\(\d{4}\)$")


@dataclass(frozen=True)
class Item:
    """An item as it was meant.

    Attributes:
        text: what the model reads.
        item_id: its id, or None where nobody gave one.
        row: its row in the items table, or None where it is not there.
        given: what was said, word for word.
        number: of its vectors where it stands in a question; 0 has none.
    """

    text: str
    item_id: Any
    row: int | None
    given: Any
    number: int = 0

    @property
    def key(self) -> Any:
        """Equal for two items that are the same."""
        return self.text.casefold() if self.row is None else self.row


def read_items(source: Any, columns: Mapping[str, str] | None = None) -> pl.DataFrame:
    """An items table: `item_id` and every column that a template could show.

    Args:
        source: a CSV, Parquet or JSONL file, a polars or a pandas frame.
        columns: our name -> name in the table.

    Raises:
        DataError: it cannot be read, or has no `item_id`.
    """
    if isinstance(source, (str, Path)):
        where = str(source)
        frame = tables.collect(tables.scan(where), where)
    else:
        found = tables.frame_columns(source, "items", "the path of a table, or a polars or pandas frame")
        where, frame = "items", tables.from_frame(source, "items", found)
    names = tables.match_columns(frame.columns, where, columns or {}, ["item_id"], list(columns or {}), key="columns")
    # As in training: what the caller renames takes the place of a column that has that name already.
    kept = [name for name in frame.columns if name not in names and name not in names.values()]
    frame = frame.select(*kept, **{ours: pl.col(theirs) for ours, theirs in names.items()})
    frame = frame.with_columns(tables.parse_ids(frame["item_id"], where, "item_id").alias("item_id"))
    # Ids are what they are: whatever is shown otherwise would be another one.
    shown = [frame[name] if name == "item_id" else tables.showable(frame[name]) for name in frame.columns]
    frame = pl.DataFrame([column for column in shown if column is not None])
    if "title" in frame.columns:  # as in training, where an item without title does not exist
        frame = frame.with_columns(pl.col("title").cast(pl.String))
        frame = frame.filter(pl.col("title").str.strip_chars().fill_null("") != "")
    return frame.unique("item_id", keep="first", maintain_order=True)


class Catalogue:
    """Finds items by id, title or text.

    Args:
        items: the items table, or None where there is none.
        template: an item as text, over the table's columns.
        ids_matter: whether items of one text differ by their ids (they do under a prior or side vectors).

    Raises:
        DataError: the template names a column that is not in the table.
    """

    def __init__(self, items: pl.DataFrame | None, template: str, *, ids_matter: bool = True) -> None:
        self.items, self.template, self.ids_matter = items, template, ids_matter
        self._fields = placeholders(template)
        self.texts: list[str] = [] if items is None else item_texts(items, template)

    def __len__(self) -> int:
        return len(self.texts)

    def at(self, row: int) -> Item:
        """The item in a row of the table; `given` is the row as a dict."""
        assert self.items is not None
        given = self.items.row(row, named=True)
        return Item(self.texts[row], given["item_id"], row, given)

    def all(self) -> list[Item]:
        """What `at` gives for every row, at once."""
        assert self.items is not None
        rows = self.items.iter_rows(named=True)
        return [
            Item(text, given["item_id"], row, given)
            for row, (text, given) in enumerate(zip(self.texts, rows, strict=True))
        ]

    def find(self, entry: Any, where: str) -> Item:
        """The item that `entry` means.

        Args:
            entry: a title, an id, or a dict with `item_id`, `title` or the columns of the item template. A string is
                an id if the table's ids are text and hold it, else a title, else (digits, where ids are numbers) an id.
                A title that is not in the table is taken as it is.
            where: what to call the entry in messages.

        Raises:
            DataError: an id that is not in the table, or nothing that could be read as an item.
        """
        if isinstance(entry, Mapping):
            return self._from_dict(entry, where)
        if isinstance(entry, str):
            return self._from_text(entry, where)
        if isinstance(entry, bool) or entry is None or isinstance(entry, (Sequence, float)):
            raise DataError(f"{where}: {entry!r}; expected a title, an item id or a dict with one of them")
        return self._table_item(self._known_id(entry, where), entry)

    def _from_dict(self, entry: Mapping[str, Any], where: str) -> Item:
        row: int | None = None
        told = dict(entry)
        for value in told.values():
            if isinstance(value, str):
                _check_text(value, where)
        if entry.get("item_id") is not None:
            row = self._rows.get(str(entry["item_id"]))
        elif isinstance(entry.get("title"), str):
            row = self._row_of_title(self._with_year(entry), where)
            if row is not None:  # the title said which one; the table says how it is written
                del told["title"]
        values = {**(self.items.row(row, named=True) if self.items is not None and row is not None else {}), **told}
        if isinstance(told.get("title"), str) and "year" in self._fields and values.get("year") is not None:
            values["title"] = YEAR.sub("", told["title"])
        if all(values.get(name) is not None for name in self._fields) or row is not None:
            given = {name: [values.get(name)] for name in dict.fromkeys([*self._fields, "item_id"])}
            text = item_texts(pl.DataFrame(given, strict=False), self.template)[0]
            return Item(text, values.get("item_id"), row, dict(entry))
        if isinstance(entry.get("title"), str) and entry["title"].strip():
            return Item(" ".join(self._with_year(entry).split()), entry.get("item_id"), None, dict(entry))
        if entry.get("item_id") is not None:
            self._known_id(entry["item_id"], where)
        wanted = ", ".join(dict.fromkeys(["item_id", "title", *self._fields]))
        raise DataError(f"{where}: {dict(entry)!r}; expected a dict with some of {wanted}")

    @staticmethod
    def _with_year(entry: Mapping[str, Any]) -> str:
        title, year = str(entry["title"]), entry.get("year")
        return title if year is None or YEAR.search(title) else f"{title} ({year})"

    def _from_text(self, entry: str, where: str) -> Item:
        _check_text(entry, where)
        text = " ".join(entry.split())
        if not text:
            raise DataError(f"{where}: an empty text; expected a title or an item id")
        row = self._rows.get(entry) if not self._numeric_ids else None
        if row is None:
            row = self._row_of_title(text, where)
        if row is None and self._numeric_ids and text.isdecimal():
            row = self._known_id(text, where)
        return Item(text, None, None, entry) if row is None else self._table_item(row, entry)

    def _table_item(self, row: int, given: Any) -> Item:
        assert self.items is not None
        return Item(self.texts[row], self.items["item_id"][row], row, given)

    def _known_id(self, item_id: Any, where: str) -> int:
        if self.items is None:
            raise DataError(
                f"{where}: item id {item_id!r}, but there is no items table; give one (items=…), or a title"
            )
        row = self._rows.get(str(item_id))
        if row is not None:
            return row
        near = get_close_matches(str(item_id), self._rows, n=3, cutoff=0.5)
        shown = ", ".join(f"{self.items['item_id'][self._rows[one]]!r} {self.texts[self._rows[one]]}" for one in near)
        raise DataError(
            f"{where}: no item id {item_id!r} in the items table of {len(self)} items"
            + (
                f"; nearest are {shown}"
                if near
                else f"; ids look like {self.items['item_id'][0]!r}"
                if len(self)
                else ""
            )
        )

    def _row_of_title(self, title: str, where: str) -> int | None:
        key = title.casefold()
        exact, bare = self._names
        rows = exact.get(key) or bare.get(key)
        if not rows:
            return None
        # One item under two ids cannot be told apart by any title: no warning could be acted on.
        meanings = {self.label(row) if self.ids_matter else self.texts[row] for row in rows}
        if len(meanings) > 1:
            meant = " or ".join(f"{self.label(row)!r}" for row in rows[:4])
            warnings.warn(f"{where}: {title!r} may be {meant}; the first is taken; say which", stacklevel=2)
        return rows[0]

    def label(self, row: int) -> str:
        """What the item in a row of the table is called: its title with the year, else its text."""
        assert self.items is not None
        values = self.items.row(row, named=True)
        return self._with_year(values) if values.get("title") else self.texts[row]

    @cached_property
    def _numeric_ids(self) -> bool:
        return self.items is not None and self.items["item_id"].dtype.is_integer()

    @cached_property
    def _rows(self) -> dict[str, int]:
        """Id as text -> row."""
        if self.items is None:
            return {}
        return {str(item_id): row for row, item_id in enumerate(self.items["item_id"].to_list())}

    @cached_property
    def _names(self) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
        """What an item may be called -> rows: its text, title or title with year; and its title without the year."""
        exact: dict[str, list[int]] = {}
        bare: dict[str, list[int]] = {}
        for row, text in enumerate(self.texts):
            label = self.label(row)
            assert self.items is not None
            title = str(self.items["title"][row]) if "title" in self.items.columns else label
            for name in {" ".join(name.split()).casefold() for name in (text, label, title)}:
                exact.setdefault(name, []).append(row)
            bare.setdefault(YEAR.sub("", title).casefold(), []).append(row)
        return exact, bare


def _check_text(text: str, where: str) -> None:
    """See whether a tokenizer can read it: bytes of another encoding come as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {text!r} is not UTF-8; expected a title or an item id in UTF-8") from None


def check_list(given: Any, what: str) -> None:
    """See whether there is a list, and not one entry or nothing.

    Raises:
        DataError: there is none.
    """
    if given is None or isinstance(given, (str, Mapping, set, frozenset)):
        raise DataError(f"{what}: {given!r}; expected a list; put it in a list")


def read_history(history: Sequence[Any], like_at: float | None, answers: Sequence[str]) -> list[tuple[Any, int]]:
    """Each entry's item, still as it was given, and its label (0 or 1).

    An entry is text with an answer behind its last colon (`"Toy Story (1995):yes"`), a pair (item, answer), or a dict
    with `label` or `rating` beside what names the item. An answer is yes or no, like or dislike, true or false, one of
    the prompt's own answers, or a number. Numbers are labels where all of them are 0 or 1, else ratings, which are
    liked from `like_at` on.

    Raises:
        DataError: an entry without answer, or with one that is none of these.
    """
    return [(item, label) for item, label, _ in read_answers(history, like_at, answers)]


def read_answers(
    history: Sequence[Any], like_at: float | None, answers: Sequence[str]
) -> list[tuple[Any, int, float | None]]:
    """What `read_history` reads, and the rating behind each label, None where the label itself was given.

    Raises:
        DataError: as there.
    """
    check_list(history, "history")
    own = {answer.strip().casefold(): label for label, answer in enumerate(answers)}
    split = [_answer(entry, {**WORDS, **own}, f"history[{i}]") for i, entry in enumerate(history)]
    numbers = [answer.value for _, answer in split if not answer.is_label]
    as_labels = all(value in (0, 1) for value in numbers)
    events: list[tuple[Any, int, float | None]] = []
    for i, (item, answer) in enumerate(split):
        if answer.is_label or (as_labels and not answer.is_rating):
            events.append((item, int(answer.value), None))
            continue
        if like_at is None:
            raise DataError(
                f"history[{i}]: rating {answer.value:g}, but the adapter was trained on labels; say yes or no"
            )
        events.append((item, int(answer.value >= like_at), answer.value))
    return events


def read_ratings(history: Sequence[Any], scale: Sequence[float], answers: Sequence[str]) -> list[tuple[Any, int]]:
    """Each entry's item, still as it was given, and the place of its rating in `scale`.

    An entry is text with a rating behind its last colon (`"Toy Story (1995):4"`), a pair (item, rating), or a dict with
    `rating` beside what names the item. A rating is a number, or one of the prompt's own answers.

    Raises:
        DataError: an entry without rating, or with one that the adapter does not know.
    """
    check_list(history, "history")
    own = {answer.strip().casefold(): value for answer, value in zip(answers, scale, strict=True)}
    events = []
    for i, entry in enumerate(history):
        item, given = _rated(entry, f"history[{i}]")
        value = own.get(str(given).strip().casefold(), given)
        try:
            place = [math.isclose(float(value), one, abs_tol=1e-6) for one in scale].index(True)
        except (TypeError, ValueError):
            known = ", ".join(f"{one:g}" for one in scale)
            raise DataError(f"history[{i}]: rating {given!r}; expected one of {known}") from None
        events.append((item, place))
    return events


def _rated(entry: Any, where: str) -> tuple[Any, Any]:
    if isinstance(entry, str):
        item, _, text = entry.rpartition(":")
        if item.strip() and text.strip():
            return item.strip(), text
    elif isinstance(entry, Mapping):
        if entry.get("rating") is not None:
            return entry, entry["rating"]
    elif isinstance(entry, (tuple, list)) and len(entry) == 2 and not isinstance(entry[1], bool):
        return entry[0], entry[1]
    raise DataError(f"{where}: {entry!r}; expected 'title:rating', a pair (title, rating), or a dict with rating")


@dataclass(frozen=True)
class _Answer:
    value: float
    is_label: bool = False
    is_rating: bool = False


def _answer(entry: Any, words: Mapping[str, int], where: str) -> tuple[Any, _Answer]:
    expected = "expected 'title:yes' or 'title:no', a pair (title, 'yes'), or a dict with title and label or rating"
    if isinstance(entry, str):
        item, colon, text = entry.rpartition(":")
        answer = _parsed(text, words)
        if not colon or not item.strip() or answer is None:
            found = "no answer behind a colon" if answer is None else "no title before the answer"
            raise DataError(f"{where}: {entry!r} has {found}; {expected}")
        return item.strip(), answer
    if isinstance(entry, Mapping):
        rating, label = entry.get("rating"), entry.get("label")
        answer = _parsed(label if label is not None else rating, words)
        if answer is not None and label is not None and (answer.is_label or answer.value in (0, 1)):
            return entry, _Answer(answer.value, is_label=True)
        if answer is not None and label is None and not answer.is_label:
            return entry, _Answer(answer.value, is_rating=True)
    elif isinstance(entry, (tuple, list)) and len(entry) == 2:
        answer = _parsed(entry[1], words)
        if answer is not None:
            return entry[0], answer
    raise DataError(f"{where}: {entry!r}; {expected}")


def _parsed(value: Any, words: Mapping[str, int]) -> _Answer | None:
    if isinstance(value, bool):
        return _Answer(int(value), is_label=True)
    if isinstance(value, str) and value.strip().casefold() in words:
        return _Answer(words[value.strip().casefold()], is_label=True)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return _Answer(number) if abs(number) < float("inf") else None
