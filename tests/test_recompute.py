"""--gradient_checkpointing: what is computed again in the backward is what was computed before, and is not kept."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from architectures import SIDS, TOKENS, toy_examples
from families import small_family
from torch import Tensor

import sft
from sid_sft.forward.frozen_prefix import FrozenPrefix
from sid_sft.forward.plain import PlainForward
from sid_sft.forward.recompute import compute_again_in_backward


def trained(mode: str, *, again: bool, family: str) -> tuple[list[float], list[Tensor], int]:
    """The losses of some micro-batches, the gradients of all that trains, and the bytes kept for the backward at most."""
    model = small_family(family, TOKENS + SIDS)
    ids = list(range(TOKENS, TOKENS + SIDS))
    rows = None if mode == "full" else sft.freeze_llm(model, ids, [f"<{i}>" for i in ids])
    if again:
        compute_again_in_backward(model)
    examples = toy_examples()
    if mode == "frozen prefix":
        forward = FrozenPrefix(model, rows, examples, 8, cache_bytes=10**6)
    else:
        forward = PlainForward(model, examples, 8)
    model.train(rows is None)
    losses, kept = [], 0
    for part in forward.cut(np.arange(0, 96, 3)):
        sizes: list[int] = []

        def note(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = forward.nll(part.indices).sum()
        kept = max(kept, sum(sizes))
        loss.backward()
        losses.append(float(loss.detach()))
    if rows is not None:
        rows.collect_gradients()
    weights = rows.masters if rows is not None else model.parameters()
    return losses, [weight.grad for weight in weights if weight.grad is not None], kept


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma2", "mixtral"])
@pytest.mark.parametrize("mode", ["full", "plain in freeze mode", "frozen prefix"])
def test_loss_and_gradients_are_the_same_and_less_is_kept(mode, family):
    losses, gradients, kept = trained(mode, again=False, family=family)
    losses_again, gradients_again, kept_again = trained(mode, again=True, family=family)
    assert losses_again == losses
    assert all(map(math.isfinite, losses))
    assert gradients
    assert all(map(torch.equal, gradients, gradients_again))
    assert kept_again < kept / 2
