"""The walk over chunks, the only sequential part: one program per sequence, value head and slice of the value dim.

    u' = u - erase S^T    o = read S^T + N u'    S <- S Diag(decay) + u'^T write

The slice of the state, [K, BV] fp32, stays in registers from the first chunk to the last. Grid (V / BV, N * HV).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scan_kernel(
    erase, u, read, write, pairs_q, decay, initial_state, output, final_state, cu_seqlens, cu_chunks, tokens,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    PACKED: tl.constexpr, HAS_STATE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = 64
    part, n, hv = tl.program_id(0), tl.program_id(1) // HV, tl.program_id(1) % HV
    if PACKED:
        start = tl.load(cu_seqlens + n).to(tl.int64)
        stop = tl.load(cu_seqlens + n + 1).to(tl.int64)
        first = tl.load(cu_chunks + n)
    else:
        start, stop = n.to(tl.int64) * tokens, (n + 1).to(tl.int64) * tokens
        first = n * tl.cdiv(tokens, C)
    chunks = tl.cdiv(stop - start, C).to(tl.int32)
    row, dim_k, dim_v = tl.arange(0, C), tl.arange(0, K), part * BV + tl.arange(0, BV)
    place = (n * HV + hv).to(tl.int64) * V * K + dim_v[None, :] * K + dim_k[:, None]
    if HAS_STATE:
        state = tl.load(initial_state + place)
    else:
        state = tl.zeros([K, BV], tl.float32)
    for i in tl.range(chunks, num_stages=STAGES):
        at = ((first + i).to(tl.int64) * HV + hv) * C
        in_k = (at + row)[:, None] * K + dim_k[None, :]
        b_erase, b_read = tl.load(erase + in_k), tl.load(read + in_k)
        b_u = tl.load(u + (at + row)[:, None] * V + dim_v[None, :]).to(tl.float32)
        b_pairs = tl.load(pairs_q + (at + row)[:, None] * C + row[None, :])
        b_write = tl.load(write + (at + row)[None, :] * K + dim_k[:, None])
        b_decay = tl.load(decay + ((first + i).to(tl.int64) * HV + hv) * K + dim_k)
        low = state.to(b_erase.dtype)
        b_u = (b_u - tl.dot(b_erase, low, input_precision=PRECISION)).to(b_erase.dtype)
        o = tl.dot(b_read, low, input_precision=PRECISION)
        o = tl.dot(b_pairs, b_u, o, input_precision=PRECISION)
        state = tl.dot(b_write, b_u, state * b_decay[:, None], input_precision=PRECISION)
        token = start + i * C + row
        tl.store(
            output + (token[:, None] * HV + hv) * V + dim_v[None, :],
            o.to(output.dtype.element_ty),
            (token < stop)[:, None],
        )
    tl.store(final_state + place, state)
