"""Fine-tune a language model into a click predictor, measure it beside its baselines, and leave a run folder.

    accelerate launch recipes/finetune.py --config recipes/configs/ml-100k/click_lora.yaml
    accelerate launch recipes/finetune.py --config … --train.learning_rate 1e-4 --output_dir runs/mine
    accelerate launch recipes/finetune.py --config … --resume

It reads top to bottom in the order in which data meets it; the work itself is in the `peftrec` package.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from peftrec import (
    adapters,
    artifact,
    backbone,
    baselines,
    config,
    encode,
    figures,
    interactions,
    metrics,
    record,
    report,
    scorer,
    split,
    train,
)
from peftrec.errors import ConfigError, DataError, as_one_line
from peftrec.recommender import Recommender

PROBES = 8  # questions whose scores are saved with the adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a recipe; any of its keys can follow as --section.key value")
    parser.add_argument("--resume", action="store_true", help="continue a killed run from its newest checkpoint")
    arguments, overrides = parser.parse_known_args()
    recipe = config.load_recipe(arguments.config, overrides)
    folder = Path(recipe.output_dir)
    state = PartialState()
    main_process = state.is_main_process
    say = print if main_process else lambda *_: None
    backbone.quiet()
    backbone.use_all_cores(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    # Data: tables -> one log of events, each in one split.
    data = interactions.load(recipe.data, recipe.seed)
    log = split.split(data, recipe.data.split, recipe.seed)
    for warning in data.warnings:
        say(f"warning: {warning}")
    sizes = ", ".join(f"{name} {int((log.split == code).sum()):,}" for code, name in enumerate(split.SPLITS))
    say(
        f"data: {data.name}, {len(log):,} events of {len(log.user_ids):,} users on {log.items.height:,} items ({sizes})"
    )

    # What counting alone predicts: the opponents, and the prior if the recipe wants one.
    known = baselines.predict(log, recipe.eval.history, recipe.eval.ties)
    prior = known.scores["bias"].astype(np.float32) if recipe.score.prior == "bias" else None

    # Text and model.
    loaded = backbone.load(recipe.model)
    encoder = encode.Encoder(log, recipe.prompt, loaded.tokenizer, recipe.eval.ties)
    model = scorer.answer_only(loaded.model, encoder.codec.answers)
    say(f"model: {loaded.base.name}, {loaded.base.parameters / 1e6:.0f} M parameters, on {model.device}")

    # Train.
    drawn = interactions.drawn_order(len(log.user_ids), recipe.seed, "evaluated users")
    valid_rows = encode.whole_users(
        np.flatnonzero(log.split == split.VALID), log.user, recipe.eval.max_valid_rows, drawn
    )
    test_rows = encode.whole_users(np.flatnonzero(log.split == split.TEST), log.user, recipe.eval.max_test_rows, drawn)
    if recipe.train.metric_for_best_model != "loss" and len(np.unique(log.label[valid_rows])) < 2:
        raise DataError(
            f"train.metric_for_best_model: {recipe.train.metric_for_best_model} is not defined on the validation rows, "
            "which have one class; choose loss, or a larger data.split.valid"
        )
    fitted: train.Fitted | None = None
    if recipe.adapter.method != "none":
        model = adapters.attach(model, recipe.adapter, base_name=loaded.base.hub_id, seed=recipe.seed)
        data_train = encoder.train(prior)
        say(
            f"train: {adapters.trainable_parameters(model) / 1e6:.2f} M parameters on {data_train.events:,} events, "
            f"{data_train.tokens:,} tokens in {len(data_train):,} rows an epoch"
        )
        _prepare(folder, recipe, resume=arguments.resume, main_process=main_process)

        def to_metrics(rows: np.ndarray, scores: np.ndarray) -> dict[str, float]:
            measured = metrics.click_metrics(log.label[rows], scores, log.user[rows])
            return {"loss": measured["log_loss"], "auc": measured["auc"], "uauc": measured["uauc"]}

        fitted = train.fit(
            model,
            data_train,
            encoder.evaluate(valid_rows, recipe.eval.history, prior),
            to_metrics,
            train=recipe.train,
            folder=folder / "checkpoints",
            seed=recipe.seed,
            resume=arguments.resume,
        )

    # Score the rows that are reported, with the adapter and without it.
    begin = time.perf_counter()
    reported = encoder.evaluate(np.concatenate((valid_rows, test_rows)), recipe.eval.history, prior)
    rows, scores = train.score(model, reported, description="score", processes=state)
    score_seconds = time.perf_counter() - begin
    base_scores = None
    if fitted is not None and recipe.eval.base_model:
        with model.disable_adapter():
            _, base_scores = train.score(model, reported, description="score, base model", processes=state)
    if not main_process:
        return

    # Everything below is written by one process: predictions, tables, figures, adapter.
    table = record.predictions(
        log,
        rows,
        model_score=scores,
        prior=None if prior is None else prior[rows],
        base_score=base_scores,
        baselines={name: known.scores[name][rows] for name in _wanted(recipe, known)},
    )
    folder.mkdir(parents=True, exist_ok=True)
    record.write_predictions(folder, table)
    comparison = report.compare_predictions(table, recipe)
    tested = table.filter(table["split"] == "test")
    figures.draw(
        folder / "figures",
        train_log=fitted.log if fitted else [],
        best_step=fitted.best_step if fitted else None,
        label=tested["label"].to_numpy(),
        scores=record.scorers(tested),
        intervals=comparison.intervals,
        rows={name: size.rows for name, size in comparison.sizes.items()},
        ranking_only=baselines.RANKING_ONLY,
    )
    facts: dict[str, Any] = {"method": recipe.adapter.method}
    if fitted is not None:
        facts |= _save(folder / "adapter", model, recipe, data, log, encoder, loaded, known)
    record.write_record(
        folder,
        record.RunRecord(
            **comparison.facts(),
            warnings=[*data.warnings, *comparison.warnings],
            data=record.data_facts(data, log),
            prompt={**dataclasses.asdict(recipe.prompt), "max_item_tokens": encoder.max_item_tokens},
            model=dataclasses.asdict(loaded.base),
            adapter=facts,
            train=record.train_facts(**dataclasses.asdict(fitted)) if fitted else {},
            eval={
                **dataclasses.asdict(recipe.eval),
                "rows": len(rows),
                "seconds": score_seconds,
                "shrinkage": dataclasses.asdict(known.shrinkage),
            },
            hardware=record.hardware(backbone.accelerators()),
            seed=recipe.seed,
        ),
    )
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    print("\n" + comparison.table())
    if fitted is not None and log.prompts is None:
        _recommend(folder / "adapter", log, recipe.eval.recommend_k)
    print(f"\neverything is in {folder}: run.json, predictions.parquet, figures/, adapter/")


def _wanted(recipe: config.Recipe, known: baselines.Predictions) -> list[str]:
    return [name for name in (*recipe.eval.baselines, "global_mean") if name in known.scores]


def _prepare(folder: Path, recipe: config.Recipe, *, resume: bool, main_process: bool) -> None:
    """The run folder as training expects it: with `resume` as it was left, otherwise without an earlier run's files."""
    written, wanted = folder / "config.yaml", config.dump_recipe(recipe)
    if resume and written.is_file() and written.read_text() != wanted:
        raise ConfigError(
            f"{written}: the run that was begun here has another recipe; --resume continues the same one; "
            "repeat its command word for word, or start anew without --resume"
        )
    if main_process and not resume:
        for name in ("run.json", "predictions.parquet"):
            (folder / name).unlink(missing_ok=True)
        for name in ("checkpoints", "figures", "adapter"):
            shutil.rmtree(folder / name, ignore_errors=True)
    if main_process:
        folder.mkdir(parents=True, exist_ok=True)
        written.write_text(wanted)
    PartialState().wait_for_everyone()


def _save(
    folder: Path,
    model: Any,
    recipe: config.Recipe,
    data: interactions.Interactions,
    log: split.Log,
    encoder: encode.Encoder,
    loaded: backbone.Backbone,
    known: baselines.Predictions,
) -> dict[str, Any]:
    """Write the adapter folder, load it again as a user would, and keep what it answered to a few probes."""
    adapters.save(model, folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's blank card says nothing true of this adapter
    loaded.tokenizer.save_pretrained(folder)
    prior = baselines.fit_prior(log, known.shrinkage) if recipe.score.prior == "bias" else None
    about = artifact.describe(
        recipe,
        encoder.codec,
        loaded.base,
        data_name=data.name,
        data_sha256=data.sha256,
        rated=log.rating is not None,
        max_item_tokens=encoder.max_item_tokens,
        example=encoder.example(),
        template=encoder.template,
    )
    artifact.write(folder, about, prior)
    if log.prompts is None:
        reloaded = Recommender.from_pretrained(folder, items=log.items, dtype="float32", prior=False)
        probes = []
        for history, candidate in encoder.questions_of(PROBES, recipe.seed):
            (score,) = reloaded.score([(text, answer) for text, answer in history], [candidate])
            probes.append(artifact.Probe(history, candidate, float(score)))
        artifact.write(folder, dataclasses.replace(about, probes=probes), prior)
    return {
        "config": dataclasses.asdict(recipe.adapter),
        "trainable_parameters": adapters.trainable_parameters(model),
        "bytes": adapters.file_bytes(folder),
    }


def _recommend(folder: Path, log: split.Log, k: int) -> None:
    """Ten items for one person nobody trained on, beside what that person liked later."""
    count = np.bincount(log.user[log.split == split.TEST], minlength=len(log.user_ids))
    count[log.user[log.split == split.TRAIN]] = 0
    if not count.any():
        count = np.bincount(log.user, minlength=len(log.user_ids))
    events = np.flatnonzero(log.user == int(np.argmax(count)))
    known, later = np.array_split(events, 2)
    recommender = Recommender.from_pretrained(folder, items=log.items)
    titles, ids = encode.item_texts(log.items, recommender.prompt.item), log.items["item_id"].to_list()
    history = [(ids[log.item[row]], int(log.label[row])) for row in known]
    best = recommender.rank(history, k=k)
    liked = {titles[log.item[row]] for row in later if log.label[row] == 1}
    met = {titles[log.item[row]] for row in later}
    before = [titles[log.item[row]] for row in known if log.label[row] == 1][-k:]
    print(f"\nperson {log.user_ids[int(log.user[events[0]])]}: {len(known)} events known, {len(later)} kept back")
    print(f"  {'liked last':<40}  {'recommended':<40}  chance  later")
    for place in range(max(len(best), len(before))):
        old = before[-1 - place] if place < len(before) else ""
        if place < len(best):
            one = best[place]
            told = "liked" if one.title in liked else "disliked" if one.title in met else "-"
            print(f"  {old[:40]:<40}  {one.title[:40]:<40}  {one.probability:6.2f}  {told}")
        else:
            print(f"  {old[:40]}")


if __name__ == "__main__":
    try:
        with as_one_line():
            main()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command with --resume continues from the newest checkpoint", file=sys.stderr)
        sys.exit(130)
