"""Keeps a run that is stopped, resumed or killed on its way: what the HF Trainer does not see to.

The Trainer calls the RunKeeper when training begins, after each step, each evaluation and each checkpoint.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sid_sft.output_folder import STATE_FILE
from sid_sft.resuming import Resumed, write_record

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from sid_sft.interruption import StopSignals
    from sid_sft.running_sums import RunningSums
    from sid_sft.steps import StepSampler

logger = logging.getLogger("sft.run_keeper")


class KeptTrainer(Protocol):
    """What the RunKeeper needs of a trainer. fresh_groups: (learning rate, weight decay) of each group of parameters as the
    flags have them, before a checkpoint is loaded."""

    args: TrainingArguments
    state: TrainerState
    sampler: StepSampler
    sums: RunningSums
    evaluation_is_due: bool
    optimizer: Optimizer
    lr_scheduler: LRScheduler
    fresh_groups: list[tuple[float, float]]

    def evaluate(self) -> dict[str, float]: ...


class RunEnded(Exception):
    """The evaluation that a resumed run had to make up for was its last act."""


class RunKeeper(TrainerCallback):
    """signals: what may ask the run to stop; patience: evaluations without a better one before it stops, 0 for never;
    resumed: what it goes on from; decides: what its checkpoints record of the run."""

    def __init__(
        self,
        trainer: KeptTrainer,
        signals: StopSignals,
        *,
        patience: int,
        resumed: Resumed | None,
        decides: dict[str, Any],
    ) -> None:
        self.trainer, self.signals, self.patience, self.resumed, self.decides = trainer, signals, patience, resumed, decides

    @property
    def folder(self) -> Path | None:
        """The checkpoint that the run goes on from."""
        return self.resumed.folder if self.resumed else None

    # ---- called by the Trainer

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.sampler.set_epoch(state.global_step // len(self.trainer.sampler))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.signals.agreed():
            control.should_save = True  # and on_save stops the run

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.has_stalled(state):
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Makes the checkpoint that was just written a whole one."""
        log = self.trainer.sums.state() | {"evaluation_is_due": self.trainer.evaluation_is_due}
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if args.should_save:
            write_record(folder, self.decides, log)
        if self.signals.agreed():
            if args.world_size > 1:
                dist.barrier()
            raise self.signals.interruption(
                f"after step {state.global_step}; --resume_from_checkpoint True goes on from {folder}"
            )

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.resumed is None:
            return
        state.compute_steps(args, state.max_steps)  # the Trainer goes on with the checkpoint's intervals
        self.find_best_checkpoint(state)
        if {"learning_rate", "lora_learning_rate", "weight_decay"} & set(self.resumed.changed):
            self.take_new_rates()
        if self.resumed.log["evaluation_is_due"]:
            metrics = self.trainer.evaluate()
            if self.trainer.evaluation_is_due:
                raise self.signals.interruption(f"in the evaluation of step {state.global_step}, which stays due")
            self.take_if_best(state, metrics)
            if self.has_ended(state):
                raise RunEnded

    # ---- the end of a run

    def take_ended_run(self) -> bool:
        """Whether the checkpoint that is resumed is the end of its run; if so, the trainer gets its state."""
        if self.resumed is None or self.resumed.log["evaluation_is_due"]:
            return False
        state = TrainerState.load_from_json(str(self.resumed.folder / STATE_FILE))
        if not self.has_ended(state):
            return False
        self.trainer.state = state
        self.find_best_checkpoint(state)
        logger.info(f"Its run had ended after step {state.global_step}: nothing is left to train")
        return True

    def has_ended(self, state: TrainerState) -> bool:
        """Whether a run is at its last step, or stops early."""
        args = self.trainer.args
        steps = math.ceil(args.num_train_epochs * len(self.trainer.sampler))
        return state.global_step >= (args.max_steps if args.max_steps > 0 else steps) or self.has_stalled(state)

    def has_stalled(self, state: TrainerState) -> bool:
        """Whether the last `patience` evaluations were no better than the best before them."""
        key, args = self.trainer.args.metric_for_best_model, self.trainer.args
        values = [entry[key] if args.greater_is_better else -entry[key] for entry in state.log_history if key in entry]
        return bool(values) and 0 < self.patience <= len(values) - 1 - values.index(max(values))

    # ---- what a resumed run lacks

    def find_best_checkpoint(self, state: TrainerState) -> None:
        """Finds the best checkpoint so far beside the one that is resumed, where the run's folder has moved."""
        if self.folder and state.best_global_step and not Path(state.best_model_checkpoint or "").is_dir():
            best = self.folder.parent / f"checkpoint-{state.best_global_step}"
            state.best_model_checkpoint = str(best) if best.is_dir() else None
            if not best.is_dir():
                logger.info(f"{best}, the best so far, is gone: only what is better from here on, or the last, can be kept")

    def take_if_best(self, state: TrainerState, metrics: dict[str, float]) -> None:
        """What the Trainer does after an evaluation, for one that was due when the run was resumed."""
        value, best = metrics[str(self.trainer.args.metric_for_best_model)], state.best_metric
        if best is None or (value > best if self.trainer.args.greater_is_better else value < best):
            state.best_metric, state.best_global_step = value, state.global_step
            state.best_model_checkpoint = str(self.folder)

    def take_new_rates(self) -> None:
        """Gives the loaded optimizer and schedule the rate and weight decay of this run; the place on the curve stays."""
        groups, schedule = self.trainer.optimizer.param_groups, self.trainer.lr_scheduler
        for group, (rate, decay) in zip(groups, self.trainer.fresh_groups, strict=True):
            group["lr"] *= rate / group["initial_lr"]
            group["initial_lr"], group["weight_decay"] = rate, decay
        bases, last = [group["initial_lr"] for group in groups], [group["lr"] for group in groups]
        schedule.load_state_dict({**schedule.state_dict(), "base_lrs": bases, "_last_lr": last})
