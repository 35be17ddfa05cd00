"""Which examples make an optimizer step, and which process takes which of its micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from sid_sft.forward.examples import Examples, MicroBatch

LENGTH_POOL = 50  # steps whose examples are sorted together under group_by_length, as HF's own sampler has it


class StepSampler:
    """The examples of each optimizer step of an epoch; every example once an epoch, the last step may be smaller.

    The order depends on seed and epoch alone, not on the number of processes.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        seed: int,
        *,
        group_by_length: bool = False,
        group_users: bool = False,
    ) -> None:
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.group_by_length, self.group_users = group_by_length, group_users
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.examples) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.examples))
        if self.group_users:
            # A user's examples stand together where the user's first one fell; items keep their own places.
            users = self.examples.user[order]
            first = {int(user): place for place, user in reversed(list(enumerate(users)))}
            key = np.where(users >= 0, [first[int(user)] for user in users], np.arange(len(order)))
            order = order[np.argsort(key, kind="stable")]
        if self.group_by_length:
            pool = LENGTH_POOL * self.batch_size
            pools = [order[i : i + pool] for i in range(0, len(order), pool)]
            order = np.concatenate([p[np.argsort(-self.examples.length[p], kind="stable")] for p in pools])
        steps = [order[i : i + self.batch_size].tolist() for i in range(0, len(order), self.batch_size)]
        if self.group_by_length and len(steps) > 2:
            middle = steps[:-1]  # the smaller step, if any, stays last
            steps = [middle[i] for i in rng.permutation(len(middle))] + steps[-1:]
        yield from steps


def deal(parts: list[MicroBatch], processes: int) -> list[list[np.ndarray]]:
    """Deals micro-batches to processes so that the costs are even: first what one process must take, then the dearest
    first, always to the least loaded."""
    hands: list[list[np.ndarray]] = [[] for _ in range(processes)]
    load = [0.0] * processes
    for part in sorted(parts, key=lambda part: (part.process is None, -part.cost)):
        process = load.index(min(load)) if part.process is None else part.process
        hands[process].append(part.indices)
        load[process] += part.cost
    return hands
