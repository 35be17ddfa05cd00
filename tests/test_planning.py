"""What is known of all examples at once: found vectorised, it is what a loop over the examples finds, and it is mapped."""

from __future__ import annotations

import json
from itertools import groupby

import numpy as np
import pytest
from datasets import Dataset
from safetensors.numpy import save_file

from sid_sft.dataset_cache import open_dataset, write_contents
from sid_sft.forward import cache_plan, choose, prefix_parts
from sid_sft.forward.cache_plan import fixed_batches, plan_cache, slots_for
from sid_sft.forward.examples import PLAN_FILE, Examples, PlannedDataset
from sid_sft.forward.mapped import read_arrays, write_arrays
from sid_sft.forward.prefix_parts import find_parts, plan_arrays
from sid_sft.forward.prefix_plan import CPU_LIMITS, PrefixPlan
from sid_sft.forward.trees import build_tree

# The examples at the head of prefix_plan.py: two of one user, one of another, and one whose history is of SIDs.
BOUGHT, COLON, TAPE, SLASH, GLUE, KNIFE, SOAP, SEEN, END = range(1, 10)
A1, B2, A3, B0 = range(100, 104)
TITLE_SID, SID_SID = 5, 0
AT_THE_HEAD = [
    ([BOUGHT, COLON, TAPE, SLASH, GLUE, SLASH, A1, B2, END], 6, 6, TITLE_SID, 0),
    ([BOUGHT, COLON, TAPE, SLASH, KNIFE, SLASH, A3, B0, END], 6, 6, TITLE_SID, 0),
    ([BOUGHT, COLON, SOAP, SLASH, A1, B0, END], 4, 4, TITLE_SID, 1),
    ([SEEN, COLON, A1, B2, SLASH, A3, B0, END], 5, 2, SID_SID, 0),
]


def examples_of(rows: list[tuple[list[int], int, int, int, int]]) -> Examples:
    """Examples of (ids, prompt_len, static_len, task, user)."""
    ids, prompt_len, static_len, task, user = (list(column) for column in zip(*rows, strict=True))
    numbers = {"length": list(map(len, ids)), "prompt_len": prompt_len, "static_len": static_len, "task": task, "user": user}
    return Examples(Dataset.from_dict({"input_ids": ids, **numbers}))


def random_rows(count: int, seed: int) -> list[tuple[list[int], int, int, int, int]]:
    """Examples of few words, so that many begin alike, some are equal, and one is a prefix of another. Ids are such that
    their bytes sort otherwise than they do: 255, 256, 65,536."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        task, user = int(rng.integers(3)), int(rng.integers(-1, 6))
        own = rng.choice([1, 255, 256, 65_536], size=rng.integers(0, 6)).tolist()
        answer = rng.integers(1, 9, size=rng.integers(1, 4)).tolist()
        head = [50 + task] * (2 + task)
        static = len(head) + len(own) + int(rng.integers(0, 2) * len(answer))
        rows.append(([*head, *own, *answer, 0], len(head) + len(own), static, task, user))
    return rows


# ---------------------------------------------------------------------------------------------- parts and trees


def test_the_parts_are_those_of_the_worked_example():
    parts = find_parts(examples_of(AT_THE_HEAD))
    assert {task: ids.tolist() for task, ids in parts.templates().items()} == {
        TITLE_SID: [BOUGHT, COLON],
        SID_SID: [SEEN, COLON],
    }
    assert parts.own_len.tolist() == [4, 4, 2, 0]
    assert parts.tail_len.tolist() == [2, 2, 2, 5]
    assert parts.label_start.tolist() == [0, 1, 2, 3, 3]
    assert parts.tree_of.tolist() == [0, 0, 1, -1]
    assert parts.members.tolist() == [0, 1, 2]
    assert parts.shared.tolist() == [0, 2, 0]
    assert parts.first_member.tolist() == [0, 2, 3]
    assert parts.nodes.tolist() == [6, 2]
    assert parts.totals.tolist() == [33, 8, 10, 12]


def trees_by_hand(rows: list, starts: list[int], ends: list[int], most: int) -> list[list[int]]:
    """The members of each tree, in the order of the docstrings: groups of one task and user by their first example; in a
    group the own prefixes as Python sorts lists; a new tree where the one before would have more than `most` nodes."""
    groups: dict[tuple, list[int]] = {}
    for i, (_, _, _, task, user) in enumerate(rows):
        if ends[i] > starts[i]:
            groups.setdefault((task, user if user >= 0 else -2 - i), []).append(i)
    trees = []
    for group in groups.values():
        part: list[int] = []
        for i in sorted(group, key=lambda i: (rows[i][0][starts[i] : ends[i]], i)):
            begun = {tuple(rows[j][0][starts[j] : end]) for j in [*part, i] for end in range(starts[j] + 1, ends[j] + 1)}
            if part and len(begun) > most:
                trees.append(part)
                part = []
            part.append(i)
        trees.append(part)
    return trees


@pytest.mark.parametrize("block", [7, 10**6])
@pytest.mark.parametrize("most", [4, 9, 1024])
def test_trees_are_those_that_a_loop_over_the_examples_plants(most, block, monkeypatch):
    monkeypatch.setattr(prefix_parts, "TREE_TOKENS", most)
    monkeypatch.setattr(prefix_parts, "BLOCK_TOKENS", block)
    monkeypatch.setattr(prefix_parts, "BLOCK", block)
    for seed in range(5):
        rows = random_rows(120, seed)
        parts = find_parts(examples_of(rows))
        templates = parts.templates()
        for task, template in templates.items():
            of_task = [row for row in rows if row[3] == task]
            bound = min(min(static, prompt - 1) for _, prompt, static, _, _ in of_task)
            begun = [ids[:bound] for ids, *_ in of_task]
            shared = [here[0] for here, _ in groupby(zip(*begun, strict=True)) if len(set(here)) == 1]
            assert len(template) == next((n for n in range(bound) if len({row[n] for row in begun}) > 1), bound)
            assert template.tolist() == begun[0][: len(template)]
            assert shared or not len(template)
        starts = [len(templates[row[3]]) for row in rows]
        ends = [min(row[2], len(row[0]) - 1) for row in rows]
        wanted = trees_by_hand(rows, starts, ends, most)
        found = [part.tolist() for part in np.split(parts.members, parts.first_member[1:-1])]
        assert found == wanted
        for number, members in enumerate(wanted):
            assert parts.tree_of[members].tolist() == [number] * len(members)
            assert parts.place_in_tree[members].tolist() == list(range(len(members)))
            assert parts.nodes[number] == len(
                build_tree([np.array(rows[i][0][starts[i] : ends[i]]) for i in members]).tokens
            )


def test_a_tree_that_is_made_when_asked_for_is_the_one_that_its_sequences_make(monkeypatch):
    monkeypatch.setattr("sid_sft.forward.prefix_plan.TREES_AT_HAND", 3)
    plan = PrefixPlan(examples_of(random_rows(80, seed=3)), 4, CPU_LIMITS, group_users=False)
    assert len(plan.parts.nodes) > 6
    for number in [*range(len(plan.parts.nodes)), 0, 1, 0]:
        members, tree = plan.tree(number)
        whole = build_tree([plan.own_prefix(i) for i in members])
        assert tree.tokens.tolist() == whole.tokens.tolist()
        assert tree.depth.tolist() == whole.depth.tolist()
        assert [path.tolist() for path in tree.paths] == [path.tolist() for path in whole.paths]
        assert len(plan.recent_trees) <= 3


# ---------------------------------------------------------------------------------------------- what is cached


def test_the_cache_plan_is_that_of_the_worked_example():
    examples = examples_of(AT_THE_HEAD)
    plan = plan_cache(find_parts(examples), examples.task, free_slots=100, batch_tokens=512)
    assert plan.first_slot.tolist() == [0, 6]
    assert plan.slots == 8
    assert [plan.batch(number) for number in range(plan.batches)] == [[1, 0]]
    assert plan.batch_of.tolist() == [0, 0]
    assert plan.in_slots(np.array([0, -1, 1])).tolist() == [True, False, True]
    assert plan.batches_of(np.array([0, -1, 1])).tolist() == [0, -1, 0]


@pytest.mark.parametrize("seed", range(40))
def test_slots_and_batches_are_those_of_a_loop_over_the_trees(seed):
    rng = np.random.default_rng(seed)
    count, room, tokens = (int(rng.integers(most)) for most in (120, 1500, 150))
    nodes, wanted = rng.integers(1, 40, count).astype(np.int32), rng.random(count) < 0.7
    task = rng.integers(0, 3, count).astype(np.int8)
    used, first = 0, []
    for size, want in zip(nodes.tolist(), wanted, strict=True):
        fits = want and used + size <= room
        first.append(used if fits else -1)
        used += size if fits else 0
    found, slots = slots_for(nodes, wanted, room)
    assert (found.tolist(), slots) == (first, used)

    batches: list[list[int]] = []
    for kind, size, tree in sorted(zip(task.tolist(), nodes.tolist(), range(count), strict=True)):
        last = batches[-1] if batches else []
        if not last or task[last[0]] != kind or (len(last) + 1) * size > tokens:
            batches.append([])
        batches[-1].append(tree)
    run, start = fixed_batches(np.arange(count), task, nodes, tokens)
    assert [run[a:b].tolist() for a, b in zip(start, start[1:], strict=False)] == batches


def test_without_a_tree_nothing_is_planned_to_be_cached():
    examples = examples_of(AT_THE_HEAD[3:])
    plan = cache_plan.plan_cache(find_parts(examples), examples.task, free_slots=10, batch_tokens=512)
    assert (plan.slots, plan.batches) == (0, 0)
    assert not plan.in_slots(np.array([-1])).any()
    assert plan.batches_of(np.array([-1])).tolist() == [-1]


# ---------------------------------------------------------------------------------------------- the file


def test_arrays_come_back_from_their_file_without_being_loaded(tmp_path):
    arrays = {
        "numbers": np.array([3, -1], np.int32),
        "starts": np.array([2**40], np.int64),
        "flags": np.array([True, False, True]),
        "kinds": np.array([5], np.int8),
        "none": np.zeros(0, np.int32),
    }
    write_arrays(tmp_path / "arrays", arrays)
    found = read_arrays(tmp_path / "arrays")
    assert {name: (a.dtype, a.tolist()) for name, a in found.items()} == {
        n: (a.dtype, a.tolist()) for n, a in arrays.items()
    }
    with pytest.raises(ValueError, match="read-only"):
        found["numbers"][0] = 4
    save_file({"numbers": np.array([7, 8], np.int32)}, tmp_path / "other")
    assert read_arrays(tmp_path / "other")["numbers"].tolist() == [7, 8]


@pytest.fixture
def on_disk(tmp_path):
    """A folder as the cache holds it, of random examples in two files."""
    rows = random_rows(90, seed=8)
    columns = {"input_ids": [row[0] for row in rows], "length": [len(row[0]) for row in rows]}
    columns |= {name: [row[at] for row in rows] for at, name in enumerate(("prompt_len", "static_len", "task", "user"), 1)}
    whole = Dataset.from_dict(columns)
    for number, part in enumerate((range(50), range(50, 90))):
        whole.select(part).map(lambda row: row, cache_file_name=str(tmp_path / f"{number}.arrow"))
    summary = {"files": ["0.arrow", "1.arrow"], "notes": [], "tasks": {}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    write_arrays(tmp_path / PLAN_FILE, plan_arrays(Examples(whole)))
    write_contents(tmp_path)
    return tmp_path, Examples(whole)


def test_a_dataset_of_the_cache_has_the_numbers_and_the_plan_of_the_same_examples_in_memory(on_disk):
    folder, wanted = on_disk
    found = Examples(open_dataset(folder, 512))
    assert [found.ids(i).tolist() for i in range(90)] == [wanted.ids(i).tolist() for i in range(90)]
    for name in ("length", "prompt_len", "static_len", "task", "user", "labels"):
        assert getattr(found, name).tolist() == getattr(wanted, name).tolist()
        assert not getattr(found, name).flags.owndata
    plans = [PrefixPlan(examples, 4, CPU_LIMITS, group_users=True) for examples in (found, wanted)]
    for left, right in zip(*(plan.parts for plan in plans), strict=True):
        assert left.tolist() == right.tolist()
    cuts = [[part.indices.tolist() for part in plan.cut(np.arange(90), 2)] for plan in plans]
    assert cuts[0] == cuts[1]


def test_other_rows_or_another_order_do_not_take_the_plan_of_the_file(on_disk):
    folder, wanted = on_disk
    dataset = open_dataset(folder, 512)
    assert isinstance(dataset, PlannedDataset)
    others = [dataset.select([3, 1]), dataset.select(range(1, 90)), dataset.shuffle(seed=1), dataset.sort("length")]
    others += [dataset.filter(lambda row: row["user"] > 0), dataset.map(lambda row: row, keep_in_memory=True)]
    for other in others:
        examples = Examples(other)
        assert examples.planned == {}
        assert examples.length.tolist() == [len(examples.ids(i)) for i in range(len(other))]


# ---------------------------------------------------------------------------------------------- the trial's examples


@pytest.mark.parametrize("block", [3, 10**6])
def test_the_trial_takes_the_shortest_of_each_task_and_the_longest_of_all(block, monkeypatch):
    monkeypatch.setattr(choose, "BLOCK", block)
    rows = [([1] * size, 1, 1, task, 0) for size, task in [(5, 2), (4, 0), (5, 0), (4, 2), (9, 0), (4, 2), (9, 2), (3, 0)]]
    short, shortest, longest = choose.extremes(examples_of(rows))
    assert short.tolist() == [7, 1, 3, 5]
    assert shortest.tolist() == [7, 3]
    assert longest == 6
