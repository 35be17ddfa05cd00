"""The catalogue's SIDs as a tree on the device, built from arrays alone: ten million SIDs are a matter of seconds.

    sids = sid_matrix([("<a_0>", "<b_0>"), ("<a_1>", "<b_3>")], ids)   # token ids, a row each: [[1, 5], [2, 6]]
    trie = build_trie(score_sequences(sids, end_id), device)
    trie.numbers_of([(2, 6), (2, 7)], end_id)                         # [1, -1]: the second SID, and none

Shapes: M SIDs or sequences, L tokens of the deepest, N nodes of the trie. What is behind the last token of a row is -1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

Token = TypeVar("Token")


def sid_matrix(sids: Sequence[Sequence[Token]], ids: Mapping[Token, int]) -> np.ndarray:
    """Token ids of SIDs as one matrix (M, L), int32; ids: token -> id.

    [("<a_0>", "<b_0>"), ("<a_0>", "<b_0>", "<c_0>")] -> [[1, 5, -1], [1, 5, 9]].
    """
    depths = np.fromiter(map(len, sids), dtype=np.int64, count=len(sids))
    matrix = np.full((len(sids), depths.max()), -1, dtype=np.int32)
    tokens = map(ids.__getitem__, chain.from_iterable(sids))
    matrix[np.arange(matrix.shape[1]) < depths[:, None]] = np.fromiter(tokens, dtype=np.int32, count=depths.sum())
    return matrix


def score_sequences(sids: np.ndarray, end_id: int) -> np.ndarray:
    """For each SID of a matrix (M, L) the token ids whose log p are summed: the SID's tokens, and the end token where one
    SID is a prefix of another. The SIDs must be distinct; then no sequence is a prefix of another.

    [(1, 5), (1, 5, 9), (2, 6)] with end 0 -> [[1, 5, 0], [1, 5, 9, 0], [2, 6]].
    """
    order = np.lexsort(sids.T[::-1])  # a prefix stands before all that begin with it
    matrix = sids[order]
    depth = (matrix >= 0).sum(1)
    ambiguous = np.zeros(len(matrix), dtype=bool)
    differs = np.zeros(len(matrix), dtype=bool)  # from the row before, within the levels seen so far
    differs[0] = True
    for level in range(matrix.shape[1] - 1):
        differs[1:] |= matrix[1:, level] != matrix[:-1, level]
        first = np.nonzero(differs)[0]  # of the rows that begin alike
        alike = np.diff(first, append=len(matrix))
        ambiguous |= np.repeat((depth[first] == level + 1) & (alike > 1), alike)
    if not ambiguous.any():
        return sids
    sequences = np.pad(sids, ((0, 0), (0, 1)), constant_values=-1)
    sequences[order[ambiguous], depth[ambiguous]] = end_id
    return sequences


class Trie(NamedTuple):
    """Token sequences, none of which is a prefix of another, as a tree in CSR form; node 0 is the root.

    The children of node n are the nodes start[n] .. start[n + 1] - 1, by ascending token. token (N,): the token of a node.
    leaf (N,): the number of the sequence that ends at a node, or -1. column (N,): the place of a node's token in
    level_tokens of its level. sequences: how many sequences there are. Per level below the root: level_tokens, its
    distinct tokens, ascending; fan_out, the most children that one node of the level above has; inner, how many of its
    nodes have children; ends, whether a sequence ends at one of its nodes. The arrays are int32: 16 bytes a node.
    """

    start: Tensor
    token: Tensor
    leaf: Tensor
    column: Tensor
    sequences: int
    level_tokens: list[Tensor]
    fan_out: list[int]
    inner: list[int]
    ends: list[bool]

    @property
    def depth(self) -> int:
        return len(self.fan_out)

    def numbers_of(self, sids: Iterable[Sequence[int]], end_id: int) -> list[int]:
        """The number of each SID, given without end token; -1 for what is none."""
        start, token, leaf = (array.cpu().numpy() for array in (self.start, self.token, self.leaf))

        def child(node: int, wanted: int) -> int:
            low, high = start[node], start[node + 1]
            place = low + np.searchsorted(token[low:high], wanted)
            return int(place) if place < high and token[place] == wanted else -1

        numbers = []
        for sid in sids:
            node = 0
            for wanted in sid:
                node = child(node, wanted) if node >= 0 else -1
            if node >= 0 and leaf[node] < 0:
                node = child(node, end_id)
            numbers.append(int(leaf[node]) if node >= 0 else -1)
        return numbers


def build_trie(sequences: np.ndarray, device: torch.device | str = "cpu") -> Trie:
    """[[1, 5], [1, 6], [2, 5]] -> token [0, 1, 2, 5, 6, 5], start [1, 3, 5, 6, 6, 6, 6], leaf [-1, -1, -1, 0, 1, 2], column
    [0, 0, 1, 0, 1, 0], sequences 3, level_tokens [[1, 2], [5, 6]], fan_out [2, 2], inner [2, 0], ends [False, True]."""
    order = np.lexsort(sequences.T[::-1])
    matrix = sequences[order]
    lengths = (matrix >= 0).sum(1)
    differs = np.zeros(len(matrix), dtype=bool)  # from the row before, within the levels seen so far
    differs[0] = True
    above = np.zeros(len(matrix), dtype=np.int32)  # the node that each row has reached
    parents, tokens, leaves, columns = [np.array([-1])], [np.array([0])], [np.array([-1])], [np.array([0])]
    level_tokens = []
    fan_out, inner, ends, nodes = [], [], [], 1
    for level in range(matrix.shape[1]):
        differs[1:] |= matrix[1:, level] != matrix[:-1, level]
        alive = lengths > level
        first = alive & differs
        ending = np.where(lengths[first] == level + 1, order[first], -1)
        parents.append(above[first])
        tokens.append(matrix[first, level])
        leaves.append(ending)
        distinct, places = np.unique(tokens[-1], return_inverse=True)
        level_tokens.append(torch.from_numpy(distinct.astype(np.int64)).to(device))
        columns.append(places)
        fan_out.append(int(np.bincount(above[first]).max()))
        inner.append(int((ending < 0).sum()))
        ends.append(bool((ending >= 0).any()))
        above = np.where(alive, nodes + np.cumsum(first) - 1, -1)
        nodes += int(first.sum())
    first_child = np.searchsorted(np.concatenate(parents), np.arange(nodes + 1))
    start, token, leaf, column = (
        torch.from_numpy(array.astype(np.int32)).to(device)
        for array in (first_child, *map(np.concatenate, (tokens, leaves, columns)))
    )
    return Trie(start, token, leaf, column, len(matrix), level_tokens, fan_out, inner, ends)
