"""Batches, packed sequences, tokens and chunks in plain loops: what every reference recurrence shares.

A recurrence is written once, for one token (``step``) or one chunk (``chunk``); the functions here carry its memory
along. ``inputs`` is always the tuple (q, k, v, ...), v with HV heads and everything else with HV or a divisor of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Inputs: TypeAlias = tuple[Tensor, ...]
Sequence: TypeAlias = Callable[[Inputs, float, Tensor], tuple[Tensor, Tensor]]
"""``one(inputs [B, T, HV, ...], scale, state [B, HV, V, K])`` gives (output [B, T, HV, V], final state)."""


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64 inputs, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def by_token(step: Callable[..., tuple[Tensor, Tensor]]) -> Sequence:
    """The recurrence ``step(state, *token, scale)`` over the tokens of a sequence."""

    def one(inputs: Inputs, scale: float, state: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for t in range(inputs[0].shape[1]):
            output, state = step(state, *(x[:, t] for x in inputs), scale)
            outputs.append(output)
        return torch.stack(outputs, dim=1) if outputs else torch.zeros_like(inputs[2]), state

    return one


def by_chunk(chunk: Callable[..., tuple[Tensor, Tensor]], size: int) -> Sequence:
    """``chunk(state, *tokens, scale)`` over a sequence, ``size`` tokens at a time, heads before tokens."""

    def one(inputs: Inputs, scale: float, state: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for start in range(0, inputs[0].shape[1], size):
            part = (x[:, start : start + size].transpose(1, 2) for x in inputs)
            output, state = chunk(state, *part, scale)
            outputs.append(output.transpose(1, 2))
        return torch.cat(outputs, dim=1) if outputs else torch.zeros_like(inputs[2]), state

    return one


def over_sequences(
    one: Sequence, inputs: Inputs, scale: float, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run ``one`` over every sequence in fp32 or fp64, heads repeated to HV.

    Args:
        one: the recurrence over one batch of equally long sequences.
        inputs: (q [B, T, H, K], k [B, T, H, K], v [B, T, HV, V], then [B, T, HV, ...]).
        initial_state: [N, HV, V, K], zero where None.
        cu_seqlens: [N+1] offsets of packed sequences, with B == 1.

    Returns:
        Output [B, T, HV, V] in v's dtype, and the final states [N, HV, V, K].
    """
    q, _, v = inputs[:3]
    dtype, out_dtype, heads = accumulate_dtype(q), v.dtype, v.shape[2]
    wide = tuple(x.repeat_interleave(heads // x.shape[2], dim=2).to(dtype) for x in inputs)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_state is None:
        initial_state = v.new_zeros(sequences, heads, v.shape[3], q.shape[3], dtype=dtype)
    if cu_seqlens is None:
        output, state = one(wide, scale, initial_state.to(dtype))
        return output.to(out_dtype), state
    outputs, states = [], []
    for i, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        part = tuple(x[:, start:stop] for x in wide)
        output, state = one(part, scale, initial_state[i : i + 1].to(dtype))
        outputs.append(output)
        states.append(state)
    return torch.cat(outputs, dim=1).to(out_dtype), torch.cat(states)
