"""What pair_backward.py needs of the states: three plain products, one program per chunk, value head and slice of channels.

    d_q = d_o S    d_p = d_right S    d_k = u' d_S_end    d_decay = sum_v S d_S_end

S the state at the chunk's start. Chunks that one anchor serves are anchored_backward.py's. What the gate makes of them is pair_backward.py's, which finds them where it will put its
own results: in dq, dk and d_gate [B, T, HV, K]. d_decay [chunks, HV, K] fp32. Grid (chunks * K / BK, HV), slices of a chunk together.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_linear.kernels.triton.common import chunk_of


@triton.jit
def products_with_states(
    states, d_states, written, d_right, d_output, r, inside, dim,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(d_o S, d_right S, u' d_S_end) [C, BK] and sum_v S d_S_end [BK] of a chunk, for channels ``dim``."""
    C: tl.constexpr = 64
    reads, erasures, writes = (
        tl.zeros([C, BK], tl.float32),
        tl.zeros([C, BK], tl.float32),
        tl.zeros([C, BK], tl.float32),
    )
    decay = tl.zeros([BK], tl.float32)
    for slice_v in range(V // BV):
        dim_v = slice_v * BV + tl.arange(0, BV)
        in_v, in_state = r * V + dim_v[None, :], dim_v[:, None] * K + dim[None, :]
        b_state, b_d_state = tl.load(states + in_state), tl.load(d_states + in_state)
        b_do = tl.load(d_output + r * HV * V + dim_v[None, :], inside, 0.0).to(DOT)
        reads = tl.dot(b_do, b_state, reads, input_precision=PRECISION)
        erasures = tl.dot(tl.load(d_right + in_v), b_state, erasures, input_precision=PRECISION)
        writes = tl.dot(tl.load(written + in_v), b_d_state, writes, input_precision=PRECISION)
        decay += tl.sum(b_state.to(tl.float32) * b_d_state.to(tl.float32), 0)
    return reads, erasures, writes, decay


@triton.jit(do_not_specialize=["num_sequences", "tokens"])
def state_backward_kernel(
    states, d_states, written, d_right, d_output, served, cu_seqlens, cu_chunks, dq, dk, d_gate, d_decay, num_sequences, tokens,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = 64
    SLICES: tl.constexpr = K // BK
    part, chunk, hv = tl.program_id(0) % SLICES, tl.program_id(0) // SLICES, tl.program_id(1)
    at = chunk.to(tl.int64) * HV + hv
    if tl.load(served + at) > 0:
        return
    start, stop = chunk_of(chunk, cu_chunks, cu_seqlens, num_sequences, tokens, C, PACKED)
    if start >= stop:
        return
    dim, row = part * BK + tl.arange(0, BK), tl.arange(0, C)
    r, inside = row[:, None], (row < (stop - start).to(tl.int32))[:, None]
    states, d_states = states + at * V * K, d_states + at * V * K
    written, d_right, d_output = written + at * C * V, d_right + at * C * V, d_output + (start * HV + hv) * V
    b_dq, b_dp, b_dk, b_decay = products_with_states(
        states, d_states, written, d_right, d_output, r, inside, dim, HV, K, V, BK, BV, DOT, PRECISION
    )
    token = (start * HV + hv) * K
    out = r * (HV * K) + dim[None, :]
    tl.store(dq + token + out, b_dq.to(dq.dtype.element_ty), inside)
    tl.store(dk + token + out, b_dk.to(dk.dtype.element_ty), inside)
    tl.store(d_gate + token + out, b_dp.to(d_gate.dtype.element_ty), inside)
    tl.store(d_decay + at * K + dim, b_decay)
