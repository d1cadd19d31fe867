"""Causal depthwise convolution of a few taps, in plain torch, with an own backward.

Each sequence gets its W-1 inputs of history in front of it, in one padded buffer [B, T+W-1, D]; then the convolution
needs no mask, packed sequences are rows of the same buffer, and the final state is a slice of it. Autograd's own
backward of a depthwise convolution costs three times as much on a CPU (29 ms against 9, forward and backward at B=16,
T=256, D=384, one thread). Blocks that fit the cache keep the temporaries small.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

BLOCK_ELEMENTS = 1 << 18  # 1 MiB in fp32; measured: 2^16 11.5 ms, 2^17 9.4, 2^18 8.4, everything at once 9.4


def short_conv(
    x: Tensor, weight: Tensor, silu: bool, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output [B, T, D], final_state [N, D, W-1]). Shapes as ``kimi_linear.ops.short_conv``."""
    (batch, tokens, width), before = x.shape, weight.shape[1] - 1
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_state is None:
        initial_state = x.new_zeros(sequences, width, before)
    history = initial_state.to(x.dtype).mT
    if cu_seqlens is None:
        padded = torch.cat([history, x], dim=1)
        return _ShortConv.apply(padded, weight, bias, silu), padded[:, tokens:].mT.contiguous()
    bounds = cu_seqlens.to(torch.long)
    shift = before * torch.arange(sequences, device=x.device)
    ahead = torch.arange(before, device=x.device)
    slots = torch.arange(tokens, device=x.device)
    owner = torch.searchsorted(bounds[1:].contiguous(), slots, right=True)
    places = slots + before * owner  # of each token's oldest tap; the token itself lies W-1 further on
    padded = x.new_zeros(tokens + before * sequences, width)
    padded = padded.index_copy(0, ((bounds[:-1] + shift)[:, None] + ahead).flatten(), history.reshape(-1, width))
    padded = padded.index_copy(0, places + before, x[0])
    final_state = padded[(bounds[1:] + shift)[:, None] + ahead].mT.contiguous()
    if tokens == 0:
        return torch.zeros_like(x), final_state
    return _ShortConv.apply(padded[None], weight, bias, silu)[:, places], final_state


class _ShortConv(torch.autograd.Function):
    """padded [B, T+W-1, D], weight [D, W], bias [D] or None -> [B, T, D]; fp32 inside for 16-bit inputs, the sums made again backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, padded, weight, bias, silu):  # type: ignore[override]
        ctx.silu = silu  # type: ignore[attr-defined]
        ctx.save_for_backward(padded, weight, bias)
        batch, length, width = padded.shape
        output = padded.new_empty(batch, length - weight.shape[1] + 1, width)
        taps = _taps(weight, padded)
        for rows, start, stop in _blocks(output):
            sums = _sums(padded[rows], taps, bias, start, stop)
            output[rows, start:stop] = F.silu(sums, inplace=True) if silu else sums
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, d_output):  # type: ignore[override]
        padded, weight, bias = ctx.saved_tensors
        taps = _taps(weight, padded)
        d_padded, d_taps = torch.zeros_like(padded, dtype=taps.dtype), torch.zeros_like(taps)
        d_bias: Tensor | None = None if bias is None else taps.new_zeros(bias.shape)
        for rows, start, stop in _blocks(d_output):
            x, d_sums = padded[rows].to(taps.dtype), d_output[rows, start:stop].to(taps.dtype)
            sums = _sums(x, taps, bias, start, stop)
            if ctx.silu:
                d_sums = torch.ops.aten.silu_backward(d_sums, sums)
            if d_bias is not None:
                d_bias += d_sums.sum((0, 1))
            for w, tap in enumerate(taps):
                d_padded[rows, start + w : stop + w].addcmul_(d_sums, tap)
                d_taps[w] += torch.mul(d_sums, x[:, start + w : stop + w], out=sums).sum((0, 1))
        if d_bias is not None:
            d_bias = d_bias.to(bias.dtype)  # type: ignore[union-attr]
        return d_padded.to(padded.dtype), d_taps.mT.to(weight.dtype), d_bias, None


def _taps(weight: Tensor, x: Tensor) -> Tensor:
    """weight [D, W] as contiguous taps [W, D] in the precision of the sums."""
    return weight.mT.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _sums(x: Tensor, taps: Tensor, bias: Tensor | None, start: int, stop: int) -> Tensor:
    """Outputs ``start:stop`` before the activation: [B, T+W-1, D] -> [B, stop-start, D]."""
    total = x[:, start:stop] * taps[0]
    for w in range(1, len(taps)):
        total.addcmul_(x[:, start + w : stop + w].to(taps.dtype), taps[w])
    return total if bias is None else total.add_(bias)


def _blocks(x: Tensor) -> Iterator[tuple[slice, int, int]]:
    """Parts of [B, T, D] that fit a core's cache, as (rows, first token, last token + 1); one part on a GPU."""
    batch, tokens, width = x.shape
    room = max(1, BLOCK_ELEMENTS // max(1, width)) if x.device.type == "cpu" else batch * tokens
    height, length = max(1, room // max(1, tokens)), max(1, min(tokens, room))
    for row in range(0, batch, height):
        for start in range(0, tokens, length):
            yield slice(row, row + height), start, min(start + length, tokens)
