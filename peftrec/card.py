"""The model card: a page that a run's own facts write, and that its author may go on writing.

`render` is a pure function from facts to text; `card_of` reads the facts in a run's folder. Nothing is typed by hand
and nothing is fetched: what no fact says is left out. What the template writes stands between marks (`card_text`), so
that a card can be rendered again while the author's own paragraphs stay.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml

from peftrec import card_limits, card_sections, citations
from peftrec.card_facts import (
    CARD,
    FIGURES,
    Facts,
    hub_base,
    is_hub_id,
    named_data,
    overlaid,
    packaged,
    public_recipe,
    read_author,
    read_facts,
    recipe_of,
)
from peftrec.card_metadata import KEYS, metadata
from peftrec.card_text import code, fenced, inert, inline, literal, pieces, replace_regions, tidy, unbroken
from peftrec.config import Author
from peftrec.errors import DataError, PeftrecError
from peftrec.record import RUN, atomic
from peftrec.report import compare_record
from peftrec.schema import dump_yaml
from peftrec.values import placeholders

TEMPLATE = "card.md.jinja"
_HEAD = re.compile(r"\A---\n(.*?\n)---\n", re.S)


def write(run: str | Path, author: Author | None = None, *, repo_id: str | None = None) -> Path:
    """Write a finished run's card, RUN/adapter/README.md, and put the figures that it shows beside it.

    Args:
        run: the run's output_dir.
        author: what its author says besides the recipe's section `card` and RUN/card.yaml.
        repo_id: where it will be on the Hub.

    Returns:
        The card's path.

    Raises:
        PeftrecError: the folder holds no run with an adapter, its earlier card is not one of ours, or a file cannot be
            written; an earlier card is as it was then.
    """
    run = Path(run)
    page = card_of(run, author, repo_id=repo_id)
    path = run / "adapter" / CARD
    _copy_figures(run / FIGURES, path.parent / FIGURES)
    with atomic(path) as scratch:
        scratch.write_text(page, encoding="utf-8")
    return path


def _copy_figures(drawn: Path, shown: Path) -> None:
    names = {f"{name}.png" for name in card_sections.FIGURES}
    try:
        for name in names:  # also those of an earlier run
            (shown / name).unlink(missing_ok=True)
        for picture in sorted(drawn.glob("*.png")):
            if picture.name in names:
                shown.mkdir(exist_ok=True)
                shutil.copyfile(picture, shown / picture.name)
    except OSError as error:
        raise PeftrecError(f"{shown}: cannot be written ({error.strerror}); free space, or make it writable") from error


def can_name(run: str | Path, repo_id: str) -> bool:
    """Whether this is a finished run whose card can be written again to name its repository `namespace/name`."""
    path = Path(run) / "adapter" / CARD
    if not ("/" in repo_id and is_hub_id(repo_id) and (Path(run) / RUN).is_file() and path.is_file()):
        return False
    return "<!-- peftrec:" in path.read_text(encoding="utf-8", errors="replace")


def card_of(run: str | Path, author: Author | None = None, *, repo_id: str | None = None) -> str:
    """The card of a finished run; what its author wrote into an earlier one, RUN/adapter/README.md, is kept.

    Args:
        run: the run's output_dir.
        author: what its author says besides the recipe's section `card` and RUN/card.yaml.
        repo_id: where it will be on the Hub.

    Raises:
        PeftrecError: the folder holds no run with an adapter, or the earlier card is not one of ours.
    """
    earlier = Path(run) / "adapter" / CARD
    try:
        existing = earlier.read_text(encoding="utf-8") if earlier.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{earlier}: cannot be read ({error}); expected a card in UTF-8; move it away") from None
    facts = read_facts(run)
    words = overlaid(read_author(run, facts), author or Author())
    return render(facts, words, repo_id=repo_id, existing=existing)


def render(
    facts: Facts, author: Author | None = None, *, repo_id: str | None = None, existing: str | None = None
) -> str:
    """The text of README.md.

    Args:
        facts: what the run left behind.
        author: what its author says; nothing is taken from the recipe.
        repo_id: where it will be on the Hub; without it the card speaks of the folder in which it lies.
        existing: an earlier card of the same adapter. Text outside the regions and metadata that is not ours are
            kept, a region that was taken out stays out.

    Raises:
        DataError: `existing` is not a card that was rendered, or its marks are broken.
        ConfigError: the run's recipe is none that this version knows.
    """
    author = author or Author()
    name = repo_id.rpartition("/")[2] if repo_id else facts.name
    known: dict[str, Any] = metadata(facts, author, name).to_dict()  # type: ignore[no-untyped-call]
    head = {key: known[key] for key in KEYS if key in known}
    page = _template().render(_context(facts, author, name, repo_id))
    page = tidy(page, TEMPLATE)
    if existing is not None:
        others, body = _parted(existing.replace("\r\n", "\n"))
        head |= others
        page = replace_regions(body, page, CARD)
    return f"---\n{dump_yaml(head).strip()}\n---\n{page}"


def _parted(card: str) -> tuple[dict[str, Any], str]:
    """The metadata of a card that is not ours, and the text behind it."""
    found = _HEAD.match(card)
    if found is None:
        return {}, card
    try:
        head = yaml.safe_load(found[1]) or {}
    except yaml.YAMLError as error:
        raise DataError(f"{CARD}: its head is not YAML ({' '.join(str(error).split())[:120]}); mend it") from None
    if not isinstance(head, dict):
        raise DataError(f"{CARD}: its head is not a mapping; expected keys between two lines ---; mend it")
    return {key: value for key, value in head.items() if key not in KEYS}, card[found.end() :]


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {"inline": inline, "code": code, "fenced": fenced, "literal": literal, "inert": inert}
    environment.filters["pieces"] = pieces
    source = (files("peftrec") / TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source)


def _context(facts: Facts, author: Author, name: str, repo_id: str | None) -> dict[str, Any]:
    """What the template speaks of."""
    recipe, about, record = recipe_of(facts), facts.artifact, facts.record
    comparison = compare_record(record, recipe)
    probe = about.probes[0] if about.probes else None
    names = placeholders(about.prompt.template or "")
    how = recipe.adapter
    return {
        "name": name,
        "repo_id": repo_id,
        "author": author,
        "record": record,
        "about": about,
        "recipe": recipe,
        "recipe_text": public_recipe(facts),
        "files": facts.files,
        "figures": [
            (f"{FIGURES}/{name}.png", alt)
            for name, alt in card_sections.FIGURES.items()
            if f"{name}.png" in facts.figures
        ],
        "data": named_data(facts),
        "base": hub_base(facts, author),
        "method": citations.method(how.method, how.variant, how.peft_type),
        "whole": how.method == "full",
        "own_prompts": {one: f"the {one}" for one in names if "item" not in names},
        "packaged": packaged(facts),
        "columns": placeholders(about.prompt.user or ""),
        "probe": probe,
        "candidates": list(dict.fromkeys(one.candidate for one in about.probes)),
        "question": card_sections.question(about),
        # Its warnings stand with the limits, where data's own are.
        "results": unbroken(dataclasses.replace(comparison, warnings=()).markdown()),
        "headline": card_sections.headline(comparison),
        "limits": card_limits.limits(facts, comparison),
        "sections": card_sections,
    }
