"""Kimi Delta Attention token by token in plain torch: all sequences and heads of a step at once. What decoding uses."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_linear.kernels.torch.layout import ChunkLayout


def recurrent_kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output [B, T, HV, V] in v's dtype, final_state [N, HV, V, K]). Differentiable by autograd."""
    dtype, out_dtype, heads = _wide(q), v.dtype, v.shape[2]
    repeat = heads // q.shape[2]
    if repeat > 1:
        q, k = q.repeat_interleave(repeat, dim=2), k.repeat_interleave(repeat, dim=2)
    layout = ChunkLayout.of(q, 1, cu_seqlens)
    q, k, v, g, beta = (layout.split(x.to(dtype)) for x in (q * scale, k, v, g, beta))
    if initial_state is None:
        state = q.new_zeros(len(layout.lengths) * heads, v.shape[-1], q.shape[-1])
    else:
        state = layout.sort(initial_state.to(dtype))
    decay, outputs, row = g.exp(), [], 0
    for count in layout.active:
        rows = slice(row, row + count * heads)
        row = rows.stop
        live = state[: count * heads] * decay[rows]
        correction = beta[rows, :, None] * (v[rows] - k[rows] @ live.mT)
        live = live + correction.mT @ k[rows]
        outputs.append(q[rows] @ live.mT)
        state = live if len(live) == len(state) else torch.cat([live, state[len(live) :]])
    chunks = torch.cat(outputs) if outputs else v
    return layout.join(chunks, heads).to(out_dtype), layout.unsort(state, heads)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
