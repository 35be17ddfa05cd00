"""Locks on files, between processes: of two runs that want the same place, one waits or gives way.

    with waiting_for(Path("cache/7f10.lock")):                   # one process at a time
        ...
    with held(Path("output/run/.lock"), "sft.py") as other:      # other: "" or who holds it
        ...

The system frees a lock when its process ends, however it ends: a lock file that a killed run leaves holds nobody up.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger("sft.locks")

NO_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL}  # the file system has none
open_here: set[int] = set()  # handles of this process, which a forked child closes: it must not outlive us as a holder


def close_in_child() -> None:
    for handle in open_here:
        os.close(handle)
    open_here.clear()


os.register_at_fork(after_in_child=close_in_child)


@contextlib.contextmanager
def waiting_for(path: Path) -> Iterator[None]:
    """Holds the lock of a file, which is made, once whoever has it is done. OSError where the file cannot be made."""
    handle = lock(path, wait=True)
    try:
        yield
    finally:
        release(path, handle)


@contextlib.contextmanager
def held(path: Path, who: str) -> Iterator[str]:
    """Holds the lock of a file, which is made, and gives ""; where another process has it, gives what that one wrote:

    "sft.py, process 4711 on box, since 2026-01-31 23:59:00". OSError where the file cannot be made.
    """
    try:
        handle = lock(path, wait=False)
    except BlockingIOError:
        yield holder(path)
        return
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(handle, 0)
        os.write(handle, f"{who}, process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode())
        yield ""
    finally:
        release(path, handle)


def lock(path: Path, *, wait: bool) -> int:
    """The handle of a locked file. BlockingIOError where another process has it and this one does not wait."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        open_here.add(handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in NO_LOCKS:
                logger.info(
                    f"{path.parent}: its file system has no locks, so nothing keeps two runs from writing there at once"
                )
                return handle
            close(handle)
            raise
        with contextlib.suppress(FileNotFoundError):  # whoever held it has removed it: the next one made another file
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        close(handle)


def release(path: Path, handle: int) -> None:
    """Removes a lock file while it is still held, so that nobody holds a file that is gone."""
    with contextlib.suppress(OSError):
        path.unlink()
    close(handle)


def close(handle: int) -> None:
    if handle in open_here:  # a forked child has closed it already
        open_here.discard(handle)
        os.close(handle)


def holder(path: Path) -> str:
    """What the holder of a lock wrote into it, on one line."""
    try:
        text = " ".join(path.read_text(errors="replace").split())
    except OSError:
        text = ""
    return text or "another process"
