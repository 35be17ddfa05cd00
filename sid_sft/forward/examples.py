"""A tokenized dataset as arrays, and micro-batches of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset

from sid_sft.forward.mapped import read_arrays

NUMBERS = ("length", "prompt_len", "static_len", "task", "user")
ROWS_AT_ONCE = 100_000
MOST_PIECES = 10  # of a thousand rows that are read in the order of the file
PLAN_FILE = "plan.safetensors"


class PlannedDataset(Dataset):
    """A dataset in whose folder lies PLAN_FILE: its numbers as arrays, and what is known of all its examples at once.

    What changes it (select, shuffle, filter, map) gives a plain Dataset, to which the file does not apply. Some of these
    begin with a copy, so that a copy is plain, too.
    """

    folder: Path

    def __deepcopy__(self, memo: dict[int, Any]) -> Dataset:
        plain = Dataset.__new__(Dataset)
        plain.__dict__ |= copy.deepcopy(self.__dict__, memo)
        return plain


class Examples:
    """A tokenized dataset as arrays, one entry per example, in the dataset's order.

    labels: supervised tokens of each example. planned: all arrays of PLAN_FILE by name, {} where there is no such file.
    The arrays and token ids of a PlannedDataset stay memory-mapped, so that processes share them and only what is read
    takes memory. The ids of a dataset that was shuffled, filtered or selected from are copied, as it has its rows in another
    order than its file:

        Examples(dataset.select([3, 1])).ids(0)  # the ids of example 3
    """

    def __init__(self, dataset: Dataset) -> None:
        self.planned: dict[str, np.ndarray] = {}
        if isinstance(dataset, PlannedDataset):
            self.planned = read_arrays(dataset.folder / PLAN_FILE)
            numbers = [self.planned[name] for name in NUMBERS]
        else:
            table = table_of(dataset, list(NUMBERS))
            numbers = [table.column(name).to_numpy() for name in NUMBERS]
        self.length, self.prompt_len, self.static_len, self.task, self.user = numbers
        self.labels = self.planned["labels"] if self.planned else self.length - self.prompt_len
        self._chunks = table_of(dataset, ["input_ids"]).column("input_ids").chunks
        self._starts = np.cumsum([0] + [len(chunk) for chunk in self._chunks])
        self._views: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # chunk -> its offsets and values, once it was read

    def __len__(self) -> int:
        return len(self.length)

    def ids(self, i: int) -> np.ndarray:
        """Token ids of example i: prompt, answer, end token."""
        chunk = int(np.searchsorted(self._starts, i, side="right")) - 1
        offsets, values = self.view(chunk)
        place = i - self._starts[chunk]
        return values[offsets[place] : offsets[place + 1]]

    def view(self, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """Offsets and values of a piece of the file, whose row r has the ids values[offsets[r] : offsets[r + 1]]."""
        if chunk not in self._views:
            piece = self._chunks[chunk]
            self._views[chunk] = piece.offsets.to_numpy(), piece.values.to_numpy()
        return self._views[chunk]

    def padded(self, rows: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """The tokens start[k] to end[k] - 1 of example rows[k], as a matrix of int32 that is filled up with -1.

        Examples with the ids [5, 6, 7] and [5, 8]: rows [0, 1], start [1, 1], end [3, 2] -> [[6, 7], [8, -1]].
        """
        columns = np.arange(int((end - start).max(initial=0)))
        out = np.full((len(rows), len(columns)), -1, dtype=np.int32)
        chunks = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(chunks, kind="stable")
        for members in np.split(order, np.nonzero(np.diff(chunks[order]))[0] + 1) if len(rows) else ():
            chunk = chunks[members[0]]
            offsets, values = self.view(int(chunk))
            first = offsets[rows[members] - self._starts[chunk]] + start[members]
            there = columns < (end - start)[members, None]
            part = np.full(there.shape, -1, dtype=np.int32)
            part[there] = values[(first[:, None] + columns)[there]]
            out[members] = part
        return out


def table_of(dataset: Dataset, columns: list[str]) -> pa.Table:
    """Columns of a dataset, in its order: pieces of the memory-mapped file, or copies of rows that lie scattered in it."""
    tables = []
    for table in dataset.select_columns(columns).with_format("arrow").iter(ROWS_AT_ONCE):
        scattered = table.column(0).num_chunks > MOST_PIECES * (1 + len(table) / 1000)  # each row is then a piece
        tables.append(table.combine_chunks() if scattered else table)
    return pa.concat_tables(tables)


class MicroBatch(NamedTuple):
    """One micro-batch of a step: its examples (n,), roughly what it costs, and the process that must take it, if any."""

    indices: np.ndarray
    cost: float
    process: int | None
