"""A tokenized dataset as arrays, and micro-batches of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from datasets import Dataset


class Examples:
    """A tokenized dataset as arrays, one entry per example; token ids stay memory-mapped."""

    def __init__(self, dataset: Dataset) -> None:
        columns = dataset.data.table if hasattr(dataset.data, "table") else dataset.data
        self.length, self.prompt_len, self.static_len, self.task, self.user = (
            columns.column(name).to_numpy() for name in ("length", "prompt_len", "static_len", "task", "user")
        )
        chunks = columns.column("input_ids").chunks
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


class Part(NamedTuple):
    """One micro-batch of a step: its examples, roughly what it costs, and the process that must take it, if one must."""

    indices: np.ndarray
    cost: float
    owner: int | None
