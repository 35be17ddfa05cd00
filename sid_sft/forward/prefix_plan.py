"""Decides what the frozen prefix computes when. Knows examples and numbers, and no model.

An example's inputs have three parts, of which the first two are static: no SID can change what the model computes there.

    template | own prefix | tail           template: the same tokens for every example of a task
    --------- static ----- - dynamic -     own prefix: up to the first SID (a title history); tail: from the first SID on

Example: two examples of the task title_sid and one of sid_sid, a token each word,

    Bought : | tape glue  -> <a_1> <b_2>          own prefix "tape glue", tail "<a_1>"
    Bought : | tape knife -> <a_3> <b_0>          own prefix "tape knife", tail "<a_3>"; the user's tree holds "tape" once
    Seen :   | <a_1> <b_2> -> <a_3> <b_0>         no own prefix, tail "<a_1> <b_2> <a_3>"

The plan is plain records that frozen_prefix.py takes: which own prefixes are run as one tree, which of them are cached
over the run and in which fixed batches they are computed, and for each micro-batch the tokens, positions, mask, cache
slots and targets of one call of the model.

A slot is the place of one token's keys and values in the cache. Shapes: B trees, S tokens, P cached tokens, n labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from sid_sft.forward.examples import Examples, Part
from sid_sft.forward.trees import CachedReads, Layout, Tree, build_tree, chain, common_prefix, group_by_user, lay_out

TREE_TOKENS = 1024  # nodes of the largest tree: its mask is quadratic
LEAST_TAIL, LEAST_STATIC = 128, 512  # tokens of the smallest micro-batch: as many as a plain one of one or two examples has


class Limits(NamedTuple):
    """How much is run at a time.

    tail, static: tokens per example of a micro-batch, on average, but no fewer in all than LEAST_TAIL and LEAST_STATIC; tail
    tokens keep activations for the backward, static ones only stand beside them as cached keys. cached: static tokens of a
    batch that is run to be cached. logits: values of a block of logits.
    """

    tail: int
    static: int
    cached: int
    logits: int


CPU_LIMITS = Limits(tail=16, static=48, cached=512, logits=250_000)  # a CPU is busy with little, and short of memory
GPU_LIMITS = Limits(tail=128, static=512, cached=8192, logits=64_000_000)  # an accelerator waits for every launch


class PrefixTree(NamedTuple):
    """The own prefixes of some examples of one user and task as one tree; its paths are the members', in their order."""

    members: list[int]
    tree: Tree


class CachePlan(NamedTuple):
    """What is kept over the run. Decided before the first step, and computed in fixed batches, so that no number depends on
    the order of the steps: a resumed run meets the very same bits.

    label_start (examples + 1,): where each example's static labels lie among all. first_slot: number of a tree whose keys
    are cached -> slot of its first token. slots: how many there are. batches: numbers of trees that are run together.
    batch_of: number of a tree -> place of its batch.
    """

    label_start: np.ndarray
    first_slot: dict[int, int]
    slots: int
    batches: list[list[int]]
    batch_of: dict[int, int]

    def label_places(self, owners: list[int]) -> np.ndarray:
        """Where the static labels of some examples lie among all."""
        return np.concatenate([np.arange(self.label_start[i], self.label_start[i + 1]) for i in owners])


class ModelBatch(NamedTuple):
    """One call of the model: trees behind the template of a task, and what their hidden states predict.

    layout: tokens, positions and masks. slots: for each tree the slots (P,) that it reads between template and itself, or
    None. predicting (n,): places among the B x S hidden states; targets (n,): the token that each predicts. owners: whose
    labels these are, in their order.
    """

    task: int
    layout: Layout
    slots: list[np.ndarray] | None
    predicting: np.ndarray
    targets: np.ndarray
    owners: list[int]


class PrefixPlan:
    """The parts of all examples, and how a step is cut into calls of the model.

    group_users: the examples of one user and task that fall into one step are one tree in the tail, too.
    """

    def __init__(self, examples: Examples, micro_batch_size: int, limits: Limits, *, group_users: bool) -> None:
        self.examples, self.limits, self.group_users = examples, limits, group_users
        self.tail_tokens = max(LEAST_TAIL, micro_batch_size * limits.tail)
        self.static_tokens = max(LEAST_STATIC, micro_batch_size * limits.static)
        self.templates = find_templates(examples)
        self.template_len = np.array([len(self.templates.get(task, ())) for task in range(128)])[examples.task]
        self.static_end = np.minimum(examples.static_len, examples.length - 1)  # the last token is never an input
        self.static_labels = np.maximum(0, self.static_end - examples.prompt_len + 1)  # predicted from static positions
        self.own_len = self.static_end - self.template_len
        self.tail_len = examples.length - 1 - self.static_end
        self.trees: list[PrefixTree] = []
        self.tree_of, self.place_in_tree = self.plant_trees()
        self.cache: CachePlan | None = None  # until `plan_cache`

    # ---- trees of own prefixes

    def plant_trees(self) -> tuple[np.ndarray, np.ndarray]:
        """Groups the examples that have an own prefix by task and user into trees; returns each example's tree, or -1, and
        its place among the tree's members."""
        tree_of, place = np.full((2, len(self.examples)), -1, dtype=np.int64)
        for members in group_by_user(self.examples, np.nonzero(self.own_len > 0)[0], self.examples.task):
            for part in self.split_members(members):
                tree_of[part], place[part] = len(self.trees), np.arange(len(part))
                self.trees.append(self.prefix_tree(part))
        return tree_of, place

    def prefix_tree(self, members: list[int]) -> PrefixTree:
        """The tree of the own prefixes of examples of one task."""
        ids = self.examples.ids
        return PrefixTree(members, build_tree([ids(i)[self.template_len[i] : self.static_end[i]] for i in members]))

    def split_members(self, members: list[int]) -> Iterable[list[int]]:
        """Cuts a user's examples, shortest first, so that no tree can outgrow TREE_TOKENS (a lone example may)."""
        part, size = [], 0
        for i in sorted(members, key=lambda i: (self.examples.prompt_len[i], i)):
            # Upper bound: the longest prompt, which the others share, and each one's own static answer.
            answer = max(0, int(self.static_end[i] - self.examples.prompt_len[i]))
            grown = size + answer
            if part and grown + int(self.examples.prompt_len[i]) > TREE_TOKENS:
                yield part
                part, grown = [], answer
            part.append(i)
            size = grown
        yield part

    def trees_of(self, members: list[int]) -> Iterator[list[PrefixTree]]:
        """The own prefixes of these examples alone, as batches of trees of similar size."""
        groups: dict[int, list[int]] = {}
        for i in members:
            groups.setdefault(int(self.tree_of[i]), []).append(i)
        trees = [self.prefix_tree(group) for group in groups.values()]
        part: list[PrefixTree] = []
        for prefix in sorted(trees, key=lambda prefix: (len(prefix.tree.tokens), prefix.members)):
            if part and (len(part) + 1) * len(prefix.tree.tokens) > self.static_tokens:
                yield part
                part = []
            part.append(prefix)
        if part:
            yield part

    def task_of(self, prefix: PrefixTree) -> int:
        return int(self.examples.task[prefix.members[0]])

    # ---- what is cached over the run

    def plan_cache(self, free_slots: int) -> CachePlan:
        """Caches all static labels, and the keys of as many trees that tails will read as have room in `free_slots`."""
        first_slot: dict[int, int] = {}
        slots = 0
        for number, (members, tree) in enumerate(self.trees):
            if (self.tail_len[members] > 0).any() and slots + len(tree.tokens) <= free_slots:
                first_slot[number] = slots
                slots += len(tree.tokens)
        batches = self.cached_batches()
        batch_of = {number: place for place, batch in enumerate(batches) for number in batch}
        label_start = np.concatenate([[0], np.cumsum(self.static_labels)])
        self.cache = CachePlan(label_start, first_slot, slots, batches, batch_of)
        return self.cache

    def cached_batches(self) -> list[list[int]]:
        """Fixed batches of trees, of one task and similar size each, that are run whole when one of them is first needed."""
        sizes = [(self.task_of(prefix), len(prefix.tree.tokens), number) for number, prefix in enumerate(self.trees)]
        batches: list[list[int]] = []
        for task, size, number in sorted(sizes):
            full = batches and (len(batches[-1]) + 1) * size > self.limits.cached
            if not batches or full or self.task_of(self.trees[batches[-1][0]]) != task:
                batches.append([])
            batches[-1].append(number)
        return batches

    def caches_keys(self, i: int) -> bool:
        """Whether the keys and values of an example's own prefix are cached."""
        return self.cache is not None and int(self.tree_of[i]) in self.cache.first_slot

    def slots_of(self, i: int) -> np.ndarray:
        """The slots of an example's own prefix, where its keys are cached."""
        number = int(self.tree_of[i])
        return self.cache.first_slot[number] + self.trees[number].tree.paths[self.place_in_tree[i]]

    # ---- calls of the model

    def template_batch(self, task: int) -> ModelBatch:
        """A task's template, alone and from position 0 on."""
        none = np.empty(0, dtype=np.int64)
        return ModelBatch(task, lay_out([chain(self.templates[task])]), None, none, none, [])

    def prefix_batch(self, batch: list[PrefixTree]) -> ModelBatch:
        """Own prefixes of one task, and the labels that they predict."""
        task = self.task_of(batch[0])
        start = len(self.templates[task])
        layout = lay_out([tree for _, tree in batch], start=start, past_len=start)
        predicting, targets, owners = [], [], []
        for b, (members, tree) in enumerate(batch):
            for i, path in zip(members, tree.paths, strict=True):
                if self.static_labels[i]:
                    first = self.examples.prompt_len[i] - 1
                    nodes = path[first - self.template_len[i] :]
                    predicting.append(b * layout.width + nodes)
                    targets.append(self.examples.ids(i)[first + 1 : first + 1 + len(nodes)])
                    owners.append(i)
        return ModelBatch(task, layout, None, joined(predicting), joined(targets), owners)

    def tail_batch(self, indices: np.ndarray, slots: dict[int, np.ndarray] | None) -> ModelBatch:
        """The tails of a micro-batch, and the labels that they predict. slots: example -> slots of its own prefix; None
        where the examples have none."""
        examples, task = self.examples, int(self.examples.task[indices[0]])
        trees, reads, read_slots, paths, targets = [], [], [], [], []
        for group in self.tail_groups(indices):
            tree = self.tail_tree(group)
            if slots is not None:
                own, read = self.cached_reads(group, tree, slots)
                read_slots.append(own)
                reads.append(read)
            for i, path in zip(group, tree.paths, strict=True):
                first = max(int(examples.prompt_len[i]) - 1, int(self.static_end[i]))  # first predicting position here
                paths.append((len(trees), path[len(path) - (int(examples.length[i]) - 1 - first) :]))
                targets.append(examples.ids(i)[first + 1 :])
            trees.append(tree)
        start = len(self.templates[task])
        past_len = start + max(map(len, read_slots), default=0)
        layout = lay_out(trees, start=start, past_len=past_len, reads=reads or None)
        predicting = joined([b * layout.width + path for b, path in paths])
        return ModelBatch(task, layout, read_slots or None, predicting, joined(targets), indices.tolist())

    def tail_groups(self, indices: np.ndarray) -> list[list[int]]:
        """What makes one tree of a tail batch: an example, or with `group_users` those of one user and prefix tree."""
        return group_by_user(self.examples, indices, self.tree_of) if self.group_users else [[int(i)] for i in indices]

    def tail_tree(self, group: list[int]) -> Tree:
        """The tree of a group's tails; its paths are the examples', in their order."""
        examples = self.examples
        if len(group) == 1:
            (i,) = group
            return chain(examples.ids(i)[self.static_end[i] : examples.length[i] - 1], depth=int(self.own_len[i]))
        whole = build_tree([examples.ids(i)[self.template_len[i] : examples.length[i] - 1] for i in group])
        dynamic = np.zeros(len(whole.tokens), dtype=bool)
        for i, path in zip(group, whole.paths, strict=True):
            dynamic[path[int(self.own_len[i]) :]] = True
        number = np.cumsum(dynamic) - 1
        paths = [number[path[int(self.own_len[i]) :]] for i, path in zip(group, whole.paths, strict=True)]
        return Tree(whole.tokens[dynamic], whole.depth[dynamic], paths)

    def cached_reads(self, group: list[int], tree: Tree, slots: dict[int, np.ndarray]) -> tuple[np.ndarray, CachedReads]:
        """Which slots a tree of tails reads (P,), and how."""
        own = np.unique(np.concatenate([slots[i] for i in group]))
        positions = np.zeros(len(own), dtype=np.int64)
        read = np.zeros((len(tree.tokens), len(own)), dtype=bool)
        for i, path in zip(group, tree.paths, strict=True):
            columns = np.searchsorted(own, slots[i])
            positions[columns] = self.template_len[i] + np.arange(len(columns))
            read[np.ix_(path, columns)] = True
        return own, CachedReads(positions, read)

    # ---- a step as micro-batches

    def cut(self, indices: np.ndarray, processes: int) -> list[Part]:
        """The examples of a step as micro-batches: one task in each, tails of one size, own prefixes all cached or all not.

        What one process caches, it caches for itself: examples of a cached batch go to the process that owns the batch.
        """
        owner = self.owners(indices, processes)
        has_tail = self.tail_len[indices] > 0
        cached = np.array([self.caches_keys(i) if self.tree_of[i] >= 0 else -1 for i in indices])
        kinds = np.stack([self.examples.task[indices], has_tail, cached, owner], axis=1)
        parts: list[Part] = []
        for kind in np.unique(kinds, axis=0):
            members = indices[(kinds == kind).all(axis=1)]
            tail, process = bool(kind[1]), int(kind[3])
            sizes = self.tail_len if tail else self.static_labels
            parts += self.cut_kind(members, sizes, None if process < 0 else process)
        return parts

    def owners(self, indices: np.ndarray, processes: int) -> np.ndarray:
        """The process that owns the cached batch of each example's tree, -1 where any process may take it."""
        if self.cache is None or not self.cache.batches or processes == 1:
            return np.full(len(indices), -1)
        batch_of = self.cache.batch_of
        return np.array([batch_of[int(self.tree_of[i])] % processes if self.tree_of[i] >= 0 else -1 for i in indices])

    def cut_kind(self, members: np.ndarray, sizes: np.ndarray, owner: int | None) -> list[Part]:
        """Micro-batches of examples of one kind, within the bounds on tail tokens and on cached keys read beside them."""
        groups = self.tail_groups(members)
        wide = [int(sizes[group].sum()) for group in groups]
        beside = [int(self.own_len[group].max()) if self.tail_len[group[0]] else 0 for group in groups]
        parts: list[list[int]] = [[]]
        count = most_beside = 0
        for g in sorted(range(len(groups)), key=lambda g: (wide[g], beside[g], groups[g])):
            most_beside = max(most_beside, beside[g])
            if parts[-1] and ((count + 1) * wide[g] > self.tail_tokens or (count + 1) * most_beside > self.static_tokens):
                parts.append([])
                count, most_beside = 0, beside[g]
            parts[-1] += groups[g]
            count += 1
        return [Part(np.array(part), self.cost(np.array(part)), owner) for part in parts]

    def cost(self, part: np.ndarray) -> float:
        """Forward passes of a token, roughly: two for a tail token (forward and backward), one for a static one.

        What is cached counts as free from the start: the order of the micro-batches, and with it every bit of the gradient,
        must not depend on which step came first.
        """
        static = 0 if self.cache is not None and self.cache.batches else self.own_len[part].sum()
        return float(2 * self.tail_len[part].sum() + static + 0.1 * self.static_labels[part].sum())

    def shares(self) -> str:
        """What the tokens are, in words: template, own prefix and tail add up to all."""
        total = int(self.examples.length.sum()) / 100
        template, own, labels = (int(part.sum()) / total for part in (self.template_len, self.own_len, self.examples.labels))
        return (
            f"{template:.0f}% template, {own:.0f}% own prefix, {100 - template - own:.0f}% tail; {labels:.0f}% carry a label"
        )


def find_templates(examples: Examples) -> dict[int, np.ndarray]:
    """The longest common token prefix of each task, at most up to the first position that predicts a label."""
    found = {}
    for task in np.unique(examples.task):
        members = np.nonzero(examples.task == task)[0]
        bound = min(int(np.minimum(examples.static_len, examples.prompt_len - 1)[members].min()), 10**6)
        shared = examples.ids(members[0])[:bound]
        for i in members[1:]:
            shared = shared[: common_prefix(shared, examples.ids(i)[: len(shared)])]
        found[int(task)] = np.array(shared)
    return found


def joined(arrays: list[np.ndarray]) -> np.ndarray:
    """Arrays of ints as one of int64, empty where there is none."""
    return np.concatenate(arrays).astype(np.int64) if arrays else np.empty(0, dtype=np.int64)
