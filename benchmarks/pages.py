"""Measured figures go between markers of a page, so that no number is typed by hand."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs/benchmarks.md"


def put(name: str, text: str, page: Path = PAGE) -> None:
    """Replace what stands between `<!-- name:begin -->` and `<!-- name:end -->` by `text`."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    content = page.read_text()
    if begin not in content or end not in content:
        raise SystemExit(f"{page}: no markers {begin} and {end}; add them where the figures shall stand")
    before, rest = content.split(begin, 1)
    page.write_text(f"{before}{begin}\n{text.strip()}\n{end}{rest.split(end, 1)[1]}")
