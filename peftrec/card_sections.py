"""What the sections of a model card say, section by section, computed from a run's facts.

Everything returned is Markdown already: what comes from data is escaped here or by the template's filters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import numpy as np

from peftrec import report
from peftrec.artifact import Artifact, Probe
from peftrec.card_facts import File
from peftrec.card_text import code, inline
from peftrec.config import Recipe
from peftrec.looks import shown
from peftrec.metrics import HEADLINE, LOWER_IS_BETTER, chances
from peftrec.record import BASE_MODEL, BASE_MODEL_NO_PRIOR, NO_PRIOR, RunRecord
from peftrec.report import HEADINGS, Comparison, Table, pipes

SAMPLES = 3
FIGURES = {
    "loss": "Training and validation loss by step",
    "roc": "ROC curves on the test rows",
    "ratings": "Predicted against given ratings of the test rows",
    "errors": "How far predictions of the test rows are off",
    "calibration": "Predictions against what was answered, in bins of the prediction",
    "slices": "Each scorer in each slice of the test rows, with 95% intervals",
}
"""Name of a figure -> what it shows."""

FIRST_DATE = 100_000_000
"""Seconds, 1973; what is smaller counts rows of a table without times."""
_MOST_LOGGED = 30
OWN = (NO_PRIOR, BASE_MODEL, BASE_MODEL_NO_PRIOR)
"""The model's own scorers beside the adapter."""


def decimal(value: float) -> str:
    """A number as people write it: 4 and not 4.0."""
    return f"{value:g}"


# --- the example ------------------------------------------------------------------------------------------------------


def meaning(about: Artifact, score: float) -> str:
    """What a score says, in words."""
    if about.task == "rating":
        low, high = about.target.scale[0], about.target.scale[-1]
        return f"{score:.2f} on the scale from {decimal(low)} to {decimal(high)}"
    chance = float(chances(np.asarray(score)))
    return f"{score:+.3f} (log-odds), a chance of {chance:.0%} that the person likes it"


def added(about: Artifact) -> str:
    """What peftrec does to the model's own score, in words; empty where it is nothing."""
    return " and ".join(["the prior"] * bool(about.prior) + ["the calibration"] * bool(about.target.calibration))


def raw(about: Artifact) -> str:
    """When a probe's score is taken, in words; empty where there is nothing to come."""
    ways = ["the prior is added"] * bool(about.prior) + ["scores are calibrated"] * bool(about.target.calibration)
    return f"before {' and '.join(ways)}" if ways else ""


def answer_word(about: Artifact, label: int) -> str:
    """An answer as a person would say it."""
    return decimal(about.target.scale[label]) if about.task == "rating" else about.prompt.answers[label].strip()


def size(adapter: Mapping[str, Any]) -> str:
    """Trained parameters and bytes, as the end of a sentence."""
    if not adapter.get("trainable_parameters"):
        return ""
    return f": {adapter['trainable_parameters']:,} trained parameters, {adapter['bytes'] / 1e6:.1f} MB"


def story(about: Artifact, probe: Probe) -> str:
    """A probe as lines of text: what the person met, and the item in question."""
    lines = [f"{text}: {answer_word(about, label)}" for text, label in probe.history]
    return "\n".join([*lines, f"{probe.candidate}: ?"])


def said(about: Artifact, probe: Probe) -> list[tuple[str, str | float]]:
    """A probe's history as `Recommender` takes it."""
    if about.task == "click":
        return [(text, answer_word(about, label)) for text, label in probe.history]
    whole = all(value.is_integer() for value in about.target.scale)
    values = [int(value) if whole else value for value in about.target.scale]
    return [(text, values[label]) for text, label in probe.history]


def question(about: Artifact) -> str:
    """The prompt of the first probe, or the example where there are no probes; of an encoder with a tab in it."""
    prompt = about.prompt
    if not about.probes:
        return prompt.example
    probe = about.probes[0]
    bos = (prompt.bos or "") if prompt.kind == "causal" else ""
    return bos + prompt.text(probe.history, probe.candidate)


def samples(about: Artifact) -> str:
    """A table of further probes."""
    rows: Table = [("met, oldest first", "asked", "score")]
    for probe in about.probes[1 : 1 + SAMPLES]:
        met = "; ".join(f"{inline(text)}: {inline(answer_word(about, label))}" for text, label in probe.history)
        score = f"{probe.score:.2f}" if about.task == "rating" else f"{probe.score:+.3f}"
        rows.append((met or "nothing", inline(probe.candidate), score))
    return pipes(rows) if len(rows) > 1 else ""


# --- results ----------------------------------------------------------------------------------------------------------


def headline(comparison: Comparison) -> str:
    """The task's first metric of ours beside the best of what only counts; empty where nothing was measured."""
    metric = HEADLINE[comparison.task]
    key = f"{comparison.split}/{metric}"
    ours = comparison.intervals[comparison.ours].get(key)
    if ours is None or not math.isfinite(ours.point):
        return ""
    others = {
        name: own[key]
        for name, own in comparison.intervals.items()
        if name not in (comparison.ours, *OWN) and key in own and math.isfinite(own[key].point)
    }
    text = f"{HEADINGS[metric]} on {comparison.sizes['all'].rows:,} test rows: {report.cell(ours, interval=True)}"
    if not others:
        return f"{text}."
    best = (min if metric in LOWER_IS_BETTER else max)(others, key=lambda name: others[name].point)
    return f"{text}; the best baseline, {shown(best)}, has {report.cell(others[best], interval=True)}."


# --- data -------------------------------------------------------------------------------------------------------------


def splits(record: RunRecord) -> str:
    """A table of the splits: rows, users, items, answers and times."""
    task, found = record.task, record.data.get("splits", {})
    dated = any((one.get("last") or 0) >= FIRST_DATE for one in found.values())
    answered = {"click": "liked", "rating": "mean rating"}[task]
    rows: Table = [("split", "rows", "users", "items", answered, *(("from", "to") if dated else ()))]
    for name, one in found.items():
        if task == "click":
            share = f"{one['positives'] / one['rows']:.1%}" if one["rows"] else "-"
        else:
            share = "-" if one["mean_rating"] is None else f"{one['mean_rating']:.2f}"
        times = (day(one["first"]), day(one["last"])) if dated else ()
        rows.append((name, *(f"{one[key]:,}" for key in ("rows", "users", "items")), share, *times))
    return pipes(rows) if len(rows) > 1 else ""


def day(seconds: float | None) -> str:
    """The day of a timestamp, UTC, ISO 8601."""
    if seconds is None:
        return "-"
    return datetime.fromtimestamp(seconds, timezone.utc).date().isoformat()


def protocol(recipe: Recipe) -> str:
    """How rows became training, validation and test rows, in a sentence."""
    how, rows = recipe.data.split, isinstance(recipe.data.records, dict)
    if rows:
        return "The splits are files of their own."
    shares = f"the validation set is {how.valid:.0%}, the test set {how.test:.0%}"
    return {
        "temporal": f"Cut by time over all users: of the rows in order of time {shares}, the latest.",
        "leave_last_out": "Of each user the last event is for the test, the one before for validation.",
        "kfold": f"Random rows: fold {how.fold} of {how.folds} (counted from 0) is the test set, {how.valid:.0%} of "
        "the others the validation set.",
        "cold_user": f"By user, at random: {shares} of the users, who have no training events.",
        "cold_item": f"By item, at random: {shares} of the items, which have no training events.",
        "column": "The split is that of a column of the data.",
    }[how.kind]


def ratings(record: RunRecord) -> str:
    """How often each rating was given, by split."""
    found = record.data.get("splits", {})
    given: dict[str, int] = next((one["ratings"] for one in found.values() if "ratings" in one), {})
    rows: Table = [("rating", *given)]
    rows += [(name, *(f"{count:,}" for count in one["ratings"].values())) for name, one in found.items() if given]
    return pipes(rows) if given else ""


# --- prompt -----------------------------------------------------------------------------------------------------------


def answers(about: Artifact) -> str:
    """A table of the answers: text, token and what each stands for."""
    prompt, scale = about.prompt, about.target.scale
    tokens = [f"{one}" for one in prompt.answer_ids] or ["-"] * len(prompt.answers)
    stands = ["not liked", "liked"] if about.task == "click" else [decimal(value) for value in scale]
    # Python's quotes show a leading space, which is part of the token.
    texts = [inline(repr(text)) for text in prompt.answers]
    return pipes([("answer", "token", "stands for"), *zip(texts, tokens, stands, strict=True)])


def scoring(about: Artifact) -> str:
    """How outputs become a score, in a sentence or two."""
    target, rates = about.target, about.task == "rating"
    outputs = {
        "tokens": "The outputs are the logits of the answers' tokens",
        "classifier": "The outputs are those of a classification head, one for each answer",
        "linear": "The output is that of a head with a single value",
    }[target.head]
    if target.head == "linear":
        added = f" plus {target.offset[0]:g}" if target.offset[0] else ""
        meant = "the predicted rating, cut to the scale" if rates else "the log-odds of a like"
        text = f"{outputs}; the score is that value{added}: {meant}."
    elif rates:
        offset = ", ".join(f"{value:.3f}" for value in target.offset)
        text = (
            f"{outputs}; with the offsets {offset} added their softmax is the chance of each rating, and the score is "
            "the mean rating under it."
        )
    else:
        text = f"{outputs}; the score is the second minus the first: the log-odds of a like."
    return f"{text} It was trained by {target.loss.replace('_', '-')}."


# --- training ---------------------------------------------------------------------------------------------------------


def effort(record: RunRecord) -> str:
    """Events, tokens, seconds and hardware, as far as they are known."""
    train, adapter, words = record.train, record.adapter, []
    if train.get("seconds"):
        words.append(
            f"{train['events']:,} events and {train['tokens']:,} tokens in {train['seconds']:,.0f} seconds and "
            f"{train['steps']:,} steps ({train['events_per_second']:.1f} events, "
            f"{train['tokens_per_second']:,.0f} tokens a second)."
        )
    if record.eval.get("rows") and record.eval.get("seconds"):
        rows, seconds = record.eval["rows"], record.eval["seconds"]
        words.append(
            f"Scoring {rows:,} rows with their histories took {seconds:,.0f} seconds, {1000 * seconds / rows:,.0f} "
            "milliseconds a row."
        )
    if made_on := hardware(record.hardware):
        words.append(f"Hardware: {made_on}.")
    if adapter.get("trainable_parameters") and record.model.get("parameters"):
        share = adapter["trainable_parameters"] / record.model["parameters"]
        words.append(
            f"Trained parameters: {adapter['trainable_parameters']:,} ({share:.2%} of the base model's), "
            f"{adapter['bytes']:,} bytes."
        )
    if start := adapter.get("started_from"):
        words.append(f"Training started from the adapter {inline(start['name'])} (sha256 {start['sha256'][:16]}).")
    if taught := adapter.get("taught_by"):
        named = ", ".join(f"{inline(run['name'])} (sha256 {run['sha256'][:16]})" for run in taught["runs"])
        words.append(
            f"Each training event's answer was taken for {1 - taught['share']:g} of its own and {taught['share']:g} of "
            f"what earlier runs told of it together: {named}."
        )
    if other := adapter.get("aligned_with"):
        items = "; ".join(f"{column}: {', '.join(map(str, values))}" for column, values in other["items_where"].items())
        words.append(
            f"A second loss ({other['kind']}, weight {other['weight']:g}) was to bring another domain nearer, "
            f"{inline(' '.join([other['data'], *([items] if items else [])]))}: of its {other['events']:,} training "
            "events no answer was read."
        )
    if quantized := record.model.get("quantization"):
        words.append(f"The base model was quantized while it trained: {inline(quantized)}.")
    return " ".join([*words, f"Seed {record.seed}. Measured on {record.created[:10]} (UTC)."])


def training_log(train: Mapping[str, Any]) -> str:
    """Validation passes, each with the training loss last logged before it; the row whose weights were kept is bold.

    Without validation passes, the training loss alone, thinned out where it was logged often.
    """
    log: Sequence[Mapping[str, float]] = train.get("log") or ()
    measured = [key for key in ("loss", *HEADINGS) if any(f"eval_{key}" in line for line in log)]
    keys = [f"eval_{key}" for key in measured]
    losses = [line for line in log if "loss" in line]
    lines = [line for line in log if measured and keys[0] in line] or losses[
        :: math.ceil(len(losses) / _MOST_LOGGED) or 1
    ]
    heads = [f"validation {HEADINGS.get(key, key)}" for key in measured]
    rows: Table = [("step", "epoch", "training loss", *heads)]
    for line in lines:
        # As validation counts it: without what aligns domains.
        before = [one["loss"] - one.get("align_loss", 0.0) for one in losses if one["step"] <= line["step"]]
        cells = [
            f"{line['step']:,.0f}",
            f"{line['epoch']:.2f}" if "epoch" in line else "-",
            f"{before[-1]:.3f}" if before else "-",
            *("-" if line.get(key) is None else f"{line[key]:.3f}" for key in keys),
        ]
        kept = line["step"] == train.get("best_step")
        rows.append(tuple(f"**{cell}**" if kept else cell for cell in cells))
    return pipes(rows) if len(rows) > 1 else ""


def hardware(found: Mapping[str, Any]) -> str:
    """What the run was made on, as a list of words; empty where nothing is known."""
    words = []
    if found.get("accelerators"):
        words.append(", ".join(map(inline, found["accelerators"])))
    if found.get("cpu"):
        cores = found.get("cores")
        words.append((f"{cores} core{'' if cores == 1 else 's'} of " if cores else "") + inline(found["cpu"]))
    if found.get("memory_gb"):
        words.append(f"{found['memory_gb']:g} GB of memory")
    return ", ".join(words)


def versions(found: Mapping[str, str | None]) -> str:
    """Python and the packages that were installed; the platform's name says more of a machine than of figures."""
    return ", ".join(f"{name} {inline(one)}" for name, one in found.items() if one and name != "platform")


# --- files ------------------------------------------------------------------------------------------------------------


def listing(files: Sequence[File]) -> str:
    """The files with their sizes and hashes, a line each."""
    return "\n".join(f"* {inline(one.name)}, {one.bytes:,} bytes: {code(one.sha256)}" for one in files)
