"""A machine that is short of something: commands without the rights of root, small disks, folders that are read-only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, PR_CAPBSET_DROP = 1, 2, 24


def run_as_user(*command: object, most_bytes: int | None = None, **options) -> subprocess.CompletedProcess:
    """Runs a Python command line of this checkout as somebody who is bound by the modes of files, even where that is root.

    most_bytes: of the largest file that it may write; the rest are subprocess.run's options (umask, env).
    """
    library = ctypes.CDLL(None)

    def prepare() -> None:
        if os.geteuid() == 0:
            for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
                library.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
        if most_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        preexec_fn=prepare,
        **options,
    )


@contextlib.contextmanager
def small_disk(folder: Path, size: int, *options: str) -> Iterator[Path]:
    """A folder that is a disk of its own, of so many bytes; skips the test where this user may not mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True, capture_output=True)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nobody may write a folder, nor what is in it; who may do all the same is not bound by modes: see `run_as_user`."""
    entries = [folder, *folder.rglob("*")]
    modes = [entry.stat().st_mode for entry in entries]
    for entry, mode in zip(entries, modes, strict=True):
        entry.chmod(mode & ~0o222)
    try:
        yield
    finally:
        for entry, mode in zip(entries, modes, strict=True):
            entry.chmod(mode)


def one_line(done: subprocess.CompletedProcess) -> str:
    """The last line of a command that was refused: exit code 2, and no traceback."""
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]
