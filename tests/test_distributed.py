"""Several processes: the same steps, losses and metrics as one, and checkpoints that either can continue.

This file is also what the processes run: `accelerate launch … tests/test_distributed.py JOBS.json`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conftest
import numpy as np
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file

from peftrec import adapters, align, backbone, config, processes, prompts, scorer, side, side_vectors
from peftrec import train as training
from peftrec.errors import ConfigError, PeftrecError
from peftrec.side_vectors import MarkedWindows
from peftrec.sight import evaluation_sight, training_sight
from peftrec.split import Log
from peftrec.target import Target
from peftrec.timeline import TimelineWindows, WindowDataset

ROOT = Path(__file__).parents[1]
SETTINGS = ROOT / "recipes" / "accelerate"
# Steps of two rows, shared by up to two processes; 7 rows make 4 steps an epoch, the last one of a single row.
TRAIN = config.Train(
    num_train_epochs=2,
    evals=2,
    learning_rate=1e-2,
    lr_scheduler_type="cosine",
    warmup_steps=2,
    gradient_accumulation_steps=2,
    logging_steps=1,
)
ROWS = 7


def a_log() -> Log:
    return conftest.random_log(11, users=8, events=10)


def datasets(log: Log, codec: Any, beside: Any = None) -> tuple[WindowDataset, WindowDataset]:
    questions = prompts.Pieces.of(codec.questions(conftest.TITLES, 64))
    known = evaluation_sight(log, np.flatnonzero(log.split == 1), streaming=True)
    found = []
    for sight, tokens, fill in ((training_sight(log), 170, False), (known, 300, True)):
        windows = TimelineWindows(log, codec, questions, sight, max_tokens=tokens, overlap=0, fill=fill)
        if beside:
            windows = MarkedWindows(windows, beside.evaluation if fill else beside.training)
        found.append(WindowDataset(windows, log.label, None, tokens))
    learned, valid = found
    rows = list(learned.rows)[:ROWS]
    learned.rows = prompts.Pieces.of([*rows[:-1], rows[-1][:1]])  # the last one is short
    return learned, valid


def measure(log: Log, target: Target) -> training.ToMetrics:
    def to_metrics(rows: np.ndarray, outputs: np.ndarray) -> dict[str, float]:
        assert rows.tolist() == np.flatnonzero(log.split == 1).tolist(), "each valid row once"
        score, _ = target.measure(outputs)
        return {"loss": float(np.logaddexp(0, np.where(log.label[rows] == 1, -score, score)).mean())}

    return to_metrics


def do(base: Path, folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Train an adapter on the tiny model (or only score with it); the main process writes what came out of it."""
    name, dtype = job["name"], job.get("dtype", "float32")
    target = Target(head=job.get("head", "tokens"))
    loaded = backbone.load(config.Model(name=str(base), dtype=dtype), target)
    codec = prompts.Codec(loaded.tokenizer, conftest.HEADER, [" no", " yes"])
    model = scorer.with_head(loaded.model, target.head, codec.answers)
    how = config.Adapter(**job.get("adapter", {"r": 4, "lora_dropout": job.get("dropout", 0.0)}))
    model = adapters.attach(model, how, base_name="tiny", seed=3, steps=8)
    log = a_log()
    beside = None
    if job.get("side"):
        recipe = config.Recipe(
            data=config.Data(name="ml-100k"), side=config.Side(als=True, dropout=0.0), output_dir="x"
        )
        beside = side_vectors.of_run(log, recipe)
        side.attach(model, beside, recipe.side, 2, seed=3)
    learned, valid = datasets(log, codec, beside)
    alignment = None
    if job.get("align"):
        beside_them, _ = datasets(conftest.random_log(5, users=6), codec)
        alignment = align.Alignment(config.Align(kind=job["align"]), beside_them, 3)
    state = processes.group()
    found: dict[str, Any] = {}
    if job.get("train") is not None:
        gradients: list[dict[str, torch.Tensor]] = []

        class Keep(training.Progress):
            def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
                named = model.named_parameters()
                gradients.append({key.removeprefix("module."): p.grad.clone() for key, p in named if p.requires_grad})

        with pytest.MonkeyPatch.context() as patch:
            if job.get("gradients"):
                patch.setattr(training, "Progress", Keep)
            fitted = training.fit(
                model,
                learned,
                valid,
                target,
                measure(log, target),
                train=dataclasses.replace(TRAIN, **job["train"]),
                folder=folder / name,
                seed=3,
                resume=job.get("resume", False),
                alignment=alignment,
            )
        found |= {"log": fitted.log, "steps": fitted.steps, "events": fitted.events}
        if gradients and state.is_main_process:
            torch.save(gradients, folder / f"{name}.gradients")
    else:
        torch.manual_seed(7)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:  # so that the adapter does something
                torch.nn.init.normal_(parameter, std=0.1)
    rows, outputs = training.score(model, valid, description="score", processes=state)
    found |= {"world": state.num_processes, "kind": str(state.distributed_type), "rows": rows.tolist()}
    found |= {"outputs": outputs.tolist()}
    processes.gather(model)
    if state.is_main_process:
        adapters.save(model, folder / f"{name}.adapter")
        (folder / f"{name}.json").write_text(json.dumps(found))
    state.wait_for_everyone()
    return found


def work(path: Path) -> None:
    plan = json.loads(path.read_text())
    backbone.quiet()
    for job in plan["jobs"]:
        do(Path(plan["base"]), Path(plan["folder"]), job)
    processes.group().destroy_process_group()


def launch(settings: str, base: Path, folder: Path, *jobs: dict[str, Any]) -> None:
    """Do the jobs in the processes that accelerate starts for `recipes/accelerate/{settings}.yaml`."""
    plan = folder / "jobs.json"
    plan.write_text(json.dumps({"base": str(base), "folder": str(folder), "jobs": jobs}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(SETTINGS / f"{settings}.yaml")]
    done = subprocess.run(
        [*command, "--main_process_port", "0", __file__, str(plan)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def read(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


def logged(found: dict[str, Any], key: str) -> list[float]:
    return [entry[key] for entry in found["log"] if key in entry]


def saved(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.adapter" / "adapter_model.safetensors")


# Adam divides by the gradient's size, so that the last digit of a sum near zero counts as much as a large gradient.
SUMS = 1e-3


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    """Equal up to `tolerance` of the largest number."""
    assert ours.keys() == theirs.keys()
    largest = max(float(one.abs().max()) for one in theirs.values())
    assert largest > 0
    for key, one in ours.items():
        torch.testing.assert_close(one, theirs[key], rtol=0, atol=tolerance * largest)


def forget_second_half(folder: Path) -> None:
    """Make of a whole run one that was killed after its first checkpoint."""
    first, last = sorted(folder.glob("checkpoint-*"))
    assert (first.name, last.name) == ("checkpoint-4", "checkpoint-8")
    shutil.rmtree(last)


WHOLE: dict[str, Any] = {"train": {}}
STEP: dict[str, Any] = {"gradients": True, "train": {"max_steps": 1, "evals": 0, "max_grad_norm": 0.0}}


METHODS: dict[str, dict[str, Any]] = {
    "dora": {"adapter": {"variant": "dora", "r": 4}},
    "pissa": {"adapter": {"variant": "pissa", "r": 4}},
    "adalora": {"adapter": {"method": "adalora", "init_r": 6, "target_r": 3, "tinit": 1, "tfinal": 1, "deltaT": 1}},
    "bottleneck": {"adapter": {"method": "bottleneck"}},
    "prefix": {"adapter": {"method": "prefix", "prefix_projection": True, "encoder_hidden_size": 8}},
    "prompt": {"adapter": {"method": "prompt"}, "train": {"gradient_checkpointing": True}},
    "p_tuning": {"adapter": {"method": "p_tuning", "encoder_hidden_size": 8}},
    "ia3": {"adapter": {"method": "ia3"}},
    "ln_tuning": {"adapter": {"method": "ln_tuning"}},
    "full": {"adapter": {"method": "full"}},
    "side": {"side": True},
    "coral": {"align": "coral"},
    "mmd": {"align": "mmd"},
    "adversarial": {"align": "adversarial"},
    "cpc": {"align": "cpc", "train": {"gradient_checkpointing": True}},
    # A trained head is a whole module of its own (modules_to_save).
    "head": {"head": "classifier", "train": {"gradient_checkpointing": True}},
}
SHARDED = [
    name for name in METHODS if name not in ("adalora", "side") and "align" not in METHODS[name]
]  # refused: tests/test_compatibility.py


def method_jobs(names: Iterable[str]) -> list[dict[str, Any]]:
    return [{"train": {}, **METHODS[name], "name": name} for name in names]


def assert_same_run(ours: Path, theirs: Path, name: str) -> None:
    """Losses, and scores at the end, of a run by two processes and by one."""
    losses = logged(read(theirs, name), "loss")
    assert len(losses) == 8
    assert np.ptp(losses) > 0.01
    np.testing.assert_allclose(logged(read(ours, name), "loss"), losses, rtol=1e-4)
    np.testing.assert_allclose(read(ours, name)["outputs"], read(theirs, name)["outputs"], rtol=0, atol=2e-4)


@pytest.fixture(scope="session")
def one(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process finds."""
    folder = tmp_path_factory.mktemp("one")
    do(tiny_llama_folder, folder, {"name": "score"})
    do(tiny_llama_folder, folder, {"name": "whole", **WHOLE})
    for job in method_jobs(METHODS):
        do(tiny_llama_folder, folder, job)
    return folder


@pytest.fixture(scope="session")
def two(tiny_llama_folder: Path, one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes find, which also continue what one had begun."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(one / "whole", folder / "resumed")
    forget_second_half(folder / "resumed")
    launch(
        "multi_cpu",
        tiny_llama_folder,
        folder,
        {"name": "score"},
        {"name": "whole", **WHOLE},
        {"name": "resumed", **WHOLE, "resume": True},
        {"name": "checkpointed", "train": {"gradient_checkpointing": True}},
        {**STEP, "name": "step", "train": {**STEP["train"], "gradient_accumulation_steps": 4}},
        *method_jobs(METHODS),
    )
    return folder


@pytest.fixture(scope="session")
def shards(tiny_llama_folder: Path, one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes find that share the model's weights."""
    folder = tmp_path_factory.mktemp("shards")
    launch("fsdp2", tiny_llama_folder, folder, {"name": "whole", **WHOLE}, *method_jobs(SHARDED))
    shutil.copytree(folder / "whole", folder / "resumed")
    forget_second_half(folder / "resumed")
    shutil.copytree(folder / "whole", folder / "again")
    launch(
        "fsdp2",
        tiny_llama_folder,
        folder,
        {"name": "resumed", **WHOLE, "resume": True},
        {"name": "again", **WHOLE, "resume": True},
    )
    return folder


class TestTwoProcesses:
    def test_there_are_two(self, one: Path, two: Path) -> None:
        assert read(one, "whole")["world"] == 1
        assert read(two, "whole")["world"] == 2
        assert read(two, "whole")["kind"].endswith("MULTI_CPU")

    def test_scores_of_the_same_weights_are_the_same(self, one: Path, two: Path) -> None:
        ours, theirs = read(two, "score"), read(one, "score")
        assert ours["rows"] == theirs["rows"] == np.flatnonzero(a_log().split == 1).tolist()
        np.testing.assert_allclose(ours["outputs"], theirs["outputs"], rtol=0, atol=1e-6)
        assert np.ptp(theirs["outputs"]) > 0.1

    def test_training_is_that_of_one(self, one: Path, two: Path) -> None:
        ours, theirs = read(two, "whole"), read(one, "whole")
        assert ours["steps"] == theirs["steps"] == 8
        assert ours["events"] == theirs["events"]
        for key in ("loss", "eval_loss"):
            assert len(logged(ours, key)) == len(logged(theirs, key)) == {"loss": 8, "eval_loss": 2}[key]
            np.testing.assert_allclose(logged(ours, key), logged(theirs, key), rtol=1e-5)
        assert_close(saved(two, "whole"), saved(one, "whole"), SUMS)

    def test_a_run_of_one_goes_on_with_two(self, one: Path, two: Path) -> None:
        ours, theirs = read(two, "resumed"), read(one, "whole")
        assert logged(ours, "loss")[:4] == logged(theirs, "loss")[:4]
        np.testing.assert_allclose(logged(ours, "loss"), logged(theirs, "loss"), rtol=1e-5)
        assert_close(saved(two, "resumed"), saved(one, "whole"), SUMS)

    def test_a_run_of_two_goes_on_with_one(self, tiny_llama_folder: Path, one: Path, two: Path, tmp_path: Path) -> None:
        shutil.copytree(two / "whole", tmp_path / "resumed")
        forget_second_half(tmp_path / "resumed")
        ours = do(tiny_llama_folder, tmp_path, {"name": "resumed", **WHOLE, "resume": True})
        theirs = read(one, "whole")
        assert logged(ours, "loss")[:4] == logged(read(two, "whole"), "loss")[:4]
        np.testing.assert_allclose(logged(ours, "loss"), logged(theirs, "loss"), rtol=1e-5)
        assert_close(saved(tmp_path, "resumed"), saved(one, "whole"), SUMS)

    def test_a_step_weighs_events_however_it_is_cut(self, tiny_llama_folder: Path, two: Path, tmp_path: Path) -> None:
        """Four rows one after the other, four at once, and two by two processes: the same gradients."""
        (shared,) = torch.load(two / "step.gradients")
        for batch, passes in ((1, 4), (4, 1), (2, 2)):
            name = f"{batch}x{passes}"
            options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": passes}
            do(tiny_llama_folder, tmp_path, {**STEP, "name": name, "train": {**STEP["train"], **options}})
            (alone,) = torch.load(tmp_path / f"{name}.gradients")
            assert_close(alone, shared, 1e-6)

    def test_passes_that_cannot_be_shared_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Three:
            num_processes = 3

        recipe = config.Recipe(data=config.Data(name="ml-100k"), output_dir="x")
        processes.check(recipe)
        monkeypatch.setattr(processes, "group", Three)
        with pytest.raises(ConfigError, match="gradient_accumulation_steps: 4; 3 processes share"):
            processes.check(dataclasses.replace(recipe, train=config.Train(gradient_accumulation_steps=4)))

    @pytest.mark.parametrize("name", METHODS)
    def test_every_method_trains_as_in_one(self, one: Path, two: Path, name: str) -> None:
        assert_same_run(two, one, name)


class TestShards:
    """FSDP2: each process keeps half of every weight."""

    @pytest.mark.parametrize("name", SHARDED)
    def test_every_method_trains_as_in_one(self, one: Path, shards: Path, name: str) -> None:
        assert_same_run(shards, one, name)

    def test_training_is_that_of_one(self, one: Path, shards: Path) -> None:
        ours, theirs = read(shards, "whole"), read(one, "whole")
        assert (ours["world"], ours["kind"]) == (2, "DistributedType.FSDP")
        for key in ("loss", "eval_loss"):
            np.testing.assert_allclose(logged(ours, key), logged(theirs, key), rtol=1e-5)
        np.testing.assert_allclose(ours["outputs"], theirs["outputs"], rtol=0, atol=1e-4)

    def test_the_adapter_is_saved_whole(self, one: Path, shards: Path) -> None:
        assert_close(saved(shards, "whole"), saved(one, "whole"), SUMS)
        ours, theirs = (load_file(run / "whole" / "checkpoint-8" / adapters.CHECKPOINT) for run in (shards, one))
        assert_close(ours, theirs, SUMS)

    def test_it_goes_on(self, one: Path, shards: Path) -> None:
        assert read(shards, "resumed")["log"][:5] == read(shards, "whole")["log"][:5]
        ours, theirs = (logged(read(*run), "loss") for run in ((shards, "resumed"), (one, "whole")))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        assert_close(saved(shards, "resumed"), saved(one, "whole"), SUMS)

    def test_a_run_that_had_ended_is_only_taken_over(self, shards: Path) -> None:
        assert read(shards, "again") == read(shards, "whole")
        assert_close(saved(shards, "again"), saved(shards, "whole"), 0)

    def test_another_kind_of_run_does_not_take_it_over(
        self, tiny_llama_folder: Path, shards: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(shards / "whole", tmp_path / "whole")
        with pytest.raises(PeftrecError, match="checkpoint-8: written by fsdp training, this is plain"):
            do(tiny_llama_folder, tmp_path, {"name": "whole", **WHOLE, "resume": True})


class TestFlags:
    """What makes training cheaper leaves it what it is."""

    def test_gradient_checkpointing(
        self, tiny_llama_folder: Path, one: Path, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from transformers.models.llama.modeling_llama import LlamaMLP

        calls, forward = 0, LlamaMLP.forward

        def counted(*args: Any) -> Any:
            nonlocal calls
            calls += torch.is_grad_enabled()
            return forward(*args)

        monkeypatch.setattr(LlamaMLP, "forward", counted)
        name = {"name": "checkpointed", "train": {"gradient_checkpointing": True}}
        found = do(tiny_llama_folder, tmp_path, name)
        assert calls == 2 * 2 * (ROWS + 1) * 2  # twice in each of 2 layers for each row, and the blank one, of 2 epochs
        for ours in (found, read(two, "checkpointed")):
            np.testing.assert_allclose(logged(ours, "loss"), logged(read(one, "whole"), "loss"), rtol=1e-5)

    def test_bfloat16(self, tiny_llama_folder: Path, one: Path, tmp_path: Path) -> None:
        found = do(tiny_llama_folder, tmp_path, {"name": "bf16", "dtype": "bfloat16", "train": {}})
        assert logged(found, "loss") != logged(read(one, "whole"), "loss")
        np.testing.assert_allclose(logged(found, "loss"), logged(read(one, "whole"), "loss"), atol=0.1)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")  # the compiler's own, from many places
    def test_torch_compile(self, tiny_llama_folder: Path, one: Path, tmp_path: Path) -> None:
        torch._dynamo.utils.counters.clear()
        found = do(tiny_llama_folder, tmp_path, {"name": "compiled", "train": {"torch_compile": True, "max_steps": 4}})
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
        # The same steps as far as the learning rate is the same: up to the end of the warm-up.
        np.testing.assert_allclose(logged(found, "loss")[:3], logged(read(one, "whole"), "loss")[:3], rtol=1e-4)


def validated(path: Path) -> tuple[Any, Any]:
    """Arguments of `accelerate launch` with these settings, as it has checked them, and what it read from the file."""
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "--main_process_port", "0", "x.py"])
    checked, settings, _ = _validate_launch_command(arguments)
    return checked, settings


class TestSettings:
    """Each file in recipes/accelerate, read and checked by accelerate itself."""

    FILES = sorted(SETTINGS.glob("*.yaml"))

    def test_all_are_there(self) -> None:
        assert {path.stem for path in self.FILES} == {
            *("cpu", "multi_cpu", "single_gpu", "multi_gpu", "two_nodes"),
            *("fsdp2", "fsdp2_qlora", "zero2", "zero3"),
        }

    @pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
    def test_accelerate_takes_it(self, path: Path) -> None:
        checked, settings = validated(path)
        assert checked.num_processes == settings.num_processes > 0
        assert (checked.num_processes > 1) == (checked.multi_gpu or checked.use_fsdp or checked.use_deepspeed)
        # The recipe's model.dtype decides; autocast on top of it would be a second, hidden setting.
        assert settings.mixed_precision == ("bf16" if checked.use_deepspeed else "no")
        head = path.read_text().partition("compute_environment")[0]
        for word in ("Needs:", "Launch:", "Override:", f"--config_file recipes/accelerate/{path.name}"):
            assert word in head

    @pytest.mark.parametrize("name", ["fsdp2", "fsdp2_qlora"])
    def test_shards_are_fsdp2(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for key, value in prepare_multi_gpu_env(validated(SETTINGS / f"{name}.yaml")[0]).items():
            monkeypatch.setenv(key, value)
        plugin = FullyShardedDataParallelPlugin()
        assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.cpu_ram_efficient_loading) == (2, True, False)
        assert plugin.state_dict_type.name == "FULL_STATE_DICT"
        assert backbone.engine() == "fsdp"

    @pytest.mark.parametrize("stage", [2, 3])
    def test_deepspeed_stages(self, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
        checked, settings = validated(SETTINGS / f"zero{stage}.yaml")
        checked.deepspeed_fields_from_accelerate_config = ",".join(settings.deepspeed_config)
        for key, value in prepare_deepspeed_cmd_env(checked)[1].items():
            monkeypatch.setenv(key, value)
        plugin = DeepSpeedPlugin()
        plugin.set_mixed_precision(os.environ["ACCELERATE_MIXED_PRECISION"])
        assert plugin.deepspeed_config["zero_optimization"]["stage"] == stage
        assert plugin.deepspeed_config["bf16"]["enabled"]
        assert backbone.engine() == "deepspeed"

    def test_two_nodes_share_the_processes(self) -> None:
        checked, _ = validated(SETTINGS / "two_nodes.yaml")
        prepare_multi_gpu_env(checked)
        assert (checked.nnodes, checked.nproc_per_node) == ("2", "8")

    def test_multi_cpu_hides_gpus(self) -> None:
        checked, _ = validated(SETTINGS / "multi_cpu.yaml")
        assert prepare_multi_gpu_env(checked)["CUDA_VISIBLE_DEVICES"] == "-1,-1"
        assert backbone.engine() == "plain"


def test_one_process_where_several_were_asked_for(tmp_path: Path) -> None:
    """What accelerate does without a word; the recipe says it."""
    script = tmp_path / "say.py"
    script.write_text("from peftrec import processes\nprint(processes.alone_by_mistake())\n")
    printed = {}
    for how in (["--cpu", "--num_processes", "2"], ["--cpu", "--num_processes", "1"]):
        done = subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", *how, str(script)],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        printed[how[-1]] = done.stdout.strip()
    assert "asked for several processes and started one" in printed["2"]
    assert "multi_cpu.yaml" in printed["2"]
    assert "\n" not in printed["2"]
    assert printed["1"] == "None"


class TestGather:
    def test_nothing_to_do_for_a_whole_model(self, tiny_model: Any) -> None:
        before = {name: id(parameter) for name, parameter in tiny_model.named_parameters()}
        processes.gather(tiny_model)()
        assert {name: id(parameter) for name, parameter in tiny_model.named_parameters()} == before

    def test_deepspeed_puts_its_parts_together(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its own context does it; DeepSpeed itself is not here."""
        seen: list[Any] = []

        class Gathered:
            def __init__(self, parameters: list[Any]) -> None:
                self.parameters = parameters

            def __enter__(self) -> None:
                seen.append(self.parameters)

            def __exit__(self, *error: object) -> None:
                seen.append("closed")

        fake = SimpleNamespace(zero=SimpleNamespace(GatheredParameters=Gathered))
        monkeypatch.setitem(sys.modules, "deepspeed", fake)
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False))
        for parameter in model.parameters():
            parameter.ds_id = 1
        cut = processes.gather(model)
        assert seen == [list(model[0].parameters())]
        cut()
        assert seen[1:] == ["closed"]


if __name__ == "__main__":
    work(Path(sys.argv[1]))
