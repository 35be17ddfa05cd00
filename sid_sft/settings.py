"""The flags of both commands: every one with its type, default, help and range.

    flags = read_flags(TrainFlags, {"base_model": "Qwen/Qwen2.5-0.5B", "batch_size": "64", ...})   # each flag by itself
    check_training(flags)                                                # how they go together: flag_checks.py

--help is made from these records; the table of the README and the list in sft.sh are tested against them.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sid_sft.command_line import (
    COUNT_OR_ALL,
    LARGEST,
    SHARE,
    Range,
    above,
    at_least,
    flag,
    flags_of,
    from_to,
    same_flag,
    world_size,
)
from sid_sft.interactions import MAX_LEFT_OUT
from sid_sft.recommend.evaluator import RECOMMENDING_TASKS
from sid_sft.tasks import DEFAULT_TASKS, TASK_GROUPS

FREEZE_TASKS = ("sid_sid",)  # what freeze mode trains on unless told; on what evidence: results/freeze_learning.md
BATCH_SIZE = 128  # examples per optimizer step, where none are given and the processes can share them evenly
EPOCHS, FREEZE_EPOCHS = 10.0, 5.0  # on what evidence in freeze mode, here and below: results/freeze_learning.md
FREEZE_DECAY = 1.0  # weight decay of the SID rows
ADAPTER_LEARNING_RATE = 1e-3  # of LoRA adapters; on what evidence: results/lora.md
CACHE_DIR = "~/.cache/sid-sft"
ANSWERS_FILE = "recommendations.jsonl"
STEPS_SHARE = 0.05  # of a run, between two evaluations and checkpoints: twenty of them
BEST_METRICS = ("eval_loss", "eval_hr@10", "eval_ndcg@10")
# The flags that decide a run's numbers and may differ, if --allow_changed names them, when a run goes on from a checkpoint.
# fmt: off
CHANGEABLE = (
    "train_file", "eval_file", "sid_index_path", "item_meta_path", "preference_file", "category", "tasks", "prompts",
    "chat_template", "sample", "eval_sample", "eval_recommendation", "metric_for_best_model", "cutoff_len", "num_epochs",
    "max_steps", "batch_size", "learning_rate", "lora_learning_rate", "weight_decay", "lr_scheduler_type", "warmup_steps",
    "group_by_length", "group_users", "seed", "bf16", "eval_steps", "save_steps", "early_stopping_patience",
)
# fmt: on
SCHEDULES = (  # those of transformers that need no further arguments
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "greedy",
)
STEPS = Range(
    "a whole number of steps, or above 0 and below 1 a share of the run",
    lambda value: 0 < value < 1 or (value >= 1 and value == int(value)),
)


@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """The flags of sft.py."""

    # ---- what is read and where it goes
    base_model: str = flag(
        "",
        "folder or hub name of a causal language model, or a final_checkpoint/ of an earlier run",
        required=True,
        in_sft_sh="Qwen/Qwen2.5-0.5B",
    )
    train_file: str = flag(
        "",
        "interactions to train on, CSV or Parquet; several files as a folder, a glob, or names with commas between",
        is_file=True,
        several=True,
        in_sft_sh="data/amazon/CATEGORY.train.csv",
    )
    eval_file: str = flag(
        "",
        "interactions to evaluate on (task sid_sid), like train_file; without it nothing is evaluated",
        is_file=True,
        several=True,
        in_sft_sh="data/amazon/CATEGORY.valid.csv",
    )
    sid_index_path: str = flag(
        "",
        "the .index.json, item id -> SID tokens; exactly this file is opened",
        required=True,
        is_file=True,
        in_sft_sh="data/amazon/CATEGORY.index.json",
    )
    item_meta_path: str = flag(
        "",
        "the .item.json with titles; the tasks item, sid_title, title_title, title_sid need it",
        is_file=True,
        in_sft_sh="data/amazon/CATEGORY.item.json",
    )
    preference_file: str = flag(
        "", "JSON list of user preferences, for the tasks preference and preference_sid", is_file=True
    )
    output_dir: str = flag(
        "",
        "where checkpoints, final_checkpoint/, the report and trainer_state.json go",
        required=True,
        in_sft_sh="output/CATEGORY",
    )

    # ---- what is asked, in which words
    category: str = flag("", "words for the prompts; known names (Industrial_and_Scientific) get readable words")
    tasks: str | None = flag(
        None,
        f"names, comma separated, of {', '.join(TASK_GROUPS)}",
        if_unset="the first five, with freeze_LLM sid_sid alone",
    )
    prompts: str = flag("", "JSON file with wording of your own, task name -> template", is_file=True)
    chat_template: bool = flag(
        False, "put prompts and answers into the turns of the tokenizer's chat template, which an instruct model knows"
    )
    sample: int = flag(-1, "random rows to train on per task", COUNT_OR_ALL)
    eval_sample: int = flag(-1, "random rows to evaluate on", COUNT_OR_ALL)
    eval_recommendation: int = flag(
        0, "random rows of eval_file for which each evaluation measures HR@10 and NDCG@10; 0 for none", at_least(0)
    )
    metric_for_best_model: str = flag("eval_loss", "decides the best checkpoint and early stopping", choices=BEST_METRICS)
    max_left_out: float = flag(
        MAX_LEFT_OUT,
        "share of a file's rows that may be left out (unknown item, no history, no title, too long) before the run stops; "
        "1 allows any",
        SHARE,
    )
    cutoff_len: int = flag(
        512,
        "tokens of the longest example, no more than the model's positions; longer ones lose whole items, the oldest first",
        at_least(2),
    )

    # ---- what trains
    freeze_LLM: bool = flag(False, "train only the rows of the SID tokens, leave the language model as it is")
    frozen_prefix: bool = flag(
        True, "in freeze mode, compute what no SID can change once and without gradients; the same result, faster"
    )
    lora_rank: int = flag(
        0, "in freeze mode, rank of LoRA adapters that train beside the SID rows; 0 for none", from_to(0, 1024)
    )
    lora_alpha: int | None = flag(
        None, "an adapter counts lora_alpha / lora_rank times", from_to(1, 100_000), if_unset="2 x lora_rank"
    )
    lora_learning_rate: float | None = flag(
        None, "peak learning rate of the adapters", above(0, 100), if_unset=f"{ADAPTER_LEARNING_RATE:g}"
    )
    load_in_8bit: bool = flag(
        False, "in freeze mode, train against the base in int8 (torchao); final_checkpoint/ keeps the base's own numbers"
    )
    load_in_4bit: bool = flag(
        False, "in freeze mode, train against the base in nf4 (bitsandbytes); final_checkpoint/ keeps the base's own numbers"
    )
    train_from_scratch: bool = flag(False, "random weights of the base model's shape")

    # ---- how it trains
    num_epochs: float | None = flag(
        None, "passes over the training data", above(0), if_unset=f"{EPOCHS:g}, with freeze_LLM {FREEZE_EPOCHS:g}"
    )
    max_steps: int = flag(-1, "optimizer steps; override num_epochs", COUNT_OR_ALL)
    batch_size: int | None = flag(
        None,
        "examples per optimizer step over all processes; a multiple of micro_batch_size x processes",
        at_least(1),
        if_unset=f"{BATCH_SIZE}, or the next larger multiple",
    )
    micro_batch_size: int = flag(4, "examples per forward pass of one process; smaller needs less memory", at_least(1))
    auto_micro_batch: bool = flag(
        False,
        "halve micro_batch_size where memory does not suffice, and compute that step again; the steps keep their examples",
    )
    fsdp: bool = flag(
        False, "shard the model over the processes (torch's FSDP2), for one that does not fit on a device of its own"
    )
    gradient_checkpointing: bool = flag(
        False, "compute the activations of each layer again in the backward instead of keeping them: less memory, slower"
    )
    learning_rate: float | None = flag(
        None,
        "peak learning rate",
        above(0, 100),
        if_unset="3e-4, with freeze_LLM 2.4 over the width of the model",
    )
    weight_decay: float | None = flag(
        None,
        "AdamW's decoupled weight decay; in freeze mode of what trains alone",
        from_to(0, 100),
        if_unset=f"0, with freeze_LLM {FREEZE_DECAY:g}",
    )
    lr_scheduler_type: str = flag("cosine", "how the learning rate goes on from its peak", choices=SCHEDULES)
    warmup_steps: int = flag(20, "steps until the learning rate reaches its peak", at_least(0))
    group_by_length: bool = flag(False, "batches of similar length across the epoch (steps are sorted inside in any case)")
    group_users: bool = flag(
        False,
        "a user's examples fall into the same step, where what they share is computed once: faster, though the loss falls "
        "a little more slowly",
    )
    prefix_cache_gb: float = flag(
        2.0, "GB per process for what the frozen prefix keeps from step to step; 0 keeps nothing", at_least(0)
    )
    prefix_cache_in: str = flag(
        "device", "where to keep it: device (the memory of the device that computes), host, or a folder on a fast disk"
    )
    seed: int = flag(42, "decides shuffling, sampling and the first values of new rows", from_to(0, LARGEST))
    bf16: bool | None = flag(None, "compute in bfloat16", if_unset="on GPUs that have it")

    # ---- what is told and kept of the run
    logging_steps: int = flag(10, "steps between two lines of the log", at_least(1))
    eval_steps: float | None = flag(
        None, "steps between two evaluations", STEPS, if_unset=f"save_steps, or else {STEPS_SHARE}"
    )
    save_steps: float | None = flag(
        None,
        "steps between two checkpoints, a multiple of eval_steps",
        STEPS,
        if_unset=f"eval_steps, or else {STEPS_SHARE}",
    )
    early_stopping_patience: int = flag(
        3, "evaluations without a better one before the run stops; 0 never stops", at_least(0)
    )
    resume_from_checkpoint: str = flag(
        "",
        "a checkpoint folder; True for the newest whole one in output_dir; auto for that one, or else a fresh start",
    )
    allow_changed: str = flag(
        "", "flags, comma separated, that may differ from those of the checkpoint: learning_rate,train_file"
    )
    report_to: str = flag("none", "none, wandb, tensorboard, ... (transformers' names)")
    wandb_project: str = flag("", "name of a Weights & Biases project; implies report_to wandb")
    wandb_run_name: str = flag("", "name of the run there")
    push_to_hub: str = flag("", "user/name on the Hugging Face hub to upload final_checkpoint/ to at the end")
    hub_private: bool = flag(True, "a repository that push_to_hub makes is private")

    # ---- how it is prepared
    trust_remote_code: bool = flag(False, "run code that comes with the base model")
    cache_dir: str = flag(
        "", "where tokenized datasets are kept, built once per content and memory-mapped", if_unset=CACHE_DIR
    )
    num_proc: int | None = flag(None, "processes that tokenize", from_to(1, 1024), if_unset="one per core, no more than 8")
    check: bool = flag(
        False, "read everything, show one example per task and what would train, then stop; nothing is written"
    )

    @property
    def bits(self) -> int:
        """In how many bits the frozen base is held; 0 where it is not quantized."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else 0

    @property
    def task_names(self) -> list[str]:
        """The names of --tasks: "sid_sid, item" -> ["sid_sid", "item"]; those of the mode where it is left out."""
        if self.tasks is None:
            return list(FREEZE_TASKS if self.freeze_LLM else DEFAULT_TASKS)
        return [name.strip() for name in self.tasks.split(",") if name.strip()]

    @property
    def allowed_changes(self) -> list[str]:
        """The names of --allow_changed: "seed, train_file" -> ["seed", "train_file"]."""
        return [name.strip() for name in self.allow_changed.split(",") if name.strip()]

    @property
    def input_files(self) -> dict[str, Path]:
        """Flag -> path of every file that the run reads; parts.py has the files of one that is several."""
        return {
            name: Path(path) for name, about in flags_of(self).items() if about.is_file and (path := getattr(self, name))
        }


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags:
    """The flags of evaluate.py."""

    base_model: str = same_flag(
        TrainFlags, "base_model", "folder or hub name of a trained model, e.g. the final_checkpoint/ of sft.py"
    )
    test_file: str = flag("", "interactions to evaluate on, like train_file", is_file=True, several=True)
    sid_index_path: str = same_flag(
        TrainFlags,
        "sid_index_path",
        "the .index.json, item id -> SID tokens, that the model was trained with",
    )
    item_meta_path: str = same_flag(
        TrainFlags,
        "item_meta_path",
        "the .item.json with titles, for recommendations in words and for the task title_sid",
    )
    train_file: str = same_flag(
        TrainFlags, "train_file", "what was trained on, for the baselines and for how popular an item is"
    )
    output_dir: str = same_flag(
        TrainFlags,
        "output_dir",
        "where metrics.json, predictions.jsonl and recommendations.png go",
        if_unset="evaluation/ in base_model",
    )
    num_beams: int = flag(50, "recommendations per row; HR@K is measured for K up to it", at_least(1))
    batch_size: int = flag(32, "rows per forward pass of one process", at_least(1))
    sample: int = same_flag(TrainFlags, "sample", "random rows to evaluate on")
    seed: int = same_flag(TrainFlags, "seed", "decides the sample, the examples and the bootstrap")
    examples: int = flag(0, "rows to show in words: history, truth, recommendations", at_least(0))
    recommend: str = flag("", "a history, titles, item ids or SIDs, oldest first, separated by |; answers and stops")
    recommend_file: str = flag(
        "",
        "CSV, Parquet or JSON lines with a history a row: column history, or those of an interaction CSV; answers and stops",
        is_file=True,
    )
    recommendations_file: str = flag(
        "",
        "where the answers to recommend_file go: .csv, .parquet or .jsonl",
        if_unset=f"{ANSWERS_FILE} in output_dir",
    )
    exclude_history: bool = flag(False, "with recommend and recommend_file: leave out the SIDs that the history has")
    export_serving: str = flag(
        "", "a new folder for an inference server: model, catalogue, trie, logits processors; writes it and stops"
    )
    task: str = flag(
        "",
        "what is asked of the model, after a history of SIDs or of titles",
        choices=RECOMMENDING_TASKS,
        if_unset="the first that the model was trained on",
    )
    category: str = same_flag(TrainFlags, "category", "words for the prompts of a checkpoint that has no prompts.json")
    cutoff_len: int = same_flag(
        TrainFlags, "cutoff_len", "tokens of the longest example, as in training; longer ones lose their oldest items"
    )
    max_left_out: float = same_flag(
        TrainFlags, "max_left_out", "share of a file's rows that may be left out before the evaluation stops; 1 allows any"
    )
    trust_remote_code: bool = same_flag(TrainFlags, "trust_remote_code", "run code that comes with the model")


# ---------------------------------------------------------------------------------------------- what follows from flags


def with_defaults(flags: TrainFlags) -> TrainFlags:
    """The flags with what others imply where it is not given: epochs, decay, and of adapters alpha (2 x rank) and rate."""
    if flags.num_epochs is None:
        flags = dataclasses.replace(flags, num_epochs=FREEZE_EPOCHS if flags.freeze_LLM else EPOCHS)
    if flags.weight_decay is None:
        flags = dataclasses.replace(flags, weight_decay=FREEZE_DECAY if flags.freeze_LLM else 0.0)
    if not flags.lora_rank:
        return flags
    return dataclasses.replace(
        flags,
        lora_alpha=flags.lora_alpha or 2 * flags.lora_rank,
        lora_learning_rate=flags.lora_learning_rate or ADAPTER_LEARNING_RATE,
    )


class Intervals(NamedTuple):
    """Steps between two evaluations and between two checkpoints; below 1 a share of the run."""

    evaluating: float
    saving: float


def intervals(flags: TrainFlags) -> Intervals:
    """Evaluating and saving go together: where one of the two is named, the other follows it (if there is evaluation)."""
    named = [steps for steps in (flags.eval_steps, flags.save_steps) if steps is not None and flags.eval_file]
    follows = named[0] if named else STEPS_SHARE
    evaluating = follows if flags.eval_steps is None else flags.eval_steps
    saving = follows if flags.save_steps is None else flags.save_steps
    return Intervals(evaluating, saving)


def results_folder(flags: EvaluateFlags) -> Path:
    """Where evaluate.py writes: --output_dir, or evaluation/ in a local model's folder, or evaluation/ here."""
    if flags.output_dir:
        return Path(flags.output_dir)
    return Path(flags.base_model if os.path.isdir(flags.base_model) else "") / "evaluation"


def answers_path(flags: EvaluateFlags) -> Path:
    """Where the answers to --recommend_file go."""
    return Path(flags.recommendations_file) if flags.recommendations_file else results_folder(flags) / ANSWERS_FILE


def examples_per_step(flags: TrainFlags) -> int:
    """--batch_size, or the first multiple of micro_batch_size x processes from 128 on: 4 x 3 gives 132."""
    if flags.batch_size is not None:
        return flags.batch_size
    share = flags.micro_batch_size * world_size()
    return math.ceil(BATCH_SIZE / share) * share
