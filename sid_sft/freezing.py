"""What freeze mode changes beside the rows that train: dropout, the learning rate, and what the log says of them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from sid_sft.settings import FREEZE_DECAY, FREEZE_EPOCHS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sid_sft.adapters import Adapters
    from sid_sft.settings import TrainFlags
    from sid_sft.sid_rows import SidRows

logger = logging.getLogger("sft.freezing")

FREEZE_REACH = 2.4  # freeze mode's default learning rate x width: an AdamW step moves each number of a row by about the
# rate, and so a logit, a sum over the width, by about rate x width; the best of those tried at widths 256 and 576


def tell_defaults(flags: TrainFlags) -> None:
    """Logs what freeze mode chooses where no flag does, and why; its learning rate is told when there is a model."""
    if flags.tasks is None:
        logger.info("Freeze mode trains on SID histories alone unless --tasks names more: that has recommended best so far")
    if flags.num_epochs is None and flags.max_steps < 0:
        logger.info(
            f"{FREEZE_EPOCHS:g} epochs unless --num_epochs says otherwise: twice as many found 3 % more hits with a model "
            "of 7 M parameters, and none more with one of 135 M"
        )
    if flags.weight_decay is None:
        logger.info(
            f"Weight decay {FREEZE_DECAY:g}: a step shrinks what trains by learning rate x {FREEZE_DECAY:g} of itself, so "
            "that what few examples tell is not learnt by heart"
        )


def tell_what_trains(model: PreTrainedModel, rows: SidRows | None, adapters: Adapters | None = None) -> None:
    """Logs how many numbers train: the SID rows of each table and adapters, or all parameters where rows is None."""
    total = model.num_parameters()
    if rows is None:
        logger.info(f"Trainable parameters: {total:,} / {total:,} (100%)")
        return
    count, low, high = len(rows.ids), int(rows.ids[0]), int(rows.ids[-1])
    logger.info(f"Unfrozen {count} new token embeddings (indices {low} to {high})")
    if len(rows.tables) > 1:
        logger.info(f"Unfrozen {count} output-head rows (indices {low} to {high}): the head is not tied")
    numbers = rows.numbers + (adapters.numbers if adapters else 0)
    logger.info(f"Trainable parameters (with grad-mask): {numbers:,} / {total:,} ({100 * numbers / total:.4f}%)")
    if adapters:
        logger.info(
            f"Of these {rows.numbers:,} in SID rows and {adapters.numbers:,} in LoRA adapters of {adapters.layers} layers "
            f"(rank {adapters.rank}, alpha {adapters.alpha})"
        )
    tables, width = len(rows.tables), rows.masters[0].shape[1]
    trained = [*rows.masters, *(adapters.parameters if adapters else [])]
    state_mb = 3 * sum(parameter.numel() * parameter.element_size() for parameter in trained) / 1e6
    logger.info(
        f"{'SID rows:' if adapters else 'That is'} {count} rows x {width} wide x {tables} table{'s' * (tables > 1)}; "
        f"the optimizer holds {state_mb:.1f} MB (master copy and two moments)"
    )


def rows_learning_rate(model: PreTrainedModel) -> float:
    """Freeze mode's default learning rate, from the width of the embedding."""
    width = model.get_input_embeddings().weight.shape[1]
    rate = float(f"{FREEZE_REACH / width:.2g}")
    logger.info(f"Learning rate {rate:g}: {FREEZE_REACH:g} over the model's width ({width})")
    return rate


def turn_dropout_off(model: PreTrainedModel) -> int:
    """Sets every dropout probability of the model to 0 and returns how many were not."""
    from torch import nn

    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    count = 0
    for module in model.modules():
        if isinstance(module, kinds) and module.p > 0:
            module.p, count = 0.0, count + 1
        elif isinstance(value := getattr(module, "attention_dropout", 0.0), float) and value > 0:
            module.attention_dropout, count = 0.0, count + 1
    if count:
        logger.info(f"Dropout of {count} frozen modules is off: it has no purpose where nothing can overfit")
    return count
