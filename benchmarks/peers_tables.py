"""What peers.py measured, as tables and a picture."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from breakdown import PARTS

from peftrec.record import hardware

TIMELINE, POINTWISE = "peftrec, timeline", "peftrec, one prompt an event"
PLAIN = "peftrec, timeline, plain kernels"
TYPES = ("bfloat16", "float32")
FIRST_LOOK = 256  # tokens: the slower type may take a minute for 1,024
CEILING_ROWS = (
    ("training short", "training, rows of 512 tokens", 4),
    ("training timeline", "training, rows of 1,024 tokens", 4),
    ("forward short", "forward, rows of 512 tokens", 2),
    ("forward timeline", "forward, rows of 1,024 tokens", 2),
)
OURS = "peftrec"
KEEP_ONE = "forward, logits_to_keep=1"
MANY_CANDIDATES = (10, 30, 100, 300)
LONG_HISTORIES = (10, 50, 200)
USERS = (1, 8, 64)  # who ask at the same moment

Rounds = Mapping[str, Sequence[Mapping[str, Any]]]


def middle(values: Sequence[float], digits: str = ".2f") -> str:
    """Median, and the smallest and largest."""
    return f"{statistics.median(values):{digits}} ({min(values):{digits}} to {max(values):{digits}})"


def ratios(rounds: Rounds, name: str, base: str, cost: Callable[[Mapping[str, Any]], float]) -> list[float]:
    """How many times what `base` costs `name` costs, in each round."""
    return [cost(a) / cost(b) for a, b in zip(rounds[name], rounds[base], strict=True)]


def slope(times: Mapping[int, Sequence[float]]) -> float:
    """Of the line through median times over sizes, both as logarithms: 1 is growth in proportion."""
    sizes = list(times)
    return float(np.polyfit(np.log(sizes), np.log([statistics.median(times[size]) for size in sizes]), 1)[0])


def line(times: Mapping[int, Sequence[float]]) -> str:
    """The line through median times over sizes: milliseconds that are fixed, and for each more."""
    sizes = list(times)
    more, fixed = np.polyfit(sizes, [1000 * statistics.median(times[size]) for size in sizes], 1)
    return f"{fixed:.0f} + {more:.1f}"


def per_event(once: Mapping[str, Any]) -> float:
    """Seconds that one event takes to learn."""
    return float(once["seconds"]) / float(once["events"])


def machine(facts: Mapping[str, Any]) -> str:
    """Where it ran."""
    here = hardware(facts["hardware"])
    where = ", ".join(facts["hardware"]) or f"{here['cores']} cores of {here['cpu']}"
    return f"{where}, {facts['threads']} threads on both sides"


def versions(facts: Mapping[str, Any]) -> str:
    """The peers'."""
    return ", ".join(f"{name} {version}" for name, version in facts["versions"].items())


def speed(once: Mapping[str, Any], dtype: str) -> float:
    """FLOP a second of matrix products forward and back, as many of either."""
    return 2 / (1 / float(once[f"{dtype}_forward"]) + 1 / float(once[f"{dtype}_backward"]))


def training(found: Rounds, facts: Mapping[str, Any], options: argparse.Namespace) -> str:
    """Events learned a second."""
    lines = [
        "| trainer | events learned a second | tokens an event | tokens a second | timeline is so many times as fast |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, rounds in found.items():
        first = rounds[0]
        ratio = "" if name == TIMELINE else middle(ratios(found, name, TIMELINE, per_event), ".1f")
        lines.append(
            f"| {name} | {middle([1 / per_event(one) for one in rounds])} | {first['tokens'] / first['events']:.1f} "
            f"| {statistics.median(one['tokens'] / one['seconds'] for one in rounds):.0f} | {ratio} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"SmolLM2-135M in {facts['dtype']} on both sides, "
            f"LoRA r={facts['lora']['r']} on {', '.join(facts['lora']['target_modules'])}; "
            f"{facts['events']:,} events of {facts['people']} people of ml-100k, histories of at most 50 events in a "
            f"prompt. Medians of {options.rounds} rounds (smallest to largest); in each, all of them in turn: we "
            f"train {found[TIMELINE][0]['events']:,} events in rows of 1,024 tokens, "
            f"the others {found[POINTWISE][0]['events']} events, from the shortest history to the longest. Tokens "
            "include padding and repeated context. Forward, backward and optimizer are timed, "
            "by a callback of the trainer; tokenizing and saving are not. Plain kernels are PyTorch's fused attention "
            "and PEFT's LoRA layers, with which this package began. "
            f"{versions(facts)}; {machine(facts)}.",
        ]
    )


def scoring(found: Mapping[str, Any], facts: Mapping[str, Any], options: argparse.Namespace) -> str:
    """Seconds for a person's candidates."""
    causal: Rounds = found["causal"]
    seconds = lambda once: float(once["seconds"])  # noqa: E731
    lines = [
        "| 100 candidates behind 50 events | seconds | peftrec takes so many times less |",
        "|---|---:|---:|",
    ]
    for name, rounds in causal.items():
        ratio = "" if name == OURS else middle(ratios(causal, name, OURS, seconds), ".1f")
        lines.append(f"| {name} | {middle([seconds(one) for one in rounds])} | {ratio} |")
    ours, theirs = (np.asarray(scores) for scores in found["scores"])
    lines += [
        "",
        f"All read the same text with the same adapter; the others one prompt for each candidate, {options.asked} "
        f"of the 100, in batches of {found['batch']} (the best of those tried), and their time is that of 100 in "
        f"proportion. In {facts['dtype']} on both sides; our log-odds and those of `{KEEP_ONE}` are "
        f"{np.abs(ours - theirs).mean():.2g} apart on average. The pipeline gives a word, not a score. "
        f"{machine(facts)}.",
        "",
        *waits(found["waits"]),
        "",
        "| peftrec, seconds | " + " | ".join(f"{size}" for size in MANY_CANDIDATES) + " | slope |",
        "|---|" + "---:|" * (len(MANY_CANDIDATES) + 1),
        "| candidates, behind 50 events | "
        + " | ".join(f"{statistics.median(found['candidates'][size]):.2f}" for size in MANY_CANDIDATES)
        + f" | {slope(found['candidates']):.2f} |",
        "",
        "| peftrec, seconds | " + " | ".join(f"{size}" for size in LONG_HISTORIES) + " | slope |",
        "|---|" + "---:|" * (len(LONG_HISTORIES) + 1),
        "| events of history, 100 candidates | "
        + " | ".join(f"{statistics.median(found['history'][size]):.2f}" for size in LONG_HISTORIES)
        + f" | {slope(found['history']):.2f} |",
        "",
        "The slope is that of the line through both logarithms: 1 is growth in proportion, below 1 a fixed part. In "
        f"milliseconds, the line through the times themselves: {line(found['candidates'])} for each candidate, "
        f"{line(found['history'])} for each event.",
        "",
        "| an encoder (MiniLM), 100 pairs | pairs a second | peftrec takes so many times less |",
        "|---|---:|---:|",
    ]
    for name, rounds in found["encoder"].items():
        ratio = "" if name == OURS else middle(ratios(found["encoder"], name, OURS, seconds))
        lines.append(f"| {name} | {middle([100 / seconds(one) for one in rounds], '.0f')} | {ratio} |")
    return "\n".join(
        [
            *lines,
            "",
            "In float32, the same pairs. Ours carries LoRA beside its head, the CrossEncoder does not.",
        ]
    )


def waits(found: Mapping[tuple[int, int, int], Sequence[float]]) -> list[str]:
    """How long people wait of whom several ask at the same moment."""
    lines = [
        "| users at once | history | candidates | p50 (s) | p99 (s) | requests a second |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for (users, history, candidates), times in found.items():
        # The last of those who asked together has waited as long as all of them took.
        took = sum(max(times[first : first + users]) for first in range(0, len(times), users))
        lines.append(
            f"| {users} | {history} | {candidates} | {np.percentile(times, 50):.2f} | {np.percentile(times, 99):.2f} "
            f"| {len(times) / took:.2f} |"
        )
    return [
        *lines,
        "",
        "All of them ask at the same moment, and `Recommender.score_many` answers eight at a time; who comes last has "
        "waited for the others.",
    ]


def ceiling(found: Mapping[str, Any], facts: Mapping[str, Any], options: argparse.Namespace) -> str:
    """What the machine can do, and what is reached of it."""
    best = found["type"]
    (other,) = {*TYPES} - {best}
    tops = [speed(one, best) / 1e9 for one in found["ceiling"]]
    lines = [
        "| ceiling | median (smallest to largest) |",
        "|---|---:|",
        f"| {best} matrix products, GFLOP/s | {middle(tops, '.0f')} |",
        f"| {other}, GFLOP/s, once for {FIRST_LOOK} tokens | {speed(found['first'], other) / 1e9:.0f} |",
        f"| memory copy, GB/s read and written | {middle([one['copy'] / 1e9 for one in found['ceiling']], '.1f')} |",
    ]
    lines += [
        "",
        f"| in {facts['dtype']}, of the {best} ceiling | tokens a second | share | attention's products counted |",
        "|---|---:|---:|---:|",
    ]
    for name, words, flop in CEILING_ROWS:
        shares, whole, speeds = [], [], []
        for one, top in zip(found[name], found["ceiling"], strict=True):
            ways = [top[f"{best}_forward"], top[f"{best}_{'backward' if flop == 4 else 'forward'}"]]
            speeds.append(one["tokens"] / one["seconds"])
            shares.append(100 * speeds[-1] * flop * top["parameters"] * sum(1 / way for way in ways) / 2)
            layers, hidden = facts["shape"][:2]
            attention = 4 * layers * hidden * one["looks_back"] * (flop - 1)  # forward once, back twice
            whole.append(shares[-1] * (1 + attention / (flop * top["parameters"])))
        lines.append(f"| {words} | {middle(speeds, '.0f')} | {middle(shares, '.0f')} % | {middle(whole, '.0f')} % |")
    return "\n".join(
        [
            *lines,
            "",
            "Matrix products have the shapes of the model's linear layers for 1,024 tokens, forward and back, over as "
            "many weights as the model has, in the type that is the faster one here. Counted are 4 FLOP for "
            "each parameter outside the embeddings "
            f"({found['ceiling'][0]['parameters'] / 1e6:.0f} million) and token in training and 2 in the forward; "
            "attention, LoRA, norms and optimizer count as nothing and take their time. In the last column attention's "
            "products count as well, with the keys that are not hidden. "
            f"{options.rounds} rounds; {machine(facts)}.",
        ]
    )


def profile(found: Mapping[str, Any], facts: Mapping[str, Any], options: argparse.Namespace) -> str:
    """Where a training step goes."""
    del options
    total = sum(found["parts"].values())
    lines = ["| part of a training step | milliseconds | share |", "|---|---:|---:|"]
    for part, meaning in sorted(PARTS.items(), key=lambda one: -found["parts"][one[0]]):
        lines.append(f"| {meaning} | {found['parts'][part]:.0f} | {100 * found['parts'][part] / total:.0f} % |")
    return "\n".join(
        [
            *lines,
            "",
            f"One row of {found['tokens']:,} tokens, forward and backward, by PyTorch's profiler; {machine(facts)}.",
        ]
    )


def paper(found: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], options: argparse.Namespace) -> str:
    """The estimate of paper.py."""
    del options
    from paper import assumptions

    lines = [
        "| work | tokens | TFLOP | GB moved | least by arithmetic (ms) | least by memory (ms) | expected (ms) |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one in found:
        lines.append(
            f"| {one['work']} | {one['tokens']:,.0f} | {one['flop'] / 1e12:,.1f} | {one['bytes'] / 1e9:,.1f} "
            f"| {1000 * one['by_flop']:,.1f} | {1000 * one['by_bytes']:,.1f} | {1000 * one['expected']:,.1f} |"
        )
    return "\n".join([*lines, "", assumptions(facts["timeline_tokens"], facts["pointwise_tokens"], found)])


def picture(path: Path, trained: Rounds, scored: Mapping[str, Any]) -> None:
    """Events learned a second, seconds for 100 candidates, and how these grow."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    from peftrec.looks import style

    with style():
        figure, (left, centre, right) = plt.subplots(1, 3, figsize=(17, 4.6), layout="constrained")
        rates = {name: [1 / per_event(one) for one in rounds] for name, rounds in trained.items()}
        seconds = {name: [one["seconds"] for one in rounds] for name, rounds in scored["causal"].items()}
        for axes, values, title in (
            (left, rates, "Events learned a second"),
            (centre, seconds, "Seconds for 100 candidates"),
        ):
            names = list(values)[::-1]
            medians = [statistics.median(values[name]) for name in names]
            reach = [
                [m - min(values[name]) for m, name in zip(medians, names, strict=True)],
                [max(values[name]) - m for m, name in zip(medians, names, strict=True)],
            ]
            colours = ["#0072B2" if name.startswith(OURS) else "#7F7F7F" for name in names]
            axes.barh([name.replace(", batches", ",\nbatches") for name in names], medians, xerr=reach, color=colours)
            axes.set(title=title, xlim=(0, 1.2 * max(map(max, values.values()))))
            axes.grid(axis="y", visible=False)
            for place, name in enumerate(names):
                axes.annotate(
                    f"{medians[place]:.3g}",
                    (max(values[name]), place),
                    xytext=(6, 0),
                    textcoords="offset points",
                    va="center",
                )
        for label, times, marker in (
            ("candidates", scored["candidates"], "o"),
            ("events of history", scored["history"], "s"),
        ):
            sizes = list(times)
            right.plot(
                sizes,
                [statistics.median(times[size]) for size in sizes],
                marker=marker,
                label=f"{label}: slope {slope(times):.2f}",
            )
        right.set(xscale="log", yscale="log", title="peftrec, seconds a request")
        right.set_xlabel("candidates, or events of history")
        sizes = sorted({*MANY_CANDIDATES, *LONG_HISTORIES})
        right.set_xticks(sizes, [f"{size}" for size in sizes])
        right.minorticks_off()
        right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        right.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        right.legend(loc="upper left")
        figure.savefig(path, dpi=110)
        plt.close(figure)
