"""What the run itself shows of limits and risks: the section of a model card that nobody likes to write.

Everything returned is Markdown already, a sentence or two each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from peftrec import report
from peftrec.bootstrap import Interval
from peftrec.card_facts import Facts, public_warnings
from peftrec.card_sections import FIRST_DATE, OWN, day
from peftrec.card_text import inline
from peftrec.looks import FLAT, shown
from peftrec.metrics import HEADLINE, LOWER_IS_BETTER
from peftrec.record import NO_PRIOR
from peftrec.report import HEADINGS, LEADING, Comparison


def limits(facts: Facts, comparison: Comparison) -> list[str]:
    """What the run itself shows of limits and risks, a sentence or two each."""
    return [*_unseen(facts, comparison), *verdicts(comparison), *_served(comparison), *_chosen(facts), *_asked(facts)]


def _unseen(facts: Facts, comparison: Comparison) -> Iterator[str]:
    data = facts.record.data
    trained = data.get("splits", {}).get("train", {})
    if (trained.get("last") or 0) >= FIRST_DATE:
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


def verdicts(comparison: Comparison) -> Iterator[str]:
    """Where the adapter is worse than a baseline, or cannot be told from it, metric by metric."""
    for metric in LEADING[comparison.task]:
        worse, unclear = [], []
        for name, own in comparison.differences.items():
            one = own.get(f"{comparison.split}/{metric}")
            if name in OWN or one is None or not math.isfinite(one.low):
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
    shares = ", ".join(f"{shown(other)} {one['head']:.0%}" for other, one in others if other not in (*OWN, *FLAT))
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
    if about.target.calibration:
        yield (
            "Published scores go through a rising curve that was fitted on the validation rows (`target.calibration` "
            "in `peftrec.json`). Without peftrec they do not; their order is the same."
        )
    if about.clicks_alone:
        yield (
            "The data has clicks alone: what was not clicked was drawn, some items beside each click. A chance is one "
            "among these, and no rate of clicks."
        )
    if about.side:
        yield (
            "Vectors stand beside the text (`side.safetensors`), of the items that are known there; any other item is "
            "read by its text alone. Without peftrec all are."
        )
    if about.probes:
        yield f"`peftrec.json` holds {len(about.probes)} questions whose histories are from the data, without user ids."
    yield from (f"{inline(line)}." for line in public_warnings(facts))
