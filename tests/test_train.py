"""Training: the loss is a mean over events, the base stays, the best weights stay, and a killed run can go on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from peftrec import adapters, config, scorer
from peftrec import train as training
from peftrec.augment import Augment
from peftrec.sight import evaluation_sight, training_sight
from peftrec.split import Log
from peftrec.target import Target
from peftrec.timeline import TimelineWindows, WindowDataset, collate

TRAIN = config.Train(
    max_steps=4,
    evals=2,
    learning_rate=1e-2,
    lr_scheduler_type="constant",
    warmup_steps=0,
    gradient_accumulation_steps=1,
    logging_steps=1,
)


def changed(**options: Any) -> config.Train:
    import dataclasses

    return dataclasses.replace(TRAIN, **options)


def mean_loss(log: Log) -> training.ToMetrics:
    def to_metrics(rows: np.ndarray, outputs: np.ndarray) -> dict[str, float]:
        assert len(set(rows.tolist())) == len(rows) == (log.split == 1).sum()
        return {"loss": Target().mean_loss(outputs, None, log.label[rows])}

    return to_metrics


class Scripted:
    """Validation losses as told, one for each pass; an exception in the list is raised."""

    def __init__(self, *losses: float | Exception) -> None:
        self.losses, self.passes = losses, 0

    def __call__(self, rows: np.ndarray, outputs: np.ndarray) -> dict[str, float]:
        loss = self.losses[self.passes]
        self.passes += 1
        if isinstance(loss, Exception):
            raise loss
        return {"loss": loss}


@pytest.fixture(scope="session")
def log(make_random_log: Callable[..., Log]) -> Log:
    return make_random_log(11, users=6, events=10)


def train_data(log: Log, codec: Any, questions: Any, tokens: int = 150) -> WindowDataset:
    windows = TimelineWindows(log, codec, questions, training_sight(log), max_tokens=tokens, overlap=0, fill=False)
    return WindowDataset(windows, log.label, None, tokens)


def valid_data(log: Log, codec: Any, questions: Any, tokens: int = 300) -> WindowDataset:
    sight = evaluation_sight(log, np.flatnonzero(log.split == 1), streaming=True)
    windows = TimelineWindows(log, codec, questions, sight, max_tokens=tokens, overlap=0, fill=True)
    return WindowDataset(windows, log.label, None, tokens)


@pytest.fixture
def fit(
    load_tiny: Callable[..., Any], tiny_llama_folder: Path, log: Log, codec: Any, questions: Any
) -> Callable[..., tuple[Any, training.Fitted]]:
    """Train a fresh adapter on the tiny Llama: (model, what training was)."""

    def run(
        folder: Path,
        train: config.Train = TRAIN,
        to_metrics: Any = None,
        *,
        data: WindowDataset | None = None,
        dropout: float = 0.0,
        resume: bool = False,
    ) -> tuple[Any, training.Fitted]:
        adapter = config.Adapter(r=4, lora_dropout=dropout)
        model = adapters.attach(load_tiny(tiny_llama_folder), adapter, base_name="tiny", seed=3)
        fitted = training.fit(
            model,
            data or train_data(log, codec, questions),
            valid_data(log, codec, questions),
            Target(),
            to_metrics or mean_loss(log),
            train=train,
            folder=folder,
            seed=3,
            resume=resume,
        )
        return model, fitted

    return run


def losses(fitted: training.Fitted) -> list[tuple[float, float]]:
    return [(entry["step"], entry["loss"]) for entry in fitted.log if "loss" in entry]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{step}" / adapters.CHECKPOINT)


def adapter_of(model: Any) -> dict[str, torch.Tensor]:
    return adapters.training_state(model)


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_base_weights_stay_bit_identical(
    fit: Callable[..., Any], load_tiny: Callable[..., Any], tiny_llama_folder: Path, tmp_path: Path
) -> None:
    model, _ = fit(tmp_path)
    before = {
        **dict(load_tiny(tiny_llama_folder).named_parameters()),
        **dict(load_tiny(tiny_llama_folder).named_buffers()),
    }
    after = {**dict(model.get_base_model().named_parameters()), **dict(model.get_base_model().named_buffers())}
    after = {name.replace(".base_layer", ""): tensor for name, tensor in after.items() if "lora_" not in name}
    assert equal(before, after)


def test_resumed_within_a_later_epoch_draws_that_epochs_forms(
    fit: Callable[..., Any], tmp_path: Path, log: Log, codec: Any, questions: Any
) -> None:
    def data() -> WindowDataset:
        found = train_data(log, codec, questions)
        assert isinstance(found.windows, TimelineWindows)
        found.windows.vary(Augment(seed=3, history_dropout=0.5))
        return found

    steps = 2 * len(data())
    train, falling = changed(max_steps=steps, evals=steps), [1 / (1 + k) for k in range(steps)]
    _, expected = fit(tmp_path / "whole", train, Scripted(*falling), data=data())
    middle = len(data()) + 1
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "killed", train, Scripted(*falling[:middle], ZeroDivisionError()), data=data())
    assert len(data()) < middle < steps - 1, "in the middle of the second epoch"
    _, found = fit(tmp_path / "killed", train, Scripted(*falling[middle:]), data=data(), resume=True)
    assert losses(found) == losses(expected)


def test_adapter_learns(fit: Callable[..., Any], tmp_path: Path, log: Log, codec: Any, questions: Any) -> None:
    easy = train_data(log, codec, questions)
    easy.label = (log.item % 2).astype(np.int8)
    _, fitted = fit(tmp_path, changed(max_steps=40, evals=0), data=easy)
    found = [loss for _, loss in losses(fitted)]
    assert np.mean(found[-5:]) < 0.7 * np.mean(found[:5])


def test_what_training_was(fit: Callable[..., Any], tmp_path: Path, log: Log, codec: Any, questions: Any) -> None:
    data = train_data(log, codec, questions)
    _, fitted = fit(tmp_path, changed(max_steps=-1, num_train_epochs=2))
    assert fitted.steps == 2 * len(data) == training.total_steps(changed(max_steps=-1, num_train_epochs=2), len(data))
    assert fitted.events == 2 * data.events == 2 * (log.split == 0).sum()
    assert fitted.tokens == 2 * data.tokens
    assert fitted.events_per_second == pytest.approx(fitted.events / fitted.seconds)
    assert [entry["step"] for entry in fitted.log if "eval_loss" in entry][-1] == fitted.steps


def test_weight_decay_by_hand(
    fit: Callable[..., Any], tmp_path: Path, load_tiny: Callable[..., Any], tiny_llama_folder: Path
) -> None:
    """One step of AdamW takes learning_rate * weight_decay of each weight away, beside what the gradient says."""
    start = adapters.attach(load_tiny(tiny_llama_folder), config.Adapter(r=4), base_name="tiny", seed=3)
    step = {"max_steps": 1, "evals": 0, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    (plain, _), (decayed, _) = (fit(tmp_path / str(w), changed(**step, weight_decay=w)) for w in (0.0, 0.5))
    for name, before in adapter_of(start).items():
        expected = adapter_of(plain)[name] - 1e-2 * 0.5 * before
        assert torch.allclose(adapter_of(decayed)[name], expected, atol=1e-6), name


def test_steps() -> None:
    two = config.Train(per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=2)
    assert training.steps_per_epoch(two, 10) == 3
    assert training.total_steps(two, 10) == 6
    assert training.total_steps(config.Train(num_train_epochs=0.5, gradient_accumulation_steps=4), 12) == 2
    assert training.total_steps(config.Train(max_steps=7), 10) == 7
    assert training.steps_per_epoch(config.Train(), 1) == 1


def test_rate_of_no_time() -> None:
    assert math.isnan(training.Fitted(0.0, 5, 5, 1, None).events_per_second)
    assert training.Fitted(2.0, 5, 5, 1, None).events_per_second == 2.5


class TestBestCheckpoint:
    def test_best_weights_are_put_back(self, fit: Callable[..., Any], tmp_path: Path) -> None:
        model, fitted = fit(tmp_path, changed(evals=4), Scripted(0.9, 0.5, 0.7, 0.8))
        assert fitted.best_step == 2
        assert equal(adapter_of(model), weights(tmp_path, 2))
        assert not equal(weights(tmp_path, 2), weights(tmp_path, 4))

    def test_an_auc_is_better_when_greater(self, fit: Callable[..., Any], tmp_path: Path) -> None:
        scripted = Scripted(0.6, 0.8, 0.7, 0.7)
        _, fitted = fit(
            tmp_path,
            changed(evals=4, metric_for_best_model="auc"),
            lambda rows, scores: {"loss": 1.0, "auc": scripted(rows, scores)["loss"]},
        )
        assert fitted.best_step == 2

    def test_stops_early(self, fit: Callable[..., Any], tmp_path: Path) -> None:
        _, fitted = fit(tmp_path, changed(evals=4, early_stopping_patience=1), Scripted(0.5, 0.6))
        assert fitted.steps == 2
        assert fitted.best_step == 1

    def test_no_validation_keeps_the_last(self, fit: Callable[..., Any], tmp_path: Path) -> None:
        model, fitted = fit(tmp_path, changed(evals=0), Scripted())
        assert fitted.best_step is None
        assert equal(adapter_of(model), weights(tmp_path, 4))

    def test_the_last_checkpoints_averaged(self, fit: Callable[..., Any], tmp_path: Path) -> None:
        train = changed(max_steps=4, evals=4, average_checkpoints=2)
        model, fitted = fit(tmp_path, train, Scripted(0.3, 0.5, 0.6, 0.7))
        assert fitted.best_step is None
        third, last, mine = weights(tmp_path, 3), weights(tmp_path, 4), adapter_of(model)
        assert any(not torch.equal(third[name], last[name]) for name in third)
        for name in mine:
            assert torch.allclose(mine[name], (third[name] + last[name]) / 2, atol=1e-7), name
        again, found = fit(tmp_path, train, Scripted(), resume=True)  # died after its last checkpoint
        assert (found, equal(adapter_of(again), mine)) == (fitted, True)

    def test_validation_passes_asked_for_the_last_one_at_the_end(self, fit: Callable[..., Any], tmp_path: Path) -> None:
        for steps, evals in ((4, 4), (7, 4), (5, 2), (2, 4)):
            scripted = Scripted(*[0.5] * 10)
            fit(tmp_path / f"{steps}-{evals}", changed(max_steps=steps, evals=evals), scripted)
            assert scripted.passes == min(steps, evals)


class TestResume:
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_killed_and_resumed_equals_never_killed(
        self, fit: Callable[..., Any], tmp_path: Path, log: Log, dropout: float
    ) -> None:
        train = changed(max_steps=6, evals=3, lr_scheduler_type="cosine", warmup_steps=2)
        whole, expected = fit(tmp_path / "whole", train, dropout=dropout)

        passes = 0

        def dies(rows: np.ndarray, scores: np.ndarray) -> dict[str, float]:
            nonlocal passes
            passes += 1
            if passes == 2:
                raise KeyboardInterrupt
            return mean_loss(log)(rows, scores)

        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "killed", train, dies, dropout=dropout)
        assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-2"]
        resumed, found = fit(tmp_path / "killed", train, dropout=dropout, resume=True)

        assert losses(found) == losses(expected)
        assert len(losses(found)) == 6
        assert equal(weights(tmp_path / "killed", 6), weights(tmp_path / "whole", 6))
        assert equal(adapter_of(resumed), adapter_of(whole))
        assert (found.steps, found.events, found.best_step) == (expected.steps, expected.events, expected.best_step)

    def test_forms_of_windows_are_drawn_again(
        self, fit: Callable[..., Any], tmp_path: Path, log: Log, codec: Any, questions: Any
    ) -> None:
        """Several epochs with hidden and moved events: what follows a kill is drawn as it would have been."""
        augment = Augment(seed=3, history_dropout=0.4, shuffle_within=2)
        train, passes = changed(max_steps=9, evals=3), 0

        def data() -> WindowDataset:
            made = train_data(log, codec, questions)
            made.windows.vary(augment)
            return made

        def dies(rows: np.ndarray, scores: np.ndarray) -> dict[str, float]:
            nonlocal passes
            passes += 1
            if passes == 2:
                raise KeyboardInterrupt
            return mean_loss(log)(rows, scores)

        _, plain = fit(tmp_path / "plain", train)
        _, expected = fit(tmp_path / "whole", train, data=data())
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "killed", train, dies, data=data())
        _, found = fit(tmp_path / "killed", train, data=data(), resume=True)
        assert losses(found) == losses(expected)
        assert losses(found) != losses(plain)

    @pytest.mark.parametrize("patience", [None, 1], ids=["all steps done", "stopped early"])
    def test_a_run_that_had_ended_takes_no_further_step(
        self, fit: Callable[..., Any], tmp_path: Path, log: Log, patience: int | None
    ) -> None:
        """A run can die after its last checkpoint: while it scores the test rows, say."""

        def worse(rows: np.ndarray, scores: np.ndarray) -> dict[str, float]:
            nonlocal passes
            passes += 1
            return {**mean_loss(log)(rows, scores), "loss": float(passes)}

        passes = 0
        train = changed(max_steps=7, evals=4, early_stopping_patience=patience)
        model, expected = fit(tmp_path, train, worse)
        passed = passes
        again, found = fit(tmp_path, train, worse, resume=True)
        assert passes == passed
        assert found == expected
        assert found.steps == (7 if patience is None else 4)
        assert found.best_step == 2
        assert equal(adapter_of(again), adapter_of(model))

    def test_dropout_matters_here(self, fit: Callable[..., Any], tmp_path: Path) -> None:
        without, with_dropout = (fit(tmp_path / str(p), dropout=p)[1] for p in (0.0, 0.3))
        assert losses(without) != losses(with_dropout)

    def test_a_checkpoint_that_was_not_finished_is_passed_over(self, fit: Callable[..., Any], tmp_path: Path) -> None:
        fit(tmp_path, changed(max_steps=2, evals=1))
        (tmp_path / "checkpoint-3").mkdir()
        assert training._newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
        _, fitted = fit(tmp_path, changed(max_steps=4, evals=1), resume=True)
        assert fitted.steps == 4

    def test_nothing_to_resume_starts_anew(self, fit: Callable[..., Any], tmp_path: Path) -> None:
        assert fit(tmp_path / "none", resume=True)[1].steps == 4


class TestAccumulation:
    """One optimizer step over four rows with different numbers of events."""

    def gradients(self, monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> dict[str, torch.Tensor]:
        caught: list[dict[str, torch.Tensor]] = []

        def keep(self: Any, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            caught.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

        monkeypatch.setattr(training.Progress, "on_pre_optimizer_step", keep)
        run()
        assert len(caught) == 1
        return caught[0]

    @pytest.mark.parametrize("pairwise", [0.0, 1.0])
    def test_four_rows_one_by_one_equal_four_at_once_equal_all_events(
        self,
        pairwise: float,
        monkeypatch: pytest.MonkeyPatch,
        fit: Callable[..., Any],
        load_tiny: Callable[..., Any],
        tiny_llama_folder: Path,
        tmp_path: Path,
        log: Log,
        codec: Any,
        questions: Any,
    ) -> None:
        data = train_data(log, codec, questions, 170)
        data.rows = [*(data.rows[i] for i in range(3)), data.rows[3][:1]]
        assert len({sum(r >= 0 for r in data[i]["row"]) for i in range(4)}) > 1
        found = []
        for batch, steps in ((1, 4), (4, 1)):
            options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
            train = changed(max_steps=1, evals=0, max_grad_norm=0.0, pairwise=pairwise, **options)
            found.append(
                self.gradients(
                    monkeypatch,
                    lambda train=train, batch=batch: fit(tmp_path / str(batch), train, data=data),  # type: ignore[misc]
                )
            )
        adapter = config.Adapter(r=4)
        model = adapters.attach(load_tiny(tiny_llama_folder), adapter, base_name="tiny", seed=3)
        batch_of_all = collate([data[i] for i in range(4)])
        events = int((batch_of_all["labels"] >= 0).sum())
        scorer.interaction_loss(model, batch_of_all, torch.float32, Target(), events, pairwise=pairwise).backward()
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for gradients in found:
            assert gradients.keys() == expected.keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-3)


class TestScore:
    def test_every_row_once_in_order_without_the_prior(
        self, tiny_model: Any, log: Log, codec: Any, questions: Any
    ) -> None:
        data = valid_data(log, codec, questions)
        rows, scores = training.score(tiny_model, data, description="valid")
        assert rows.tolist() == np.flatnonzero(log.split == 1).tolist()
        data.prior = np.full(len(log.user), 3.0, dtype=np.float32)
        np.testing.assert_array_equal(training.score(tiny_model, data, description="valid")[1], scores)

    def test_leaves_the_model_in_its_mode(self, tiny_model: Any, log: Log, codec: Any, questions: Any) -> None:
        data = valid_data(log, codec, questions)
        tiny_model.train()
        training.score(tiny_model, data, description="valid")
        assert tiny_model.training
        tiny_model.eval()


def with_likes(log: Log, codec: Any, questions: Any, tokens: int) -> WindowDataset:
    """Packed windows of several people with a prior; every other event is liked."""
    data = train_data(log, codec, questions, tokens)
    data.label = (np.arange(len(log)) % 2).astype(np.int8)
    data.prior = np.linspace(-1, 1, len(log)).astype(np.float32)
    return data


def test_pairs_are_made_within_windows_however_they_are_packed(
    tiny_model: Any, log: Log, codec: Any, questions: Any
) -> None:
    data = with_likes(log, codec, questions, 300)
    assert max(map(len, data.rows)) > 1
    events = data.events

    def loss(rows: list[Any], **weight: float) -> float:
        return float(scorer.interaction_loss(tiny_model, collate(rows), torch.float32, Target(), events, **weight))

    with torch.no_grad():
        plain = [loss([data[i]]) for i in range(len(data))]
        assert [loss([data[i]], pairwise=0.0) for i in range(len(data))] == plain
        packed = [loss([data[i]], pairwise=2.0) for i in range(len(data))]
        # As one batch, and each window in a row of its own.
        assert loss([data[i] for i in range(len(data))], pairwise=2.0) == pytest.approx(sum(packed), rel=1e-5)
        alone = [loss([data._row([i])], pairwise=2.0) for i in range(len(data.windows))]
        assert sum(alone) == pytest.approx(sum(packed), rel=1e-5)
        by_hand = 0.0
        for i in range(len(data.windows)):
            row = data._row([i])
            batch, read = collate([row]), row["labels"] >= 0
            outputs = scorer.read_outputs(tiny_model, batch, torch.float32).numpy()
            score = outputs[:, 1] - outputs[:, 0] + row["prior"][read]
            gaps = [
                a - b
                for a, x in zip(score, row["labels"][read], strict=True)
                if x == 1
                for b, y in zip(score, row["labels"][read], strict=True)
                if y == 0
            ]
            by_hand += read.sum() * np.mean(np.log1p(np.exp(-np.array(gaps)))) if gaps else 0.0
        assert by_hand > 1
    assert sum(packed) - sum(plain) == pytest.approx(2 * by_hand / events, rel=1e-4)


def test_the_recipe_says_how_much_pairs_weigh(
    fit: Callable[..., Any], tmp_path: Path, log: Log, codec: Any, questions: Any
) -> None:
    data = with_likes(log, codec, questions, 300)
    one_step = {"max_steps": 1, "evals": 0, "gradient_accumulation_steps": len(data)}
    plain, off, paired = (
        losses(fit(tmp_path / str(number), changed(**one_step, **weight), data=data)[1])[0][1]
        for number, weight in enumerate(({}, {"pairwise": 0.0}, {"pairwise": 3.0}))
    )
    assert plain == off
    assert paired > plain + 0.5
