"""What each option against overfitting does with 64 and 256 training events of ml-100k, into docs/small-data.md.

    python benchmarks/small_data.py --work runs/small-data              # every run that is missing there; a minute each
    python benchmarks/small_data.py --work runs/small-data --minutes 15 # stop in time; the same command goes on
    python benchmarks/small_data.py --work runs/small-data --write      # the table, from what is there

One recipe, changed by one option at a time, without a prior; all learn from the same events, the first 16 of some
people, and are scored on the same rows. Test rows know the earlier events of their own person (streaming).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from pages import put

from peftrec import adapters, backbone, config, encode, interactions, metrics, prompts, scorer, split, teachers, train
from peftrec.augment import Augment
from peftrec.bootstrap import Interval, over_seeds
from peftrec.draws import drawn_order
from peftrec.target import fit_target

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes/configs/ml-100k/click_lora.yaml"
SIZES, SEEDS, PER_PERSON = (64, 256), (1, 2, 3), 16
STEPS, TOKENS, TEST_ROWS, VALID_ROWS = 20, 192, 1500, 150
COMMON = {
    "score.prior": "none",
    "prompt.max_tokens": str(TOKENS),
    "prompt.overlap": "64",
    "train.max_steps": str(STEPS),
    "train.learning_rate": "1e-3",
    "train.gradient_accumulation_steps": "1",
    "train.evals": "0",
}
PARAPHRASES = (
    "['Films that somebody saw, and if they were to their taste:', 'Ratings of one viewer, in order of time:']"
)
OPTIONS: dict[str, dict[str, str]] = {
    "none of them": {},
    "early stopping": {"train.evals": "4", "train.early_stopping_patience": "2"},
    "adapter dropout": {"adapter.lora_dropout": "0.2"},
    "weight decay": {"train.weight_decay": "0.1"},
    "history dropout": {"train.history_dropout": "0.3"},
    "history sub-sampling": {"train.history_sample": "8"},
    "near events shuffled": {"train.shuffle_within": "60"},
    "paraphrases": {"prompt.paraphrases": PARAPHRASES},
    "FGM": {"train.fgm_epsilon": "1.0"},
    "checkpoints averaged": {"train.average_checkpoints": "3"},
}
PLAIN, ENSEMBLE, TAUGHT = "none of them", "ensemble of seeds", "taught by the ensemble"
SHARE = 0.5  # of the teachers' answer


def recipe_of(option: str, seed: int) -> config.Recipe:
    """The recipe of a run; whoever is taught begins otherwise than all teachers."""
    seed += max(SEEDS) if option == TAUGHT else 0
    changed = {**COMMON, **OPTIONS.get(option, {}), "seed": str(seed)}
    return config.load_recipe(RECIPE, [part for key, value in changed.items() for part in (f"--{key}", value)])


def small(log: split.Log, k: int) -> split.Log:
    """The log with `k` training events, the first of some people."""
    kept = log.split != split.TRAIN
    left = k
    for user in drawn_order(len(log.user_ids), 13, "small data").tolist():
        own = np.flatnonzero((log.user == user) & (log.split == split.TRAIN))[: min(left, PER_PERSON)]
        kept[own] = True
        left -= len(own)
        if not left:
            break
    columns = ("user", "item", "timestamp", "label", "rating", "split")
    return dataclasses.replace(log, **{name: getattr(log, name)[kept] for name in columns})


def run(whole: split.Log, option: str, k: int, seed: int, folder: Path) -> dict[str, Any]:
    """Train once, and score the test rows; the plain runs' weights stay in `folder` as teachers."""
    began = time.perf_counter()
    recipe, log = recipe_of(option, seed), small(whole, k)
    learned = log.split == split.TRAIN
    target = fit_target("click", recipe.score.head, recipe.score.loss, log.scale, log.label[learned], None)
    loaded = backbone.load(recipe.model, target)
    encoder = encode.Encoder(log, recipe.prompt, loaded.tokenizer, recipe.eval.ties)
    model = scorer.with_head(loaded.model, target.head, encoder.codec.answers)
    data = encoder.train(None, Augment.of(recipe))
    model = adapters.attach(model, recipe.adapter, base_name=loaded.base.hub_id, seed=recipe.seed, steps=STEPS)
    if option == TAUGHT:
        data.taught = taught(model, data, log, target, [folder / f"teacher-{k}-{one}" for one in SEEDS])
    drawn = drawn_order(len(log.user_ids), 13, "evaluated users")
    valid, test = (
        encode.whole_users(np.flatnonzero(log.split == code), log.user, most, drawn)
        for code, most in ((split.VALID, VALID_ROWS), (split.TEST, TEST_ROWS))
    )

    def measure(rows: np.ndarray, outputs: np.ndarray) -> dict[str, float]:
        found = metrics.click_metrics(log.label[rows], target.measure(outputs, None)[0], log.user[rows])
        return {"loss": found["log_loss"], "auc": found["auc"], "uauc": found["uauc"]}

    # History is read in long windows, so that little is read twice.
    wide = encode.Encoder(log, dataclasses.replace(recipe.prompt, max_tokens=1024), loaded.tokenizer, recipe.eval.ties)
    wide.questions = prompts.Pieces.of(encoder.codec.questions(encoder.texts, encoder.max_item_tokens))
    fitted = train.fit(
        model,
        data,
        wide.evaluate(valid, "streaming", None),
        target,
        measure,
        train=recipe.train,
        folder=folder / "checkpoints",
        seed=recipe.seed,
    )
    rows, outputs = train.score(model, wide.evaluate(test, "streaming", None), description="score")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if option == PLAIN:
        teacher = folder / f"teacher-{k}-{seed}"
        teacher.mkdir(exist_ok=True)
        adapters.save_checkpoint(model, teacher)
    return {
        "score": np.round(target.measure(outputs, None)[0], 5).tolist(),
        "label": log.label[rows].tolist(),
        "user": log.user[rows].tolist(),
        "learned": int(learned.sum()),
        "steps": fitted.steps,
        "seconds": time.perf_counter() - began,
    }


def taught(model: Any, data: Any, log: split.Log, target: Any, folders: list[Path]) -> np.ndarray:
    """What `train.teachers` would make of these runs, of which nobody saved an adapter: see `teachers.taught`."""
    fresh = {name: tensor.clone() for name, tensor in adapters.training_state(model).items()}
    several = []
    for folder in folders:
        adapters.load_checkpoint(model, folder)
        rows, outputs = train.score(model, data, description="teacher")
        several.append(target.told(outputs, None))
    adapters.put_back(model, fresh)
    return teachers.mixed(log, rows, target, several, SHARE)


def jobs() -> list[tuple[str, int, int]]:
    """Option, events and seed of every run: the plain ones, which teach, then seed by seed, so that those are whole."""
    plain = [(PLAIN, k, seed) for k in SIZES for seed in SEEDS]
    return plain + [(one, k, seed) for seed in SEEDS for k in SIZES for one in (*OPTIONS, TAUGHT) if one != PLAIN]


def table(found: dict[tuple[str, int, int], dict[str, Any]]) -> str:
    """Means over the seeds of which an option and the plain recipe are there."""
    sizes = [k for k in SIZES if any((PLAIN, k, seed) in found for seed in SEEDS)]
    lines = [
        "| option | " + " | ".join(f"AUC, K = {k} | minus none | log loss | seeds" for k in sizes) + " |",
        "|---|" + "---:|---:|---:|---:|" * len(sizes),
    ]
    rows: dict[str, list[str]] = {name: [] for name in (*OPTIONS, ENSEMBLE, TAUGHT)}
    for k in sizes:
        one = next(found[PLAIN, k, seed] for seed in SEEDS if (PLAIN, k, seed) in found)
        label, user = np.array(one["label"]), np.array(one["user"])
        for name, cells in rows.items():
            option = PLAIN if name == ENSEMBLE else name
            seeds = [seed for seed in SEEDS if (option, k, seed) in found and (PLAIN, k, seed) in found]
            if not seeds or (name == ENSEMBLE and len(seeds) < len(SEEDS)):
                cells += ["not run", "", "", ""]
                continue
            plain = [found[PLAIN, k, seed]["score"] for seed in seeds]
            scores = [found[option, k, seed]["score"] for seed in seeds]
            if name == ENSEMBLE:  # beside each of its members
                scores = [np.mean(scores, axis=0).tolist()] * len(seeds)
            both = {name: scores, PLAIN: plain}
            intervals, gaps = over_seeds(label, both, user, [] if name == PLAIN else [(name, PLAIN)])
            minus = "" if name == PLAIN else _cell(gaps[name, PLAIN]["auc"], sign="+")
            loss = f"{intervals[name]['log_loss'].point:.3f}"
            cells += [_cell(intervals[name]["auc"]), minus, loss, "" if name == ENSEMBLE else str(len(seeds))]
    lines += [f"| {' | '.join((name, *cells))} |" for name, cells in rows.items()]
    told = (
        f"{len(one['label']):,} test rows of {len(set(one['user']))} people; {STEPS} steps of one window of up to "
        f"{TOKENS} tokens. Figures are means over the seeds; [low, high]: 95% interval over 1,000 resamples of the "
        "people, of differences on the same rows and seeds. The ensemble is the mean of the plain recipe's scores, "
        f"and what it says of the training events is {SHARE:g} of what is learned in the last line."
    )
    return "\n".join((*lines, "", told))


def _cell(one: Interval, sign: str = "") -> str:
    return f"{one.point:{sign}.3f} [{one.low:{sign}.3f}, {one.high:{sign}.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what each run found")
    parser.add_argument("--minutes", type=float, default=60, help="begin no run after so many")
    parser.add_argument("--only", help="runs of one option only")
    parser.add_argument("--write", action="store_true", help="write the table and run nothing")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    files = {job: given.work / f"{job[0].replace(' ', '-')}-{job[1]}-{job[2]}-{TEST_ROWS}.json" for job in jobs()}
    if given.write:
        text = table({job: json.loads(file.read_text()) for job, file in files.items() if file.exists()})
        put("smalldata", text, ROOT / "docs/small-data.md")
        print(text)
        return
    backbone.quiet()
    began = time.monotonic()
    data = interactions.load(recipe_of(PLAIN, 13).data, 13)
    log = split.split(data, recipe_of(PLAIN, 13).data.split, 13)
    for job, file in files.items():
        if file.exists() or (given.only and job[0] != given.only):
            continue
        if time.monotonic() - began > 60 * given.minutes:
            break
        found = run(log, *job, given.work)
        scratch = file.with_suffix(".part")
        scratch.write_text(json.dumps(found))
        scratch.rename(file)
        auc = metrics.click_metrics(np.array(found["label"]), np.array(found["score"]), np.array(found["user"]))["auc"]
        print(f"{job}: AUC {auc:.3f}, {found['steps']} steps, {found['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
