"""Mamba-2-style linear attention as a specification: decay and write, no correction (arXiv 2405.21060).

    S_t = exp(g_t) S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t

One decay per head. In that paper's letters k is B, q is C, v is dt * x and g is dt * A; its skip term D and the
projections around the recurrence are the layer's business. Plain torch, any precision, differentiable; state
[N, HV, V, K].
"""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_linear.reference.sequences import by_chunk, by_token, over_sequences

CHUNK = 16


def mamba2_step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One token. state [..., V, K]; q, k [..., K]; v [..., V]; g [...]. Returns (output [..., V], new state)."""
    state = state * g.exp()[..., None, None] + v[..., :, None] * k[..., None, :]
    return scale * (state @ q[..., None])[..., 0], state


def recurrent_mamba2(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float,
    initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The recurrence over whole sequences; (output, final_state).

    Args:
        q, k: [B, T, H, K]. v: [B, T, HV, V], HV a multiple of H.
        g: [B, T, HV] natural-log decay, <= 0.
        scale: multiplies the output.
        initial_state: [N, HV, V, K], zero where None.
        cu_seqlens: [N+1] offsets of packed sequences, with B == 1.
    """
    return over_sequences(by_token(mamba2_step), (q, k, v, g), scale, initial_state, cu_seqlens)


def chunk_mamba2(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float,
    initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The chunked form: attention with a decay mask, and one state per chunk. As ``recurrent_mamba2``."""
    return over_sequences(by_chunk(mamba2_chunk, CHUNK), (q, k, v, g), scale, initial_state, cu_seqlens)


def mamba2_chunk(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One chunk. state [..., V, K]; q, k [..., C, K]; v [..., C, V]; g [..., C]. Returns (output, new state)."""
    size = q.shape[-2]
    total = g.cumsum(-1)
    lower = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    # between[r, i] = exp(decay after token i, up to and including token r), for i <= r; masked before exp.
    between = (total[..., :, None] - total[..., None, :]).masked_fill(~lower, -torch.inf).exp()
    output = scale * (total.exp()[..., None] * (q @ state.mT) + ((q @ k.mT) * between) @ v)
    last = total[..., -1:]
    state = state * last.exp()[..., None] + v.mT @ (k * (last - total).exp()[..., None])
    return output, state
