"""What the scan reads of each chunk: one program per chunk of 64 tokens and value head, parallel over all of them.

    erase = solve (k 2^P)    u = solve v    read = scale q 2^P    write = k 2^(P_C - P)    decay = 2^(P_C)

P is the running log2-decay in the chunk, made from the raw gate again: that costs less than storing it in fp32.
Grid (chunks, HV). Outputs lie chunk by chunk, [chunks, HV, C, K or V]; decay [chunks, HV, K] fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_linear.kernels.triton.common import chunk_of, gate_slice, stretch_sum


@triton.jit
def fade_kernel(
    q, k, v, gate, A_log, dt_bias, cu_seqlens, cu_chunks, solve, norms, erase, u, read, write, decay,
    lower_bound, num_sequences, tokens, stride_q, stride_k, stride_v, stride_g,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = 64
    chunk, hv = tl.program_id(0), tl.program_id(1)
    h = hv // (HV // H)
    start, stop = chunk_of(chunk, cu_chunks, cu_seqlens, num_sequences, tokens, C, PACKED)
    if start >= stop:
        return
    row = tl.arange(0, C)
    token = start + row
    valid = token < stop
    r, c = row[:, None], row[None, :]
    at = (chunk.to(tl.int64) * HV + hv) * C
    b_solve = tl.load(solve + (at + row)[:, None] * C + row[None, :])
    norm_k, norm_q = tl.load(norms + at * 2 + row), tl.load(norms + at * 2 + C + row)
    for part in range(V // BV):
        dim = part * BV + tl.arange(0, BV)
        b_v = tl.load(v + token[:, None] * stride_v + hv * V + dim[None, :], valid[:, None], 0.0).to(DOT)
        b_u = tl.dot(b_solve, b_v, input_precision=PRECISION)
        tl.store(u + (at + row)[:, None] * V + dim[None, :], b_u.to(u.dtype.element_ty))
    for part in range(K // BK):
        dim = part * BK + tl.arange(0, BK)
        b_k = tl.load(k + token[:, None] * stride_k + h * K + dim[None, :], valid[:, None], 0.0).to(tl.float32)
        b_q = tl.load(q + token[:, None] * stride_q + h * K + dim[None, :], valid[:, None], 0.0).to(tl.float32)
        b_k, b_q = b_k * norm_k[:, None], b_q * norm_q[:, None]
        g = gate_slice(gate, A_log, dt_bias, token, valid, hv, dim, stride_g, lower_bound, K, GATE)
        into = tl.exp2(stretch_sum(c <= r, g, DOT))
        onward = tl.exp2(stretch_sum(c > r, g, DOT))
        out = (at + row)[:, None] * K + dim[None, :]
        tl.store(read + out, (b_q * into).to(read.dtype.element_ty))
        tl.store(write + out, (b_k * onward).to(write.dtype.element_ty))
        b_erase = tl.dot(b_solve, (b_k * into).to(DOT), input_precision=PRECISION)
        tl.store(erase + out, b_erase.to(erase.dtype.element_ty))
        tl.store(decay + (chunk.to(tl.int64) * HV + hv) * K + dim, tl.exp2(tl.sum(g, 0)))
