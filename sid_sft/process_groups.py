"""The process groups of torch.distributed that a run makes, and how it leaves them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def process_groups_left() -> Iterator[None]:
    """Leaves the process groups that were made inside, after an error too.

    The threads of a Gloo group (CPUs) must not outlive the run: they may still hold tensors of the last sum, and where they
    let go of them while Python ends, the process dies of "terminate called without an active exception" and SIGABRT, and
    its exit code with it. After an error of one process, NCCL groups (GPUs) stay until the process ends: leaving them
    would wait for the others.
    """
    import torch.distributed as dist

    def groups() -> bool:
        return dist.is_available() and dist.is_initialized()

    try:
        yield
        if groups():
            dist.barrier()
            dist.destroy_process_group()
    finally:
        if groups() and dist.get_backend() == "gloo":
            dist.destroy_process_group()
