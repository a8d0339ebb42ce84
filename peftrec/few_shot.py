"""Learning from few events: which rows are tested, what counting makes of so few, and one training with its scores.

What is known of a tested row is the same for every way: what was learned from, and the events of its own person that
are strictly earlier in time.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from peftrec import adapters, backbone, baselines, click_factors, config, earlier, encode, scorer, train
from peftrec.augment import Augment
from peftrec.draws import drawn_order
from peftrec.encode import Encoder
from peftrec.ranking import Floats, Ints
from peftrec.rating_baselines import RatingSettings
from peftrec.split import TEST, TRAIN, Log
from peftrec.target import fit_target

BEST = 3  # rows of a person that a coverage looks at


def tested_rows(log: Log, most: int, most_of_one: int, seed: int) -> Ints:
    """The first test rows of people drawn by `seed`, of each at most `most_of_one`, together at most `most`.

    Dropping training events does not change which events these are.

    Args:
        log: all splits.
        most: rows; the last person that does not fit is left out, the first one never is.
        most_of_one: rows of one person: many people with few rows say more than few with many.
        seed: draws people.

    Returns:
        Indices into the log, ascending.
    """
    rows = log.rows(TEST)
    place = np.arange(len(rows)) - np.searchsorted(log.user[rows], log.user[rows])
    rows = rows[place < most_of_one]
    return encode.whole_users(rows, log.user, most, drawn_order(len(log.user_ids), seed, "evaluated users"))


def counted(log: Log, rows: Ints, seed: int) -> dict[str, Floats]:
    """Log-odds of `rows` by counting the training events of `log`, however few, and the person's own earlier events.

    Nothing is chosen on validation rows but the two numbers that turn matrix factorisation into log-odds, which do not
    change an order.

    Args:
        log: with the training events that may be known.
        rows: test rows, (m,).
        seed: of the factorisation.

    Returns:
        `global_mean`, `item_mean`, `bias` and `mf`, (m,) each.
    """
    bias = baselines.fit_prior(log, baselines.Shrinkage())
    factors = click_factors.predict(log, "streaming", settings=RatingSettings(), seed=seed).prior
    ids = log.items["item_id"].to_list()
    found: dict[str, list[float]] = {"global_mean": [], "item_mean": [], "bias": [], "mf": []}
    for row in rows.tolist():
        first = int(np.searchsorted(log.user, log.user[row]))
        known = first + np.flatnonzero(log.timestamp[first:row] < log.timestamp[row])
        met, labels, asked = [ids[code] for code in log.item[known]], log.label[known].tolist(), [ids[log.item[row]]]
        found["global_mean"].append(bias.mean)
        found["item_mean"].append(float(bias.scores([], [], asked)[0]))
        found["bias"].append(float(bias.scores(met, labels, asked)[0]))
        found["mf"].append(float(factors.scores(met, labels, asked)[0]))
    return {name: np.asarray(scores) for name, scores in found.items()}


def learned(
    log: Log, rows: Ints, recipe: config.Recipe, *, folder: Path, start: earlier.Earlier | None, stacked: bool = False
) -> Floats:
    """Log-odds of `rows` after training on the training events of `log`; nothing is chosen on validation rows.

    Args:
        log: with the training events that may be learned from.
        rows: test rows, (m,), ascending.
        recipe: prompt, model, adapter, training and seed; `adapter.method: none` trains nothing.
        folder: for checkpoints while it trains.
        start: the adapter to start from, or to ask as it is where nothing is trained.
        stacked: train a new adapter on top of it.

    Raises:
        ModelError: `start` does not fit the recipe.
    """
    backbone.check(recipe)
    label = log.label[log.split == TRAIN]
    target = fit_target(recipe.task, recipe.score.head, recipe.score.loss, log.scale, label, None)
    loaded = backbone.load(recipe.model, target)
    backbone.check_window(loaded.model, recipe.prompt.max_tokens)
    encoder = Encoder(log, recipe.prompt, loaded.tokenizer, recipe.eval.ties, task=recipe.task, kind=loaded.kind)
    model: Any = scorer.with_head(loaded.model, target.head, encoder.codec.answers)
    if start is not None:
        earlier.check(start, recipe.task, loaded.base, target, encoder.codec)
    if recipe.adapter.method != "none":
        model = adapters.attach(
            model,
            recipe.adapter,
            base_name=loaded.base.hub_id,
            seed=recipe.seed,
            steps=recipe.train.max_steps,
            opening=encoder.opening,
        )
        if start is not None:
            earlier.take_over(model, start, recipe.task, stacked=stacked)
        rows_of_training = encoder.train(None, Augment.of(recipe))
        train.fit(
            model,
            rows_of_training,
            rows_of_training,
            target,
            lambda *_: {},
            train=dataclasses.replace(recipe.train, evals=0),
            folder=folder,
            seed=recipe.seed,
        )
    elif start is not None:
        model = adapters.load(model, start.folder)
    asked, outputs = train.score(model, encoder.evaluate(rows, "streaming", None), description="score")
    assert (asked == rows).all()
    return target.measure(outputs)[0]


def coverage(item: Ints, user: Ints, score: Floats) -> float:
    """Share of the tested items that are among the `BEST` best-scored rows of some person.

    Args:
        item: of each tested row, (m,).
        user: of each tested row, (m,).
        score: of each tested row, (m,).
    """
    order = np.lexsort((-score, user))
    of = user[order]
    place = np.arange(len(of)) - np.searchsorted(of, of)
    shown: npt.NDArray[Any] = item[order[place < BEST]]
    return len(np.unique(shown)) / len(np.unique(item))
