"""Search over recipes: which settings are best on the validation rows, for how many events of training.

    python recipes/search.py --config recipes/configs/search_click.yaml
    python recipes/search.py --config … --workers 2                          two trials at a time
    python recipes/search.py --config … --trials 40                          more of them, after the earlier ones

A trial is a run of recipes/finetune.py in OUTPUT_DIR/trials, in a process of its own; Optuna proposes its settings and
ends it early where its validation metric falls behind. The best ones are run again with other seeds, the winner is the
best on average, and only the winner is measured on the test rows, once, in OUTPUT_DIR/best. The same command continues
what was interrupted. OUTPUT_DIR/search.md and search.png hold the result, best.yaml the winning recipe.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

from matplotlib.figure import Figure

from peftrec import coherence, config, prepared, record, schema, split
from peftrec.errors import ConfigError, as_one_line
from peftrec.looks import style
from peftrec.metrics import LOWER_IS_BETTER
from peftrec.values import Count, Distinct, Text

T = TypeVar("T")
FINETUNE = Path(__file__).with_name("finetune.py")
POLL = 1.0  # seconds between two looks at a running trial
MOST_CORNERS = 500  # settings that are checked before the first trial
OWN = ("output_dir", "seed", "train.metric_for_best_model", "eval.bootstrap", "eval.base_model", "eval.max_test_rows")


@dataclass(frozen=True)
class Setting:
    """What one key of the recipe may be: some values, or a range."""

    choices: list[Any] | None = None
    """The values, of any kind."""
    low: float | None = None
    """Lowest number of a range."""
    high: float | None = None
    """Highest number of a range."""
    log: bool = False
    """Whether a range is searched by orders of magnitude."""
    whole: bool = False
    """Whether only whole numbers of a range are meant."""
    when: dict[str, Any] | None = None
    """Other keys of the search -> the value that makes this one mean something; else it keeps the recipe's own."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A search."""

    recipe: Text
    """The recipe that is changed, beside this file."""
    changes: dict[str, Any]
    """Sections of the recipe -> keys that all trials have in common, as in `{eval: {max_valid_rows: 2000}}`."""
    space: dict[str, Any]
    """Keys of the recipe -> `choices`, or `low` and `high`."""
    metric: Literal["loss", "auc", "uauc", "rmse", "mae"]
    """What is best on the validation rows."""
    trials: Count
    """How many settings are tried."""
    events: Count | None = None
    """Training events that a trial learns, repeated ones included; null leaves it to the recipe."""
    finalists: Count = 3
    """How many of the best are run again."""
    seeds: Annotated[list[int], Distinct]
    """Seeds of the finalists; the first one is that of all trials."""
    final: dict[str, Any]
    """The same for the winner's last run, such as a longer training."""
    output_dir: Text
    """Folder of the search."""


@dataclass(frozen=True)
class Trial:
    """One proposal and what it came to.

    Attributes:
        number: counted from 0.
        settings: key of the recipe -> value.
        state: complete or pruned.
        value: the metric on the validation rows; of a pruned one, the last that was seen.
    """

    number: int
    settings: Mapping[str, Any]
    state: str
    value: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the plan: recipe, changes, space, metric, trials and so on")
    parser.add_argument("--trials", type=int, help="how many in all, instead of the plan's")
    parser.add_argument("--workers", type=int, default=1, help="trials at a time (default: 1)")
    arguments = parser.parse_args()
    plan, path = read_plan(Path(arguments.config)), Path(arguments.config)
    trials = plan.trials if arguments.trials is None else arguments.trials
    for name, value in {"--trials": trials, "--workers": arguments.workers}.items():
        if value < 1:
            raise ConfigError(f"{name}: {value}; expected a whole number from 1")
    search = Search(plan, path.parent / plan.recipe)
    search.run(trials, arguments.workers)
    finals = search.finals(arguments.workers)
    best = min(finals, key=lambda settings: search.badness(statistics.mean(finals[settings])))
    search.test(json.loads(best))
    folder = Path(plan.output_dir)
    facts = record.read_record(folder / "best")
    found = search.trials()
    text = table(plan, found, finals, facts.metrics)
    print(f"\n{text}\n\n{folder / 'best.yaml'}: the winner's recipe")
    with record.atomic(folder / "search.md") as scratch:
        scratch.write_text(text + "\n")
    picture(plan, found, search.importances()).savefig(folder / "search.png", dpi=150, metadata={"Software": None})


def read_plan(path: Path) -> Plan:
    """The plan in a YAML file, with everything checked that a trial would stumble over.

    Raises:
        ConfigError: every mistake that a look at the file shows.
    """
    reader = schema.Reader(Plan, str(path))
    plan = reader.section(Plan, {"changes": {}, "final": {}, "seeds": [13], **schema.read_yaml(path)})
    if reader.problems:
        raise ConfigError(*reader.problems)
    if not plan.seeds:
        raise ConfigError(f"{path}: seeds: none; expected at least one")
    if not plan.space:
        raise ConfigError(f"{path}: space: no keys; expected keys of a recipe with choices, or low and high")
    base = path.parent / plan.recipe
    for key in OWN:
        if key in flat(plan.changes) or key in plan.space:
            raise ConfigError(f"{path}: {key}: the search sets it for every trial; leave it out")
    for key in plan.space:
        setting = setting_of(plan, key, path)
        for other in setting.when or {}:
            earlier = list(plan.space)[: list(plan.space).index(key)]
            if other not in earlier:
                raise ConfigError(
                    f"{path}: space.{key}.when: {other}; expected a key that stands before it: "
                    f"{', '.join(earlier) or 'none does'}"
                )
    for settings in islice(_corners(plan, path), MOST_CORNERS):  # said before the first trial runs
        config.load_recipe(base, words(flat(plan.changes) | settings))
    recipe = config.load_recipe(base, words(flat(plan.changes) | flat(plan.final)))
    allowed = {"click": ("loss", "auc", "uauc"), "rating": ("loss", "rmse", "mae", "uauc")}[recipe.task]
    if plan.metric not in allowed:
        raise ConfigError(f"{path}: metric: {plan.metric}; task: {recipe.task} has {', '.join(allowed)}; choose one")
    return plan


def _corners(plan: Plan, path: Path) -> Iterator[dict[str, Any]]:
    """Settings that trials could have: every choice, and the ends of every range, with each other."""
    space = {key: setting_of(plan, key, path) for key in plan.space}
    ends = [
        one.choices or [int(end) if one.whole else end for end in (one.low, one.high) if end is not None]
        for one in space.values()
    ]
    for values in product(*ends):
        settings = dict(zip(space, values, strict=True))
        yield {key: value for key, value in settings.items() if _means_something(space[key], settings)}


def _means_something(setting: Setting, settings: Mapping[str, Any]) -> bool:
    return all(settings.get(other) == value for other, value in (setting.when or {}).items())


def setting_of(plan: Plan, key: str, path: Path | str = "space") -> Setting:
    """One key of the plan's space.

    Raises:
        ConfigError: it is neither choices nor a range.
    """
    where = f"{path}: space.{key}"
    if not isinstance(plan.space[key], dict):
        raise ConfigError(f"{where}: {plan.space[key]!r}; expected choices, or low and high")
    reader = schema.Reader(Setting, where)
    setting = reader.section(Setting, plan.space[key])
    if reader.problems:
        raise ConfigError(*reader.problems)
    ends = [end for end in (setting.low, setting.high) if end is not None]
    ranged = len(ends) == 2
    if bool(setting.choices) == ranged or (setting.choices and ends):
        raise ConfigError(f"{where}: expected choices, or low and high, and not both")
    if ranged and not (setting.low < setting.high and (setting.low > 0 or not setting.log)):  # type: ignore[operator]
        raise ConfigError(f"{where}: {setting.low:g} to {setting.high:g}; expected low below high, above 0 with log")
    return setting


def flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value, of sections with their keys."""
    return {
        f"{section}.{key}": value
        for section, keys in sections.items()
        for key, value in (keys.items() if isinstance(keys, dict) else [("", keys)])
    }


def words(changes: Mapping[str, Any]) -> list[str]:
    """The command line that changes a recipe so."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in changes.items()}
    return [word for key, text in texts.items() for word in (f"--{key}", text)]


class Search:
    """A study of Optuna's over runs of a recipe; everything that is known is in its output_dir."""

    def __init__(self, plan: Plan, base: Path) -> None:
        try:
            import optuna
        except ModuleNotFoundError:
            raise ConfigError(
                "optuna: not installed; a search needs the extra 'search': run pip install 'peftrec[search]'"
            ) from None
        self.plan, self.base, self.folder = plan, base, Path(plan.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna = optuna
        backend = optuna.storages.journal.JournalFileBackend(str(self.folder / "study.log"))
        self.study = optuna.create_study(
            study_name="search",
            storage=optuna.storages.JournalStorage(backend),
            direction="minimize" if plan.metric in LOWER_IS_BETTER else "maximize",
            load_if_exists=True,
            sampler=optuna.samplers.TPESampler(seed=plan.seeds[0]),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
        )
        asked = json.dumps(
            [plan.recipe, plan.changes, plan.space, plan.metric, plan.events, plan.seeds], sort_keys=True
        )
        if self.study.user_attrs.setdefault("plan", asked) != asked:
            raise ConfigError(
                f"output_dir: {self.folder} holds another search (recipe, changes, space, metric, events or seeds "
                "differ); choose another output_dir"
            )
        self.study.set_user_attr("plan", asked)
        self.common = flat(plan.changes) | self._budget()

    def _budget(self) -> dict[str, Any]:
        """The keys that make a trial learn `events` events."""
        if self.plan.events is None:
            return {}
        recipe = config.load_recipe(self.base, words(flat(self.plan.changes)))
        _, log = prepared.load(recipe.data, recipe.seed, recipe.task, with_users=config.of_users(recipe))
        known = recipe.data.train_events or int((log.split == split.TRAIN).sum())
        epochs = self.plan.events / known
        return {"train.max_steps": -1, "train.num_train_epochs": epochs}

    def run(self, trials: int, workers: int) -> None:
        """Try settings until so many were, with those of an interrupted search first."""
        states = self.optuna.trial.TrialState
        for left in self.study.get_trials(states=(states.RUNNING,)):
            self.study.tell(left.number, state=states.FAIL)
            self.study.enqueue_trial(left.params)
        done = len(self.study.get_trials(states=(states.COMPLETE, states.PRUNED)))
        self._together([self._try] * (trials - done), workers)

    @staticmethod
    def _together(calls: Sequence[Callable[[], T]], workers: int) -> list[T]:
        """What the calls give, some at a time; the first error keeps the others from beginning."""
        if workers == 1:
            return [call() for call in calls]
        # Each trial would take all cores.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(call) for call in calls]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _try(self) -> None:
        states = self.optuna.trial.TrialState
        trial = self.study.ask()
        settings = self._propose(trial)
        folder = self._folder("trials", settings, self.plan.seeds[0])
        value, pruned = self._follow(trial, self._command(settings, self.plan.seeds[0], folder), folder)
        self.study.tell(trial, None if pruned else value, state=states.PRUNED if pruned else states.COMPLETE)
        mark = "pruned" if pruned else f"{value:.4f}"
        print(f"trial {trial.number}: {self.plan.metric} {mark}  {shown(settings)}", flush=True)

    def _propose(self, trial: Any) -> dict[str, Any]:
        settings: dict[str, Any] = {}
        for key in self.plan.space:
            setting = setting_of(self.plan, key)
            if not _means_something(setting, settings):
                continue
            if setting.choices:
                # Optuna keeps plain values only; a list of layers is none.
                texts = [json.dumps(choice) for choice in setting.choices]
                settings[key] = json.loads(trial.suggest_categorical(key, texts))
            elif setting.whole:
                settings[key] = trial.suggest_int(key, int(setting.low), int(setting.high), log=setting.log)  # type: ignore[arg-type]
            else:
                settings[key] = trial.suggest_float(key, setting.low, setting.high, log=setting.log)
        return settings

    def _folder(self, kind: str, settings: Mapping[str, Any], seed: int) -> Path:
        """Named by what is run, so that a run is found again however it was interrupted."""
        text = json.dumps([dict(settings), self.common, self.plan.recipe, seed], sort_keys=True)
        return self.folder / kind / hashlib.sha256(text.encode()).hexdigest()[:12]

    def _command(
        self, settings: Mapping[str, Any], seed: int, folder: Path, final: Mapping[str, Any] = MappingProxyType({})
    ) -> list[str]:
        changes = {
            **self.common,
            "eval.bootstrap": 0,
            "eval.max_test_rows": 1,  # one person: a search has no business with the test rows
            "train.metric_for_best_model": self.plan.metric,
            **settings,
            "output_dir": str(folder),
            "seed": seed,
        }
        if "eval.base_model" not in coherence.idle(config.load_recipe(self.base, words(changes))):
            changes["eval.base_model"] = False
        return [sys.executable, str(FINETUNE), "--config", str(self.base), *words(changes | final), "--resume"]

    def _follow(self, trial: Any, command: Sequence[str], folder: Path) -> tuple[float, bool]:
        """Run one trial to its end, or to where it has fallen behind: the metric, and whether it was ended early."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        seen = 0
        with (folder.parent / f"{folder.name}.log").open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            try:
                while process.poll() is None:
                    time.sleep(POLL)
                    values = validations(folder, self.plan.metric)
                    for step, value in enumerate(values[seen:], seen):
                        trial.report(value, step)
                    seen = len(values)
                    if seen and trial.should_prune():
                        process.kill()
                        process.wait()
                        shutil.rmtree(folder, ignore_errors=True)
                        return values[-1], True
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if process.returncode:
            last = Path(log.name).read_text().strip().splitlines()[-1:]
            raise ConfigError(f"{folder}: ended with code {process.returncode}: {' '.join(last)}; see {log.name}")
        values = validations(folder, self.plan.metric)
        if not values:
            raise ConfigError(f"{folder}: no validation pass; expected train.evals from 1, and a method that trains")
        return min(values, key=self.badness), False  # that of the checkpoint that the run chose

    def badness(self, value: float) -> float:
        """Smaller is better, whatever the metric."""
        return value if self.plan.metric in LOWER_IS_BETTER else -value

    def trials(self) -> list[Trial]:
        """All that were ended, the best one first, pruned ones last."""
        found = []
        for one in self.study.get_trials(deepcopy=False):
            if one.state.name in ("COMPLETE", "PRUNED"):
                settings = {
                    key: json.loads(value) if isinstance(value, str) else value for key, value in one.params.items()
                }
                seen = one.intermediate_values
                value = one.value if one.state.name == "COMPLETE" else seen[max(seen)]
                found.append(Trial(one.number, settings, one.state.name.lower(), value))
        return sorted(found, key=lambda one: (one.state, self.badness(one.value)))

    def finals(self, workers: int) -> dict[str, list[float]]:
        """The best settings, as JSON -> the metric with each seed."""
        best = []
        for one in self.trials():
            text = json.dumps(dict(one.settings))
            if one.state == "complete" and text not in best:
                best.append(text)
        best = best[: self.plan.finalists]
        seeds = self.plan.seeds
        calls = [partial(self._again, json.loads(text), seed) for text in best for seed in seeds]
        values = self._together(calls, workers)
        return {text: values[k * len(seeds) : (k + 1) * len(seeds)] for k, text in enumerate(best)}

    def _again(self, settings: Mapping[str, Any], seed: int) -> float:
        folder = self._folder("trials", settings, seed)
        return self._follow(_Unjudged(), self._command(settings, seed, folder), folder)[0]

    def test(self, settings: Mapping[str, Any]) -> None:
        """Run the winner with all test rows, and leave its recipe beside it."""
        folder = self.folder / "best"
        own = {"eval.max_test_rows": None, "eval.bootstrap": None, "eval.base_model": None}
        command = self._command(settings, self.plan.seeds[0], folder, own | flat(self.plan.final))
        process = subprocess.run(command, check=False)
        if process.returncode:
            print(f"{folder} ended with code {process.returncode}; the same command continues there", file=sys.stderr)
            sys.exit(process.returncode)
        with record.atomic(self.folder / "best.yaml") as scratch:
            scratch.write_text((folder / "config.yaml").read_text())

    def importances(self) -> dict[str, float]:
        """Key -> the share of the metric's variance over the trials that it explains; empty where too few were run."""
        complete = [one for one in self.trials() if one.state == "complete"]
        if len(complete) < 4 or len({one.value for one in complete}) < 2:
            return {}
        return dict(self.optuna.importance.get_param_importances(self.study))


class _Unjudged:
    """A finalist: nothing is reported, nothing is pruned."""

    def report(self, value: float, step: int) -> None: ...

    def should_prune(self) -> bool:
        return False


def validations(folder: Path, metric: str) -> list[float]:
    """The metric at each validation pass of a run so far, as its newest checkpoint tells them."""
    if (folder / "run.json").is_file():
        lines = record.read_record(folder).train["log"]
    else:
        states = sorted((folder / "checkpoints").glob("checkpoint-*/trainer_state.json"), key=_step)
        try:
            lines = json.loads(states[-1].read_text())["log_history"] if states else []
        except (OSError, ValueError):  # it is being written, or taken away, just now
            lines = []
    return [line[f"eval_{metric}"] for line in lines if line.get(f"eval_{metric}") is not None]


def _step(path: Path) -> int:
    return int(path.parent.name.rpartition("-")[2])


def shown(settings: Mapping[str, Any]) -> str:
    """Settings as a person reads them."""
    numbers = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in settings.items()}
    return ", ".join(f"{key} {value}" for key, value in numbers.items())


def table(
    plan: Plan, trials: Sequence[Trial], finals: Mapping[str, Sequence[float]], tested: Mapping[str, float | None]
) -> str:
    """Trials, finalists and the winner's test figures in Markdown."""
    lines = [f"| trial | validation {plan.metric} | settings |", "|---:|---:|---|"]
    for one in trials:
        note = "" if one.state == "complete" else " (ended early)"
        lines.append(f"| {one.number} | {one.value:.4f}{note} | {shown(one.settings)} |")
    lines += ["", f"| finalist | mean over {len(plan.seeds)} seeds | lowest to highest |", "|---|---:|---:|"]
    for text, values in finals.items():
        lines.append(
            f"| {shown(json.loads(text))} | {statistics.mean(values):.4f} | {min(values):.4f} to {max(values):.4f} |"
        )
    figures = [
        f"{key.removeprefix('test/')} {value:.3f}"
        for key, value in tested.items()
        if key.startswith("test/") and "|" not in key and value is not None
    ]
    lines += ["", f"The winner on the test rows, looked at once: {', '.join(figures)}."]
    return "\n".join(lines)


def picture(plan: Plan, trials: Sequence[Trial], importances: Mapping[str, float]) -> Figure:
    """The metric by trial, with the best so far, and how much of it each key explains."""
    with style():
        figure = Figure(figsize=(9, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        complete = sorted((one for one in trials if one.state == "complete"), key=lambda one: one.number)
        pruned = [one for one in trials if one.state != "complete"]
        better = min if plan.metric in LOWER_IS_BETTER else max
        left.plot([one.number for one in complete], [one.value for one in complete], "o", color="C0", label="complete")
        left.plot([one.number for one in pruned], [one.value for one in pruned], "x", color="C7", label="ended early")
        best = [better(one.value for one in complete[: k + 1] if one.value is not None) for k in range(len(complete))]
        left.step([one.number for one in complete], best, where="post", color="C1", label="best so far")
        left.set_xlabel("trial")
        left.set_ylabel(f"validation {plan.metric}")
        left.legend()
        keys = sorted(importances, key=lambda key: importances[key])
        right.barh(keys, [importances[key] for key in keys], color="C0")
        right.set_xlabel("share of the variance explained")
        if not keys:
            right.set_title("too few trials to tell keys apart")
    return figure


if __name__ == "__main__":
    with as_one_line():
        main()
