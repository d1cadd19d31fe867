"""The general diagonal-plus-low-rank recurrence that KDA is a tied case of (arXiv 2510.26692, section 6.2).

    S_t = (Diag(exp(g_t)) - a_t b_t^T) S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t

KDA ties the free vectors to its key: a = beta * k, b = k * exp(g), and it writes with the key beta * k. The general
chunk needs four matrices of token pairs (b with a, b with k, q with a, q with k) where KDA needs two: that, and the
matrix products that fall away with them, is why KDA's kernel is about twice as fast. Plain torch, any precision,
differentiable; state [N, HV, V, K].
"""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_linear.reference.sequences import by_chunk, by_token, over_sequences

CHUNK = 16


def dplr_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One token. state [..., V, K]; q, k, g, a, b [..., K]; v [..., V]. Returns (output [..., V], new state)."""
    read = (state @ b[..., None])[..., 0]
    state = state * g.exp()[..., None, :] - read[..., :, None] * a[..., None, :] + v[..., :, None] * k[..., None, :]
    return scale * (state @ q[..., None])[..., 0], state


def recurrent_dplr(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor, b: Tensor, scale: float,
    initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The recurrence over whole sequences; (output, final_state).

    Args:
        q, k, g, a, b: [B, T, HV, K], or a divisor of HV heads each; g is the natural-log decay, <= 0.
        v: [B, T, HV, V].
        scale: multiplies the output.
        initial_state: [N, HV, V, K], zero where None.
        cu_seqlens: [N+1] offsets of packed sequences, with B == 1.
    """
    return over_sequences(by_token(dplr_step), (q, k, v, g, a, b), scale, initial_state, cu_seqlens)


def chunk_dplr(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor, b: Tensor, scale: float,
    initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The chunked form. Arguments and results as ``recurrent_dplr``."""
    return over_sequences(by_chunk(dplr_chunk, CHUNK), (q, k, v, g, a, b), scale, initial_state, cu_seqlens)


def dplr_chunk(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One chunk. state [..., V, K]; q, k, g, a, b [..., C, K]; v [..., C, V]. Returns (output, new state).

    b reads the memory before the token's own decay, so its rows use the decay up to the token before.
    """
    size = q.shape[-2]
    total = g.cumsum(-2)
    before = total - g
    lower = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()

    def pairs(rows: Tensor, decayed: Tensor, columns: Tensor, mask: Tensor) -> Tensor:
        """[r, i] = <rows_r * exp(decayed_r - total_i), columns_i>, masked before exp."""
        between = decayed[..., :, None, :] - total[..., None, :, :]
        return torch.einsum(
            "...rk,...ik,...rik->...ri", rows, columns, between.masked_fill(~mask[..., None], -torch.inf).exp()
        )

    strict = lower.tril(-1)
    b_with_a, b_with_k = pairs(b, before, a, strict), pairs(b, before, k, strict)
    q_with_a, q_with_k = pairs(q, total, a, lower), pairs(q, total, k, lower)
    # read_r = b_r^T S_{r-1}: what the memory, the writes and the erasures of earlier tokens make b_r read.
    identity = torch.eye(size, dtype=q.dtype, device=q.device)
    read = torch.linalg.solve_triangular(
        identity + b_with_a, (b * before.exp()) @ state.mT + b_with_k @ v, upper=False, unitriangular=True
    )
    output = scale * ((q * total.exp()) @ state.mT + q_with_k @ v - q_with_a @ read)
    last = total[..., -1:, :]
    left = (last - total).exp()
    return output, state * last.exp() + v.mT @ (k * left) - read.mT @ (a * left)
