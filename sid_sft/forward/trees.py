"""Token sequences with shared beginnings as trees, and trees as batches that any causal decoder takes.

A token of a causal decoder reads what stands before it in its own sequence. Sequences that begin alike can therefore be run
as one: each shared token once, with an attention mask that lets a token read its own ancestors, and with the position that
it has in its own sequence.

Shapes: B trees, S tokens of the largest, P cached tokens (their keys and values are there already), N nodes of a tree.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sid_sft.forward.architecture import Window

if TYPE_CHECKING:
    from sid_sft.forward.examples import Examples


TREE_TOKENS = 1024  # nodes of the largest tree: its mask is quadratic


def pad(rows: list[np.ndarray], fill: int = 0) -> np.ndarray:
    """Rows of ints as one (B, S) int64 matrix, filled up on the right."""
    out = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = values
    return out


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """An array on a device; on its way to a GPU through pinned memory, so that nothing waits for the work queued there."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Tree(NamedTuple):
    """Token sequences with their shared beginnings stored once.

    tokens, depth: (N,) nodes in an order in which a parent stands before its children; paths: for each sequence, the
    nodes of its tokens. Two sequences [5, 6, 7] and [5, 6, 8, 9] -> tokens [5, 6, 7, 8, 9], depth [0, 1, 2, 2, 3],
    paths [[0, 1, 2], [0, 1, 3, 4]].
    """

    tokens: np.ndarray
    depth: np.ndarray
    paths: list[np.ndarray]

    def ancestors(self) -> np.ndarray:
        """(N, N) bool: whether the column's node is the row's or stands above it."""
        seen = np.zeros((len(self.tokens), len(self.tokens)), dtype=bool)
        for path in self.paths:
            seen[np.ix_(path, path)] |= np.tri(len(path), dtype=bool)
        return seen


def chain(tokens: np.ndarray, *, depth: int = 0) -> Tree:
    """The tree of one sequence, whose first token stands at `depth`."""
    nodes = np.arange(len(tokens))
    return Tree(tokens, nodes + depth, [nodes])


def build_tree(sequences: list[np.ndarray]) -> Tree:
    """The tree of some sequences; a sequence shares with its predecessor in lexicographic order all it shares at all."""
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].tolist())
    ordered = [sequences[place] for place in order]
    tree = tree_of_sorted(ordered, [0, *map(common_prefix, ordered, ordered[1:])])
    paths: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(sequences)
    for place, path in zip(order, tree.paths, strict=True):
        paths[place] = path
    return tree._replace(paths=paths)


def tree_of_sorted(sequences: list[np.ndarray], shared: list[int]) -> Tree:
    """The tree of sequences in lexicographic order, of which each shares so many tokens with the one before it."""
    tokens: list[np.ndarray] = []
    depth: list[np.ndarray] = []
    paths: list[np.ndarray] = []
    count, before = 0, np.empty(0, dtype=np.int64)
    for sequence, common in zip(sequences, shared, strict=True):
        new = np.arange(count, count + len(sequence) - common)
        tokens.append(sequence[common:])
        depth.append(np.arange(common, len(sequence)))
        before = np.concatenate([before[:common], new])
        paths.append(before)
        count += len(new)
    return Tree(np.concatenate(tokens), np.concatenate(depth), paths)


def common_prefix(left: np.ndarray, right: np.ndarray) -> int:
    """How many leading tokens two sequences share."""
    size = min(len(left), len(right))
    differ = np.nonzero(left[:size] != right[:size])[0]
    return int(differ[0]) if len(differ) else size


def split_by_nodes(sequences: dict[int, np.ndarray], most: int) -> Iterator[list[int]]:
    """Cuts examples, each with its sequence, so that no part makes a tree of more than `most` nodes (a lone example may).

    Sequences that share their beginnings fall into one part: {0: [5, 6], 1: [7], 2: [5, 8]} with most 3 -> [0, 2], [1].
    """
    part: list[int] = []
    size = 0
    for i in sorted(sequences, key=lambda i: (sequences[i].tolist(), i)):
        new = len(sequences[i]) - (
            common_prefix(sequences[part[-1]], sequences[i]) if part else 0
        )  # as build_tree adds them
        if part and size + new > most:
            yield part
            part, size, new = [], 0, len(sequences[i])
        part.append(i)
        size += new
    if part:
        yield part


def group_by_user(examples: Examples, indices: np.ndarray, key: np.ndarray) -> list[list[int]]:
    """The examples in groups of one user and one value of `key` (an entry per example); items, of no user, stay alone."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i in map(int, indices):
        user = int(examples.user[i])
        groups[(int(key[i]), user if user >= 0 else -i - 2)].append(i)
    return list(groups.values())


# ---------------------------------------------------------------------------------------------- trees as a batch


class CachedReads(NamedTuple):
    """How a tree reads cached keys of its own: their positions (P,), and which of them each node reads (N, P)."""

    positions: np.ndarray
    read: np.ndarray


class Layout(NamedTuple):
    """A batch of trees. tokens, positions (B, S); visible (B, S, P + S): what each token reads; key_positions (B, P + S)."""

    tokens: np.ndarray
    positions: np.ndarray
    visible: np.ndarray
    key_positions: np.ndarray

    @property
    def width(self) -> int:
        """S: tokens of the largest tree."""
        return self.tokens.shape[1]

    def masks(self, window: Window, dtype: torch.dtype, device: torch.device) -> Tensor | dict[str, Tensor]:
        """The batch's additive masks."""
        tensors = (to_device(array, device) for array in (self.visible, self.positions, self.key_positions))
        return additive_masks(*tensors, window, dtype)


def additive_masks(
    visible: Tensor, positions: Tensor, key_positions: Tensor, window: Window, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """Masks (B, 1, S, P + S), one per kind of layer where there are several; shapes as in Layout."""
    masks = {}
    for kind in window.kinds:
        allowed = visible
        if kind == "sliding_attention":
            allowed = visible & (positions[:, :, None] - key_positions[:, None, :] < window.size)
        mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        masks[kind] = mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]
    return masks if len(window.kinds) > 1 else masks[window.kinds[0]]


def lay_out(trees: list[Tree], *, start: int = 0, past_len: int = 0, reads: list[CachedReads] | None = None) -> Layout:
    """Puts trees side by side; their roots stand at position `start`, behind `past_len` tokens whose keys are cached.

    The cached tokens are positions 0, 1, ... that every node reads, but for the last ones where `reads` is given.
    """
    size = max(len(tree.tokens) for tree in trees)
    own = max(len(read.positions) for read in reads) if reads else 0
    shared = past_len - own
    positions = pad([tree.depth + start for tree in trees])
    key_positions = np.zeros((len(trees), past_len + size), dtype=np.int64)
    key_positions[:, :shared] = np.arange(shared)
    key_positions[:, past_len:] = positions
    visible = np.zeros((len(trees), size, past_len + size), dtype=bool)
    visible[:, :, :shared] = True
    for b, tree in enumerate(trees):
        nodes = len(tree.tokens)
        among = np.tri(nodes, dtype=bool) if len(tree.paths) == 1 else tree.ancestors()
        visible[b, :nodes, past_len : past_len + nodes] = among
        if reads:
            span = slice(shared, shared + len(reads[b].positions))
            visible[b, :nodes, span], key_positions[b, span] = reads[b].read, reads[b].positions
    diagonal = np.arange(size)
    visible[:, diagonal, past_len + diagonal] = True  # padding reads itself, so that no softmax is empty
    return Layout(pad([tree.tokens for tree in trees]), positions, visible, key_positions)
