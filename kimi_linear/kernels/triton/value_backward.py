"""The part of the chunks' backward that lives in the value dim: one program per chunk and value head.

With u' what the chunk wrote, d_u' its gradient from the reverse scan, A and L = Diag(beta) M as in solve.py:

    d_right = A^T d_u'      the gradient with respect to beta (v - k 2^P S^T), what the inverse is applied to
    d_v = beta d_right      d_L = -lower(d_right u'^T)      d_N = lower(d_o u'^T)

and four sums per token, in ``sums``: q . d_q = o . d_o and k . d_k = (2 u' - beta v) . d_right, which the l2 norm's backward
needs (the output is linear in q; a key acts through what it writes, u', and through what it erases, u' - beta v), the
diagonal of d_N, and v . d_right, the first part of d_beta.

Grid (chunks, HV). d_written is overwritten by d_right. d_keys (d_L) and d_pairs (d_N) [chunks, HV, C, C] times ``scales``
[chunks, HV] fp32, a power of two that brings the largest of both near one; sums [chunks, HV, 4, C] fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_linear.kernels.triton.common import chunk_of


@triton.jit(do_not_specialize=["num_sequences", "tokens"])
def value_backward_kernel(
    v, beta, cu_seqlens, cu_chunks, inverse, written, d_written, output, d_output, dv, d_keys, d_pairs, sums, scales,
    num_sequences, tokens, stride_v, stride_beta, HV: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = 64
    chunk, hv = tl.program_id(0), tl.program_id(1)
    start, stop = chunk_of(chunk, cu_chunks, cu_seqlens, num_sequences, tokens, C, PACKED)
    if start >= stop:
        return
    at = chunk.to(tl.int64) * HV + hv
    v, beta = v + start * stride_v + hv * V, beta + start * stride_beta + hv
    token = (start * HV + hv) * V
    output, d_output, dv = output + token, d_output + token, dv + token
    written, d_written, inverse = written + at * C * V, d_written + at * C * V, inverse + at * C * C
    d_keys, d_pairs, sums = d_keys + at * C * C, d_pairs + at * C * C, sums + at * 4 * C
    row = tl.arange(0, C)
    valid = row < (stop - start).to(tl.int32)
    r, c = row[:, None], row[None, :]
    cell = r * C + c
    b_beta = tl.load(beta + row * stride_beta, valid, 0.0).to(tl.float32)
    transposed = tl.trans(tl.load(inverse + cell))
    b_keys, b_pairs = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    q_dq, k_dk, diagonal = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    v_dr = tl.zeros([C], tl.float32)
    for part in range(V // BV):
        dim = (part * BV + tl.arange(0, BV))[None, :]
        b_written, b_d_written = tl.load(written + r * V + dim), tl.load(d_written + r * V + dim)
        b_do = tl.load(d_output + r * HV * V + dim, valid[:, None], 0.0)
        b_o = tl.load(output + r * HV * V + dim, valid[:, None], 0.0).to(tl.float32)
        b_v = tl.load(v + r * stride_v + dim, valid[:, None], 0.0).to(tl.float32)
        right = tl.dot(transposed, b_d_written, input_precision=PRECISION)
        tl.store(d_written + r * V + dim, right.to(DOT))
        tl.store(dv + r * HV * V + dim, (right * b_beta[:, None]).to(dv.dtype.element_ty), valid[:, None])
        columns = tl.trans(b_written)
        b_keys += tl.dot(right.to(DOT), columns, input_precision=PRECISION)
        b_pairs += tl.dot(b_do.to(DOT), columns, input_precision=PRECISION)
        wide = b_written.to(tl.float32)
        q_dq += tl.sum(b_o * b_do.to(tl.float32), 1)
        diagonal += tl.sum(wide * b_do.to(tl.float32), 1)
        k_dk += tl.sum((2 * wide - b_beta[:, None] * b_v) * right, 1)
        v_dr += tl.sum(b_v * right, 1)
    b_keys, b_pairs = tl.where(r > c, -b_keys, 0.0), tl.where(r > c, b_pairs, 0.0)
    # By way of memory: Triton 3.6 cannot lower one number made of these products on sm_100.
    tl.store(sums + row, tl.max(tl.maximum(tl.abs(b_keys), tl.abs(b_pairs)), 1))
    tl.debug_barrier()
    largest = tl.max(tl.load(sums + row), 0)
    tl.debug_barrier()
    # 2^-n of a number whose exponent is n; what is zero, denormal or not finite has no exponent worth having.
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    exponent = tl.where((exponent > 0) & (exponent < 254), exponent, 127)
    scale = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(scales + at, scale)
    tl.store(d_keys + cell, (b_keys * scale).to(DOT))
    tl.store(d_pairs + cell, (b_pairs * scale).to(DOT))
    tl.store(sums + row, q_dq)
    tl.store(sums + C + row, k_dk)
    tl.store(sums + 2 * C + row, diagonal)
    tl.store(sums + 3 * C + row, v_dr)
