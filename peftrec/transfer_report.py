"""What a transfer came to: ways of knowing a target, side by side for each number of samples, as tables and a page."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from peftrec.bootstrap import Interval, over_seeds
from peftrec.few_shot import BEST, coverage
from peftrec.looks import style
from peftrec.ranking import Ints

WAYS = {
    "zero_shot": "zero-shot: the base model",
    "transfer": "transfer: the source's adapter",
    "coral": "transfer, aligned by CORAL",
    "mmd": "transfer, aligned by MMD",
    "adversarial": "transfer, aligned by an adversary",
    "cpc": "transfer + the target's next items (CPC)",
    "target_only": "target only",
    "adapted": "transfer + adaptation",
    "stacked": "a new adapter on the source's, frozen",
    "pretrained": "the target's texts, then target only",
    "global_mean": "global mean",
    "item_mean": "item mean",
    "bias": "user+item bias",
    "mf": "matrix factorisation",
}
"""Way -> what people read for it, in the order of the tables."""
COUNTED = ("global_mean", "item_mean", "bias", "mf")
COMPARED = (
    *(("transfer", "zero_shot"), ("adapted", "target_only"), ("adapted", "transfer"), ("adapted", "bias")),
    *((kind, "transfer") for kind in ("coral", "mmd", "adversarial", "cpc")),
    *(("transfer", "target_only"), ("stacked", "target_only"), ("stacked", "adapted"), ("pretrained", "target_only")),
)
"""Ways whose difference is shown, ours first; of transfer and zero-shot what they are without any sample."""
ALL = -1
"""In place of K: all training events of the target."""
SHOWN = ("accuracy", "precision", "recall", "f1")
_LEGEND = (
    "Figures are means over the seeds; [low, high]: 95% interval over {resamples:,} resamples of the people; sd: "
    "standard deviation of the seeds' AUC. A test row knows the K training events and its own person's earlier "
    "events of the target, and what counts knows the same. coverage: share of the tested items that are among "
    "somebody's {best} best; uauc: AUC within each person, then the mean; -: not defined."
)

Found = Mapping[tuple[str, int], Sequence[Sequence[float]]]
"""Way and K -> log-odds of the test rows, for each seed; K is 0 where nothing was learned from the target."""
Table = list[list[str]]


@dataclass(frozen=True)
class Report:
    """Figures, differences and the picture.

    Attributes:
        facts: sentences on the domains.
        figures: a row for each way and K.
        differences: a row for each pair of ways and K.
        legend: what the columns mean.
        picture: AUC over K.
        intervals: way and K -> metric -> interval.
        gaps: pair of these -> metric -> interval.
    """

    facts: str
    figures: Table
    differences: Table
    legend: str
    picture: Figure
    intervals: dict[tuple[str, int], dict[str, Interval]]
    gaps: dict[tuple[tuple[str, int], tuple[str, int]], dict[str, Interval]]

    def markdown(self) -> str:
        """Facts and tables."""
        parts = [self.facts, _markdown(self.figures), self.legend, _markdown(self.differences)]
        return "\n\n".join(part for part in parts if part) + "\n"

    def page(self, name: str) -> str:
        """All of it as one HTML file that needs no other."""
        drawn = io.BytesIO()
        self.picture.savefig(drawn, format="png", dpi=120)
        image = base64.b64encode(drawn.getvalue()).decode()
        look = "body{font:16px sans-serif;max-width:75em;margin:2em auto}td,th{padding:.2em .7em;text-align:left}"
        return (
            f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{html.escape(name)}</title>\n"
            f"<style>{look}</style>\n<h1>{html.escape(name)}</h1>\n<p>{html.escape(self.facts)}</p>\n"
            f"{_html(self.figures)}\n<p>{html.escape(self.legend)}</p>\n{_html(self.differences)}\n"
            f"<p><img alt='AUC by K' src='data:image/png;base64,{image}'></p></html>\n"
        )


def report(
    found: Found, label: Ints, user: Ints, item: Ints, facts: str, *, resamples: int = 1000, seed: int = 13
) -> Report:
    """Measure and set out what each way scores.

    Args:
        found: the scores.
        label: 0 or 1 of each test row, (m,).
        user: whose row it is, (m,).
        item: of each test row, (m,).
        facts: sentences on the domains.
        resamples: of the people.
        seed: of the resamples.
    """
    names = {f"{way} {k}": (way, k) for way, k in sorted(found, key=_place)}
    possible = [
        (k, f"{ours} {one}", f"{theirs} {other}")
        for k in sorted({k for _, k in found if k >= 0})
        for ours, theirs in COMPARED
        for one, other in ((k, k), (k, 0), (0, k))
        if k or one == other
    ]
    pairs = [(k, a, b) for k, a, b in dict.fromkeys(possible) if {a, b} <= names.keys()]
    scores = {name: found[key] for name, key in names.items()}
    intervals, gaps = over_seeds(label, scores, user, [(a, b) for _, a, b in pairs], resamples, seed)
    figures = [["K", "way", "seeds", "AUC", "uauc", *SHOWN, "coverage"]]
    for name, (way, k) in names.items():
        own, several = intervals[name], found[way, k]
        each = [over_seeds(label, {name: [one]}, user, [], 0)[0][name]["auc"].point for one in several]
        covered = np.mean([coverage(item, user, np.asarray(one)) for one in several])
        spread = f" (sd {np.std(each):.3f})" if len(each) > 1 else ""
        plain = [*(_plain(own[key].point) for key in SHOWN), f"{covered:.3f}"]
        told = "all" if k == ALL else str(k)
        figures.append([told, WAYS[way], f"{len(each)}{spread}", _cell(own["auc"]), _cell(own["uauc"]), *plain])
    differences = [["K", "difference", "AUC", "uauc"]]
    for k, ours, theirs in pairs:
        words = f"{WAYS[names[ours][0]]} minus {WAYS[names[theirs][0]]}"
        gap = gaps[ours, theirs]
        differences.append([str(k), words, _cell(gap["auc"], "+"), _cell(gap["uauc"], "+")])
    return Report(
        facts,
        figures,
        differences,
        _LEGEND.format(resamples=resamples, best=BEST),
        picture({key: intervals[name]["auc"] for name, key in names.items()}),
        {key: intervals[name] for name, key in names.items()},
        {(names[ours], names[theirs]): gap for (ours, theirs), gap in gaps.items()},
    )


def _place(key: tuple[str, int]) -> tuple[float, int]:
    way, k = key
    return (float("inf") if k == ALL else k), list(WAYS).index(way)


def _plain(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _cell(one: Interval, sign: str = "") -> str:
    return f"{one.point:{sign}.3f} [{one.low:{sign}.3f}, {one.high:{sign}.3f}]"


def _markdown(table: Table) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]]) if len(table) > 1 else ""


def _html(table: Table) -> str:
    tags = ["th"] + ["td"] * (len(table) - 1)
    rows = (
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in zip(tags, table, strict=True)
    )
    return "<table>" + "\n".join(rows) + "</table>"


def picture(auc: Mapping[tuple[str, int], Interval]) -> Figure:
    """AUC for each K, a point with its interval for each way, and a line where a way has several K."""
    steps = sorted({k for _, k in auc}, key=lambda k: _place(("zero_shot", k)))
    ways = [way for way in WAYS if any(found == way for found, _ in auc) and way != "global_mean"]
    with style():
        figure = Figure(figsize=(9, 5), layout="constrained")
        axes = figure.subplots()
        for place, way in enumerate(ways):
            known = [k for k in steps if (way, k) in auc]
            points = [auc[way, k] for k in known]
            x = [steps.index(k) + 0.6 * ((place + 0.5) / len(ways) - 0.5) for k in known]
            y = [one.point for one in points]
            beyond = [[one.point - one.low for one in points], [one.high - one.point for one in points]]
            marker, line = ("s", ":") if way in COUNTED else ("o", "-")
            joined = line if len([k for k in known if k > 0]) > 1 else "none"
            axes.errorbar(
                x, y, yerr=beyond, fmt=marker, linestyle=joined, capsize=3, color=f"C{place}", label=WAYS[way]
            )
        axes.axhline(0.5, color="black", linewidth=1, linestyle=(0, (1, 3)))
        axes.set_xticks(range(len(steps)), ["all" if k == ALL else str(k) for k in steps])
        axes.set_xlabel("K, training events of the target")
        axes.set_ylabel("test AUC, 95 % interval")
        axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
