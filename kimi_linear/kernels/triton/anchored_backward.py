"""All products of a chunk's backward in the key dim, where one anchor serves the chunk: a program per chunk, head and slice.

With late_q, late_k (beta in it) and early of anchor.py, m = 2^(P_C / 2), S the state at the chunk's start:

    d_late_q = m (d_o S) + d_N early            d_late_k = -m (d_right S) + d_L early, as if beta were not in late_k
    d_early  = m (u' d_S_end) + d_N^T late_q + d_L^T late_k

A log-decay acts on every later read and every earlier write: d_g[t] = sum_(r >= t) z[r] + early . (m u' d_S_end) + m^2 S . d_S_end,
z = late_q d_late_q + late_k d_late_k - early d_early. A pair on one side of t must cancel in that sum, so z is summed here, from
the very numbers that the products multiplied, before anything is rounded. The rest is token_backward.py's.

All of it times ``scales`` of value_backward.py, as d_N and d_L are: what is anchored 2^-100 away leaves no room for small gradients.

Grid (chunks * slices, HV), slices of a chunk together. early [chunks, HV, C, K] is overwritten by its gradient, each slice by the
one program that reads it; d_late_q, d_late_k and d_g go into dq, dk and d_gate [B, T, HV, K]. Slices are 64 wide even where K is 32:
products with 32 columns came out wrong on an H100 (Triton 3.6.0).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_linear.kernels.triton.common import INTO, chunk_of, power2, split, stretch_sum


@triton.jit
def inside_slice(x, dim, K: tl.constexpr, BK: tl.constexpr):
    """Loads x [..., BK], zero in channels that are not there; without a mask where all are."""
    if BK > K:
        return tl.load(x, dim < K, 0.0)
    else:  # noqa: RET505  (said, because without it Triton wants the types of both returns to agree)
        return tl.load(x)


@triton.jit
def products_with_states(
    states, d_states, written, d_right, d_output, r, inside, dim, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, LATE: tl.constexpr, EARLY: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a chunk, with LATE d_o S and d_right S, with EARLY u' d_S_end [C, BK] and sum_v S d_S_end [BK], for channels ``dim``; zeros else."""
    C: tl.constexpr = 64
    reads, erasures = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    writes, decay = tl.zeros([C, BK], tl.float32), tl.zeros([BK], tl.float32)
    for slice_v in range(V // BV):
        dim_v = slice_v * BV + tl.arange(0, BV)
        in_v, in_state = r * V + dim_v[None, :], dim_v[:, None] * K + dim[None, :]
        b_state = inside_slice(states + in_state, dim[None, :], K, BK)
        if LATE:
            b_do = tl.load(d_output + r * HV * V + dim_v[None, :], inside, 0.0).to(DOT)
            reads = tl.dot(b_do, b_state, reads, input_precision=PRECISION)
            erasures = tl.dot(tl.load(d_right + in_v), b_state, erasures, input_precision=PRECISION)
        if EARLY:
            b_d_state = inside_slice(d_states + in_state, dim[None, :], K, BK)
            writes = tl.dot(tl.load(written + in_v), b_d_state, writes, input_precision=PRECISION)
            decay += tl.sum(b_state.to(tl.float32) * b_d_state.to(tl.float32), 0)
    return reads, erasures, writes, decay


@triton.jit
def sum_of_later(z, whole, stretches, cell, d_gate, mask, DOT: tl.constexpr):
    """d_g [C, BK], stored: z summed over a token and those after it, and what the chunk's end adds.

    In three terms, as exact as fp32: where a step forgets much d_g is small, and d_A_log multiplies its error by that much.
    """
    C: tl.constexpr = 64
    selection = tl.trans(tl.load(stretches + INTO * C * C + cell))
    high, low = split(z, DOT)
    dg = stretch_sum(selection, high, low, DOT) + whole[None, :]
    if DOT == tl.bfloat16:
        dg += tl.dot(selection, (z - high.to(tl.float32) - low.to(tl.float32)).to(tl.bfloat16))
    tl.store(d_gate, dg.to(d_gate.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["num_sequences", "tokens", "first_chunk"])
def anchored_backward_kernel(
    states, d_states, written, d_right, d_output, d_keys, d_pairs, scales, totals, served, stretches, cu_seqlens,
    cu_chunks, late_q, late_k, early, dq, dk, d_gate, num_sequences, tokens, first_chunk,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = 64
    SLICES: tl.constexpr = (K + BK - 1) // BK
    part, place, hv = tl.program_id(0) % SLICES, tl.program_id(0) // SLICES, tl.program_id(1)
    chunk = first_chunk + place
    start, stop = chunk_of(chunk, cu_chunks, cu_seqlens, num_sequences, tokens, C, PACKED)
    if start >= stop:
        return
    at, here = chunk.to(tl.int64) * HV + hv, place.to(tl.int64) * HV + hv
    if tl.load(served + at) == 0:
        return
    dim, row = part * BK + tl.arange(0, BK), tl.arange(0, C)
    r, d, inside = row[:, None], dim[None, :], (row < (stop - start).to(tl.int32))[:, None]
    states, d_states = states + at * V * K, d_states + at * V * K
    written, d_right, d_output = written + at * C * V, d_right + at * C * V, d_output + (start * HV + hv) * V
    d_keys, d_pairs, totals = d_keys + at * C * C, d_pairs + at * C * C, totals + at * 4 * K
    rows, cell = here * C * K + r * K + d, r * C + row[None, :]
    late_q, late_k, early = late_q + rows, late_k + rows, early + rows
    out, there = (start * HV + hv) * K + r * (HV * K) + d, inside & (d < K)
    dq, dk, d_gate = dq + out, dk + out, d_gate + out
    to_q, to_k, to_early, whole = products_with_states(
        states, d_states, written, d_right, d_output, r, inside, dim, HV, K, V, BK, BV, True, True, DOT, PRECISION
    )
    total = tl.zeros([BK], tl.float32)
    for tile in tl.static_range(4):
        total += inside_slice(totals + tile * K + dim, dim, K, BK)
    middle, scale = power2(0.5 * total, DOT), tl.load(scales + at)
    scaled = (middle * scale)[None, :]
    to_q, to_k, to_early = to_q * scaled, to_k * -scaled, to_early * scaled
    b_early, b_late_q, b_late_k = (
        inside_slice(early, d, K, BK), inside_slice(late_q, d, K, BK), inside_slice(late_k, d, K, BK),
    )  # fmt: skip
    whole = whole * (middle * scale) * middle + tl.sum(b_early * to_early, 0)
    b_pairs, b_keys = tl.load(d_pairs + cell), tl.load(d_keys + cell)
    to_q = tl.dot(b_pairs, b_early, to_q, input_precision=PRECISION)
    to_k = tl.dot(b_keys, b_early, to_k, input_precision=PRECISION)
    to_early = tl.dot(tl.trans(b_pairs), b_late_q, to_early, input_precision=PRECISION)
    to_early = tl.dot(tl.trans(b_keys), b_late_k, to_early, input_precision=PRECISION)
    z = b_late_q * to_q + b_late_k * to_k - b_early * to_early
    tl.store(dq, to_q.to(dq.dtype.element_ty), there)
    tl.store(dk, to_k.to(dk.dtype.element_ty), there)
    tl.store(early, to_early.to(DOT), d < K)
    sum_of_later(z, whole, stretches, cell, d_gate, there, DOT)
