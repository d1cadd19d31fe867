"""What anchored_backward.py does, in chunks that forget too much for one anchor: anchors tile by tile, pairs by their tiles' distance.

With factors f of anchor.py, e_0 = early f_1, e_n = early f_2 f_(3 + n) for tokens n tiles apart, as far as anything is left:

    d_late_q = f_0 (d_o S) + sum_n d_N e_n             d_late_k = -f_0 (d_right S) + sum_n d_L e_n
    d_early  = sum_n (e_n / early) (d_N^T late_q + d_L^T late_k) + f_2 f_3 (u' d_S_end)

z and d_g as there, with e_n and its gradient for early. Pairs inside steep tiles are steep.py's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_linear.kernels.triton.anchored_backward import inside_slice, products_with_states, sum_of_later
from kimi_linear.kernels.triton.common import chunk_of, reach


@triton.jit
def of_tiles(factors, number, dim, K: tl.constexpr, BK: tl.constexpr):
    """The factors of that number, [C, BK]: the same for all 16 tokens of a tile."""
    place = factors + (number * 4 + tl.arange(0, 4))[:, None] * K + dim
    four = inside_slice(place, dim, K, BK)
    return tl.reshape(tl.broadcast_to(four[:, None, :], [4, 16, BK]), [64, BK])


@triton.jit
def faded_by(early, factors, first, second, dim, K: tl.constexpr, BK: tl.constexpr):
    """``early`` loaded times two factors, one after the other: their product may be too small for fp32."""
    return (
        inside_slice(early, dim, K, BK) * of_tiles(factors, first, dim, K, BK) * of_tiles(factors, second, dim, K, BK)
    )


@triton.jit(do_not_specialize=["num_sequences", "tokens", "first_chunk"])
def tile_backward_kernel(
    states, d_states, written, d_right, d_output, d_keys, d_pairs, scales, decay, totals, served, factors, stretches, cu_seqlens,
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
    if tl.load(served + at) > 0:
        return
    dim, row = part * BK + tl.arange(0, BK), tl.arange(0, C)
    r, d, inside = row[:, None], dim[None, :], (row < (stop - start).to(tl.int32))[:, None]
    states, d_states = states + at * V * K, d_states + at * V * K
    written, d_right, d_output = written + at * C * V, d_right + at * C * V, d_output + (start * HV + hv) * V
    d_keys, d_pairs, factors = d_keys + at * C * C, d_pairs + at * C * C, factors + here * 28 * K
    totals += at * 4 * K
    rows, cell = here * C * K + r * K + d, r * C + row[None, :]
    late_q, late_k, early = late_q + rows, late_k + rows, early + rows
    out, there = (start * HV + hv) * K + r * (HV * K) + d, inside & (d < K)
    dq, dk, d_gate = dq + out, dk + out, d_gate + out
    scale = tl.load(scales + at)
    of_end = tl.load(decay + at * K + dim, dim < K, 0.0) * scale
    # First the later tokens of all pairs, then the earlier ones: all sums at once are too many registers.
    to_q, to_k, _, _ = products_with_states(
        states, d_states, written, d_right, d_output, r, inside, dim, HV, K, V, BK, BV, True, False, DOT, PRECISION
    )
    into = of_tiles(factors, 0, d, K, BK) * scale
    to_q, to_k = to_q * into, to_k * -into
    apart, far = r // 16 - row[None, :] // 16, reach(totals, dim, K)
    for distance in tl.range(1, far, num_stages=1):
        mine = apart == distance
        b_early = faded_by(early, factors, 2, 3 + distance, d, K, BK).to(DOT)
        to_q = tl.dot(tl.load(d_pairs + cell, mine, 0.0), b_early, to_q, input_precision=PRECISION)
        to_k = tl.dot(tl.load(d_keys + cell, mine, 0.0), b_early, to_k, input_precision=PRECISION)
    near = apart == 0
    b_early = (inside_slice(early, d, K, BK) * of_tiles(factors, 1, d, K, BK)).to(DOT)
    to_q = tl.dot(tl.load(d_pairs + cell, near, 0.0), b_early, to_q, input_precision=PRECISION)
    to_k = tl.dot(tl.load(d_keys + cell, near, 0.0), b_early, to_k, input_precision=PRECISION)
    z = inside_slice(late_q, d, K, BK) * to_q + inside_slice(late_k, d, K, BK) * to_k
    tl.store(dq, to_q.to(dq.dtype.element_ty), there)
    tl.store(dk, to_k.to(dk.dtype.element_ty), there)
    _, _, to_early, whole = products_with_states(
        states, d_states, written, d_right, d_output, r, inside, dim, HV, K, V, BK, BV, False, True, DOT, PRECISION
    )
    to_early *= of_tiles(factors, 3, d, K, BK) * scale
    faded = inside_slice(early, d, K, BK) * of_tiles(factors, 2, d, K, BK) * to_early
    whole = whole * of_end + tl.sum(faded, 0)
    z -= faded
    for distance in tl.range(1, far, num_stages=1):
        mine = apart == distance
        onto = tl.dot(
            tl.trans(tl.load(d_pairs + cell, mine, 0.0)), inside_slice(late_q, d, K, BK), input_precision=PRECISION
        )
        onto = tl.dot(
            tl.trans(tl.load(d_keys + cell, mine, 0.0)), inside_slice(late_k, d, K, BK), onto, input_precision=PRECISION
        )
        z -= faded_by(early, factors, 2, 3 + distance, d, K, BK).to(DOT) * onto
        to_early += of_tiles(factors, 3 + distance, d, K, BK) * onto
    flat = of_tiles(factors, 1, d, K, BK)
    onto = tl.dot(
        tl.trans(tl.load(d_pairs + cell, near, 0.0)), inside_slice(late_q, d, K, BK), input_precision=PRECISION
    )
    onto = (
        tl.dot(
            tl.trans(tl.load(d_keys + cell, near, 0.0)), inside_slice(late_k, d, K, BK), onto, input_precision=PRECISION
        )
        * flat
    )
    z -= inside_slice(early, d, K, BK) * onto
    to_early = to_early * of_tiles(factors, 2, d, K, BK) + onto
    tl.debug_barrier()  # every thread has loaded what it needs of early
    tl.store(early, to_early.to(DOT), d < K)
    sum_of_later(z, whole, stretches, cell, d_gate, there, DOT)
