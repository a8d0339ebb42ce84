"""Clicks by matrix factorisation: log-odds that know what the model knows, and a prior that says the same later."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from peftrec import baselines, click_factors, opponents
from peftrec.baselines import Prior
from peftrec.click_factors import ClickFactors
from peftrec.errors import ModelError
from peftrec.rating_baselines import RatingPrior, RatingSettings
from peftrec.split import Log

SETTINGS = RatingSettings(factors=2, item=2.0, user=4.0, factor_penalty=5.0)


def two_tastes(n: int = 3000) -> Log:
    """Half of the people like even films, half odd ones; each likes a tenth of the others."""
    generator = np.random.default_rng(0)
    user, item = generator.integers(0, 60, n), generator.integers(0, 40, n)
    liked = generator.random(n) < np.where(user % 2 == item % 2, 0.9, 0.1)
    order = np.lexsort((np.arange(n), user))
    return Log(
        user=user[order].astype(np.int32),
        item=item[order].astype(np.int32),
        timestamp=np.arange(n),
        label=liked[order].astype(np.int8),
        rating=None,
        split=generator.choice(3, n, p=[0.8, 0.1, 0.1]).astype(np.int8),
        user_ids=pl.Series(range(60)),
        items=pl.DataFrame({"item_id": [f"film {i}" for i in range(40)]}),
        prompts=None,
        scale=(0.0, 1.0),
    )


@pytest.fixture(scope="module")
def log() -> Log:
    return two_tastes()


def test_factors_tell_tastes_apart_where_the_bias_cannot(log: Log) -> None:
    test = log.split == 2
    found = click_factors.predict(log, "frozen", settings=SETTINGS).scores[test]
    bias = baselines.predict(log, "frozen").scores["bias"][test]
    assert roc_auc_score(log.label[test], bias) < 0.6
    assert roc_auc_score(log.label[test], found) > 0.8


def test_scores_are_log_odds(log: Log) -> None:
    valid = log.split == 1
    found = click_factors.predict(log, "frozen", settings=SETTINGS).scores[valid]
    chances = [1 / (1 + np.exp(-factor * found)) for factor in (0.8, 1.0, 1.25)]
    losses = [log_loss(log.label[valid], chance) for chance in chances]
    assert min(losses) == losses[1]


@pytest.mark.parametrize("history", ["frozen", "streaming"])
def test_no_row_knows_its_own_answer(log: Log, history: str) -> None:
    row = int(np.flatnonzero(log.split == 0)[1000])
    other = replace(log, label=np.where(np.arange(len(log)) == row, 1 - log.label, log.label).astype(np.int8))
    # The answer moves the deviation of all answers, and with a validation row the calibration: neither tells it.
    scores = []
    for each in (log, other):
        raw = click_factors.predict(each, history, settings=SETTINGS)  # type: ignore[arg-type]
        scores.append((raw.scores[row] - raw.prior.intercept) / raw.prior.slope / raw.prior.factors.bounds[1])
    assert scores[0] == pytest.approx(scores[1], abs=2e-3)


def test_prior_scores_a_frozen_row_as_the_baseline_does(log: Log) -> None:
    found = click_factors.predict(log, "frozen", settings=SETTINGS)
    prior = opponents.prior_from_json("click", found.prior.to_json())
    assert prior == found.prior
    ids = np.array(log.items["item_id"].to_list())
    for user in range(0, 60, 7):
        met, held = (np.flatnonzero((log.user == user) & mask) for mask in (log.split == 0, log.split != 0))
        score = prior.scores(ids[log.item[met]], log.label[met], ids[log.item[held]])
        assert score == pytest.approx(found.scores[held], abs=1e-5)


def test_a_prior_by_hand() -> None:
    # Answers are 0 and 2. A like of "a" is 2 - (1 + 0.5) above what is expected of it: half of that is the person's.
    factors = RatingPrior(1.0, {"a": (0.5,)}, 1.0, 1.0, (0.0, 2.0))
    prior = ClickFactors(factors, slope=3.0, intercept=-1.0)
    assert prior.scores(["a"], [1], ["a", "b"]) == pytest.approx([3 * 1.75 - 1, 3 * 1.25 - 1])
    assert prior.scores([], [], ["a"]) == pytest.approx([3 * 1.5 - 1])


def test_the_kind_of_a_saved_prior_is_read_off_it() -> None:
    bias = Prior(0.5, {"a": 0.1}, 3.0)
    assert opponents.prior_from_json("click", bias.to_json()) == bias
    rating = RatingPrior(3.0, {"a": (0.5,)}, 1.0, 1.0, (1.0, 5.0))
    assert opponents.prior_from_json("rating", rating.to_json()) == rating


@pytest.mark.parametrize(
    "change", [{"slope": None}, {"slope": 1e7}, {"intercept": float("nan")}, {"factors": {}}, {"more": 1}]
)
def test_a_broken_prior_is_refused_in_one_line(change: dict[str, object]) -> None:
    factors = {"mean": 1, "items": {"a": [0.5]}, "user_penalty": 1, "factor_penalty": 1, "bounds": [0, 2]}
    good = {"factors": factors, "slope": 3, "intercept": -1}
    assert opponents.prior_from_json("click", json.dumps(good)) == ClickFactors.from_json(json.dumps(good))
    with pytest.raises(ModelError, match=r"^prior: .*; fetch the adapter again$") as error:
        opponents.prior_from_json("click", json.dumps({**good, **change}))
    assert "\n" not in str(error.value)
