"""All products of a chunk's backward in the key dim, where one anchor serves the chunk: a program per chunk, head and slice.

With late_q, late_k (beta in it) and early of anchor.py, m = 2^(P_C / 2), S the state at the chunk's start:

    d_late_q = m (d_o S) + d_N early            d_late_k = -m (d_right S) + d_L early, as if beta were not in late_k
    d_early  = m (u' d_S_end) + d_N^T late_q + d_L^T late_k

A log-decay acts on every later read and every earlier write: d_g[t] = sum_(r >= t) z[r] + early . (m u' d_S_end) + m^2 S . d_S_end,
z = late_q d_late_q + late_k d_late_k - early d_early. A pair on one side of t must cancel in that sum, so z is summed here, from
the very numbers that the products multiplied, before anything is rounded. The rest is token_backward.py's.

All of it times ``scales`` of value_backward.py, as d_N and d_L are: what is anchored 2^-100 away leaves no room for small gradients.

Grid (chunks * K / BK, HV), slices of a chunk together. The three inputs [chunks, HV, C, K] are overwritten by their gradients,
each slice by the one program that reads it; d_g goes into d_gate [B, T, HV, K].
"""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_linear.kernels.triton.common import INTO, chunk_of, power2, split, stretch_sum
from kimi_linear.kernels.triton.state_backward import products_with_states


@triton.jit(do_not_specialize=["num_sequences", "tokens", "first_chunk"])
def anchored_backward_kernel(
    states, d_states, written, d_right, d_output, d_keys, d_pairs, scales, totals, served, stretches, cu_seqlens, cu_chunks,
    late_q, late_k, early, d_gate, num_sequences, tokens, first_chunk,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = 64
    SLICES: tl.constexpr = K // BK
    part, place, hv = tl.program_id(0) % SLICES, tl.program_id(0) // SLICES, tl.program_id(1)
    chunk = first_chunk + place
    start, stop = chunk_of(chunk, cu_chunks, cu_seqlens, num_sequences, tokens, C, PACKED)
    if start >= stop:
        return
    at = chunk.to(tl.int64) * HV + hv
    if tl.load(served + at) == 0:
        return
    dim, row = part * BK + tl.arange(0, BK), tl.arange(0, C)
    r, inside = row[:, None], (row < (stop - start).to(tl.int32))[:, None]
    states, d_states = states + at * V * K, d_states + at * V * K
    written, d_right, d_output = written + at * C * V, d_right + at * C * V, d_output + (start * HV + hv) * V
    d_keys, d_pairs, totals = d_keys + at * C * C, d_pairs + at * C * C, totals + at * 4 * K
    to_q, to_k, to_early, whole = products_with_states(
        states, d_states, written, d_right, d_output, r, inside, dim, HV, K, V, BK, BV, DOT, PRECISION
    )
    total = tl.zeros([BK], tl.float32)
    for tile in tl.static_range(4):
        total += tl.load(totals + tile * K + dim)
    middle, scale = power2(0.5 * total, DOT), tl.load(scales + at)
    scaled = (middle * scale)[None, :]
    to_q, to_k, to_early = to_q * scaled, to_k * -scaled, to_early * scaled
    rows = (place.to(tl.int64) * HV + hv) * C * K + r * K + dim[None, :]
    b_early, b_late_q, b_late_k = tl.load(early + rows), tl.load(late_q + rows), tl.load(late_k + rows)
    whole = whole * (middle * scale) * middle + tl.sum(b_early * to_early, 0)
    cell = r * C + row[None, :]
    b_pairs, b_keys = tl.load(d_pairs + cell), tl.load(d_keys + cell)
    to_q = tl.dot(b_pairs, b_early, to_q, input_precision=PRECISION)
    to_k = tl.dot(b_keys, b_early, to_k, input_precision=PRECISION)
    to_early = tl.dot(tl.trans(b_pairs), b_late_q, to_early, input_precision=PRECISION)
    to_early = tl.dot(tl.trans(b_keys), b_late_k, to_early, input_precision=PRECISION)
    z = b_late_q * to_q + b_late_k * to_k - b_early * to_early
    tl.store(late_q + rows, to_q.to(DOT))
    tl.store(late_k + rows, to_k.to(DOT))
    tl.store(early + rows, to_early.to(DOT))
    # In three terms, as exact as fp32: where a step forgets much d_g is small, and d_A_log multiplies its error by that much.
    selection = tl.trans(tl.load(stretches + INTO * C * C + cell))
    high, low = split(z, DOT)
    dg = stretch_sum(selection, high, low, DOT) + whole[None, :]
    if DOT == tl.bfloat16:
        dg += tl.dot(selection, (z - high.to(tl.float32) - low.to(tl.float32)).to(tl.bfloat16))
    tl.store(d_gate + (start * HV + hv) * K + r * (HV * K) + dim[None, :], dg.to(d_gate.dtype.element_ty), inside)
