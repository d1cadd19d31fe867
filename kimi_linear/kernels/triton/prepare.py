"""Everything of a chunk that needs neither the state nor v: one program per chunk of 64 tokens and value head, all at once.

    pairs_k[r, i] = beta_r sum_k k_r k_i 2^(decay after i, up to r), i < r    pairs_q the same with q_r, no beta, and i <= r
    faded = k 2^P    read = scale q 2^P    write = k 2^(P_C - P)    decay = 2^(P_C)

P is the running log2-decay in the chunk. In the pairs, exponents are sums over the stretch between two tokens, so <= 0,
level by level: with blocks of 1, 2, ... 32 tokens, a token of a later block fades from the boundary to itself, one of the
block beside it from itself to the boundary. The levels 1 to 8, inside a tile of 16, are one product anchored at the
tile's start while no channel forgets more than 2^-MAX_RANGE in a tile, for then 2^(-decay) stays finite. A slice of
channels that forgets more takes all six levels.

Levels are a run-time loop, so that their masks live no longer than a level: written out, they spill a kilobyte a thread.
Grid (chunks, HV). Outputs lie chunk by chunk: faded, read, write [chunks, HV, C, K], pairs_k, pairs_q [chunks, HV, C, C],
decay [chunks, HV, K] fp32; with SAVE also norms [chunks, HV, 2, C] fp32, what the rows of k and of q were scaled by.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_linear.kernels.triton.common import (
    INTO,
    MAX_RANGE,
    TILE,
    chunk_log2_decay,
    chunk_of,
    load_gate,
    power2,
    split,
    stretch_sum,
    tile_sums,
)


@triton.jit(do_not_specialize=["num_sequences", "tokens"])
def prepare_kernel(
    q, k, gate, beta, A_log, dt_bias, cu_seqlens, cu_chunks, stretches, faded, read, write, pairs_k, pairs_q, decay, norms,
    scale, lower_bound, num_sequences, tokens, stride_q, stride_k, stride_g, stride_beta,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GATE: tl.constexpr, NORMALIZE: tl.constexpr, PACKED: tl.constexpr, SAVE: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = 64
    chunk, hv = tl.program_id(0), tl.program_id(1)
    h = hv // (HV // H)
    start, stop = chunk_of(chunk, cu_chunks, cu_seqlens, num_sequences, tokens, C, PACKED)
    if start >= stop:
        return
    # Bases are 64-bit scalars, so that offsets inside the chunk are 32-bit: half the registers.
    at = chunk.to(tl.int64) * HV + hv
    q, k = q + start * stride_q + h * K, k + start * stride_k + h * K
    gate, beta = gate + start * stride_g + hv * K, beta + start * stride_beta + hv
    faded, read, write = faded + at * C * K, read + at * C * K, write + at * C * K
    pairs_k, pairs_q, decay = pairs_k + at * C * C, pairs_q + at * C * C, decay + at * K
    amount = 0.0
    if GATE != 0:
        amount = tl.exp2(tl.load(A_log + hv).to(tl.float32) * 1.4426950408889634)
        dt_bias += hv * K
    row = tl.arange(0, C)
    valid = row < (stop - start).to(tl.int32)
    r, c = row[:, None], row[None, :]
    cell = r * C + c

    square_k, square_q, same = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    for part in range(K // BN):
        dim = part * BN + tl.arange(0, BN)
        b_k = tl.load(k + r * stride_k + dim[None, :], valid[:, None], 0.0).to(tl.float32)
        b_q = tl.load(q + r * stride_q + dim[None, :], valid[:, None], 0.0).to(tl.float32)
        square_k += tl.sum(b_k * b_k, 1)
        square_q += tl.sum(b_q * b_q, 1)
        same += tl.sum(b_q * b_k, 1)
    norm_k, norm_q = tl.full([C], 1.0, tl.float32), tl.full([C], 1.0, tl.float32)
    if NORMALIZE:
        norm_k, norm_q = tl.rsqrt(square_k + 1e-6), tl.rsqrt(square_q + 1e-6)
    norm_q *= scale
    same *= norm_k * norm_q

    keys, queries = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for part in range(K // BK):
        dim = part * BK + tl.arange(0, BK)
        out = r * K + dim[None, :]
        b_k = tl.load(k + r * stride_k + dim[None, :], valid[:, None], 0.0).to(tl.float32)
        b_q = tl.load(q + r * stride_q + dim[None, :], valid[:, None], 0.0).to(tl.float32)
        b_k, b_q = (b_k * norm_k[:, None]).to(DOT), (b_q * norm_q[:, None]).to(DOT)
        g = chunk_log2_decay(load_gate(gate, dt_bias, row, valid, dim, stride_g, GATE), amount, lower_bound, GATE, DOT)
        g = tl.where(valid[:, None], g, 0.0)
        high, low = split(g, DOT)
        total, range_16 = tile_sums(high, low, BK, DOT)
        tl.store(decay + dim, power2(total, DOT))
        sums = stretch_sum(tl.load(stretches + INTO * C * C + cell), high, low, DOT)
        into = power2(sums, DOT)
        tl.store(read + out, (b_q * into).to(DOT))
        tl.store(faded + out, (b_k * into).to(DOT))
        tl.store(write + out, (b_k * power2(total[None, :] - sums, DOT)).to(DOT))
        first, last = 0, TILE
        if range_16 > -MAX_RANGE:
            first, last = 4, TILE + 1
        for level in range(first, last):
            below, within, sign = level, level + 1, 1.0
            if level == TILE:
                below, within, sign = 0, 4, -1.0
            span = stretch_sum(tl.load(stretches + level * C * C + cell), high, low, DOT)
            late = power2(span, DOT)
            early = tl.trans((b_k * power2(span * sign, DOT)).to(DOT))
            cells = ((r >> within) == (c >> within)) & ((r >> below) > (c >> below))
            keys += tl.where(cells, tl.dot((b_k * late).to(DOT), early, input_precision=PRECISION), 0.0)
            queries += tl.where(cells, tl.dot((b_q * late).to(DOT), early, input_precision=PRECISION), 0.0)
    queries += tl.where(r == c, same[:, None], 0.0)
    tl.store(pairs_q + cell, queries.to(DOT))

    b_beta = tl.load(beta + row * stride_beta, valid, 0.0).to(tl.float32)
    tl.store(pairs_k + cell, (keys * b_beta[:, None]).to(pairs_k.dtype.element_ty))
    if SAVE:
        tl.store(norms + at * 2 * C + row, norm_k)
        tl.store(norms + (at * 2 + 1) * C + row, norm_q)
