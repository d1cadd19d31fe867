"""What the gate makes of q and k inside a tile of 16 tokens: one program per tile and value head.

    late = q 2^(p - a), k 2^(p - a)    early = k 2^(a - p)    totals = p at the tile's end    anchors = a

p is the running log2-decay from the tile's start, a the anchor of each channel: 0, so that what a token holds depends on the
tokens before it alone, while the channel forgets at most 2^-MAX_RANGE in the tile; where it forgets more, p at the last token
that is not below -DEEPEST (for fp32 less, as common.py says). A channel that forgets more than 2^-MAX_RANGE from there on too is steep: there a = 0 and
early = k 2^(total - p), faded to the tile's end, ``anchors`` holds STEEP, and the pairs inside the tile are left to steep.py.

No product: everything stays in the layout of the loads, with few registers, and many programs hide the memory's latency.
Grid (4 * chunks, HV). Outputs lie chunk by chunk: late [2, chunks, HV, C, K] (q times scale, then k), early [chunks, HV, C, K],
anchors, totals [chunks, HV, 4, K] fp32, flags [chunks, HV, 4] int32, a bit for every G channels
of a tile, set where one of them is steep; with SAVE also norms
[chunks, HV, 2, C] fp32, what the rows of k and of q were scaled by.
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


@triton.jit(do_not_specialize=["num_sequences", "tokens"])
def prepare_kernel(
    q, k, gate, A_log, dt_bias, cu_seqlens, cu_chunks, late, early, anchors, totals, flags, norms,
    scale, lower_bound, num_sequences, tokens, size, stride_q, stride_k, stride_g,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
    GATE: tl.constexpr, NORMALIZE: tl.constexpr, PACKED: tl.constexpr, SAVE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = 64
    chunk, tile, hv = tl.program_id(0) // 4, tl.program_id(0) % 4, tl.program_id(1)
    h = hv // (HV // H)
    start, stop = chunk_of(chunk, cu_chunks, cu_seqlens, num_sequences, tokens, C, PACKED)
    if start >= stop:
        return
    # Bases are 64-bit scalars, so that offsets inside the tile are 32-bit: half the registers.
    at = chunk.to(tl.int64) * HV + hv
    start += tile * 16
    row, dim = tl.arange(0, 16), tl.arange(0, K)
    r, d = row[:, None], dim[None, :]
    # A tile past the end is zeros: the scan reads whole chunks.
    inside = (row < (stop - start).to(tl.int32))[:, None]
    b_k = tl.load(k + start * stride_k + h * K + r * stride_k + d, inside, 0.0).to(tl.float32)
    b_q = tl.load(q + start * stride_q + h * K + r * stride_q + d, inside, 0.0).to(tl.float32)
    x = tl.load(gate + start * stride_g + hv * K + r * stride_g + d, inside, 0.0).to(tl.float32)
    amount = 0.0
    if GATE != 0:
        amount = tl.exp2(tl.load(A_log + hv).to(tl.float32) * 1.4426950408889634)
        x += tl.load(dt_bias + hv * K + dim).to(tl.float32)[None, :]
    g = tl.where(inside, chunk_log2_decay(x, amount, lower_bound, GATE, DOT), 0.0)
    p, total = tl.cumsum(g, 0), tl.sum(g, 0)
    if DOT == tl.float32:  # summed in another order it would be off by a rounding of hundreds
        total = tl.sum(tl.where(r == 15, p, 0.0), 0)
    widest: tl.constexpr = MAX_RANGE_FP32 if DOT == tl.float32 else MAX_RANGE
    deepest: tl.constexpr = DEEPEST_FP32 if DOT == tl.float32 else DEEPEST
    anchor = tl.where(total >= -widest, 0.0, tl.min(tl.where(p >= -deepest, p, 0.0), 0))
    steep = total - anchor < -widest
    anchor = tl.where(steep, 0.0, anchor)
    into, out = power2(p - anchor[None, :], DOT), power2(tl.where(steep, total, anchor)[None, :] - p, DOT)
    norm_k, norm_q = tl.full([16], 1.0, tl.float32), tl.full([16], 1.0, tl.float32)
    if NORMALIZE:
        norm_k, norm_q = tl.rsqrt(tl.sum(b_k * b_k, 1) + 1e-6), tl.rsqrt(tl.sum(b_q * b_q, 1) + 1e-6)
    norm_q *= scale
    b_k *= norm_k[:, None]
    rows = at * C * K + tile * 16 * K + r * K + d
    tl.store(late + rows, (b_q * norm_q[:, None] * into).to(DOT))
    tl.store(late + size + rows, (b_k * into).to(DOT))
    tl.store(early + rows, (b_k * out).to(DOT))
    place = (at * 4 + tile) * K + dim
    tl.store(totals + place, total)
    tl.store(anchors + place, tl.where(steep, STEEP, anchor))
    groups = tl.max(tl.reshape(steep.to(tl.int32), [K // G, G]), 1)
    tl.store(flags + at * 4 + tile, tl.sum(groups << tl.arange(0, K // G), 0))
    if SAVE:
        tl.store(norms + at * 2 * C + tile * 16 + row, norm_k)
        tl.store(norms + (at * 2 + 1) * C + tile * 16 + row, norm_q)
