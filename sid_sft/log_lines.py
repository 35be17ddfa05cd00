"""The lines and bars that a training run shows while it is at work."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import ProgressCallback, TrainerState

logger = logging.getLogger("sft.trainer")


class LogLines(ProgressCallback):
    """The Trainer's progress bars, with each entry of the log as one readable line."""

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            numbers = ", ".join(f"{name} {readable(value, 4)}" for name, value in logs.items() if name != "epoch")
            with logging_redirect_tqdm([logging.getLogger()]):
                logger.info(f"step {state.global_step} of {state.max_steps}, epoch {state.epoch:.2f}: {numbers}")

    def close(self) -> None:
        """Ends the bars of a run that ends before its last step, so that nothing is drawn after its last line."""
        for bar in (self.training_bar, self.prediction_bar):
            if bar is not None:
                bar.close()


def readable(value: float, digits: int = 7) -> float:
    """A number with the digits that a log needs: seven to compare runs, four to read."""
    if isinstance(value, Tensor):
        value = value.item()
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
