"""The walk over chunks, the only sequential part: one program per sequence, value head and slice of the value dim.

    u' = u - erase S^T    o = read S^T + N u'    S <- S Diag(decay) + u'^T write

The slice of the state, [K, BV] fp32 in slabs of BK keys, stays in registers from the first chunk to the last; the loads of the
next chunks run ahead of it, and are what bounds it. Slabs are for fp32, whose products in three terms would spill at K = 128. Where heads are few a long sequence is cut (segments.py), and a program walks one segment.
One dimension of programs, V / BV * HV * (sequences + boundaries between segments), V fastest. Chunk-major inputs: rows past a sequence's end are zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_linear.kernels.triton.common import CHUNK
from kimi_linear.kernels.triton.configs import Config, config_of
from kimi_linear.kernels.triton.cuts import Cut, choose_cut, plan
from kimi_linear.kernels.triton.segments import (
    build,
    combine,
    first_boundary,
    place_of_program,
    precision_of,
    segment_of,
    segments_of,
    sequence_of,
    shape_class,
)


class ScanResult(NamedTuple):
    """What a scan returns besides the output, which it writes in place."""

    final_state: Tensor
    """[N, HV, V, K] fp32."""
    states: Tensor | None
    """[chunks, HV, V, K] in the inputs' dtype: the state at each chunk's start. None unless ``save``."""
    written: Tensor | None
    """[chunks, HV, C, V] u', in the inputs' dtype. None unless ``save``."""
    exported: Tensor | None
    """[E, HV, V, K] fp32: the state after the asked number of tokens. None unless ``export``."""
    operators: Tensor | None
    """[boundaries, HV, K, K] fp32, for ``scan_backward``. None where no sequence can be long enough to be cut."""
    lost: Tensor | None
    """[boundaries, HV] int32: which operators are zero because all is forgotten. None without ``forgets`` or operators."""


@triton.jit(do_not_specialize=["num_sequences", "tokens", "most", "least", "apart"])
def scan_kernel(
    erase, u, read, write, pairs_q, decay, initial_state, offsets, output, final_state, states, written, exported,
    export_slot, cu_seqlens, cu_chunks, num_sequences, tokens, most, least, apart,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, FEWEST: tl.constexpr,
    PACKED: tl.constexpr, HAS_STATE: tl.constexpr, SEGMENTED: tl.constexpr, SAVE: tl.constexpr, EXPORT: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = 64
    part, hv, z = place_of_program(tl.program_id(0), HV, V // BV)
    n, s, count = z, z * 0, 1
    if SEGMENTED:
        n, s = segment_of(z, cu_chunks, num_sequences, least, apart, PACKED)
    start, stop, first, chunks = sequence_of(n, cu_seqlens, cu_chunks, tokens, PACKED)
    begin, end = 0, chunks
    if SEGMENTED:
        count = segments_of(chunks, most, least, FEWEST)
        if s >= count:
            return
        begin, end = s * chunks // count, (s + 1) * chunks // count
    row, dim_k, dim_v = tl.arange(0, C), tl.arange(0, BK), part * BV + tl.arange(0, BV)
    inside = dim_v[None, :] * K + dim_k[:, None]
    place = (n.to(tl.int64) * HV + hv) * V * K + inside
    state = ()
    for p in tl.static_range(K // BK):
        slab = tl.zeros([BK, BV], tl.float32)
        if HAS_STATE:
            if s == 0:
                slab = tl.load(initial_state + place + p * BK)
        if SEGMENTED:
            if s > 0:
                b = (first_boundary(n, first, least, apart) + s - 1).to(tl.int64)
                slab = tl.load(offsets + (b * HV + hv) * V * K + inside + p * BK)
        state += (slab,)
    for i in tl.range(begin, end, num_stages=STAGES):
        slot = (first + i).to(tl.int64) * HV + hv
        at = slot * C + row
        in_k, in_v = at[:, None] * K + dim_k[None, :], at[:, None] * V + dim_v[None, :]
        b_u = tl.load(u + in_v).to(tl.float32)
        b_pairs = tl.load(pairs_q + at[:, None] * C + row[None, :])
        erased, o = tl.zeros([C, BV], tl.float32), tl.zeros([C, BV], tl.float32)
        for p in tl.static_range(K // BK):
            low = state[p].to(u.dtype.element_ty)
            if SAVE:
                tl.store(states + slot * V * K + inside + p * BK, low)
            erased = tl.dot(tl.load(erase + in_k + p * BK), low, erased, input_precision=PRECISION)
        b_u = (b_u - erased).to(u.dtype.element_ty)
        if SAVE:
            tl.store(written + in_v, b_u)
        for p in tl.static_range(K // BK):
            low = state[p].to(u.dtype.element_ty)
            o = tl.dot(tl.load(read + in_k + p * BK), low, o, input_precision=PRECISION)
        o = tl.dot(b_pairs, b_u, o, input_precision=PRECISION)
        after = ()
        for p in tl.static_range(K // BK):
            b_write = tl.trans(tl.load(write + in_k + p * BK))
            b_decay = tl.load(decay + slot * K + p * BK + dim_k)
            after += (tl.dot(b_write, b_u, state[p] * b_decay[:, None], input_precision=PRECISION),)
        state = after
        token = start + i * C + row
        tl.store(
            output + (token[:, None] * HV + hv) * V + dim_v[None, :],
            o.to(output.dtype.element_ty),
            (token < stop)[:, None],
        )
        if EXPORT:
            to = tl.load(export_slot + first + i)
            for p in tl.static_range(K // BK):
                tl.store(exported + (to.to(tl.int64) * HV + hv) * V * K + inside + p * BK, state[p], to >= 0)
    if s + 1 == count:
        for p in tl.static_range(K // BK):
            tl.store(final_state + place + p * BK, state[p])


def scan(
    erase: Tensor, u: Tensor, read: Tensor, write: Tensor, pairs_q: Tensor, decay: Tensor, initial_state: Tensor | None,
    output: Tensor, cu_seqlens: Tensor | None, cu_chunks: Tensor | None, *, forgets: Tensor | None = None,
    save: bool = False, export: Sequence[tuple[int, int]] = (), cut: Cut | None = None, config: Config | None = None,
    build_config: Config | None = None,
) -> ScanResult:  # fmt: skip
    """Walk over the chunks, filling ``output``. Every tensor is contiguous; the caller has checked shapes and dtypes.

    Args:
        erase, read, write: [chunks, HV, C, K], C = 64, bf16 or fp32, zeros past a sequence's end. u: [chunks, HV, C, V].
        pairs_q: [chunks, HV, C, C]. decay: [chunks, HV, K] fp32.
        initial_state: [N, HV, V, K] fp32, zero where None.
        output: [B, T, HV, V], written.
        cu_seqlens: [N+1] where sequences are packed, with cu_chunks [N+1] int32, the first chunk of each, which may
            leave gaps, and a number that is not below what follows the last. Then ``chunks`` may be more than there are. None: every row of B is a sequence.
        forgets: [chunks, HV] fp32, an upper bound of log2 of the norm of what a chunk does to the state that enters it,
            S -> S (Diag(decay) - erase^T write): below zero where every channel decays, 1e30 where no bound is known.
            Segments are built from no more chunks than a state is remembered for. None: nothing is known.
        save: keep what the backward pass needs.
        export: pairs of a sequence and a number of its tokens, a multiple of C between C and its length, no pair twice.
            The state is NaN where a packed sequence is shorter.
        cut, config, build_config: instead of the chosen ones, for benchmarks and tests.
    """
    (batch, tokens), (chunks, v_heads, _, key_dim), value_dim = output.shape[:2], erase.shape, u.shape[3]
    packed = cu_seqlens is not None
    sequences = cu_seqlens.numel() - 1 if packed else batch
    final_state = decay.new_empty(sequences, v_heads, value_dim, key_dim)
    states = erase.new_empty(chunks, v_heads, value_dim, key_dim) if save else None
    written = torch.empty_like(u) if save else None
    slots, exported = None, None
    if export:
        slots = _export_slots(export, chunks, tokens, cu_seqlens, cu_chunks, erase.device)
        # Only the GPU knows where a packed sequence ends; what lies behind that is not written.
        exported = decay.new_full((len(export), v_heads, value_dim, key_dim), torch.nan)
    plans = plan(cut or choose_cut(v_heads, value_dim), sequences, chunks, packed)
    offsets, operators, lost = None, None, None
    if plans.boundaries:
        offsets, operators, lost = build(
            erase, u, write, decay, initial_state, cu_seqlens, cu_chunks, plan=plans, sequences=sequences, tokens=tokens,
            forgets=forgets, config=build_config,
        )  # fmt: skip
        combine(
            offsets, operators, lost, cu_seqlens, cu_chunks, plan=plans, sequences=sequences, tokens=tokens,
            reverse=False, dtype=erase.dtype,
        )  # fmt: skip
    kernel = "kda_scan_segmented" if plans.boundaries else "kda_scan"
    config = config or config_of(kernel, erase, shape_class(key_dim, erase.dtype))
    block = min(config["BV"], value_dim)
    programs = value_dim // block * v_heads * (sequences + plans.boundaries)
    if programs:
        scan_kernel[(programs,)](
            erase, u, read, write, pairs_q, decay, initial_state, offsets, output, final_state, states, written, exported,
            slots, cu_seqlens, cu_chunks, sequences, tokens, plans.cut.most, plans.cut.least, plans.apart,
            v_heads, key_dim, value_dim, min(config["BK"], key_dim), block, plans.cut.FEWEST, packed, initial_state is not None,
            plans.boundaries > 0, save, exported is not None, config.num_stages, precision_of(erase.dtype),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return ScanResult(final_state, states, written, exported, operators, lost)


def _export_slots(
    export: Sequence[tuple[int, int]], chunks: int, tokens: int, cu_seqlens: Tensor | None, cu_chunks: Tensor | None,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """[chunks] int32: where the state at a chunk's end goes, -1 for nowhere."""
    if len(set(export)) < len(export) or any(offset < CHUNK or offset % CHUNK for _, offset in export):
        raise ValueError(
            f"export: expected different (sequence, tokens) with tokens a multiple of {CHUNK} from {CHUNK} on, "
            f"got {list(export)}"
        )
    sequence, offset = torch.tensor(list(export), device=device).unbind(1)
    if cu_seqlens is None:
        chunk, length = sequence * -(-tokens // CHUNK), tokens
    else:
        assert cu_chunks is not None
        chunk, length = cu_chunks[sequence], cu_seqlens.diff()[sequence]
    # A state past its sequence's end goes into one place more than there is, not into a neighbour's.
    chunk = torch.where(offset <= length, chunk + offset // CHUNK - 1, chunks)
    slots = torch.full((chunks + 1,), -1, dtype=torch.int32, device=device)
    slots[chunk] = torch.arange(len(export), dtype=torch.int32, device=device)
    return slots[:chunks]
