"""Scorers side by side on the same rows: figures, intervals, paired differences, slices, and the tables that show them.

The first scorer is ours. A difference is ours minus the other, measured on the same resamples of users, so that it can
be certain where the two intervals overlap.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl

from peftrec import config, metrics, record
from peftrec.baselines import RANKING_ONLY
from peftrec.errors import DataError
from peftrec.figures import FLAT, LABELS
from peftrec.metrics import CLICK_METRICS, RANKING_METRICS, Bools, Interval
from peftrec.schema import read_yaml

if TYPE_CHECKING:
    from peftrec.split import Log

SLICES = {"cold_item": ("cold_item",), "cold_user": ("cold_user",), "popularity": ("popular", "mid", "tail")}
"""What `eval.slices` may name -> the slices of `metrics.slices` that it stands for."""

WIDTH = 120
_HEADINGS = {
    "auc": "AUC",
    "uauc": "uauc",
    "log_loss": "log loss",
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "ece": "ECE",
}
_SHORT = {record.NO_PRIOR: "no prior", record.BASE_MODEL: "base"}
_LEGEND = (
    "AUC: chance that a liked row scores above one that is not liked; 0.5 is guessing. uauc: the same within each "
    "user, then the mean over users. log loss, ECE: lower is better. -: not defined."
)

Table = list[tuple[str, ...]]  # the first row is the heading


@dataclass(frozen=True)
class Size:
    """How many rows, users and liked rows were scored."""

    rows: int
    users: int
    positives: int


@dataclass(frozen=True)
class Comparison:
    """Several scorers on the same rows.

    Attributes:
        split: of the rows; the name before the slash of a metric.
        knew: one sentence on what a row knew when it was scored.
        intervals: scorer -> metric (`test/auc`, `test/auc|cold_item`) -> interval; ours first.
        differences: other scorer -> metric -> interval of ours minus it.
        sizes: `all` and each slice -> its size.
        resamples: of the users, behind each interval.
        warnings: what could not be measured, one line each.
    """

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
            "metrics": measured.pop(self.ours),
            "baselines": measured,
            "intervals": {
                name: {key: [one.low, one.high] for key, one in own.items()} for name, own in self.intervals.items()
            },
            "differences": {
                name: {key: {"difference": one.point, "low": one.low, "high": one.high} for key, one in own.items()}
                for name, own in self.differences.items()
            },
            "slices": {name: asdict(size) for name, size in self.sizes.items()},
        }

    def table(self) -> str:
        """Plain text for a terminal of 120 columns."""
        parts = [self._headline(), _wrapped(self.knew), "", *_aligned(self._scorers()), "", _wrapped(_LEGEND)]
        if self.resamples:
            parts.append(_wrapped(self._brackets()))
        if self.differences:
            parts += ["", f"{_label(self.ours)} minus the other, on the same rows", "", *_aligned(self._differences())]
        if len(self.sizes) > 1:
            parts += ["", "AUC by slice", "", *_aligned(self._slices())]
        parts += [_wrapped(f"warning: {line}") for line in self.warnings]
        return "\n".join(parts)

    def markdown(self) -> str:
        """The same for a page."""
        parts = [f"{self._headline()} {self.knew}", *_pipes(self._scorers()), _LEGEND]
        if self.resamples:
            parts[-1] += f" {self._brackets()}"
        if self.differences:
            parts += [f"**{_label(self.ours)} minus the other**, on the same rows:", *_pipes(self._differences())]
        if len(self.sizes) > 1:
            parts += ["**AUC by slice**:", *_pipes(self._slices())]
        parts += [f"Warning: {line}." for line in self.warnings]
        return "\n\n".join(parts) + "\n"

    def _headline(self) -> str:
        size = self.sizes["all"]
        share = f", {size.positives / size.rows:.1%} liked" if size.rows else ""
        return f"{self.split}: {size.rows:,} rows of {size.users:,} users{share}."

    def _brackets(self) -> str:
        return f"[low, high]: 95% interval over {self.resamples:,} resamples of the users."

    def _scorers(self) -> Table:
        rows: Table = [("scorer", *(_HEADINGS[key] for key in CLICK_METRICS))]
        for name, own in self.intervals.items():
            cells = [_cell(own.get(f"{self.split}/{key}"), interval=key in RANKING_METRICS) for key in CLICK_METRICS]
            rows.append((_label(name), *cells))
        return rows

    def _differences(self) -> Table:
        rows: Table = [("other scorer", *(_HEADINGS[key] for key in RANKING_METRICS))]
        for name, own in self.differences.items():
            cells = [_cell(own.get(f"{self.split}/{key}"), interval=True, sign="+") for key in RANKING_METRICS]
            rows.append((_label(name), *cells))
        return rows

    def _slices(self) -> Table:
        names = [name for name in self.intervals if name not in FLAT]
        rows: Table = [("slice", "rows", "users", "liked", *(_SHORT.get(name, _label(name)) for name in names))]
        for part, size in self.sizes.items():
            key = _key(self.split, "auc", part)
            share = f"{size.positives / size.rows:.1%}" if size.rows else "-"
            cells = [_cell(self.intervals[name].get(key)) for name in names]
            rows.append((part, f"{size.rows:,}", f"{size.users:,}", share, *cells))
        return rows


def compare(
    log: Log,
    rows: npt.ArrayLike,
    scorers: Mapping[str, npt.ArrayLike],
    *,
    knew: str,
    ranking_only: Collection[str] = RANKING_ONLY,
    slices: Sequence[str] = (),
    bootstrap: int = 1000,
    seed: int = 13,
    split: str = "test",
) -> Comparison:
    """Measure scorers on the same rows of a log.

    Args:
        log: all events.
        rows: which of them are measured, indices (m,).
        scorers: name -> log-odds (m,); the first is ours.
        knew: one sentence on what a row knew, see `sight`.
        ranking_only: scorers whose scores order rows but are no log-odds.
        slices: names as in `eval.slices`.
        bootstrap: resamples of the users; 0 gives no intervals.
        seed: of the resamples.
        split: the name before the slash of a metric.

    Raises:
        DataError: there are no rows, or a score is NaN or infinite.
    """
    rows = np.asarray(rows, dtype=np.int64)
    members = {name: member[rows] for name, member in metrics.slices(log).items() if name in _expanded(slices)}
    return _compare(log.label[rows], log.user[rows], scorers, members, knew, ranking_only, bootstrap, seed, split)


def compare_predictions(table: pl.DataFrame, recipe: config.Recipe, split: str = "test") -> Comparison:
    """Measure the scorers of a predictions table on the rows of one split, as the recipe says.

    Raises:
        DataError: the table has no rows of that split, or a score is NaN or infinite.
    """
    rows = table.filter(pl.col("split") == split)
    wanted = _expanded(recipe.eval.slices)
    return _compare(
        rows["label"].to_numpy(),
        rows["user_id"].to_numpy(),
        record.scorers(rows, trained=recipe.adapter.method != "none"),
        {name: member for name, member in record.members(rows).items() if name in wanted},
        sight(recipe),
        RANKING_ONLY,
        recipe.eval.bootstrap,
        recipe.seed,
        split,
    )


def compare_run(run: str | Path) -> Comparison:
    """Measure a finished run again from its predictions.parquet and config.yaml; no model is loaded.

    Raises:
        DataError: the folder holds no predictions.
        ConfigError: the folder holds no recipe.
    """
    table = record.read_predictions(run)
    path = Path(run) / "config.yaml"
    return compare_predictions(table, config.parse_recipe(read_yaml(path), str(path)))


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


def _compare(
    label: npt.NDArray[Any],
    user: npt.NDArray[Any],
    scorers: Mapping[str, npt.ArrayLike],
    members: Mapping[str, Bools],
    knew: str,
    ranking_only: Collection[str],
    resamples: int,
    seed: int,
    split: str,
) -> Comparison:
    if not len(label):
        raise DataError(
            f"{split}: no rows were scored; expected some to compare; see data.split and eval.max_test_rows"
        )
    scores = {name: np.asarray(score, dtype=np.float64) for name, score in scorers.items()}
    intervals: dict[str, dict[str, Interval]] = {name: {} for name in scores}
    differences: dict[str, dict[str, Interval]] = {name: {} for name in list(scores)[1:]}
    sizes, warnings = {}, []
    for part, member in {"all": np.ones(len(label), dtype=bool), **members}.items():
        own = {name: score[member] for name, score in scores.items()}
        size = Size(int(member.sum()), len(np.unique(user[member])), int(label[member].sum(dtype=np.int64)))
        sizes[part] = size
        if not size.rows:
            continue
        if size.positives in (0, size.rows):
            where = split if part == "all" else f"{split}, slice {part}"
            warnings.append(f"{where}: all {size.rows} rows have label {label[member][0]}; AUC is not defined there")
        # One user alone gives the same resample every time, which would look like certainty.
        drawn = metrics.bootstrap(
            label[member], own, user[member], resamples if size.users > 1 else 0, seed, ranking_only
        )
        for found, kept in ((drawn.intervals, intervals), (drawn.differences, differences)):
            for name, figures in found.items():
                kept[name] |= {_key(split, metric, part): one for metric, one in figures.items()}
    return Comparison(split, knew, intervals, differences, sizes, resamples, tuple(warnings))


def _expanded(names: Sequence[str]) -> set[str]:
    return {part for name in names for part in SLICES[name]}


def _key(split: str, metric: str, part: str) -> str:
    return f"{split}/{metric}" if part == "all" else f"{split}/{metric}|{part}"


def _label(name: str) -> str:
    return LABELS.get(name, name)


def _cell(one: Interval | None, *, interval: bool = False, sign: str = "") -> str:
    """`0.765 [0.751, 0.779]`, `0.765`, or `-` where nothing is defined."""
    if one is None or not math.isfinite(one.point):
        return "-"
    shown = f"{one.point:{sign}.3f}"
    if interval and math.isfinite(one.low):
        shown += f" [{one.low:{sign}.3f}, {one.high:{sign}.3f}]"
    return shown


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH)


def _aligned(rows: Table) -> list[str]:
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


def _pipes(rows: Table) -> list[str]:
    """One Markdown table as one paragraph."""
    heading, *body = (f"| {' | '.join(row)} |" for row in rows)
    return ["\n".join([heading, "|---|" + "---:|" * (len(rows[0]) - 1), *body])]
