"""Fine-tune a language model into a click or rating predictor, measure it beside its baselines, and leave a run folder.

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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from peftrec import (
    adapters,
    align,
    artifact,
    backbone,
    baselines,
    calibration,
    config,
    earlier,
    encode,
    figures,
    handover,
    interactions,
    methods,
    metrics,
    opponents,
    prepared,
    processes,
    record,
    report,
    scorer,
    side,
    side_vectors,
    split,
    teachers,
    timeline,
    train,
    virtual_tokens,
)
from peftrec.augment import Augment
from peftrec.draws import drawn_order
from peftrec.errors import ConfigError, DataError, as_one_line
from peftrec.exposure import exposure
from peftrec.schema import read_yaml
from peftrec.target import Target, fit_target
from peftrec.user_groups import user_groups

Say = Callable[[str], None]  # print on the main process


@dataclass
class Learner:
    """The language model with all that says how it is asked.

    Attributes:
        target: what its outputs are trained to.
        loaded: the base model and its tokenizer.
        encoder: writes the log's events as text.
        model: what is asked; an adapter's from when one has been attached.
        beside: side vectors, if the recipe has any.
        start: the adapter that training starts from, if the recipe names one.
        teachers: earlier runs whose answers are learned, too.
    """

    target: Target
    loaded: backbone.Backbone
    encoder: encode.Encoder
    model: Any
    beside: side_vectors.OfRun | None
    start: earlier.Earlier | None
    teachers: list[teachers.Teacher]


@dataclass(frozen=True)
class Outcome:
    """What training and scoring left.

    Attributes:
        fitted: what training was; None where nothing is trained.
        alignment: the other domain that it was brought nearer to, if any.
        taught_by: what is said of the teachers, if there were any.
        rows: the reported rows of the log, (n,).
        outputs: the head's, (n, K).
        base_outputs: those of the base model without an adapter, if they were wanted.
        seconds: that scoring took.
    """

    fitted: train.Fitted | None
    alignment: align.Alignment | None
    taught_by: dict[str, Any] | None
    rows: np.ndarray
    outputs: np.ndarray
    base_outputs: np.ndarray | None
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a recipe; any of its keys can follow as --section.key value")
    parser.add_argument("--resume", action="store_true", help="continue a killed run from its newest checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run left in output_dir")
    arguments, overrides = parser.parse_known_args()
    recipe = backbone.with_dtype(config.load_recipe(arguments.config, overrides))
    folder = Path(recipe.output_dir)
    state = processes.group()
    say = print if state.is_main_process else lambda *_: None
    backbone.quiet()
    backbone.use_all_cores(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if not _may_begin(folder, recipe, resume=arguments.resume, overwrite=arguments.overwrite):
        say(f"{folder}: this run has ended; there is nothing to resume")
        return
    state.wait_for_everyone()  # nobody writes there before everybody has looked
    processes.check(recipe)
    calibration.check(recipe.score.calibration)
    if mistake := processes.alone_by_mistake():
        say(f"warning: {mistake}")

    # Data: tables -> one log of events, each in one split; and, of another domain, events without their answers.
    data, log = _events(recipe, say)
    other = align.unanswered(recipe, log) if recipe.align.used else None
    warnings = [*data.warnings, *(other.warnings if other else ())]
    for warning in warnings:
        say(f"warning: {warning}")

    # What counting alone predicts: the opponents, and the prior if the recipe wants one. Then text and model.
    known = opponents.measure(log, recipe)
    learner = _learner(recipe, log, known, data.sha256, say)

    # Learn from the training rows; score the validation and test rows that are reported.
    outcome = _learn_and_score(recipe, log, known, learner, other, folder, say, resume=arguments.resume)
    if recipe.score.calibration != "none":
        learner.target, few = _calibrated(recipe, log, known, learner.target, outcome)
        for warning in few:
            say(f"warning: {warning}")
        warnings += few
    processes.gather(learner.model)
    processes.leave()
    if not state.is_main_process:
        return

    # Everything below is written by one process: predictions, tables, figures, adapter.
    comparison, about = _write(folder, recipe, data, log, known, learner, outcome, warnings)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    print("\n" + comparison.table())

    # The run is safe; now the adapter is loaded as a user would load it, and asked.
    if about is not None:
        encoder = learner.encoder
        del learner  # two models at once need not fit
        handover.probe(folder / "adapter", about, known.saved_prior, encoder, log, recipe)
        handover.write_card(folder, recipe.hub.repo_id)
        if log.prompts is None:
            handover.recommend(folder / "adapter", log, recipe)
    if recipe.hub.push:
        handover.push(folder, recipe.hub)
    print(f"\neverything is in {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def _events(recipe: config.Recipe, say: Say) -> tuple[interactions.Interactions, split.Log]:
    """The recipe's tables, as they were read and as a log of events in splits."""
    data, log = prepared.load(recipe.data, recipe.seed, recipe.task, with_users=config.of_users(recipe))
    if recipe.data.train_events is not None:
        log = split.few(log, recipe.data.train_events, recipe.seed)
    sizes = ", ".join(f"{name} {len(log.rows(code)):,}" for code, name in enumerate(split.SPLITS))
    say(
        f"data: {data.name}, {len(log):,} events of {len(log.user_ids):,} users on {log.items.height:,} items ({sizes})"
    )
    return data, log


def _learner(recipe: config.Recipe, log: split.Log, known: opponents.Opponents, sha256: str, say: Say) -> Learner:
    """The base model under an answer head, and the encoder that asks it."""
    beside = side_vectors.of_run(log, recipe) if recipe.side.used else None
    methods.check(recipe.adapter)
    backbone.check(recipe)
    start, elders = earlier.find(recipe), teachers.find(recipe)
    teachers.check_data(elders, sha256)
    learned = log.split == split.TRAIN
    target = fit_target(
        recipe.task,
        recipe.score.head,
        recipe.score.loss,
        log.scale,
        log.label[learned],
        None if known.prior is None else known.prior[learned],
    )
    loaded = backbone.load(recipe.model, target)
    backbone.check_window(loaded.model, recipe.prompt.max_tokens)
    encoder = encode.Encoder(
        log,
        recipe.prompt,
        loaded.tokenizer,
        recipe.eval.ties,
        task=recipe.task,
        shuffle=recipe.seed if recipe.train.order == "random" else None,
        kind=loaded.kind,
        side=beside,
    )
    model = scorer.with_head(loaded.model, target.head, encoder.codec.answers)
    for one in (*([start] if start else []), *(teacher.adapter for teacher in elders)):
        earlier.check(one, recipe.task, loaded.base, target, encoder.codec)
    say(
        f"model: {loaded.base.name}, {loaded.base.parameters / 1e6:.0f} M parameters in {loaded.base.dtype}, "
        f"on {model.device}"
    )
    if loaded.base.dtype == "bfloat16" and not backbone.has_bfloat16():
        say("warning: this processor has no bfloat16 of its own and is slow in it; model.dtype: auto takes float32")
    return Learner(target, loaded, encoder, model, beside, start, elders)


def _learn_and_score(
    recipe: config.Recipe,
    log: split.Log,
    known: opponents.Opponents,
    learner: Learner,
    other: align.Other | None,
    folder: Path,
    say: Say,
    *,
    resume: bool,
) -> Outcome:
    """Train an adapter, if the recipe has one, and score the reported rows with it and without."""
    encoder, state = learner.encoder, processes.group()
    drawn = drawn_order(len(log.user_ids), recipe.seed, "evaluated users")
    valid_rows, test_rows = (
        encode.whole_users(log.rows(code), log.user, most, drawn)
        for code, most in ((split.VALID, recipe.eval.max_valid_rows), (split.TEST, recipe.eval.max_test_rows))
    )
    measure = _validation(log, known.prior, learner.target)
    choice = recipe.train.metric_for_best_model
    untold = np.zeros((len(valid_rows), learner.target.outputs), dtype=np.float32)
    if not np.isfinite(measure(valid_rows, untold)[choice]):
        raise DataError(
            f"train.metric_for_best_model: {choice} is not defined on the validation rows, since nobody there has two "
            "different answers; choose loss, or a larger data.split.valid"
        )
    reported = encoder.evaluate(np.concatenate((valid_rows, test_rows)), recipe.eval.history, known.prior)
    trains = recipe.adapter.method != "none"
    asks_base = recipe.eval.base_model and learner.target.head == "tokens"  # an untrained head says nothing
    fitted, alignment, taught_by, base_outputs = None, None, None, None
    if recipe.adapter.method == "full" and asks_base:  # there will be no adapter to switch off
        _, base_outputs = train.score(learner.model, reported, description="score, base model", processes=state)
    if trains:
        data_train = encoder.train(known.prior, Augment.of(recipe))
        alignment = None if other is None else align.Alignment.of(recipe, other, learner.loaded.tokenizer)
        _attach(learner, recipe, len(data_train), say)
        taught_by = _teach(recipe, log, known, learner, data_train, say)
    # Nothing is written before everything that can be wrong with the recipe has been tried.
    if state.is_main_process:
        _prepare(folder, recipe, resume=resume)
    if trains:
        say(
            f"train: {adapters.trainable_parameters(learner.model) / 1e6:.2f} M parameters on {data_train.events:,} "
            f"events, {data_train.tokens:,} tokens in {len(data_train):,} rows an epoch"
        )
        if alignment is not None:
            say(
                f"align: {recipe.align.kind}, beside {alignment.rows.events:,} events without answers in "
                f"{len(alignment.rows):,} rows"
            )
        fitted = train.fit(
            learner.model,
            data_train,
            encoder.evaluate(valid_rows, recipe.eval.history, known.prior),
            learner.target,
            measure,
            train=recipe.train,
            folder=folder / "checkpoints",
            seed=recipe.seed,
            resume=resume,
            alignment=alignment,
        )
    begin = time.perf_counter()
    rows, outputs = train.score(learner.model, reported, description="score", processes=state)
    seconds = time.perf_counter() - begin
    if fitted is not None and asks_base and base_outputs is None:
        with learner.model.disable_adapter(), side.off():
            _, base_outputs = train.score(learner.model, reported, description="score, base model", processes=state)
    return Outcome(fitted, alignment, taught_by, rows, outputs, base_outputs, seconds)


def _calibrated(
    recipe: config.Recipe, log: split.Log, known: opponents.Opponents, target: Target, outcome: Outcome
) -> tuple[Target, list[str]]:
    """The target with the curve that fits the validation rows best, and what is to be said of it."""
    valid = log.split[outcome.rows] == split.VALID
    rows = outcome.rows[valid]
    score, _ = target.measure(outcome.outputs[valid], None if known.prior is None else known.prior[rows])
    truth = log.label[rows] if log.rating is None or recipe.task == "click" else log.rating[rows]
    assert recipe.score.calibration != "none"
    knots = calibration.fit(recipe.score.calibration, recipe.task, score, truth)
    return dataclasses.replace(target, calibration=knots), calibration.warnings(recipe.score.calibration, len(rows))


def _attach(learner: Learner, recipe: config.Recipe, rows: int, say: Say) -> None:
    """Put the recipe's adapter on the model, from an earlier one where the recipe names one; `rows` is an epoch."""
    loaded, encoder = learner.loaded, learner.encoder
    learner.model = adapters.attach(
        learner.model,
        recipe.adapter,
        base_name=loaded.base.hub_id,
        seed=recipe.seed,
        steps=train.total_steps(recipe.train, rows),
        original=lambda: backbone.load(dataclasses.replace(recipe.model, load_in_4bit=False), learner.target).model,
        opening=encoder.opening,
    )
    if learner.beside is not None:
        side.attach(learner.model, learner.beside, recipe.side, learner.target.outputs, seed=recipe.seed)
    if learner.start is not None:
        earlier.take_over(learner.model, learner.start, recipe.task, stacked=recipe.start.stack)
        say(f"start: {learner.start.name}{', below a new adapter' if recipe.start.stack else ''}")
    backbone.check_window(loaded.model, recipe.prompt.max_tokens, virtual_tokens.count(learner.model))


def _teach(
    recipe: config.Recipe,
    log: split.Log,
    known: opponents.Opponents,
    learner: Learner,
    data: timeline.WindowDataset,
    say: Say,
) -> dict[str, Any] | None:
    """Ask the teachers, if there are any, what `data` is to be learned for; what is to be said of them."""
    if not learner.teachers:
        return None
    said = teachers.facts(learner.teachers, recipe.train.distill)
    say(f"teachers: {len(learner.teachers)}, each asked for {data.events:,} events")
    plain = learner.encoder.train(known.prior, None)
    data.taught = teachers.taught(
        learner.model,
        learner.teachers,
        plain,
        log,
        known.prior,
        recipe,
        learner.target,
        processes=processes.group(),
    )
    return said


def _write(
    folder: Path,
    recipe: config.Recipe,
    data: interactions.Interactions,
    log: split.Log,
    known: opponents.Opponents,
    learner: Learner,
    outcome: Outcome,
    warnings: list[str],
) -> tuple[report.Comparison, artifact.Artifact | None]:
    """Predictions, figures, the adapter if there is one, and at last the record, which says that the run has ended."""
    fitted, rows = outcome.fitted, outcome.rows
    table = _predictions(recipe, log, known, learner.target, outcome)
    record.write_predictions(folder, table)
    comparison = report.compare_predictions(table, recipe, scale=log.scale)
    tested = table.filter(table["split"] == "test")
    figures.draw(
        folder / "figures",
        task=recipe.task,
        train_log=fitted.log if fitted else [],
        best_step=fitted.best_step if fitted else None,
        truth=tested[record.TRUTH[recipe.task]].to_numpy(),
        scores=record.scorers(tested, trained=fitted is not None),
        intervals=comparison.intervals,
        rows={name: size.rows for name, size in comparison.sizes.items()},
        scale=log.scale,
        loss=learner.target.loss,
        ranking_only=baselines.RANKING_ONLY,
    )
    about = None if fitted is None else _describe(recipe, data, log, learner)
    facts: dict[str, Any] = {"method": recipe.adapter.method}
    if about is not None:
        _save(folder / "adapter", learner, about, known.saved_prior)
        facts |= {
            "config": config.recipe_to_dict(recipe)["adapter"],
            "trainable_parameters": adapters.trainable_parameters(learner.model),
            "bytes": adapters.file_bytes(folder / "adapter"),
            **({} if learner.start is None else {"started_from": learner.start.facts()}),
            **({} if outcome.alignment is None else {"aligned_with": outcome.alignment.facts()}),
            **({} if outcome.taught_by is None else {"taught_by": outcome.taught_by}),
        }
    beside = learner.beside
    record.write_record(
        folder,
        record.RunRecord(
            **comparison.facts(),
            warnings=[*warnings, *comparison.warnings],
            data=record.data_facts(data, log, recipe.task),
            prompt={**dataclasses.asdict(recipe.prompt), "max_item_tokens": learner.encoder.max_item_tokens},
            model=dataclasses.asdict(learner.loaded.base),
            adapter=facts,
            train=record.train_facts(**dataclasses.asdict(fitted)) if fitted else {},
            eval={
                **dataclasses.asdict(recipe.eval),
                "rows": len(rows),
                "seconds": outcome.seconds,
                "settings": known.settings | ({"side": beside.settings} if beside else {}),
            },
            hardware=record.hardware(backbone.accelerators()),
            exposure=exposure(
                log,
                rows,
                record.scorers(table, trained=fitted is not None),
                resamples=recipe.eval.bootstrap,
                seed=recipe.seed,
            ),
            seed=recipe.seed,
        ),
    )
    return comparison, about


def _predictions(
    recipe: config.Recipe, log: split.Log, known: opponents.Opponents, target: Target, outcome: Outcome
) -> pl.DataFrame:
    """One line for each reported row: the truth and what everybody predicts."""
    rows, base = outcome.rows, outcome.base_outputs
    prior = None if known.prior is None else known.prior[rows]
    score, answer = target.measure(outcome.outputs, prior)
    return record.predictions(
        log,
        rows,
        task=recipe.task,
        score=target.calibrated(score),
        answer=answer if recipe.task == "rating" else None,
        score_no_prior=None if prior is None else target.measure(outcome.outputs)[0],
        prior=prior,
        base_score=None if base is None else target.measure(base)[0],
        baselines={name: scores[rows] for name, scores in known.scores.items()},
        groups=None if log.users is None else user_groups(log.users, recipe.eval.user_groups),
    )


def _describe(
    recipe: config.Recipe, data: interactions.Interactions, log: split.Log, learner: Learner
) -> artifact.Artifact:
    """What an adapter's folder says of itself beside PEFT's own config."""
    encoder, beside = learner.encoder, learner.beside
    return artifact.describe(
        recipe,
        encoder.codec,
        learner.loaded.base,
        learner.target,
        data_name=data.name,
        data_sha256=data.sha256,
        like_at=None if log.rating is None else data.like_at,
        max_item_tokens=encoder.max_item_tokens,
        example=encoder.example(),
        template=encoder.template,
        side=list(beside.sources) if beside else (),
    )


def _validation(log: split.Log, prior: np.ndarray | None, target: Target) -> train.ToMetrics:
    """What is measured at each validation pass: the metrics among which the recipe chooses the best checkpoint."""

    def measure(rows: np.ndarray, outputs: np.ndarray) -> dict[str, float]:
        known = None if prior is None else prior[rows]
        score, answer = target.measure(outputs, known)
        if target.task == "click":
            found = metrics.click_metrics(log.label[rows], score, log.user[rows])
            return {"loss": found["log_loss"], "auc": found["auc"], "uauc": found["uauc"]}
        assert log.rating is not None
        found = metrics.rating_metrics(log.rating[rows], score, log.user[rows], log.scale, answer)
        loss = target.mean_loss(outputs, known, log.label[rows])
        return {"loss": loss, "rmse": found["rmse"], "mae": found["mae"], "uauc": found["uauc"]}

    return measure


def _may_begin(folder: Path, recipe: config.Recipe, *, resume: bool, overwrite: bool) -> bool:
    """Whether there is something to do in `folder`; False where --resume finds a run that has ended.

    Raises:
        ConfigError: the folder is not ours, or holds a run that the command does not mean.
    """
    written = folder / "config.yaml"
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not written.is_file())):
        raise ConfigError(f"output_dir: {folder} holds other things than a run; choose another output_dir")
    ended = (folder / "run.json").is_file()
    if resume and written.is_file() and not _same_recipe(written, recipe):
        raise ConfigError(
            f"{written}: the run that was begun here has another recipe; --resume continues the same one; "
            "repeat its command word for word, or start anew with --overwrite"
        )
    if ended and not (resume or overwrite):
        raise ConfigError(
            f"output_dir: {folder} holds a run that has ended; choose another output_dir, or add --overwrite"
        )
    return not (resume and ended)


def _same_recipe(written: Path, recipe: config.Recipe) -> bool:
    """Whether a run's `config.yaml` says the same; keys that came later are at their defaults there."""
    try:
        begun = config.parse_recipe(read_yaml(written), str(written))
    except ConfigError:
        return False
    return config.dump_recipe(begun) == config.dump_recipe(recipe)


def _prepare(folder: Path, recipe: config.Recipe, *, resume: bool) -> None:
    """The run folder as training expects it: with `resume` as it was left, otherwise without an earlier run's files."""
    if not resume:
        for name in ("run.json", "predictions.parquet", "card.yaml"):
            (folder / name).unlink(missing_ok=True)
        for name in ("checkpoints", "figures", "adapter", "logs"):
            shutil.rmtree(folder / name, ignore_errors=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir: {folder} cannot be made ({error.strerror}); choose another one") from error
    with record.atomic(folder / "config.yaml") as scratch:
        scratch.write_text(config.dump_recipe(recipe))


def _save(folder: Path, learner: Learner, about: artifact.Artifact, prior: Any) -> None:
    """Write the adapter folder whole or not at all."""
    scratch = folder.with_name(f".{folder.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    adapters.save(learner.model, scratch)
    learner.loaded.tokenizer.save_pretrained(scratch)
    artifact.write(scratch, about, prior)
    if learner.beside is not None:
        side.save(learner.model, scratch, learner.beside.sources)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


if __name__ == "__main__":
    try:
        with as_one_line():
            main()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command with --resume continues from the newest checkpoint", file=sys.stderr)
        sys.exit(130)
