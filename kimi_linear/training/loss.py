"""Cross entropy of a large vocabulary without ever holding all logits.

The logits of T tokens are T * vocab numbers, often the largest tensor of a training step. Here they are made for a
piece of the tokens at a time; the gradients of hidden states and weight are taken at once, and the piece is dropped.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from kimi_linear.data import IGNORE

MAX_LOGITS = 1 << 24
"""Logits alive at a time: 64 MiB in fp32."""
MAX_LOGITS_GPU = 1 << 26
"""On a GPU, where a piece should be worth the launches of its dozen kernels."""


def linear_cross_entropy(
    hidden: Float[Tensor, "T D"],
    weight: Float[Tensor, "vocab D"],
    targets: Int[Tensor, "T"],
    *,
    max_logits: int | None = None,
) -> Float[Tensor, ""]:
    """Mean over the scored tokens of ``cross_entropy(hidden @ weight.T, targets)``, in fp32 at least.

    Args:
        hidden: [T, D].
        weight: [vocab, D], the output projection.
        targets: [T] int64; -100 is not scored. Without any scored token the loss is 0.
        max_logits: numbers alive at a time, ``MAX_LOGITS`` or ``MAX_LOGITS_GPU`` where None; more tokens than fit go in
            pieces, with the same result but for rounding.

    Returns:
        A scalar, differentiable once in ``hidden`` and ``weight``. Under autocast the products run in its dtype.
    """
    if max_logits is None:
        max_logits = MAX_LOGITS_GPU if hidden.is_cuda else MAX_LOGITS
    piece = max(1, max_logits // weight.shape[0])
    if hidden.shape[0] <= piece:
        logits = _wide(F.linear(hidden, weight))
        total = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
        return total / (targets != IGNORE).sum().clamp(min=1)
    loss: Tensor = _PiecewiseCrossEntropy.apply(hidden, weight, targets, piece)  # type: ignore[assignment]
    return loss


class _PiecewiseCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, piece: int) -> Tensor:
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        with torch.autocast(device, enabled=False):
            return _loss_and_gradients(ctx, hidden, weight, targets, piece, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight * grad.to(grad_weight.dtype),
            None,
            None,
        )


def _loss_and_gradients(
    ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, piece: int, dtype: torch.dtype
) -> Tensor:
    scored = targets != IGNORE
    count = scored.sum().clamp(min=1)
    narrow_weight = weight.to(dtype)
    grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
    # Summed over the pieces in fp32, since small terms would be lost in bf16.
    grad_weight = torch.zeros_like(_wide(weight)) if ctx.needs_input_grad[1] else None
    total = _wide(hidden).new_zeros(())
    for start in range(0, hidden.shape[0], piece):
        span = slice(start, start + piece)
        x, labels, mask = hidden[span].to(dtype), targets[span].clamp(min=0)[:, None], scored[span][:, None]
        # One kernel that reads the narrow logits and writes wide ones: each more would read and write them all again.
        log_p = torch.log_softmax(x @ narrow_weight.T, -1, dtype=total.dtype)
        total -= (log_p.gather(1, labels) * mask).sum()
        if grad_hidden is None and grad_weight is None:
            continue
        # d loss / d logits = (softmax - one-hot) / count, in the place of the logits. What is the same for a whole row
        # is multiplied in where rows are narrow.
        slope = log_p.exp_()
        slope.scatter_add_(1, labels, -torch.ones_like(slope[:, :1]))
        slope, factor = slope.to(dtype), mask.to(total.dtype) / count
        if grad_hidden is not None:
            grad_hidden[span] = ((slope @ narrow_weight) * factor).to(hidden.dtype)
        if grad_weight is not None:
            grad_weight += slope.T @ (x * mask)
    if grad_weight is not None:
        grad_weight /= count
    ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
    return total / count


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype.itemsize >= 4 else x.float()
