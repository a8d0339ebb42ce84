"""fit(): transformers.Trainer with our loss, our evaluation and our way to save; everything else is the library's.

Resume, best checkpoint, early stopping, trackers, accumulation and distribution are Trainer's.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather_object
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback

from peftrec import adalora, adapters, align, backbone, config, fgm, processes, scorer
from peftrec.dealer import StepSampler, deal
from peftrec.errors import PeftrecError
from peftrec.target import Target
from peftrec.timeline import WindowDataset, collate

STATE = "trainer_state.json"
TRAINERS = (
    *("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay"),
    *("max_grad_norm", "per_device_train_batch_size", "gradient_checkpointing", "logging_steps", "report_to"),
)
"""Keys of the section `train` that are Trainer's own and mean the same there."""
LEAST_FREE = 1_000_000  # bytes; with less than this on the disk a failed write is put down to it

ToMetrics = Callable[[np.ndarray, np.ndarray], dict[str, float]]  # rows (n,) and the head's outputs (n, K) -> metrics


@dataclass(frozen=True)
class Fitted:
    """What training was and what it cost."""

    seconds: float  # inside optimizer steps: validation passes and saving left out
    events: int  # learned from, repetitions counted
    tokens: int
    steps: int
    best_step: int | None
    log: list[dict[str, float]] = field(default_factory=list)

    @property
    def events_per_second(self) -> float:
        """Events learned a second of training."""
        return self.events / self.seconds if self.seconds else math.nan


def score(model: Any, data: WindowDataset, *, description: str, processes: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Ask for every read row of `data` once, over all processes: rows of the log (n,), ascending, and outputs (n, K).

    Args:
        model: base or PEFT model with an answer head.
        data: packed rows.
        description: what the progress bar says.
        processes: accelerate's state (or Accelerator), over whose processes the rows are dealt; None is one process.
    """
    rank, world = (processes.process_index, processes.num_processes) if processes else (0, 1)
    hands = deal(data.lengths, world)
    with tqdm(total=data.events, desc=description, unit=" events", disable=rank > 0, leave=False) as bar:
        parts = [scorer.score_rows(model, data, hands[rank], progress=lambda n: bar.update(n * world))]
    # A model in shards computes only while all processes do: one with fewer rows keeps step with the others.
    blank: Any = [data.blank()]
    scorer.score_rows(model, blank, [0] * (max(map(len, hands)) - len(hands[rank])))
    if world > 1:
        parts = [part for part in gather_object(parts) if len(part[0])]
    rows, outputs = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.argsort(rows, kind="stable")
    return rows[order], outputs[order]


class _Loader(DataLoader[Any]):
    """A data loader that Trainer tells which epoch it is in."""

    def set_epoch(self, epoch: int) -> None:
        """Pass it on to the sampler, which tells the rows."""
        assert isinstance(self.batch_sampler, StepSampler)
        self.batch_sampler.set_epoch(epoch)


class WindowTrainer(Trainer):  # type: ignore[misc]
    """Trainer over packed windows: the loss is a mean over *events*, and validation counts every row once."""

    def __init__(
        self,
        *args: Any,
        target: Target,
        to_metrics: ToMetrics,
        pairwise: float = 0.0,
        fgm_epsilon: float = 0.0,
        alignment: align.Alignment | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, data_collator=collate, **kwargs)
        self.model_accepts_loss_kwargs = True  # so that Trainer counts the labels of a whole optimizer step
        self.loss_is_scaled_for_ga = True
        self.target, self.to_metrics, self.pairwise, self.fgm_epsilon = target, to_metrics, pairwise, fgm_epsilon
        self.alignment = alignment
        self._aligned: list[torch.Tensor] = []  # part of each pass in its step's loss, since the last line of the log

    def create_accelerator_and_postprocess(self) -> None:
        """Shard a model on the CPU too, to try it out, where accelerate takes no notice of being told to (FSDP2)."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if backbone.engine() == "fsdp" and state.distributed_type == DistributedType.MULTI_CPU:
            PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            self.is_fsdp_enabled = True

    @property
    def kind(self) -> str:
        """What kind of checkpoints this writes: see `processes.kind`."""
        return "fsdp" if self.is_fsdp_enabled else "deepspeed" if self.is_deepspeed_enabled else "plain"

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Every row once an epoch, dealt to the processes so that they finish together."""
        data, args = self.train_dataset, self.args
        lengths = data.lengths
        together: Any = collate
        if self.alignment is not None:
            data, together = self.alignment.beside(data), align.Pairs.collate
        sampler = StepSampler(
            lengths,
            batch=args.per_device_train_batch_size,
            passes=args.gradient_accumulation_steps * args.world_size,
            seed=args.seed,
            rank=args.process_index,
            world=args.world_size,
            tell=data.set_epoch,
        )
        blank = data.blank()
        return _Loader(
            data,
            batch_sampler=sampler,
            collate_fn=lambda rows: together(rows or [blank]),
            pin_memory=args.dataloader_pin_memory,
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Sum over this batch's events divided by the step's events over all processes."""
        del return_outputs
        watched: AbstractContextManager[list[torch.Tensor]] = nullcontext([])
        if self.alignment is not None:
            watched = align.watched(self.model)
        with watched as hidden:
            loss = scorer.interaction_loss(
                model, inputs, self.model.dtype, self.target, num_items_in_batch, pairwise=self.pairwise
            )
        # Once for the whole optimizer step: of what is no sum over events each batch adds its share of the events.
        events = (inputs["labels"] >= 0).sum()
        if adalora.is_adaptive(self.model):
            loss = loss + adalora.penalty(self.model) * events / num_items_in_batch
        if self.alignment is not None:
            states = align.at_reads(hidden[0], inputs["reads"])
            progress = self.state.global_step / max(1, self.state.max_steps)
            added = self.alignment.loss(self.model, inputs, states, progress)
            share = added * events / num_items_in_batch
            self._aligned.append(share.detach().float())
            loss = loss + share
        world: int = self.accelerator.num_processes
        return loss * world  # gradients are averaged over processes; the sum is wanted

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With the part of the training loss that aligns domains beside it, where there is one."""
        if self.alignment is not None and "loss" in logs and self._aligned:
            # A mean over steps, as `loss` is.
            steps = len(self._aligned) / self.args.gradient_accumulation_steps
            logs["align_loss"] = float(self.accelerator.reduce(torch.stack(self._aligned).sum())) / steps
            self._aligned.clear()
        super().log(logs, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One batch, and once more with moved embeddings where the recipe wants that; the loss is that of the first."""
        loss: torch.Tensor
        if not self.fgm_epsilon:
            loss = super().training_step(model, inputs, *args, **kwargs)
            return loss
        embeddings = self.accelerator.unwrap_model(self.model).get_input_embeddings()
        with fgm.watched(embeddings) as outputs:
            loss = super().training_step(model, dict(inputs), *args, **kwargs)
        logged = len(self._aligned)
        with fgm.moved(embeddings, outputs, self.fgm_epsilon):
            super().training_step(model, dict(inputs), *args, **kwargs)
        del self._aligned[logged:]
        return loss

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Score the validation rows and report their metrics."""
        model = self.accelerator.unwrap_model(self.model)
        rows, outputs = score(model, self.eval_dataset, description="valid", processes=self.accelerator)
        metrics = self.to_metrics(rows, outputs)
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def restore(self, checkpoint: Path) -> None:
        """Take over a run that had ended: its log, its clock and its best weights, without another step."""
        self.state = TrainerState.load_from_json(str(checkpoint / STATE))
        self._load_callback_state()
        best = checkpoint.with_name(f"checkpoint-{self.state.best_global_step or self.state.global_step}")
        adapters.load_checkpoint(self.accelerator.unwrap_model(self.model), best)  # not yet in shards

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained, whole, into a checkpoint; all processes take part."""
        folder = Path(output_dir or self.args.output_dir)
        cut = processes.gather(self.model)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            adapters.save_checkpoint(self.accelerator.unwrap_model(self.model), folder)
            torch.save(self.args, folder / "training_args.bin")
        cut()

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # What is written next says that the checkpoint is whole, so everybody's part of it must be there.
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # they keep their shards themselves
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            adapters.load_checkpoint(self.accelerator.unwrap_model(self.model), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


class Clock(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Seconds inside optimizer steps; kept in checkpoints, so that a resumed run reports all of its time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self._begin = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start."""
        self._begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop."""
        self.seconds += time.perf_counter() - self._begin

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {"seconds": self.seconds}, "attributes": {}}


class Progress(TrainerCallback):  # type: ignore[misc]
    """One bar over optimizer steps with rate and time left, and one line for each validation."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar where a resumed run stands."""
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit=" steps")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Show the loss on the bar and validation metrics on a line of their own."""
        if self.bar is None or not logs:
            return
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.4f}")
        valid = {key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")}
        if valid:
            figures = "  ".join(f"{key} {value:.4f}" for key, value in valid.items())
            self.bar.write(f"step {state.global_step}: valid {figures}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()


def fit(
    model: Any,
    train_data: WindowDataset,
    valid_data: WindowDataset,
    target: Target,
    to_metrics: ToMetrics,
    *,
    train: config.Train,
    folder: Path,
    seed: int,
    resume: bool = False,
    alignment: align.Alignment | None = None,
) -> Fitted:
    """Train the adapter on `train_data`; afterwards the model holds the best validated weights.

    Args:
        model: PEFT model with an answer head, changed in place.
        train_data: packed training windows.
        valid_data: packed validation windows.
        target: what the head's outputs are trained to.
        to_metrics: turns validated rows and outputs into metrics; `loss` must be among them.
        train: the recipe's section.
        folder: checkpoints go to `folder/checkpoint-N`.
        seed: of data order and dropout.
        resume: continue from the newest whole checkpoint in `folder` if there is one.
        alignment: brings another domain nearer while the model learns; None is none.
    """
    # The checkpoints are removed when the run has ended; what a tracker writes to files stays.
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder.parent / "logs"))
    steps = total_steps(train, len(train_data))
    trainer = WindowTrainer(
        model=model,
        args=_arguments(train, steps, folder, seed),
        train_dataset=train_data,
        eval_dataset=valid_data,
        target=target,
        to_metrics=to_metrics,
        fgm_epsilon=train.fgm_epsilon,
        pairwise=train.pairwise,
        alignment=alignment,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress())
    trainer.add_callback(Clock())
    if adalora.is_adaptive(model):
        trainer.add_callback(adalora.RankSchedule())
    if train.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(train.early_stopping_patience))
    newest = _newest_checkpoint(folder) if resume else None
    if newest and processes.kind(newest) != trainer.kind:
        raise PeftrecError(
            f"{newest}: written by {processes.kind(newest)} training, this is {trainer.kind}; each has an optimizer's "
            "state of its own kind; resume with the accelerate settings that it began with, or add --overwrite"
        )
    averaged = train.average_checkpoints > 1
    with nullcontext() if alignment is None else alignment.attached(model):
        _run(trainer, newest, steps, folder)
        if averaged:
            adapters.average_checkpoints(trainer.accelerator.unwrap_model(trainer.model), _last(folder, train))
    (seconds,) = (c.seconds for c in trainer.callback_handler.callbacks if isinstance(c, Clock))
    passes = trainer.state.global_step / max(1, steps_per_epoch(train, len(train_data)))
    return Fitted(
        seconds=seconds,
        events=round(train_data.events * passes),
        tokens=round(train_data.tokens * passes),
        steps=trainer.state.global_step,
        best_step=None if averaged else trainer.state.best_global_step,
        log=[line for line in trainer.state.log_history if "train_runtime" not in line],  # Trainer's own summary
    )


def _run(trainer: WindowTrainer, newest: Path | None, steps: int, folder: Path) -> None:
    """Take the steps that are left behind the newest checkpoint."""
    try:
        if newest and _ended(newest, steps):
            trainer.restore(newest)
        else:
            trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    except (OSError, RuntimeError, SafetensorError) as error:
        # Each library has its own exception for a write that failed; what they have in common is the disk.
        if shutil.disk_usage(folder).free > LEAST_FREE:
            raise
        raise PeftrecError(
            f"{folder}: the disk is full, a checkpoint could not be written; free some space and repeat the command "
            "with --resume"
        ) from error


def arguments(how: config.Train, folder: Path, seed: int, **more: Any) -> TrainingArguments:
    """What the recipe's section shares with Trainer, and what follows from the machine; `more` is the caller's own."""
    return TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        use_cpu=not backbone.has_gpu(),
        remove_unused_columns=False,
        dataloader_pin_memory=backbone.has_gpu(),
        **{name: getattr(how, name) for name in TRAINERS},
        **more,
    )


def _arguments(train: config.Train, steps: int, folder: Path, seed: int) -> TrainingArguments:
    every = math.ceil(steps / (train.evals or 4))  # Trainer adds a pass at the end where none falls there
    return arguments(
        train,
        folder,
        seed,
        gradient_accumulation_steps=train.gradient_accumulation_steps // processes.group().num_processes,
        torch_compile=train.torch_compile,
        eval_strategy="steps" if train.evals else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=1 + train.average_checkpoints,  # the best one is kept beside the last ones
        load_best_model_at_end=train.evals > 0,
        metric_for_best_model=train.metric_for_best_model if train.evals else None,
        greater_is_better=train.metric_for_best_model in ("auc", "uauc"),
        restore_callback_states_from_checkpoint=True,
        disable_tqdm=True,
        bf16=os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16",  # DeepSpeed wants both to say the same
        ddp_find_unused_parameters=False,  # an adapter has none
        ddp_broadcast_buffers=False,  # nothing writes to them
    )


def steps_per_epoch(train: config.Train, rows: int) -> int:
    """Optimizer steps in one pass over `rows` packed rows, however many processes share them."""
    return max(1, math.ceil(rows / (train.per_device_train_batch_size * train.gradient_accumulation_steps)))


def total_steps(train: config.Train, rows: int) -> int:
    """Optimizer steps of the whole run."""
    if train.max_steps > 0:
        return train.max_steps
    return max(1, math.ceil(train.num_train_epochs * steps_per_epoch(train, rows)))


def _whole_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that were written to their end, the oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if _state(path)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _newest_checkpoint(folder: Path) -> Path | None:
    return next(reversed(_whole_checkpoints(folder)), None)


def _last(folder: Path, train: config.Train) -> list[Path]:
    """The checkpoints to average; fewer than asked for where the run was too short or stopped early."""
    return _whole_checkpoints(folder)[-train.average_checkpoints :]


def _state(checkpoint: Path) -> dict[str, Any]:
    """What Trainer writes last into a checkpoint; empty where it is missing or cut short."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    except (OSError, ValueError):
        return {}
    return state


def _ended(checkpoint: Path, steps: int) -> bool:
    """Whether no step is to follow: all are done, or early stopping had ended the run."""
    state = _state(checkpoint)
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
    # Trainer also asks to stop after the last step that was planned; then there may be more steps to do by now.
    stopped_early = control.get("should_training_stop") and state["global_step"] < state["max_steps"]
    return state["global_step"] >= steps or bool(stopped_early)
