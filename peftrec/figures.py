"""The PNGs of a run: how the loss fell, how scores meet the answers, and where it is hard.

Each figure is made from plain arrays and reads well 900 pixels wide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from peftrec import score_figures
from peftrec.bootstrap import Interval
from peftrec.errors import PeftrecError
from peftrec.looks import FLAT, look, shown, style
from peftrec.metrics import HEADLINE, LOWER_IS_BETTER
from peftrec.record import atomic
from peftrec.sources import Task

Loss = Literal["cross_entropy", "squared_error"]

# What is drawn of the validation passes: metric -> its name.
_VALID: dict[Task, dict[str, str]] = {
    "click": {"auc": "AUC", "uauc": "AUC by user (uauc)"},
    "rating": {"rmse": "RMSE"},
}
_UNITS: dict[Task, str] = {"click": "AUC", "rating": "RMSE (rating points)"}
_LOSSES: dict[Loss, str] = {
    "cross_entropy": "log loss (nats per event)",
    "squared_error": "squared error (rating points²)",
}
_DPI = 150


def draw(
    folder: str | Path,
    *,
    task: Task,
    train_log: Sequence[Mapping[str, float]],
    best_step: int | None,
    truth: npt.ArrayLike,
    scores: Mapping[str, npt.ArrayLike],
    intervals: Mapping[str, Mapping[str, Interval]],
    rows: Mapping[str, int],
    scale: Sequence[float] = (0.0, 1.0),
    loss: Loss = "cross_entropy",
    split: str = "test",
    ranking_only: Sequence[str] = (),
) -> list[Path]:
    """Write loss.png, slices.png and calibration.png, for clicks roc.png, for ratings ratings.png and errors.png.

    Those that have nothing to show are left out.

    Args:
        folder: created if need be.
        task: what is predicted.
        train_log: Trainer's log history.
        best_step: whose weights were kept.
        truth: label or rating of each row (n,).
        scores: scorer -> log-odds or predicted ratings (n,); the first is ours.
        intervals: scorer -> metric (`test/auc|cold_item`) -> interval.
        rows: slice -> number of rows, `all` first.
        scale: the ratings that can be given, ascending.
        loss: what training lowered.
        split: the name before the slash of a metric.
        ranking_only: scorers whose scores only order rows.

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
    truth = np.asarray(truth)
    meant = {name: score for name, score in scores.items() if name not in ranking_only}
    figures: dict[str, Callable[[], Figure | None]] = {"loss": lambda: losses(train_log, best_step, task, loss)}
    if task == "click":
        figures["roc"] = lambda: score_figures.roc(truth, scores, split)
    else:
        figures["ratings"] = lambda: score_figures.agreement(truth, meant, split, scale)
        figures["errors"] = lambda: score_figures.errors(truth, meant, split)
    figures["calibration"] = lambda: score_figures.calibration(truth, meant, split, task, scale)
    figures["slices"] = lambda: slices(intervals, rows, split, HEADLINE[task])
    written = []
    with style():
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


def losses(
    train_log: Sequence[Mapping[str, float]],
    best_step: int | None,
    task: Task = "click",
    loss: Loss = "cross_entropy",
) -> Figure | None:
    """Training and validation loss by step and, below, validation metrics; None if nothing was logged."""
    # Validation has no loss that aligns domains; the two lines shall mean the same.
    trained = [(line["step"], line["loss"] - line.get("align_loss", 0.0)) for line in train_log if "loss" in line]
    valid = {
        key: [(line["step"], line[f"eval_{key}"]) for line in train_log if np.isfinite(line.get(f"eval_{key}", np.nan))]
        for key in ("loss", *_VALID[task])
    }
    below = {key: name for key, name in _VALID[task].items() if valid[key]}
    if not trained and not valid["loss"]:
        return None
    figure = Figure(figsize=(9, 6.2 if below else 4.6), layout="constrained")
    grid = figure.subplots(2 if below else 1, sharex=True, squeeze=False, height_ratios=[3, 2] if below else [1])
    axes = [grid[row, 0] for row in range(len(grid))]
    if trained:
        axes[0].plot(*zip(*trained, strict=True), color="#56B4E9", linewidth=1.3, label="training")
    if valid["loss"]:
        axes[0].plot(*zip(*valid["loss"], strict=True), color="#D55E00", marker="o", label="validation")
    axes[0].set(title="Training: loss by step", ylabel=_LOSSES[loss])
    for (key, name), (colour, marker) in zip(below.items(), (("#0072B2", "o"), ("#009E73", "s")), strict=False):
        axes[1].plot(*zip(*valid[key], strict=True), color=colour, marker=marker, label=f"validation {name}")
    for one in axes:
        if best_step is not None:
            kept = one.axvline(best_step, color="black", linewidth=1, linestyle=":")
            if one is axes[0]:  # named once
                kept.set_label(f"weights kept (step {best_step})")
        one.legend(loc="best")
    figure.align_ylabels()
    axes[-1].set(xlabel="optimizer step", xlim=(0, None), **({"ylabel": _UNITS[task]} if below else {}))
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def slices(
    intervals: Mapping[str, Mapping[str, Interval]], rows: Mapping[str, int], split: str, metric: str = "auc"
) -> Figure | None:
    """One metric of each scorer in each slice, with its interval; None where none is defined."""
    keys = {name: f"{split}/{metric}" + ("" if name == "all" else f"|{name}") for name in rows}
    intervals = {
        name: own
        for name, own in intervals.items()
        if name not in FLAT and any(_defined(own.get(key)) for key in keys.values())
    }
    found = [name for name, key in keys.items() if any(_defined(own.get(key)) for own in intervals.values())]
    if not found:
        return None
    figure = Figure(figsize=(9, 1.9 + 0.165 * len(found) * (len(intervals) + 1.5)), layout="constrained")
    axes = figure.subplots()
    band = 0.78
    step = band / max(1, len(intervals) - 1)
    for place, (scorer, own) in enumerate(intervals.items()):
        colour, marker, _ = look(scorer, place)
        points = [(at, own[keys[name]]) for at, name in enumerate(found) if _defined(own.get(keys[name]))]
        at = np.array([where for where, _ in points]) - band / 2 + step * place
        point, low, high = np.array([(one.point, one.low, one.high) for _, one in points]).T
        axes.errorbar(
            point,
            at,
            xerr=np.nan_to_num([point - low, high - point]).clip(0),
            fmt=marker,
            color=colour,
            markersize=8 if place == 0 else 6,
            elinewidth=2.2 if place == 0 else 1.3,
            label=shown(scorer),
        )
    for line in range(len(found) - 1):
        axes.axhline(line + 0.5, color="#BBBBBB", linewidth=0.8)
    title = metric.upper()
    hint = "lower is better"
    if metric not in LOWER_IS_BETTER:
        hint = "0.5 is chance"
        axes.axvline(0.5, color="black", linewidth=1, linestyle=(0, (1, 3)))
    axes.set(
        title=f"{title} by slice of the {split} rows, with 95% intervals ({hint})",
        xlabel=title,
        ylim=(len(found) - 0.5, -0.5),
    )
    axes.set_yticks(range(len(found)), [f"{name.replace('_', ' ')}\n{rows[name]:,} rows" for name in found])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=min(4, len(intervals)))
    return figure


def _defined(one: Interval | None) -> bool:
    return one is not None and bool(np.isfinite(one.point))
