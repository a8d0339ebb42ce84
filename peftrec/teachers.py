"""Earlier runs as teachers: what several of them answer together is learned beside each event's own answer.

So an ensemble of seeds becomes one adapter, which costs what one costs (Hinton, Vinyals and Dean, Distilling the
Knowledge in a Neural Network, 2015).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peftrec import adapters, config, earlier, train
from peftrec.earlier import Earlier
from peftrec.errors import ConfigError
from peftrec.split import Log
from peftrec.target import Target
from peftrec.timeline import WindowDataset

ALIKE = ("task", "data", "prompt", "score")
"""Sections that a teacher's recipe shares with its pupil's."""


def find(recipe: config.Recipe) -> list[Earlier]:
    """The runs that `train.teachers` names.

    Raises:
        ConfigError: one learned something else than this recipe is about to, or from other events.
        ModelError: one holds no adapter, or one of another kind.
    """
    found = []
    for name in recipe.train.teachers:
        written = Path(name) / "config.yaml"
        if not written.is_file():
            raise ConfigError(f"train.teachers: {name} holds no config.yaml; expected the folder of a run that ended")
        theirs = config.load_recipe(written)
        for key in ALIKE:
            if getattr(theirs, key) != getattr(recipe, key):
                raise ConfigError(
                    f"train.teachers: {name} has another section {key} than this recipe; expected a run of the same "
                    "recipe under another seed, so that both read the same prompts and neither has met a test row"
                )
        if theirs.seed != recipe.seed and _drawn(recipe.data):
            raise ConfigError(
                f"train.teachers: {name} has seed {theirs.seed}, this recipe {recipe.seed}, and its events or splits "
                "are drawn by the seed, so that it may have learned from test rows; set the same seed"
            )
        teacher = earlier.read(name, key="train.teachers")
        if teacher.about is None:
            raise ConfigError(f"train.teachers: {name} has learned texts and no answers; expected a run of this recipe")
        earlier.check_method(teacher, recipe)
        found.append(teacher)
    return found


def _drawn(data: config.Data) -> bool:
    """Whether the seed decides which events there are, or in which split."""
    return data.split.kind not in ("temporal", "leave_last_out", "column") or bool(
        data.sample_users or data.train_events or data.sampled_negatives
    )


def taught(
    model: Any,
    teachers: Sequence[Earlier],
    data: WindowDataset,
    log: Log,
    prior: np.ndarray | None,
    target: Target,
    share: float,
    *,
    processes: Any = None,
) -> np.ndarray:
    """What the training events' answers are taken for: `share` of them the teachers' mean, the rest their own.

    Args:
        model: with the recipe's adapter attached; it is left as it was.
        teachers: from `find`.
        data: the training windows.
        log: all events.
        prior: by row of the log (n,), or None.
        target: of the run.
        share: from 0 to 1.
        processes: accelerate's state, over whose processes the windows are dealt.

    Returns:
        (n, M) float32 for `Target.losses`, zeros but for training rows: see `Target.own`.
    """
    kept = {name: tensor.clone() for name, tensor in adapters.training_state(model).items()}
    several: list[np.ndarray] = []
    rows = np.zeros(0, dtype=np.int64)
    for number, teacher in enumerate(teachers, 1):
        earlier.take_over(model, teacher, target.task)
        rows, outputs = train.score(model, data, description=f"teacher {number}", processes=processes)
        several.append(outputs)
    adapters.put_back(model, kept)
    agreed = target.agreed(several, None if prior is None else prior[rows])
    own = target.own(torch.from_numpy(log.label[rows].astype(np.int64))).numpy()
    result = np.zeros((len(log), own.shape[1]), dtype=np.float32)
    result[rows] = (1 - share) * own + share * agreed
    return result


def facts(teachers: Sequence[Earlier], share: float) -> dict[str, Any]:
    """What a run says of them."""
    return {"share": share, "runs": [teacher.facts() for teacher in teachers]}
