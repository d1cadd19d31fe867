"""Gated DeltaNet as a specification: KDA with one decay per head instead of one per channel (arXiv 2412.06464).

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = scale * S_t^T q_t

A scalar decay commutes with the correction, so decays between tokens are one number per pair and the chunk is plain
matrix products. Plain torch, any precision, differentiable; q and k already normalised; state [N, HV, V, K].
"""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_linear.reference.sequences import by_chunk, by_token, over_sequences

CHUNK = 16


def gdn_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One token (arXiv 2412.06464, Eq. 10). state [..., V, K]; q, k [..., K]; v [..., V]; g, beta [...].

    Returns (output [..., V], new state).
    """
    state = state * g.exp()[..., None, None]
    error = v - (state @ k[..., None])[..., 0]
    state = state + beta[..., None, None] * error[..., :, None] * k[..., None, :]
    return scale * (state @ q[..., None])[..., 0], state


def recurrent_gdn(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The recurrence over whole sequences; (output, final_state).

    Args:
        q, k: [B, T, H, K]. v: [B, T, HV, V], HV a multiple of H.
        g: [B, T, HV] natural-log decay, <= 0. beta: [B, T, HV].
        scale: multiplies the output.
        initial_state: [N, HV, V, K], zero where None.
        cu_seqlens: [N+1] offsets of packed sequences, with B == 1.
    """
    return over_sequences(by_token(gdn_step), (q, k, v, g, beta), scale, initial_state, cu_seqlens)


def chunk_gdn(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The chunked form. Arguments and results as ``recurrent_gdn``."""
    return over_sequences(by_chunk(gdn_chunk, CHUNK), (q, k, v, g, beta), scale, initial_state, cu_seqlens)


def gdn_chunk(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One chunk. state [..., V, K]; q, k [..., C, K]; v [..., C, V]; g, beta [..., C]. Returns (output, new state)."""
    size = q.shape[-2]
    total = g.cumsum(-1)
    lower = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    # between[r, i] = exp(decay after token i, up to and including token r), for i <= r; masked before exp.
    between = (total[..., :, None] - total[..., None, :]).masked_fill(~lower, -torch.inf).exp()
    keys = ((k @ k.mT) * between).tril(-1)
    queries = (q @ k.mT) * between

    # As in KDA: the corrected values u solve (I + Diag(beta) keys) u = beta (v - the decayed memory's answer).
    answer = total.exp()[..., None] * (k @ state.mT)
    identity = torch.eye(size, dtype=q.dtype, device=q.device)
    u = torch.linalg.solve_triangular(
        identity + beta[..., None] * keys, beta[..., None] * (v - answer), upper=False, unitriangular=True
    )
    output = scale * (total.exp()[..., None] * (q @ state.mT) + queries @ u)
    last = total[..., -1:]
    state = state * last.exp()[..., None] + u.mT @ (k * (last - total).exp()[..., None])
    return output, state
