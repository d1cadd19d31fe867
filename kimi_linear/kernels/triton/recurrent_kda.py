"""Kimi Delta Attention token by token in one Triton kernel: each slice of a head's state lives in registers from first to last.

    S <- S Diag(2^g)    d = beta (v - S k)    o = scale (S q + (k . q) d)    S <- S + d k^T

Rows of S [V, K] never meet, so a program takes BV of them, of one sequence and value head, and one warp holds them. The tile
lies as in ``decode``, whose whole step this is without convolution and output norm. Grid (V / BV, N * HV).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_linear.kernels.triton.common import log2_decay
from kimi_linear.kernels.triton.decode import LANES

TILE = 2048
"""Numbers of the state in a warp: 64 a thread."""


@triton.jit
def unit(x):
    """x at unit length, as ``l2_normalize`` makes it."""
    return x * tl.rsqrt(tl.sum(x * x, 0) + 1e-6)


@triton.jit
def recurrent_kernel(
    q, k, v, gate, beta, A_log, dt_bias, initial_state, final_state, slots, cu_seqlens, output,
    scale, lower_bound, tokens, q_b, q_t, k_b, k_t, v_b, v_t, g_b, g_t, beta_b, beta_t,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
    NORMALIZE: tl.constexpr, PACKED: tl.constexpr, HAS_STATE: tl.constexpr, HAS_SLOTS: tl.constexpr, SLOT: tl.constexpr,
):  # fmt: skip
    n, hv = tl.program_id(1) // HV, tl.program_id(1) % HV
    h = hv // (HV // H)
    first, length, row = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64) + tokens, n.to(tl.int64)
    if PACKED:
        first = tl.load(cu_seqlens + n).to(tl.int64)
        length = tl.load(cu_seqlens + n + 1).to(tl.int64) - first
        row = tl.full([], 0, tl.int64)
    slot = n.to(tl.int64)
    if HAS_SLOTS:
        slot = tl.load(slots + n).to(tl.int64)
    dim_k, dim_v = tl.arange(0, K), tl.program_id(0) * BV + tl.arange(0, BV)
    part, lane = tl.arange(0, K // LANES)[None, :, None], tl.arange(0, LANES)[None, None, :]
    cells = slot * SLOT + (hv * V + dim_v[:, None, None]) * K + (part * LANES + lane)
    if HAS_SLOTS:
        state = tl.load(final_state + cells)
    elif HAS_STATE:
        state = tl.load(initial_state + cells)
    else:
        state = tl.zeros([BV, K // LANES, LANES], tl.float32)
    rate, bias = 0.0, tl.zeros([K], tl.float32)
    if GATE > 0:
        rate = tl.load(A_log + hv).to(tl.float32)
        bias = tl.load(dt_bias + hv * K + dim_k).to(tl.float32)
    for i in range(length):
        t = first + i
        b_q = tl.load(q + row * q_b + t * q_t + h * K + dim_k).to(tl.float32)
        b_k = tl.load(k + row * k_b + t * k_t + h * K + dim_k).to(tl.float32)
        b_v = tl.load(v + row * v_b + t * v_t + hv * V + dim_v).to(tl.float32)
        x = tl.load(gate + row * g_b + t * g_t + hv * K + dim_k).to(tl.float32)
        strength = tl.load(beta + row * beta_b + t * beta_t + hv).to(tl.float32)
        if NORMALIZE:
            b_q, b_k = unit(b_q), unit(b_k)
        b_q *= scale
        decay = tl.exp2(log2_decay(x, rate, bias, lower_bound, GATE))
        wide_q = tl.reshape(b_q, [K // LANES, LANES])[None, :, :]
        wide_k = tl.reshape(b_k, [K // LANES, LANES])[None, :, :]
        state *= tl.reshape(decay, [K // LANES, LANES])[None, :, :]
        held = tl.sum(tl.sum(state * wide_k, 1), 1)
        seen = tl.sum(tl.sum(state * wide_q, 1), 1)
        change = strength * (b_v - held)
        state += change[:, None, None] * wide_k
        o = seen + tl.sum(b_q * b_k, 0) * change
        at = (row * tokens + t) * HV * V + hv * V
        tl.store(output + at + dim_v, o.to(output.dtype.element_ty))
    tl.store(final_state + cells, state)


def recurrent_kda(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None,
    beta: Tensor, scale: float, normalize: bool, initial_state: Tensor | None, final_state: Tensor, slots: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    """Output [B, T, HV, V] in v's dtype; ``final_state`` [N, HV, V, K] is written.

    With ``slots`` [N], ``final_state`` is a pool: its slots are read and written, and ``initial_state`` is None. The gate's
    kind is as in ``kimi_linear.kernels.triton.chunk_kda``.
    """
    (batch, tokens, heads, key_dim), (v_heads, value_dim) = q.shape, v.shape[2:]
    q, k, v, gate, beta = (x if x[:1, :1].is_contiguous() else x.contiguous() for x in (q, k, v, gate, beta))
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    block = min(value_dim, TILE // key_dim)
    output = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if sequences == 0:
        return output
    strides = [stride for x in (q, k, v, gate, beta) for stride in x.stride()[:2]]
    recurrent_kernel[(value_dim // block, sequences * v_heads)](
        q, k, v, gate, beta, A_log, dt_bias, initial_state, final_state, slots, cu_seqlens, output,
        scale, lower_bound or 0.0, tokens, *strides, heads, v_heads, key_dim, value_dim, block,
        0 if A_log is None else 1 if lower_bound is None else 2, normalize, cu_seqlens is not None,
        initial_state is not None, slots is not None, final_state.stride(0), num_warps=1, num_stages=1,
    )  # fmt: skip
    return output
