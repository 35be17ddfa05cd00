"""Plans what the frozen prefix computes, and when: arrays of token ids and numbers, no model.

An example is a prompt, an answer and the end token; its inputs are all tokens but the last. They have three parts:

    template    the tokens with which every example of the task begins
    own prefix  the tokens behind the template, up to the first SID (a title history)
    tail        the tokens from the first SID on

Template and own prefix are static: their hidden states, keys and values are the same at every step. A label is static if
it is predicted from a static position; all other labels are predicted from the tail.

Example: three examples of title_sid, the first two of one user, and one of sid_sid; a token each word, "/" ends a line.

    0  Bought : | tape / glue /  | <a_1> <b_2>               static label <a_1>; <b_2> and the end token are not static
    1  Bought : | tape / knife / | <a_3> <b_0>               static label <a_3>
    2  Bought : | soap /         | <a_1> <b_0>               static label <a_1>
    3  Seen :   |                | <a_1> <b_2> / <a_3> <b_0> no own prefix, no static label

The own prefixes of 0 and 1 are one tree of the nodes "tape / glue / knife /". With its keys cached in slots 0 to 5 and those
of "soap /" in slots 6 and 7, the tail of example 1 reads the template and slots [0, 1, 4, 5].

The plan is plain records that frozen_prefix.py takes: which own prefixes are run as one tree, which trees are cached and in
which fixed batches they are computed, and for each call of the model the tokens, positions, mask, slots and targets.

A slot is the place of one token's keys and values in the cache. Shapes: B trees, S tokens, P cached tokens, n labels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from sid_sft.forward.cache_plan import CachePlan, plan_cache
from sid_sft.forward.examples import Examples, MicroBatch
from sid_sft.forward.prefix_parts import parts_of
from sid_sft.forward.trees import (
    TREE_TOKENS,
    CachedReads,
    Layout,
    Tree,
    build_tree,
    chain,
    group_by_user,
    lay_out,
    split_by_nodes,
    tree_of_sorted,
)

LEAST_TAIL, LEAST_STATIC = 128, 512  # tokens that a micro-batch may have in any case
TREES_AT_HAND = 1000  # some megabytes


class Limits(NamedTuple):
    """How much is run at a time.

    A micro-batch of n examples has at most n x tail tokens of tails (or LEAST_TAIL, if that is more), which keep activations
    for the backward, and reads at most n x static cached tokens (or LEAST_STATIC). cached: tokens, padding included, of a
    batch of own prefixes that is run to be cached. logits: logits held in memory at a time.
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


class ModelBatch(NamedTuple):
    """One call of the model: trees that follow the template of one task, and the labels that their hidden states predict.

    layout: tokens, positions and masks. slots: for each tree, the slots (P,) of the cached tokens that it reads beside
    the template; None where the trees read the template alone. predicting (n,): the places, among the B x S hidden states,
    that predict the n labels; targets (n,): the labels. labelled: the examples that have the labels, in the order
    of the labels; an example with two labels stands in it once.

    The tails of 0 and 1 at the head of this file, each a tree: tokens [[<a_1>, <b_2>], [<a_3>, <b_0>]], positions
    [[6, 7], [6, 7]], slots [[0, 1, 2, 3], [0, 1, 4, 5]], predicting [0, 1, 2, 3], targets [<b_2>, end, <b_0>, end].
    """

    task: int
    layout: Layout
    slots: list[np.ndarray] | None
    predicting: np.ndarray
    targets: np.ndarray
    labelled: list[int]


class PrefixPlan:
    """The parts of all examples, and how a step is cut into calls of the model.

    group_users: the tails of one user's examples are run as one tree, where a step holds several of one own-prefix tree.
    """

    def __init__(self, examples: Examples, micro_batch_size: int, limits: Limits, *, group_users: bool) -> None:
        self.examples, self.limits, self.group_users = examples, limits, group_users
        self.resize(micro_batch_size)
        self.parts = parts = parts_of(examples)
        self.templates = parts.templates()
        self.own_len, self.tail_len, self.static_labels = parts.own_len, parts.tail_len, parts.static_labels
        self.tree_of, self.place_in_tree = parts.tree_of, parts.place_in_tree
        self.recent_trees: OrderedDict[int, PrefixTree] = OrderedDict()
        self.cache_plan: CachePlan | None = None  # until `plan_cache`

    def resize(self, micro_batch_size: int) -> None:
        """Cuts steps into micro-batches of another size from now on: see Limits."""
        self.tail_tokens = max(LEAST_TAIL, micro_batch_size * self.limits.tail)
        self.static_tokens = max(LEAST_STATIC, micro_batch_size * self.limits.static)

    # ---- trees of own prefixes

    def own_start(self, i: int) -> int:
        """Where the own prefix of an example begins: the tokens of its task's template."""
        return len(self.templates[int(self.examples.task[i])])

    def own_prefix(self, i: int) -> np.ndarray:
        """The tokens of an example's own prefix."""
        start = self.own_start(i)
        return self.examples.ids(i)[start : start + self.own_len[i]]

    def without_template(self, i: int) -> np.ndarray:
        """The tokens of an example's own prefix and tail: its inputs but for the template."""
        return self.examples.ids(i)[self.own_start(i) : self.examples.length[i] - 1]

    def prefix_tree(self, members: list[int]) -> PrefixTree:
        """The tree of the own prefixes of examples of one task."""
        return PrefixTree(members, build_tree([self.own_prefix(i) for i in members]))

    def tree(self, number: int) -> PrefixTree:
        """A tree by its number, made when it is asked for; those of the last steps are at hand."""
        if number not in self.recent_trees:
            span = slice(*self.parts.first_member[number : number + 2])
            members = self.parts.members[span].tolist()
            own = [self.own_prefix(i) for i in members]
            self.recent_trees[number] = PrefixTree(members, tree_of_sorted(own, self.parts.shared[span].tolist()))
            if len(self.recent_trees) > TREES_AT_HAND:
                self.recent_trees.popitem(last=False)
        self.recent_trees.move_to_end(number)
        return self.recent_trees[number]

    def trees_of(self, members: list[int]) -> Iterator[list[PrefixTree]]:
        """New trees of the own prefixes of `members` alone, not of their whole trees, in batches of similar size."""
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
        """Plans to cache all static labels, and, as far as `free_slots` reach, the keys of each tree that a tail reads."""
        self.cache_plan = plan_cache(self.parts, self.examples.task, free_slots, self.limits.cached)
        return self.cache_plan

    def caches_keys(self, i: int) -> bool:
        """Whether the keys and values of an example's own prefix are cached."""
        number = int(self.tree_of[i])
        return self.cache_plan is not None and number >= 0 and bool(self.cache_plan.first_slot[number] >= 0)

    def slots_of(self, i: int) -> np.ndarray:
        """The slots of an example's own prefix, where its keys are cached."""
        number = int(self.tree_of[i])
        return self.cache_plan.first_slot[number] + self.tree(number).tree.paths[self.place_in_tree[i]]

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
        predicting, targets, labelled = [], [], []
        for b, (members, tree) in enumerate(batch):
            for i, path in zip(members, tree.paths, strict=True):
                if self.static_labels[i]:
                    first = self.examples.prompt_len[i] - 1
                    nodes = path[first - start :]
                    predicting.append(b * layout.width + nodes)
                    targets.append(self.examples.ids(i)[first + 1 : first + 1 + len(nodes)])
                    labelled.append(i)
        return ModelBatch(task, layout, None, joined(predicting), joined(targets), labelled)

    def tail_batch(self, indices: np.ndarray, slots: dict[int, np.ndarray] | None) -> ModelBatch:
        """The tails of a micro-batch, and the labels that they predict. slots: example -> slots of its own prefix; None if
        the examples have no own prefix."""
        examples, task = self.examples, int(self.examples.task[indices[0]])
        start = len(self.templates[task])
        trees, reads, read_slots, paths, targets = [], [], [], [], []
        for group in self.tail_groups(indices):
            tree = self.tail_tree(group)
            if slots is not None:
                own, read = self.cached_reads(group, tree, slots)
                read_slots.append(own)
                reads.append(read)
            for i, path in zip(group, tree.paths, strict=True):
                first = max(int(examples.prompt_len[i]) - 1, start + int(self.own_len[i]))  # first predicting position here
                paths.append((len(trees), path[len(path) - (int(examples.length[i]) - 1 - first) :]))
                targets.append(examples.ids(i)[first + 1 :])
            trees.append(tree)
        past_len = start + max(map(len, read_slots), default=0)
        layout = lay_out(trees, start=start, past_len=past_len, reads=reads or None)
        predicting = joined([b * layout.width + path for b, path in paths])
        return ModelBatch(task, layout, read_slots or None, predicting, joined(targets), indices.tolist())

    def tail_groups(self, indices: np.ndarray) -> list[list[int]]:
        """What makes one tree of a tail batch: an example, or with `group_users` those of one user and prefix tree."""
        if not self.group_users:
            return [[int(i)] for i in indices]
        groups = []
        for group in group_by_user(self.examples, indices, self.tree_of):
            groups += split_by_nodes({i: self.without_template(i) for i in group}, TREE_TOKENS)
        return groups

    def tail_tree(self, group: list[int]) -> Tree:
        """The tree of a group's tails; its paths are the examples', in their order."""
        if len(group) == 1:
            own = int(self.own_len[group[0]])
            return chain(self.without_template(group[0])[own:], depth=own)
        whole = build_tree([self.without_template(i) for i in group])
        dynamic = np.zeros(len(whole.tokens), dtype=bool)
        for i, path in zip(group, whole.paths, strict=True):
            dynamic[path[int(self.own_len[i]) :]] = True
        number = np.cumsum(dynamic) - 1
        paths = [number[path[int(self.own_len[i]) :]] for i, path in zip(group, whole.paths, strict=True)]
        return Tree(whole.tokens[dynamic], whole.depth[dynamic], paths)

    def cached_reads(self, group: list[int], tree: Tree, slots: dict[int, np.ndarray]) -> tuple[np.ndarray, CachedReads]:
        """The slots (P,) that a tree of tails reads, and which node reads which of them.

        The grouped tails of examples 0 and 1 at the head of this file: slots [0, 1, 2, 3, 4, 5] at positions
        [2, 3, 4, 5, 4, 5]; <a_1> and <b_2> read the first four, <a_3> and <b_0> the slots 0, 1, 4 and 5.
        """
        own = np.unique(np.concatenate([slots[i] for i in group]))
        positions = np.zeros(len(own), dtype=np.int64)
        read = np.zeros((len(tree.tokens), len(own)), dtype=bool)
        for i, path in zip(group, tree.paths, strict=True):
            columns = np.searchsorted(own, slots[i])
            positions[columns] = self.own_start(i) + np.arange(len(columns))
            read[np.ix_(path, columns)] = True
        return own, CachedReads(positions, read)

    # ---- a step as micro-batches

    def cut(self, indices: np.ndarray, processes: int) -> list[MicroBatch]:
        """The examples of a step as micro-batches. The examples of one micro-batch are of one task, all or none have a tail,
        the keys of all or of none of their own prefixes are cached, and their tails are of similar length.

        Each process has a cache of its own, so all examples of a cached batch go to the same process: number % processes.
        """
        assigned = self.processes_of(indices, processes)
        has_tail = self.tail_len[indices] > 0
        trees = self.tree_of[indices]
        keeps = np.zeros(len(indices), dtype=bool) if self.cache_plan is None else self.cache_plan.in_slots(trees)
        cached = np.where(trees >= 0, keeps, -1)
        kinds = np.stack([self.examples.task[indices], has_tail, cached, assigned], axis=1)
        parts: list[MicroBatch] = []
        for kind in np.unique(kinds, axis=0):
            members = indices[(kinds == kind).all(axis=1)]
            tail, process = bool(kind[1]), int(kind[3])
            sizes = self.tail_len if tail else self.static_labels
            parts += self.cut_kind(members, sizes, None if process < 0 else process)
        return parts

    def processes_of(self, indices: np.ndarray, processes: int) -> np.ndarray:
        """The process that owns the cached batch of each example's tree, -1 where any process may take it."""
        if self.cache_plan is None or processes == 1:
            return np.full(len(indices), -1)
        batches = self.cache_plan.batches_of(self.tree_of[indices])
        return np.where(batches >= 0, batches % processes, -1)

    def cut_kind(self, members: np.ndarray, sizes: np.ndarray, process: int | None) -> list[MicroBatch]:
        """Micro-batches of examples of one kind, within the bounds on tail tokens and on cached keys read beside them."""
        groups = self.tail_groups(members)
        wide = [int(sizes[group].sum()) for group in groups]
        beside = [self.keys_read(group) if self.tail_len[group[0]] else 0 for group in groups]
        parts: list[list[int]] = [[]]
        count = most_beside = 0
        for g in sorted(range(len(groups)), key=lambda g: (wide[g], beside[g], groups[g])):
            most_beside = max(most_beside, beside[g])
            if parts[-1] and ((count + 1) * wide[g] > self.tail_tokens or (count + 1) * most_beside > self.static_tokens):
                parts.append([])
                count, most_beside = 0, beside[g]
            parts[-1] += groups[g]
            count += 1
        return [MicroBatch(np.array(part), self.cost(np.array(part)), process) for part in parts]

    def keys_read(self, group: list[int]) -> int:
        """How many cached tokens the tree of a group's tails reads: the own prefixes of the group, shared tokens once."""
        if len(group) == 1:
            return int(self.own_len[group[0]])
        number = int(self.tree_of[group[0]])
        if number < 0:
            return 0
        return len(np.unique(np.concatenate([self.tree(number).tree.paths[self.place_in_tree[i]] for i in group])))

    def cost(self, part: np.ndarray) -> float:
        """Roughly how many token forwards: two for a tail token (forward and backward), one for an own-prefix token that
        is run at every step.

        An own prefix that is run once, to be cached, counts as free also in the step that runs it: the order of the
        micro-batches, and with it the gradient to the last bit, must not depend on what is cached already.
        """
        again = self.cache_plan is None or (self.tail_len[part[0]] > 0 and not self.caches_keys(part[0]))
        static = self.own_len[part].sum() if again else 0
        return float(2 * self.tail_len[part].sum() + static + 0.1 * self.static_labels[part].sum())

    def shares(self) -> str:
        """What the tokens are, in words: template, own prefix and tail add up to all."""
        total, template, own, labels = self.parts.totals.tolist()
        template, own, labels = (100 * part / total for part in (template, own, labels))
        return (
            f"{template:.0f}% template, {own:.0f}% own prefix, {100 - template - own:.0f}% tail; {labels:.0f}% carry a label"
        )


def joined(arrays: list[np.ndarray]) -> np.ndarray:
    """Arrays of ints as one of int64, empty where there is none."""
    return np.concatenate(arrays).astype(np.int64) if arrays else np.empty(0, dtype=np.int64)
