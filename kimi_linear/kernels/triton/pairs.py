"""How much each token of a chunk meets of each earlier one, and the triangular inverse: one program per chunk and head.

    M[r, i] = sum_k k_r k_i 2^(decay after i, up to r), i < r     N the same with q_r, and i <= r
    solve = (I + Diag(beta) M)^-1 Diag(beta)

Exponents are sums over the stretch between two tokens, so <= 0, level by level: with blocks of 1, 2, ... 32 tokens, a token
of a later half fades from the boundary to itself, one of the earlier half beside it from itself to the boundary. Levels
1 to 8, inside a tile of 16, are one product anchored at the tile's start while no channel forgets more than
2^-MAX_RANGE in a tile, for then 2^(-decay) stays finite. A slice of channels that forgets more takes all six levels.
The inverse climbs the same levels: X holds the inverses of the diagonal blocks, L the cells below; X <- X - X L X.

Levels are a run-time loop, so that their masks live no longer than a level: written out, they spill a kilobyte a thread.
Grid (chunks, HV). solve, pairs_q [chunks, HV, C, C]; norms [chunks, HV, 2, C] fp32, the scales of k and q rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_linear.kernels.triton.common import chunk_of, gate_slice, stretch_sum

MAX_RANGE = tl.constexpr(100.0)  # 2^100 times a product of rows stays far from fp32's 2^127


@triton.jit
def pairs_kernel(
    q, k, gate, beta, A_log, dt_bias, cu_seqlens, cu_chunks, solve, pairs_q, norms,
    scale, lower_bound, num_sequences, tokens, stride_q, stride_k, stride_g, stride_beta,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr,
    NORMALIZE: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = 64
    chunk, hv = tl.program_id(0), tl.program_id(1)
    h = hv // (HV // H)
    start, stop = chunk_of(chunk, cu_chunks, cu_seqlens, num_sequences, tokens, C, PACKED)
    if start >= stop:
        return
    row = tl.arange(0, C)
    token = start + row
    valid = token < stop
    r, c = row[:, None], row[None, :]
    keys, queries = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    square_k, square_q, straight = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    for part in range(K // BK):
        dim = part * BK + tl.arange(0, BK)
        b_k = tl.load(k + token[:, None] * stride_k + h * K + dim[None, :], valid[:, None], 0.0).to(tl.float32)
        b_q = tl.load(q + token[:, None] * stride_q + h * K + dim[None, :], valid[:, None], 0.0).to(tl.float32)
        square_k += tl.sum(b_k * b_k, 1)
        square_q += tl.sum(b_q * b_q, 1)
        straight += tl.sum(b_q * b_k, 1)
        g = gate_slice(gate, A_log, dt_bias, token, valid, hv, dim, stride_g, lower_bound, K, GATE)
        local = stretch_sum((r // 16 == c // 16) & (c <= r), g, DOT)
        first = 0
        if tl.min(local) > -MAX_RANGE:
            first = 4
            late = tl.exp2(local)
            early = tl.trans((b_k * tl.exp2(-local)).to(DOT))
            cells = (r // 16 == c // 16) & (r > c)
            keys += tl.where(cells, tl.dot((b_k * late).to(DOT), early, input_precision=PRECISION), 0.0)
            queries += tl.where(cells, tl.dot((b_q * late).to(DOT), early, input_precision=PRECISION), 0.0)
        for level in range(first, 6):
            block_r, block_c = r >> level, c >> level
            later = (block_r & 1) == 1
            stretch = (block_r == block_c) & ((later & (c <= r)) | (((block_r & 1) == 0) & (c > r)))
            factor = tl.exp2(stretch_sum(stretch, g, DOT))
            faded_k, faded_q = (b_k * factor).to(DOT), (b_q * factor).to(DOT)
            early = tl.trans(faded_k)
            cells = later & (block_r == block_c + 1)
            keys += tl.where(cells, tl.dot(faded_k, early, input_precision=PRECISION), 0.0)
            queries += tl.where(cells, tl.dot(faded_q, early, input_precision=PRECISION), 0.0)

    b_beta = tl.load(beta + token * stride_beta + hv, valid, 0.0).to(tl.float32)
    norm_k, norm_q = tl.full([C], 1.0, tl.float32), tl.full([C], 1.0, tl.float32)
    if NORMALIZE:
        norm_k, norm_q = tl.rsqrt(square_k + 1e-6), tl.rsqrt(square_q + 1e-6)
    norm_q *= scale
    at = (chunk.to(tl.int64) * HV + hv) * C
    cell = (at + row)[:, None] * C + row[None, :]
    queries = (queries + tl.where(r == c, straight[:, None], 0.0)) * norm_q[:, None] * norm_k[None, :]
    tl.store(pairs_q + cell, queries.to(pairs_q.dtype.element_ty))
    keys = keys * (norm_k * b_beta)[:, None] * norm_k[None, :]
    inverse = tl.where(r == c, 1.0, 0.0) - tl.where((r == c + 1) & (r % 2 == 1), keys, 0.0)
    for level in range(1, 6):
        below = tl.where(((r >> level) == (c >> level) + 1) & (((r >> level) & 1) == 1), keys, 0.0)
        step = tl.dot(inverse, below, input_precision=PRECISION)
        inverse -= tl.dot(step, inverse, input_precision=PRECISION)
    tl.store(solve + cell, (inverse * b_beta[None, :]).to(solve.dtype.element_ty))
    tl.store(norms + at * 2 + row, norm_k)
    tl.store(norms + at * 2 + C + row, norm_q)
