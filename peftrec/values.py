"""Values that a recipe's keys can have: each a type, the check, and the words for what is expected."""

from __future__ import annotations

import re
import string
from typing import Annotated

from peftrec.schema import Check

FILE_TARGET = "file:"
"""In front of a folder where a repository's name could stand."""


def placeholders(template: str) -> list[str]:
    """Names of the `{placeholders}` in `template`, in order, repeats included.

    Raises:
        ValueError: unbalanced braces, or anything but a plain name between them. `{title.x}` and `{title!r}` reach
            into Python objects, which a recipe from a stranger must not.
    """
    names = []
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not name.isidentifier() or spec or conversion:
            raise ValueError(f"{{{name}}} is not a plain {{column}}")
        names.append(name)
    return names


def is_template(text: str) -> bool:
    """Whether `text` has plain `{placeholders}` only."""
    try:
        return bool(placeholders(text))
    except ValueError:
        return False


REPO_ID = "namespace/name of a model on the Hub, such as me/films, or file:FOLDER"


def is_repo_id(text: str) -> bool:
    """Whether the Hub could have a repository of this name; a folder is told by `file:` in front."""
    if is_folder(text):
        return len(text) > len(FILE_TARGET)
    plain = re.fullmatch(r"(\b[\w.-]+\b/)?\b[\w.-]{1,96}\b", text, re.ASCII)
    return plain is not None and not any(odd in text for odd in ("--", "..")) and not text.endswith(".git")


def is_folder(repo_id: str | None) -> bool:
    """Whether a folder stands where a repository's name could stand."""
    return repo_id is not None and repo_id.startswith(FILE_TARGET)


Count = Annotated[int, Check("a whole number from 1", lambda n: n >= 1)]
Positive = Annotated[float, Check("a number above 0", lambda x: x > 0)]
NotNegative = Annotated[float, Check("a number from 0", lambda x: x >= 0)]
Share = Annotated[float, Check("a share between 0 and 1, both excluded", lambda x: 0 < x < 1)]
StepsOrShare = Annotated[
    float, Check("a share below 1 or a whole number of steps", lambda x: 0 <= x < 1 or (x >= 1 and x == int(x)))
]
Text = Annotated[str, Check("text that is not empty", lambda text: bool(text.strip()))]
Template = Annotated[
    str, Check("a template with plain {column} names, as in '{title} ({year})'; write {{ for a brace", is_template)
]
License = Annotated[
    str,
    Check(
        "a licence as the Hub writes it, such as apache-2.0",
        lambda text: bool(re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", text)),
    ),
]
Language = Annotated[
    str, Check("an ISO 639 code, such as en", lambda text: bool(re.fullmatch(r"[a-z]{2,3}|multilingual", text)))
]
HubId = Annotated[
    str, Check("a Hub id, such as namespace/name", lambda text: bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text)))
]
Distinct = Check("each at most once", lambda values: len(set(values)) == len(values))
