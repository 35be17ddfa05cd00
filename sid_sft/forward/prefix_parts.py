"""What the frozen prefix must know of all examples at once: templates, the lengths of the parts, and users' trees.

It is found once per dataset, vectorised, and kept beside it (PLAN_FILE); a run maps the file and reads what its steps need.
See the head of prefix_plan.py for the parts of an example, and for the examples 0 to 3 that are meant here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from sid_sft.forward.examples import NUMBERS, Examples
from sid_sft.forward.trees import TREE_TOKENS

BLOCK = 65_536  # examples whose numbers or templates are looked at together
BLOCK_TOKENS = 8_000_000  # of own prefixes that are sorted together, padding included


class PrefixParts(NamedTuple):
    """Arrays over the examples (i), the trees of own prefixes (t), and the trees' members (m), tree by tree.

    own_len, tail_len: tokens of the parts; static_labels: how many labels are predicted from static positions; label_start
    (examples + 1,): the static labels of example i have the numbers label_start[i] to label_start[i + 1] - 1. tree_of: the
    tree of an example's own prefix, or -1; place_in_tree: its place among the tree's members, or -1.

    members: the examples of tree t are members[first_member[t] : first_member[t + 1]], own prefixes in lexicographic
    order; shared (m,): leading tokens that a member's own prefix shares with the one before it in its tree. nodes: tokens of
    a tree, shared ones once. reads: whether a tail reads the tree's keys; labelled: whether it predicts static labels.

    template_ids: the templates of template_task[0], [1], ... one after another; template_end: where each ends.
    totals (4,): tokens of all examples, of their templates, of their own prefixes, and labels.

    Examples 0 to 3: own_len [4, 4, 2, 0], label_start [0, 1, 2, 3, 3], tree_of [0, 0, 1, -1], members [0, 1, 2],
    shared [0, 2, 0], first_member [0, 2, 3], nodes [6, 2] (where the ids of "glue" are smaller than those of "knife").
    """

    own_len: np.ndarray
    tail_len: np.ndarray
    static_labels: np.ndarray
    label_start: np.ndarray
    tree_of: np.ndarray
    place_in_tree: np.ndarray
    members: np.ndarray
    shared: np.ndarray
    first_member: np.ndarray
    nodes: np.ndarray
    reads: np.ndarray
    labelled: np.ndarray
    template_task: np.ndarray
    template_end: np.ndarray
    template_ids: np.ndarray
    totals: np.ndarray

    def templates(self) -> dict[int, np.ndarray]:
        """Task -> its template."""
        pieces = np.split(self.template_ids, self.template_end[:-1])
        return dict(zip(self.template_task.tolist(), pieces, strict=True))


def parts_of(examples: Examples) -> PrefixParts:
    """The parts as they lie beside the dataset, or else found now."""
    if examples.planned:
        return PrefixParts(*(examples.planned[name] for name in PrefixParts._fields))
    return find_parts(examples)


def plan_arrays(examples: Examples) -> dict[str, np.ndarray]:
    """What PLAN_FILE holds: the numbers of the examples, and their parts."""
    numbers = {name: np.ascontiguousarray(getattr(examples, name)) for name in (*NUMBERS, "labels")}
    return numbers | find_parts(examples)._asdict()


def find_parts(examples: Examples) -> PrefixParts:
    """Finds templates, lengths and trees of all examples."""
    templates = find_templates(examples)
    template_len = np.zeros(max(templates, default=0) + 1, dtype=np.int32)
    for task, template in templates.items():
        template_len[task] = len(template)
    static_end = np.minimum(examples.static_len, examples.length - 1)  # the last token is never an input
    start = template_len[examples.task]
    own_len, tail_len = static_end - start, examples.length - 1 - static_end
    static_labels = np.maximum(0, static_end - examples.prompt_len + 1)  # predicted from static positions
    members, shared, first_member = find_trees(examples, start, static_end)
    tree_of, place = np.full((2, len(examples)), -1, dtype=np.int32)
    sizes = np.diff(first_member)
    tree_of[members] = np.repeat(np.arange(len(sizes)), sizes)
    place[members] = np.arange(len(members)) - np.repeat(first_member[:-1], sizes)

    def per_tree(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values, first_member[:-1]) if len(sizes) else np.zeros(0, dtype=np.int64)

    return PrefixParts(
        own_len=own_len,
        tail_len=tail_len,
        static_labels=static_labels,
        label_start=np.concatenate([[0], np.cumsum(static_labels)]),
        tree_of=tree_of,
        place_in_tree=place,
        members=members,
        shared=shared,
        first_member=first_member,
        nodes=per_tree(own_len[members] - shared).astype(np.int32),
        reads=per_tree(tail_len[members] > 0) > 0,
        labelled=per_tree(static_labels[members]) > 0,
        template_task=np.array(list(templates), dtype=np.int32),
        template_end=np.cumsum([len(template) for template in templates.values()], dtype=np.int64),
        template_ids=np.concatenate([np.empty(0, dtype=np.int32), *templates.values()]).astype(np.int32),
        totals=np.array([np.sum(part, dtype=np.int64) for part in (examples.length, start, own_len, examples.labels)]),
    )


# ---------------------------------------------------------------------------------------------- templates


def find_templates(examples: Examples) -> dict[int, np.ndarray]:
    """The longest common token prefix of each task; it ends before any SID and before any position that predicts a label."""
    bounds: dict[int, int] = {}
    for task, rows in by_task(examples):
        bound = int(np.minimum(examples.static_len[rows], examples.prompt_len[rows] - 1).min())
        bounds[task] = min(bounds.get(task, bound), bound)
    found: dict[int, np.ndarray] = {}
    for task, rows in by_task(examples):
        shared = found.setdefault(task, np.array(examples.ids(int(rows[0]))[: bounds[task]]))
        ids = examples.padded(rows, np.zeros(len(rows), dtype=np.int64), np.full(len(rows), len(shared)))
        differs = np.nonzero((ids != shared).any(axis=0))[0]
        found[task] = shared[: differs[0]] if len(differs) else shared
    return dict(sorted(found.items()))


def by_task(examples: Examples) -> Iterator[tuple[int, np.ndarray]]:
    """The examples of each task, a block at a time."""
    for start in range(0, len(examples), BLOCK):
        tasks = examples.task[start : start + BLOCK]
        for task in np.unique(tasks).tolist():
            yield task, start + np.nonzero(tasks == task)[0]


# ---------------------------------------------------------------------------------------------- trees of own prefixes


def find_trees(examples: Examples, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Groups the examples that have an own prefix, the tokens start[i] to end[i] - 1, by task and user into trees.

    Returns members, shared and first_member of PrefixParts. A tree has at most TREE_TOKENS nodes (a lone example may have
    more); items, of no user, stay alone.
    """
    members, shared, sizes = [np.empty(0, dtype=np.int32)], [np.empty(0, dtype=np.int32)], [np.zeros(1, dtype=np.int64)]
    rows, group = in_groups(examples, np.nonzero(end > start)[0])
    for block in blocks_of_groups(group, end[rows] - start[rows]):
        order, new, common = sort_prefixes(examples, rows[block], group[block], start, end)
        cuts = cut_trees(group[block][order], new, common)
        common[cuts] = 0
        members.append(rows[block][order].astype(np.int32))
        shared.append(common.astype(np.int32))
        sizes.append(np.diff(np.append(cuts, len(order))))
    return np.concatenate(members), np.concatenate(shared), np.cumsum(np.concatenate(sizes))


def in_groups(examples: Examples, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows with those of one user and task side by side, and the number of each row's group: 0, 0, 1, 2, 2, ...

    The groups stand in the order of their first rows, and the rows of a group in the order of the dataset.
    """
    user = examples.user[rows].astype(np.int64)
    user = np.where(user >= 0, user, user.max(initial=0) + 1 + np.arange(len(rows)))
    key = examples.task[rows].astype(np.int64) * (user.max(initial=0) + 1) + user
    _, first, group = np.unique(key, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    order = np.argsort(rank[group], kind="stable")
    return rows[order], rank[group][order]


def blocks_of_groups(group: np.ndarray, lengths: np.ndarray) -> Iterator[slice]:
    """Whole groups, as many as have at most BLOCK_TOKENS tokens when each prefix is padded to the longest of all."""
    most = max(1, BLOCK_TOKENS // int(lengths.max(initial=1)))
    begin = 0
    while begin < len(group):
        last = group[min(begin + most, len(group)) - 1]
        end = int(np.searchsorted(group, last, side="right"))  # a group that does not fit whole is taken nevertheless
        yield slice(begin, end)
        begin = end


def sort_prefixes(
    examples: Examples, rows: np.ndarray, group: np.ndarray, start: np.ndarray, end: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The order of own prefixes, within their groups lexicographic, equal ones as they stood; and in that order (n,) how
    many tokens each has, and how many of them it shares with the one before it (0 for the first of a group)."""
    ids = examples.padded(rows, start[rows], end[rows])
    text = (ids + 1).astype(">i4").view(f"S{4 * ids.shape[1]}").ravel()  # its bytes stand in the order of the tokens
    order = np.lexsort((text, group))
    ids, lengths = ids[order], (end - start)[rows[order]].astype(np.int64)
    differs = ids[1:] != ids[:-1]
    common = np.where(differs.any(axis=1), differs.argmax(axis=1), lengths[1:])
    common[group[order][1:] != group[order][:-1]] = 0
    return order, lengths, np.concatenate([[0], common])


def cut_trees(group: np.ndarray, lengths: np.ndarray, common: np.ndarray) -> np.ndarray:
    """Where the trees begin, ascending, in sorted prefixes: each group at its first, and again where a tree is full."""
    begins = np.nonzero(np.diff(group, prepend=-1))[0]
    nodes = np.cumsum(lengths - common)
    ends = np.append(begins[1:], len(group))
    large = np.nonzero(np.diff(nodes[ends - 1], prepend=0) > TREE_TOKENS)[0]
    more = []
    for begin, end in zip(begins[large].tolist(), ends[large].tolist(), strict=True):
        while True:
            before = nodes[begin] - lengths[begin]  # a tree's first prefix has all its tokens as nodes
            begin = max(begin + 1, int(np.searchsorted(nodes[:end], before + TREE_TOKENS, side="right")))
            if begin >= end:
                break
            more.append(begin)
    return np.sort(np.concatenate([begins, np.array(more, dtype=np.int64)]))
