"""KDA read as attention whose position encoding is learned: the parallel form (arXiv 2510.26692, section 6.1).

    o_t = scale * sum_{i <= t} q_t^T (A_t A_{t-1} ... A_{i+1}) beta_i k_i v_i^T        A_j = (I - beta_j k_j k_j^T) Diag(exp(g_j))

Rotary attention puts a product of fixed rotations between a query and a key; here the product is of matrices made
from the tokens in between. That is why the full-attention layers can do without positions. The products are built
explicitly, [T, T, K, K], so this is a reading for small sizes, not a way to compute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_linear.reference.sequences import Inputs, over_sequences


def transitions(k: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """A_j [..., K, K] of every token, from k, g [..., K] and beta [...]."""
    identity = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    erase = identity - beta[..., None, None] * k[..., :, None] * k[..., None, :]
    return erase * g.exp()[..., None, :]


def products(steps: Tensor) -> Tensor:
    """Everything between two tokens: [..., t, i] is A_t ... A_{i+1}, the identity at t == i and zero where i > t.

    steps [..., T, K, K]; returns [..., T, T, K, K].
    """
    tokens, key_dim = steps.shape[-3], steps.shape[-1]
    identity = torch.eye(key_dim, dtype=steps.dtype, device=steps.device).expand(*steps.shape[:-3], 1, -1, -1)
    rows, row = [], steps[..., :0, :, :]
    for t in range(tokens):
        row = torch.cat([steps[..., t : t + 1, :, :] @ row, identity], dim=-3)
        rows.append(torch.cat([row, torch.zeros_like(steps[..., t + 1 :, :, :])], dim=-3))
    return torch.stack(rows, dim=-4)


def parallel_kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """KDA as a masked [T, T] matrix of scores. Shapes as ``kimi_linear.ops.chunk_kda``; (output, final_state)."""
    return over_sequences(_parallel, (q, k, v, g, beta), scale, initial_state, cu_seqlens)


def _parallel(inputs: Inputs, scale: float, state: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v, g, beta = (x.transpose(1, 2) for x in inputs)
    if q.shape[2] == 0:
        return torch.zeros_like(inputs[2]), state
    steps = transitions(k, g, beta)
    between = products(steps)
    from_start = between[..., :, 0, :, :] @ steps[..., :1, :, :]  # A_t ... A_1 [..., T, K, K]
    scores = torch.einsum("...tk,...tikl,...il,...i->...ti", q, between, k, beta)
    output = scores @ v + torch.einsum("...tk,...tkl,...vl->...tv", q, from_start, state)
    written = torch.einsum("...ikl,...il,...i,...iv->...vk", between[..., -1, :, :, :], k, beta, v)
    return scale * output.transpose(1, 2), written + state @ from_start[..., -1, :, :].mT
