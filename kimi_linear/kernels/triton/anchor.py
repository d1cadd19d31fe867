"""What the gate makes of q and k in a chunk, for the backward: one program per tile of 16 tokens and value head.

    late_q = q 2^(P - a)    late_k = beta k 2^(P - a)    early = k 2^(a - P)

P is the running log2-decay in the chunk. Where no channel of the chunk forgets more than 2^-WIDEST, and none is steep, one anchor
serves (``served``, of prepare.py): a = P_C / 2 lies in the middle, no exponent is beyond WIDEST / 2, and all pairs of the chunk are
products of these. Elsewhere the anchors are those of prepare.py, tile by tile, where a steep channel's early is faded to the tile's end.

``factors`` [chunks, HV, 7, 4, K] fp32 says of each tile what becomes of them further off. late times factors[0] reads the state
at the chunk's start. early times factors[1], which is 0 where the tile is steep, meets late in its own tile; times factors[2] it has faded
to the tile's end, and with factors[3] after that to the chunk's, with factors[3 + n] to the anchor of the n-th tile after its own. One
after the other, for their product may be too small for fp32 where early is large. Not written where one anchor serves.

No product, as in prepare.py, whose totals give P at each tile's start. Grid (4 * chunks, HV). All three [chunks, HV, C, K].
"""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_linear.kernels.triton.common import STEEP, chunk_log2_decay, chunk_of, power2


@triton.jit
def since_anchor(g, anchors, totals, tile, one, dim, K: tl.constexpr):
    """Exponents (of late, of early) [16, K] of a tile with log-decays g, given anchors and totals [4, K] of its chunk."""
    before, whole = tl.zeros(dim.shape, tl.float32), tl.zeros(dim.shape, tl.float32)
    for other in tl.static_range(4):
        total = tl.load(totals + other * K + dim)
        before += tl.where(other < tile, total, 0.0)
        whole += total
    anchor = tl.load(anchors + tile * K + dim)
    p = tl.cumsum(g, 0)
    steep = (anchor == STEEP) & (one == 0)
    late = p + tl.where(one, before - 0.5 * whole, -tl.minimum(anchor, 0.0))[None, :]
    return late, tl.where(steep, tl.load(totals + tile * K + dim), 0.0)[None, :] - late


@triton.jit
def store_factors(factors, anchors, totals, tile, dim, K: tl.constexpr, DOT: tl.constexpr):
    """Those of one tile."""
    before, after, between = (
        tl.zeros(dim.shape, tl.float32),
        tl.zeros(dim.shape, tl.float32),
        tl.zeros(dim.shape, tl.float32),
    )
    for other in tl.static_range(4):
        total = tl.load(totals + other * K + dim)
        before += tl.where(other < tile, total, 0.0)
        after += tl.where(other > tile, total, 0.0)
    total, anchor, place = tl.load(totals + tile * K + dim), tl.load(anchors + tile * K + dim), tile * K + dim
    flat = anchor < STEEP
    tl.store(factors + place, power2(before + tl.minimum(anchor, 0.0), DOT))
    tl.store(factors + 4 * K + place, tl.where(flat, 1.0, 0.0))
    tl.store(factors + 8 * K + place, power2(tl.where(flat, total - anchor, 0.0), DOT))
    tl.store(factors + 12 * K + place, power2(after, DOT))
    for distance in tl.static_range(1, 4):
        later = tl.minimum(tile + distance, 3) * K + dim
        to_anchor = power2(between + tl.minimum(tl.load(anchors + later), 0.0), DOT)
        tl.store(factors + (3 + distance) * 4 * K + place, tl.where(tile + distance < 4, to_anchor, 0.0))
        between += tl.load(totals + later)


@triton.jit(do_not_specialize=["num_sequences", "tokens", "first_chunk"])
def anchor_kernel(
    q, k, gate, beta, A_log, dt_bias, cu_seqlens, cu_chunks, anchors, totals, norms, served, late_q, late_k, early,
    factors, lower_bound, num_sequences, tokens, first_chunk, stride_q, stride_k, stride_g, stride_beta,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = 64
    place, tile, hv = tl.program_id(0) // 4, tl.program_id(0) % 4, tl.program_id(1)
    chunk = first_chunk + place
    h = hv // (HV // H)
    start, stop = chunk_of(chunk, cu_chunks, cu_seqlens, num_sequences, tokens, C, PACKED)
    if start >= stop:
        return
    at, here = chunk.to(tl.int64) * HV + hv, place.to(tl.int64) * HV + hv
    anchors, totals = anchors + at * 4 * K, totals + at * 4 * K
    row, dim = tl.arange(0, 16), tl.arange(0, K)
    one = tl.load(served + at) > 0
    if one == 0:
        store_factors(factors + here * 28 * K, anchors, totals, tile, dim, K, DOT)
    start += tile * 16
    r, d = row[:, None], dim[None, :]
    valid = row < (stop - start).to(tl.int32)
    inside = valid[:, None]
    b_k = tl.load(k + start * stride_k + h * K + r * stride_k + d, inside, 0.0).to(tl.float32)
    b_q = tl.load(q + start * stride_q + h * K + r * stride_q + d, inside, 0.0).to(tl.float32)
    x = tl.load(gate + start * stride_g + hv * K + r * stride_g + d, inside, 0.0).to(tl.float32)
    b_beta = tl.load(beta + start * stride_beta + hv + row * stride_beta, valid, 0.0).to(tl.float32)
    norm = norms + at * 2 * C + tile * 16 + row
    norm_k, norm_q = tl.load(norm), tl.load(norm + C)
    amount = 0.0
    if GATE != 0:
        amount = tl.exp2(tl.load(A_log + hv).to(tl.float32) * 1.4426950408889634)
        x += tl.load(dt_bias + hv * K + dim).to(tl.float32)[None, :]
    g = tl.where(inside, chunk_log2_decay(x, amount, lower_bound, GATE, DOT), 0.0)
    up, down = since_anchor(g, anchors, totals, tile, one, dim, K)
    up, down = power2(up, DOT), power2(down, DOT)
    rows = here * C * K + (tile * 16 + r) * K + d
    tl.store(late_q + rows, (b_q * norm_q[:, None] * up).to(DOT))
    tl.store(late_k + rows, (b_k * (norm_k * b_beta)[:, None] * up).to(DOT))
    tl.store(early + rows, (b_k * norm_k[:, None] * down).to(DOT))
