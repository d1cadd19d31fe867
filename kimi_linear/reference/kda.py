"""Kimi Delta Attention as a specification: the recurrence, and a readable chunked form. Plain torch, any precision.

Both take a plain log-decay g [B, T, HV, K] and q, k already normalised; both are differentiable by autograd and
follow the layout of the public operations (state value-major [N, HV, V, K]).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_linear.reference.sequences import by_chunk, by_token, over_sequences

CHUNK = 16


def kda_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One token (arXiv 2510.26692, Eq. 1). state [..., V, K]; q, k, g [..., K]; v [..., V]; beta [...].

    Returns (output [..., V], new state): decay first, then the correction against the decayed memory, then the read.
    """
    state = state * g.exp()[..., None, :]
    error = v - (state @ k[..., None])[..., 0]
    state = state + beta[..., None, None] * error[..., :, None] * k[..., None, :]
    return scale * (state @ q[..., None])[..., 0], state


def recurrent_kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The recurrence over whole sequences. Shapes as ``kimi_linear.ops.chunk_kda``; (output, final_state)."""
    return over_sequences(by_token(kda_step), (q, k, v, g, beta), scale, initial_state, cu_seqlens)


def chunk_kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The chunked form (arXiv 2510.26692, Eqs. 6-9). Shapes as ``recurrent_kda``; (output, final_state)."""
    return over_sequences(by_chunk(kda_chunk, CHUNK), (q, k, v, g, beta), scale, initial_state, cu_seqlens)


def kda_chunk(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One chunk. state [..., V, K]; q, k, g [..., C, K]; v [..., C, V]; beta [..., C]. Returns (output, new state).

    Every exponent is a sum of decays between two tokens, so it is <= 0 and nothing can overflow at any gate.
    """
    size = q.shape[-2]
    total = g.cumsum(-2)
    lower = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    # between[r, i] = exp(decay after token i, up to and including token r), for i <= r; masked before exp.
    between = (total[..., :, None, :] - total[..., None, :, :]).masked_fill(~lower[..., None], -torch.inf).exp()
    keys = torch.einsum("...rk,...ik,...rik->...ri", k, k, between).tril(-1)
    queries = torch.einsum("...rk,...ik,...rik->...ri", q, k, between)

    # The UT transform (Eq. 6): the corrected values solve (I + Diag(beta) keys) u = beta (v - decayed memory's answer).
    answer = (k * total.exp()) @ state.mT
    identity = torch.eye(size, dtype=q.dtype, device=q.device)
    u = torch.linalg.solve_triangular(
        identity + beta[..., None] * keys, beta[..., None] * (v - answer), upper=False, unitriangular=True
    )
    output = scale * ((q * total.exp()) @ state.mT + queries @ u)
    state = state * total[..., -1:, :].exp() + u.mT @ (k * (total[..., -1:, :] - total).exp())
    return output, state
