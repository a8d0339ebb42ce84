"""What nobody publishes on purpose: access tokens, paths of a machine, e-mail addresses, ids of the data's users."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from peftrec.schema import show

MOST_TOLD = 5
"""Ids told of one file: a whole column of them is one mistake."""

FOLDERS = "home|Users|root|mnt|media|tmp|var|opt|srv|private|Volumes|scratch|workspace|work|data|gpfs|lustre|nfs"
LEAKS: Final = {
    "a local path": re.compile(
        rf"(?<![\w./:~-])/(?:{FOLDERS})/[\w.@+-][^\s\"'`)\]]*|file:///[^\s\"'`)\]]+"
        r"|(?<!\w)[A-Za-z]:\\{1,2}(?:Users|Windows|Temp|Program|Documents)[^\s\"'`)\]]*"
    ),
    "an e-mail address": re.compile(
        r"(?<![\w.+-])(?!git@)[\w.+-]+@(?!example\.)[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}(?!\w)"
    ),
}
SECRET = re.compile(
    r"(?<!\w)(?:(?:hf|api_org)_[A-Za-z]{30,}|hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}"
    r"|glpat-[\w-]{20,}|sk-[\w-]{20,}|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16})(?!\w)|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)

_PERSON = "(?:user|person|customer|member|account)"
_NAMED = re.compile(rf"{_PERSON}s?[ _-]?(?:ids?|names?)|{_PERSON}|uids?", re.I)
"""A key or a column's head that announces ids of people."""
_ANNOUNCED = re.compile(
    rf"\b(?:{_PERSON}s?[ _-]?ids?|uids?)\b[\s\"'`:=#|]{{1,4}}([^\s\"'`,;|)\]}}]+)|\b{_PERSON}\s+#([^\s\"'`,;|)\]}}]+)",
    re.I,
)
_WORD = re.compile(r"[^\s\"'`<>()\[\]{}|,;]+")
_PIECE = re.compile(r"[^\s:=/]+")
_ROW = re.compile(r"^[ \t]*\|(.*)\|[ \t]*$", re.M)


@dataclass(frozen=True)
class Watch:
    """What texts are searched for, besides tokens and paths.

    Attributes:
        allow: beginnings of what may be published all the same, such as a contact's address.
        users: ids of the people in the data.
    """

    allow: tuple[str, ...] = ()
    users: frozenset[str] = frozenset()

    def allows(self, text: str) -> bool:
        """Whether the author wants this to be public."""
        return any(text.startswith(allowed) for allowed in self.allow)


def in_texts(path: str, texts: Sequence[str], watch: Watch, *, vocabulary: bool = False) -> list[str]:
    """What had better not be in `texts`: one line for each find.

    Secrets are shown by their first letters only: problems end up in logs.

    Args:
        path: of the file, for the lines.
        texts: its contents.
        watch: see there.
        vocabulary: look for secrets only; a vocabulary has pieces of everything, and comes from the base model.
    """
    own = os.environ.get("HF_TOKEN") or ""
    found: dict[str, None] = {}
    for text in texts:
        for match in SECRET.finditer(text):
            found[f"{path}: what looks like an access token ({match[0][:6]}…); remove it, and revoke the token"] = None
        if len(own) >= 8 and own in text:
            found[f"{path}: the access token in HF_TOKEN; remove it, and revoke the token"] = None
        if vocabulary:
            continue
        for what, pattern in LEAKS.items():
            for match in pattern.finditer(text):
                if not watch.allows(match[0]):
                    found[f"{path}: {what}, {show(match[0])}; remove it, or allow it"] = None
        for place in {str(Path.home()), str(Path.cwd())}:
            if len(place) > 5 and re.search(re.escape(place) + r"(?!\w)", text):
                found[f"{path}: a path of this machine, {place}; remove it"] = None
    if not vocabulary:
        found |= dict.fromkeys(_told(path, (name for text in texts for name in _people(text, watch.users)), watch))
    return list(found)


def in_values(path: str, value: Any, watch: Watch) -> list[str]:
    """Ids of users below a key of a JSON value that announces them, such as `user_id`: one line for each."""
    return _told(path, _announced(value, watch.users), watch)


def is_telling(name: str) -> bool:
    """Whether a user's id says by itself that it is one, wherever it stands.

    That takes six characters, a letter among them and a digit or a sign beside it (`u_1042`, `A3SGXH7AUHU8GW`), or ten
    digits. Any other number may count something, and a word may stand in a title.
    """
    letters, digits = any(map(str.isalpha, name)), sum(map(str.isdigit, name))
    return len(name) >= 6 and ((letters and not name.isalpha()) or digits >= 10)


def _people(text: str, users: frozenset[str]) -> Iterator[str]:
    """Users' ids in a text: telling ones anywhere, others where the text says what they are."""
    if not users:
        return
    for word in _WORD.findall(text):
        for name in {word, word.rstrip(".:!?"), *_PIECE.findall(word)}:
            if name in users and is_telling(name):
                yield name
    for match in _ANNOUNCED.finditer(text):
        name = (match[1] or match[2]).rstrip(".:!?")
        if name in users:
            yield name
    columns: list[int] = []
    end = 0
    for row in _ROW.finditer(text):
        cells = [cell.strip(" \t`*") for cell in row[1].split("|")]
        if text[end : row.start()].strip(" \t\r") != "\n":  # the first row of a table
            columns = [number for number, cell in enumerate(cells) if _NAMED.fullmatch(cell)]
        end = row.end()
        yield from (cells[number] for number in columns if number < len(cells) and cells[number] in users)


def _announced(value: Any, users: frozenset[str]) -> Iterator[str]:
    waiting = [value] if users else []
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            for key, inner in one.items():
                inners = inner if isinstance(inner, list) else [inner]
                if _NAMED.fullmatch(key):
                    yield from (str(name) for name in inners if isinstance(name, (str, int)) and str(name) in users)
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one


def _told(path: str, names: Iterator[str], watch: Watch) -> list[str]:
    found = [name for name in dict.fromkeys(names) if not watch.allows(name)]
    lines = [f"{path}: the id of a user of the data, {show(name)}; remove it, or allow it" for name in found]
    more = [f"{path}: the ids of {len(found) - MOST_TOLD:,} more users of the data; remove them"]
    return lines[:MOST_TOLD] + (more if len(found) > MOST_TOLD else [])
