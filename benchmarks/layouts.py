"""Timeline against pointwise: the same model, the same training rows, the same test rows, in one run.

    python benchmarks/layouts.py [--users 24] [--rounds 3] [--write]

Two questions. How many events does each layout learn a second? Measured in turn (A B A B …), the same number of packed
rows each, the median of the pairs' ratios. And what does it cost in AUC? Each layout trains one epoch over the same
training events from the same start and scores the same test rows; the difference has an interval from resampled users.
Pointwise prompts are packed into rows without padding too, which favours them.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from pages import put

from peftrec import adapters, backbone, config, encode, interactions, metrics, scorer, split, train
from peftrec.timeline import WindowDataset, collate

RECIPE = Path(__file__).parent.parent / "recipes/configs/ml-100k/click_lora_demo.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=24, help="people whose events are used")
    parser.add_argument("--history", type=int, default=50, help="events shown in a pointwise prompt at most")
    parser.add_argument("--rounds", type=int, default=3, help="timed pairs")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    arguments = parser.parse_args()
    base = config.load_recipe(RECIPE, ["--data.sample_users", str(arguments.users), "--score.prior", "none"])
    # One text for both: the pointwise prompt is the timeline up to the event in question.
    pointwise = dataclasses.replace(
        base.prompt, layout="pointwise", max_history=arguments.history, overlap=config.Prompt().overlap
    )
    layouts = {"timeline": base.prompt, "pointwise": pointwise}

    data = interactions.load(base.data, base.seed)
    log = split.split(data, base.data.split, base.seed)
    loaded = backbone.load(base.model)
    datasets, models = {}, {}
    for name, prompt in layouts.items():
        encoder = encode.Encoder(log, prompt, loaded.tokenizer, base.eval.ties)
        datasets[name] = (encoder.train(None), encoder.evaluate(_test_rows(log), "streaming", None))
        fresh = backbone.load(base.model).model
        models[name] = adapters.attach(
            scorer.answer_only(fresh, encoder.codec.answers), base.adapter, base_name=loaded.base.hub_id, seed=base.seed
        )

    speeds: dict[str, list[float]] = {name: [] for name in layouts}
    for turn in range(arguments.rounds + 1):
        for name in layouts:
            rate = _events_per_second(models[name], datasets[name][0], rows=4, seed=turn)
            if turn:  # the first pair warms up
                speeds[name].append(rate)
    ratios = [a / b for a, b in zip(speeds["timeline"], speeds["pointwise"], strict=True)]

    scores: dict[str, np.ndarray] = {}
    seconds: dict[str, float] = {}
    for name in layouts:
        seconds[name], rows, scores[name] = _train_and_score(models[name], *datasets[name], base)
    drawn = metrics.bootstrap(log.label[rows], scores, log.user[rows], n=1000, seed=base.seed)
    difference = drawn.differences["pointwise"]["auc"]
    lines = [
        "| layout | events learned a second | tokens an event | seconds for the epoch | test AUC |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in layouts:
        one, area = datasets[name][0], drawn.intervals[name]["auc"]
        lines.append(
            f"| {name} | {statistics.median(speeds[name]):.2f} | {one.tokens / one.events:.1f} | {seconds[name]:.0f} "
            f"| {area.point:.3f} [{area.low:.3f}, {area.high:.3f}] |"
        )
    lines += [
        "",
        f"{datasets['timeline'][0].events:,} training events and {len(rows):,} test rows of {arguments.users} people; "
        f"pointwise prompts show at most {arguments.history} events. Events a second, timeline over pointwise: median "
        f"{statistics.median(ratios):.1f}x of {len(ratios)} pairs (from {min(ratios):.1f}x to {max(ratios):.1f}x). "
        f"AUC, timeline minus pointwise: {difference.point:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}].",
    ]
    print("\n".join(lines))
    if arguments.write:
        put("pointwise", "\n".join(lines))


def _test_rows(log: split.Log) -> np.ndarray:
    return np.flatnonzero(log.split == split.TEST)


def _events_per_second(model: Any, data: WindowDataset, *, rows: int, seed: int) -> float:
    """Forward and backward over a few packed rows, drawn at random: the first ones hold the longest windows."""
    model.train()
    picked = [data[int(i)] for i in np.random.default_rng(seed).permutation(len(data))[:rows]]
    begin = time.perf_counter()
    events = 0
    for row in picked:
        batch = collate([row])
        events += int((batch["labels"] >= 0).sum())
        scorer.interaction_loss(model, batch, model.dtype, 1).backward()
    model.zero_grad()
    return events / (time.perf_counter() - begin)


def _train_and_score(
    model: Any, data: WindowDataset, test: WindowDataset, recipe: config.Recipe
) -> tuple[float, np.ndarray, np.ndarray]:
    # The same number of optimizer steps for both, so that neither is favoured by smaller batches.
    steps = 24
    how = dataclasses.replace(
        recipe.train,
        max_steps=-1,
        num_train_epochs=1.0,
        gradient_accumulation_steps=max(1, round(len(data) / steps)),
        evals=0,
        metric_for_best_model=config.Train().metric_for_best_model,
    )
    with tempfile.TemporaryDirectory() as folder:
        fitted = train.fit(model, data, test, lambda *_: {}, train=how, folder=Path(folder), seed=recipe.seed)
    rows, scores = train.score(model, test, description="score")
    return fitted.seconds, rows, scores


if __name__ == "__main__":
    main()
