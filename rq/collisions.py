"""Items with equal codes: made distinct by an extra code or by another last code, or kept as they are.

    codes [[1, 2], [3, 4], [1, 2]]
    add_a_code  -> [(1, 2, 0), (3, 4), (1, 2, 1)]
    relocate    -> [(1, 2), (3, 4), (1, 7)], where 7 is the nearest free code for the third item
    keep        -> [(1, 2), (3, 4), (1, 2)]

N items, L levels, K codes of the last level, R rows of a group. A SID is a tuple of codes, L of them or L + 1.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from rq.index_file import Sid

# (R,) items and their codes (R, L) -> (R, K): what it costs to give an item each code of the last level.
LastLevelCosts = Callable[[np.ndarray, np.ndarray], np.ndarray]


def keep(codes_NL: np.ndarray) -> list[Sid]:
    """Every item keeps its codes, shared or not."""
    return list(map(tuple, codes_NL.tolist()))


def add_a_code(codes_NL: np.ndarray, *, published: Sequence[Sid] = ()) -> list[Sid]:
    """An extra last code, counted from 0 in item order, on the items that share their codes and on no other.

    >>> add_a_code(np.array([[1, 2], [3, 4], [1, 2]]))
    [(1, 2, 0), (3, 4), (1, 2, 1)]

    A new item that meets a published one gets the first number unused: published SIDs never change.

    >>> add_a_code(np.array([[1, 2], [1, 2]]), published=[(1, 2)])
    [(1, 2, 0), (1, 2, 1)]
    """
    n_levels = codes_NL.shape[1]
    own = keep(codes_NL)
    group_size = Counter(own)
    next_extra: dict[Sid, int] = {}
    for sid in published:
        extra = sid[n_levels] + 1 if len(sid) > n_levels else 0
        next_extra[sid[:n_levels]] = max(extra, next_extra.get(sid[:n_levels], 0))
    resolved = []
    for sid in own:
        if group_size[sid] == 1 and sid not in next_extra:
            resolved.append(sid)
            continue
        extra = next_extra.get(sid, 0)
        next_extra[sid] = extra + 1
        resolved.append((*sid, extra))
    return resolved


def relocate(
    codes_NL: np.ndarray, *, n_last: int, capacity: int, costs: LastLevelCosts, published: Sequence[Sid] = ()
) -> tuple[list[Sid], int]:
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
