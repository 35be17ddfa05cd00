"""Signals that ask a run to stop: it saves and says so, instead of dying where it stands.

with StopSignals() as signals:
    prepare()                       # a signal raises Interrupted at once: there is nothing to save yet
    signals.wait = True
    for step in steps:
        train(step)
        if signals.agreed():        # the same on every process, after the same step
            save()
            raise signals.interruption(f"after step {step}")
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from sid_sft.command_line import rank


class Interrupted(KeyboardInterrupt):
    """A signal has stopped the run. signum: which one; the text says where."""

    def __init__(self, signum: int, text: str) -> None:
        super().__init__(text)
        self.signum = signum


class StopSignals:
    """SIGINT (Ctrl-C), SIGTERM (preemption, kill) and SIGHUP (the terminal is gone) as requests to stop.

    wait: whether a request waits until the program asks for it. A signal that is ignored (nohup) stays so.
    """

    def __init__(self) -> None:
        self.wait = False
        self.received = 0
        self.former: dict[int, Any] = {}
        self.group: Any = None  # of processes, on the CPU, made when first needed

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self.former[signum] = signal.signal(signum, self.receive)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.former.items():
            signal.signal(signum, handler)
        if self.group is not None:
            import torch.distributed as dist

            if dist.is_initialized():  # otherwise it has been left with all others
                dist.destroy_process_group(self.group)

    def receive(self, signum: int, _: FrameType | None) -> None:
        again, self.received = bool(self.received), signum
        name = signal.Signals(signum).name
        alone = "TORCHELASTIC_RUN_ID" not in os.environ  # torchrun sends each signal to all, and Ctrl-C twice
        if not self.wait:
            raise Interrupted(signum, f"stopped by {name}")
        if again and signum == signal.SIGINT and alone:
            raise Interrupted(signum, "stopped by a second Ctrl-C, without saving")
        if not again and rank() == 0:
            more = "; Ctrl-C once more stops it now" if alone else ""
            # not through the log: the signal may have come while a line of it is being written
            os.write(2, f"\n{name}: the run will save after this step and stop{more}\n".encode())

    def agreed(self) -> bool:
        """Whether any process was asked to stop. Every process must call."""
        import torch
        import torch.distributed as dist

        asked = self.received
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.group = self.group or dist.new_group(backend="gloo")  # so that no GPU has to be waited for
            number = torch.tensor(asked)
            dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self.group)
            if asked := int(number):  # otherwise a signal that came meanwhile would be forgotten
                self.received = asked
        return bool(asked)

    def interruption(self, where: str) -> Interrupted:
        return Interrupted(self.received, f"stopped by {signal.Signals(self.received).name} {where}")
