"""From one domain to another: what an adapter trained on the source is worth when the target has K samples.

    python recipes/transfer.py --config recipes/configs/transfer_drama_comedy.yaml
    python recipes/transfer.py --config … --samples 64 --seeds 1 2 3 --write
    python recipes/transfer.py --config … --target.data.interactions ratings.csv --target.data.items movies.csv

The source is trained by recipes/finetune.py in OUTPUT_DIR/source, unless the config names an adapter that is there
already. Then each way of knowing the target, each K and each seed is a cell, measured on the same test rows. A cell
that is there is not measured again. OUTPUT_DIR/transfer.md, transfer.png and report.html hold the result; --write also
puts it into docs/.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import polars as pl

from peftrec import align, backbone, config, earlier, few_shot, interactions, record, schema, split, transfer_report
from peftrec.errors import ConfigError, as_one_line
from peftrec.values import Positive

ROOT = Path(__file__).parent.parent
ALIGNED = ("coral", "mmd", "adversarial", "cpc")
STARTS = {"transfer": "source", "adapted": "source", "stacked": "source", "pretrained": "pretrained"} | {
    kind: kind for kind in ALIGNED
}
"""Way -> the earlier adapter that it starts from."""


@dataclass(frozen=True)
class Side:
    """The source, the target, or pretraining: a recipe with changes."""

    recipe: str | None = None
    """Its file, relative to the config; null is the target's."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Sections of that recipe with the keys that differ."""


@dataclass(frozen=True)
class Source(Side):
    """The source may also be an adapter that is there already."""

    adapter: str | None = None
    """A run, an adapter's folder or a Hub id."""
    revision: str | None = None
    """Of that Hub id."""


@dataclass(frozen=True)
class Tested:
    """The test rows."""

    rows: Annotated[int, schema.Check("a whole number from 1", lambda n: n >= 1)] = 1000
    """Most of all."""
    of_one: Annotated[int, schema.Check("a whole number from 1", lambda n: n >= 1)] = 12
    """Most of one person: the first ones."""


@dataclass(frozen=True)
class Plan:
    """A config of this recipe."""

    output_dir: str
    target: Side = field(default_factory=Side)
    source: Source = field(default_factory=Source)
    pretrain: Side = field(default_factory=Side)
    """For the way `pretrained`: recipes/pretrain.py on the target's texts."""
    samples: dict[str, int] = field(default_factory=lambda: {"64": 20})
    """K, the number of the target's training events -> optimizer steps on them, the same for every way."""
    ways: dict[Literal["target_only", "adapted", "stacked", "pretrained"], Positive] = field(
        default_factory=lambda: {"target_only": 1e-3, "adapted": 3e-4}
    )
    """What is trained on the K samples -> its learning rate: what has learned already wants a lower one. Zero-shot and
    transfer are measured without."""
    aligned: dict[Literal["coral", "mmd", "adversarial", "cpc"], Positive] = field(default_factory=dict)
    """Further trainings of the source, each beside the target's training events without their answers: align.kind ->
    align.weight. They are measured as `transfer` is, without any sample."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Each draws other samples, other initial weights and another order."""
    test: Tested = field(default_factory=Tested)


@dataclass(frozen=True)
class Cell:
    """One way of knowing the target from K samples that a seed draws; `counted` is all ways of counting at once."""

    way: str
    k: int
    seed: int


@dataclass(frozen=True)
class Setting:
    """What all cells share.

    Attributes:
        recipe: the target's.
        log: the target with all of its training events.
        sha256: of its values.
        rows: the test rows, as places among all test rows.
        starts: earlier adapters by their names in `STARTS`.
        facts: sentences about the domains.
    """

    recipe: config.Recipe
    log: split.Log
    sha256: str
    rows: np.ndarray
    starts: dict[str, earlier.Earlier]
    facts: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="source, target, samples and seeds: see docs/transfer.md")
    parser.add_argument("--samples", nargs="+", metavar="K", help="some of the config's K; all if left out")
    parser.add_argument("--seeds", nargs="+", help="in place of the config's")
    parser.add_argument("--ways", nargs="+", help="some of the config's; all if left out")
    parser.add_argument("--output_dir", help="in place of the config's")
    parser.add_argument("--write", action="store_true", help="put tables and picture into docs/")
    arguments, rest = parser.parse_known_args()
    path = Path(arguments.config)
    plan = read_plan(path, arguments)
    sides = ["target"]
    sides += ["source"] if plan.source.adapter is None else []
    sides += ["pretrain"] if "pretrained" in plan.ways else []
    words = {name: side_words(plan, name, path, rest) for name in sides}
    words |= {kind: aligned_words(plan, kind, words) for kind in plan.aligned}
    setting = prepare(plan, words)
    folder = Path(plan.output_dir)
    found: dict[tuple[str, int], list[list[float]]] = {}
    for cell in cells(plan):
        for way, scores in measured(cell, setting, plan, folder).items():
            found.setdefault((way, cell.k), []).append(scores)
    write(found, setting, plan, path.stem, to_docs=arguments.write)


def read_plan(path: Path, arguments: argparse.Namespace) -> Plan:
    """The config with what the command line changes."""
    mapping = schema.read_yaml(path, "source, target and samples")
    given = {name: getattr(arguments, name) for name in ("seeds", "output_dir") if getattr(arguments, name)}
    reader = schema.Reader(Plan, str(path))
    plan = reader.section(Plan, {**mapping, **given} if isinstance(mapping, Mapping) else mapping)
    for k in [*plan.samples, *(arguments.samples or ())]:
        if k not in plan.samples or not k.isdigit() or int(k) < 1:
            reader.problem("samples", f"{k}; expected some of {', '.join(plan.samples)}, whole numbers from 1")
    for way in arguments.ways or ():
        if way not in (*plan.ways, *plan.aligned):
            reader.problem("ways", f"{way}; expected some of {', '.join((*plan.ways, *plan.aligned))}")
    if plan.aligned and plan.source.adapter is not None:
        reader.problem("aligned", "needs a source that is trained here; remove it, or source.adapter")
    if plan.target.recipe is None:
        reader.problem("target.recipe", "missing; expected the file of a recipe")
    if reader.problems:
        raise ConfigError(*reader.problems)
    chosen = {k: steps for k, steps in plan.samples.items() if k in (arguments.samples or plan.samples)}
    ways = {way: rate for way, rate in plan.ways.items() if way in (arguments.ways or plan.ways)}
    aligned = {kind: weight for kind, weight in plan.aligned.items() if kind in (arguments.ways or plan.aligned)}
    return dataclasses.replace(plan, samples=chosen, ways=ways, aligned=aligned)


def side_words(plan: Plan, name: str, path: Path, rest: Sequence[str]) -> list[str]:
    """The command line of recipes/finetune.py or pretrain.py for one side; whatever is wrong with it is said now."""
    side = getattr(plan, name)
    changes = [plan.target.changes, side.changes] if side.recipe is None else [side.changes]
    values = {key: value for part in changes for key, value in flat(part).items()}
    words = as_words(values)
    mine = [place for place, word in enumerate(rest) if word.startswith(f"--{name}.")]
    for place in mine:
        words += [f"--{rest[place].removeprefix(f'--{name}.')}", *([] if "=" in rest[place] else rest[place + 1 :][:1])]
    foreign = [
        word
        for word in rest
        if word.startswith("--") and word.split(".")[0] not in ("--target", "--source", "--pretrain")
    ]
    if foreign:
        raise ConfigError(f"command line: {foreign[0]}; expected --target.KEY, --source.KEY or --pretrain.KEY")
    file = path.parent / (side.recipe or plan.target.recipe or "")
    words = ["--config", str(file), *words, "--output_dir", str(Path(plan.output_dir) / name)]
    recipe = config.load_recipe(file, words[2:])
    if (recipe.task, recipe.score.prior) != ("click", "none"):
        raise ConfigError(
            f"{file}: task {recipe.task} with score.prior {recipe.score.prior}; expected clicks without a prior, which "
            "would hide what the language model knows; set them in the config"
        )
    if (recipe.eval.history, recipe.eval.ties) != ("streaming", "isolate"):
        raise ConfigError(
            f"{file}: eval.history {recipe.eval.history}, eval.ties {recipe.eval.ties}; what counts beside the model "
            "knows streaming and isolate; leave them out"
        )
    if recipe.score.calibration != "none":
        raise ConfigError(f"{file}: score.calibration; scores are compared as the model gives them; leave it out")
    if recipe.train.teachers:
        raise ConfigError(f"{file}: train.teachers; what is learned from K samples has none; leave it out")
    if recipe.align.used:
        raise ConfigError(f"{file}: align; name its kinds and weights under aligned, and leave it out here")
    if recipe.side.used:
        raise ConfigError(f"{file}: side; expected a recipe without side vectors, which no other domain has")
    return words


def aligned_words(plan: Plan, kind: str, words: Mapping[str, Sequence[str]]) -> list[str]:
    """The command line of recipes/finetune.py that trains the source beside the target's unanswered events."""
    target = config.load_recipe(words["target"][1], words["target"][2:])
    where = {one.name: getattr(target.data, one.name) for one in dataclasses.fields(config.OtherDomain)}
    more = {"kind": kind, "weight": plan.aligned[kind], "target": {key: value for key, value in where.items() if value}}
    found = [*words["source"], *as_words(flat({"align": more})), "--output_dir", str(Path(plan.output_dir) / kind)]
    source = config.load_recipe(found[1], found[2:])
    neutral: dict[str, Any] = {"like_at": None, "rating_range": None, "users": None, "train_events": None}
    ours, theirs = (dataclasses.replace(data, **neutral) for data in (align.data_of(source), target.data))
    if ours != theirs or source.seed != target.seed:
        # Another split would show the target's test events, if not their answers.
        raise ConfigError(
            "aligned: source and target differ in data.split, seed or which users are kept; expected the same, so that "
            "the events that are aligned with are the target's training events; set them alike"
        )
    return found


def as_words(values: Mapping[str, Any]) -> list[str]:
    """Dotted keys with values as a command line has them: text word for word, the rest as JSON."""
    return [
        word
        for key, value in values.items()
        for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]


def flat(changes: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    found: dict[str, Any] = {}
    keys = schema.leaves(config.Recipe)
    for name, value in changes.items():
        key = prefix + name
        found |= flat(value, f"{key}.") if key not in keys and isinstance(value, Mapping) else {key: value}
    return found


def prepare(plan: Plan, words: Mapping[str, Sequence[str]]) -> Setting:
    """Train the source, and on the target's texts where that is wanted; draw the test rows."""
    target = backbone.with_dtype(config.load_recipe(words["target"][1], words["target"][2:]))
    facts = []
    if plan.source.adapter is None:
        source = config.load_recipe(words["source"][1], words["source"][2:])
        facts = overlap(source, target)
        run("finetune.py", [*words["source"], "--resume"])
    starts = {"source": earlier.read(plan.source.adapter or f"{plan.output_dir}/source", plan.source.revision)}
    if plan.source.adapter is not None and (about := starts["source"].about) is not None:
        facts = [f"Source: the adapter {starts['source'].facts()['name']}, trained on {about.data.name}."]
    for kind in plan.aligned:
        run("finetune.py", [*words[kind], "--resume"])
        starts[kind] = earlier.read(f"{plan.output_dir}/{kind}")
    if "pretrained" in plan.ways:
        run("pretrain.py", [*words["pretrain"], "--resume"])
        starts["pretrained"] = earlier.read(f"{plan.output_dir}/pretrain")
    backbone.quiet()
    log, sha256 = loaded(target)
    if plan.source.adapter is not None:
        facts.append(
            f"Target: {int((log.split == split.TRAIN).sum()):,} training events on {log.items.height:,} items."
        )
    tests = log.rows(split.TEST)
    rows = few_shot.tested_rows(log, plan.test.rows, plan.test.of_one, target.seed)
    facts.append(
        f"Test: {len(rows):,} rows, the first {plan.test.of_one} at most of each of {len(np.unique(log.user[rows]))} "
        f"people, {log.label[rows].mean():.1%} liked."
    )
    return Setting(target, log, sha256, np.searchsorted(tests, rows), starts, facts)


def loaded(recipe: config.Recipe) -> tuple[split.Log, str]:
    """The events of a recipe with their splits, and the hash of their values."""
    data = interactions.load(recipe.data, recipe.seed, recipe.task)
    return split.split(data, recipe.data.split, recipe.seed), data.sha256


def overlap(source: config.Recipe, target: config.Recipe) -> list[str]:
    """What the domains have in common, in sentences."""
    (ours, _), (theirs, _) = loaded(target), loaded(source)
    train, test = theirs.split == split.TRAIN, ours.split == split.TEST
    titles = set(theirs.items["title"]) & set(ours.items["title"])
    found = [
        f"Source: {int(train.sum()):,} training events on {theirs.items.height:,} items; target: "
        f"{int((ours.split == split.TRAIN).sum()):,} on {ours.items.height:,}, of which K are learned from; "
        f"{len(titles)} titles are in both.",
    ]
    if source.data.name is not None and source.data.name == target.data.name:
        both = np.isin(
            ours.user_ids.to_numpy()[np.unique(ours.user[test])],
            theirs.user_ids.to_numpy()[np.unique(theirs.user[train])],
        )
        later = int((theirs.timestamp[train] >= ours.timestamp[test].min()).sum())
        found.append(
            f"People are the same: {int(both.sum())} of {len(both)} people with test rows have training events in the "
            f"source, on other items. {later} of the source's training events are later than the first test row."
        )
    return found


def run(script: str, words: Sequence[str]) -> None:
    """A stage of its own; one that has ended before says so and ends."""
    print(f"\n{script} {' '.join(words)}", flush=True)
    code = subprocess.run([sys.executable, str(ROOT / "recipes" / script), *words], check=False).returncode
    if code:
        print(f"{script} ended with code {code}; the same command continues there", file=sys.stderr)
        sys.exit(code)


def cells(plan: Plan) -> Iterator[Cell]:
    """In the order in which they are measured: seed by seed, so that an interrupted run has whole seeds."""
    yield Cell("counted", transfer_report.ALL, 0)
    yield from (Cell(way, 0, 0) for way in ("zero_shot", "transfer", *plan.aligned))
    for seed in plan.seeds:
        for k in map(int, plan.samples):
            yield from (Cell(way, k, seed) for way in ("counted", *plan.ways))


def measured(cell: Cell, setting: Setting, plan: Plan, folder: Path) -> dict[str, list[float]]:
    """Way -> log-odds of the test rows; read where they were measured before."""
    steps = plan.samples.get(str(cell.k), 0)
    recipe = dataclasses.replace(setting.recipe, seed=cell.seed or setting.recipe.seed)
    if cell.k > 0:
        how = dataclasses.replace(
            recipe.train, max_steps=steps, learning_rate=plan.ways.get(cell.way, recipe.train.learning_rate)
        )
        recipe = dataclasses.replace(recipe, train=how)
    else:
        recipe = dataclasses.replace(recipe, adapter=config.Adapter(method="none"))
    start = setting.starts.get(STARTS.get(cell.way, ""))
    known_by = [dataclasses.asdict(cell), differing(recipe), setting.sha256, setting.rows.tolist()]
    digest = hashlib.sha256(json.dumps([*known_by, start and start.facts()]).encode()).hexdigest()
    path = folder / "cells" / f"{cell.way}-{cell.k}-{cell.seed}.json"
    if path.is_file() and (known := json.loads(path.read_text()))["key"] == digest:
        return dict(known["scores"])
    print(f"{cell.way}, K = {cell.k}, seed {cell.seed}", flush=True)
    begin = time.perf_counter()
    log = split.few(setting.log, cell.k, cell.seed) if cell.k > 0 else setting.log
    rows = log.rows(split.TEST)[setting.rows]
    if cell.way == "counted":
        scores = few_shot.counted(log, rows, recipe.seed)
    else:
        scratch = folder / "checkpoints"
        shutil.rmtree(scratch, ignore_errors=True)
        found = few_shot.learned(log, rows, recipe, folder=scratch, start=start, stacked=cell.way == "stacked")
        shutil.rmtree(scratch, ignore_errors=True)
        scores = {cell.way: found}
    kept = {"key": digest, "seconds": time.perf_counter() - begin, "scores": {w: s.tolist() for w, s in scores.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    with record.atomic(path) as scratch_file:
        scratch_file.write_text(json.dumps(kept))
    return dict(kept["scores"])


def differing(recipe: config.Recipe) -> dict[str, Any]:
    """What of a recipe bears on its scores and is not the default, so that a new option elsewhere changes nothing."""
    usual = config.Recipe(data=config.Data(), output_dir=recipe.output_dir)
    values, defaults = (flat(dataclasses.asdict(one)) for one in (recipe, usual))
    idle = ("eval.", "hub.", "card.", *(("train.",) if recipe.adapter.method == "none" else ()))
    return {key: value for key, value in values.items() if value != defaults[key] and not key.startswith(idle)}


def write(
    found: Mapping[tuple[str, int], list[list[float]]], setting: Setting, plan: Plan, name: str, *, to_docs: bool
) -> None:
    """Tables, picture and page of the cells; their scores as one table, for others to measure again."""
    log, folder = setting.log, Path(plan.output_dir)
    rows = log.rows(split.TEST)[setting.rows]
    label, user, item = log.label[rows], log.user[rows], log.item[rows]
    resamples, seed = setting.recipe.eval.bootstrap, setting.recipe.seed
    told = transfer_report.report(found, label, user, item, " ".join(setting.facts), resamples=resamples, seed=seed)
    (folder / "transfer.md").write_text(told.markdown())
    told.picture.savefig(folder / "transfer.png", dpi=150, metadata={"Software": None})
    (folder / "report.html").write_text(told.page(name))
    about = {"user_id": log.user_ids[user], "item_id": log.items["item_id"][item], "label": label}
    columns = {
        f"{way} K={k} draw={draw}": scores for (way, k), several in found.items() for draw, scores in enumerate(several)
    }
    pl.DataFrame({**about, **columns}).write_parquet(folder / "scores.parquet")
    print(f"\n{told.markdown()}\n{folder}: report.html, transfer.md, transfer.png, scores.parquet")
    if to_docs:
        sys.path.insert(0, str(ROOT / "benchmarks"))
        from pages import put

        put(name, f"{told.markdown()}\n![AUC for each K, with intervals]({name}.png)", ROOT / "docs/transfer.md")
        (ROOT / f"docs/{name}.png").write_bytes((folder / "transfer.png").read_bytes())


if __name__ == "__main__":
    with as_one_line():
        main()
