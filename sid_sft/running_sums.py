"""The sums that a training log is made of.

sums = RunningSums(device)
sums.add(nll, labels, loss=..., tokens=..., seconds=...)   # after each step
sums.line()    # {"loss": 3.1, "loss_sid_sid": 3.1, "tokens_per_s": 1489.0} since the last line
sums.state()   # for a checkpoint: a resumed run's next line covers the steps before it too
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sid_sft.tasks import TASKS

COUNTS = ("steps", "run_loss", "run_steps", "tokens", "seconds", "line_tokens", "line_seconds")


class RunningSums:
    """Sums of one process; `line` and `state` add up those of all, so every process must call them."""

    def __init__(self, device: torch.device) -> None:
        self.tasks = torch.zeros(len(TASKS), 2, dtype=torch.float64, device=device)  # nll and labels, since the last line
        self.loss = torch.zeros((), dtype=torch.float64, device=device)  # of the steps since the last line
        self.steps = 0  # since the last line
        self.run_loss, self.run_steps = 0.0, 0  # up to the last line
        self.tokens, self.seconds = 0, 0.0  # of the run
        self.line_tokens, self.line_seconds = 0, 0.0  # up to the last line

    def add(self, nll: Tensor, labels: Tensor, *, loss: Tensor, tokens: int, seconds: float) -> None:
        """One step. nll, labels: (tasks,), this process's share; loss: its share; tokens: of the step on all processes."""
        self.tasks += torch.stack([nll.to(self.tasks), labels.to(self.tasks)], 1)
        self.loss += loss.double()
        self.steps += 1
        self.tokens += tokens
        self.seconds += seconds

    def line(self) -> dict[str, float]:
        """The mean loss of the steps since the last line, the mean of each task over its labels, and the rate."""
        tasks, loss = summed(self.tasks), float(summed(self.loss))
        found = {"loss": loss / max(self.steps, 1)}
        found |= {f"loss_{name}": nll / labels for name, (nll, labels) in zip(TASKS, tasks.tolist(), strict=True) if labels}
        found["tokens_per_s"] = (self.tokens - self.line_tokens) / max(self.seconds - self.line_seconds, 1e-9)
        self.run_loss += loss
        self.run_steps += self.steps
        self.tasks.zero_()
        self.loss.zero_()
        self.steps, self.line_tokens, self.line_seconds = 0, self.tokens, self.seconds
        return found

    def mean_loss(self) -> float:
        """The mean loss of all steps of the run."""
        return (self.run_loss + float(summed(self.loss))) / max(self.run_steps + self.steps, 1)

    def state(self) -> dict[str, Any]:
        """The sums over all processes, as JSON keeps them exactly."""
        return {
            "tasks": dict(zip(TASKS, summed(self.tasks).tolist(), strict=True)),
            "loss": float(summed(self.loss)),
            **{name: getattr(self, name) for name in COUNTS},
        }

    def load(self, state: dict[str, Any], *, first: bool) -> None:
        """Goes on from `state`. first: whether this is the one process that takes the sums over all."""
        for name in COUNTS:
            setattr(self, name, state[name])
        if first:
            tasks = [state["tasks"].get(name, [0, 0]) for name in TASKS]
            self.tasks += torch.tensor(tasks, dtype=torch.float64).to(self.tasks)
            self.loss += state["loss"]


def summed(values: Tensor) -> Tensor:
    """The sum over all processes of a tensor that stays as it is."""
    total = values.clone()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total
