"""A tokenized dataset as arrays, and micro-batches of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset

NUMBERS = ("length", "prompt_len", "static_len", "task", "user")
ROWS_AT_ONCE = 1000  # as many as a dataset's writer puts into one piece of its file
MOST_PIECES = 10  # of a thousand rows read in the order of the file


class Examples:
    """A tokenized dataset as arrays, one entry per example, in the dataset's order.

    Token ids stay memory-mapped. Those of a dataset that was shuffled, filtered or selected from are copied, as it has its
    rows in another order than its file:

        Examples(dataset.select([3, 1])).ids(0)  # the ids of example 3
    """

    def __init__(self, dataset: Dataset) -> None:
        table = table_of(dataset, ["input_ids", *NUMBERS])
        self.length, self.prompt_len, self.static_len, self.task, self.user = (
            table.column(name).to_numpy() for name in NUMBERS
        )
        chunks = table.column("input_ids").chunks
        self._starts = np.cumsum([0] + [len(chunk) for chunk in chunks])
        self._chunks = [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in chunks]

    def __len__(self) -> int:
        return len(self.length)

    def ids(self, i: int) -> np.ndarray:
        """Token ids of example i: prompt, answer, end token."""
        chunk = int(np.searchsorted(self._starts, i, side="right")) - 1
        offsets, values = self._chunks[chunk]
        place = i - self._starts[chunk]
        return values[offsets[place] : offsets[place + 1]]

    @property
    def labels(self) -> np.ndarray:
        """Supervised tokens of each example."""
        return self.length - self.prompt_len


def table_of(dataset: Dataset, columns: list[str]) -> pa.Table:
    """Columns of a dataset, in its order: pieces of the memory-mapped file, or copies of rows that lie scattered in it."""
    tables = []
    for table in dataset.select_columns(columns).with_format("arrow").iter(ROWS_AT_ONCE):
        scattered = table.column(0).num_chunks > MOST_PIECES  # each row is then a piece
        tables.append(table.combine_chunks() if scattered else table)
    return pa.concat_tables(tables)


class Part(NamedTuple):
    """One micro-batch of a step: its examples, roughly what it costs, and the process that must take it, if one must."""

    indices: np.ndarray
    cost: float
    owner: int | None
