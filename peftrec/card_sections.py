"""What the sections of a model card say, section by section, computed from a run's facts.

Everything returned is Markdown already: what comes from data is escaped here or by the template's filters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from peftrec import report
from peftrec.artifact import Artifact, Probe
from peftrec.bootstrap import Interval
from peftrec.card_facts import Facts, File, public_warnings
from peftrec.card_text import code, inline
from peftrec.config import Recipe
from peftrec.looks import FLAT, shown
from peftrec.metrics import HEADLINE, LOWER_IS_BETTER
from peftrec.record import BASE_MODEL, BASE_MODEL_NO_PRIOR, NO_PRIOR, RunRecord
from peftrec.report import HEADINGS, LEADING, Comparison, Table, pipes

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

_FIRST_DATE = 100_000_000  # seconds, 1973; what is smaller counts rows of a table without times
_MOST_LOGGED = 30
_OWN = (NO_PRIOR, BASE_MODEL, BASE_MODEL_NO_PRIOR)


def decimal(value: float) -> str:
    """A number as people write it: 4 and not 4.0."""
    return f"{value:g}"


# --- the example ------------------------------------------------------------------------------------------------------


def meaning(about: Artifact, score: float) -> str:
    """What a score says, in words."""
    if about.task == "rating":
        low, high = about.target.scale[0], about.target.scale[-1]
        return f"{score:.2f} on the scale from {decimal(low)} to {decimal(high)}"
    # This form neither overflows nor loses small chances.
    chance = math.exp(-max(-score, 0) - math.log1p(math.exp(-abs(score))))
    return f"{score:+.3f} (log-odds), a chance of {chance:.0%} that the person likes it"


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
        if name not in (comparison.ours, *_OWN) and key in own and math.isfinite(own[key].point)
    }
    text = f"{HEADINGS[metric]} on {comparison.sizes['all'].rows:,} test rows: {report.cell(ours, interval=True)}"
    if not others:
        return f"{text}."
    best = (min if metric in LOWER_IS_BETTER else max)(others, key=lambda name: others[name].point)
    return f"{text}; the best baseline, {shown(best)}, has {report.cell(others[best], interval=True)}."


def verdicts(comparison: Comparison) -> Iterator[str]:
    """Where the adapter is worse than a baseline, or cannot be told from it, metric by metric."""
    for metric in LEADING[comparison.task]:
        worse, unclear = [], []
        for name, own in comparison.differences.items():
            one = own.get(f"{comparison.split}/{metric}")
            if name in _OWN or one is None or not math.isfinite(one.low):
                continue
            ahead, behind = (-one.high, -one.low) if metric in LOWER_IS_BETTER else (one.low, one.high)
            told = f"{shown(name)} ({report.cell(one, interval=True, sign='+')})"
            if behind < 0:
                worse.append(told)
            elif ahead <= 0:
                unclear.append(told)
        for what, names in (("is worse than", worse), ("cannot be told apart from", unclear)):
            if names:
                yield f"By {HEADINGS[metric]} the {shown(comparison.ours)} {what} {', '.join(names)}."


def worst_slice(comparison: Comparison) -> str:
    """The slice that is served worst by the task's first metric, if one is worse than all rows together."""
    metric = HEADLINE[comparison.task]
    key, own = f"{comparison.split}/{metric}", comparison.intervals[comparison.ours]
    sign = -1 if metric in LOWER_IS_BETTER else 1
    found: dict[str, Interval] = {
        name: own[f"{key}|{name}"]
        for name in comparison.sizes
        if "=" not in name and f"{key}|{name}" in own and math.isfinite(own[f"{key}|{name}"].point)
    }
    if key not in own or not found:
        return ""
    worst = min(found, key=lambda name: sign * found[name].point)
    if sign * found[worst].point >= sign * own[key].point:
        return ""
    size = comparison.sizes[worst]
    return (
        f"It serves the slice {worst} worst: {HEADINGS[metric]} {report.cell(found[worst], interval=True)} on "
        f"{size.rows:,} rows of {size.users:,} users, against {report.cell(own[key])} on all."
    )


def groups_served(comparison: Comparison) -> Iterator[str]:
    """For each column of the users table the group that is served worst, beside the best."""
    metric = HEADLINE[comparison.task]
    sign = -1 if metric in LOWER_IS_BETTER else 1
    own = comparison.intervals[comparison.ours]
    found: dict[str, dict[str, Interval]] = {}
    for name in comparison.sizes:
        column, _, group = name.partition("=")
        one = own.get(f"{comparison.split}/{metric}|{name}")
        if group and one is not None and math.isfinite(one.point):
            found.setdefault(column, {})[group] = one
    for column, groups in found.items():
        ordered = sorted(groups, key=lambda group: sign * groups[group].point)
        if len(ordered) < 2:
            continue
        worst, best = groups[ordered[0]], groups[ordered[-1]]
        size = comparison.sizes[f"{column}={ordered[0]}"]
        apart = worst.high < best.low or best.high < worst.low
        yield (
            f"By {inline(column)} it serves the group {inline(ordered[0])} worst: {HEADINGS[metric]} "
            f"{report.cell(worst, interval=True)} on {size.rows:,} rows of {size.users:,} users, against "
            f"{report.cell(best, interval=True)} for {inline(ordered[-1])}"
            + ("." if apart else "; the intervals overlap.")
        )


# --- data -------------------------------------------------------------------------------------------------------------


def splits(record: RunRecord) -> str:
    """A table of the splits: rows, users, items, answers and times."""
    task, found = record.task, record.data.get("splits", {})
    dated = any((one.get("last") or 0) >= _FIRST_DATE for one in found.values())
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
        before = [one["loss"] for one in losses if one["step"] <= line["step"]]
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


# --- limits -----------------------------------------------------------------------------------------------------------


def limits(facts: Facts, comparison: Comparison) -> list[str]:
    """What the run itself shows of limits and risks, a sentence or two each."""
    return [*_unseen(facts, comparison), *verdicts(comparison), *_served(comparison), *_chosen(facts), *_asked(facts)]


def _unseen(facts: Facts, comparison: Comparison) -> Iterator[str]:
    data = facts.record.data
    trained = data.get("splits", {}).get("train", {})
    if (trained.get("last") or 0) >= _FIRST_DATE:
        yield f"Its training events end on {day(trained['last'])}; of later items and tastes it knows nothing."
    if data.get("items") and trained.get("items", data["items"]) < data["items"]:
        yield f"{data['items'] - trained['items']:,} of the {data['items']:,} items in the data have no training event."
    every = comparison.sizes["all"].rows
    for name, whom in (("cold_item", "items"), ("cold_user", "users")):
        size = comparison.sizes.get(name)
        if size is not None and not size.rows:
            yield f"No test row is of {whom} without training events: how it serves these was not measured."
        elif size is not None:
            yield f"{size.rows:,} of the {every:,} test rows ({size.rows / every:.1%}) are of {whom} never trained on."
    held_out = data.get("splits", {}).get("test", {}).get("rows", 0)
    if every < held_out:
        yield f"Figures are of {every:,} of the {held_out:,} test rows: those of some users, drawn by the seed."
    yield f"It is one run, with seed {facts.record.seed}: how far figures move with the seed was not measured."


def _served(comparison: Comparison) -> Iterator[str]:
    if text := worst_slice(comparison):
        yield text
    yield from groups_served(comparison)
    popular, tail = (comparison.sizes.get(name) for name in ("popular", "tail"))
    if comparison.task == "click" and popular and tail and popular.rows and tail.rows:
        liked, rarely = popular.total / popular.rows, tail.total / tail.rows
        if liked > rarely:
            yield (
                f"In the test {liked:.0%} of the rows on popular items are likes, of those on the tail {rarely:.0%}: "
                "what is popular is favoured already by the data."
            )


def _chosen(facts: Facts) -> Iterator[str]:
    """How popular the best-scored items are, and how many items these are."""
    found = facts.record.exposure
    if not found:
        return
    (_, ours), *others = found["scorers"].items()
    lift, low, high = (ours[key] for key in ("lift", "low", "high"))
    judged = ""
    if low is not None and high is not None:
        what = "favours" if low > 0 else "avoids" if high < 0 else "neither favours nor avoids for certain"
        judged = f": it {what} what is popular ({100 * lift:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}])"
    shares = ", ".join(f"{shown(other)} {one['head']:.0%}" for other, one in others if other not in (*_OWN, *FLAT))
    yield (
        f"Of the ten best-scored test rows of each of {found['users']:,} users, {ours['head']:.0%} are of the "
        f"{found['head']:,} most popular items (a tenth), which are {found['head_in_candidates']:.0%} of these users' "
        f"test rows and {found['head_in_log']:.0%} of the training events{judged}."
        + (f" The others: {shares}." if shares else "")
    )
    yield (
        f"These {found['places']:,} places go to {ours['items']:,} different items, of the {found['candidates']:,} in "
        f"these test rows and the {found['items']:,} in the catalogue ({ours['items'] / found['items']:.1%})."
    )


def _asked(facts: Facts) -> Iterator[str]:
    about = facts.artifact
    prompt = about.prompt
    yield (
        f"A prompt holds {prompt.max_tokens:,} tokens"
        + (f" and {prompt.max_history:,} events" if prompt.max_history else "")
        + f": the oldest events are left out first. Texts of items are cut to {prompt.max_item_tokens:,} tokens."
    )
    if about.prior:
        yield (
            "Published scores include a prior that only counts (`prior.json`). Without peftrec there is no prior; "
            f"those scores are the row “{shown(NO_PRIOR)}”."
        )
    if about.probes:
        yield f"`peftrec.json` holds {len(about.probes)} questions whose histories are from the data, without user ids."
    yield from (f"{inline(line)}." for line in public_warnings(facts))


# --- files ------------------------------------------------------------------------------------------------------------


def listing(files: Sequence[File]) -> str:
    """The files with their sizes and hashes, a line each."""
    return "\n".join(f"* {inline(one.name)}, {one.bytes:,} bytes: {code(one.sha256)}" for one in files)
