"""Every causal family of the installed transformers against its own forward.

    PYTHONPATH=. python tests/architectures.py > tests/benchmarks/results/architectures.md

For each family a small random model learns SIDs as sft.py would have it: rows added, frozen or not, the way to the loss
chosen by trial. Then the loss and the gradient of that way are compared with the family's own forward, one unpadded
sequence at a time, on examples that the trial did not see, and the saved folder is loaded again.
"""

from __future__ import annotations

import importlib.metadata
import logging
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from families import families, small_family
from transformers import PreTrainedModel
from transformers import logging as transformers_logging

import sft
from sid_sft.checkpoint import check_saved
from sid_sft.files import InputError
from sid_sft.forward.architecture import own_logits
from sid_sft.forward.choose import Forward, choose_forward
from sid_sft.forward.examples import Examples
from sid_sft.sid_rows import SidRows
from sid_sft.tasks import TASKS

TOKENS, SIDS = 80, 18  # words of the base, SID tokens: three levels of six
WAYS = {"FrozenPrefix": "frozen prefix", "PlainForward": "plain", "OwnForward": "own forward"}
ROUNDING = 1e-4  # what it explains of a loss; ten times as much of a gradient


class Line(NamedTuple):
    """What became of one family. difference: see `compare`."""

    family: str
    frozen: str
    full: str
    difference: float
    saved: str
    reason: str
    trial_s: float


def toy_examples(seed: int = 0, count: int = 24) -> Examples:
    """`count` examples of each of four tasks; words are ids 1..79, SID tokens 80..97, 0 ends."""
    rng = np.random.default_rng(seed)
    columns: dict[str, list] = {name: [] for name in ("input_ids", "length", "prompt_len", "static_len", "task", "user")}

    def sid() -> list[int]:
        return [TOKENS + 6 * level + int(rng.integers(6)) for level in range(3)]

    def title() -> list[int]:
        return rng.integers(1, TOKENS, rng.integers(2, 7)).tolist()

    for name, shows, answers in (
        ("sid_sid", sid, sid),
        ("sid_title", sid, title),
        ("title_title", title, title),
        ("title_sid", title, sid),
    ):
        task = list(TASKS).index(name)
        for number in range(count):
            history = [token for _ in range(int(rng.integers(1, 6))) for token in [*shows(), 2]]
            prompt = [7 + task, 8, 9, 3, *history]
            ids = [*prompt, *answers(), 2, 0]
            static = next((place for place, token in enumerate(ids) if token >= TOKENS), len(ids))
            for key, value in zip(columns, (ids, len(ids), len(prompt), static, task, number // 3), strict=True):
                columns[key].append(value)
    return Examples(Dataset.from_dict(columns))


def own_loss(model: PreTrainedModel, examples: Examples, i: int) -> torch.Tensor:
    """Sum of -log p over an example's labels, by nothing but the model."""
    ids = torch.from_numpy(examples.ids(i).astype(np.int64))[None]
    logits = own_logits(model, ids)[0]
    first = int(examples.prompt_len[i])
    return F.cross_entropy(logits[first - 1 : -1].float(), ids[0, first:], reduction="sum")


def relative(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    difference = torch.stack([(f - w).norm() for f, w in zip(found, wanted, strict=True)]).norm()
    return float(difference / torch.stack([w.norm() for w in wanted]).norm())


def extended(kind: str, *, freeze: bool) -> tuple[PreTrainedModel, SidRows | None]:
    """A family's small model with new rows for the SID tokens, frozen but for them or not."""
    model = small_family(kind, TOKENS)
    sft.grow_embeddings(model, TOKENS + SIDS)
    ids = list(range(TOKENS, TOKENS + SIDS))
    sft.init_rows(model, ids, TOKENS, seed=0)
    rows = sft.freeze_llm(model, ids, [f"<{i}>" for i in ids]) if freeze else None
    return model.eval(), rows


def compare(forward: Forward, model: PreTrainedModel, rows: SidRows | None, examples: Examples) -> float:
    """The relative difference of the loss over every third example from the model's own, or a tenth of the gradient's where
    that is larger."""
    indices = np.arange(0, len(examples), 3)
    trained = rows.masters if rows else [parameter for parameter in model.parameters() if parameter.requires_grad]

    def gradients() -> list[torch.Tensor]:
        if rows:
            rows.collect_gradients()
        found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained]
        for parameter in trained:
            parameter.grad = None
        return found

    wanted, found = torch.zeros(()), torch.zeros(())
    for i in indices:
        loss = own_loss(model, examples, int(i))
        loss.backward()
        wanted += loss.detach()
    wanted_gradient = gradients()
    for part in forward.cut(indices):
        loss = forward.nll(part.indices).sum()
        loss.backward()
        found += loss.detach()
    return max(float((found - wanted).abs() / wanted), relative(gradients(), wanted_gradient) / 10)


def chosen(model: PreTrainedModel, rows: SidRows | None, examples: Examples, *, group_users: bool = False) -> Forward:
    """The way to the loss that sft.py would take."""
    return choose_forward(
        model,
        rows,
        examples,
        4,
        frozen_prefix=True,
        cache_bytes=10**8,
        cache_place="device",
        group_users=group_users,
    )


def examine(kind: str, examples: Examples, notes: list[str]) -> Line:
    """One family, in both modes."""
    found, difference, seconds = {}, 0.0, 0.0
    for mode in ("frozen", "full"):
        try:
            model, rows = extended(kind, freeze=mode == "frozen")
            started = time.monotonic()
            forward = chosen(model, rows, examples)
            seconds = max(seconds, time.monotonic() - started)
        except InputError as error:
            return Line(kind, "refused", "refused", 0.0, "", str(error)[:110], seconds)
        found[mode] = WAYS[type(forward).__name__] + (" alone" if getattr(forward, "alone", False) else "")
        difference = max(difference, compare(forward, model, rows, examples))
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            check_saved(Path(folder), model, None, trust_remote_code=False)
            saved = "yes"
        except InputError as error:
            saved = str(error)[:80]
    reasons = [note.partition("(")[2].rstrip(")") for note in notes if "not for this model" in note]
    return Line(kind, found["frozen"], found["full"], difference, saved, "; ".join(dict.fromkeys(reasons)), seconds)


class Notes(logging.Handler):
    """Collects what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main(kinds: list[str]) -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    notes = Notes()
    logger = logging.getLogger("sft")
    logger.setLevel(logging.INFO)
    logger.addHandler(notes)
    logger.propagate = False
    examples = toy_examples()
    lines = []
    for kind in kinds or families():
        notes.lines.clear()
        lines.append(examine(kind, examples, notes.lines))
        print(f"{kind}: {lines[-1].frozen}, {lines[-1].full}, {lines[-1].difference:.0e}", file=sys.stderr)
    wrong = [line.family for line in lines if not line.difference <= ROUNDING]
    print(f"# The causal families of transformers {importlib.metadata.version('transformers')}\n")
    for mode in ("frozen", "full"):
        counts = Counter(getattr(line, mode) for line in lines)
        print(f"- {mode}: " + ", ".join(f"{count} {way}" for way, count in counts.most_common()))
    print(f"- wrong: {', '.join(wrong) or 'none'}\n")
    print("| family | freeze mode | full mode | difference | saved | why not faster | trial s |\n|" + " --- |" * 7)
    for line in lines:
        print(
            f"| {line.family} | {line.frozen} | {line.full} | {line.difference:.0e} | {line.saved} | {line.reason} "
            f"| {line.trial_s:.2f} |"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
