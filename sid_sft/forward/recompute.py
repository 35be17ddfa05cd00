"""Activations that are computed again in the backward instead of being kept (--gradient_checkpointing True).

transformers does this for a model in training mode alone; a frozen model is in evaluation mode, so it is done here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sid_sft.forward.architecture import blocks_of


def compute_again_in_backward(model: PreTrainedModel) -> None:
    """Keeps of each layer's forward only what goes in; the rest is computed a second time when the backward needs it.

    The same loss and gradients, dropout included. A PieceCache is read alike both times: its past stays as it is.
    """
    for block in blocks_of(model):
        block.forward = twice(block.forward)


def twice(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)  # some models look at what a layer takes
    def call(*args: Any, **settings: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **settings)
        return checkpoint(forward, *args, use_reentrant=False, **settings)

    return call
