"""Text of others within a Markdown page, and the regions of a page that are ours to write again.

A film may be called `<b>|x`: what comes from data is escaped for the place where it stands. A region stands between
`<!-- peftrec:NAME:begin -->` and `<!-- peftrec:NAME:end -->`, each alone on its line; only the page's own template may
write such a line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from peftrec.errors import DataError

_SPECIAL = re.compile(r"([\\`*_\[\]|~$])")
_LONGEST = 72
_MARK = re.compile(r"^<!-- peftrec:([a-z_]+):(begin|end) -->[ \t]*$", re.M)


def inline(text: object) -> str:
    """Any text on one line, so that Markdown and HTML show it as it is, also within a table."""
    shown = _SPECIAL.sub(r"\\\1", _one_line(str(text)))
    shown = shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # Bare addresses would become links.
    for bare, written in (("://", "&#58;//"), ("www.", "www&#46;"), ("@", "&#64;")):
        shown = shown.replace(bare, written)
    return shown


def code(text: object) -> str:
    """Any text on one line as code; not for tables, where a bar would end the cell."""
    content = inert(_one_line(str(text)))
    ticks = "`" * (_longest_run(content) + 1)
    pad = " " if content.startswith("`") or content.endswith("`") else ""
    return f"{ticks}{pad}{content}{pad}{ticks}"


def fenced(text: str, language: str) -> str:
    """Any text as a block of code that nothing within it can end."""
    content = inert(text).rstrip("\n")
    ticks = "`" * max(3, _longest_run(content) + 1)
    return f"{ticks}{language}\n{content}\n{ticks}"


def unbroken(text: str) -> str:
    """Markdown in which no line ends within an interval, `[0.720, 0.787]`: narrow tables stay low."""
    return re.sub(r"(\[[+-]?[\d.]+), (?=[+-]?[\d.]+\])", "\\1,\u00a0", text)


def pieces(text: str) -> list[str]:
    """The text in pieces of one line or less, none of them long if it has blanks."""
    found = []
    for line in text.splitlines(keepends=True):
        while len(line) > _LONGEST and (cut := line.rfind(" ", 1, _LONGEST) + 1 or line.find(" ") + 1):
            found.append(line[:cut])
            line = line[cut:]
        found += [line] if line else []
    return found or [text]


def literal(value: object) -> str:
    """A Python expression for text, numbers and lists of these, on one line; texts in double quotes if possible."""
    if isinstance(value, (list, tuple)):
        inner = ", ".join(literal(one) for one in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    written = repr(value)
    if isinstance(value, str) and '"' not in value and "'" not in value:
        written = f'"{written[1:-1]}"'
    # Within Python's quotes this escape is the hyphen itself.
    return written.replace("<!--", "<!\\x2d-")


def inert(text: str) -> str:
    """The text, in which nothing is a mark of ours."""
    return text.replace("<!-- peftrec:", "<!-- peftrec :")


def _one_line(text: str) -> str:
    return " ".join("".join(one if one.isprintable() else " " for one in text).split())


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def mark(name: str, kind: str) -> str:
    """The line that begins or ends a region."""
    return f"<!-- peftrec:{name}:{kind} -->"


def regions(page: str, where: str) -> Iterator[tuple[str | None, str]]:
    """The page in pieces: a region's name and content, or None and the text between two regions.

    Args:
        page: Markdown.
        where: what the page is called in errors.

    Raises:
        DataError: a region is not ended, ends without a beginning, or is there twice.
    """
    seen: set[str] = set()
    opened, start = None, 0
    for found in _MARK.finditer(page):
        name, kind = found[1], found[2]
        line = page.count("\n", 0, found.start()) + 1
        if (kind == "begin") is (opened is not None) or (opened is not None and name != opened):
            expected = mark(opened, "end") if opened else "the beginning of a region"
            raise DataError(
                f"{where}, line {line}: {found[0].strip()}; expected {expected}; put it back, or render anew"
            )
        if kind == "begin" and name in seen:
            raise DataError(f"{where}, line {line}: {found[0].strip()} for the second time; remove one of the two")
        yield opened, page[start : found.start()]
        seen.add(name)
        opened, start = (name if kind == "begin" else None), found.end() + 1
    if opened is not None:
        raise DataError(f"{where}: no {mark(opened, 'end')}; expected it behind its beginning; put it back")
    yield None, page[start:]


def tidy(page: str, where: str) -> str:
    """The page with its regions' content directly behind the marks, and nothing in those that say nothing."""
    return "".join(_put(name, text) for name, text in regions(page, where))


def replace_regions(existing: str, fresh: str, where: str) -> str:
    """`existing` with the regions of `fresh`; what stands between regions is kept.

    A region that `existing` lacks was taken out by its author and stays out; one that `fresh` does not know goes.

    Raises:
        DataError: see `regions`, or `existing` has none.
    """
    content = {name: text for name, text in regions(fresh, where) if name is not None}
    pieces = list(regions(existing, where))
    if len(pieces) == 1:
        raise DataError(
            f"{where}: no line {mark('summary', 'begin')}; expected a card that peftrec wrote, whose other text is "
            "kept; move this file away, or put that line and its end where the card shall be written"
        )
    return "".join(_put(name, content.get(name or "", text), known=name in content) for name, text in pieces)


def _put(name: str | None, text: str, *, known: bool = True) -> str:
    if name is None:
        return text
    content = _squeezed(text)
    return "\n".join([mark(name, "begin"), *([content] if content else []), mark(name, "end"), ""]) if known else ""


def _squeezed(text: str) -> str:
    """Without blank lines at the ends and with one at most in a row, but for those in blocks of code."""
    kept: list[str] = []
    fence = ""
    for line in text.splitlines():
        if fence or line.strip() or (kept and kept[-1]):
            kept.append(line if fence else line.rstrip())
        if found := re.match("`{3,}", line):
            fence = "" if fence == line else (fence or found[0])
    return "\n".join(kept).rstrip("\n")
