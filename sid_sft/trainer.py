"""The HF Trainer, with one of its batches being one optimizer step.

A step is the same set of examples on one process and on many. It is cut into micro-batches by task and length, which are
dealt to the processes by cost; the loss is the mean over the step's supervised tokens on all processes, and gradients
are summed over processes once, at the end of the step. In freeze mode only the gradients of SID rows and adapters exist
and travel. A model that is sharded and trains whole has its gradients summed in each micro-batch, so that no process ever
holds all of them.
"""

from __future__ import annotations

import logging
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer
from transformers.trainer_utils import align_special_tokens

from sid_sft.adapters import ADAPTER_FOLDER, Adapters
from sid_sft.faults import fitted
from sid_sft.files import FaultHere, InputError, follow_umask
from sid_sft.forward.choose import Forward, agreed, choose_forward
from sid_sft.forward.examples import Examples
from sid_sft.forward.frozen_prefix import FrozenPrefix
from sid_sft.log_lines import LogLines, readable
from sid_sft.private_doors import ResumesFromOwnFiles, closed_doors, installed
from sid_sft.run_keeper import RunEnded, RunKeeper
from sid_sft.running_sums import RunningSums, summed
from sid_sft.sharding import even, is_sharded, keep_moments_apart, load_weights, local, save_shard, whole
from sid_sft.sid_rows import ROWS_FILE, SidRowAdamW, SidRows
from sid_sft.steps import StepSampler, deal
from sid_sft.tasks import TASKS

if TYPE_CHECKING:
    from sid_sft.interruption import StopSignals
    from sid_sft.recommend.evaluator import Evaluator
    from sid_sft.resuming import Resumed

logger = logging.getLogger("sft.trainer")

Result = TypeVar("Result")

SCHEDULES_OF_METRICS = ("reduce_lr_on_plateau", "greedy")
NEVER = torch.iinfo(torch.int64).max  # no step of any run


class PutOff(Exception):
    """A signal has stopped an evaluation; whoever resumes the run makes up for it first."""


class SidTrainer(ResumesFromOwnFiles, Trainer):
    """Trains the whole model, which may be sharded, or with `rows` the SID rows alone, and with `adapters` those too.

    The Trainer clips the gradients of the model, saves it and loads it; the rows' masters are no parameters of the model,
    so here they are clipped, saved and loaded. What the Trainer is relied on for is checked before the first step.
    """

    def __init__(
        self,
        *,
        rows: SidRows | None,
        adapters: Adapters | None,
        base_hash: str,
        micro_batch_size: int,
        auto_micro_batch: bool,
        group_by_length: bool,
        group_users: bool,
        frozen_prefix: bool,
        cache_bytes: int,
        cache_place: str | Path,
        signals: StopSignals,
        resumed: Resumed | None,
        decides: dict[str, Any],
        patience: int,
        evaluator: Evaluator | None = None,
        **settings,
    ) -> None:
        super().__init__(**settings)
        self.rows, self.base_hash, self.micro_batch_size = rows, base_hash, micro_batch_size
        self.adapters, self.beside = adapters, adapters.parameters if adapters else []
        self.auto_micro_batch = auto_micro_batch
        self.sharded = is_sharded(self.model)
        self.own_files = self.sharded or rows is not None  # whether checkpoints hold other files than the Trainer's
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.log_lines = LogLines()
        self.add_callback(self.log_lines)
        self.keeper = RunKeeper(self, signals, patience=patience, resumed=resumed, decides=decides)
        self.add_callback(self.keeper)
        examples = Examples(self.train_dataset)
        self.sampler = StepSampler(
            examples,
            self.args.train_batch_size * self.args.world_size,
            self.args.seed,
            group_by_length=group_by_length,
            group_users=group_users,
        )
        self.forward = self.eval_forward = None

        def choose() -> Forward:
            return choose_forward(
                self.model,
                rows,
                examples,
                self.micro_batch_size,
                adapters=self.beside,
                frozen_prefix=frozen_prefix,
                cache_bytes=cache_bytes,
                cache_place=cache_place,
                group_users=group_users,
            )

        self.forward = self.fitting(choose, "when a forward was tried")
        if self.eval_dataset is not None:
            self.eval_forward = self.forward.for_evaluation(Examples(self.eval_dataset))
        # A step's gradients are summed here, once. A model that is prepared as if for evaluation gets no wrapper that would
        # sum them every backward, and is not prepared a second time.
        self.accelerator.prepare_model(self.model, evaluation_mode=True)
        self.evaluator = evaluator
        self.max_norm = self.args.max_grad_norm if self.args.max_grad_norm > 0 else math.inf
        self.grad_norm = torch.zeros(())
        self.bad_step = torch.tensor(NEVER, device=self.args.device)  # the first whose loss is not finite, here
        self.signals = signals
        self.evaluation_is_due = False  # at the step reached, because a signal stopped it
        self.loaded = self.first_step_checked = False
        self.sums = RunningSums(self.args.device)
        if resumed:
            self.sums.load(resumed.log, first=self.args.process_index == 0)

    # ---- one step

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(range(len(self.train_dataset)), batch_sampler=self.sampler, collate_fn=np.array)

    def training_step(self, model: PreTrainedModel, inputs: np.ndarray, num_items_in_batch=None) -> Tensor:
        """Forward and backward of all of this process's micro-batches of a step; `inputs` are the step's examples.

        Returns the loss times the number of processes over which the Trainer averages what it logs.
        """
        started = time.monotonic()
        self.model.train(self.rows is None)
        labels = int(self.forward.examples.labels[inputs].sum())
        by_task, total = self.fitting_gradients(inputs, labels)
        step = self.state.global_step + 1
        self.bad_step = torch.where(total.isfinite(), self.bad_step, self.bad_step.clamp(max=step))
        self.sum_gradients()
        if self.rows is not None:
            self.grad_norm = torch.nn.utils.clip_grad_norm_(self.trained(), self.max_norm)
        self.sums.add(
            by_task,
            self.labels_per_task(inputs),
            loss=total / labels,
            tokens=int(self.forward.examples.length[inputs].sum()),
            seconds=time.monotonic() - started,
        )
        return total / labels * self.args.world_size

    def fitting(self, compute: Callable[[], Result], where: str) -> Result:
        """What `compute` gives, in micro-batches for which memory suffices: smaller ones are tried where it does not.

        The run goes on with them if it may (--auto_micro_batch), and otherwise ends with the size that it needs.
        """
        if self.sharded:  # a step is one of all processes, and those that have the memory wait in it for the others
            return compute()
        before, everywhere = self.micro_batch_size, agreed if self.auto_micro_batch else None
        found, size = fitted(compute, before, self.resize, agreed=everywhere)
        if size < before:
            short = f"out of memory {where} with --micro_batch_size {before}"
            if not self.auto_micro_batch:
                raise FaultHere(f"{short}; {size} fits there (--auto_micro_batch True finds it by itself)")
            logger.info(f"{short}: that was computed again, and the run goes on, with {size}")
        return found

    def resize(self, micro_batch_size: int) -> None:
        """Cuts steps and evaluations into micro-batches of another size from now on."""
        self.micro_batch_size = micro_batch_size
        for forward in (self.forward, self.eval_forward):
            if forward is not None:
                forward.resize(micro_batch_size)

    def fitting_gradients(self, inputs: np.ndarray, labels: int) -> tuple[Tensor, Tensor]:
        """`gradients` of a step, with the same dropout in each attempt."""
        random = torch.get_rng_state()
        on_device = torch.cuda.get_rng_state() if self.args.device.type == "cuda" else None

        def compute() -> tuple[Tensor, Tensor]:
            torch.set_rng_state(random)
            if on_device is not None:
                torch.cuda.set_rng_state(on_device)
            return self.gradients(inputs, labels)

        return self.fitting(compute, f"in step {self.state.global_step + 1}")

    def gradients(self, inputs: np.ndarray, labels: int) -> tuple[Tensor, Tensor]:
        """Forward and backward of this process's micro-batches of a step; -log p per task (len(TASKS),), and of all."""
        own = [weight for _, weight, _ in self.rows.tables] if self.rows is not None else []
        for parameter in [*self.trained(), *own]:  # the Trainer clears neither masters nor what a failed attempt left
            parameter.grad = None
        of_tasks = torch.zeros(len(TASKS), dtype=torch.float64, device=self.args.device)
        total = torch.zeros((), device=self.args.device)
        for part, counts in self.share(self.forward, inputs):
            if not (counts or self.sharded):
                continue
            with self.accelerator.autocast():
                nll = self.forward.nll(part) * counts
            (nll.sum() / labels).backward()
            of_tasks += nll.detach()
            total += nll.detach().sum()
        return of_tasks, total

    def share(self, forward: Forward, indices: np.ndarray) -> list[tuple[np.ndarray, bool]]:
        """This process's micro-batches of the examples, with True, and as many more as `even` has it, with False."""
        parts = even(deal(forward.cut(indices, self.args.world_size), self.args.world_size), self.args.process_index)
        if self.sharded and isinstance(forward, FrozenPrefix):
            forward.expect([part for part, _ in parts])
        return parts

    def trained(self) -> list[torch.nn.Parameter]:
        """The parameters that the optimizer steps."""
        if self.rows is not None:
            return [*self.rows.masters, *self.beside]
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
        if self.sharded and self.rows is None:
            return  # summed in each micro-batch
        for work in [dist.all_reduce(parameter.grad, async_op=True) for parameter in self.trained()]:
            work.wait()

    def create_optimizer(self, model: PreTrainedModel | None = None) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return self.optimizer
        if self.rows is None:
            super().create_optimizer(model)
            if self.sharded:
                keep_moments_apart(self.optimizer, self.model, self.keeper.folder)
        else:
            args = self.args
            self.optimizer = SidRowAdamW(
                self.rows,
                adapters=self.beside,
                adapter_lr=self.adapters.learning_rate if self.adapters else 0.0,
                lr=args.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                weight_decay=args.weight_decay,
            )
        self.fresh_groups = [(group["lr"], group["weight_decay"]) for group in self.optimizer.param_groups]
        self.optimizer.register_step_pre_hook(self.check_first_step)
        return self.optimizer

    def check_first_step(self, *_) -> None:
        """Stops before the first step where the Trainer has not done what it is relied on for."""
        if self.first_step_checked:
            return
        self.first_step_checked = True
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in self.trained() if p.grad is not None]))
        fault = ""
        if norm > self.max_norm * 1.01:  # a little above is rounding
            fault = "the gradients are not clipped"
        elif isinstance(self.model_wrapped, DistributedDataParallel):
            fault = "the model is in a wrapper that sums gradients at every backward"
        elif self.keeper.folder and self.own_files and not self.loaded:
            fault = f"the {'weights' if self.rows is None else 'rows'} of the checkpoint are not loaded"
        if fault:
            raise InputError(f"with {installed()} {fault}; install the versions of requirements.txt")

    def floating_point_ops(self, inputs: np.ndarray) -> int:
        return 0  # the Trainer's estimate knows neither trees nor frozen prefixes; tokens per second are logged instead

    # ---- evaluation and log

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The mean loss over all supervised tokens of the evaluation data, the same on any number of processes."""
        started = time.monotonic()
        self.stop_unless_finite()
        self.model.eval()
        try:
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.measured().items()}
        except PutOff:
            self.evaluation_is_due = self.control.should_save = True
            return {str(self.args.metric_for_best_model): math.nan}  # better than no other evaluation
        self.evaluation_is_due = False
        metrics[f"{metric_key_prefix}_runtime_s"] = round(time.monotonic() - started, 2)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measured(self) -> dict[str, float]:
        """{"loss": 3.1, "hr@10": 0.12, "ndcg@10": 0.08}. PutOff where a signal stops it."""
        forward = self.eval_forward
        total = torch.zeros((), dtype=torch.float64, device=self.args.device)
        for part, counts in self.share(forward, np.arange(len(forward.examples))):
            self.put_off_if_asked()  # as often on every process
            if counts or self.sharded:
                with self.accelerator.autocast():
                    total += forward.nll(part).sum() * counts
        loss = float(summed(total)) / int(forward.examples.labels.sum())
        if not math.isfinite(loss):
            raise self.not_finite(f"the evaluation loss after step {self.state.global_step} is")
        if self.evaluator is None:
            return {"loss": loss}
        with self.accelerator.autocast():
            found = self.evaluator.metrics(self.model, before_batch=self.put_off_if_asked)
        return {"loss": loss, "hr@10": found["hr@10"], "ndcg@10": found["ndcg@10"]}

    def put_off_if_asked(self) -> None:
        """PutOff where the run shall stop, unless its schedule waits for what is being measured."""
        if self.signals.agreed() and self.args.lr_scheduler_type not in SCHEDULES_OF_METRICS:
            raise PutOff

    def labels_per_task(self, inputs: np.ndarray) -> Tensor:
        """Supervised tokens of a step by task, as this process's share of a sum over processes."""
        examples = self.forward.examples
        counts = np.bincount(examples.task[inputs], weights=examples.labels[inputs], minlength=len(TASKS))
        return torch.from_numpy(counts / self.args.world_size).to(self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the loss of each task since the last line and the gradient norm of the rows."""
        self.stop_unless_finite()
        if "loss" in logs:
            logs |= self.sums.line()
            if self.rows is not None:
                logs["grad_norm"] = self.grad_norm
        if "train_loss" in logs:  # of this call, which may have resumed a run
            logs["train_loss"] = self.sums.mean_loss()
        super().log({key: readable(value) for key, value in logs.items()}, start_time)

    def stop_unless_finite(self, *, weights: bool = False) -> None:
        """Refuses to go on after a loss that was no finite number; with `weights`, where a trained value is none.

        Every process must call, where it waits for the device anyway; what each one met is known to all afterwards.
        """
        bad = self.bad_step.clone()
        now = self.state.global_step
        if weights:
            finite = torch.stack([local(parameter).isfinite().all() for parameter in self.trained()]).all()
            bad = torch.where(finite, bad, bad.clamp(max=now + 1))  # the next loss would not be finite
        if self.args.world_size > 1:
            dist.all_reduce(bad, op=dist.ReduceOp.MIN)
        if (step := int(bad)) <= now:
            raise self.not_finite(f"the loss of step {step} is")
        if step < NEVER:
            raise self.not_finite(f"some weights after step {now} are")

    def not_finite(self, what: str) -> InputError:
        rate = self.args.learning_rate
        return InputError(f"{what} not finite (nan or infinite); try a lower --learning_rate than {rate:g}")

    def log_speed(self, started: float) -> None:
        """Logs tokens per second of training, peak memory of this process, and the time of the whole run."""
        if self.args.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        rate = self.sums.tokens / max(self.sums.seconds, 1e-9)
        logger.info(
            f"{self.sums.tokens:,} tokens at {rate:,.0f} tokens/s; peak memory {peak / 2**30:.2f} GiB per process; "
            f"{time.monotonic() - started:.0f} s in all"
        )
        if self.args.world_size > 1:
            sent = sum(parameter.numel() * parameter.element_size() for parameter in self.trained())
            logger.info(f"{sent:,} bytes of gradient summed over {self.args.world_size} processes per step")

    # ---- checkpoints: in freeze mode rows, optimizer, scheduler and position, megabytes in all

    def fit(self) -> None:
        """Trains from the start or from the checkpoint given; ends with the best of the checkpoints, if any is chosen.

        Interrupted where a signal stops the run, after it has saved.
        """
        keeper, folder = self.keeper, self.keeper.folder
        if folder and self.own_files and (closed := closed_doors("Trainer")):
            raise InputError(closed[0])
        if ended := keeper.take_ended_run():
            self.load_checkpoint_weights(folder)
            align_special_tokens(self.model, self.processing_class)  # with which the Trainer begins to train
        else:
            self.signals.wait = True
            try:
                self.train(resume_from_checkpoint=str(folder) if folder else None)
            except RunEnded:
                ended = True
            finally:
                self.log_lines.close()
            self.signals.wait = False
        if ended:
            self.log({"total_flos": self.state.total_flos, "train_loss": math.nan})  # as the Trainer ends its log
        best = self.state.best_model_checkpoint
        if best is not None and (ended or self.own_files):  # otherwise the Trainer has loaded it itself
            self.load_checkpoint_weights(Path(best))
        self.stop_unless_finite(weights=True)

    def save_model(self, output_dir: str | None = None, **settings) -> None:
        """Writes the weights of a checkpoint: in freeze mode rows and adapters alone; otherwise all of the model, or of a
        sharded one what each process holds."""
        self.stop_unless_finite(weights=True)
        if self.sharded and self.rows is None:
            save_shard(Path(output_dir or self.args.output_dir), self.model, self.optimizer)
        elif self.rows is None:
            super().save_model(output_dir, **settings)
            if self.args.should_save:
                follow_umask(Path(output_dir or self.args.output_dir))
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.rows.save(folder / ROWS_FILE, self.base_hash)
            if self.adapters:
                self.adapters.save(folder / ADAPTER_FOLDER)
                follow_umask(folder)

    def load_weights(self, folder: Path) -> bool:
        """Loads the rows and adapters of a checkpoint, or of a sharded model what each process holds; otherwise nothing, and
        says so."""
        if self.rows is not None:
            self.rows.load(folder / ROWS_FILE)
            if self.adapters:
                self.adapters.load(folder / ADAPTER_FOLDER)
        elif self.sharded:
            load_weights(folder, self.model)
        self.loaded = self.own_files
        return self.loaded
