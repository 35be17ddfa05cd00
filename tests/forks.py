"""sft.py in forks of a process that has loaded the libraries already, which a test then need not wait for.

Loading them takes some seconds of a core, more than a short run. The forks are Python's own fork server, which has no
threads; several at once find each other as under torchrun. That `python sft.py` and torchrun themselves work is shown by
test_readme.py, test_resuming.py and test_private_doors.py.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch.distributed as dist

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["sft", "sid_sft.trainer", "sid_sft.adapters", "sid_sft.sharding"])
LONGEST = 300  # seconds
GRACE = 10  # seconds that the others have to say why they end too, once one has failed


def run_in_forks(arguments: list[str], *, processes: int, env: dict[str, str]) -> subprocess.CompletedProcess:
    """The exit code, and what was written, of sft.py on one process or several. env: on top of this process's own."""
    environments = [dict(os.environ, **env)]
    if processes > 1:
        # the meeting point is held here, so that no other program can take its port
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environments = [environments[0] | torchrun_names(rank, processes, store.port) for rank in range(processes)]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        with contextlib.ExitStack() as stack:
            children = [FORKS.Process(target=run_sft, args=(arguments, one, out, err)) for one in environments]
            for child in children:
                child.start()
                stack.callback(end, child)
            code = exit_code(children)
        return subprocess.CompletedProcess(arguments, code, out.read_text(), err.read_text())


def torchrun_names(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun tells each process."""
    size, place = str(processes), str(rank)
    return {
        "RANK": place,
        "LOCAL_RANK": place,
        "GROUP_RANK": "0",
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "a test",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
    }


def exit_code(children: list) -> int:
    """The first that is not 0, as torchrun's, after which the others are waited for only a little; 0 otherwise."""
    code, until = 0, time.monotonic() + LONGEST
    waiting = list(children)
    while waiting:
        left = max(0.0, until - time.monotonic())
        done = multiprocessing.connection.wait([child.sentinel for child in waiting], left)
        assert done or code, f"sft.py has not ended within {LONGEST} s"
        if not done:
            break
        for child in [child for child in waiting if child.sentinel in done]:
            child.join()
            waiting.remove(child)
            if child.exitcode and not code:
                code, until = child.exitcode, time.monotonic() + GRACE
    return code


def end(child) -> None:
    child.kill()
    child.join()
    child.close()


def run_sft(arguments: list[str], env: dict[str, str], out: Path, err: Path) -> None:
    """In the fork: what Python does for `python sft.py`, with its output in files."""
    for number, path in ((1, out), (2, err)):
        with path.open("ab") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(env)
    import sft

    sys.exit(sft.main(arguments))
