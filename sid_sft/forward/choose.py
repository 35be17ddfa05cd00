"""Which way to the loss a run takes: the fastest that gives the model's own numbers, proven on a trial batch.

    frozen prefix -> plain (users as trees) -> plain -> the model's own forward -> its own forward, one sequence at a time

The measure is `model(input_ids=...).logits`, one unpadded sequence at a time. A way that differs from it, or that fails
on the model, is passed over with one line in the log. A model that reads ahead is refused: in training it would see the
token that it has to predict.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from sid_sft.faults import out_of_memory
from sid_sft.files import InputError, error_text
from sid_sft.forward.architecture import own_logits, why_not_exact
from sid_sft.forward.examples import Examples
from sid_sft.forward.frozen_prefix import FrozenPrefix
from sid_sft.forward.plain import OwnForward, PlainForward
from sid_sft.sharding import gathered, is_sharded
from sid_sft.sid_rows import SidRows

logger = logging.getLogger("sft.choose_forward")

Forward = FrozenPrefix | PlainForward | OwnForward


class Tolerance(NamedTuple):
    """Relative differences that rounding explains: of a loss, of the SID rows' gradient, of logits."""

    loss: float
    gradient: float
    logits: float


EXACT = Tolerance(loss=1e-4, gradient=1e-3, logits=1e-3)
LOW_PRECISION = Tolerance(loss=3e-2, gradient=0.3, logits=0.1)  # bfloat16 and float16


BLOCK = 1_000_000  # examples whose lengths are looked at together


class Trial(NamedTuple):
    """The examples on which a way is tried. short: the two shortest of each task; shortest: the shortest of each task;
    longest: the longest of all. expected: example -> its loss through the model's own forward, one sequence at a time.
    sharded: whether the model is."""

    short: np.ndarray
    shortest: np.ndarray
    longest: int
    expected: dict[int, float]
    tolerance: Tolerance
    sharded: bool


def choose_forward(
    model: PreTrainedModel,
    rows: SidRows | None,
    examples: Examples,
    micro_batch_size: int,
    *,
    adapters: Sequence[nn.Parameter] = (),
    frozen_prefix: bool,
    cache_bytes: int,
    cache_place: str | Path,
    group_users: bool,
) -> Forward:
    """The fastest forward that gives the model's own loss, and with `rows` its gradient; logs which, and why no faster one.
    adapters: what trains in the model's layers beside the rows.

    Every process must call. InputError where the model reads ahead, or where its loss is no number; OutOfMemoryError on all
    processes where the memory of one does not suffice to try a forward.
    """
    model.eval()
    trial = make_trial(model, examples)
    reason = why_not_exact(model)

    def frozen() -> FrozenPrefix:
        settings = {"cache_bytes": cache_bytes, "cache_place": cache_place, "group_users": group_users}
        return FrozenPrefix(model, rows, examples, micro_batch_size, **settings)

    ways: list[tuple[str, Callable[[], Forward], str]] = []  # name, how it is built, why it cannot be exact ("": try it)
    if frozen_prefix and rows is not None:
        ways.append(
            ("Frozen prefix", frozen, "adapters train in its layers, so no prefix is static" if adapters else reason)
        )
    if group_users:
        ways.append(("Users as trees", lambda: PlainForward(model, examples, micro_batch_size, group_users=True), reason))
    ways.append(("Plain forward", lambda: PlainForward(model, examples, micro_batch_size), ""))
    ways.append(("The model's own forward", lambda: OwnForward(model, examples, micro_batch_size), ""))
    for name, build, known in ways:
        forward, why_not, difference = (None, known, 0.0) if known else attempt(build, rows, trial, adapters)
        if forward is not None:
            shares = f"{forward.shares()}; " if isinstance(forward, FrozenPrefix) else ""
            logger.info(f"{name}: {shares}loss equal to the model's own to {difference:.0e} on a trial batch")
            return forward
        logger.info(f"{name}: not for this model ({why_not})")
    logger.info("The model's own forward goes one sequence at a time: slow, and right")
    return OwnForward(model, examples, micro_batch_size, alone=True)


def attempt(
    build: Callable[[], Forward], rows: SidRows | None, trial: Trial, adapters: Sequence[nn.Parameter] = ()
) -> tuple[Forward | None, str, float]:
    """Builds and tries a forward: (forward, "", difference from the model's own loss), or (None, why not, difference).

    All processes take it or none does, since a step is cut into the same micro-batches on each.
    """
    forward, why_not, difference, memory = None, "", 0.0, True
    try:
        forward = build()
        difference = disagreement(forward, trial)
        if not difference <= trial.tolerance.loss:
            why_not = f"its loss differs by {difference:.0e} from the model's own"
        elif rows is not None:
            for what, wrong in gradient_disagreements(forward, rows, trial, adapters).items():
                if not wrong <= trial.tolerance.gradient:
                    why_not = f"the gradient of its {what} differs by {wrong:.0e} from the model's own"
    except InputError:
        raise
    except Exception as error:  # other people's code: whatever it does not take is a reason to go another way
        why_not = f"{type(error).__name__}: {error_text(error)[:100]}"
        memory = not out_of_memory(error)
        if not memory and trial.sharded:
            raise  # the others wait in a gather, where no vote reaches them
    if not agreed(memory):
        raise torch.OutOfMemoryError(why_not or "on another process")
    if not agreed(not why_not):
        return None, why_not or "another process found so", difference
    return forward, "", difference


def agreed(fits: bool) -> bool:
    """Whether all processes find that a forward fits."""
    if not (dist.is_available() and dist.is_initialized()):
        return fits
    device = "cpu" if dist.get_backend() == "gloo" else torch.accelerator.current_accelerator()
    votes = torch.tensor([int(fits)], device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return bool(votes.item())


# ---------------------------------------------------------------------------------------------- the trial


def make_trial(model: PreTrainedModel, examples: Examples) -> Trial:
    """Runs the trial's examples through the model's own forward. The longest is there for what only length shows, such as a
    sliding window."""
    tolerance = LOW_PRECISION if model.dtype in (torch.bfloat16, torch.float16) else EXACT
    short, shortest, longest = extremes(examples)
    alone = OwnForward(model, examples, 1)
    try:
        inputs = torch.from_numpy(examples.ids(longest)[:-1].astype(np.int64)).to(model.device)
        refuse_reading_ahead(model, inputs, tolerance.logits)
        with torch.no_grad():
            expected = {i: float(alone.nll(np.array([i])).sum()) for i in [*short.tolist(), longest]}
        alone.nll(short[:1]).sum().backward()  # a model without a backward is refused here, not in the first step
        model.zero_grad()
    except InputError:
        raise
    except Exception as error:  # other people's code; there is no way left to go
        if out_of_memory(error):
            raise
        raise InputError(
            f"--base_model: the forward of {type(model).__name__} fails on an example ({type(error).__name__}: "
            f"{error_text(error)[:100]}); expected a causal language model that takes token ids alone, SID tokens among them"
        ) from error
    if not np.isfinite(list(expected.values())).all():
        raise InputError(
            "--base_model: its loss on an example is no number before anything was trained; the model's files hold NaN or "
            "infinite values, or its dtype is too small for them"
        )
    return Trial(short, shortest, longest, expected, tolerance, is_sharded(model))


def extremes(examples: Examples) -> tuple[np.ndarray, np.ndarray, int]:
    """The two shortest examples of each task, the shortest of each (tasks in their order), and the longest of all; among
    equal ones the first are the shortest, and the last is the longest. Looks at a block of examples at a time."""
    shortest: dict[int, np.ndarray] = {}
    longest, most = 0, -1
    for start in range(0, len(examples), BLOCK):
        length, tasks = examples.length[start : start + BLOCK], examples.task[start : start + BLOCK]
        for task in np.unique(tasks).tolist():
            rows = np.nonzero(tasks == task)[0]
            two = start + rows[np.argsort(length[rows], kind="stable")[:2]]
            both = np.concatenate([shortest.get(task, two[:0]), two])
            shortest[task] = both[np.argsort(examples.length[both], kind="stable")[:2]]
        if length.max() >= most:
            most = int(length.max())
            longest = start + int(np.nonzero(length == most)[0][-1])
    found = [two for _, two in sorted(shortest.items())]
    return np.concatenate(found), np.concatenate([two[:1] for two in found]), longest


@gathered
@torch.no_grad()
def refuse_reading_ahead(model: PreTrainedModel, ids: Tensor, tolerance: float) -> None:
    """InputError where a token's logits change with what stands behind it; ids (S,)."""
    whole = own_logits(model, ids[None])[0].float()
    for size in {max(1, len(ids) // 2), max(1, len(ids) - 1)}:
        last = own_logits(model, ids[None, :size])[0, -1].float()
        difference = float((whole[size - 1] - last).abs().max() / last.abs().max())
        if difference > tolerance:
            raise InputError(
                f"--base_model: {type(model).__name__} reads ahead (a token's logits change by {difference:.0e} with what "
                "stands behind it), so it cannot learn to write what comes next; expected a causal language model"
            )


@torch.no_grad()
def disagreement(forward: Forward, trial: Trial) -> float:
    """The largest relative difference of a forward's loss from the model's own, over micro-batches of all trial examples
    and over the shortest of each task alone. It is relative to the model's own loss, or to 1 per label if that is more; NaN
    where the forward gives NaN."""
    together = np.unique([*trial.short, trial.longest])
    parts = [part for batch in (together, *trial.shortest[:, None]) for part in forward.cut(batch)]
    found = np.array([float(forward.nll(part.indices).sum()) for part in parts])
    wanted = np.array([sum(trial.expected[int(i)] for i in part.indices) for part in parts])
    labels = np.array([forward.examples.labels[part.indices].sum() for part in parts])
    return float(np.max(np.abs(found - wanted) / np.maximum(wanted, labels)))  # np.max hands a NaN on


def gradient_disagreements(
    forward: Forward, rows: SidRows, trial: Trial, adapters: Sequence[nn.Parameter] = ()
) -> dict[str, float]:
    """The relative difference from the gradient of the model's own forward, over each task's shortest: of the SID rows, and
    of the adapters where there are any."""
    wanted = trained_gradients(OwnForward(forward.model, forward.examples, 1), rows, adapters, trial.shortest)
    found = trained_gradients(forward, rows, adapters, trial.shortest)
    return {what: relative_difference(found[what], wanted[what]) for what in wanted}


def relative_difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """How far some tensors are from those that they should be, in the norm of all, relative to these."""
    scale = torch.stack([gradient.norm() for gradient in wanted]).norm()
    difference = torch.stack([(f - w).norm() for f, w in zip(found, wanted, strict=True)]).norm()
    return float(difference / scale.clamp(min=torch.finfo(scale.dtype).tiny))


def trained_gradients(
    forward: Forward, rows: SidRows, adapters: Sequence[nn.Parameter], indices: np.ndarray
) -> dict[str, list[Tensor]]:
    """The gradients over some examples: of each table's SID rows (M, D), and of the adapters; leaves none behind."""
    try:
        for part in forward.cut(indices):
            forward.nll(part.indices).sum().backward()
        rows.collect_gradients()
        found = {"SID rows": [master.grad for master in rows.masters if master.grad is not None]}  # each got zeros at least
        if adapters:
            found["adapters"] = [torch.zeros_like(own) if own.grad is None else own.grad for own in adapters]
        return found
    finally:  # a forward that failed halfway may have left some, too
        for own in [*adapters, *rows.masters, *(weight for _, weight, _ in rows.tables)]:
            own.grad = None
