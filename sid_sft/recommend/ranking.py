"""Ranked lists of SIDs and what they are worth: hits, gains, ranks, baselines, confidence; no model in sight.

A row's list holds SID numbers, best first, none twice. A number is a place in `SidTable.sids`. At item level a SID
stands for its items, the more often bought in training first, so items that share a SID cannot all be the first hit.

Shapes: U rows, L levels.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from os.path import commonprefix  # of any sequences
from typing import NamedTuple

import numpy as np

from sid_sft.catalogue import Catalogue
from sid_sft.interactions import Row

KS = (1, 3, 5, 10, 20, 50)
MISSED = np.iinfo(np.int64).max  # the rank of a target that is not in the list
RESAMPLES = 1000  # of the bootstrap: the ends of a 95 % interval then vary by a few per cent of its width

Lists = list[list[int]]


class SidTable(NamedTuple):
    """The distinct SIDs of a catalogue in its order; of_item: item place -> SID number; items: SID number -> its item
    places, the most popular first, those of one popularity in catalogue order."""

    sids: list[tuple[str, ...]]
    of_item: list[int]
    items: list[list[int]]


def sid_table(catalogue: Catalogue, popularity: Counter[int]) -> SidTable:
    """popularity: item place -> how often it was a training target; may be empty."""
    number: dict[tuple[str, ...], int] = {}
    of_item = [number.setdefault(item.sid, len(number)) for item in catalogue.items]
    items: list[list[int]] = [[] for _ in number]
    for place, sid in enumerate(of_item):
        items[sid].append(place)
    for places in items:
        if len(places) > 1:
            places.sort(key=lambda place: -popularity[place])
    return SidTable(list(number), of_item, items)


# ---------------------------------------------------------------------------------------------- one list, one target


def ranks_of(lists: Lists, targets: list[int]) -> np.ndarray:
    """The place of each target in its list (U,), 0 for the first; MISSED where it is not there."""
    found = [ranked.index(target) if target in ranked else MISSED for ranked, target in zip(lists, targets, strict=True)]
    return np.array(found, dtype=np.int64)


def row_values(ranks: np.ndarray, ks: tuple[int, ...]) -> dict[str, np.ndarray]:
    """What each row adds to the metrics (U,): rank 1 (the second) gives hr@3 1, ndcg@3 0.63, mrr@3 0.5."""
    values = {}
    for k in ks:
        hit = ranks < k
        place = np.where(hit, ranks, 0)
        values[f"hr@{k}"] = hit.astype(float)
        values[f"ndcg@{k}"] = hit / np.log2(place + 2)
        values[f"mrr@{k}"] = hit / (place + 1)
    return values


def level_recall(lists: Lists, targets: list[int], table: SidTable, ks: tuple[int, ...]) -> dict[str, float]:
    """How often one of the first k SIDs agrees with the target down to a level: {"level1@10": 0.41, "level2@10": ...}.

    All rows count at every level. A target that ends above a level is right down to it only as a whole: for the target
    (a, b), the SID (a, b, c) is right down to level 2 and not to level 3. So no level has more than the one above it,
    and the last one has HR@k.
    """
    found = {}
    for level in range(1, max(map(len, table.sids)) + 1):
        heads = [[table.sids[number][:level] for number in ranked[: max(ks)]] for ranked in lists]
        wanted = [table.sids[target][:level] for target in targets]
        for k in ks:
            hits = [head in ranked[:k] for head, ranked in zip(wanted, heads, strict=True)]
            found[f"level{level}@{k}"] = sum(hits) / len(hits)
    return found


def shared_levels(rows: list[Row], table: SidTable) -> list[str]:
    """How many levels of each row's target, from the first on, stand in one SID of its history; "all" where the SID itself
    does. Few tells how well a model has learned what goes together, "all" how well it repeats.

    Target (a, b, c): after (a, b, d) and (e, b, c) "2", after (e, b, c) "0", after (a, b, c) "all".
    """
    found = []
    for row in rows:
        target = table.sids[table.of_item[row.item]]
        history = {table.sids[table.of_item[place]] for place in row.history}
        same = max((len(commonprefix([target, sid])) for sid in history), default=0)
        found.append("all" if target in history else str(same))
    return found


def by_shared_levels(values: dict[str, np.ndarray], shared: list[str]) -> dict[str, dict[str, float]]:
    """The metrics of a view for the rows of each answer of `shared_levels`, and how many these are:
    {"0": {"rows": 2711, "hr@10": 0.028, ...}, "1": ..., "all": ...}."""
    groups = np.array(shared)
    return {
        name: means({"rows": np.nonzero(groups == name)[0], **{key: array[groups == name] for key, array in values.items()}})
        for name in sorted(set(shared))
    }


# ---------------------------------------------------------------------------------------------- many rows


def to_items(ranked: list[int], table: SidTable) -> list[int]:
    """The items of a list of SIDs, in its order."""
    return [item for number in ranked for item in table.items[number]]


def views(lists: Lists, rows: list[Row], table: SidTable, ks: tuple[int, ...]) -> dict[str, dict[str, np.ndarray]]:
    """What each row adds to each metric, at SID and at item level, with and without what the history holds already.

    `*_without_history` takes the history out of the lists and counts the rows whose target is not in the history.
    """
    sids, items = [table.of_item[row.item] for row in rows], [row.item for row in rows]
    item_lists = [to_items(ranked, table) for ranked in lists]
    found = {"sid": row_values(ranks_of(lists, sids), ks), "item": row_values(ranks_of(item_lists, items), ks)}
    seen_items = [set(row.history) for row in rows]
    seen_sids = [{table.of_item[place] for place in row.history} for row in rows]
    for name, all_lists, targets, seen in (("sid", lists, sids, seen_sids), ("item", item_lists, items, seen_items)):
        new = [i for i, target in enumerate(targets) if target not in seen[i]]
        fresh = [[number for number in all_lists[i] if number not in seen[i]] for i in new]
        values = row_values(ranks_of(fresh, [targets[i] for i in new]), ks)
        found[f"{name}_without_history"] = {"rows": np.array(new), **values}
    return found


def means(values: dict[str, np.ndarray]) -> dict[str, float]:
    """The metrics of a view; "rows" says over how many rows where it is not all of them."""
    return {
        name: len(array) if name == "rows" else float(array.mean()) if len(array) else 0.0 for name, array in values.items()
    }


def bootstrap(values: dict[str, np.ndarray], users: list[str], seed: int) -> dict[str, list[float]]:
    """95 % intervals of the metrics of a view: {"hr@10": [0.091, 0.108]}.

    Users are drawn, with all their rows, because the rows of one user are not independent.
    """
    names = list(values)
    _, user = np.unique(users, return_inverse=True)
    count = int(user.max()) + 1
    sums = np.stack([np.bincount(user, weights=values[name], minlength=count) for name in names], axis=1)
    rows = np.bincount(user, minlength=count)
    rng = np.random.default_rng(seed)
    drawn = (np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(RESAMPLES))
    resampled = [times @ sums / (times @ rows) for times in drawn]
    ends = np.quantile(resampled, [0.025, 0.975], axis=0)
    return {name: ends[:, column].tolist() for column, name in enumerate(names)}


def breadth(lists: Lists, rows: list[Row], table: SidTable, popularity: Counter[int], k: int) -> dict[str, float]:
    """What part of the catalogue is recommended at all, and how popular it is against what was bought.

    coverage: share of the distinct SIDs that stand among the first k of some row. popularity: mean training count of
    the first k SIDs over that of the targets; 1 is as popular as what users buy, more leans to the popular.
    """
    counts = np.zeros(len(table.sids))
    for item, count in popularity.items():
        counts[table.of_item[item]] += count
    shown = np.array([number for ranked in lists for number in ranked[:k]], dtype=np.int64)
    found = {f"coverage@{k}": len(np.unique(shown)) / len(table.sids)}
    bought = counts[[table.of_item[row.item] for row in rows]].mean()
    if bought:
        found[f"popularity@{k}"] = float(counts[shown].mean() / bought)
    return found


# ---------------------------------------------------------------------------------------------- baselines


def item_popularity(train: list[Row]) -> Counter[int]:
    """Item place -> how often it is a training target."""
    return Counter(row.item for row in train)


def baselines(train: list[Row], rows: list[Row], table: SidTable, size: int) -> dict[str, Lists]:
    """Lists of `size` SIDs, more where a history may be taken out of them, from three recommenders that need no model.

    popularity: the most frequent training targets. last: the history, newest first, then popularity. markov: the
    training targets seen after the same last SID, most frequent first, then as last.
    """
    targets = Counter(table.of_item[row.item] for row in train)
    popular = [number for number, _ in targets.most_common()]
    after: dict[int, Counter[int]] = defaultdict(Counter)
    for row in train:
        after[table.of_item[row.history[-1]]][table.of_item[row.item]] += 1
    following = {last: [number for number, _ in seen.most_common()] for last, seen in after.items()}

    def newest_first(row: Row) -> list[int]:
        return [table.of_item[place] for place in reversed(row.history)]

    recommenders: dict[str, Callable[[Row], list[int]]] = {
        "popularity": lambda row: [],
        "last": newest_first,
        "markov": lambda row: following.get(table.of_item[row.history[-1]], []) + newest_first(row),
    }
    return {
        name: [distinct(recommend(row), popular, size + len(row.history)) for row in rows]
        for name, recommend in recommenders.items()
    }


def distinct(first: list[int], rest: list[int], size: int) -> list[int]:
    """The first `size` different numbers of two lists; `rest` has none twice."""
    first = list(dict.fromkeys(first))[:size]
    return first + [number for number in rest[: size + len(first)] if number not in first][: size - len(first)]
