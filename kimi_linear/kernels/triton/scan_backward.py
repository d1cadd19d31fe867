"""The walk over chunks from the last to the first: gradients with respect to the state and to what each chunk wrote.

    du' = N^T do + write dS_end^T    dS_start = dS_end Diag(decay) + do^T read - du'^T erase

Programs, slices, slabs and segments as in scan.py; the slice of dS, [K, BV] fp32, stays in registers. With SAVE off only dS at the
start of the walk's last chunk comes out: what a segment adds on its own, from zero, which is how segments are built backward.
With FORGETS that walk begins where the segment's first chunks forget what comes from behind them.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kimi_linear.kernels.triton.configs import Config, config_of
from kimi_linear.kernels.triton.cuts import Cut, choose_cut, plan
from kimi_linear.kernels.triton.segments import (
    boundary_of,
    chunks_that_forget,
    combine,
    first_boundary,
    place_of_program,
    precision_of,
    segment_of,
    segments_of,
    sequence_of,
    shape_class,
)


class ScanGradients(NamedTuple):
    """Gradients that the reverse scan finds; those of its own inputs are products of these, chunk by chunk."""

    d_states: Tensor
    """[chunks, HV, V, K] in the inputs' dtype: with respect to the state at each chunk's END."""
    d_written: Tensor
    """[chunks, HV, C, V] in the inputs' dtype: with respect to u'."""
    d_initial_state: Tensor | None
    """[N, HV, V, K] fp32. None unless asked for."""


@triton.jit(do_not_specialize=["num_sequences", "tokens", "most", "least", "apart"])
def scan_backward_kernel(
    erase, read, write, pairs_q, decay, forgets, d_output, d_final_state, d_offsets, d_states, d_written, d_initial_state,
    cu_seqlens, cu_chunks, num_sequences, tokens, most, least, apart,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, FEWEST: tl.constexpr,
    PACKED: tl.constexpr, HAS_FINAL: tl.constexpr, WANT_INITIAL: tl.constexpr, SEGMENTED: tl.constexpr,
    SAVE: tl.constexpr, FORGETS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = 64
    part, hv, z = place_of_program(tl.program_id(0), HV, V // BV)
    n, s, count = z, z * 0, 1
    if SEGMENTED:
        if SAVE:
            n, s = segment_of(z, cu_chunks, num_sequences, least, apart, PACKED)
        else:
            n, s = boundary_of(z, cu_chunks, num_sequences, least, apart, PACKED)
            s += 1
    start, stop, first, chunks = sequence_of(n, cu_seqlens, cu_chunks, tokens, PACKED)
    begin, end = 0, chunks
    if SEGMENTED:
        count = segments_of(chunks, most, least, FEWEST)
        if s >= count:
            return
        begin, end = s * chunks // count, (s + 1) * chunks // count
        if FORGETS:
            walked, forgotten = chunks_that_forget(forgets, hv, first + begin, 1, end - begin, HV)
            end = begin + walked
    row, dim_k, dim_v = tl.arange(0, C), tl.arange(0, BK), part * BV + tl.arange(0, BV)
    inside = dim_v[None, :] * K + dim_k[:, None]
    place = (n.to(tl.int64) * HV + hv) * V * K + inside
    behind = tl.zeros([], tl.int64)  # the boundary behind this segment
    if SEGMENTED:
        behind = (first_boundary(n, first, least, apart) + s).to(tl.int64)
    d_state = ()
    for p in tl.static_range(K // BK):
        slab = tl.zeros([BK, BV], tl.float32)
        if HAS_FINAL:
            if s + 1 == count:
                slab = tl.load(d_final_state + place + p * BK)
        if SEGMENTED and SAVE:
            if s + 1 < count:
                slab = tl.load(d_offsets + (behind * HV + hv) * V * K + inside + p * BK)
        if FORGETS:
            slab = tl.where(forgotten, 0.0, slab)
        d_state += (slab,)
    for back in tl.range(end - begin, num_stages=STAGES):
        i = end - 1 - back
        slot = (first + i).to(tl.int64) * HV + hv
        at = slot * C + row
        in_k = at[:, None] * K + dim_k[None, :]
        token = start + i * C + row
        b_do = tl.load(d_output + (token[:, None] * HV + hv) * V + dim_v[None, :], (token < stop)[:, None], 0.0)
        b_do = b_do.to(erase.dtype.element_ty)
        b_pairs = tl.load(pairs_q + at[:, None] * C + row[None, :])
        du = tl.dot(tl.trans(b_pairs), b_do, input_precision=PRECISION)
        for p in tl.static_range(K // BK):
            low = d_state[p].to(erase.dtype.element_ty)
            if SAVE:
                tl.store(d_states + slot * V * K + inside + p * BK, low)
            du = tl.dot(tl.load(write + in_k + p * BK), low, du, input_precision=PRECISION)
        b_du = du.to(erase.dtype.element_ty)
        if SAVE:
            tl.store(d_written + at[:, None] * V + dim_v[None, :], b_du)
        before = ()
        for p in tl.static_range(K // BK):
            b_read, b_erase = tl.load(read + in_k + p * BK), tl.load(erase + in_k + p * BK)
            slab = d_state[p] * tl.load(decay + slot * K + p * BK + dim_k)[:, None]
            slab = tl.dot(tl.trans(b_read), b_do, slab, input_precision=PRECISION)
            before += (tl.dot(tl.trans(b_erase), -b_du, slab, input_precision=PRECISION),)
        d_state = before
    for p in tl.static_range(K // BK):
        if not SAVE:
            tl.store(d_offsets + ((behind - 1) * HV + hv) * V * K + inside + p * BK, d_state[p])
        elif WANT_INITIAL:
            if s == 0:
                tl.store(d_initial_state + place + p * BK, d_state[p])


def scan_backward(
    erase: Tensor, read: Tensor, write: Tensor, pairs_q: Tensor, decay: Tensor, d_output: Tensor,
    d_final_state: Tensor | None, operators: Tensor | None, cu_seqlens: Tensor | None, cu_chunks: Tensor | None, *,
    forgets: Tensor | None = None, lost: Tensor | None = None, initial: bool = True, cut: Cut | None = None,
    config: Config | None = None,
) -> ScanGradients:  # fmt: skip
    """The reverse of ``scan``; tensors of the same names as there.

    Args:
        d_output: [B, T, HV, V], contiguous, of any dtype. d_final_state: [N, HV, V, K] fp32, zero where None.
        operators, lost: those that ``scan`` returned. forgets: that of ``scan``, where one was given there.
        initial: find the gradient with respect to the initial state too.
        cut: that of ``scan``, where one was given there. config: instead of the chosen one, for benchmarks and tests.
    """
    (batch, tokens, _, value_dim), (chunks, v_heads, size, key_dim) = d_output.shape, erase.shape
    packed = cu_seqlens is not None
    sequences = cu_seqlens.numel() - 1 if packed else batch
    d_states = erase.new_empty(chunks, v_heads, value_dim, key_dim)
    d_written = erase.new_empty(chunks, v_heads, size, value_dim)
    d_initial = decay.new_empty(sequences, v_heads, value_dim, key_dim) if initial else None
    plans = plan(cut or choose_cut(v_heads, value_dim), sequences, chunks, packed)
    kernel = "kda_scan_backward_segmented" if plans.boundaries else "kda_scan_backward"
    config = config or config_of(kernel, erase, shape_class(key_dim, erase.dtype))
    block = min(config["BV"], value_dim)
    d_offsets = None

    def walk(save: bool, programs: int) -> None:
        if programs:
            scan_backward_kernel[(value_dim // block * v_heads * programs,)](
                erase, read, write, pairs_q, decay, None if save else forgets, d_output, d_final_state, d_offsets, d_states, d_written, d_initial,
                cu_seqlens, cu_chunks, sequences, tokens, plans.cut.most, plans.cut.least, plans.apart,
                v_heads, key_dim, value_dim, min(config["BK"], key_dim), block, plans.cut.FEWEST, packed, d_final_state is not None, initial,
                plans.boundaries > 0, save, forgets is not None and not save, config.num_stages, precision_of(erase.dtype),
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip

    if plans.boundaries:
        assert operators is not None
        assert operators.shape[0] == plans.boundaries
        d_offsets = decay.new_empty(plans.boundaries, v_heads, value_dim, key_dim)
        walk(False, plans.boundaries)
        combine(
            d_offsets, operators, lost, cu_seqlens, cu_chunks, plan=plans, sequences=sequences, tokens=tokens,
            reverse=True, dtype=erase.dtype,
        )  # fmt: skip
    walk(True, sequences + plans.boundaries)
    return ScanGradients(d_states, d_written, d_initial)
