"""Timeline against pointwise, and TRL: the same model, the same training events, the same test rows, in one run.

    python benchmarks/layouts.py [--events 600] [--rounds 3] [--peers-python .venv-peers/bin/python] [--write]

Two questions. How many events does each layout learn a second? Measured in turn (A B A B …), the same number of packed
rows each, the median of the pairs' ratios. And what does it cost in AUC? Each layout trains one epoch over the same
events in equally many steps from the same start; then both adapters score the same test rows, of people drawn from
everybody, read as timelines (a score does not depend on the layout in which it is asked). The difference has an
interval from resampled users. Pointwise prompts are packed into rows without padding too, which favours them.
With the peers' interpreter, TRL's SFTTrainer learns from the pointwise prompts as well, once at each of two learning
rates, as text in steps of four prompts, by its own schedule, with an end token behind each answer and events of one
timestamp in sight of each other; its adapters score the same rows. peers.py has its speed.
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
from workers import Worker

from peftrec import adapters, backbone, config, encode, interactions, scorer, split, train
from peftrec.bootstrap import Bootstrap, bootstrap
from peftrec.draws import drawn_order
from peftrec.target import Target
from peftrec.timeline import WindowDataset, collate

RECIPE = Path(__file__).parent.parent / "recipes/configs/ml-100k/click_lora_demo.yaml"
TRL_BATCH = 4  # prompts of a step, the faster one in peers.py
TRL_RATES = (2e-4, 1e-3)  # what is usual for LoRA, and the recipe's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=600, help="training events at most, of whole users")
    parser.add_argument("--test-rows", type=int, default=2000, help="test rows at most, of whole users")
    parser.add_argument("--history", type=int, default=50, help="events shown in a pointwise prompt at most")
    parser.add_argument("--rounds", type=int, default=3, help="timed pairs")
    parser.add_argument("--peers-python", type=Path, help="interpreter that has TRL, which then learns too")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    arguments = parser.parse_args()
    # Half a window of overlap, so that an event sees about as much as in a pointwise prompt: with a quarter the first
    # events of a window see 15 others, and AUC is 0.01 lower (docs/LOG.md).
    base = config.load_recipe(RECIPE, ["--score.prior", "none", "--prompt.overlap", "256"])
    # One text for both: the pointwise prompt is the timeline up to the event in question.
    pointwise = dataclasses.replace(
        base.prompt, layout="pointwise", max_history=arguments.history, overlap=config.Prompt().overlap
    )
    layouts = {"timeline": base.prompt, "pointwise": pointwise}

    data = interactions.load(base.data, base.seed)
    log = split.split(data, base.data.split, base.seed)
    drawn = drawn_order(len(log.user_ids), base.seed, "layouts")
    test_rows = encode.whole_users(np.flatnonzero(log.split == split.TEST), log.user, arguments.test_rows, drawn)
    learned = encode.whole_users(np.flatnonzero(log.split == split.TRAIN), log.user, arguments.events, drawn)
    few = dataclasses.replace(log, split=np.where(np.isin(np.arange(len(log)), learned), split.TRAIN, split.TEST))
    loaded = backbone.load(base.model)
    datasets, models = {}, {}
    for name, prompt in layouts.items():
        encoder = encode.Encoder(few, prompt, loaded.tokenizer, base.eval.ties)
        datasets[name] = encoder.train(None)
        if name == "timeline":
            test = encoder.evaluate(test_rows, "streaming", None)
        fresh = backbone.load(base.model).model
        models[name] = adapters.attach(
            scorer.answer_only(fresh, encoder.codec.answers), base.adapter, base_name=loaded.base.hub_id, seed=base.seed
        )

    speeds: dict[str, list[float]] = {name: [] for name in layouts}
    for turn in range(arguments.rounds + 1):
        for name in layouts:
            rate = _events_per_second(models[name], datasets[name], rows=4, seed=turn)
            if turn:  # the first pair warms up
                speeds[name].append(rate)
    ratios = [a / b for a, b in zip(speeds["timeline"], speeds["pointwise"], strict=True)]

    scores: dict[str, np.ndarray] = {}
    seconds: dict[str, float] = {}
    steps = len(datasets["timeline"])
    # LoRA begins as the base model.
    untrained = Target().measure(train.score(models["timeline"], test, description="score")[1])[0]
    for name in layouts:
        seconds[name], rows, scores[name] = _train_and_score(models[name], datasets[name], test, base, steps)
    if arguments.peers_python:
        texts = _as_text(datasets["pointwise"], encoder.codec)
        for rate in TRL_RATES:
            name = f"TRL at {rate:g}"
            fresh = scorer.answer_only(backbone.load(base.model).model, encoder.codec.answers)
            seconds[name], model = _by_trl(arguments.peers_python, texts, fresh, loaded, base.adapter, rate)
            scores[name] = Target().measure(train.score(model, test, description="score")[1])[0]
    scores["untrained"] = untrained
    measured = bootstrap(log.label[rows], scores, log.user[rows], n=1000, seed=base.seed)
    differences = [
        f"minus {name}: {found['auc'].point:+.3f} [{found['auc'].low:+.3f}, {found['auc'].high:+.3f}]"
        for name, found in measured.differences.items()
    ]
    lines = [
        *_rows(measured, speeds, datasets, seconds),
        "",
        f"{len(learned):,} training events of {len(np.unique(log.user[learned]))} people in {steps} steps, "
        f"{len(rows):,} test rows of {len(np.unique(log.user[rows]))} people; pointwise prompts show at most "
        f"{arguments.history} events. Events a second, timeline over pointwise: median "
        f"{statistics.median(ratios):.1f}x of {len(ratios)} pairs (from {min(ratios):.1f}x to {max(ratios):.1f}x). "
        f"AUC, timeline {'; '.join(differences)}.",
    ]
    print("\n".join(lines))
    if arguments.write:
        put("pointwise", "\n".join(lines))


def _rows(
    measured: Bootstrap, speeds: dict[str, list[float]], datasets: dict[str, WindowDataset], seconds: dict[str, float]
) -> list[str]:
    """The table's, of whatever was measured of each way."""
    lines = [
        "| layout | events learned a second | tokens an event | seconds for the epoch | test AUC |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, found in measured.intervals.items():
        area = found["auc"]
        rate = f"{statistics.median(speeds[name]):.2f}" if name in speeds else "-"
        took = f"{seconds[name]:.0f}" if name in seconds else "-"
        tokens = f"{datasets[name].tokens / datasets[name].events:.1f}" if name in datasets else "-"
        lines.append(f"| {name} | {rate} | {tokens} | {took} | {area.point:.3f} [{area.low:.3f}, {area.high:.3f}] |")
    return lines


def _as_text(data: WindowDataset, codec: Any) -> list[dict[str, str]]:
    """Prompt and completion of each pointwise window: its tokens up to where the answer is read, and the answer."""
    made = []
    for index in range(len(data.windows)):
        window = data.windows.arrays(index)
        read = int(np.flatnonzero(window["row"] >= 0)[0])
        prompt, answer = codec.tokenizer.decode(window["input_ids"][: read + 1]), int(window["input_ids"][read + 1])
        made.append({"prompt": prompt, "completion": codec.tokenizer.decode([answer])})
    return made


def _by_trl(
    python: Path, rows: list[dict[str, str]], model: Any, loaded: Any, how: config.Adapter, rate: float
) -> tuple[float, Any]:
    """Seconds that TRL's trainer takes over `rows`, and `model` with the adapter that it learned."""
    lora = {"r": how.r, "lora_alpha": how.lora_alpha, "target_modules": list(how.target_modules)}
    with tempfile.TemporaryDirectory() as folder:
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        worker = Worker(python, Path(__file__).with_name("peers_theirs.py"), Path(folder, "log"), offline)
        worker.ask(
            "setup",
            device=loaded.model.device.type,
            dtype=loaded.base.dtype,
            base=loaded.tokenizer.name_or_path,
            adapter="",
            encoder="",
            lora=lora,
        )
        learned = str(Path(folder, "adapter"))
        took = worker.ask("sft", rows=rows, batch=TRL_BATCH, packing=False, learning_rate=rate, adapter=learned)
        worker.close()
        return took["seconds"], adapters.load(model, learned)


def _events_per_second(model: Any, data: WindowDataset, *, rows: int, seed: int) -> float:
    """Forward and backward over a few packed rows, drawn at random: the first ones hold the longest windows."""
    model.train()
    picked = [data[int(i)] for i in np.random.default_rng(seed).permutation(len(data))[:rows]]
    begin = time.perf_counter()
    events = 0
    for row in picked:
        batch = collate([row])
        events += int((batch["labels"] >= 0).sum())
        scorer.interaction_loss(model, batch, model.dtype, Target(), 1).backward()
    model.zero_grad()
    return events / (time.perf_counter() - begin)


def _train_and_score(
    model: Any, data: WindowDataset, test: WindowDataset, recipe: config.Recipe, steps: int
) -> tuple[float, np.ndarray, np.ndarray]:
    # The same number of optimizer steps for both, so that neither is favoured by smaller batches.
    how = dataclasses.replace(
        recipe.train,
        max_steps=-1,
        num_train_epochs=1.0,
        gradient_accumulation_steps=max(1, round(len(data) / steps)),
        evals=0,
        metric_for_best_model=config.Train().metric_for_best_model,
    )
    target = Target()
    with tempfile.TemporaryDirectory() as folder:
        fitted = train.fit(model, data, test, target, lambda *_: {}, train=how, folder=Path(folder), seed=recipe.seed)
    rows, outputs = train.score(model, test, description="score")
    return fitted.seconds, rows, target.measure(outputs)[0]


if __name__ == "__main__":
    main()
