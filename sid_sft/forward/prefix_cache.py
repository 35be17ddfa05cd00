"""What the frozen prefix keeps over a run: static labels, and keys and values of own prefixes, within a budget of bytes.

A CachePlan says which are kept and at which places; PrefixCache holds the tensors. Shapes: n labels, D hidden size, K slots.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sid_sft.forward.cache_plan import CachePlan
from sid_sft.forward.frozen_head import Labels
from sid_sft.forward.prefix_plan import PrefixPlan
from sid_sft.forward.store import Store, read
from sid_sft.forward.trees import to_device


class PrefixCache:
    """The tensors of a CachePlan, filled a batch at a time.

    labels: all static labels, by `CachePlan.label_places`; keys (K, width): keys and values by slot, None before the first.
    """

    def __init__(self, cache_plan: CachePlan, labels: Labels, store: Store) -> None:
        self.cache_plan, self.labels, self.store = cache_plan, labels, store
        self.keys: Tensor | None = None
        self.done = np.zeros(cache_plan.batches, dtype=bool)

    @classmethod
    def within(
        cls,
        plan: PrefixPlan,
        budget: int,
        *,
        place: str | Path,
        device: torch.device,
        dtype: torch.dtype,
        hidden_size: int,
        row_width: int,
    ) -> PrefixCache | None:
        """A cache of at most `budget` bytes, or None where not even the static labels have room.

        place: see Store. row_width: numbers per slot.
        """
        store = Store(budget, device, place)
        labels = allocate_labels(store, int(plan.parts.label_start[-1]), hidden_size, dtype)
        if labels is None:
            return None
        return cls(plan.plan_cache(store.left // (row_width * dtype.itemsize)), labels, store)

    def missing(self, trees: set[int]) -> list[int]:
        """The batches that hold these trees and have not been computed, in their order."""
        needed = {int(self.cache_plan.batch_of[tree]) for tree in trees} - {-1}
        return sorted(batch for batch in needed if not self.done[batch])

    def put_labels(self, labelled: list[int], labels: Labels) -> None:
        """Keeps the static labels of some examples: all labels of labelled[0], then all of labelled[1], and so on."""
        places = to_device(self.cache_plan.label_places(labelled), self.labels.hidden.device)
        for kept, part in zip(self.labels, labels, strict=True):
            kept[places] = part.to(kept.device)

    def put_keys(self, numbers: list[int], sizes: list[int], rows: Tensor) -> None:
        """Keeps the keys and values (B, S, width) of trees that have slots; `sizes` of each tree's S rows are real."""
        if self.keys is None:
            self.keys = self.store.allocate((self.cache_plan.slots, rows.shape[2]), rows.dtype)
        for number, size, tree in zip(numbers, sizes, rows, strict=True):
            if (first := int(self.cache_plan.first_slot[number])) >= 0:
                self.keys[first : first + size] = tree[:size].to(self.keys.device)

    def labels_of(self, labelled: list[int]) -> Labels:
        """The static labels of some examples, on the model's device."""
        places = self.cache_plan.label_places(labelled)
        return Labels(*(read(kept, places, self.store.device) for kept in self.labels))


def allocate_labels(store: Store, count: int, hidden_size: int, dtype: torch.dtype) -> Labels | None:
    """Room for labels, or None where the store has none left."""
    number = torch.promote_types(dtype, torch.float32)
    tensors = [
        store.allocate((count, hidden_size), dtype),
        *(store.allocate((count,), number) for _ in range(2)),
        store.allocate((count,), torch.int64),
    ]
    return None if any(tensor is None for tensor in tensors) else Labels(*tensors)
