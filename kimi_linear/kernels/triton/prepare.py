"""What the gate makes of q and k, and the pairs of tokens: one program per chunk and value head, tile after tile of 16 tokens.

    read = scale q 2^P    keys = k 2^P    write = k 2^(P_C - P)    decay = 2^(P_C)
    pairs_q[r, i] = sum_k scale q_r k_i 2^(P_r - P_i), i <= r    pairs_k the same with k_r, and i < r

P is the running log2-decay in the chunk, p the same from the tile's start. Rows of a tile meet the keys of each tile before it
faded to its own start, so every exponent is <= 0; keys wait in ``write``, faded to the end of their tile, and take one factor
more for every tile that follows. Inside a tile

    late = q 2^(p - a), k 2^(p - a)    early = k 2^(a - p)

where a is the anchor of each channel: 0, so that what a token holds depends on the tokens before it alone, while the channel
forgets at most 2^-MAX_RANGE in the tile; where it forgets more, p at the last token that is not below -DEEPEST (for fp32 less,
as common.py says). A channel that forgets more than 2^-MAX_RANGE from there on too is steep: there a = 0, ``anchors`` holds
STEEP, and the pairs inside the tile are left to steep.py.

The running sum stays in the layout of the loads, and the next tile's q, k and gate are on their way while one is at work. Slices
of BK channels are for fp32: products of whole rows, in three terms, would spill. Two warps at most where a row is one slice:
what belongs to channels, each warp does for itself.
Grid (chunks, HV). Outputs lie chunk by chunk: late [2, chunks, HV, C, K] (read, then keys), write [chunks, HV, C, K], pairs_q,
pairs_k [chunks, HV, C, C] (pairs_k below its diagonal only), decay [chunks, HV, K] fp32; for steep.py and the backward anchors,
totals (p at the tile's end) [chunks, HV, 4, K] fp32, flags [chunks, HV, 4] int32, a bit for every G channels of a tile, set
where one of them is steep; with SAVE also norms [chunks, HV, 2, C] fp32, what the rows of k and of q were scaled by. With
FORGETS ``forgets`` [chunks, HV] fp32, for segments.py: the sum over tokens of the slowest channel's log2-decay, a bound of the
chunk's log2-norm as a map of states, if solve.py agrees.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_linear.kernels.triton.common import (
    DEEPEST,
    DEEPEST_FP32,
    MAX_RANGE,
    MAX_RANGE_FP32,
    STEEP,
    G,
    chunk_log2_decay,
    chunk_of,
    power2,
)


@triton.jit
def tile_pairs(
    q, k, gate, dt_bias, late, write, anchors, totals, norm_k, norm_q, pairs_q, pairs_k, tile, part, left, amount, lower_bound,
    scale, size, stride_q, stride_k, stride_g, K: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr, NORMALIZE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile and slice of channels: (pairs_q, pairs_k, norm_k, norm_q, flags of the slice's groups, its slowest channels [16]).

    ``pairs_q``, ``pairs_k``: [16, 16] each, with the tile itself, with the one before, and so on; the slice's share is added.
    ``norm_k``, ``norm_q`` [16] are found here where the slice is the whole of a row.
    """
    row, dim = tl.arange(0, 16), part * BK + tl.arange(0, BK)
    r, d, token = row[:, None], dim[None, :], tile * 16 + row[:, None]
    # A tile past the end is zeros, and forgets nothing: the scan reads whole chunks.
    inside = token < left
    x = tl.load(gate + token * stride_g + d, inside, 0.0).to(tl.float32)
    if GATE != 0:
        x += tl.load(dt_bias + dim).to(tl.float32)[None, :]
    g = chunk_log2_decay(x, tl.where(inside, amount, 0.0), tl.where(inside, lower_bound, 0.0), GATE, DOT)
    slowest = tl.max(g, 1)
    p, total = tl.cumsum(g, 0), tl.sum(g, 0)
    if DOT == tl.float32:  # summed in another order it would be off by a rounding of hundreds
        total = tl.sum(tl.where(r == 15, p, 0.0), 0)
    widest: tl.constexpr = MAX_RANGE_FP32 if DOT == tl.float32 else MAX_RANGE
    deepest: tl.constexpr = DEEPEST_FP32 if DOT == tl.float32 else DEEPEST
    anchor, steep, groups = tl.zeros([BK], tl.float32), tl.zeros([BK], tl.int1), 0
    if tl.min(total, 0) < -widest:
        anchor = tl.where(total >= -widest, 0.0, tl.min(tl.where(p >= -deepest, p, 0.0), 0))
        steep = total - anchor < -widest
        anchor = tl.where(steep, 0.0, anchor)
        group = tl.max(tl.reshape(steep.to(tl.int32), [BK // G, G]), 1)
        groups = tl.sum(group << (part * (BK // G) + tl.arange(0, BK // G)), 0)
    before = tl.zeros([BK], tl.float32)
    for earlier in tl.static_range(3):
        before += tl.load(totals + earlier * K + dim, (dim < K) & (earlier < tile), 0.0)
    tl.store(totals + tile * K + dim, total)
    tl.store(anchors + tile * K + dim, tl.where(steep, STEEP, anchor))
    into, from_start = power2(p - anchor[None, :], DOT), power2(before + anchor, DOT)[None, :]
    rows = token * K + d
    b_k = tl.load(k + token * stride_k + d, inside, 0.0).to(tl.float32)
    if NORMALIZE and K == BK:
        norm_k = tl.rsqrt(tl.sum(b_k * b_k, 1) + 1e-6)
    b_k *= norm_k[:, None]
    early = b_k * power2(tl.where(steep, total, anchor)[None, :] - p, DOT)
    to_end = tl.where(steep, 1.0, power2(total - anchor, DOT))
    tl.store(write + rows, (early * to_end[None, :]).to(DOT))
    columns = early.to(DOT)
    if groups > 0:
        columns = tl.where(steep[None, :], 0.0, early).to(DOT)
    columns = tl.trans(columns)
    late_k = b_k * into
    tl.store(late + size + rows, (late_k * from_start).to(DOT))
    low_k = late_k.to(DOT)
    b_q = tl.load(q + token * stride_q + d, inside, 0.0).to(tl.float32)
    if NORMALIZE and K == BK:
        norm_q = tl.rsqrt(tl.sum(b_q * b_q, 1) + 1e-6) * scale
    late_q = b_q * (norm_q[:, None] * into)
    tl.store(late + rows, (late_q * from_start).to(DOT))
    low_q = late_q.to(DOT)
    found_q = (tl.dot(low_q, columns, pairs_q[0], input_precision=PRECISION),)
    found_k = (tl.dot(low_k, columns, pairs_k[0], input_precision=PRECISION),)
    # Keys of the tiles before, faded to this one's start, and to its anchors. What other threads have stored of them is there:
    # the products above have barriers, and a barrier said outright would keep the next tile's loads from running ahead.
    fading = anchor
    for back in tl.static_range(3):
        of_q, of_k = pairs_q[back + 1], pairs_k[back + 1]
        if back < tile:
            faded = tl.load(write + ((tile - 1 - back) * 16 + r) * K + d).to(tl.float32) * power2(fading, DOT)[None, :]
            columns = tl.trans(faded.to(DOT))
            of_q = tl.dot(low_q, columns, of_q, input_precision=PRECISION)
            of_k = tl.dot(low_k, columns, of_k, input_precision=PRECISION)
            fading += tl.load(totals + (tile - 1 - back) * K + dim)
        found_q += (of_q,)
        found_k += (of_k,)
    return found_q, found_k, norm_k, norm_q, groups, slowest


@triton.jit(do_not_specialize=["num_sequences", "tokens"])
def prepare_kernel(
    q, k, gate, A_log, dt_bias, cu_seqlens, cu_chunks, late, write, pairs_q, pairs_k, decay, forgets, anchors, totals, flags, norms,
    scale, lower_bound, num_sequences, tokens, size, stride_q, stride_k, stride_g,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr, NORMALIZE: tl.constexpr, PACKED: tl.constexpr,
    BK: tl.constexpr, SAVE: tl.constexpr, FORGETS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = 64
    chunk, hv = tl.program_id(0), tl.program_id(1)
    h = hv // (HV // H)
    start, stop = chunk_of(chunk, cu_chunks, cu_seqlens, num_sequences, tokens, C, PACKED)
    if start >= stop:
        return
    # Bases are 64-bit scalars, so that offsets inside the chunk are 32-bit: half the registers.
    at = chunk.to(tl.int64) * HV + hv
    left = (stop - start).to(tl.int32)
    q, k, gate = q + start * stride_q + h * K, k + start * stride_k + h * K, gate + start * stride_g + hv * K
    late, write, pairs_q, pairs_k = late + at * C * K, write + at * C * K, pairs_q + at * C * C, pairs_k + at * C * C
    anchors, totals = anchors + at * 4 * K, totals + at * 4 * K
    if SAVE:
        norms += at * 2 * C
    row = tl.arange(0, 16)
    r, c = row[:, None], row[None, :]
    amount = 0.0
    if GATE != 0:
        amount = tl.exp2(tl.load(A_log + hv).to(tl.float32) * 1.4426950408889634)
        dt_bias += hv * K
    bits = 0.0
    for tile in tl.range(4, num_stages=STAGES):
        token = tile * 16 + r
        none = tl.zeros([16, 16], tl.float32)
        of_q, of_k = (none, none, none, none), (none, none, none, none)
        norm_k, norm_q = tl.full([16], 1.0, tl.float32), tl.full([16], 1.0, tl.float32) * scale
        if K == BK:
            of_q, of_k, norm_k, norm_q, groups, slowest = tile_pairs(
                q, k, gate, dt_bias, late, write, anchors, totals, norm_k, norm_q, of_q, of_k, tile, 0, left, amount, lower_bound,
                scale, size, stride_q, stride_k, stride_g, K, BK, GATE, NORMALIZE, DOT, PRECISION,
            )  # fmt: skip
        else:
            groups, slowest = 0, tl.full([16], float("-inf"), tl.float32)
            if NORMALIZE:
                whole = tl.arange(0, K)[None, :]
                x = tl.load(k + token * stride_k + whole, token < left, 0.0).to(tl.float32)
                norm_k = tl.rsqrt(tl.sum(x * x, 1) + 1e-6)
                x = tl.load(q + token * stride_q + whole, token < left, 0.0).to(tl.float32)
                norm_q = tl.rsqrt(tl.sum(x * x, 1) + 1e-6) * scale
            for part in range(K // BK):
                of_q, of_k, _, _, some, slow = tile_pairs(
                    q, k, gate, dt_bias, late, write, anchors, totals, norm_k, norm_q, of_q, of_k, tile, part, left,
                    amount, lower_bound, scale, size, stride_q, stride_k, stride_g, K, BK, GATE,
                    NORMALIZE, DOT, PRECISION,
                )  # fmt: skip
                groups = groups | some
                slowest = tl.maximum(slowest, slow)
        tl.store(flags + at * 4 + tile, groups)
        bits += tl.sum(slowest, 0)
        if SAVE:
            tl.store(norms + tile * 16 + row, norm_k)
            tl.store(norms + C + tile * 16 + row, norm_q)
        tl.store(pairs_q + token * C + tile * 16 + c, tl.where(r >= c, of_q[0], 0.0).to(DOT))
        tl.store(pairs_k + token * C + tile * 16 + c, of_k[0].to(pairs_k.dtype.element_ty), r > c)
        for back in tl.static_range(3):
            other = tile - 1 - back
            cell, there = token * C + other * 16 + c, (r >= 0) & (other >= 0)
            tl.store(pairs_q + cell, of_q[back + 1].to(DOT), there)
            tl.store(pairs_k + cell, of_k[back + 1].to(pairs_k.dtype.element_ty), there)
            other = tile + 1 + back
            tl.store(pairs_q + token * C + other * 16 + c, tl.zeros([16, 16], DOT), (r >= 0) & (other < 4))
    if FORGETS:
        tl.store(forgets + at, bits)
    tl.debug_barrier()
    for part in range(K // BK):
        dim = part * BK + tl.arange(0, BK)
        after = tl.load(totals + 3 * K + dim)
        for back in range(3):
            rows = ((2 - back) * 16 + r) * K + dim[None, :]
            tl.store(write + rows, (tl.load(write + rows).to(tl.float32) * power2(after, DOT)[None, :]).to(DOT))
            after += tl.load(totals + (2 - back) * K + dim)
        tl.store(decay + at * K + dim, power2(after, DOT))
