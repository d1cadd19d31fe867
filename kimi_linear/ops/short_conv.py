"""The short causal convolution on q, k and v: depthwise, a few taps, with a state of the last inputs."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kimi_linear.ops.validation import check_short_conv

ConvActivation: TypeAlias = Literal["silu", "none"]


class ConvOutput(NamedTuple):
    """Result of ``short_conv``.

    Attributes:
        output: [B, T, D], in the dtype of x.
        final_state: [N, D, W-1], in the dtype of x: the last W-1 inputs of each sequence, oldest first.
    """

    output: Tensor
    final_state: Tensor


def short_conv(
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "D W"],
    *,
    activation: ConvActivation = "silu",
    initial_state: Float[Tensor, "N D W-1"] | None = None,
    cu_seqlens: Int[Tensor, "N1"] | None = None,
) -> ConvOutput:
    """Causal depthwise convolution over the tokens of each sequence: ``y_t = sum_w weight[:, w] * x_{t-W+1+w}``.

    ``weight[:, -1]`` multiplies the current token, as in ``torch.nn.functional.conv1d`` with a weight [D, 1, W].
    Differentiable in x, weight and initial_state.

    Args:
        x: [B, T, D].
        weight: [D, W], W >= 1 taps.
        activation: applied to the result, "silu" or "none".
        initial_state: [N, D, W-1] inputs before the first token, oldest first; zero where None.
        cu_seqlens: [N+1] int32 or int64 offsets of packed sequences, with B == 1, which never see each other. Without
            it every batch row is a sequence, N == B.

    Returns:
        ``ConvOutput(output [B, T, D], final_state [N, D, W-1])``. A sequence shorter than W-1 keeps the newest part
        of its initial state; an empty one hands it through. 16-bit inputs are accumulated in fp32.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device, offset or activation.
    """
    check_short_conv(x, weight, activation, initial_state, cu_seqlens)
    (batch, tokens, width), taps = x.shape, weight.shape[1]
    before = taps - 1
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_state is None:
        initial_state = x.new_zeros(sequences, width, before)
    history = initial_state.to(x.dtype).mT
    if cu_seqlens is None:
        padded = torch.cat([history, x], dim=1)
        output = _taps(padded, weight, activation)
        return ConvOutput(output, padded[:, tokens:].mT.contiguous())
    # Each packed sequence gets its own W-1 rows of history in front, so one convolution serves them all.
    bounds = cu_seqlens.to(device=x.device, dtype=torch.long)
    slots = torch.arange(tokens, device=x.device)
    owner = torch.searchsorted(bounds[1:].contiguous(), slots, right=True)
    places = slots + before * (owner + 1)
    ahead = torch.arange(before, device=x.device)
    starts = bounds[:-1] + before * torch.arange(sequences, device=x.device)
    padded = x.new_zeros(tokens + before * sequences, width)
    padded = padded.index_copy(0, (starts[:, None] + ahead).flatten(), history.reshape(-1, width))
    padded = padded.index_copy(0, places, x[0])
    output = _taps(padded[None], weight, activation)[:, places - before] if tokens else x.new_zeros(x.shape)
    ends = bounds[1:] + before * torch.arange(sequences, device=x.device)
    return ConvOutput(output, padded[ends[:, None] + ahead].mT.contiguous())


def _taps(padded: Tensor, weight: Tensor, activation: ConvActivation) -> Tensor:
    """Valid convolution of [B, T+W-1, D] down to [B, T, D]."""
    wide = torch.promote_types(padded.dtype, torch.float32)
    tokens = padded.shape[1] - weight.shape[1] + 1
    total = sum(padded[:, w : w + tokens].to(wide) * weight[:, w].to(wide) for w in range(weight.shape[1]))
    assert isinstance(total, Tensor)
    return (F.silu(total) if activation == "silu" else total).to(padded.dtype)
