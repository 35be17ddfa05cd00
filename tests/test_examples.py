"""A dataset as arrays: in the order that the dataset has, and without a copy of its ids where the file has that order."""

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, concatenate_datasets, load_from_disk

from sid_sft.forward.examples import NUMBERS, Examples


def numbered(count: int, *, start: int = 0) -> Dataset:
    """Example i has the ids i, i + 1, .. and every number of it is told from i."""
    numbers = range(start, start + count)
    columns = {name: [place + i for i in numbers] for place, name in enumerate(NUMBERS)}
    ids = [list(range(i, i + 1 + i % 7)) for i in numbers]
    return Dataset.from_dict({"unused": ["x"] * count, "input_ids": ids, **columns})


ORDERS = {
    "as written": lambda data: data,
    "select": lambda data: data.select([3, 1]),
    "select a range": lambda data: data.select(range(5, 25)),
    "shuffle": lambda data: data.shuffle(seed=1),
    "filter": lambda data: data.filter(lambda row: row["user"] % 3 == 0, num_proc=None),
    "filter, shuffle, select": lambda data: data.filter(lambda row: row["user"] % 2 == 0).shuffle(seed=2).select(range(9)),
    "concatenate": lambda data: concatenate_datasets([data, numbered(30, start=5000)]),
    "concatenate some": lambda data: concatenate_datasets(
        [data.select([7, 2]), numbered(30, start=5000), data.shuffle(seed=3)]
    ),
}


@pytest.mark.parametrize("order", ORDERS)
def test_examples_stand_in_the_order_of_their_dataset(order):
    data = ORDERS[order](numbered(2500))
    examples = Examples(data)
    assert len(examples) == len(data)
    for name in NUMBERS:
        assert getattr(examples, name).tolist() == data[name][:]
    assert all(examples.ids(i).tolist() == ids for i, ids in enumerate(data["input_ids"]))


def test_two_examples_that_are_selected_are_two():
    examples = Examples(numbered(4).select([3, 1]))
    assert [examples.ids(i).tolist() for i in range(len(examples))] == [[3, 4, 5, 6], [1, 2]]


def test_the_ids_of_a_dataset_on_disk_are_not_copied(tmp_path):
    for part in range(2):
        ids = np.full((3500, 200), part, np.int32)
        columns = {name: np.zeros(3500, np.int32) for name in NUMBERS}
        Dataset.from_dict({"input_ids": list(ids), **columns}).save_to_disk(str(tmp_path / str(part)))
    data = concatenate_datasets([load_from_disk(str(tmp_path / str(part))) for part in range(2)])
    before = pa.total_allocated_bytes()
    examples = Examples(data)
    assert examples.ids(3499)[0] == 0
    assert examples.ids(3500)[0] == 1
    assert pa.total_allocated_bytes() - before < 7000 * 200 * 4 / 10
