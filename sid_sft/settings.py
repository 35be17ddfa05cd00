"""The flags of training: checked one by one and against each other before anything loads."""

from __future__ import annotations

import math
import os
import types
from pathlib import Path

from sid_sft.command_line import suggestion, world_size
from sid_sft.files import InputError
from sid_sft.recommend.evaluator import RECOMMENDING_TASKS
from sid_sft.tasks import TASK_GROUPS, TASKS

STEPS_SHARE = 0.05  # of a run, between two evaluations and checkpoints: twenty of them
BEST_METRICS = ("eval_loss", "eval_hr@10", "eval_ndcg@10")


def set_intervals(flags: types.SimpleNamespace) -> None:
    """Evaluating and saving go together: where one of the two is named, the other follows it (if there is evaluation)."""
    named = [steps for steps in (flags.eval_steps, flags.save_steps) if steps is not None and flags.eval_file]
    for name in ("eval_steps", "save_steps"):
        if getattr(flags, name) is None:
            setattr(flags, name, named[0] if named else STEPS_SHARE)


def check_ranges(flags: types.SimpleNamespace) -> None:
    limits = {
        "num_epochs": 0,
        "batch_size": 1,
        "micro_batch_size": 1,
        "cutoff_len": 2,
        "learning_rate": 0,
        "weight_decay": 0,
        "warmup_steps": 0,
        "logging_steps": 1,
        "eval_steps": 0,
        "save_steps": 0,
        "early_stopping_patience": 0,
        "eval_recommendation": 0,
        "seed": 0,
        "prefix_cache_gb": 0,
        "num_proc": 1,
        "max_left_out": 0,
    }
    above = ("num_epochs", "learning_rate", "eval_steps", "save_steps")
    for name, least in limits.items():
        value = getattr(flags, name)
        if value is not None and (value < least or (name in above and value == least)):
            raise InputError(f"sft.py: --{name} {value:g} must be {'above' if name in above else 'at least'} {least}")
    for name in ("sample", "eval_sample", "max_steps"):
        value = getattr(flags, name)
        if value == 0 or value < -1:
            raise InputError(f"sft.py: --{name} {value} must be positive, or -1 for no limit")
    if flags.max_left_out > 1:
        raise InputError(f"sft.py: --max_left_out {flags.max_left_out:g} must be a share of the rows, from 0 to 1")
    for name in ("eval_steps", "save_steps"):
        value = getattr(flags, name)
        if value > 1 and value != int(value):
            raise InputError(f"sft.py: --{name} {value:g} must be a whole number of steps, or a share of the run below 1")
    ratio, both_shares_or_none = flags.save_steps / flags.eval_steps, (flags.save_steps < 1) == (flags.eval_steps < 1)
    if flags.eval_file and not (both_shares_or_none and math.isclose(ratio, max(1, round(ratio)))):
        raise InputError(
            f"sft.py: --save_steps {flags.save_steps:g} is no multiple of --eval_steps {flags.eval_steps:g}; "
            "the best checkpoint must have been both evaluated and saved; leave one of the two out and it follows the other"
        )
    if flags.batch_size % (flags.micro_batch_size * world_size()):
        raise InputError(
            f"sft.py: --batch_size {flags.batch_size} is no multiple of micro_batch_size x processes = "
            f"{flags.micro_batch_size} x {world_size()}"
        )


def check_tasks(flags: types.SimpleNamespace) -> None:
    groups = flags.tasks.split(",")
    if flags.eval_recommendation and not flags.eval_file:
        raise InputError("sft.py: --eval_recommendation needs --eval_file")
    if flags.eval_recommendation and not set(groups) & set(RECOMMENDING_TASKS):
        raise InputError(f"sft.py: --eval_recommendation needs one of {', '.join(RECOMMENDING_TASKS)} in --tasks")
    if flags.metric_for_best_model not in BEST_METRICS:
        raise InputError(
            f"sft.py: --metric_for_best_model {flags.metric_for_best_model!r}; expected one of {', '.join(BEST_METRICS)}"
        )
    if flags.metric_for_best_model != "eval_loss" and not flags.eval_recommendation:
        raise InputError(
            f"sft.py: --metric_for_best_model {flags.metric_for_best_model} is measured with --eval_recommendation only"
        )
    for group in groups:
        if group not in TASK_GROUPS:
            raise InputError(
                f"sft.py: --tasks has {group!r}{suggestion(group, TASK_GROUPS)}; the tasks are {', '.join(TASK_GROUPS)}"
            )
    if len(set(groups)) < len(groups):
        raise InputError(f"sft.py: --tasks {flags.tasks} names a task twice")
    needed = {"interactions": "train_file", "preferences": "preference_file"}
    for task in TASKS.values():
        if task.group not in groups:
            continue
        if task.rows in needed and not getattr(flags, needed[task.rows]):
            raise InputError(f"sft.py: --{needed[task.rows]} is missing; the task {task.group} needs it")
        if "title" in (task.shows, task.answers) and not flags.item_meta_path:
            raise InputError(
                f"sft.py: --item_meta_path is missing; the task {task.group} needs titles (or leave it out of --tasks)"
            )


def check_paths(flags: types.SimpleNamespace) -> None:
    for name in ("base_model", "sid_index_path", "output_dir"):
        if not getattr(flags, name):
            raise InputError(f"sft.py: --{name} is missing")
    for name in ("train_file", "eval_file", "sid_index_path", "item_meta_path", "preference_file", "prompts"):
        path = getattr(flags, name)
        if path and not Path(path).is_file():
            raise InputError(f"sft.py: --{name} {path}: there is no such file")
    base = Path(flags.base_model)
    if base.is_dir() and not (base / "config.json").is_file():
        raise InputError(f"sft.py: --base_model {base}: the folder has no config.json; expected a saved HF model")
    if not base.exists() and (flags.base_model.startswith((".", "/", "~")) or flags.base_model.count("/") > 1):
        raise InputError(f"sft.py: --base_model {base}: there is no such folder")
    if flags.prefix_cache_in not in ("device", "host") and not Path(flags.prefix_cache_in).is_dir():
        raise InputError(
            f"sft.py: --prefix_cache_in {flags.prefix_cache_in}: is neither device nor host, and there is no such folder"
        )
    if Path(flags.output_dir).is_file():
        raise InputError(f"sft.py: --output_dir {flags.output_dir}: is a file")
    resume = flags.resume_from_checkpoint
    if resume.lower() == "true" and not any(Path(flags.output_dir).glob("checkpoint-*")):
        raise InputError(f"sft.py: --resume_from_checkpoint True, but {flags.output_dir} has no checkpoint")
    if resume and resume.lower() != "true" and not (Path(resume) / "trainer_state.json").is_file():
        raise InputError(
            f"sft.py: --resume_from_checkpoint {resume}: is no checkpoint folder (it has no trainer_state.json)"
        )


def check_distribution(flags: types.SimpleNamespace) -> None:
    """Refuses what would silently train the wrong thing."""
    if flags.train_from_scratch and flags.freeze_LLM:
        raise InputError("sft.py: --train_from_scratch with --freeze_LLM would freeze random weights; choose one")
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() in ("1", "true"):
            why = (
                "never calls the gradient hook that keeps the other rows frozen" if flags.freeze_LLM else "is not supported"
            )
            raise InputError(f"sft.py: {name} {why}; start with torchrun (as sft.sh does), not with an {name} configuration")
