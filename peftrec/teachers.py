"""Earlier runs as teachers: what several of them answer together is learned beside each event's own answer.

So an ensemble of seeds becomes one adapter, which costs what one costs (Hinton, Vinyals and Dean, Distilling the
Knowledge in a Neural Network, 2015).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peftrec import adapters, config, earlier, opponents, train
from peftrec.earlier import Earlier
from peftrec.errors import ConfigError
from peftrec.loaded_adapter import target_of
from peftrec.schema import read_yaml
from peftrec.split import Log
from peftrec.target import Target
from peftrec.timeline import WindowDataset

ALIKE = ("task", "data", "prompt", "score", "start", "train.order", "eval.history", "eval.ties")
"""What a teacher's recipe shares with its pupil's."""
DRAWN_PRIORS = ("mf", "bpmf")
"""Priors that hang on the seed."""


@dataclass(frozen=True)
class Teacher:
    """An earlier run, its target and its seed."""

    adapter: Earlier
    target: Target
    seed: int


def find(recipe: config.Recipe) -> list[Teacher]:
    """The runs that `train.teachers` names.

    Raises:
        ConfigError: one learned something else than this recipe is about to, or from other events.
        ModelError: one holds no adapter, or one of another kind.
    """
    found: dict[Path, Teacher] = {}
    for name in recipe.train.teachers:
        folder = Path(name).expanduser().resolve()
        if folder in found or folder == Path(recipe.output_dir).expanduser().resolve():
            whose = "is named twice" if folder in found else "is output_dir, too"
            raise ConfigError(f"train.teachers: {name} {whose}; name each run once, and write to another folder")
        if not (folder / "config.yaml").is_file():
            raise ConfigError(f"train.teachers: {name} holds no config.yaml; expected the folder of a run that ended")
        theirs = config.parse_recipe(read_yaml(folder / "config.yaml"), str(folder / "config.yaml"))
        for key in ALIKE:
            if _value(theirs, key) != _value(recipe, key):
                raise ConfigError(
                    f"train.teachers: {name} has another {key} than this recipe; expected a run of the same recipe "
                    "under another seed, so that both read the same prompts and neither has met a test row"
                )
        if theirs.seed != recipe.seed and _drawn(recipe.data):
            raise ConfigError(
                f"train.teachers: {name} has seed {theirs.seed}, this recipe {recipe.seed}, and its events or splits "
                "are drawn by the seed, so that it may have learned from test rows; expected events that no seed draws "
                "(a split by time, and all people), or runs of this seed that differ in how they were trained"
            )
        adapter = earlier.read(str(folder), key="train.teachers")
        if adapter.about is None:
            raise ConfigError(f"train.teachers: {name} has learned texts and no answers; expected a run of this recipe")
        earlier.check_method(replace(adapter, name=name), recipe)
        found[folder] = Teacher(replace(adapter, name=name), target_of(adapter.about), theirs.seed)
    return list(found.values())


def _value(recipe: config.Recipe, key: str) -> Any:
    section, _, name = key.partition(".")
    value = getattr(getattr(recipe, section), name) if name else getattr(recipe, section)
    # Scores are calibrated after training, and each run by itself.
    return replace(value, calibration="none") if key == "score" else value


def _drawn(data: config.Data) -> bool:
    """Whether the seed decides which events there are, or in which split."""
    return data.split.kind not in ("temporal", "leave_last_out", "column") or bool(
        data.sample_users or data.train_events or data.sampled_negatives
    )


def check_data(teachers: Sequence[Teacher], sha256: str) -> None:
    """Check that each learned from the very tables, whose hash this is.

    Raises:
        ConfigError: one did not.
    """
    for teacher in teachers:
        assert teacher.adapter.about is not None
        if (theirs := teacher.adapter.about.data.sha256) != sha256:
            raise ConfigError(
                f"train.teachers: {teacher.adapter.name} learned from tables of hash {theirs[:16]}, here they have "
                f"{sha256[:16]}; what it met may be a test row now; train it again on these"
            )


def taught(
    model: Any,
    teachers: Sequence[Teacher],
    data: WindowDataset,
    log: Log,
    prior: np.ndarray | None,
    recipe: config.Recipe,
    target: Target,
    *,
    processes: Any = None,
) -> np.ndarray:
    """What the training events' answers are taken for: a share of them the teachers' mean, the rest their own.

    Args:
        model: with the recipe's adapter attached; it is left as it was.
        teachers: from `find`; each is asked beside the prior that its seed gives.
        data: the training windows.
        log: all events.
        prior: by row of the log (n,), or None.
        recipe: of the run; `train.distill` is the share.
        target: of the run.
        processes: accelerate's state, over whose processes the windows are dealt.

    Returns:
        (n, M) float32 for `Target.losses`, zeros but for training rows: see `Target.own`.
    """
    kept = {name: tensor.clone() for name, tensor in adapters.training_state(model).items()}
    told: list[np.ndarray] = []
    rows = np.zeros(0, dtype=np.int64)
    try:
        for number, teacher in enumerate(teachers, 1):
            earlier.take_over(model, teacher.adapter, target.task)
            rows, outputs = train.score(model, data, description=f"teacher {number}", processes=processes)
            theirs = _prior_of(teacher, log, prior, recipe)
            told.append(teacher.target.told(outputs, None if theirs is None else theirs[rows]))
    finally:
        adapters.put_back(model, kept)
    return mixed(log, rows, target, told, recipe.train.distill)


def mixed(log: Log, rows: np.ndarray, target: Target, told: Sequence[np.ndarray], share: float) -> np.ndarray:
    """What `taught` returns, from what each teacher has `Target.told` of `rows`."""
    own = target.own(torch.from_numpy(log.label[rows].astype(np.int64))).numpy()
    result = np.zeros((len(log), own.shape[1]), dtype=np.float32)
    result[rows] = (1 - share) * own + share * target.agreed(told)
    return result


def _prior_of(teacher: Teacher, log: Log, prior: np.ndarray | None, recipe: config.Recipe) -> np.ndarray | None:
    if recipe.score.prior not in DRAWN_PRIORS or teacher.seed == recipe.seed:
        return prior
    alone = replace(recipe, seed=teacher.seed, eval=replace(recipe.eval, baselines=[]))
    return opponents.measure(log, alone).prior


def facts(teachers: Sequence[Teacher], share: float) -> dict[str, Any]:
    """What a run says of them."""
    return {"share": share, "runs": [teacher.adapter.facts() for teacher in teachers]}
