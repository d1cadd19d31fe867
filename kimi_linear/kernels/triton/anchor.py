"""What the gate makes of q and k in a chunk that one anchor serves, for the backward: one program per tile of 16 tokens.

    late_q = q 2^(P - a)    late_k = beta k 2^(P - a)    early = k 2^(a - P)    a = P_C / 2

P is the running log2-decay in the chunk, a lies in the middle of it: no exponent is beyond WIDEST / 2, so that all pairs of the
chunk are products of these, and so are the chunk's reads, erasures and writes of the state. A chunk with a channel that forgets
more, or with a steep one, is left to pair_backward.py: ``served`` [chunks, HV] int32 is 0 there, 1 elsewhere.

No product, as in prepare.py, whose totals give P at each tile's start. Grid (4 * chunks, HV). All three [chunks, HV, C, K].
"""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_linear.kernels.triton.common import chunk_log2_decay, chunk_of, power2


@triton.jit
def one_serves(totals, flags, K: tl.constexpr, DOT: tl.constexpr):
    """Whether one anchor serves every channel of a chunk."""
    WIDEST: tl.constexpr = 60.0 if DOT == tl.float32 else 220.0
    dim = tl.arange(0, K)
    whole = tl.zeros([K], tl.float32)
    for tile in tl.static_range(4):
        whole += tl.load(totals + tile * K + dim)
    steep = tl.max(tl.load(flags + tl.arange(0, 4)), 0) > 0
    return (tl.min(whole, 0) >= -WIDEST) & (steep == 0)


@triton.jit
def since_anchor(g, totals, tile, dim, K: tl.constexpr):
    """P - a [16, K] of the log-decays g of a tile, given the totals [4, K] of its chunk."""
    before, whole = tl.zeros(dim.shape, tl.float32), tl.zeros(dim.shape, tl.float32)
    for other in tl.static_range(4):
        total = tl.load(totals + other * K + dim)
        before += tl.where(other < tile, total, 0.0)
        whole += total
    return tl.cumsum(g, 0) + (before - 0.5 * whole)[None, :]


@triton.jit(do_not_specialize=["num_sequences", "tokens", "first_chunk"])
def anchor_kernel(
    q, k, gate, beta, A_log, dt_bias, cu_seqlens, cu_chunks, totals, flags, norms, served, late_q, late_k, early,
    lower_bound, num_sequences, tokens, first_chunk, stride_q, stride_k, stride_g, stride_beta,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = 64
    place, tile, hv = tl.program_id(0) // 4, tl.program_id(0) % 4, tl.program_id(1)
    chunk = first_chunk + place
    h = hv // (HV // H)
    start, stop = chunk_of(chunk, cu_chunks, cu_seqlens, num_sequences, tokens, C, PACKED)
    if start >= stop:
        return
    at = chunk.to(tl.int64) * HV + hv
    totals += at * 4 * K
    mine = one_serves(totals, flags + at * 4, K, DOT)
    if tile == 0:
        tl.store(served + at, mine.to(tl.int32))
    if mine == 0:
        return
    start += tile * 16
    row, dim = tl.arange(0, 16), tl.arange(0, K)
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
    p = since_anchor(tl.where(inside, chunk_log2_decay(x, amount, lower_bound, GATE, DOT), 0.0), totals, tile, dim, K)
    up = power2(p, DOT)
    rows = (place.to(tl.int64) * HV + hv) * C * K + (tile * 16 + r) * K + d
    tl.store(late_q + rows, (b_q * norm_q[:, None] * up).to(DOT))
    tl.store(late_k + rows, (b_k * (norm_k * b_beta)[:, None] * up).to(DOT))
    tl.store(early + rows, (b_k * norm_k[:, None] * power2(-p, DOT)).to(DOT))
