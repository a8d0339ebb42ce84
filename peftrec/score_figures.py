"""Figures of scores against what was answered: one dot, line or step for many rows, one colour for each scorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from peftrec.looks import FLAT, look, shown
from peftrec.metrics import ECE_BINS, bins, chances, nearest
from peftrec.ranking import auc
from peftrec.sources import Task

Array = npt.NDArray[Any]

_CURVE_POINTS = 1500  # more than the figure has pixels
_DOTTED: dict[str, Any] = {"color": "black", "linewidth": 1, "linestyle": (0, (1, 3))}
_MOST_ROWS = 0.99  # the last hundredth of the rows would take half the width of a curve of errors


def roc(label: Array, scores: Mapping[str, npt.ArrayLike], split: str) -> Figure | None:
    """Share of liked rows found against share of the others taken along, one curve per scorer; None with one class."""
    if len(np.unique(label)) < 2:
        return None
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots()
    for place, (name, score) in enumerate(scores.items()):
        false, true = _curve(label, np.asarray(score))
        colour, _, line = look(name, place)
        text = f"{auc(label, score):.3f}  {shown(name)}"
        axes.plot(false, true, line, color=colour, linewidth=2.8 if place == 0 else 1.6, label=text, zorder=9 - place)
    axes.plot([0, 1], [0, 1], **_DOTTED, label="0.500  chance")
    axes.set(
        title=f"ROC: which scorer puts liked {split} rows first",
        xlabel="share of the other rows above the threshold (false positive rate)",
        ylabel="share of liked rows above the threshold (true positive rate)",
        xlim=(0, 1),
        ylim=(0, 1),
        aspect="equal",
    )
    axes.legend(loc="lower right", title="AUC", alignment="left")
    return figure


def calibration(
    truth: Array, scores: Mapping[str, npt.ArrayLike], split: str, task: Task = "click", scale: Sequence[float] = (0, 1)
) -> Figure | None:
    """What was answered against what was predicted, in bins of it; below, how often the first scorer predicts each.

    Args:
        truth: labels or ratings (n,).
        scores: scorer -> log-odds or predicted ratings (n,).
        split: of the rows.
        task: what is predicted.
        scale: lowest and highest of what can be answered are its ends.
    """
    if not len(truth) or not scores:
        return None
    words = _WORDS[task]
    low, width = scale[0], scale[-1] - scale[0]
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    axes, counts = figure.subplots(2, sharex=True, height_ratios=[4, 1])
    axes.plot([low, low + width], [low, low + width], **_DOTTED, label=words["true"])
    edges = np.linspace(low, low + width, ECE_BINS + 1)
    for place, (name, score) in enumerate(scores.items()):
        predicted = np.asarray(score, dtype=np.float64)
        if task == "click":
            predicted = chances(predicted)
        binned = bins((predicted - low) / width)
        rows = np.bincount(binned, minlength=ECE_BINS)
        error = np.abs(np.bincount(binned, predicted - truth)).sum() / len(truth)
        some = rows > rows.max() / 100  # the mean answer of a handful of rows says nothing
        mean, answered = (np.bincount(binned, value, ECE_BINS)[some] / rows[some] for value in (predicted, truth))
        colour, marker, line = look(name, place)
        ours = place == 0
        axes.plot(mean, answered, line, color=colour, linewidth=1.6 if ours else 0.9, zorder=9 - place)
        # A dot is as large as its bin is full: a bin of five rows is noise.
        sizes = 12 + 140 * rows[some] / rows.max()
        text = f"{error:.3f}  {shown(name)}"
        axes.scatter(
            mean, answered, sizes, color=colour, marker=marker, alpha=1 if ours else 0.75, zorder=9 - place, label=text
        )
        if ours:
            counts.bar(edges[:-1], rows, width=width / ECE_BINS, align="edge", color=colour, edgecolor="white")
            counts.set(ylabel="rows", xlabel=words["predicted"])
            counts.set_title(f"How often the {shown(name)} predicts it", fontsize=12, pad=6)
    axes.set(
        title=words["title"].format(split=split),
        ylabel=words["answered"],
        xlim=(low, low + width),
        ylim=(low, low + width),
    )
    legend = axes.legend(loc="upper left", title="ECE (0 is best); a larger dot holds more rows", alignment="left")
    for handle in legend.legend_handles[1:]:
        handle.set_sizes([55])
    counts.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    return figure


_WORDS: dict[Task, dict[str, str]] = {
    "click": {
        "title": "Calibration: are the predicted probabilities true? ({split} rows)",
        "true": "true probabilities",
        "predicted": "predicted probability of a like",
        "answered": "share of rows that were liked",
    },
    "rating": {
        "title": "Calibration: are the predicted ratings true? ({split} rows)",
        "true": "true on average",
        "predicted": "predicted rating",
        "answered": "mean rating given",
    },
}


def agreement(rating: Array, scores: Mapping[str, npt.ArrayLike], split: str, scale: Sequence[float]) -> Figure | None:
    """Mean predicted rating for each given one, with the first scorer's spread; below, how often each was given."""
    if not len(rating) or not scores:
        return None
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    axes, counts = figure.subplots(2, sharex=True, height_ratios=[4, 1])
    values = np.asarray(scale, dtype=np.float64)
    place_of = nearest(rating.astype(np.float64), values)
    rows = np.bincount(place_of, minlength=len(values))
    given = np.flatnonzero(rows)
    axes.plot(values[[0, -1]], values[[0, -1]], **_DOTTED, label="predicted as given")
    spread = {name: score for name, score in scores.items() if name not in FLAT}
    for place, (name, score) in enumerate(spread.items()):
        predicted = np.asarray(score, dtype=np.float64)
        colour, marker, line = look(name, place)
        mean = np.bincount(place_of, predicted, len(values))[given] / rows[given]
        ours = place == 0
        style = {"linewidth": 2.8 if ours else 1.4, "markersize": 8 if ours else 6, "zorder": 9 - place}
        axes.plot(values[given], mean, line, color=colour, marker=marker, label=shown(name), **style)
        if ours:
            low, high = np.array([np.quantile(predicted[place_of == one], [0.1, 0.9]) for one in given]).T
            label = f"{shown(name)}, middle 80% of rows"
            axes.fill_between(values[given], low, high, color=colour, alpha=0.15, linewidth=0, label=label)
    axes.set(
        title=f"Predicted against given ratings ({split} rows)",
        ylabel="mean predicted rating",
        ylim=_roomy(values),
    )
    counts.bar(values, rows, width=0.8 * np.diff(values).min(), color="#999999")
    counts.set(ylabel="rows", xlabel="rating given", xlim=_roomy(values))
    counts.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def errors(rating: Array, scores: Mapping[str, npt.ArrayLike], split: str) -> Figure | None:
    """Share of rows whose prediction is off by no more than so much; the area above a curve is the mean error."""
    if not len(rating) or not scores:
        return None
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    share = np.linspace(0, _MOST_ROWS, _CURVE_POINTS)
    farthest = 0.0
    for place, (name, score) in enumerate((name, score) for name, score in scores.items() if name not in FLAT):
        off = np.abs(np.asarray(score, dtype=np.float64) - rating)
        curve = np.quantile(off, share)
        farthest = max(farthest, curve[-1])
        colour, _, line = look(name, place)
        text = f"{off.mean():.3f}  {shown(name)}"
        axes.plot(curve, share, line, color=colour, linewidth=2.8 if place == 0 else 1.6, label=text, zorder=9 - place)
    axes.set(
        title=f"Errors: how far predictions are off ({split} rows)",
        xlabel="rating points between prediction and rating",
        ylabel="share of rows that are off by no more than that",
        xlim=(0, farthest or None),
        ylim=(0, 1),
    )
    axes.legend(loc="lower right", title="MAE (0 is best)", alignment="left")
    return figure


def _roomy(values: Array) -> tuple[float, float]:
    """The ends of a scale and half a step more, so that markers and bars at the ends are whole."""
    step = float(np.diff(values).min()) / 2
    return float(values[0]) - step, float(values[-1]) + step


def _curve(label: Array, score: Array) -> tuple[Array, Array]:
    """Corners of the ROC curve, thinned: shares of label 0 and of label 1 above each threshold."""
    order = np.argsort(-score, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)
    true = np.append(0, np.cumsum(label[order] == 1)[ends])
    false = np.append(0, np.cumsum(label[order] == 0)[ends])
    kept = np.unique(np.linspace(0, len(true) - 1, _CURVE_POINTS).round().astype(np.int64))
    return false[kept] / false[-1], true[kept] / true[-1]
