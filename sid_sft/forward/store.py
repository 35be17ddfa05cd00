"""Memory for what is kept from step to step, within a budget of bytes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sid_sft.faults import memory_in_one_line
from sid_sft.files import InputError
from sid_sft.forward.trees import to_device

DEVICE, HOST = "device", "host"  # where the store may be, besides a folder


class Store:
    """Memory for what is kept over the run, in bytes: on the model's device, in the host's memory, or mapped to files.

    place: DEVICE, HOST, or a folder. What `allocate` gives holds anything at first; only what was written may be read.
    """

    def __init__(self, budget: int, device: torch.device, place: str | Path) -> None:
        self.left, self.device, self.place = budget, device, place

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """An empty tensor, or None where the budget does not reach."""
        size = int(np.prod(shape)) * dtype.itemsize
        if size > self.left:
            return None
        self.left -= size
        if self.place in (DEVICE, HOST) or not size:
            # A slot or label is written by the batch of its tree before any micro-batch of that tree reads it, and none
            # reads another tree's (FrozenPrefix.fill_cache, read_slots). Zeros would cost a pass over all the memory.
            with memory_in_one_line(
                f"{size / 1e9:.1f} GB are to be kept from step to step; try a smaller --prefix_cache_gb"
            ):
                return torch.empty(shape, dtype=dtype, device="cpu" if self.place == HOST else self.device)
        # A name of its own: other processes may keep things in the same folder. The disk is taken now, for a mapped page
        # without one behind it kills the process. The mapping outlives the name, so nothing is left behind whatever happens.
        handle, name = tempfile.mkstemp(dir=self.place)
        try:
            os.posix_fallocate(handle, 0, size)
            return torch.from_file(name, shared=True, size=int(np.prod(shape)), dtype=dtype).view(shape)
        except OSError as error:
            raise InputError(
                f"{self.place}: has no room for the {size / 1e9:.1f} GB to be kept there ({error.strerror}); "
                "choose another folder (--prefix_cache_in) or less (--prefix_cache_gb)"
            ) from None
        finally:
            os.close(handle)
            os.unlink(name)


def read(kept: Tensor, rows: np.ndarray, device: torch.device) -> Tensor:
    """Some rows of a kept tensor on a device; from the host to a GPU through pinned memory, without waiting."""
    places = to_device(rows, kept.device)
    if kept.device == device or device.type != "cuda":
        return kept.index_select(0, places).to(device)
    # index_select writes every element of it.
    pinned = torch.empty((len(rows), *kept.shape[1:]), dtype=kept.dtype, pin_memory=True)
    return torch.index_select(kept, 0, places, out=pinned).to(device, non_blocking=True)
