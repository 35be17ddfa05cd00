"""Which examples make an optimizer step, and which process takes which of its micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from sid_sft.forward.examples import Examples, MicroBatch

KEYS_AT_ONCE = 1_000_000  # sorted together: a sort of all would hold 12 bytes an example
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
        order = np.arange(len(self.examples), dtype=np.int32)  # all that an epoch holds in memory: 4 bytes an example
        rng.shuffle(order)
        if self.group_users:
            order = side_by_side(order, self.examples.user)
        steps = np.arange(len(self))
        if self.group_by_length:
            pool = LENGTH_POOL * self.batch_size
            for start in range(0, len(order), pool):
                part = order[start : start + pool]
                order[start : start + pool] = part[np.argsort(-self.examples.length[part], kind="stable")]
            if len(steps) > 2:
                rng.shuffle(steps[:-1])  # the smaller step, if any, stays last
        for step in steps.tolist():
            yield order[step * self.batch_size : (step + 1) * self.batch_size].tolist()


def side_by_side(order: np.ndarray, user: np.ndarray) -> np.ndarray:
    """The examples in an order in which a user's stand together where the user's first one fell; items, of no user, stay.

    Users [5, -1, 5, 7] in the order [3, 0, 1, 2] -> [3, 0, 2, 1].
    """
    users = user[order]
    key = np.arange(len(order), dtype=order.dtype)
    first = np.empty(int(users.max(initial=-1)) + 1, dtype=order.dtype)
    of_users = users >= 0
    first[users[of_users][::-1]] = key[of_users][::-1]  # of a user's places the one assigned last stays, the smallest
    key[of_users] = first[users[of_users]]
    del users, first
    sorted_order, done = np.empty_like(order), 0
    for start in range(0, len(order), KEYS_AT_ONCE):
        members = np.nonzero((key >= start) & (key < start + KEYS_AT_ONCE))[0]
        members = members[np.argsort(key[members], kind="stable")]
        sorted_order[done : done + len(members)] = order[members]
        done += len(members)
    return sorted_order


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
