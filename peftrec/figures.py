"""Four PNGs of a run: how the loss fell, who ranks best, whether probabilities are true, and where it is hard.

Each figure is made from plain arrays and reads well 900 pixels wide. A scorer keeps its colour and its marker in all of
them (Okabe and Ito's colours, which the colour-blind can tell apart).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from peftrec.errors import PeftrecError
from peftrec.metrics import ECE_BINS, Interval, auc, click_metrics
from peftrec.record import ADAPTER, BASE_MODEL, BASE_MODEL_NO_PRIOR, NO_PRIOR, atomic

LABELS = {
    ADAPTER: "adapter",
    NO_PRIOR: "adapter, no prior",
    BASE_MODEL: "base model, untrained",
    BASE_MODEL_NO_PRIOR: "base model, no prior",
    "item_mean": "item mean",
    "bias": "user+item bias",
    "global_mean": "global mean",
}
"""What people read for a scorer's name; other names are shown as they are."""

FLAT = ("global_mean",)
"""Scorers that give almost every row the same score; by slice they show nothing and stretch the axis."""

# Colour, marker and line of a scorer; black marks what is no scorer.
_LOOKS = {
    ADAPTER: ("#0072B2", "o", "-"),
    NO_PRIOR: ("#56B4E9", "D", "-"),
    BASE_MODEL: ("#7F7F7F", "s", "-"),
    "bias": ("#D55E00", "^", "--"),
    "item_mean": ("#E69F00", "v", "--"),
    "popularity": ("#009E73", "P", ":"),
    "global_mean": ("#CC79A7", "X", ":"),
}
_OTHERS = (("#CC79A7", "X", "-."), ("#009E73", "P", "-."), ("#000000", "*", "-."), ("#E69F00", "<", "-."))
_STYLE: dict[Any, Any] = {
    "font.size": 12,
    "axes.titlesize": 14,
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "legend.fontsize": 11,
    "lines.linewidth": 1.8,
}
_DPI = 150
_CURVE_POINTS = 1500  # more than the figure has pixels


def draw(
    folder: str | Path,
    *,
    train_log: Sequence[Mapping[str, float]],
    best_step: int | None,
    label: npt.ArrayLike,
    scores: Mapping[str, npt.ArrayLike],
    intervals: Mapping[str, Mapping[str, Interval]],
    rows: Mapping[str, int],
    split: str = "test",
    ranking_only: Sequence[str] = (),
) -> list[Path]:
    """Write loss.png, roc.png, calibration.png and slices.png; those that have nothing to show are left out.

    Args:
        folder: created if need be.
        train_log: Trainer's log history.
        best_step: whose weights were kept.
        label: 0 or 1 of each row (n,).
        scores: scorer -> log-odds (n,); the first is ours.
        intervals: scorer -> metric (`test/auc|cold_item`) -> interval.
        rows: slice -> number of rows, `all` first.
        split: the name before the slash of a metric.
        ranking_only: scorers whose scores are no log-odds.

    Returns:
        The files written.

    Raises:
        PeftrecError: a file cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PeftrecError(f"{folder}: cannot be made ({error.strerror}); choose another output_dir") from error
    label = np.asarray(label)
    figures: dict[str, Callable[[], Figure | None]] = {
        "loss": lambda: loss(train_log, best_step),
        "roc": lambda: roc(label, scores, split),
        "calibration": lambda: calibration(
            label, {name: score for name, score in scores.items() if name not in ranking_only}, split
        ),
        "slices": lambda: slices(intervals, rows, split),
    }
    written = []
    with _style():
        for name, make in figures.items():
            path = folder / f"{name}.png"
            # What an earlier run left under this name would be taken for this run's.
            path.unlink(missing_ok=True)
            figure = make()
            if figure is not None:
                with atomic(path) as scratch:
                    figure.savefig(scratch, format="png", dpi=_DPI, metadata={"Software": None})
                written.append(path)
    return written


def loss(train_log: Sequence[Mapping[str, float]], best_step: int | None) -> Figure | None:
    """Training and validation loss by step and, below, validation AUC; None if nothing was logged."""
    trained = [(line["step"], line["loss"]) for line in train_log if "loss" in line]
    valid = {
        key: [(line["step"], line[f"eval_{key}"]) for line in train_log if np.isfinite(line.get(f"eval_{key}", np.nan))]
        for key in ("loss", "auc", "uauc")
    }
    ranked = [key for key in ("auc", "uauc") if valid[key]]
    if not trained and not valid["loss"]:
        return None
    figure = Figure(figsize=(9, 6.2 if ranked else 4.6), layout="constrained")
    grid = figure.subplots(2 if ranked else 1, sharex=True, squeeze=False, height_ratios=[3, 2] if ranked else [1])
    axes = [grid[row, 0] for row in range(len(grid))]
    if trained:
        axes[0].plot(*zip(*trained, strict=True), color="#56B4E9", linewidth=1.3, label="training")
    if valid["loss"]:
        axes[0].plot(*zip(*valid["loss"], strict=True), color="#D55E00", marker="o", label="validation")
    axes[0].set(title="Training: loss by step", ylabel="log loss (nats per event)")
    for key, colour, marker in (("auc", "#0072B2", "o"), ("uauc", "#009E73", "s")):
        if valid[key]:
            name = {"auc": "AUC", "uauc": "AUC by user (uauc)"}[key]
            axes[1].plot(*zip(*valid[key], strict=True), color=colour, marker=marker, label=f"validation {name}")
    for one in axes:
        if best_step is not None:
            kept = one.axvline(best_step, color="black", linewidth=1, linestyle=":")
            if one is axes[0]:  # named once
                kept.set_label(f"weights kept (step {best_step})")
        one.legend(loc="best")
    figure.align_ylabels()
    axes[-1].set(xlabel="optimizer step", xlim=(0, None), **({"ylabel": "AUC"} if ranked else {}))
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def roc(label: npt.NDArray[Any], scores: Mapping[str, npt.ArrayLike], split: str) -> Figure | None:
    """Share of liked rows found against share of the others taken along, one curve per scorer; None with one class."""
    if len(np.unique(label)) < 2:
        return None
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots()
    for place, (name, score) in enumerate(scores.items()):
        false, true = _curve(label, np.asarray(score))
        colour, _, line = _look(name, place)
        shown = f"{auc(label, score):.3f}  {LABELS.get(name, name)}"
        axes.plot(false, true, line, color=colour, linewidth=2.8 if place == 0 else 1.6, label=shown, zorder=9 - place)
    axes.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle=(0, (1, 3)), label="0.500  chance")
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


def calibration(label: npt.NDArray[Any], scores: Mapping[str, npt.ArrayLike], split: str) -> Figure | None:
    """Share of likes against predicted probability and, below, how often the first scorer predicts each."""
    if not len(label) or not scores:
        return None
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    axes, counts = figure.subplots(2, sharex=True, height_ratios=[4, 1])
    axes.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle=(0, (1, 3)), label="true probabilities")
    edges = np.linspace(0, 1, ECE_BINS + 1)
    for place, (name, score) in enumerate(scores.items()):
        chance = _sigmoid(np.asarray(score, dtype=np.float64))
        bins = np.minimum((chance * ECE_BINS).astype(np.int64), ECE_BINS - 1)
        rows = np.bincount(bins, minlength=ECE_BINS)
        some = rows > rows.max() / 100  # the share of likes among a handful of rows says nothing
        mean, liked = (np.bincount(bins, value, ECE_BINS)[some] / rows[some] for value in (chance, label))
        colour, marker, line = _look(name, place)
        error = click_metrics(label, score, np.zeros(len(label)))["ece"]
        ours = place == 0
        axes.plot(mean, liked, line, color=colour, linewidth=1.6 if ours else 0.9, zorder=9 - place)
        # A dot is as large as its bin is full: a bin of five rows is noise.
        sizes = 12 + 140 * rows[some] / rows.max()
        shown = f"{error:.3f}  {LABELS.get(name, name)}"
        axes.scatter(
            mean, liked, sizes, color=colour, marker=marker, alpha=1 if ours else 0.75, zorder=9 - place, label=shown
        )
        if ours:
            counts.bar(edges[:-1], rows, width=1 / ECE_BINS, align="edge", color=colour, edgecolor="white")
            counts.set(ylabel="rows", xlabel="predicted probability of a like")
            counts.set_title(f"How often the {LABELS.get(name, name)} predicts it", fontsize=12, pad=6)
    axes.set(
        title=f"Calibration: are the predicted probabilities true? ({split} rows)",
        ylabel="share of rows that were liked",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    legend = axes.legend(loc="upper left", title="ECE (0 is best); a larger dot holds more rows", alignment="left")
    for handle in legend.legend_handles[1:]:
        handle.set_sizes([55])
    counts.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    return figure


def slices(
    intervals: Mapping[str, Mapping[str, Interval]], rows: Mapping[str, int], split: str, metric: str = "auc"
) -> Figure | None:
    """AUC of each scorer in each slice, with its interval; None where none is defined."""
    intervals = {name: own for name, own in intervals.items() if name not in FLAT}
    keys = {name: f"{split}/{metric}" + ("" if name == "all" else f"|{name}") for name in rows}
    found = [name for name, key in keys.items() if any(_defined(own.get(key)) for own in intervals.values())]
    if not found:
        return None
    figure = Figure(figsize=(9, 1.9 + 0.165 * len(found) * (len(intervals) + 1.5)), layout="constrained")
    axes = figure.subplots()
    band = 0.78
    step = band / max(1, len(intervals) - 1)
    for place, (scorer, own) in enumerate(intervals.items()):
        colour, marker, _ = _look(scorer, place)
        shown = [(at, own[keys[name]]) for at, name in enumerate(found) if _defined(own.get(keys[name]))]
        if not shown:
            continue
        at = np.array([where for where, _ in shown]) - band / 2 + step * place
        point, low, high = np.array([(one.point, one.low, one.high) for _, one in shown]).T
        axes.errorbar(
            point,
            at,
            xerr=np.nan_to_num([point - low, high - point]).clip(0),
            fmt=marker,
            color=colour,
            markersize=8 if place == 0 else 6,
            elinewidth=2.2 if place == 0 else 1.3,
            label=LABELS.get(scorer, scorer),
        )
    for line in range(len(found) - 1):
        axes.axhline(line + 0.5, color="#BBBBBB", linewidth=0.8)
    axes.axvline(0.5, color="black", linewidth=1, linestyle=(0, (1, 3)))
    axes.set(
        title=f"AUC by slice of the {split} rows, with 95% intervals (0.5 is chance)",
        xlabel="AUC",
        ylim=(len(found) - 0.5, -0.5),
    )
    axes.set_yticks(range(len(found)), [f"{name.replace('_', ' ')}\n{rows[name]:,} rows" for name in found])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=min(4, len(intervals)))
    return figure


def _curve(label: npt.NDArray[Any], score: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Corners of the ROC curve, thinned: shares of label 0 and of label 1 above each threshold."""
    order = np.argsort(-score, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)
    true = np.append(0, np.cumsum(label[order] == 1)[ends])
    false = np.append(0, np.cumsum(label[order] == 0)[ends])
    kept = np.unique(np.linspace(0, len(true) - 1, _CURVE_POINTS).round().astype(np.int64))
    return false[kept] / false[-1], true[kept] / true[-1]


def _look(name: str, place: int) -> tuple[str, str, str]:
    return _LOOKS.get(name) or (_LOOKS[ADAPTER] if place == 0 else _OTHERS[place % len(_OTHERS)])


def _defined(one: Interval | None) -> bool:
    return one is not None and bool(np.isfinite(one.point))


def _sigmoid(score: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    chance: npt.NDArray[np.float64] = np.exp(-np.logaddexp(0, -score))
    return chance


@contextmanager
def _style() -> Iterator[None]:
    """Our look, whatever the person's matplotlibrc says, and theirs again afterwards."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield
