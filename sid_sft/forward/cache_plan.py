"""Plans what the frozen prefix keeps over a run: which trees of own prefixes, where, and in which fixed batches.

All of it is decided before the first step, as arrays over the trees and without a look at any token. See prefix_plan.py for
the trees, and the examples 0 to 3 at its head that are meant here.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from sid_sft.forward.prefix_parts import PrefixParts


class CachePlan(NamedTuple):
    """What is cached over the run. Decided before the first step and computed in fixed batches, so that a cached number does
    not depend on which step needs it first: a resumed run computes the same bits.

    label_start (examples + 1,): the static labels of example i are cached at label_start[i] to label_start[i + 1] - 1.
    first_slot (trees,): the slot of a tree's first node, -1 where its keys are not cached. slots: how many slots there are.
    run (n,): the trees that are run to be cached, batch by batch; batch_start (batches + 1,): the trees of batch b, which
    are run together, are run[batch_start[b] : batch_start[b + 1]]. batch_of (trees,): a tree's batch, or -1.

    For the examples 0 to 3: label_start [0, 1, 2, 3, 3], first_slot [0, 6], slots 8, run [1, 0], batch_start [0, 2],
    batch_of [0, 0].
    """

    label_start: np.ndarray
    first_slot: np.ndarray
    slots: int
    run: np.ndarray
    batch_start: np.ndarray
    batch_of: np.ndarray

    @property
    def batches(self) -> int:
        """How many fixed batches there are."""
        return len(self.batch_start) - 1

    def batch(self, number: int) -> list[int]:
        """The trees of a batch."""
        return self.run[self.batch_start[number] : self.batch_start[number + 1]].tolist()

    def in_slots(self, trees: np.ndarray) -> np.ndarray:
        """Whether the keys of some trees are cached; a tree -1, none, has no keys: [0, -1] -> [True, False]."""
        return (trees >= 0) & (looked_up(self.first_slot, trees) >= 0)

    def batches_of(self, trees: np.ndarray) -> np.ndarray:
        """The batches of some trees, -1 where there is none."""
        return np.where(trees >= 0, looked_up(self.batch_of, trees), -1)

    def label_places(self, labelled: list[int]) -> np.ndarray:
        """Where the static labels of some examples are cached; [1, 2] -> [1, 2] for the examples 0 to 3."""
        return np.concatenate([np.arange(self.label_start[i], self.label_start[i + 1]) for i in labelled])


def plan_cache(parts: PrefixParts, task: np.ndarray, free_slots: int, batch_tokens: int) -> CachePlan:
    """Plans to cache all static labels, and, as far as `free_slots` reach, the keys of each tree that a tail reads.

    task: of each example; batch_tokens: of a fixed batch, padding included.
    """
    first_slot, slots = slots_for(parts.nodes, parts.reads, free_slots)
    wanted = np.nonzero((first_slot >= 0) | parts.labelled)[0]
    of_trees = task[parts.members[parts.first_member[wanted]]]
    run, batch_start = fixed_batches(wanted, of_trees, parts.nodes[wanted], batch_tokens)
    batch_of = np.full(len(parts.nodes), -1, dtype=np.int32)
    batch_of[run] = np.repeat(np.arange(len(batch_start) - 1), np.diff(batch_start))
    return CachePlan(parts.label_start, first_slot, slots, run, batch_start, batch_of)


def slots_for(nodes: np.ndarray, wanted: np.ndarray, room: int) -> tuple[np.ndarray, int]:
    """The first slot of each wanted tree that still has room when its turn comes, in their order, -1 for the others; and
    how many slots these take.

    Trees of [4, 9, 5, 1] nodes, all wanted, and room for 10 -> [0, -1, 4, 9] and 10.
    """
    first = np.full(len(nodes), -1, dtype=np.int64)
    waiting, used = np.nonzero(wanted)[0], 0
    while len(waiting := waiting[nodes[waiting] <= room - used]):
        ends = used + np.cumsum(nodes[waiting], dtype=np.int64)
        fits = int(np.searchsorted(ends, room, side="right"))  # at least one
        first[waiting[:fits]] = ends[:fits] - nodes[waiting[:fits]]
        waiting, used = waiting[fits:], int(ends[fits - 1])
    return first, used


def fixed_batches(trees: np.ndarray, task: np.ndarray, nodes: np.ndarray, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Trees, each of a task and with so many nodes, in batches of one task and similar size: the trees in the order of their
    batches, and where each batch begins, with the end behind them.

    A batch has as many trees as `tokens` reach for, each padded to the largest, and at least one. Trees [0, 1, 2, 3] of one
    task with [4, 2, 9, 2] nodes, and 8 tokens -> [1, 3, 0, 2] and [0, 2, 3, 4].
    """
    order = np.lexsort((trees, nodes, task))
    trees, task, nodes = trees[order], task[order], nodes[order]
    alike = np.nonzero(np.diff(task, prepend=-1) | np.diff(nodes, prepend=-1))[0]  # runs of one task and size
    starts: list[np.ndarray] = []
    count, of_task = 0, -1  # of the batch that is being filled
    for begin, end in pairwise([*alike.tolist(), len(trees)]):
        most = max(1, tokens // int(nodes[begin]))
        joins = min(max(0, most - count), end - begin) if count and task[begin] == of_task else 0
        count, of_task = count + joins, int(task[begin])
        if begin + joins < end:
            starts.append(np.arange(begin + joins, end, most))
            count = end - int(starts[-1][-1])
    return trees, np.concatenate([*starts, [len(trees)]]).astype(np.int64)


def looked_up(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """values[places], and anything where a place is -1."""
    return values[places] if len(values) else places
