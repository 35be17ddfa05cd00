"""The HF Trainer, with one of its batches being one optimizer step.

A step is the same set of examples on one process and on many. It is cut into micro-batches by task and length, which are
dealt to the processes by cost; the loss is the mean over the step's supervised tokens on all processes, and gradients
are summed over processes once, at the end of the step. In freeze mode only the SID rows' gradients exist and travel.
"""

from __future__ import annotations

import logging
import math
import resource
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer

from sid_sft.files import InputError
from sid_sft.forward.choose import Forward, choose_forward
from sid_sft.forward.examples import Examples
from sid_sft.recommend.evaluator import Evaluator
from sid_sft.sid_rows import ROWS_FILE, SidRowAdamW, SidRows
from sid_sft.steps import StepLoader, StepSampler, deal
from sid_sft.tasks import TASKS

logger = logging.getLogger("sft.trainer")


class LogLines(ProgressCallback):
    """The Trainer's progress bars, with each entry of the log as one readable line."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            numbers = ", ".join(f"{name} {readable(value, 4)}" for name, value in logs.items() if name != "epoch")
            with logging_redirect_tqdm([logging.getLogger()]):
                logger.info(f"step {state.global_step} of {state.max_steps}, epoch {state.epoch:.2f}: {numbers}")


class SidTrainer(Trainer):
    """Trains the whole model, or with `rows` the SID rows alone."""

    def __init__(
        self,
        *,
        rows: SidRows | None,
        base_hash: str,
        micro_batch_size: int,
        group_by_length: bool,
        group_users: bool,
        frozen_prefix: bool,
        cache_bytes: int,
        cache_place: str | Path,
        evaluator: Evaluator | None = None,
        **settings,
    ) -> None:
        super().__init__(**settings)
        self.rows, self.base_hash, self.micro_batch_size = rows, base_hash, micro_batch_size
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.add_callback(LogLines())
        # A step's gradients are summed here, once; the wrapper that would sum them every backward is not wanted.
        prepare_model = self.accelerator.prepare_model
        self.accelerator.prepare_model = lambda model, **options: prepare_model(
            model, **{**options, "evaluation_mode": True}
        )
        examples = Examples(self.train_dataset)
        self.sampler = StepSampler(
            examples,
            self.args.train_batch_size * self.args.world_size,
            self.args.seed,
            group_by_length=group_by_length,
            group_users=group_users,
        )
        self.forward = choose_forward(
            self.model,
            rows,
            examples,
            micro_batch_size,
            frozen_prefix=frozen_prefix,
            cache_bytes=cache_bytes,
            cache_place=cache_place,
            group_users=group_users,
        )
        self.eval_forward = None
        if self.eval_dataset is not None:
            self.eval_forward = self.forward.for_evaluation(Examples(self.eval_dataset))
        self.evaluator = evaluator
        self.reset_task_sums()
        self.tokens_seen, self.train_s = 0, 0.0
        self.logged_tokens, self.logged_train_s = 0, 0.0

    # ---- one step

    def get_train_dataloader(self) -> DataLoader:
        return StepLoader(range(len(self.train_dataset)), batch_sampler=self.sampler, collate_fn=np.array)

    def training_step(self, model: PreTrainedModel, inputs: np.ndarray, num_items_in_batch=None) -> Tensor:
        """Forward and backward of all of this process's micro-batches of a step; `inputs` are the step's examples.

        Returns the loss times the number of processes over which the Trainer averages what it logs.
        """
        started = time.monotonic()
        self.model.train(self.rows is None)
        for parameter in self.trained():  # the Trainer clears the model's own gradients only
            parameter.grad = None
        labels = int(self.forward.examples.labels[inputs].sum())
        total = torch.zeros((), device=self.args.device)
        for part in self.own_share(self.forward, inputs):
            with self.accelerator.autocast():
                nll = self.forward.nll(part)
            (nll.sum() / labels).backward()
            self.task_sums[:, 0] += nll.detach()
            total += nll.detach().sum()
        self.sum_gradients()
        self.task_sums[:, 1] += self.labels_per_task(inputs)
        self.tokens_seen += int(self.forward.examples.length[inputs].sum())
        self.train_s += time.monotonic() - started
        return total / labels * self.args.world_size

    def own_share(self, forward: Forward, indices: np.ndarray) -> list[np.ndarray]:
        """This process's micro-batches of the examples."""
        return deal(forward.cut(indices, self.args.world_size), self.args.world_size)[self.args.process_index]

    def trained(self) -> list[torch.nn.Parameter]:
        """The parameters that the optimizer steps."""
        if self.rows is not None:
            return self.rows.masters
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def sum_gradients(self) -> None:
        """Adds the gradients over all processes; a parameter that one process did not touch has none there."""
        if self.rows is not None:
            self.rows.collect_gradients()
        if self.args.world_size == 1:
            return
        for parameter in self.trained():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for work in [dist.all_reduce(parameter.grad, async_op=True) for parameter in self.trained()]:
            work.wait()

    def _clip_grad_norm(self, model: PreTrainedModel) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(self.trained(), self.args.max_grad_norm)

    def _get_grad_norm(self, model: PreTrainedModel, grad_norm: Tensor | None = None) -> Tensor:
        return grad_norm if grad_norm is not None else torch.nn.utils.get_total_norm([p.grad for p in self.trained()])

    def create_optimizer(self, model: PreTrainedModel | None = None) -> torch.optim.Optimizer:
        if self.rows is None:
            return super().create_optimizer(model)
        if self.optimizer is None:
            args = self.args
            self.optimizer = SidRowAdamW(
                self.rows,
                lr=args.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                weight_decay=args.weight_decay,
            )
        return self.optimizer

    def floating_point_ops(self, inputs: np.ndarray) -> int:
        return 0  # the Trainer's estimate knows neither trees nor frozen prefixes; tokens per second are logged instead

    # ---- evaluation and log

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The mean loss over all supervised tokens of the evaluation data, the same on any number of processes."""
        started = time.monotonic()
        self.model.eval()
        forward = self.eval_forward
        indices = np.arange(len(forward.examples))
        total = torch.zeros((), dtype=torch.float64, device=self.args.device)
        for part in self.own_share(forward, indices):
            with self.accelerator.autocast():
                total += forward.nll(part).sum()
        if self.args.world_size > 1:
            dist.all_reduce(total)
        metrics = {f"{metric_key_prefix}_loss": float(total) / int(forward.examples.labels.sum())}
        if self.evaluator is not None:
            with self.accelerator.autocast():
                found = self.evaluator.metrics(self.model)
            metrics |= {f"{metric_key_prefix}_{name}": found[name] for name in ("hr@10", "ndcg@10")}
        metrics[f"{metric_key_prefix}_runtime_s"] = round(time.monotonic() - started, 2)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def reset_task_sums(self) -> None:
        self.task_sums = torch.zeros(len(TASKS), 2, dtype=torch.float64, device=self.args.device)

    def labels_per_task(self, inputs: np.ndarray) -> Tensor:
        """Supervised tokens of a step by task, as this process's share of a sum over processes."""
        examples = self.forward.examples
        counts = np.bincount(examples.task[inputs], weights=examples.labels[inputs], minlength=len(TASKS))
        return torch.from_numpy(counts / self.args.world_size).to(self.task_sums)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the loss of each task since the last line; refuses to train on when the loss is no number."""
        if "loss" in logs:
            if self.args.world_size > 1:
                dist.all_reduce(self.task_sums)
            for name, (loss, labels) in zip(TASKS, self.task_sums.tolist(), strict=True):
                if labels:
                    logs[f"loss_{name}"] = loss / labels
            self.reset_task_sums()
            tokens, seconds = self.tokens_seen - self.logged_tokens, self.train_s - self.logged_train_s
            logs["tokens_per_s"] = tokens / max(seconds, 1e-9)
            self.logged_tokens, self.logged_train_s = self.tokens_seen, self.train_s
            if not math.isfinite(logs["loss"]):
                raise InputError(f"the loss is {logs['loss']} at step {self.state.global_step}; try a lower --learning_rate")
        super().log({key: readable(value) for key, value in logs.items()}, start_time)

    def log_speed(self, started: float) -> None:
        """Logs tokens per second of training, peak memory of this process, and the time of the whole run."""
        if self.args.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        rate = self.tokens_seen / max(self.train_s, 1e-9)
        logger.info(
            f"{self.tokens_seen:,} tokens at {rate:,.0f} tokens/s; peak memory {peak / 2**30:.2f} GiB per process; "
            f"{time.monotonic() - started:.0f} s in all"
        )
        if self.args.world_size > 1:
            sent = sum(parameter.numel() * parameter.element_size() for parameter in self.trained())
            logger.info(f"{sent:,} bytes of gradient summed over {self.args.world_size} processes per step")

    # ---- checkpoints: in freeze mode rows, optimizer, scheduler and position, megabytes in all

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.rows is None:
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.rows.save(folder / ROWS_FILE, self.base_hash)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        if self.rows is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.rows.load(Path(resume_from_checkpoint) / ROWS_FILE)

    def _load_best_model(self) -> None:
        if self.rows is None:
            super()._load_best_model()
        else:
            self.rows.load(Path(self.state.best_model_checkpoint) / ROWS_FILE)


def readable(value: float, digits: int = 7) -> float:
    """A number with the digits that a log needs: seven to compare runs, four to read."""
    if isinstance(value, Tensor):
        value = value.item()
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
