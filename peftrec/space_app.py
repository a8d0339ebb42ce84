"""Ask a recommender in the browser: a history and candidates go in, rated candidates come out, best first.

    pip install -r requirements.txt
    python app.py

space.json beside this file says which adapter. What is typed is not kept, and the page asks no other site for anything.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
for package in HERE.glob("peftrec-*.zip"):
    sys.path.insert(0, str(package))  # Python imports from archives; peftrec is on no package index

import gradio as gr  # noqa: E402 (the path comes first)

from peftrec import hub  # noqa: E402
from peftrec.errors import PeftrecError, as_one_line  # noqa: E402
from peftrec.recommender import Recommendation, Recommender  # noqa: E402
from peftrec.values import placeholders  # noqa: E402

MOST_CHARACTERS = 20_000
MOST_CHOICES = 20_000  # titles that the page carries to pick from; beyond that they are typed
MOST_SHOWN = 100
BETWEEN = "---"  # a line between two records

THEME = gr.themes.Default(
    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(  # Gradio's own are too pale to read
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    button_primary_background_fill_hover="*primary_700",
)
CSS = """
body.dark { color-scheme: dark; }
.rated table { width: 100%; border-collapse: collapse; }
.rated caption { text-align: left; font-weight: 600; padding: 0.5rem 0; }
.rated table, .rated tr, .rated th, .rated td { border: none; }
.rated th, .rated td { padding: 0.4rem 0.6rem; text-align: left; }
.rated tr { border-bottom: 1px solid var(--border-color-primary); }
.rated td:last-child { overflow-wrap: anywhere; white-space: pre-line; width: 100%; }
.rated th { white-space: nowrap; }
.rated .figure { text-align: right; font-variant-numeric: tabular-nums; }
.rated [role=alert] { border-left: 4px solid var(--error-icon-color); padding: 0.4rem 0.8rem; }
"""


def load(folder: Path) -> Recommender:
    """The recommender that `folder`/space.json names.

    Raises:
        PeftrecError: the adapter or its base model cannot be fetched or loaded.
    """
    about = json.loads((folder / "space.json").read_text(encoding="utf-8"))
    adapter = hub.pull(about["repo_id"], about["revision"]) if about["repo_id"] else folder / "adapter"
    items = folder / "items.parquet"
    return Recommender.from_pretrained(
        adapter, items=items if items.is_file() else None, base_model=about["base_model"]
    )


def build(recommender: Recommender, title: str) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.HTML(f"<h1>{escape(title)}</h1>")
        (_ask_records if recommender.own_prompts else _ask_items)(recommender)
    return page


def _ask_items(recommender: Recommender) -> None:
    answers, known = answers_of(recommender), len(recommender.catalogue)
    titles = [recommender.catalogue.label(row) for row in range(known)] if known <= MOST_CHOICES else []
    verb = "rated" if recommender.artifact.task == "rating" else "liked"
    gr.HTML(f"<p>Say what somebody met and how they {verb} it; the best of what comes next is on top.</p>")
    with gr.Row(equal_height=True):
        if titles:
            title: Any = gr.Dropdown(
                list(dict.fromkeys(titles)),
                value=None,
                label="Title",
                info="Pick one or type it.",
                allow_custom_value=True,
                scale=3,
                min_width=280,
            )
        else:
            title = gr.Textbox(label="Title", info="Type it.", max_length=MOST_CHARACTERS, scale=3, min_width=280)
        kind = "Rating" if verb == "rated" else "Liked"
        answer = gr.Radio(answers, value=answers[0], label=kind, info="What the person said.", scale=2, min_width=280)
    with gr.Row():
        add = gr.Button("Add to the history")
        example = gr.Button("Fill in an example", visible=bool(recommender.artifact.probes))
    said = f"{answers[0]} to {answers[-1]}" if verb == "rated" else " or ".join(answers)
    history = _box("History", f"Oldest first, one a line: title, colon, {said}.", lines=4)
    everything = f" With none, all {known:,} titles are rated, which takes a while." if known else ""
    candidates = _box("Candidates", f"One title a line.{everything}", lines=2)
    columns = list(dict.fromkeys(placeholders(recommender.prompt.user or "")))
    with gr.Row(visible=bool(columns)):
        person = [gr.Textbox(label=f"Person: {name}", max_length=MOST_CHARACTERS) for name in columns]
    most = gr.Slider(1, MOST_SHOWN, value=10, step=1, label="How many to show")
    rate = gr.Button("Rate", variant="primary")
    shown = gr.HTML(elem_classes="rated", label="Rated candidates")

    def added(title: str | None, answer: str, history: str) -> tuple[str, str | None]:
        line = " ".join((title or "").split())
        return (f"{history.rstrip()}\n{line}: {answer}".lstrip(), None) if line else (history, None)

    def examined() -> str:
        longest = max(recommender.artifact.probes, key=lambda probe: len(probe.history))
        return "\n".join(f"{text}: {answer_of(recommender, label)}" for text, label in longest.history)

    def rated(history: str, candidates: str, most: int, *person: str) -> str:
        known_of = {name: value.strip() or None for name, value in zip(columns, person, strict=True)}
        user = known_of if any(known_of.values()) else None
        return answered(recommender, lines_of(history), lines_of(candidates) or None, most, user)

    add.click(added, [title, answer, history], [history, title], api_visibility="private")
    example.click(examined, [], history, api_visibility="private")
    rate.click(rated, [history, candidates, most, *person], shown, api_name="rate")


def _ask_records(recommender: Recommender) -> None:
    names = list(dict.fromkeys(placeholders(recommender.prompt.template or "")))
    gr.HTML("<p>This adapter answers ready-made prompts. Several are rated against each other, best first.</p>")
    boxes = [_box(name.capitalize(), "The same for all.", lines=2) for name in names[:-1]]
    boxes.append(_box(names[-1].capitalize(), f"For several, a line {BETWEEN} between two.", lines=8))
    rate = gr.Button("Rate", variant="primary")
    shown = gr.HTML(elem_classes="rated", label="Rated candidates")

    def rated(*texts: str) -> str:
        last = [part.strip() for part in re.split(rf"^{BETWEEN}[ \t]*$", texts[-1], flags=re.M)]
        records = [dict(zip(names, [*texts[:-1], part], strict=True)) for part in last if part]
        return answered(recommender, [], records, MOST_SHOWN, None)

    rate.click(rated, boxes, shown, api_name="rate")


def _box(label: str, info: str, lines: int) -> gr.Textbox:
    return gr.Textbox(label=label, info=info, lines=lines, max_lines=20, max_length=MOST_CHARACTERS)


def answers_of(recommender: Recommender) -> list[str]:
    """What can be said of an item, best first."""
    return [answer_of(recommender, label) for label in reversed(range(len(recommender.prompt.answers)))]


def answer_of(recommender: Recommender, label: int) -> str:
    """An answer in the user's words: the rating, or that of the prompt."""
    if recommender.artifact.task == "rating":
        return f"{recommender.target.scale[label]:g}"
    return recommender.prompt.answers[label].strip()


def lines_of(text: str) -> list[str]:
    """The lines of a box that hold something."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def answered(
    recommender: Recommender, history: Sequence[str], candidates: Sequence[Any] | None, most: int, user: Any
) -> str:
    """The ranking as HTML: a table with notes on how the titles were read, or the one line that says what is wrong."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            best = recommender.rank(history, candidates, k=int(most), user=user)
            unknown = _unknown(recommender, history)
        except PeftrecError as error:
            return f'<p role="alert">{escape(str(error))}</p>'
    notes = [*dict.fromkeys(str(one.message) for one in caught if one.category is UserWarning)]
    if unknown:
        notes.append(f"Not in the items table, read as typed: {', '.join(unknown)}")
    if not best:
        notes.append("Nothing is left to rate: every candidate is in the history.")
    return (table(best) if best else "") + "".join(f'<p role="status">{escape(note)}</p>' for note in notes)


def _unknown(recommender: Recommender, history: Sequence[str]) -> list[str]:
    if not len(recommender.catalogue):
        return []
    return [event.item.text for event in recommender.events(history) if event.item.row is None]


def table(best: Sequence[Recommendation]) -> str:
    """Ranked items as an HTML table."""
    figure = "Rating" if best[0].probability is None else "Chance"
    rows = "".join(
        f'<tr><td class="figure">{place}</td><td class="figure">{_figure(one)}</td><td>{escape(one.title)}</td></tr>'
        for place, one in enumerate(best, 1)
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Place", figure, "Title"))
    return f"<table><caption>Best first</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _figure(one: Recommendation) -> str:
    return f"{one.score:.2f}" if one.probability is None else f"{one.probability:.3f}"


if __name__ == "__main__":
    with as_one_line():
        loaded = load(HERE)
    name = json.loads((HERE / "space.json").read_text(encoding="utf-8"))["title"]
    build(loaded, name).launch(theme=THEME, css=CSS, footer_links=[], ssr_mode=False, run_history=False)
