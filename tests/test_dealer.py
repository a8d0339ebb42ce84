"""Dealing rows: every row once, the same steps for any number of processes, and little waiting."""

from __future__ import annotations

import math
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftrec.dealer import StepSampler, deal
from peftrec.packing import pack

COSTS = st.lists(st.integers(1, 1000), max_size=40)


class TestDeal:
    def test_the_costliest_goes_to_who_has_least(self) -> None:
        # 7 | 5, then 4 to the second (9), then 4 to the first (11)
        assert deal([4, 5, 7, 4], 2) == [[2, 3], [1, 0]]

    def test_a_full_hand_gets_no_more(self) -> None:
        assert deal([9, 1, 1, 1], 2) == [[0], [1, 2, 3]]
        assert deal([9, 1, 1, 1], 2, most=2) == [[0, 3], [1, 2]]

    def test_nothing_to_deal(self) -> None:
        assert deal([], 3) == [[], [], []]

    @given(COSTS, st.integers(1, 9))
    def test_everything_once_and_no_hand_much_above_the_mean(self, cost: list[int], hands: int) -> None:
        dealt = deal(cost, hands)
        assert sorted(chain.from_iterable(dealt)) == list(range(len(cost)))
        sums = [sum(cost[i] for i in hand) for hand in dealt]
        assert max(sums) <= sum(cost) / hands + max(cost, default=0)
        for hand in dealt:
            assert [cost[i] for i in hand] == sorted((cost[i] for i in hand), reverse=True)


def sampler(tokens: list[int], *, batch: int = 1, passes: int = 1, rank: int = 0, world: int = 1) -> StepSampler:
    return StepSampler(tokens, batch=batch, passes=passes, seed=5, rank=rank, world=world)


class TestStepSampler:
    @given(
        tokens=st.lists(st.integers(1, 500), min_size=1, max_size=60),
        batch=st.integers(1, 3),
        each=st.integers(1, 3),
        world=st.integers(1, 4),
        epoch=st.integers(0, 3),
    )
    def test_steps_are_the_same_rows_for_any_number_of_processes(
        self, tokens: list[int], batch: int, each: int, world: int, epoch: int
    ) -> None:
        passes = each * world
        ranks = [sampler(tokens, batch=batch, passes=passes, rank=rank, world=world) for rank in range(world)]
        alone = sampler(tokens, batch=batch, passes=passes)
        for one in (*ranks, alone):
            one.set_epoch(epoch)
        shares = [list(one) for one in ranks]
        whole = list(alone)

        assert {len(share) for share in shares} == {len(one) for one in ranks} == {len(alone) // world}
        assert len(alone) == len(whole) == math.ceil(len(tokens) / (batch * passes)) * passes
        assert max(map(len, whole)) <= batch
        for step in range(len(alone) // passes):
            together = sorted(
                chain.from_iterable(chain.from_iterable(share[step * each : (step + 1) * each] for share in shares))
            )
            assert together == sorted(chain.from_iterable(whole[step * passes : (step + 1) * passes]))
        assert sorted(chain.from_iterable(whole)) == list(range(len(tokens)))

    def test_the_rows_are_told_the_epoch(self) -> None:
        told: list[int] = []
        StepSampler([3, 4], batch=1, passes=1, seed=5, tell=told.append).set_epoch(7)
        assert told == [7]

    def test_order_is_of_seed_and_epoch(self) -> None:
        tokens = [100] * 50
        first, again, other = sampler(tokens), sampler(tokens), StepSampler(tokens, batch=1, passes=1, seed=6)
        assert list(first) == list(again) != list(other)
        again.set_epoch(1)
        assert list(first) != list(again)

    def test_rows_come_in_the_drawn_order(self) -> None:
        order = torch.randperm(9, generator=torch.Generator().manual_seed(5)).tolist()
        assert list(sampler([7, 1, 3, 9, 2, 2, 8, 5, 6], passes=3)) == [[row] for row in order]

    def test_a_batch_holds_rows_of_one_length_where_it_can(self) -> None:
        (step,) = sampler([10, 90, 11, 91], batch=2, passes=2).steps()
        assert sorted(map(sorted, step)) == [[0, 2], [1, 3]]

    def test_what_is_missing_in_the_last_step_is_empty(self) -> None:
        shares = [list(sampler([5, 5, 5], passes=4, rank=rank, world=4)) for rank in range(4)]
        assert sorted(chain.from_iterable(shares)) == [[], [0], [1], [2]]

    @pytest.mark.parametrize("world", [2, 4, 8])
    def test_processes_seldom_wait(self, world: int) -> None:
        """Windows of 10 to 1000 tokens, packed and dealt; dealt by chance, a third of the time and more is waiting."""
        tokens = (10 ** np.random.default_rng(3).uniform(1, 3, 4000)).astype(int).tolist()
        packed = [sum(tokens[window] for window in row) for row in pack(tokens, 1024)]

        def idle(costs: list[int], passes: int) -> float:
            one = sampler(costs, passes=passes, world=world)
            shares = [[one.share(step, rank) for rank in range(world)] for step in one.steps()]
            slowest = sum(
                max(sum(costs[row] for row in chain.from_iterable(share)) for share in step) for step in shares
            )
            return 1 - sum(costs) / (world * slowest)

        assert idle(tokens, passes=world) > {2: 0.25, 4: 0.4, 8: 0.5}[world]  # one window each
        assert idle(tokens, passes=4 * world) < idle(tokens, passes=world) / 2
        assert idle(packed, passes=world) < 0.02
