from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftrec import factors
from peftrec.factors import Penalties

PENALTIES = Penalties(item=1.0, user=2.0, factor=0.5)


def drawn(n: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), rng.normal(size=n)


def test_ridge_by_hand():
    # Three ones that sum to 6 under a penalty of 1: 6 / (3 + 1).
    assert factors.solve(np.ones((3, 1)), np.array([1.0, 2, 3]), np.array([1.0])) == pytest.approx([1.5])
    assert factors.solve(np.ones((0, 2)), np.ones(0), np.array([1.0, 2])).tolist() == [0, 0]


@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 99))
def test_leave_one_out_is_the_refit_without_the_row(n, d, seed):
    design, value = drawn(n, d, seed)
    penalty = np.linspace(0.5, 2, d)
    refit = [
        design[row] @ factors.solve(np.delete(design, row, axis=0), np.delete(value, row), penalty) for row in range(n)
    ]
    assert factors.leave_one_out(design, value, penalty) == pytest.approx(refit, abs=1e-9)


@given(st.integers(1, 30), st.integers(1, 3), st.integers(1, 8), st.data())
def test_solved_earlier_is_the_fit_of_the_first_rows_whatever_the_block(n, d, block, data):
    design, value = drawn(n, d)
    penalty = np.linspace(0.5, 2, d)
    known = np.array([data.draw(st.integers(0, row)) for row in range(n)])
    known = np.maximum.accumulate(known)
    wanted = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    expected = [factors.solve(design[: known[r]], value[: known[r]], penalty) for r in np.flatnonzero(wanted)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factors, "_BLOCK", block)
        found = factors.solved_earlier(design, value, known, wanted, penalty)
    np.testing.assert_allclose(found, np.reshape(expected, (-1, d)), atol=1e-9)


def test_effects_by_hand():
    # One user, two items rated 4 and 2 about a mean of 3. The user's effect stays zero, so each item is +-1 / (1 + 1).
    user, item, rating = np.array([0, 0]), np.array([0, 1]), np.array([4.0, 2])
    items = factors.fit_items(user, item, rating, 3.0, (1, 3), 0, PENALTIES, 13)
    assert items.effect == pytest.approx([0.5, -0.5, 0, 0])
    assert items.factors.shape == (4, 0)
    assert items.base(np.array([1, 2, -1])) == pytest.approx([2.5, 3, 3])


def test_effects_settle_where_both_ridge_equations_hold(monkeypatch):
    monkeypatch.setattr(factors, "_EFFECT_ROUNDS", 300)
    rng = np.random.default_rng(0)
    user, item, residual = rng.integers(0, 9, 200), rng.integers(0, 7, 200), rng.normal(size=200)
    of_item, of_user = factors._effects(user, item, residual, (9, 7), PENALTIES)
    left = residual - of_item[item] - of_user[user]
    assert np.bincount(user, left) == pytest.approx(PENALTIES.user * of_user)
    assert np.bincount(item, left) == pytest.approx(PENALTIES.item * of_item)


def test_factors_rebuild_planted_tastes_and_leave_strangers_at_zero():
    taste, kind = np.repeat([1.0, -1.0], 10), np.tile([1.0, -1.0], 6)
    user, item = (grid.ravel() for grid in np.meshgrid(np.arange(20), np.arange(12), indexing="ij"))
    rating = 3 + taste[user] * kind[item]
    items = factors.fit_items(user, item, rating, 3.0, (20, 13), 2, PENALTIES, 13)
    assert np.abs(items.effect).max() < 1e-9
    assert items.factors[12:].tolist() == [[0, 0], [0, 0]]  # an item without events, and no item
    outer = items.factors[:12] @ items.factors[:12].T
    assert np.sign(outer).tolist() == np.sign(np.outer(kind, kind)).tolist()
    design = items.design(np.arange(12))
    part = factors.solve(design, kind, PENALTIES.of_user(2))
    assert design @ part == pytest.approx(kind, abs=0.15)


def test_factors_do_not_depend_on_the_order_of_rows_nor_on_the_block(monkeypatch):
    rng = np.random.default_rng(0)
    user, item, rating = rng.integers(0, 9, 100), rng.integers(-1, 7, 100), rng.normal(size=100)
    found = factors.fit_items(user, item, rating, 0.0, (9, 7), 3, PENALTIES, 13)
    monkeypatch.setattr(factors, "_BLOCK", 2)
    order = rng.permutation(100)
    again = factors.fit_items(user[order], item[order], rating[order], 0.0, (9, 7), 3, PENALTIES, 13)
    assert again.factors == pytest.approx(found.factors)
    assert np.abs(found.factors[:-1]).max() > 0.01
    other = factors.fit_items(user, item, rating, 0.0, (9, 7), 3, PENALTIES, 14)
    assert other.factors != pytest.approx(found.factors)
