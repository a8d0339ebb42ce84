"""The losses that bring domains together: small numbers by hand, zero where nothing differs, signs of gradients."""

from __future__ import annotations

import math

import pytest
import torch

from peftrec import align_losses
from peftrec.align_losses import alike_in_size, coral, info_nce, mmd, reverse, strength, tell_apart

SOURCE = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
TARGET = torch.tensor([[0.0, 2.0], [0.0, -2.0]])


def test_covariances_by_hand() -> None:
    # Covariances diag(2, 0) and diag(0, 8): 4 + 64, over 4 * 2 * 2.
    assert float(coral(SOURCE, TARGET)) == pytest.approx(68 / 16)
    assert float(coral(SOURCE, SOURCE + 5)) == 0, "means do not matter"
    assert float(coral(SOURCE, torch.tensor([[0.0, 1.0], [0.0, -1.0]]))) == pytest.approx(8 / 16)


def test_kernels_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(align_losses, "WIDTHS", (1.0,))
    one, other = torch.tensor([[0.0]]), torch.tensor([[3.0]])
    # One distance, 9, which is its own mean: 1 + 1 - 2 exp(-1).
    assert float(mmd(one, other)) == pytest.approx(2 - 2 / math.e)
    # Distances 1, 1 and 4 between 0, 1 and 2, mean 2: the source's kernels are 1 and exp(-1/2).
    source, target = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0]])
    expected = (1 + math.exp(-1 / 2)) / 2 + 1 - (math.exp(-4 / 2) + math.exp(-1 / 2))
    assert float(mmd(source, target)) == pytest.approx(expected)


def test_several_widths_are_averaged() -> None:
    one, other = torch.tensor([[0.0]]), torch.tensor([[3.0]])
    kernel = sum(math.exp(-1 / width) for width in align_losses.WIDTHS) / len(align_losses.WIDTHS)
    assert float(mmd(one, other)) == pytest.approx(2 - 2 * kernel)


def test_equal_domains_have_no_distance() -> None:
    torch.manual_seed(0)
    states = torch.randn(20, 6)
    assert float(coral(states, states[torch.randperm(20)])) == pytest.approx(0, abs=1e-12)
    assert float(mmd(states, states[torch.randperm(20)])) == pytest.approx(0, abs=1e-6)
    assert float(mmd(states, states + 1)) > 0.1
    assert float(coral(states, 2 * states)) > 0.1


@pytest.mark.parametrize("loss", [coral, mmd])
def test_a_step_down_the_gradient_brings_domains_nearer(loss: object) -> None:
    torch.manual_seed(1)
    source, target = torch.randn(30, 4), 2 * torch.randn(30, 4) + 1
    source.requires_grad_()
    before = loss(source, target)  # type: ignore[operator]
    before.backward()
    with torch.no_grad():
        assert loss(source - 0.1 * source.grad / source.grad.norm(), target) < before  # type: ignore[operator]


def test_the_gradient_is_turned_round() -> None:
    states = torch.tensor([1.0, -2.0], requires_grad=True)
    turned = reverse(states, 0.25)
    assert torch.equal(turned, states)
    (turned * torch.tensor([4.0, 8.0])).sum().backward()
    assert states.grad is not None
    assert states.grad.tolist() == [-1.0, -2.0]


def test_telling_apart_by_hand() -> None:
    chance = torch.zeros(3), torch.zeros(5)
    assert float(tell_apart(*chance)) == pytest.approx(math.log(2))
    # Log-odds 1 for a source's state and for a target's one: log(1 + 1/e) and log(1 + e).
    found = float(tell_apart(torch.tensor([1.0]), torch.tensor([1.0])))
    assert found == pytest.approx((math.log(1 + 1 / math.e) + math.log(1 + math.e)) / 2)
    assert float(tell_apart(torch.tensor([30.0]), torch.tensor([-30.0, -30.0]))) < 1e-9


def test_the_next_item_by_hand() -> None:
    scores = torch.tensor([[math.log(3.0), 0.0, 9.0], [0.0, 0.0, 0.0]])
    among = torch.tensor([[True, True, False], [True, True, True]])
    # Three to one among two candidates; one in three.
    expected = (math.log(4 / 3) + math.log(3)) / 2
    assert float(info_nce(scores, torch.tensor([0, 2]), among)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("progress", "ramp", "expected"),
    [(0.0, 1.0, 0.0), (0.1, 1.0, 2 / (1 + math.exp(-1)) - 1), (0.05, 0.5, 2 / (1 + math.exp(-1)) - 1), (0.0, 0.0, 1.0)],
)
def test_the_ramp(progress: float, ramp: float, expected: float) -> None:
    assert strength(progress, ramp) == pytest.approx(expected)
    assert strength(1.0, ramp) > 0.9999


def test_size_is_shared() -> None:
    source, target = torch.tensor([[3.0, 0.0]], requires_grad=True), torch.tensor([[0.0, 4.0]])
    ours, theirs = alike_in_size(source, target)  # root mean square of 3, 0, 0, 4: 2.5
    assert ours.tolist() == [[pytest.approx(1.2), 0.0]]
    assert theirs.tolist() == [[0.0, pytest.approx(1.6)]]
    # x / size, whose derivative is 1 / size less x * x / (4 size^3): .4 - 9 / 62.5.
    ours[0, 0].backward()
    assert source.grad is not None
    assert source.grad.tolist() == [[pytest.approx(0.256), 0.0]]
    nothing_there = torch.zeros(2, 3, requires_grad=True)
    ours, _ = alike_in_size(nothing_there, nothing_there)
    ours.sum().backward()
    assert nothing_there.grad is not None
    assert nothing_there.grad.isfinite().all()


def test_making_all_states_smaller_lowers_nothing() -> None:
    """A loss that does not change with their size has a gradient across the states (Euler)."""
    torch.manual_seed(2)
    first, second = torch.randn(12, 5) + 1, 2 * torch.randn(9, 5)
    for loss in (
        lambda source, target: coral(*alike_in_size(source, target)),
        lambda source, target: mmd(*alike_in_size(source, target)),
        mmd,
    ):
        states = first.clone().requires_grad_(), second.clone().requires_grad_()
        loss(*states).backward()
        found = [one.grad for one in states if one.grad is not None]
        across = sum(float((grad * one.detach()).sum()) for grad, one in zip(found, states, strict=True))
        along = sum(float(grad.norm() * one.detach().norm()) for grad, one in zip(found, states, strict=True))
        assert abs(across) < 1e-5 * along
    states = first.clone().requires_grad_(), second.clone().requires_grad_()
    mmd(*states).backward()
    middle = torch.cat((first, second)).mean(dim=0)
    towards = sum(float((one.grad * (one.detach() - middle)).sum()) for one in states if one.grad is not None)
    assert abs(towards) < 1e-5, "nor does drawing them together"


@pytest.mark.parametrize("empty", [0, 1])
def test_too_little_is_nothing_with_a_gradient(empty: int) -> None:
    few, many = torch.ones(empty, 2, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    found = [coral(few, many)]
    if not empty:
        found += [mmd(few, many), mmd(many, few), tell_apart(few[:, 0], many[:, 0])]
        found += [info_nce(few @ many.T, torch.zeros(0, dtype=torch.int64), torch.ones(0, 4, dtype=torch.bool))]
        found += [coral(*alike_in_size(few, few))]
    total = torch.stack(found).sum()
    total.backward()
    assert float(total.detach()) == 0
    assert few.grad is not None
    assert many.grad is not None
    assert not few.grad.any()
    assert not many.grad.any()
