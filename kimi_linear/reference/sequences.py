"""Batches and packed sequences, one sequence at a time: what every reference recurrence shares."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64 inputs, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def over_sequences(
    one: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run ``one(q, k, v, g, beta, scale, state)`` over each sequence, in fp32 or fp64, heads of q and k repeated to HV.

    Returns output [B, T, HV, V] in v's dtype and the final states [N, HV, V, K].
    """
    dtype, out_dtype = accumulate_dtype(q), v.dtype
    repeat = v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(repeat, dim=2) for x in (q, k))
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_state is None:
        initial_state = v.new_zeros(sequences, v.shape[2], v.shape[3], q.shape[3])
    if cu_seqlens is None:
        output, state = one(q, k, v, g, beta, scale, initial_state.to(dtype))
        return output.to(out_dtype), state
    outputs, states, bounds = [], [], cu_seqlens.tolist()
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        part = (x[:, start:stop] for x in (q, k, v, g, beta))
        output, state = one(*part, scale, initial_state[i : i + 1].to(dtype))
        outputs.append(output)
        states.append(state)
    return torch.cat(outputs, dim=1).to(out_dtype), torch.cat(states)
