"""What the machine may lack while a run is at work, memory or a disk that takes a file, told in one line.

    with memory_in_one_line("try --micro_batch_size 2"): ...     # torch.OutOfMemoryError -> FaultHere
    fitted(compute, 8, resize, ...)                              # computes with 8, or 4, or 2, or 1 at a time

Libraries report both in many ways: out_of_memory() and disk_fault() know them.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import re
from collections.abc import Callable, Iterator
from typing import TypeVar

from sid_sft.files import FaultHere, error_text

Result = TypeVar("Result")

# What torch says, beside its own OutOfMemoryError: its allocators for a CPU, the CUDA driver, and its libraries.
NO_MEMORY = re.compile(r"you tried to allocate|out of memory|Cannot allocate memory|_STATUS_ALLOC_FAILED")
# What a disk answers to a write. Other errors, such as a file that is not there, are faults of somebody else.
NOT_WRITTEN = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST),
}


# ---------------------------------------------------------------------------------------------- the disk


def disk_fault(error: BaseException) -> str | None:
    """Why a file could not be written, "No space left on device"; None where the error is another one."""
    if isinstance(error, OSError):
        return error_text(error) if error.errno in NOT_WRITTEN else None
    if number := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors and tokenizers, which are written in Rust
        return os.strerror(int(number[1])) if int(number[1]) in NOT_WRITTEN else None
    if isinstance(error, RuntimeError) and re.search(r"PytorchStreamWriter|inline_container", str(error)):
        return "torch could not write a file whole"  # it tells no more
    return None


# ---------------------------------------------------------------------------------------------- memory


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, of a CPU or of another device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and bool(NO_MEMORY.search(str(error)))


@contextlib.contextmanager
def memory_in_one_line(cure: str) -> Iterator[None]:
    """Turns an error for want of memory into one line that ends with the cure."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise FaultHere(f"out of memory ({error_text(error)[:100]}); {cure}") from None


def fitted(
    compute: Callable[[], Result],
    size: int,
    resize: Callable[[int], None],
    *,
    agreed: Callable[[bool], bool] | None,
) -> tuple[Result, int]:
    """What `compute` gives, with the largest of size, size // 2, ..., 1 for which memory suffices, and that size.

    resize: called with each smaller size before the next attempt. agreed: whether an attempt fits on all processes, where
    several go on together. FaultHere where even 1 does not fit.
    """
    while True:
        result, fault = attempt(compute)
        fits = not fault
        if agreed is not None:
            fits = agreed(fits)
        if fits:
            return result, size  # type: ignore[return-value]
        if size == 1:
            raise FaultHere(f"out of memory even with --micro_batch_size 1 ({fault or 'on another process'})")
        size //= 2
        resize(size)


def attempt(compute: Callable[[], Result]) -> tuple[Result | None, str]:
    """(what `compute` gives, ""), or (None, what was said) where memory did not suffice, with what it held set free."""
    try:
        return compute(), ""
    except Exception as error:
        if not out_of_memory(error):
            raise
        fault = error_text(error)[:100] or type(error).__name__
    # Only here, behind the block, has the error let go of the tensors that its traceback holds.
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, fault
