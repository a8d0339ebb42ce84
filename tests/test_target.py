"""What outputs mean, with numbers that can be checked by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftrec.target import Target, fit_target, pair_losses

STARS = (1.0, 2.0, 3.0, 4.0, 5.0)


def tensors(*values: Any) -> list[torch.Tensor]:
    return [torch.tensor(value, dtype=torch.float32) for value in values]


def test_clicks_are_log_odds_with_the_prior_added() -> None:
    outputs, prior = tensors([[1.0, 3.0], [0.5, 0.0]], [0.25, -1.0])
    target = Target()
    assert target.score(outputs, prior).tolist() == [2.25, -1.5]
    assert target.answers(outputs, prior).tolist() == [1.0, 0.0]
    losses = target.losses(outputs, prior, torch.tensor([1, 1]))
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-2.25)), math.log1p(math.exp(1.5))])


def test_a_linear_head_of_clicks_is_the_log_odds() -> None:
    outputs, prior = tensors([[0.5]], [1.0])
    assert Target(head="linear", offset=(0.0,)).score(outputs, prior).tolist() == [1.5]


def test_ratings_are_the_mean_of_their_distribution() -> None:
    # Chances 1/4 and 3/4 of 1 and 2.
    outputs, prior = tensors([[0.0, math.log(3)]], [9.0])
    target = Target("rating", scale=(1.0, 2.0), slope=0.0)
    assert target.score(outputs, prior).tolist() == pytest.approx([1.75])
    assert target.answers(outputs, prior).tolist() == [2.0]
    assert target.losses(outputs, prior, torch.tensor([0])).tolist() == pytest.approx([math.log(4)])
    squared = Target("rating", loss="squared_error", scale=(1.0, 2.0), slope=0.0)
    assert squared.losses(outputs, prior, torch.tensor([0])).tolist() == pytest.approx([0.5625])


def test_a_linear_head_of_ratings_adds_the_prior_to_it() -> None:
    outputs, prior = tensors([[0.25], [-0.5]], [4.0, 3.0])
    target = fit_target("rating", "linear", "cross_entropy", STARS, np.array([2, 4], np.int8), np.array([3.0, 5.0]))
    assert (target.offset, target.slope, target.centre) == ((4.0,), 1.0, 4.0)
    assert target.score(outputs, prior).tolist() == [4.25, 2.5]
    assert target.answers(outputs, prior).tolist() == [4.0, 2.0]
    assert target.losses(outputs, prior, torch.tensor([4, 0])).tolist() == [0.5625, 2.25]


def test_a_linear_head_without_prior_starts_at_the_mean() -> None:
    target = fit_target("rating", "linear", "squared_error", STARS, np.array([2, 4], np.int8), None)
    assert target.score(*tensors([[0.0]], [0.0])).tolist() == [4.0]


def test_scores_of_ratings_stay_on_the_scale() -> None:
    target = Target("rating", "linear", scale=STARS, offset=(3.0,), slope=0.0)
    score, answer = target.measure(np.array([[9.0], [-9.0], [0.4]], dtype=np.float32))
    assert score.tolist() == pytest.approx([5.0, 1.0, 3.4])
    assert answer.tolist() == [5.0, 1.0, 3.0]


def rated(seed: int, n: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Ratings around a prior that is right on average, and that prior."""
    random = np.random.default_rng(seed)
    prior = np.clip(random.normal(3.4, 0.6, n), 1, 5)
    return np.clip(np.round(prior + random.normal(0, 0.8, n)), 1, 5), prior


@given(seed=st.integers(0, 50))
def test_equal_outputs_predict_what_the_prior_predicts(seed: int) -> None:
    rating, prior = rated(seed)
    target = fit_target("rating", "tokens", "cross_entropy", STARS, (rating - 1).astype(np.int8), prior)
    score, _ = target.measure(np.zeros((len(rating), 5), dtype=np.float32), prior)
    # The likelihood's own conditions: mean rating, mean rating times prior, and each answer's share are met.
    assert score.mean() == pytest.approx(rating.mean(), abs=1e-3)
    assert (score * prior).mean() == pytest.approx((rating * prior).mean(), abs=3e-3)
    assert np.sqrt(np.mean((score - rating) ** 2)) <= np.sqrt(np.mean((prior - rating) ** 2)) + 1e-3
    assert np.corrcoef(score, prior)[0, 1] > 0.99
    assert target.slope > 0


def test_an_answer_that_nobody_gave_is_improbable_and_finite() -> None:
    rating, prior = rated(1)
    target = fit_target("rating", "tokens", "cross_entropy", (*STARS, 6.0), (rating - 1).astype(np.int8), prior)
    chance = torch.softmax(torch.tensor(target.offset) + target.slope * 0.0, dim=0)
    assert np.isfinite(target.offset).all()
    assert chance[-1] < 0.01


def test_nothing_known_is_the_centre() -> None:
    rating, prior = rated(2)
    target = fit_target("rating", "tokens", "cross_entropy", STARS, (rating - 1).astype(np.int8), prior)
    outputs = np.random.default_rng(0).normal(size=(5, 5)).astype(np.float32)
    alone, _ = target.measure(outputs)
    centred, _ = target.measure(outputs, np.full(5, target.centre))
    assert alone.tolist() == centred.tolist()
    assert target.centre == pytest.approx(rating.mean())


def test_mean_loss_is_the_mean_of_losses() -> None:
    outputs, prior, label = np.zeros((3, 2), np.float32), np.array([0.0, 1.0, -1.0]), np.array([1, 1, 0], np.int8)
    expected = np.mean([math.log(2), math.log1p(math.exp(-1)), math.log1p(math.exp(-1))])
    assert Target().mean_loss(outputs, prior, label) == pytest.approx(expected)


def test_pairs_of_one_window_by_hand() -> None:
    def loss(gap: float) -> float:
        return math.log1p(math.exp(-gap))

    score = torch.tensor([2.0, 0.5, 1.0, 5.0, -1.0, 0.0, 3.0])
    label = torch.tensor([1, 0, 0, 1, 0, 1, 1])
    window = torch.tensor([0, 0, 0, 4, 4, 7, 7])
    # Three events with the pairs 2 over 0.5 and 2 over 1; two events with one pair; the last window likes everything.
    expected = 3 * (loss(1.5) + loss(1.0)) / 2 + 2 * loss(6.0)
    assert pair_losses(score, label, window).item() == pytest.approx(expected)
    assert pair_losses(score, label, torch.arange(7)).item() == 0
    assert pair_losses(score[:0], label[:0], window[:0]).item() == 0


def test_a_pair_pulls_its_events_apart() -> None:
    score = torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
    pair_losses(score, torch.tensor([1, 0, 0]), torch.zeros(3, dtype=torch.long)).backward()
    assert score.grad is not None
    liked, near, far = score.grad.tolist()
    assert liked < 0 < near < far
    assert liked + near + far == pytest.approx(0)
