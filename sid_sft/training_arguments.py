"""The flags as what the HF Trainer takes."""

from __future__ import annotations

import logging
import math
import os
from typing import TYPE_CHECKING

from sid_sft.command_line import world_size
from sid_sft.files import InputError, cut, error_text, shown
from sid_sft.settings import BATCH_SIZE, EPOCHS, TrainFlags, examples_per_step, intervals

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

logger = logging.getLogger("sft.training_arguments")

FULL_LEARNING_RATE = 3e-4
POLYNOMIAL_END = 1e-7  # the learning rate at which transformers' polynomial schedule ends


def training_arguments(flags: TrainFlags) -> TrainingArguments:
    """The flags as HF TrainingArguments. One batch of the Trainer is one optimizer step: the trainer cuts it itself."""
    import torch
    from transformers import TrainingArguments

    if flags.wandb_project:
        os.environ["WANDB_PROJECT"] = flags.wandb_project
    evaluate = bool(flags.eval_file)
    evaluating, saving = intervals(flags)
    batch_size = examples_per_step(flags)
    if flags.batch_size is None and batch_size != BATCH_SIZE:
        shares = f"micro_batch_size x processes = {flags.micro_batch_size} x {world_size()}"
        logger.info(f"--batch_size {batch_size}: the first multiple of {shares} from {BATCH_SIZE} on")
    try:
        return TrainingArguments(
            output_dir=flags.output_dir,
            num_train_epochs=flags.num_epochs or EPOCHS,
            max_steps=flags.max_steps,
            per_device_train_batch_size=batch_size // world_size(),
            learning_rate=flags.learning_rate or FULL_LEARNING_RATE,
            weight_decay=flags.weight_decay or 0.0,
            lr_scheduler_type=flags.lr_scheduler_type,
            warmup_steps=flags.warmup_steps,
            seed=flags.seed,
            bf16=use_bf16(flags) and not flags.freeze_LLM,
            use_cpu=not torch.accelerator.is_available(),
            logging_steps=flags.logging_steps,
            logging_nan_inf_filter=False,
            log_level_replica="error",  # as quiet_other_ranks has it; the default would have them warn
            eval_strategy="steps" if evaluate else "no",
            save_strategy="steps",
            eval_steps=whole(evaluating),
            save_steps=whole(saving),
            save_total_limit=2,
            load_best_model_at_end=evaluate,
            metric_for_best_model=flags.metric_for_best_model if evaluate else None,
            greater_is_better=flags.metric_for_best_model != "eval_loss" if evaluate else None,
            report_to=reports_to(flags),
            run_name=flags.wandb_run_name or None,
            remove_unused_columns=False,
            average_tokens_across_devices=False,
        )
    except (ValueError, KeyError) as error:
        raise InputError(error_text(error)) from None


def check_reports(flags: TrainFlags) -> None:
    """InputError where what --report_to names is unknown or not installed."""
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    name = reports_to(flags)
    try:
        for report in get_reporting_integration_callbacks(name):
            report()
    except Exception as error:  # other people's code
        raise InputError(f"--report_to {shown(name)}: {cut(error_text(error), 300)}") from None


def reports_to(flags: TrainFlags) -> str:
    return "wandb" if flags.wandb_project else flags.report_to


def check_schedule(args: TrainingArguments, examples: int) -> None:
    """InputError where transformers' polynomial schedule would divide by zero, or begin below its end."""
    if args.lr_scheduler_type != "polynomial":
        return
    epochs = args.num_train_epochs * math.ceil(examples / (args.per_device_train_batch_size * world_size()))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(epochs)
    if args.warmup_steps == steps:
        raise InputError(f"--warmup_steps {steps} is the whole run, and --lr_scheduler_type polynomial needs steps after it")
    if args.learning_rate <= POLYNOMIAL_END:
        raise InputError(f"--learning_rate {args.learning_rate:g} must be above {POLYNOMIAL_END:g}, where polynomial ends")


def whole(steps: float) -> float | int:
    """A count of steps as an int, a share of the run as it is."""
    return int(steps) if steps >= 1 else steps


def compute_dtype(flags: TrainFlags, base_dtype: torch.dtype) -> torch.dtype:
    """bfloat16 for a frozen model where bf16 is on; otherwise float32 (a model that trains whole keeps float32 weights)."""
    import torch

    if base_dtype == torch.float64:
        return base_dtype
    return torch.bfloat16 if flags.freeze_LLM and use_bf16(flags) else torch.float32


def use_bf16(flags: TrainFlags) -> bool:
    import torch

    return flags.bf16 if flags.bf16 is not None else torch.cuda.is_available() and torch.cuda.is_bf16_supported()
