"""A command in several processes of this machine, as torchrun starts them, but without its own words on what went wrong."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from rq.files import InputError

POLL_S = 0.1


def run_in_processes(module: str, argv: Sequence[str] | None, *, count: int) -> None:
    """Run `python -m module argv` as processes 0..count-1 of a group; SystemExit with the status of the first that fails.

    When one process fails, or this one is told to stop, the others are stopped, too.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // count))
    group = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "OMP_NUM_THREADS": threads}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = []
    try:
        for rank in range(count):
            own = {name: str(value) for name, value in {**group, "RANK": rank, "LOCAL_RANK": rank}.items()}
            running.append(subprocess.Popen([sys.executable, "-m", module, *arguments], env={**os.environ, **own}))
        while any(process.poll() is None for process in running) and not any(process.returncode for process in running):
            time.sleep(POLL_S)
        for rank, process in enumerate(running):
            if process.returncode and process.returncode < 0:
                signal = -process.returncode
                raise InputError(f"process {rank} was stopped by signal {signal}; give the command again to go on")
            if process.returncode:
                raise SystemExit(process.returncode)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
