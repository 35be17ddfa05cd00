"""An output head of which only the SID rows train: the loss over the whole vocabulary without a matrix of all logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sid_sft.forward.trees import to_device

LEAST_BLOCK = 512  # rows of the head per piece of logits


class FrozenHead(NamedTuple):
    """An output head whose rows are frozen but for the SID rows. weight (V, D); bias (V,) or None; ids (M,), ascending;
    finish: what the model does to its logits, element by element; room: values of logits held at a time."""

    weight: Tensor
    bias: Tensor | None
    ids: np.ndarray
    finish: Callable[[Tensor], Tensor]
    room: int

    def log_sum_exp(self, hidden: Tensor, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Log-sum-exp of the frozen rows' logits (n,), and its gradient in `hidden` (n, D) where wanted.

        The gradient, softmax(hidden W^T) W, is attention with W as keys and values, and is found as attention finds it: a
        block of W at a time, with a running maximum (https://arxiv.org/abs/1805.02867, https://arxiv.org/abs/2411.09009).
        No (n, V) matrix exists, and no logit is computed twice.
        """
        block = max(LEAST_BLOCK, self.room // max(1, len(hidden)))
        number = torch.promote_types(hidden.dtype, torch.float32)
        most = hidden.new_full((len(hidden), 1), torch.finfo(number).min, dtype=number)
        total = torch.zeros_like(most)
        gradient = torch.zeros_like(hidden, dtype=number) if with_gradient else None
        for start in range(0, len(self.weight), block):
            weight = self.weight[start : start + block]
            raw = F.linear(hidden, weight, None if self.bias is None else self.bias[start : start + block])
            with torch.set_grad_enabled(with_gradient):
                logits = self.finish(raw.requires_grad_(with_gradient))
            shown, before = logits.detach(), most
            low, high = np.searchsorted(self.ids, (start, start + block))
            if low < high:
                shown = shown.index_fill(1, to_device(self.ids[low:high] - start, shown.device), -torch.inf)
            most = torch.maximum(most, shown.amax(1, keepdim=True))
            share, shrink = (shown - most).exp_(), (before - most).exp_()
            total.mul_(shrink).add_(share.sum(1, keepdim=True))
            if gradient is not None:
                if logits is not raw:
                    (share,) = torch.autograd.grad(logits, raw, share)
                gradient.mul_(shrink).add_(share @ weight)
        return (most + total.log()).squeeze(1), None if gradient is None else gradient.div_(total).to(hidden.dtype)

    def logit(self, hidden: Tensor, target: Tensor) -> Tensor:
        """The logits of the targets (n,), differentiable in `hidden` (n, D)."""
        number = torch.promote_types(hidden.dtype, torch.float32)
        raw = (hidden.to(number) * self.weight[target].to(number)).sum(1)
        return self.finish(raw if self.bias is None else raw + self.bias[target])


class FrozenLogSumExp(torch.autograd.Function):
    """FrozenHead.log_sum_exp as a function of the hidden states; its gradient is computed along with it."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: FrozenHead) -> Tensor:  # noqa: D102
        found, gradient = head.log_sum_exp(hidden, with_gradient=ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        return found

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None].to(gradient.dtype), None


class Labels(NamedTuple):
    """Labels and what their loss needs. hidden (n, D): the hidden states that predict them; rest (n,): the log-sum-exp of
    the frozen logits; logit (n,): the label's logit with the frozen head, read only where the label is no SID token; target
    (n,): the labels as token ids."""

    hidden: Tensor
    rest: Tensor
    logit: Tensor
    target: Tensor
