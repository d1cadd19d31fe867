"""The backward in the key dim of chunks that one anchor does not serve (anchor.py): one program per chunk, head and slice.

With late, early and the distances of solve.py, e_n the keys faded to the anchor of the n-th tile after their own:

    reads        d_q = 2^P (d_o S)              erasures   p = -2^P (d_right S)      the products from state_backward.py
    writes       d_k = 2^(P_C - P) (u' d_S_end)
    pairs        d_q[r] += (late_q / q)[r] sum_i d_N[r, i] e_n[i]      p[r] += (late_k / k)[r] sum_i d_L[r, i] e_n[i]
                 d_k[i] += (e_n / k)[i] sum_r (d_N[r, i] late_q[r] + d_L[r, i] beta_r late_k[r])
    in all       d_k += beta p                  d_beta = v . d_right + k . p

A log-decay acts on every later read and every earlier write: d_g[t] = sum_(r >= t) z[r] + what all of the chunk's writes and its
state give to what follows, z = q d_q + beta k p - k d_k (in natural logarithms, d_k before ``in all``). A pair on one side of t must
cancel in that sum, so z is made of the very numbers that the products multiplied, rounded alike on both sides.

Then through the l2 norm, whose q . d_q and k . d_k are known from value_backward.py before any channel is computed, and
through the gate. Grid (chunks * K / BK, HV), slices of one chunk together. dq, dk [B, T, HV, K], d_gate as the gate, read
and overwritten; d_beta [K / BK, B, T, HV], d_A and d_bias [chunks, HV, K] are partial sums in fp32,
added up in a fixed order by the caller; chunks that do not exist are left as they are. Pairs inside steep tiles: steep.py.

Pairs are summed times ``scales`` of value_backward.py, as d_N and d_L are: an anchor 2^-100 away leaves no room for small gradients. Distances
at which no pair of the slice has more than 2^-FAR left are left out: fp32 would not tell.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_linear.kernels.triton.common import (
    INTO,
    REST,
    STEEP,
    TILE,
    chunk_log2_decay,
    chunk_of,
    gate_gradient,
    load_gate,
    power2,
    reach,
    split,
    stretch_sum,
)


@triton.jit
def pairs_apart(
    distance, factor, b_k, late_q, late_k, d_keys, d_pairs, r, c, to_q, to_p, to_k, z, DOT: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """The pairs whose tiles are ``distance`` apart, added to (to_q, to_p, to_k, z); e_n = b_k * factor."""
    here = r // 16 - c // 16 == distance
    b_d_pairs, b_d_keys = tl.load(d_pairs + r * 64 + c, here, 0.0), tl.load(d_keys + r * 64 + c, here, 0.0)
    early = (b_k * factor).to(DOT)
    to_q = tl.dot(b_d_pairs, early, to_q, input_precision=PRECISION)
    to_p = tl.dot(b_d_keys, early, to_p, input_precision=PRECISION)
    to_early = tl.dot(tl.trans(b_d_pairs), late_q, input_precision=PRECISION)
    to_early = tl.dot(tl.trans(b_d_keys), late_k, to_early, input_precision=PRECISION)
    return to_q, to_p, to_k + factor * to_early, z - early * to_early


@triton.jit(do_not_specialize=["num_sequences", "tokens"])
def pair_backward_kernel(
    q, k, gate, beta, A_log, dt_bias, cu_seqlens, cu_chunks, stretches, anchors, totals, norms, d_keys, d_pairs, sums, scales, d_decay,
    served, dq, dk, d_gate, d_beta, d_A, d_bias,
    scale, lower_bound, num_sequences, tokens, num_tokens, stride_q, stride_k, stride_g, stride_beta,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    GATE: tl.constexpr, NORMALIZE: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = 64
    SLICES: tl.constexpr = K // BK
    part, chunk, hv = tl.program_id(0) % SLICES, tl.program_id(0) // SLICES, tl.program_id(1)
    at = chunk.to(tl.int64) * HV + hv
    if tl.load(served + at) > 0:
        return
    h = hv // (HV // H)
    start, stop = chunk_of(chunk, cu_chunks, cu_seqlens, num_sequences, tokens, C, PACKED)
    if start >= stop:
        return
    dim = part * BK + tl.arange(0, BK)
    row = tl.arange(0, C)
    valid = row < (stop - start).to(tl.int32)
    r, c = row[:, None], row[None, :]
    cell, inside = r * C + c, valid[:, None]
    q, k = q + start * stride_q + h * K, k + start * stride_k + h * K
    gate, beta = gate + start * stride_g + hv * K, beta + start * stride_beta + hv
    d_keys, d_pairs = d_keys + at * C * C, d_pairs + at * C * C
    norms, sums = norms + at * 2 * C, sums + at * 4 * C
    anchors, totals = anchors + at * 4 * K, totals + at * 4 * K
    token = (start * HV + hv) * K
    dq, dk, d_gate = dq + token, dk + token, d_gate + token
    out = r * (HV * K) + dim[None, :]
    amount = 0.0
    if GATE != 0:
        amount = tl.exp2(tl.load(A_log + hv).to(tl.float32) * 1.4426950408889634)
        dt_bias += hv * K
    norm_k, norm_q = tl.load(norms + row), tl.load(norms + C + row)
    b_beta = tl.load(beta + row * stride_beta, valid, 0.0).to(tl.float32)
    b_k = tl.load(k + r * stride_k + dim[None, :], inside, 0.0).to(tl.float32)
    b_q = tl.load(q + r * stride_q + dim[None, :], inside, 0.0).to(tl.float32)
    b_k, b_q = (b_k * norm_k[:, None]).to(DOT), (b_q * norm_q[:, None]).to(DOT)
    g = chunk_log2_decay(load_gate(gate, dt_bias, row, valid, dim, stride_g, GATE), amount, lower_bound, GATE, DOT)
    high, low = split(tl.where(inside, g, 0.0), DOT)

    span = stretch_sum(tl.load(stretches + TILE * C * C + cell), high, low, DOT)
    rest = power2(stretch_sum(tl.load(stretches + REST * C * C + cell), high, low, DOT), DOT)
    anchor = tl.load(anchors + r // 16 * K + dim[None, :])
    span -= tl.minimum(anchor, 0.0)
    up, factor = power2(span, DOT), power2(tl.where(anchor < STEEP, -span, -1000.0), DOT)
    late_q, late_k = (b_q * up).to(DOT), (b_k * (up * b_beta[:, None])).to(DOT)
    to_q, to_p, to_k = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    z = tl.zeros([C, BK], tl.float32)
    to_q, to_p, to_k, z = pairs_apart(
        0, factor, b_k, late_q, late_k, d_keys, d_pairs, r, c, to_q, to_p, to_k, z, DOT, PRECISION
    )
    factor = rest
    for distance in tl.range(1, reach(totals, dim, K), num_stages=1):
        later = r // 16 + distance
        place, there = later * K + dim[None, :], later < 4
        to_anchor = factor * power2(tl.minimum(tl.load(anchors + place, there, 0.0), 0.0), DOT)
        to_q, to_p, to_k, z = pairs_apart(
            distance, to_anchor, b_k, late_q, late_k, d_keys, d_pairs, r, c, to_q, to_p, to_k, z, DOT, PRECISION
        )
        factor *= power2(tl.load(totals + place, there, 0.0), DOT)
    # The anchor's factor first: unscaled and still anchored far away a gradient may be too small for fp32.
    unscale = 1.0 / tl.load(scales + at)
    z = (z + late_q * to_q + late_k * to_p) * unscale
    to_q, to_p, to_k = to_q * up * unscale, to_p * up * unscale, to_k * unscale

    before = tl.minimum(tl.load(anchors + r // 16 * K + dim[None, :]), 0.0)
    after, chunk_total = tl.zeros([C, BK], tl.float32), tl.zeros([BK], tl.float32)
    for tile in tl.static_range(4):
        total = tl.load(totals + tile * K + dim)
        chunk_total += total
        before += tl.where(r // 16 > tile, total[None, :], 0.0)
        after += tl.where(r // 16 < tile, total[None, :], 0.0)
    into, onward = up * power2(before, DOT), rest * power2(after, DOT)
    of_q = into * tl.load(dq + out, inside, 0.0).to(tl.float32)
    of_p = into * tl.load(d_gate + out, inside, 0.0).to(tl.float32)
    of_k = onward * tl.load(dk + out, inside, 0.0).to(tl.float32)
    z += b_q * of_q - b_k * (b_beta[:, None] * of_p + of_k)
    to_q += of_q
    to_p -= of_p
    to_k += of_k
    whole = tl.sum(b_k * of_k, 0) + tl.load(d_decay + at * K + dim) * power2(chunk_total, DOT)
    # In three terms, as exact as fp32: where a step forgets 2^-140 d_g is tiny, and d_A_log multiplies its error by those 140.
    selection = tl.trans(tl.load(stretches + INTO * C * C + cell))
    high, low = split(z, DOT)
    dg = stretch_sum(selection, high, low, DOT) + whole[None, :]
    if DOT == tl.bfloat16:
        least = (z - high.to(tl.float32) - low.to(tl.float32)).to(tl.bfloat16)
        dg += tl.dot(selection, least)

    diagonal = tl.load(sums + 2 * C + row)
    to_q += diagonal[:, None] * b_k
    to_k += diagonal[:, None] * b_q
    of_beta = tl.sum(b_k * to_p, 1)
    if part == 0:
        of_beta += tl.load(sums + 3 * C + row)
    tl.store(d_beta + part.to(tl.int64) * num_tokens * HV + (start + row) * HV + hv, of_beta, valid)
    to_k += b_beta[:, None] * to_p
    to_q *= norm_q[:, None]
    to_k *= norm_k[:, None]
    if NORMALIZE:
        to_q -= b_q * (norm_q * tl.load(sums + row) / (scale * scale))[:, None]
        to_k -= b_k * (norm_k * tl.load(sums + C + row))[:, None]
    tl.store(dq + out, to_q.to(dq.dtype.element_ty), inside)
    tl.store(dk + out, to_k.to(dk.dtype.element_ty), inside)
    x = load_gate(gate, dt_bias, row, valid, dim, stride_g, GATE)  # again: cheaper than keeping it and g in registers
    g = chunk_log2_decay(x, amount, lower_bound, GATE, DOT)
    dx, of_A = gate_gradient(x, g, dg, amount, lower_bound, GATE, DOT)
    tl.store(d_gate + out, dx.to(d_gate.dtype.element_ty), inside)
    if GATE != 0:
        tl.store(d_bias + at * K + dim, tl.sum(tl.where(inside, dx, 0.0), 0))
        # Not down to one number, which Triton 3.6 cannot lower on sm_100 here.
        tl.store(d_A + at * K + dim, tl.sum(tl.where(inside, of_A, 0.0), 0))
