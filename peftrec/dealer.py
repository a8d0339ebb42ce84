"""Which process computes which rows, so that all of them finish together.

An optimizer step is the same rows however many processes share it: the recipe says how many
(`per_device_train_batch_size` x `gradient_accumulation_steps`), and the processes divide its forward passes among
themselves. So a run that was begun by one process can be continued by four.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence

import torch


def deal(cost: Sequence[int], hands: int, most: int | None = None) -> list[list[int]]:
    """Indices of what costs `cost`, dealt to `hands` so that their sums are as equal as a quick rule makes them.

    The costliest goes to whoever has the least so far (longest processing time first; Graham 1969). The same input
    always gives the same hands.

    Args:
        cost: of each piece, tokens.
        hands: how many share them.
        most: pieces that one hand can hold; None is any number.

    Returns:
        One list for each hand, the costliest piece first.
    """
    assert most is None or len(cost) <= hands * most
    dealt: list[list[int]] = [[] for _ in range(hands)]
    least = [(0, hand) for hand in range(hands)]
    for index in sorted(range(len(cost)), key=lambda i: (-cost[i], i)):
        total, hand = heapq.heappop(least)
        dealt[hand].append(index)
        if most is None or len(dealt[hand]) < most:
            heapq.heappush(least, (total + cost[index], hand))
    return dealt


class StepSampler:
    """Batches of row indices for one process's data loader; every row once an epoch, over all processes together.

    The order is drawn anew for each epoch, by torch's generator of the seed plus the epoch. Every process gets the same
    number of batches; one that has nothing to do in the last, smaller step gets empty ones.

    Args:
        tokens: of each row, (n,). Packing makes most rows almost equally long; the dealing evens out what is left.
        batch: rows of a forward pass.
        passes: forward passes of a step, a multiple of `world`.
        seed: of the order.
        rank: this process.
        world: number of processes.
        tell: is told each epoch, too: where a run goes on in the middle of one, Trainer tells nobody but the sampler.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        *,
        batch: int,
        passes: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        tell: Callable[[int], None] | None = None,
    ) -> None:
        assert passes % world == 0
        self.tokens, self.tell = tokens, tell
        self.batch, self.passes, self.seed, self.rank, self.world = batch, passes, seed, rank, world
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of this epoch from now on."""
        self.epoch = epoch
        if self.tell is not None:
            self.tell(epoch)

    def __len__(self) -> int:
        """Batches of one process in an epoch."""
        return -(-len(self.tokens) // (self.batch * self.passes)) * (self.passes // self.world)

    def __iter__(self) -> Iterator[list[int]]:
        """This process's batches of the epoch, `passes / world` for each step."""
        for step in self.steps():
            yield from self.share(step, self.rank)

    def steps(self) -> Iterator[list[list[int]]]:
        """The epoch's steps, each up to `passes` batches of up to `batch` rows; the same on every process."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order: list[int] = torch.randperm(len(self.tokens), generator=generator).tolist()
        size = self.batch * self.passes
        for begin in range(0, len(order), size):
            rows = order[begin : begin + size]
            if self.batch > 1:  # a batch is padded to its longest row
                rows.sort(key=lambda row: -self.tokens[row])
            yield [rows[first : first + self.batch] for first in range(0, len(rows), self.batch)]

    def share(self, step: Sequence[list[int]], rank: int) -> list[list[int]]:
        """The batches of `step` that process `rank` computes, `passes / world` of them; missing ones are empty."""
        own = self.passes // self.world
        padded = [len(batch) * max(self.tokens[row] for row in batch) for batch in step]
        mine = [step[index] for index in sorted(deal(padded, self.world, own)[rank])]
        return mine + [[]] * (own - len(mine))
