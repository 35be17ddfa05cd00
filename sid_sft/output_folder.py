"""The folder that a run writes to: looked at before the work starts, held by one run at a time, and told of where it fails.

    outputs = OutputFolder(Path("output/run"), files=("report.md",), folders=("final_checkpoint",))
    outputs.check()                                       # InputError: report.md is a folder
    with outputs.held("sft.py"), outputs.writing():       # InputError: another run writes there; it cannot be written
        outputs.check_room(checkpoint=10**9, final=10**9) # InputError: its disk has 1.2 GB free, and 2.0 GB are needed
        ...

A disk that fails in the middle is one line, and nothing half-written is left.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sid_sft.faults import disk_fault
from sid_sft.files import FaultHere, InputError, error_text, remove
from sid_sft.locks import held

logger = logging.getLogger("sft.output_folder")

LOCK_FILE = ".lock"
STATE_FILE = "trainer_state.json"  # of the Trainer, in each checkpoint and at the end in the output folder itself
RECORD_FILE = "checkpoint.json"  # makes a checkpoint a whole one, see resuming.py


@dataclass
class OutputFolder:
    """An output folder. files, folders: the names of what a run writes there, as patterns; flag: the flag that names it;
    needed: bytes of a checkpoint or of the model, whichever is more, once `check_room` knows them; mine: whether this
    process holds the folder."""

    path: Path
    files: Sequence[str]
    folders: Sequence[str] = ()
    flag: str = "output_dir"
    needed: int = 0
    mine: bool = False

    def check(self) -> None:
        """InputError where something stands in the way of the folder or of what is written there; writes nothing."""
        for place in (self.path, *self.path.parents):
            if os.path.lexists(place):
                if not place.is_dir():
                    raise InputError(f"--{self.flag} {self.path}: {place} is a file; expected a folder, or nothing yet")
                break
        for names, kind, right in ((self.files, "file", Path.is_file), (self.folders, "folder", Path.is_dir)):
            for place in (found for name in names for found in sorted(self.path.glob(name))):
                fault = f"is no {kind}" if not right(place) else "" if os.access(place, os.W_OK) else "may not be written"
                if fault:
                    raise InputError(
                        f"--{self.flag} {self.path}: {place.name} {fault}, and a {kind} will be written there; move it away"
                    )

    @contextlib.contextmanager
    def held(self, program: str) -> Iterator[None]:
        """Holds the folder, which is made, for one run. InputError where another run holds it or it cannot be written.

        What is left behind is what the run wrote: the lock file goes, and so does an empty folder that was made here.
        """
        made = [place for place in (self.path, *self.path.parents) if not os.path.exists(place)]
        with contextlib.ExitStack() as stack:
            stack.callback(remove_empty, made)
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                other = stack.enter_context(held(self.path / LOCK_FILE, program))
            except OSError as error:
                raise InputError(
                    f"--{self.flag} {self.path}: cannot be written ({error_text(error)}); make room or make it writable, or "
                    "choose another folder"
                ) from None
            if other:
                raise InputError(
                    f"--{self.flag} {self.path}: another run writes there ({other}); wait for it, stop it, or choose "
                    "another folder"
                )
            self.mine = True
            yield

    def check_room(self, checkpoint: int, final: int) -> None:
        """Refuses a disk that cannot hold what is certain to be written, and warns of one that may fill up.

        checkpoint, final: bytes of one checkpoint, and of the final model. Two checkpoints are kept while a third one is
        written; those of an earlier run, which give their room back, make only the larger of the two certain.
        """
        self.needed = max(checkpoint, final)
        earlier = any(self.path.glob("checkpoint-*"))
        least, most = (self.needed if earlier else checkpoint + final), 3 * checkpoint + final
        free = self.free()
        if free < least:
            raise InputError(
                f"--{self.flag} {self.path}: its disk has {size(free)} free, and checkpoint and final model need at least "
                f"{size(least)}; free {size(least - free)} more or choose another folder"
            )
        if free < most:
            logger.info(f"--{self.flag} {self.path}: its disk has {size(free)} free; up to {size(most)} will be written")

    def free(self) -> int:
        """Bytes that the folder's disk has free."""
        return shutil.disk_usage(next(place for place in (self.path, *self.path.parents) if os.path.exists(place))).free

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turns a disk that fails into one line, which says how to go on, and removes what was half written."""
        try:
            yield
        except Exception as error:
            if (reason := disk_fault(error)) is None:
                raise
            name = getattr(error, "filename", None)
            if isinstance(name, str) and self.path.absolute() not in Path(name).absolute().parents:
                raise FaultHere(f"{name}: cannot be written ({reason})") from None
            raise FaultHere(self.failed(reason)) from None

    def failed(self, reason: str) -> str:
        """What to tell of a write that failed. Removes half-written checkpoints; the others are what is kept."""
        if self.mine:
            for place in self.path.glob("checkpoint-*"):
                if not (place / RECORD_FILE).is_file():
                    remove(place)
            if not can_be_read(self.path / STATE_FILE):
                remove(self.path / STATE_FILE)
        free = self.free()
        lacking = f", {size(self.needed - free)} more are needed" if free < self.needed else ""
        newest = max(self.path.glob("checkpoint-*"), key=lambda place: place.stat().st_mtime, default=None)
        cure = "no checkpoint was written yet: make room and start anew"
        if newest:
            cure = f"{newest.name} is whole: make room and go on from there with --resume_from_checkpoint True"
        return f"--{self.flag} {self.path}: cannot be written ({reason}; {size(free)} free{lacking}); {cure}"


def can_be_read(path: Path) -> bool:
    """Whether a file is whole JSON."""
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True


def remove_empty(folders: list[Path]) -> None:
    """Removes folders, innermost first, as far as they are empty."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def size(count: int) -> str:
    """1234567 bytes -> "1.2 MB"."""
    unit, name = next((pair for pair in ((1e9, "GB"), (1e6, "MB")) if count >= pair[0]), (1e3, "kB"))
    return f"{count / unit:.1f} {name}"
