"""From the gradients of anchored_backward.py to those of q, k, gate and beta: one program per tile of 16 tokens, no product.

    d_q = 2^(P - a) d_late_q    p = 2^(P - a) d_late_k    d_k = 2^(a - P) d_early + beta p    d_beta = v . d_right + k . p

and each token with itself (the diagonal of d_N), then through the l2 norm, whose q . d_q and k . d_k value_backward.py knows,
and through the gate. P and a as in anchor.py, a steep channel's early too; all that is read times ``scales``. Grid (4 * chunks, HV). dq, dk [B, T, HV, K], d_beta [B, T, HV] fp32; dq, dk and
d_gate hold d_late_q, d_late_k and d_g and are overwritten; ``partial`` [4 * chunks, HV * (K + 1)] fp32 holds what each tile adds to the
gradients of dt_bias [HV, K] and, after those, of A_log [HV]. Nothing needs to be zero before.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_linear.kernels.triton.anchor import since_anchor
from kimi_linear.kernels.triton.common import chunk_log2_decay, chunk_of, gate_gradient, power2


@triton.jit(do_not_specialize=["num_sequences", "tokens", "first_chunk"])
def token_backward_kernel(
    q, k, gate, beta, A_log, dt_bias, cu_seqlens, cu_chunks, anchors, totals, norms, sums, scales, served, d_early, dq, dk, d_gate, d_beta, partial,
    scale, lower_bound, num_sequences, tokens, first_chunk, stride_q, stride_k, stride_g, stride_beta,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
    GATE: tl.constexpr, NORMALIZE: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = 64
    place, tile, hv = tl.program_id(0) // 4, tl.program_id(0) % 4, tl.program_id(1)
    chunk = first_chunk + place
    h = hv // (HV // H)
    start, stop = chunk_of(chunk, cu_chunks, cu_seqlens, num_sequences, tokens, C, PACKED)
    dim, tile_sums = tl.arange(0, K), (chunk.to(tl.int64) * 4 + tile) * HV * (K + 1)
    if start >= stop:
        if GATE != 0:
            tl.store(partial + tile_sums + hv * K + dim, tl.zeros([K], tl.float32))
            tl.store(partial + tile_sums + HV * K + hv, 0.0)
        return
    at = chunk.to(tl.int64) * HV + hv
    one, unscale = tl.load(served + at) > 0, 1.0 / tl.load(scales + at)
    start += tile * 16
    row = tl.arange(0, 16)
    r, d = row[:, None], dim[None, :]
    valid = row < (stop - start).to(tl.int32)
    inside = valid[:, None]
    x = tl.load(gate + start * stride_g + hv * K + r * stride_g + d, inside, 0.0).to(tl.float32)
    amount = 0.0
    if GATE != 0:
        amount = tl.exp2(tl.load(A_log + hv).to(tl.float32) * 1.4426950408889634)
        x += tl.load(dt_bias + hv * K + dim).to(tl.float32)[None, :]
    out = (start * HV + hv) * K + r * (HV * K) + d
    g = tl.where(inside, chunk_log2_decay(x, amount, lower_bound, GATE, DOT), 0.0)
    dg = tl.load(d_gate + out, inside, 0.0).to(tl.float32) * unscale
    dx, of_A = gate_gradient(x, g, dg, amount, lower_bound, GATE, DOT)
    tl.store(d_gate + out, dx.to(d_gate.dtype.element_ty), inside)
    if GATE != 0:
        tl.store(partial + tile_sums + hv * K + dim, tl.sum(tl.where(inside, dx, 0.0), 0))
        tl.store(partial + tile_sums + HV * K + hv, tl.sum(tl.sum(tl.where(inside, of_A, 0.0), 1), 0))
    up, down = since_anchor(g, anchors + at * 4 * K, totals + at * 4 * K, tile, one, dim, K)
    up, down = power2(up, DOT), power2(down, DOT)
    norm, token = norms + at * 2 * C + tile * 16 + row, sums + at * 4 * C + tile * 16 + row
    norm_k, norm_q, diagonal = tl.load(norm)[:, None], tl.load(norm + C)[:, None], tl.load(token + 2 * C)[:, None]
    b_k = tl.load(k + start * stride_k + h * K + r * stride_k + d, inside, 0.0).to(tl.float32) * norm_k
    b_q = tl.load(q + start * stride_q + h * K + r * stride_q + d, inside, 0.0).to(tl.float32) * norm_q
    b_beta = tl.load(beta + start * stride_beta + hv + row * stride_beta, valid, 0.0).to(tl.float32)[:, None]
    rows = (place.to(tl.int64) * HV + hv) * C * K + (tile * 16 + r) * K + d
    # The anchor's factor first: a gradient that is unscaled while it is anchored far away may be too small for fp32.
    to_q = up * tl.load(dq + out, inside, 0.0).to(tl.float32) * unscale + diagonal * b_k
    to_p = up * tl.load(dk + out, inside, 0.0).to(tl.float32) * unscale
    to_k = down * tl.load(d_early + rows).to(tl.float32) * unscale + diagonal * b_q + b_beta * to_p
    tl.store(d_beta + (start + row) * HV + hv, tl.sum(b_k * to_p, 1) + tl.load(token + 3 * C), valid)
    to_q, to_k = to_q * norm_q, to_k * norm_k
    if NORMALIZE:
        to_q -= b_q * (norm_q * tl.load(token)[:, None] / (scale * scale))
        to_k -= b_k * (norm_k * tl.load(token + C)[:, None])
    tl.store(dq + out, to_q.to(dq.dtype.element_ty), inside)
    tl.store(dk + out, to_k.to(dk.dtype.element_ty), inside)
