"""The part of the chunks' backward that lives in the key dim: one program per chunk, value head and slice of channels.

Every factor of the forward is 2^(a sum of log-decays over a stretch), a 0/1 matrix times g. So with x any factor times what
it multiplies, d_g = matrix^T (x d_x), stretch by stretch: no difference of large sums appears. In natural logarithms:

    reads        d_q = 2^P (d_o S)                      erasures   p = -2^P (d_right S)
    writes       d_k = 2^(P_C - P) (u' d_S_end)         decay      d_g = 2^(P_C) sum_v S d_S_end
    pairs        d_q[r] += sum_i d_N[r, i] k_i 2^..     p[r] += sum_i d_L[r, i] k_i 2^..      level by level, as in
                 d_k[i] += sum_r (d_N[r, i] q_r + d_L[r, i] beta_r k_r) 2^..                 prepare.py
    in all       d_k += beta p                          d_beta = v . d_right + k . p

Then through the l2 norm, whose q . d_q and k . d_k are known from value_backward.py before any channel is computed, and
through the gate. Grid (chunks * K / BK, HV), slices of one chunk together. dq, dk [B, T, HV, K], d_gate as the gate;
d_beta [K / BK, B, T, HV], d_A [K / BK, chunks, HV] and d_bias [chunks, HV, K] are partial sums in fp32, added up in a fixed
order by the caller; chunks that do not exist are left as they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_linear.kernels.triton.common import (
    INTO,
    LOG2E,
    MAX_RANGE,
    ONWARD,
    TILE,
    chunk_log2_decay,
    chunk_of,
    held,
    load_gate,
    power2,
    split,
    stretch_sum,
    tile_sums,
)


@triton.jit
def gate_gradient(x, g, dg, amount, lower_bound, GATE: tl.constexpr, DOT: tl.constexpr):
    """(gradient with respect to the gate's argument x, with respect to A_log, unsummed); g is the log2-decay of x."""
    if GATE == 0:
        return dg, dg
    if GATE == 1:
        return dg * -amount / (1.0 + power2(-x * LOG2E, DOT)), dg * g / LOG2E
    decay = g / LOG2E
    inner = dg * decay * (1.0 - decay / lower_bound)
    return inner * amount, inner * amount * x


@triton.jit(do_not_specialize=["num_sequences", "tokens", "num_chunks", "nothing"])
def key_backward_kernel(
    q, k, gate, beta, A_log, dt_bias, cu_seqlens, cu_chunks, stretches, norms, states, d_states, written, d_right,
    d_output, d_keys, d_pairs, sums, dq, dk, d_gate, d_beta, d_A, d_bias,
    scale, lower_bound, num_sequences, tokens, num_chunks, num_tokens, nothing, stride_q, stride_k, stride_g, stride_beta,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, NORMALIZE: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = 64
    SLICES: tl.constexpr = K // BK
    part, chunk, hv = tl.program_id(0) % SLICES, tl.program_id(0) // SLICES, tl.program_id(1)
    h = hv // (HV // H)
    start, stop = chunk_of(chunk, cu_chunks, cu_seqlens, num_sequences, tokens, C, PACKED)
    if start >= stop:
        return
    at = chunk.to(tl.int64) * HV + hv
    dim = part * BK + tl.arange(0, BK)
    row = tl.arange(0, C)
    valid = row < (stop - start).to(tl.int32)
    r, c = row[:, None], row[None, :]
    cell = r * C + c
    q, k = q + start * stride_q + h * K, k + start * stride_k + h * K
    gate, beta = gate + start * stride_g + hv * K, beta + start * stride_beta + hv
    states, d_states = states + at * V * K, d_states + at * V * K
    written, d_right, d_output = written + at * C * V, d_right + at * C * V, d_output + (start * HV + hv) * V
    d_keys, d_pairs = d_keys + at * C * C, d_pairs + at * C * C
    norms, sums = norms + at * 2 * C, sums + at * 4 * C
    amount = 0.0
    if GATE != 0:
        amount = tl.exp2(tl.load(A_log + hv).to(tl.float32) * 1.4426950408889634)
        dt_bias += hv * K
    norm_k, norm_q = tl.load(norms + row), tl.load(norms + C + row)
    b_beta = tl.load(beta + row * stride_beta, valid, 0.0).to(tl.float32)
    b_k = tl.load(k + r * stride_k + dim[None, :], valid[:, None], 0.0).to(tl.float32)
    b_q = tl.load(q + r * stride_q + dim[None, :], valid[:, None], 0.0).to(tl.float32)
    b_k, b_q = (b_k * norm_k[:, None]).to(DOT), (b_q * norm_q[:, None]).to(DOT)
    g = chunk_log2_decay(load_gate(gate, dt_bias, row, valid, dim, stride_g, GATE), amount, lower_bound, GATE, DOT)
    g = tl.where(valid[:, None], g, 0.0)
    high, low = split(g, DOT)

    b_dq, b_p, b_dk = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    d_decay = tl.zeros([BK], tl.float32)
    for slice_v in range(V // BV):
        dim_v = slice_v * BV + tl.arange(0, BV)
        in_v, in_state = r * V + dim_v[None, :], dim_v[:, None] * K + dim[None, :]
        b_state, b_d_state = tl.load(states + in_state), tl.load(d_states + in_state)
        b_do = tl.load(d_output + r * HV * V + dim_v[None, :], valid[:, None], 0.0).to(DOT)
        b_dq = tl.dot(b_do, b_state, b_dq, input_precision=PRECISION)
        b_p = tl.dot(tl.load(d_right + in_v), b_state, b_p, input_precision=PRECISION)
        b_dk = tl.dot(tl.load(written + in_v), b_d_state, b_dk, input_precision=PRECISION)
        d_decay += tl.sum(b_state.to(tl.float32) * b_d_state.to(tl.float32), 0)
    total, range_16 = tile_sums(high, low, BK, DOT)
    selection = tl.load(stretches + INTO * C * C + cell)
    span = stretch_sum(selection, high, low, DOT)
    into = power2(span, DOT)
    b_dq *= into
    b_p *= -into
    high_d, low_d = split(b_q * b_dq + b_k * b_beta[:, None] * b_p, DOT)
    dg = stretch_sum(tl.trans(selection), high_d, low_d, DOT)
    b_dk *= power2(total[None, :] - span, DOT)
    high_d, low_d = split(b_k * b_dk, DOT)
    dg += stretch_sum(tl.trans(tl.load(stretches + ONWARD * C * C + cell)), high_d, low_d, DOT)
    dg += (d_decay * power2(total, DOT))[None, :]

    first, last = 0, TILE
    if range_16 > -MAX_RANGE:
        first, last = 4, TILE + 1
    for level in range(first, last):
        below, within, sign = level, level + 1, 1.0
        if level == TILE:
            below, within, sign = 0, 4, -1.0
        selection = tl.load(stretches + level * C * C + cell)
        span = stretch_sum(selection, high, low, DOT)
        late, early = power2(span, DOT), power2(span * sign, DOT)
        cells = ((r >> within) == (c >> within)) & ((r >> below) > (c >> below))
        # ``nothing`` is 0: what changes with the level is loaded again, and not kept in registers through the loop.
        b_d_keys = tl.where(cells, tl.load(d_keys + cell + level * nothing), 0.0).to(DOT)
        b_d_pairs = tl.where(cells, tl.load(d_pairs + cell + level * nothing), 0.0).to(DOT)
        own_k, own_q = held(b_k, DOT), held(b_q, DOT)
        early_k = (own_k * early).to(DOT)
        to_q = tl.dot(b_d_pairs, early_k, input_precision=PRECISION) * late
        to_p = tl.dot(b_d_keys, early_k, input_precision=PRECISION) * late
        to_k = tl.dot(tl.trans(b_d_pairs), (own_q * late).to(DOT), input_precision=PRECISION)
        to_k = tl.dot(tl.trans(b_d_keys), (own_k * b_beta[:, None] * late).to(DOT), to_k, input_precision=PRECISION)
        to_k *= early
        b_dq += to_q
        b_p += to_p
        b_dk += to_k
        high_d, low_d = split(own_q * to_q + own_k * (b_beta[:, None] * to_p + sign * to_k), DOT)
        dg += stretch_sum(tl.trans(selection), high_d, low_d, DOT)

    diagonal = tl.load(sums + 2 * C + row)
    b_dq += diagonal[:, None] * b_k
    b_dk += diagonal[:, None] * b_q
    of_beta = tl.sum(b_k * b_p, 1)
    if part == 0:
        of_beta += tl.load(sums + 3 * C + row)
    tl.store(d_beta + part.to(tl.int64) * num_tokens * HV + (start + row) * HV + hv, of_beta, valid)
    b_dk += b_beta[:, None] * b_p
    b_dq *= norm_q[:, None]
    b_dk *= norm_k[:, None]
    if NORMALIZE:
        b_dq -= b_q * (norm_q * tl.load(sums + row) / (scale * scale))[:, None]
        b_dk -= b_k * (norm_k * tl.load(sums + C + row))[:, None]
    out = (start + row)[:, None] * (HV * K) + hv * K + dim[None, :]
    tl.store(dq + out, b_dq.to(dq.dtype.element_ty), valid[:, None])
    tl.store(dk + out, b_dk.to(dk.dtype.element_ty), valid[:, None])
    x = load_gate(gate, dt_bias, row, valid, dim, stride_g, GATE)  # again: cheaper than keeping it and g in registers
    g = chunk_log2_decay(x, amount, lower_bound, GATE, DOT)
    dx, of_A = gate_gradient(x, g, dg, amount, lower_bound, GATE, DOT)
    tl.store(d_gate + out, dx.to(d_gate.dtype.element_ty), valid[:, None])
    if GATE != 0:
        tl.store(d_bias + at * K + dim, tl.sum(tl.where(valid[:, None], dx, 0.0), 0))
        total = tl.sum(tl.sum(tl.where(valid[:, None], of_A, 0.0), 1), 0)
        tl.store(d_A + (part.to(tl.int64) * num_chunks + chunk) * HV + hv, total)
