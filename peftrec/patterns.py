"""Patterns of module names that a stranger's configuration holds: how long matching one may take.

PEFT matches them with `re`, whose time is that of all ways in which a text can be split among the parts of a pattern.
"""

from __future__ import annotations

import math
import re

MOST_CHARACTERS = 1000
MOST_DEPTH = 3
LENGTH = 100
"""Of the names of modules, in characters; and how often a character that is given comes in one, or a digit in a row."""
REPEATS, DIGITS = 10, 3

PART = re.compile(
    r"""(?P<digits>\\d|\[(?:0-9|\d|\\d)+\])
    |(?P<any>\.|\\w|\[\^?(?:[\w.-]|\\[\w.-])+\])
    |(?P<anchor>[$^])
    |(?P<plain>\\[^\w\s]|[^\\.*+?{}\[\]()|^$])
    |(?P<open>\((?:\?:)?)
    |(?P<close>\))
    |(?P<bar>\|)""",
    re.VERBOSE | re.ASCII,
)
REPEAT = re.compile(r"(?:[*+]|\{\d*,?\d*\})\??|\?\??", re.ASCII)
PLAIN = re.compile(r"[^\\.*+?{}\[\]()|^$]+")


def count_ways(pattern: str) -> float:
    """A bound on the ways in which `re` may try a pattern on the name of a module.

    Alternatives add up, parts in a row multiply; what repeats one character has as many ways as it may end at, and
    what repeats a bracket is refused.

    Args:
        pattern: plain names, `.`, digits, classes, repeats of these, alternatives in brackets, and brackets with `?`.

    Returns:
        1 for a plain name; infinity for what is too long, or none of that.
    """
    if len(pattern) > MOST_CHARACTERS:
        return math.inf
    try:
        ways, end = _alternatives(pattern, 0, MOST_DEPTH)
    except ValueError:
        return math.inf
    return ways if end == len(pattern) else math.inf


def _alternatives(pattern: str, start: int, depth: int) -> tuple[float, int]:
    """Ways of what stands between two brackets or ends, and where that ends."""
    ways: list[float] = []
    texts: list[str] = []
    end = start - 1
    while not ways or pattern[end : end + 1] == "|":
        first = end + 1
        found, end = _row(pattern, first, depth)
        ways.append(found)
        texts.append(pattern[first:end])
    if all(PLAIN.fullmatch(text) for text in texts):
        # At one place those of them fit that begin alike.
        return max(sum(text.startswith(other) for other in texts) for text in texts), end
    return sum(ways), end


def _row(pattern: str, start: int, depth: int) -> tuple[float, int]:
    ways, end = 1.0, start
    while end < len(pattern) and pattern[end] not in "|)":
        part = PART.match(pattern, end)
        if part is None:
            raise ValueError(pattern)
        inner, end = 1.0, part.end()
        if part["open"]:
            if not depth:
                raise ValueError(pattern)
            inner, end = _alternatives(pattern, end, depth - 1)
            if pattern[end : end + 1] != ")":
                raise ValueError(pattern)
            end += 1
        repeat = REPEAT.match(pattern, end)
        if repeat is None:
            ways *= inner
            continue
        end = repeat.end()
        if repeat[0].rstrip("?") == "":
            ways *= inner + 1
        elif part["open"] or part["anchor"]:
            raise ValueError(pattern)
        else:
            ways *= DIGITS if part["digits"] else _ends(pattern, end)
    return ways, end


def _ends(pattern: str, end: int) -> int:
    """Where in a name something repeated may end: anywhere, unless a certain character must follow."""
    follows = re.match(
        rf"\\[^\w\s]|\((?:\?:)?({PLAIN.pattern}(?:\|{PLAIN.pattern})*)\)|{PLAIN.pattern[:-1]}", pattern[end:]
    )
    if end == len(pattern):
        return REPEATS
    if follows is None or REPEAT.match(pattern, end + follows.end()):
        return LENGTH
    return min(LENGTH, REPEATS * len(set((follows[1] or "x").split("|"))))
