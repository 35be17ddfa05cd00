"""Whether SIDs suit recommendation, from who bought what next: how often prefixes recur, and how far first codes lead.

    rows of X.train.csv    history [0, 17], next item 4
    index                  0 -> (236, 231, 226), 17 -> (4, 9, 1), 4 -> (236, 14, 9): the next item shares level 1 with item 0

A language model that reads SIDs knows an item by its codes, so what it learns of one item helps those that share a prefix.
Two measures of that, neither with a model:

`next_item`: the share of rows whose next item shares its first 1, 2, .. codes with an item of the history, and that share
where the next items are dealt to the rows at random, which leaves each as popular as it is; the first over the second is the
lift.

`first_codes`: on rows held out, HR@10 of the simplest recommender that knows items by their first codes alone: how often
code follows code, and how popular the SIDs of a code are. A hit on a SID counts by how likely its item is among the ten.

R rows, S distinct SIDs, A first codes, K ranked SIDs.
"""

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rq.catalogue import python_literal
from rq.files import InputError, shown, told
from rq.index_file import Sid
from rq.parts import parts_of

if TYPE_CHECKING:
    import numpy as np

HELD_OUT = 0.1  # of the rows, the last ones, where no other file holds some
MOST_EVALUATED = 2_000  # rows, evenly spread: the standard error of a share of 10 % is then 0.7 %
RANKED = 10
RECENT = 0.7  # weight of an item of the history against the one after it
UNSEEN = 0.1  # times bought that an item counts as that nobody bought in the rows


@dataclass(frozen=True)
class Bought:
    """One row: what a user bought, oldest first, and then next."""

    history: tuple[int, ...]
    item: int


@dataclass(frozen=True)
class NextItem:
    """Of the rows whose next item is new to the history: the share that shares a prefix with it, and by chance."""

    shared: float
    chance: float

    @property
    def lift(self) -> float:
        """How many times as often as by chance; 0 where it never is."""
        return self.shared / self.chance if self.chance else 0.0


def read_rows(source: Path, *, n_items: int) -> list[Bought]:
    """The rows of training CSVs, of one or several (parts.py); rows without a history are left out."""
    rows = [row for path in parts_of(source) for row in _rows_of_file(path, n_items=n_items)]
    if not rows:
        raise InputError(f"{source}: no row has a history; expected a CSV of rq.prepare")
    return rows


def _rows_of_file(path: Path, *, n_items: int) -> Iterator[Bought]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, cells in enumerate(csv.DictReader(file), 2):
                history, item = cells.get("history_item_id"), cells.get("item_id")
                if history is None or item is None:
                    raise InputError(f"{path}: has no columns history_item_id and item_id; expected a CSV of rq.prepare")
                known = python_literal(history), python_literal(item)
                if not isinstance(known[0], list) or not all(_is_item(value, n_items) for value in (*known[0], known[1])):
                    raise InputError(
                        f"{path}:{number}: history_item_id {shown(history)}, item_id {shown(item)}; expected a list of "
                        f"ids and an id, all from 0 to {n_items - 1}, as in the index"
                    )
                if known[0]:
                    yield Bought(tuple(known[0]), known[1])  # type: ignore[arg-type]
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a CSV ({told(error)}); expected one of rq.prepare") from error


def _is_item(value: object, n_items: int) -> bool:
    return type(value) is int and 0 <= value < n_items


def split_rows(rows: list[Bought]) -> tuple[list[Bought], list[Bought]]:
    """The rows without the last tenth, and that tenth: rq.prepare writes them in the order of time."""
    held = max(1, round(len(rows) * HELD_OUT))
    return rows[:-held] or rows, rows[-held:]


def next_item(index: dict[int, Sid], rows: Sequence[Bought], depth: int) -> list[NextItem]:
    """For the first 1, 2, .. `depth` codes. Chance is exact: the share of all next items that fit the row's history."""
    new = [row for row in rows if row.item not in row.history]
    found = []
    for level in range(1, depth + 1):
        prefix = {item: codes[:level] for item, codes in index.items()}
        share = Counter(prefix[row.item] for row in new)
        hits, chance = 0, 0
        for row in new:
            held = {prefix[item] for item in row.history}
            hits += prefix[row.item] in held
            chance += sum(share[codes] for codes in held)
        found.append(NextItem(hits / max(len(new), 1), chance / max(len(new), 1) ** 2))
    return found


def expected_hit(scores_S: "np.ndarray", target: int, size_S: "np.ndarray", *, k: int = RANKED) -> float:
    """The chance that an item of the SID `target` is among the first k items, when those of one SID come in any order.

    SIDs of 1, 4 and 20 items in this order, k 10: 1 for an item of the first or the second, 5 / 20 for one of the third.
    """
    import numpy as np

    kept = min(k, len(scores_S))
    top = np.argpartition(-scores_S, kept - 1)[:kept]
    order_K = top[np.argsort(-scores_S[top], kind="stable")]
    if target not in order_K:
        return 0.0
    place = int(np.flatnonzero(order_K == target)[0])
    before = int(size_S[order_K[:place]].sum())
    return float(np.clip((k - before) / size_S[target], 0, 1))


class FirstCodes:
    """How often first code follows first code in the rows, and how popular each SID is."""

    def __init__(self, index: dict[int, Sid], rows: Sequence[Bought]) -> None:
        import numpy as np

        number = {sid: at for at, sid in enumerate(dict.fromkeys(index.values()))}
        code = {first: at for at, first in enumerate(dict.fromkeys(sid[0] for sid in number))}
        self.sid_of = {item: number[sid] for item, sid in index.items()}
        self.size_S = np.bincount(list(self.sid_of.values()))
        self.first_S = np.array([code[sid[0]] for sid in number])
        next_R = np.array([self.sid_of[row.item] for row in rows])
        last_R = np.array([self.sid_of[row.history[-1]] for row in rows])
        bought_S = np.bincount(next_R, minlength=len(number)) + UNSEEN * self.size_S
        self.popular_S = bought_S / bought_S.sum()
        code_A = np.bincount(self.first_S, weights=self.popular_S)
        self.within_S = self.popular_S / code_A[self.first_S]
        follows_AA = np.zeros((len(code), len(code)))
        np.add.at(follows_AA, (self.first_S[last_R], self.first_S[next_R]), 1)
        different_A = (follows_AA > 0).sum(axis=1, keepdims=True)
        total_A = np.maximum(follows_AA.sum(axis=1, keepdims=True) + different_A, 1)
        # What follows is believed by n / (n + different codes that follow), the rest is left to popularity (Witten-Bell).
        self.next_AA = follows_AA / total_A + (1 - follows_AA.sum(axis=1, keepdims=True) / total_A) * code_A

    def scores(self, history: Sequence[int]) -> "np.ndarray":
        """(S,) how likely each SID is next, up to a factor: by every item of the history, the newest weighing most."""
        firsts = [self.first_S[self.sid_of[item]] for item in reversed(history)]
        next_A = sum(RECENT**age * self.next_AA[first] for age, first in enumerate(firsts))
        return next_A[self.first_S] * self.within_S


def first_codes(index: dict[int, Sid], train: Sequence[Bought], held_out: Sequence[Bought]) -> float:
    """HR@10 at item level, on up to MOST_EVALUATED of the rows held out."""
    import numpy as np

    model = FirstCodes(index, train)
    which = np.unique(np.linspace(0, len(held_out) - 1, min(MOST_EVALUATED, len(held_out))).astype(int))
    rows = [held_out[at] for at in which]
    return float(np.mean([expected_hit(model.scores(r.history), model.sid_of[r.item], model.size_S) for r in rows]))
