"""Items with equal codes: made distinct by an extra code or by another last code, or kept as they are.

    codes [[1, 2], [3, 4], [1, 2]]
    add_a_code  -> [(1, 2, 0), (3, 4), (1, 2, 1)]
    relocate    -> [(1, 2), (3, 4), (1, 7)], where 7 is the nearest free code for the third item
    keep        -> [(1, 2), (3, 4), (1, 2)]

N items, L levels, K codes of the last level, G groups of items with equal codes, R rows of a group. A SID is a tuple of M
codes, L of them or L + 1.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from rq.index_file import Sid

SIDS_AT_ONCE = 65_536
# (R,) items and their codes (R, L) -> (R, K): what it costs to give an item each code of the last level.
LastLevelCosts = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Sids(Sequence[Sid]):
    """The SIDs of N items in 4 bytes a code, to be gone through like a list of tuples: (N, M) codes, -1 where there is none.

    list(Sids(np.array([[1, 2, 0], [3, 4, -1]]))) -> [(1, 2, 0), (3, 4)]
    """

    def __init__(self, codes_NM: np.ndarray) -> None:
        self.codes_NM = codes_NM

    def __len__(self) -> int:
        return len(self.codes_NM)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return Sids(self.codes_NM[at])
        codes = self.codes_NM[at].tolist()
        return tuple(codes[:-1] if codes[-1] < 0 else codes)

    def __iter__(self) -> Iterator[Sid]:
        for start in range(0, len(self), SIDS_AT_ONCE):
            for codes in self.codes_NM[start : start + SIDS_AT_ONCE].tolist():
                yield tuple(codes[:-1] if codes[-1] < 0 else codes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


def keep(codes_NL: np.ndarray) -> Sids:
    """Every item keeps its codes, shared or not."""
    return Sids(codes_NL)


def groups(codes_NL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The items (N,), those with equal codes beside each other in ascending order, and where each group begins (G,)."""
    order_N = np.lexsort(codes_NL.T[::-1])
    sorted_NL = codes_NL[order_N]
    begins_N = np.ones(len(codes_NL), bool)
    begins_N[1:] = (sorted_NL[1:] != sorted_NL[:-1]).any(axis=1)
    return order_N, np.flatnonzero(begins_N)


def group_sizes(codes_NL: np.ndarray) -> np.ndarray:
    """(G,) how many items have the codes of each group."""
    _, begin_G = groups(codes_NL)
    return np.diff(begin_G, append=len(codes_NL))


def add_a_code(codes_NL: np.ndarray, *, published: Sequence[Sid] = ()) -> Sids:
    """An extra last code, counted from 0 in item order, on the items that share their codes and on no other.

    >>> list(add_a_code(np.array([[1, 2], [3, 4], [1, 2]])))
    [(1, 2, 0), (3, 4), (1, 2, 1)]

    A new item that meets a published one gets the first number unused: published SIDs never change.

    >>> list(add_a_code(np.array([[1, 2], [1, 2]]), published=[(1, 2)]))
    [(1, 2, 0), (1, 2, 1)]
    """
    n_levels = codes_NL.shape[1]
    next_extra: dict[Sid, int] = {}
    for sid in published:
        extra = sid[n_levels] + 1 if len(sid) > n_levels else 0
        next_extra[sid[:n_levels]] = max(extra, next_extra.get(sid[:n_levels], 0))
    order_N, begin_G = groups(codes_NL)
    size_G = np.diff(begin_G, append=len(order_N))
    start_G = np.where(size_G > 1, 0, -1)  # the first extra code of a group; -1: the item is alone and needs none
    if next_extra:
        for group, codes in enumerate(codes_NL[order_N[begin_G]].tolist()):
            start_G[group] = next_extra.get(tuple(codes), start_G[group])
    resolved_NM = np.empty((len(codes_NL), n_levels + 1), np.int32)  # both halves are written
    resolved_NM[:, :-1] = codes_NL
    resolved_NM[order_N, -1] = np.repeat(start_G - begin_G, size_G) + np.arange(len(order_N))
    return Sids(resolved_NM)


def relocate(
    codes_NL: np.ndarray, *, n_last: int, capacity: int, costs: LastLevelCosts, published: Sequence[Sid] = ()
) -> tuple[Sids, int]:
    """Move the last code of items that share their SID with more than `capacity` to free ones, at the least total cost.

    The nearest items of an overfull SID stay, after the published ones, which never move. Returns the
    SIDs and how many items found every last code under their prefix taken; those keep their codes.
    """
    n_levels = codes_NL.shape[1]
    taken: dict[Sid, Counter] = {}
    for sid in published:
        taken.setdefault(sid[: n_levels - 1], Counter())[sid[n_levels - 1]] += 1
    moved_NL, unplaced = codes_NL.copy(), 0
    for prefix, rows_R in _groups(codes_NL[:, :-1]):
        load_K = np.bincount(codes_NL[rows_R, -1], minlength=n_last)
        published_K = np.zeros(n_last, np.int64)
        for code, times in taken.get(prefix, {}).items():
            published_K[code] = times
        if (load_K[load_K > 0] + published_K[load_K > 0] <= capacity).all():
            continue
        cost_RK = costs(rows_R, codes_NL[rows_R])
        free_K = np.maximum(capacity - published_K, 0)
        displaced = []
        # nearest first; equal distances (exact duplicates) by item id
        for at in np.lexsort((rows_R, cost_RK[np.arange(len(rows_R)), codes_NL[rows_R, -1]])):
            code = codes_NL[rows_R[at], -1]
            if free_K[code]:
                free_K[code] -= 1
            else:
                displaced.append(at)
        displaced_rows = np.sort(np.array(displaced, np.int64))
        free_codes = np.repeat(np.arange(n_last), free_K)
        which, slot = linear_sum_assignment(cost_RK[np.ix_(displaced_rows, free_codes)])
        moved_NL[rows_R[displaced_rows[which]], -1] = free_codes[slot]
        unplaced += len(displaced) - len(which)
    return keep(moved_NL), unplaced


def _groups(prefix_NP: np.ndarray) -> list[tuple[Sid, np.ndarray]]:
    """The distinct rows of (N, P), each with the ascending positions it stands at, for those that stand anywhere."""
    if prefix_NP.shape[1] == 0:
        return [((), np.arange(len(prefix_NP)))] if len(prefix_NP) else []
    distinct, inverse, counts = np.unique(prefix_NP, axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(inverse.ravel(), kind="stable")
    return list(zip(map(tuple, distinct.tolist()), np.split(order, np.cumsum(counts)[:-1]), strict=True))
