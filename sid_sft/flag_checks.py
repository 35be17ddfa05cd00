"""How the flags of a command go together, with each other and with the disk; told before anything heavy is loaded.

check_training(flags)      # InputError: --save_steps 7 is no multiple of --eval_steps 5; ...
check_evaluating(flags)
"""

from __future__ import annotations

import dataclasses
import math
import os
from importlib.util import find_spec
from pathlib import Path

from sid_sft.command_line import LARGEST, suggestion, world_size
from sid_sft.files import LONGEST_PATH, InputError, cut, error_text, shown
from sid_sft.recommend.answers import WRITERS
from sid_sft.recommend.evaluator import RECOMMENDING_TASKS
from sid_sft.recommend.histories import READERS
from sid_sft.serving.export import CONTENT, TRIE_FILE
from sid_sft.settings import CACHE_DIR, CHANGEABLE, EvaluateFlags, TrainFlags, answers_path, examples_per_step, intervals
from sid_sft.tasks import TASK_GROUPS, TASKS

ACCELERATE_FSDP = "ACCELERATE_USE_FSDP"  # set by `accelerate launch` with a configuration for FSDP
NEEDED = {"lora_rank": "peft", "load_in_8bit": "torchao", "load_in_4bit": "bitsandbytes"}  # flag -> optional library


def check_training(flags: TrainFlags) -> None:
    """Refuses, before anything heavy is loaded, flags of sft.py that contradict each other or the disk."""
    check_batch(flags)
    check_intervals(flags)
    check_tasks(flags)
    check_base_model(flags.base_model)
    check_places(flags)
    check_resuming(flags)
    check_distribution(flags)
    check_freezing(flags)


def check_batch(flags: TrainFlags) -> None:
    if examples_per_step(flags) % (flags.micro_batch_size * world_size()):
        raise InputError(
            f"--batch_size {flags.batch_size} is no multiple of micro_batch_size x processes = "
            f"{flags.micro_batch_size} x {world_size()}"
        )


def check_intervals(flags: TrainFlags) -> None:
    evaluating, saving = intervals(flags)
    both_shares_or_none = (saving < 1) == (evaluating < 1)
    if flags.eval_file and not (both_shares_or_none and is_multiple(saving, evaluating)):
        raise InputError(
            f"--save_steps {saving:g} is no multiple of --eval_steps {evaluating:g}; "
            "the best checkpoint must have been both evaluated and saved; leave one of the two out and it follows the other"
        )


def is_multiple(steps: float, of: float) -> bool:
    """Whether one count or share of steps is the other one, twice, three times, ...: 0.3 of 0.1 is."""
    ratio = steps / of
    return ratio < LARGEST and math.isclose(ratio, max(1, round(ratio)))


def check_tasks(flags: TrainFlags) -> None:
    names = flags.task_names
    if flags.eval_recommendation and not flags.eval_file:
        raise InputError("--eval_recommendation needs --eval_file")
    if flags.eval_recommendation and not set(names) & set(RECOMMENDING_TASKS):
        raise InputError(f"--eval_recommendation needs one of {', '.join(RECOMMENDING_TASKS)} in --tasks")
    if flags.metric_for_best_model != "eval_loss" and not flags.eval_recommendation:
        raise InputError(
            f"--metric_for_best_model {flags.metric_for_best_model} is measured with --eval_recommendation only"
        )
    if not names:
        raise InputError(f"--tasks {shown(flags.tasks)} names no task; the tasks are {', '.join(TASK_GROUPS)}")
    for name in names:
        if name not in TASK_GROUPS:
            raise InputError(
                f"--tasks has {shown(name)}{suggestion(name, TASK_GROUPS)}; the tasks are {', '.join(TASK_GROUPS)}"
            )
    if len(set(names)) < len(names):
        raise InputError(f"--tasks {shown(flags.tasks)} names a task twice")
    needed = {"interactions": "train_file", "preferences": "preference_file"}
    for task in TASKS.values():
        if task.group not in names:
            continue
        if task.rows in needed and not getattr(flags, needed[task.rows]):
            raise InputError(f"--{needed[task.rows]} is missing; the task {task.group} needs it")
        if "title" in (task.shows, task.answers) and not flags.item_meta_path:
            raise InputError(f"--item_meta_path is missing; the task {task.group} needs titles (or leave it out of --tasks)")


def check_base_model(base_model: str) -> None:
    """Refuses what is no model folder and cannot be a hub name."""
    name = cut(base_model, LONGEST_PATH)
    if os.path.isdir(base_model) and not os.path.isfile(os.path.join(base_model, "config.json")):
        hint = " (its final_checkpoint/ is one)" if os.path.isdir(os.path.join(base_model, "final_checkpoint")) else ""
        raise InputError(f"--base_model {name}: the folder has no config.json; expected a saved HF model{hint}")
    if not os.path.exists(base_model) and (base_model.startswith((".", "/", "~")) or base_model.count("/") > 1):
        raise InputError(f"--base_model {name}: there is no such folder")


def check_places(flags: TrainFlags) -> None:
    if flags.prefix_cache_in not in ("device", "host") and not os.path.isdir(flags.prefix_cache_in):
        place = cut(flags.prefix_cache_in, LONGEST_PATH)
        raise InputError(f"--prefix_cache_in {place}: is neither device nor host, and there is no such folder")
    check_cache_dir(flags.cache_dir or CACHE_DIR)


def check_resuming(flags: TrainFlags) -> None:
    resume = flags.resume_from_checkpoint
    if resume.lower() == "true" and not any(Path(flags.output_dir).glob("checkpoint-*")):
        raise InputError(
            f"--resume_from_checkpoint {resume}, but {flags.output_dir} has no checkpoint; with auto the run starts afresh"
        )
    if resume and resume.lower() not in ("true", "auto") and not os.path.isfile(os.path.join(resume, "trainer_state.json")):
        place = cut(resume, LONGEST_PATH)
        raise InputError(f"--resume_from_checkpoint {place}: is no checkpoint folder (it has no trainer_state.json)")
    if flags.allowed_changes and not resume:
        raise InputError("--allow_changed is for --resume_from_checkpoint; a fresh run may have any flags")
    for name in flags.allowed_changes:
        if name not in CHANGEABLE:
            raise InputError(
                f"--allow_changed has {name!r}{suggestion(name, CHANGEABLE)}; expected some of {', '.join(CHANGEABLE)}"
            )


def check_cache_dir(path: str) -> None:
    """InputError where no folder can be at a path; makes nothing. One that may only be read can serve, too."""
    expanded = os.path.expanduser(path)
    wanted = place = os.path.abspath(expanded)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    fault = ""
    if any(len(os.fsencode(part)) > 255 for part in wanted.split(os.sep)):
        fault = "has a name of more than 255 bytes"
    elif expanded.startswith("~"):
        fault = "there is no such user"
    elif not os.path.isdir(place):
        fault = "is a file" if place == wanted else f"cannot be made, since {cut(place, LONGEST_PATH)} is a file"
    if fault:
        raise InputError(f"--cache_dir {cut(path, LONGEST_PATH)}: {fault}; expected a folder")


def check_distribution(flags: TrainFlags) -> None:
    """Refuses what would silently train the wrong thing."""
    if flags.train_from_scratch and flags.freeze_LLM:
        raise InputError("--train_from_scratch with --freeze_LLM would freeze random weights; choose one")
    if asked("ACCELERATE_USE_DEEPSPEED"):
        raise InputError("DeepSpeed is not supported; start with torchrun (as sft.sh does) and --fsdp True in its place")
    if not (flags.fsdp or asked(ACCELERATE_FSDP)):
        return
    version = os.environ.get("FSDP_VERSION", "1")  # as accelerate has it
    if asked(ACCELERATE_FSDP) and version != "2":
        raise InputError(
            f"FSDP version {shown(version)} is not supported; start with torchrun (as sft.sh does) and --fsdp True, or set "
            "fsdp_version: 2 in accelerate's configuration"
        )
    for name in NEEDED:
        if getattr(flags, name):
            raise InputError(f"--{name} cannot go with --fsdp True, which shards a plain model; leave one of the two out")
    if world_size() == 1:
        raise InputError("--fsdp True shards the model over processes, and this is one; start several with torchrun")
    if flags.auto_micro_batch:
        raise InputError(
            "--auto_micro_batch True cannot compute a step again with --fsdp True, where all processes compute it together; "
            "leave it out and choose --micro_batch_size"
        )


def asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true")


def takes_over_from_accelerate(flags: TrainFlags) -> TrainFlags:
    """The flags, with --fsdp True where accelerate's configuration asks for it; accelerate then does nothing about it."""
    if not asked(ACCELERATE_FSDP):
        return flags
    os.environ[ACCELERATE_FSDP] = "false"
    return dataclasses.replace(flags, fsdp=True)


def check_freezing(flags: TrainFlags) -> None:
    """Refuses what is for freeze mode alone, and what needs a library that is not there."""
    for name in ("lora_alpha", "lora_learning_rate"):
        if getattr(flags, name) is not None and not flags.lora_rank:
            raise InputError(f"--{name} needs --lora_rank, the rank of the adapters")
    if flags.load_in_8bit and flags.load_in_4bit:
        raise InputError("--load_in_8bit and --load_in_4bit are two ways to hold one model; choose one")
    for name, library in NEEDED.items():
        if not getattr(flags, name):
            continue
        given = f"--{name} {getattr(flags, name)}"
        if not flags.freeze_LLM:
            raise InputError(
                f"{given} is for --freeze_LLM True, which it needs; without it every number of the model trains"
            )
        if find_spec(library) is None:
            raise InputError(f"{given} needs {library}, which is not installed; pip install {library}")


def check_evaluating(flags: EvaluateFlags) -> None:
    """Refuses, before anything heavy is loaded, flags of evaluate.py that contradict each other or the disk."""
    check_base_model(flags.base_model)
    asked = [name for name in ("recommend", "recommend_file", "export_serving") if getattr(flags, name)]
    if not asked and not flags.test_file:
        raise InputError("--test_file is missing")
    if len(asked) > 1:
        raise InputError(f"--{asked[0]} and --{asked[1]} are two things to do; give one of the two")
    if flags.recommendations_file and not flags.recommend_file:
        raise InputError("--recommendations_file needs --recommend_file, whose answers go there")
    if flags.exclude_history and asked not in (["recommend"], ["recommend_file"]):
        raise InputError(
            "--exclude_history is for --recommend and --recommend_file; metrics.json has the numbers with and without it"
        )
    if flags.recommend_file:
        check_answers(flags)
    if flags.export_serving:
        check_export(flags)


def check_answers(flags: EvaluateFlags) -> None:
    """Refuses files of --recommend_file that are of an unknown kind, or one and the same."""
    places = {"recommend_file": flags.recommend_file, "recommendations_file": str(answers_path(flags))}
    for (name, path), kinds in zip(places.items(), (tuple(READERS), tuple(WRITERS)), strict=True):
        if Path(path).suffix.lower() not in kinds:
            raise InputError(f"--{name} {cut(path, LONGEST_PATH)}: is of an unknown kind; expected {', '.join(kinds)}")
    if os.path.realpath(places["recommend_file"]) == os.path.realpath(places["recommendations_file"]):
        path = cut(flags.recommend_file, LONGEST_PATH)
        raise InputError(f"--recommendations_file {path}: is the file of --recommend_file, too; choose another name")


def check_export(flags: EvaluateFlags) -> None:
    """Refuses a place for --export_serving where something else would be lost."""
    folder, name = Path(flags.export_serving), cut(flags.export_serving, LONGEST_PATH)
    if not os.path.isdir(flags.base_model):
        raise InputError(f"--export_serving needs a folder for --base_model, not the hub name {shown(flags.base_model)}")
    model, target = Path(os.path.realpath(flags.base_model)), Path(os.path.realpath(folder))
    if target == model or target in model.parents:
        raise InputError(f"--export_serving {name}: holds --base_model; choose another folder")
    if os.path.lexists(folder) and not folder.is_dir():
        raise InputError(f"--export_serving {name}: is a file; expected a new folder")
    try:
        found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        parent = next(place for place in target.parents if os.path.lexists(place))
    except OSError as error:
        raise InputError(f"--export_serving {name}: cannot be written ({error_text(error)})") from None
    if found and (TRIE_FILE not in found or found - {*CONTENT, "__pycache__"}):
        raise InputError(f"--export_serving {name}: has other files in it; expected a new folder, or an earlier export")
    if not parent.is_dir():
        raise InputError(f"--export_serving {name}: {cut(str(parent), LONGEST_PATH)} is a file; expected a folder")
