"""What an index is like in numbers: how its codes are used, which items share a SID, and what its codes leave of embeddings.

N items, L levels, K codes of a level, D dimensions.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rq.files import InputError
from rq.index_file import Sid
from rq.suitability import NextItem

if TYPE_CHECKING:
    import numpy as np


@dataclass
class Level:
    """The use of one level's codes."""

    size: int
    items: int
    uses_K: "np.ndarray"  # times each code that is used at all is used, most used first
    used: int
    perplexity: float
    gini: float


@dataclass
class Report:
    """Everything the table and the picture show of one index."""

    name: str
    n_items: int
    n_distinct: int
    shared: int
    largest_group: int
    shared_before: int  # items that would share without the extra token some items have
    levels: list[Level]
    refitted: list[float] = field(
        default_factory=list
    )  # share of variance left after each level, best codewords for these codes
    own: list[float] = field(default_factory=list)  # the same by the quantizer's codewords and decoder
    own_mse: list[float] = field(default_factory=list)
    next_item: list[NextItem] = field(default_factory=list)
    first_codes: float | None = None

    @property
    def collision_rate(self) -> float:
        """(items - distinct SIDs) / items, as in the field's papers."""
        return 1 - self.n_distinct / self.n_items


def perplexity(uses_K: "np.ndarray") -> float:
    """exp of the entropy of code use: as many equally used codes would be as hard to guess. [2, 2, 0] -> 2.0."""
    import numpy as np

    share_K = uses_K[uses_K > 0] / uses_K.sum()
    return float(np.exp(-(share_K * np.log(share_K)).sum()))


def gini(uses_K: "np.ndarray", size: int | None = None) -> float:
    """Inequality of code use, dead codes included: 0 when all are used alike, (K - 1) / K when one has everything.

    `size` is that of the codebook where `uses_K` leaves dead codes out.
    """
    import numpy as np

    ascending_K = np.sort(uses_K)
    size = size or len(ascending_K)
    rank_K = np.arange(size - len(ascending_K) + 1, size + 1, dtype=np.float64)
    return float((2 * rank_K - size - 1) @ ascending_K / (float(size) * ascending_K.sum()))


def level_use(codes_N: "np.ndarray", size: int | None) -> Level:
    """The use of a level by the items that have it; without a
    known size, the codebook is taken to end at the largest code.
    """
    import numpy as np

    size = size or int(codes_N.max()) + 1
    uses_K = np.sort(np.unique(codes_N, return_counts=True)[1])[::-1]
    return Level(size, len(codes_N), uses_K, len(uses_K), perplexity(uses_K), gini(uses_K, size))


def describe(name: str, index: dict[int, Sid], *, sizes: tuple[int, ...] | None) -> Report:
    """The report of an index, reconstruction aside."""
    import numpy as np

    groups = Counter(index.values())
    before = Counter(codes[: full_depth(index)] for codes in index.values())
    levels = []
    for depth in range(max(map(len, index.values()))):
        codes_N = np.array([codes[depth] for codes in index.values() if len(codes) > depth])
        size = sizes[depth] if sizes and depth < len(sizes) else None
        if size and codes_N.max() >= size:
            raise InputError(
                f"{name}: code {codes_N.max()} at level {depth + 1}, whose codebook holds 0..{size - 1}; "
                "give its own --levels"
            )
        levels.append(level_use(codes_N, size))
    shared, shared_before = (sum(n for n in counts.values() if n > 1) for counts in (groups, before))
    return Report(name, len(index), len(groups), shared, max(groups.values()), shared_before, levels)


def full_depth(index: dict[int, Sid]) -> int:
    """How many levels every item has: 3 where some SIDs have a fourth, collision-breaking token."""
    return min(map(len, index.values()))


def refitted_errors(x_ND: "np.ndarray", codes_NL: "np.ndarray") -> list[float]:
    """Share of the variance of `x_ND` left after each level when each code stands for the mean residual of its items.

    Needs no codebook, so indexes of any origin compare on the same embeddings.
    """
    import numpy as np

    residual_ND = x_ND - x_ND.mean(axis=0)
    variance, errors = float(np.square(residual_ND).sum(dtype=np.float64)), []
    for codes_N in codes_NL.T:
        _, code_N = np.unique(codes_N, return_inverse=True)
        sums_KD = np.zeros((code_N.max() + 1, x_ND.shape[1]), np.float64)
        np.add.at(sums_KD, code_N, residual_ND)
        residual_ND = residual_ND - (sums_KD / np.bincount(code_N)[:, None]).astype(np.float32)[code_N]
        errors.append(float(np.square(residual_ND).sum(dtype=np.float64)) / variance if variance else 0.0)
    return errors
