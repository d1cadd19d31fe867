"""Pairs of tokens, the triangular inverse, and what it is applied to: one program per chunk and value head.

    pairs_k[r, i] = beta_r sum_k k_r k_i 2^(decay after i, up to r), i < r    pairs_q the same with q_r, no beta, and i <= r
    A = (I + pairs_k)^-1    erase = A Diag(beta) k 2^P    u = A Diag(beta) v    read = scale q 2^P    write = k 2^(P_C - P)

P is the running log2-decay in the chunk. Pairs go by the distance between the tiles of their tokens, one product for each
of 0, 1, 2 and 3: ``late`` of prepare.py, anchored in the later token's tile, times the keys faded to that tile's anchor, which
for one tile more is one factor more, the total of the tile between. So every exponent is <= 0, except inside a tile, where
prepare.py has measured it; the pairs inside steep tiles come from steep.py. Distances at which nothing is left to tell are left out.

A level by level: X holds the inverses of the diagonal blocks of 1, 2, ... 32 tokens, L the cells of pairs_k that join two of
them; X <- X - X L X. Repeated squaring of pairs_k would lose its precision at real gates.

Slices are 64 wide even where K or V is 32: with 32 columns the products came out wrong on an H200 (Triton 3.6.0).
Grid (chunks, HV). ``late`` [2, chunks, HV, C, K] is overwritten by read and erase, ``early``
[chunks, HV, C, K] by write; u [chunks, HV, C, V], pairs_q [chunks, HV, C, C], decay = 2^(P_C) [chunks, HV, K] fp32; with SAVE also inverse (A) [chunks, HV, C, C].
"""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_linear.kernels.triton.common import STEEP, chunk_of, power2


@triton.jit
def from_anchor(anchors, totals, dim, inside, DOT: tl.constexpr):
    """(what ``early`` has to fade by until the tile's end, whether not steep) at offsets into anchors and totals."""
    anchor, total = tl.load(anchors + dim, inside, 0.0), tl.load(totals + dim, inside, 0.0)
    flat = anchor < STEEP
    return tl.where(flat, power2(total - anchor, DOT), 1.0), flat


@triton.jit(do_not_specialize=["num_sequences", "tokens"])
def solve_kernel(
    v, beta, cu_seqlens, cu_chunks, anchors, totals, flags, reaches, steep, late, early, pairs_q, u, decay, inverse,
    num_sequences, tokens, size, stride_v, stride_beta, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, SAVE: tl.constexpr, CELLS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = 64
    chunk, hv = tl.program_id(0), tl.program_id(1)
    start, stop = chunk_of(chunk, cu_chunks, cu_seqlens, num_sequences, tokens, C, PACKED)
    if start >= stop:
        return
    at = chunk.to(tl.int64) * HV + hv
    v, beta = v + start * stride_v + hv * V, beta + start * stride_beta + hv
    anchors, totals, steep = anchors + at * 4 * K, totals + at * 4 * K, steep + at * 2 * C * 16
    read, early, u = late + at * C * K, early + at * C * K, u + at * C * V
    erase = read + size
    row = tl.arange(0, C)
    r, c = row[:, None], row[None, :]
    cell, tile = r * C + c, r // 16
    apart = tile - c // 16
    far = tl.minimum(tl.maximum(tl.load(reaches + at), 2), 4)  # said so that the loop spills nothing
    queries, keys = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for part in range(tl.cdiv(K, BP)):
        channel = part * BP + tl.arange(0, BP)
        dim = channel[None, :]
        inside = dim < K
        late_q, late_k = tl.load(read + r * K + dim, inside, 0.0), tl.load(erase + r * K + dim, inside, 0.0)
        faded = tl.load(early + r * K + dim, inside, 0.0).to(tl.float32)
        to_end, flat = from_anchor(anchors, totals, tile * K + dim, inside, DOT)
        # Inside a tile, then to the end of the own tile, then through one tile more after the other.
        columns = tl.trans(tl.where(flat, faded, 0.0).to(DOT))
        queries += tl.where(apart == 0, tl.dot(late_q, columns, input_precision=PRECISION), 0.0)
        keys += tl.where(apart == 0, tl.dot(late_k, columns, input_precision=PRECISION), 0.0)
        faded *= to_end
        for distance in range(1, far):
            later = tile + distance
            there = inside & (later < 4)
            anchor = tl.minimum(tl.load(anchors + later * K + dim, there, 0.0), 0.0)
            columns = tl.trans((faded * power2(anchor, DOT)).to(DOT))
            queries += tl.where(apart == distance, tl.dot(late_q, columns, input_precision=PRECISION), 0.0)
            keys += tl.where(apart == distance, tl.dot(late_k, columns, input_precision=PRECISION), 0.0)
            faded *= power2(tl.load(totals + later * K + dim, there, 0.0), DOT)
    if tl.max(tl.load(flags + at * 4 + tl.arange(0, 4)), 0) > 0:
        queries += tl.load(steep + r * 16 + c % 16, apart == 0, 0.0)
        keys += tl.load(steep + C * 16 + r * 16 + c % 16, apart == 0, 0.0)
    tl.store(pairs_q + at * C * C + cell, tl.where(r >= c, queries, 0.0).to(DOT))

    valid = row < (stop - start).to(tl.int32)
    b_beta = tl.load(beta + row * stride_beta, valid, 0.0).to(tl.float32)
    dim_v = tl.arange(0, BV)[None, :]
    if BV >= V:  # asked for before the inverse, whose products wait for each other: it arrives meanwhile
        b_v = tl.load(v + r * stride_v + dim_v, valid[:, None] & (dim_v < V), 0.0).to(DOT)
    cells = tl.where(r > c, keys * b_beta[:, None], 0.0).to(CELLS)
    solve = tl.where(r == c, 1.0, 0.0) - tl.where((r == c + 1) & (r % 2 == 1), cells.to(tl.float32), 0.0)
    for level in range(1, 6):
        beside = tl.where(((r >> level) == (c >> level) + 1) & (((r >> level) & 1) == 1), cells, 0.0).to(CELLS)
        blocks = solve.to(CELLS)
        step = tl.dot(blocks, beside, input_precision=PRECISION)
        solve -= tl.dot(step.to(CELLS), blocks, input_precision=PRECISION)
    if SAVE:
        tl.store(inverse + at * C * C + cell, solve.to(DOT))
    right = (solve * b_beta[None, :]).to(DOT)
    if BV >= V:
        tl.store(u + r * V + dim_v, tl.dot(right, b_v, input_precision=PRECISION).to(DOT), dim_v < V)
    else:
        for part in range(V // BV):
            dim = part * BV + dim_v
            b_v = tl.load(v + r * stride_v + dim, valid[:, None], 0.0).to(DOT)
            tl.store(u + r * V + dim, tl.dot(right, b_v, input_precision=PRECISION).to(DOT))
    for part in range(tl.cdiv(K, BK)):
        channel = part * BK + tl.arange(0, BK)
        dim = channel[None, :]
        inside, at_dim = dim < K, r * K + dim
        before = tl.minimum(tl.load(anchors + tile * K + dim, inside, 0.0), 0.0)
        after, whole = tl.zeros([C, BK], tl.float32), tl.zeros([BK], tl.float32)
        for other in tl.static_range(4):
            total = tl.load(totals + other * K + channel, channel < K, 0.0)
            whole += total
            before += tl.where(tile > other, total[None, :], 0.0)
            after += tl.where(tile < other, total[None, :], 0.0)
        tl.store(decay + at * K + channel, power2(whole, DOT), channel < K)
        into = power2(before, DOT)
        to_end, _ = from_anchor(anchors, totals, tile * K + dim, inside, DOT)
        tl.store(read + at_dim, (tl.load(read + at_dim, inside, 0.0).to(tl.float32) * into).to(DOT), inside)
        onward = tl.load(early + at_dim, inside, 0.0).to(tl.float32) * (to_end * power2(after, DOT))
        tl.store(early + at_dim, onward.to(DOT), inside)
        # Every thread has read its part of the slice before the product begins, so that it may be overwritten after.
        rows = (tl.load(erase + at_dim, inside, 0.0).to(tl.float32) * into).to(DOT)
        tl.store(erase + at_dim, tl.dot(right, rows, input_precision=PRECISION).to(DOT), inside)
