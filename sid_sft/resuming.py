"""Checkpoints that are whole, and runs that go on from them.

The HF Trainer writes a checkpoint file by file. When the last one is there, `write_record` adds checkpoint.json: the size
and hash of each file, everything that decides the run's numbers, and the sums that its log goes on with.

    output/checkpoint-150/   sid_rows.safetensors  optimizer.pt  scheduler.pt  rng_state.pth  trainer_state.json
                             checkpoint.json       {"files": {"optimizer.pt": {"bytes": 6594, "sha256": "9f86d0..."}, ...},
                                                    "decides": {"seed": 42, "train_file": "5e88489...", ...},
                                                    "log": {...}, "hash": "2c26b4..."}

A folder without a record, or with another content than its record says, is not whole: no run ever goes on from it.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sid_sft.command_line import rank, world_size
from sid_sft.files import InputError, content_hash, cut, file_hash, read_json, whole_file
from sid_sft.output_folder import RECORD_FILE, STATE_FILE
from sid_sft.parts import source_hash
from sid_sft.settings import CHANGEABLE, TrainFlags, examples_per_step, intervals
from sid_sft.tasks import PROMPTS, category_name
from sid_sft.training_arguments import use_bf16

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("sft.resuming")

ASIDE = "set_aside"  # folder of output_dir for checkpoints that are in the way of the run


class Resumed(NamedTuple):
    """What a run goes on from. log: see RunningSums; changed: the flags of --allow_changed that differ."""

    folder: Path
    log: dict[str, Any]
    changed: list[str]


# ---------------------------------------------------------------------------------------------- whole checkpoints


def write_record(folder: Path, decides: dict[str, Any], log: dict[str, Any]) -> None:
    """Makes a checkpoint whole: to be called when all of its files are written."""
    content: dict[str, Any] = {"files": described(folder), "decides": decides, "log": log}
    content["hash"] = content_hash(content)
    with whole_file(folder / RECORD_FILE) as scratch:
        scratch.write_text(json.dumps(content, indent=1))


def described(folder: Path) -> dict[str, dict[str, Any]]:
    """{"optimizer.pt": {"bytes": 6594, "sha256": "9f86d0..."}} of every file under a checkpoint but its record."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(RECORD_FILE))
    return {path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in paths}


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a whole checkpoint; InputError says what is missing or differs."""
    if not (folder / RECORD_FILE).is_file():
        raise InputError(f"{folder} is not whole: it has no {RECORD_FILE}, which is written last")
    record = read_json(folder / RECORD_FILE, "the record of a checkpoint")
    if not isinstance(record, dict) or record.pop("hash", None) != content_hash(record):
        raise InputError(f"{folder} is not whole: {RECORD_FILE} is not as it was written")
    found = described(folder)
    for name, expected in record["files"].items():
        if name not in found:
            raise InputError(f"{folder} is not whole: {name} is missing")
        if found[name] != expected:
            raise InputError(f"{folder} is not whole: {name} is not as it was written")
    return record


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders checkpoint-N of an output folder, whole or not, the newest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: -(step_of(path) or 0))


def step_of(folder: Path) -> int | None:
    """Path("output/checkpoint-150") -> 150."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else None


# ---------------------------------------------------------------------------------------------- going on


def resume_point(flags: TrainFlags, decides: Callable[[], dict[str, Any]]) -> tuple[Resumed | None, dict[str, Any]]:
    """Where the run begins, the same on every process, and what decides its numbers (on rank 0, which saves).

    Checkpoints that are in the way of the run are moved to output_dir/set_aside. InputError where the checkpoint asked for
    is not whole, or is of a run that something else decided.
    """
    outcome: list[Any] = [None, {}, None]
    if rank() == 0:
        try:
            outcome[1] = decides()
            outcome[0] = find_resume_point(flags, outcome[1])
            clear_the_way(Path(flags.output_dir), outcome[0].folder if outcome[0] else None)
        except InputError as error:
            outcome[2] = str(error)
    if world_size() > 1:
        import torch.distributed as dist

        dist.broadcast_object_list(outcome)
    resumed, decided, fault = outcome
    if fault:
        raise InputError(fault)
    return resumed, decided


def find_resume_point(flags: TrainFlags, decides: dict[str, Any]) -> Resumed | None:
    request = flags.resume_from_checkpoint
    if not request:
        return None
    record = None
    if request.lower() not in ("true", "auto"):
        folder = Path(request)
        record = read_record(folder)
    else:
        for folder in checkpoints(Path(flags.output_dir)):
            try:
                record = read_record(folder)
                break
            except InputError as error:
                logger.info(f"{error}; it is not resumed")
    if record is None:
        if request.lower() == "auto":
            logger.info(f"{flags.output_dir} has no whole checkpoint: the run starts afresh")
            return None
        raise InputError(
            f"--resume_from_checkpoint {request}, but {flags.output_dir} has no whole checkpoint; "
            "leave the flag out to start afresh (auto does so by itself)"
        )
    changed = compared(folder, record["decides"], decides, flags.allowed_changes)
    logger.info(f"Resuming from {folder}")
    return Resumed(folder, record["log"], changed)


def compared(folder: Path, then: dict[str, Any], now: dict[str, Any], allowed: list[str]) -> list[str]:
    """The flags that differ from those of a checkpoint and may; InputError names every one that may not."""
    changed = [name for name in now if name in then and now[name] != then[name]]
    refused = [name for name in changed if name not in allowed]
    if not refused:
        return changed
    text = ", ".join(f"{name} {difference(then[name], now[name])}" for name in refused)
    if fixed := [name for name in refused if name not in CHANGEABLE]:
        way = f"with another {fixed[0]} start afresh (from its final_checkpoint/, if you like)"
    else:
        way = f"go on all the same with --allow_changed {','.join(refused)}, or start afresh in another --output_dir"
    raise InputError(f"{folder} is of another run: {text}; {way}")


def difference(then: Any, now: Any) -> str:
    """'0.001 (now 0.01)'; of what was hashed only that it differs."""
    if any(re.fullmatch("[0-9a-f]{24,64}", str(value)) for value in (then, now)):
        return "has other content"
    return f"{cut(str(then))} (now {cut(str(now))})"


def clear_the_way(output_dir: Path, resumed: Path | None) -> None:
    """Moves the checkpoints that the run would trip over out of its way: all of an earlier run, or those behind `resumed`.

    One that a kill left half written, without the state that the Trainer writes last, is removed.
    """
    beside = resumed is not None and resumed.resolve().parent == output_dir.resolve()
    first = (step_of(resumed) or 0) + 1 if resumed is not None and beside else 0
    moved = []
    for folder in checkpoints(output_dir):
        if (step_of(folder) or 0) < first:
            continue
        if not (folder / STATE_FILE).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            continue
        target = output_dir / ASIDE / folder.name
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        folder.rename(target)
        moved.append(folder.name)
    if moved:
        logger.info(f"{', '.join(reversed(moved))}: in the way of this run, moved to {output_dir / ASIDE}")


# ---------------------------------------------------------------------------------------------- what decides a run


def what_decides(flags: TrainFlags, base: str, tokens: list[str]) -> dict[str, Any]:
    """Everything that decides the numbers of a run, by flag: files by their content, what is left out by its default.

    flags: with the learning rate that was found; base: the hash of the base model; tokens: the SID tokens of the index.
    """
    evaluating, saving = intervals(flags)
    resolved = {
        "load_in_8bit": flags.load_in_8bit,  # before the base, whose hash follows from it
        "load_in_4bit": flags.load_in_4bit,
        "base_model": base,
        "freeze_LLM": flags.freeze_LLM,
        "lora_rank": flags.lora_rank,
        "lora_alpha": flags.lora_alpha,
        "train_from_scratch": flags.train_from_scratch,
        "SID tokens": content_hash(tokens),
        "tasks": ",".join(flags.task_names),
        "category": category_name(flags.category),
        "prompts": content_hash(PROMPTS),
        "batch_size": examples_per_step(flags),
        "bf16": use_bf16(flags),
        "fsdp": flags.fsdp,
        "eval_steps": evaluating if flags.eval_file else None,
        "save_steps": saving,
        "num_epochs": flags.num_epochs if flags.max_steps < 0 else None,
    }
    files = {name: source_hash(path) for name, path in flags.input_files.items()}
    return {name: getattr(flags, name) for name in CHANGEABLE} | resolved | files
