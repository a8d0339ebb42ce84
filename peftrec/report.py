"""Scorers side by side on the same rows: figures, intervals, paired differences, slices, and the tables that show them.

The first scorer is ours. A difference is ours minus the other, measured on the same resamples of users, so that it can
be certain where the two intervals overlap.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from peftrec import config, record
from peftrec.baselines import RANKING_ONLY
from peftrec.bootstrap import Interval, bootstrap
from peftrec.errors import DataError
from peftrec.looks import FLAT, shown
from peftrec.metrics import HEADLINE, LOWER_IS_BETTER, METRICS
from peftrec.ranking import Bools
from peftrec.schema import read_yaml
from peftrec.sources import Task
from peftrec.split import Log
from peftrec.user_groups import LEAST_USERS, is_group, user_groups

SLICES = {"cold_item": ("cold_item",), "cold_user": ("cold_user",), "popularity": ("popular", "mid", "tail")}
"""What `eval.slices` may name -> the slices of `metrics.slices` that it stands for."""

WIDTH = 120
HEADINGS = {
    "auc": "AUC",
    "uauc": "uauc",
    "log_loss": "log loss",
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "ece": "ECE",
    "rmse": "RMSE",
    "mae": "MAE",
    "exact": "exact",
    "ndcg@10": "NDCG@10",
}
"""What people read for a metric."""
LEADING: dict[Task, tuple[str, ...]] = {"click": ("auc", "uauc"), "rating": ("rmse", "mae", "uauc")}
"""Shown with intervals, and as differences."""
_SHORT = {
    record.NO_PRIOR: "no prior",
    record.BASE_MODEL: "base",
    "bias": "bias",
    "mf": "MF",
    "item_knn": "k-NN",
    "gbdt": "trees",
}
_LEGEND: dict[Task, str] = {
    "click": (
        "AUC: chance that a liked row scores above one that is not liked; 0.5 is guessing. uauc: the same within each "
        "user, then the mean over users. log loss, ECE: lower is better. -: not defined."
    ),
    "rating": (
        "RMSE, MAE: how far predictions are off, in rating points; lower is better. exact: share of rows that were "
        "given the most probable rating, or the one nearest to the score where a scorer names none. uauc: share of a "
        "user's pairs of differently rated rows that are in order, then the mean over users; 0.5 is guessing. NDCG@10: "
        "a user's ten best-scored rows against the best ten, then the mean over users; 1 is best. ECE: gap between "
        "mean predicted and mean given rating in 15 bins of the prediction; lower is better. -: not defined."
    ),
}

Table = list[tuple[str, ...]]  # the first row is the heading


@dataclass(frozen=True)
class Size:
    """How many rows of how many users were scored, and the sum of their labels (liked rows) or ratings."""

    rows: int
    users: int
    total: float


@dataclass(frozen=True)
class Comparison:
    """Several scorers on the same rows.

    Attributes:
        task: what is predicted.
        split: of the rows; the name before the slash of a metric.
        knew: one sentence on what a row knew when it was scored.
        intervals: scorer -> metric (`test/auc`, `test/auc|cold_item`) -> interval; ours first.
        differences: other scorer -> metric -> interval of ours minus it.
        sizes: `all` and each slice -> its size.
        resamples: of the users, behind each interval.
        warnings: what could not be measured, one line each.
    """

    task: Task
    split: str
    knew: str
    intervals: dict[str, dict[str, Interval]]
    differences: dict[str, dict[str, Interval]]
    sizes: dict[str, Size]
    resamples: int
    warnings: tuple[str, ...] = ()

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Scorer -> metric -> figure, ours first."""
        return {name: {key: one.point for key, one in own.items()} for name, own in self.intervals.items()}

    @property
    def ours(self) -> str:
        """Name of the first scorer."""
        return next(iter(self.intervals))

    def facts(self) -> dict[str, Any]:
        """The fields of a `RunRecord` that come from here, without `warnings`."""
        measured = self.metrics
        return {
            "task": self.task,
            "metrics": measured.pop(self.ours),
            "baselines": measured,
            "intervals": {
                name: {key: [one.low, one.high] for key, one in own.items()} for name, own in self.intervals.items()
            },
            "differences": {
                name: {key: {"difference": one.point, "low": one.low, "high": one.high} for key, one in own.items()}
                for name, own in self.differences.items()
            },
            "slices": {
                name: {"rows": size.rows, "users": size.users, **self._answered(size)}
                for name, size in self.sizes.items()
            },
        }

    def table(self) -> str:
        """Plain text for a terminal of 120 columns."""
        parts = [self._headline(), wrapped(self.knew), "", *aligned(self._scorers()), ""]
        parts += [wrapped(_LEGEND[self.task]), *([wrapped(self._brackets())] if self.resamples else [])]
        if self.differences:
            parts += ["", f"{shown(self.ours)} minus the other, {self._hint()}", "", *aligned(self._differences())]
        if len(self.sizes) > 1:
            parts += ["", self._by_slice(), "", *aligned(self._slices())]
        parts += [wrapped(f"warning: {line}") for line in self.warnings]
        return "\n".join(parts)

    def markdown(self, *, short: bool = False) -> str:
        """The same for a page; `short` leaves out differences, slices and warnings."""
        parts = [f"{self._headline()} {self.knew}", pipes(self._scorers()), _LEGEND[self.task]]
        if self.resamples:
            parts[-1] += f" {self._brackets()}"
        if short:
            return "\n\n".join(parts) + "\n"
        if self.differences:
            parts += [f"**{shown(self.ours)} minus the other**, {self._hint()}:", pipes(self._differences())]
        if len(self.sizes) > 1:
            parts += [f"**{self._by_slice()}**:", pipes(self._slices())]
        parts += [f"Warning: {line}." for line in self.warnings]
        return "\n\n".join(parts) + "\n"

    def _answered(self, size: Size) -> dict[str, float | None]:
        """What run.json says of the answers of some rows."""
        if self.task == "click":
            return {"positives": round(size.total)}
        return {"mean_rating": size.total / size.rows if size.rows else None}

    def _mean(self, size: Size) -> str:
        if not size.rows:
            return "-"
        return f"{size.total / size.rows:.1%}" if self.task == "click" else f"{size.total / size.rows:.2f}"

    def _headline(self) -> str:
        size = self.sizes["all"]
        answered = f"{self._mean(size)} liked" if self.task == "click" else f"mean rating {self._mean(size)}"
        return f"{self.split}: {size.rows:,} rows of {size.users:,} users, {answered}."

    def _brackets(self) -> str:
        return f"[low, high]: 95% interval over {self.resamples:,} resamples of the users."

    def _hint(self) -> str:
        lower = ", ".join(HEADINGS[key] for key in LEADING[self.task] if key in LOWER_IS_BETTER)
        return "on the same rows" + (f" ({lower}: negative where the {shown(self.ours)} is better)" if lower else "")

    def _by_slice(self) -> str:
        metric = HEADLINE[self.task]
        return f"{HEADINGS[metric]} by slice" + (" (lower is better)" if metric in LOWER_IS_BETTER else "")

    def _scorers(self) -> Table:
        keys, leading = METRICS[self.task], LEADING[self.task]
        rows: Table = [("scorer", *(HEADINGS[key] for key in keys))]
        for name, own in self.intervals.items():
            rows.append((shown(name), *(cell(own.get(f"{self.split}/{key}"), interval=key in leading) for key in keys)))
        return rows

    def _differences(self) -> Table:
        keys = LEADING[self.task]
        rows: Table = [("other scorer", *(HEADINGS[key] for key in keys))]
        for name, own in self.differences.items():
            cells = [cell(own.get(f"{self.split}/{key}"), interval=True, sign="+") for key in keys]
            rows.append((shown(name), *cells))
        return rows

    def _slices(self) -> Table:
        metric = HEADLINE[self.task]
        names = [name for name, own in self.intervals.items() if name not in FLAT and f"{self.split}/{metric}" in own]
        answered = {"click": "liked", "rating": "mean"}[self.task]
        rows: Table = [("slice", "rows", "users", answered, *(_SHORT.get(name, shown(name)) for name in names))]
        for part, size in self.sizes.items():
            key = _key(self.split, metric, part)
            cells = [cell(self.intervals[name].get(key)) for name in names]
            rows.append((part, f"{size.rows:,}", f"{size.users:,}", self._mean(size), *cells))
        return rows


def compare_predictions(
    table: pl.DataFrame, recipe: config.Recipe, split: str = "test", *, scale: Sequence[float] = (0.0, 1.0)
) -> Comparison:
    """Measure the scorers of a predictions table on the rows of one split, as the recipe says.

    Args:
        table: see `record.predictions`.
        recipe: its task, slices, resamples and seed count.
        split: the name before the slash of a metric.
        scale: the ratings that can be given, ascending; clicks need none.

    Raises:
        DataError: the table has no rows of that split or no answers for the task, or a score is NaN or infinite.
    """
    task: Task = recipe.task
    rows = table.filter(pl.col("split") == split)
    if not len(rows):
        raise DataError(
            f"{split}: no rows were scored; expected some to compare; see data.split and eval.max_test_rows"
        )
    if record.TRUTH[task] not in rows.columns:
        raise DataError(
            f"predictions: no column {record.TRUTH[task]} (found {', '.join(rows.columns)}); expected it under "
            f"task: {task}; keep predictions and recipe of one run together"
        )
    trained = recipe.adapter.method != "none"
    truth = rows[record.TRUTH[task]].to_numpy().astype(np.float64)
    user = rows["user_id"].to_numpy()
    scores, answers = record.scorers(rows, trained=trained), record.answers(rows, trained=trained)
    wanted = {part for name in recipe.eval.slices for part in SLICES[name]}
    members = {name: member for name, member in record.members(rows).items() if name in wanted}
    groups, warnings = _groups(rows, recipe, split)
    intervals: dict[str, dict[str, Interval]] = {name: {} for name in scores}
    differences: dict[str, dict[str, Interval]] = {name: {} for name in list(scores)[1:]}
    sizes = {}
    for part, member in {"all": np.ones(len(rows), dtype=bool), **members, **groups}.items():
        size = Size(int(member.sum()), len(np.unique(user[member])), float(truth[member].sum()))
        sizes[part] = size
        if not size.rows:
            continue
        drawn = bootstrap(
            truth[member],
            {name: score[member] for name, score in scores.items()},
            user[member],
            # One user alone gives the same resample every time, which would look like certainty.
            recipe.eval.bootstrap if size.users > 1 else 0,
            recipe.seed,
            RANKING_ONLY,
            task=task,
            scale=scale,
            answers={name: answer[member] for name, answer in answers.items()},
        )
        if undefined := _undefined(task, truth[member], next(iter(drawn.intervals.values()))):
            warnings.append(f"{split}{'' if part == 'all' else f', slice {part}'}: {undefined}")
        for found, kept in ((drawn.intervals, intervals), (drawn.differences, differences)):
            for name, figures in found.items():
                kept[name] |= {_key(split, metric, part): one for metric, one in figures.items()}
    resamples = recipe.eval.bootstrap
    return Comparison(task, split, sight(recipe), intervals, differences, sizes, resamples, tuple(warnings))


def compare_scores(
    log: Log, rows: npt.NDArray[np.int64], scores: Mapping[str, npt.NDArray[np.float64]], recipe: config.Recipe
) -> Comparison:
    """Measure scorers of clicks without a language model on `rows` of the test split, as `compare_predictions` does.

    Args:
        log: all events.
        rows: indices into the log.
        scores: scorer -> (n,) of the whole log; the first is compared with the others.
        recipe: its slices, resamples and seed count.
    """
    ours, *others = scores
    table = record.predictions(
        log,
        rows,
        task="click",
        score=scores[ours][rows],
        baselines={name: scores[name][rows] for name in others},
        groups=None if log.users is None else user_groups(log.users, recipe.eval.user_groups),
    )
    found = compare_predictions(table, recipe)
    return replace(
        found, intervals={ours if name == found.ours else name: one for name, one in found.intervals.items()}
    )


def _groups(rows: pl.DataFrame, recipe: config.Recipe, split: str) -> tuple[dict[str, Bools], list[str]]:
    """Groups of users with enough of these among the rows, and a line on the others."""
    columns = recipe.eval.user_groups
    found = {name: member for name, member in record.members(rows).items() if is_group(name, columns)}
    small = [name for name, member in found.items() if rows.filter(member)["user_id"].n_unique() < LEAST_USERS]
    few = f"{split}: fewer than {LEAST_USERS} users in {', '.join(small)}; not reported apart"
    return {name: member for name, member in found.items() if name not in small}, [few] if small else []


def compare_run(run: str | Path, split: str = "test", bootstrap: int | None = None) -> Comparison:
    """Measure a finished run again from what it left behind; no model is loaded.

    Args:
        run: its output_dir.
        split: rows to measure.
        bootstrap: resamples of the users; those of the recipe if left out.

    Raises:
        DataError: the folder holds no predictions, or (ratings) no run.json.
        ConfigError: the folder holds no recipe.
    """
    table = record.read_predictions(run)
    path = Path(run) / "config.yaml"
    recipe = config.parse_recipe(read_yaml(path), str(path))
    if bootstrap is not None:
        recipe = replace(recipe, eval=replace(recipe.eval, bootstrap=bootstrap))
    scale = record.read_record(run).data["scale"] if recipe.task == "rating" else (0.0, 1.0)
    return compare_predictions(table, recipe, split, scale=scale)


def compare_record(found: record.RunRecord, recipe: config.Recipe) -> Comparison:
    """The comparison that a run's record holds, as `compare_predictions` measured it on the test rows.

    Args:
        found: the run's record.
        recipe: the run's recipe.
    """
    ours = next(iter(found.intervals))
    intervals = {
        name: {key: Interval(*map(_number, (point, *found.intervals[name][key]))) for key, point in own.items()}
        for name, own in {ours: found.metrics, **found.baselines}.items()
    }
    differences = {
        name: {
            key: Interval(_number(one["difference"]), _number(one["low"]), _number(one["high"]))
            for key, one in own.items()
        }
        for name, own in found.differences.items()
    }
    sizes = {}
    for name, size in found.slices.items():
        rows = int(size["rows"] or 0)
        total = size["positives"] if found.task == "click" else (size["mean_rating"] or 0.0) * rows
        sizes[name] = Size(rows, int(size["users"] or 0), float(total or 0))
    own_warnings = found.warnings[len(found.data.get("warnings", ())) :]
    return Comparison(
        found.task, "test", sight(recipe), intervals, differences, sizes, recipe.eval.bootstrap, tuple(own_warnings)
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def sight(recipe: config.Recipe) -> str:
    """What a validation or test row knows, in one sentence."""
    how = recipe.eval
    history = {
        "streaming": "A row knows every event earlier in time, of all splits (streaming history)",
        "frozen": "A row knows the training events only (frozen history)",
    }[how.history]
    ties = {
        "isolate": "events of one timestamp do not see each other's answers",
        "order": "events of one timestamp see the answers above them",
    }[how.ties]
    if recipe.prompt.history == "liked":
        return f"{history}; {ties}; the model is shown what was liked, the baselines also count what was not."
    return f"{history}; {ties}; the baselines know the same."


def _undefined(task: Task, truth: npt.NDArray[Any], figures: Mapping[str, Interval]) -> str:
    """What these rows cannot tell, if there is something."""
    if task == "click" and len(set(truth.tolist())) == 1:
        return f"all {len(truth)} rows have label {truth[0]:g}; AUC is not defined there"
    if task == "rating" and math.isnan(figures["uauc"].point):
        return f"nobody rated two of the {len(truth)} rows differently; uauc and NDCG@10 are not defined there"
    return ""


def _key(split: str, metric: str, part: str) -> str:
    return f"{split}/{metric}" if part == "all" else f"{split}/{metric}|{part}"


def cell(one: Interval | None, *, interval: bool = False, sign: str = "") -> str:
    """`0.765 [0.751, 0.779]`, `0.765`, or `-` where nothing is defined."""
    if one is None or not math.isfinite(one.point):
        return "-"
    shown = f"{one.point:{sign}.3f}"
    if interval and math.isfinite(one.low):
        shown += f" [{one.low:{sign}.3f}, {one.high:{sign}.3f}]"
    return shown


def wrapped(text: str) -> str:
    """Lines that a terminal shows whole."""
    return textwrap.fill(text, WIDTH)


def aligned(rows: Table) -> list[str]:
    """Columns of equal width, the first to the left, the others to the right, and a rule under the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def pipes(rows: Table) -> str:
    """A Markdown table whose first row is the heading and whose first column stands to the left."""
    heading, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([heading, "|---|" + "---:|" * (len(rows[0]) - 1), *body])
