"""Long sequences with few heads: a sequence cut into segments that run at once, exactly.

Over a stretch of chunks the scan is affine in the state that enters: S -> S P + O, with an operator P [K, K] and an offset
O [V, K]. So: *build* O and P of every segment at once, O as a scan from zero and P as one whose "values" are the rows of the
identity and whose u is zero; *combine* them in order, in fp32; then every segment scans again from its true state.
The first segment starts from the sequence's own state and needs no P, the last needs neither. Backward, the operator of a
segment is P transposed, so the forward's serve again.

How a sequence is cut depends on its own length and on the head counts, never on its neighbours, its slot or the GPU: its
output is bitwise the same alone and in any batch. The price: a batch of many long sequences of few heads is cut as well,
where it would fill the GPU whole, and does 7.5 / 3.5 of the products.

What is forgotten needs no operator. Where it is known how much of a state each chunk forgets, and some last chunks of a segment
leave less than 2^-GONE of what enters them, which is nothing in fp32 whatever it was, O is a scan of these alone and P is zero; so is backward what the first chunks add.
Strong gates forget in a few chunks, and building then costs nearly nothing. What is cut off follows from a segment's own gates.

Boundary b lies behind segment s of sequence n, b = (first boundary of n) + s. offsets [boundaries, HV, V, K] fp32 hold O and,
once combined, the state at the boundary; operators [boundaries, HV, K, K] fp32; lost [boundaries, HV] int32, 1 where the
operator is zero because all is forgotten.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_linear.kernels.triton.configs import Config, config_of
from kimi_linear.kernels.triton.cuts import Plan

GONE = tl.constexpr(280.0)  # fp32 ends at 2^128 and at 2^-149


@cache
def shape_class(key_dim: int, dtype: torch.dtype) -> str:
    """Under which the table keeps the scans' configurations."""
    return f"K={key_dim} {torch.finfo(dtype).bits} bit"


def precision_of(dtype: torch.dtype) -> str:
    """Of products: fp32 operands are split in three tf32 terms each, which keeps fp32's accuracy on the matrix unit."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def build(
    erase: Tensor, u: Tensor, write: Tensor, decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    cu_chunks: Tensor | None, *, plan: Plan, sequences: int, tokens: int, forgets: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(offsets, operators, lost) of every segment but the last; an offset of a first segment is already the state at its end.

    ``forgets``: as for ``scan``; ``lost`` is None where it is.
    """
    (v_heads, key_dim), value_dim = erase.shape[1::2], u.shape[3]
    config = config or config_of("kda_scan_build", erase, shape_class(key_dim, erase.dtype))
    block = min(config["BV"], key_dim, value_dim)
    offsets = decay.new_empty(plan.boundaries, v_heads, value_dim, key_dim)
    operators = decay.new_empty(plan.boundaries, v_heads, key_dim, key_dim)
    lost = None if forgets is None else offsets.new_empty(plan.boundaries, v_heads, dtype=torch.int32)
    build_kernel[((value_dim + key_dim) // block * v_heads * plan.boundaries,)](
        erase, u, write, decay, forgets, initial_state, offsets, operators, lost, cu_seqlens, cu_chunks,
        sequences, tokens, plan.cut.most, plan.cut.least, plan.apart,
        v_heads, key_dim, value_dim, min(config["BK"], key_dim), block, plan.cut.FEWEST, cu_seqlens is not None,
        initial_state is not None, forgets is not None,
        config.num_stages, precision_of(erase.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return offsets, operators, lost


def combine(
    offsets: Tensor, operators: Tensor, lost: Tensor | None, cu_seqlens: Tensor | None, cu_chunks: Tensor | None, *,
    plan: Plan, sequences: int, tokens: int, reverse: bool, dtype: torch.dtype,
) -> None:  # fmt: skip
    """``offsets`` become states at the boundaries, in place; ``reverse``: gradients with respect to them.

    Operators that are ``lost`` are not read, and what lies behind them does not wait for what lies before.
    ``dtype``: the inputs'. For 16 bits one tf32 product is enough, of a state that each chunk rounds to bf16 before it is read.
    """
    v_heads, value_dim, key_dim = offsets.shape[1:]
    config = config_of("kda_scan_combine", offsets, "any")
    block = config["BV"]
    combine_kernel[(value_dim // block * v_heads * (sequences if lost is None else plan.boundaries),)](
        offsets, operators, lost, cu_seqlens, cu_chunks, sequences, tokens, plan.cut.most, plan.cut.least, plan.apart,
        v_heads, key_dim, value_dim, block, min(config["BK"], key_dim), plan.cut.FEWEST, triton.next_power_of_2(plan.cut.most),
        cu_seqlens is not None, reverse, lost is not None,
        config.num_stages if key_dim <= 128 else 1, precision_of(dtype),  # of 256 KiB a step one stage is all there is room for
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


@triton.jit
def place_of_program(program, HV: tl.constexpr, PARTS: tl.constexpr):
    """(slice, value head, rest): slices of one head side by side, so that they share what they read in the L2."""
    return program % PARTS, program // PARTS % HV, program // (PARTS * HV)


@triton.jit
def sequence_of(n, cu_seqlens, cu_chunks, tokens, PACKED: tl.constexpr):
    """(first token, end, first chunk, chunks) of sequence n."""
    C: tl.constexpr = 64
    if PACKED:
        start = tl.load(cu_seqlens + n).to(tl.int64)
        stop = tl.load(cu_seqlens + n + 1).to(tl.int64)
        first = tl.load(cu_chunks + n)
    else:
        start, stop = n.to(tl.int64) * tokens, (n.to(tl.int64) + 1) * tokens
        first = n * tl.cdiv(tokens, C)
    return start, stop, first, tl.cdiv(stop - start, C).to(tl.int32)


@triton.jit
def segments_of(chunks, most, least, FEWEST: tl.constexpr):
    """Segments of a sequence of ``chunks`` chunks: ``Cut.segments``."""
    count = tl.minimum(most, chunks // least)
    return tl.where(count >= FEWEST, count, 1)


@triton.jit
def first_boundary(n, first, least, apart):
    """Index of the boundary behind the first segment of sequence n, whose first chunk is ``first``."""
    return tl.where(apart > 0, n * apart, first // least)


@triton.jit
def boundary_of(b, cu_chunks, num_sequences, least, apart, PACKED: tl.constexpr):
    """(n, s): the sequence in whose room boundary b lies, and how many boundaries of n lie before it."""
    n, before = b * 0, b * 0
    if PACKED:
        if apart == 0:
            high = num_sequences
            while high - n > 1:  # the last sequence whose boundaries begin at or before this one
                middle = (n + high) // 2
                if tl.load(cu_chunks + middle) // least <= b:
                    n = middle
                else:
                    high = middle
            before = tl.load(cu_chunks + n) // least
        else:
            n = b // apart
            before = n * apart
    else:
        n = b // apart
        before = n * apart
    return n, b - before


@triton.jit
def segment_of(z, cu_chunks, num_sequences, least, apart, PACKED: tl.constexpr):
    """(n, s) of program z of those that write outputs: first a first segment of each sequence, then one per boundary."""
    n, s = z, z * 0
    if z >= num_sequences:
        n, s = boundary_of(z - num_sequences, cu_chunks, num_sequences, least, apart, PACKED)
        s += 1
    return n, s


@triton.jit
def chunks_that_forget(forgets, hv, chunk, step, length, HV: tl.constexpr):
    """(n, whether they do): the fewest chunks, from ``chunk`` on in steps of ``step`` 1 or -1, that together leave less than
    2^-GONE of a state; all ``length`` where even they leave more."""
    B: tl.constexpr = 64  # loaded together: one after the other they would cost a trip to the L2 each
    some = tl.arange(0, B)
    known, found, total = length * 0, length, 0.0
    while (known < length) & (found == length):
        at = known + some
        x = tl.load(forgets + (chunk + step * at).to(tl.int64) * HV + hv, at < length, 0.0)
        far = (total + tl.cumsum(x, 0) < -GONE) & (at < length)
        found = tl.min(tl.where(far, at, length), 0)
        total += tl.sum(x, 0)
        known += B
    return tl.minimum(found + 1, length), found < length


@triton.jit(do_not_specialize=["num_sequences", "tokens", "most", "least", "apart"])
def build_kernel(
    erase, u, write, decay, forgets, initial_state, offsets, operators, lost, cu_seqlens, cu_chunks,
    num_sequences, tokens, most, least, apart,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, FEWEST: tl.constexpr,
    PACKED: tl.constexpr, HAS_STATE: tl.constexpr, FORGETS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Offset and operator of every segment but the last. (V + K) / BV * HV * boundaries programs; state [K, BV] in registers.

    FORGETS: where a segment's last chunks forget all that enters them, an offset is built from these, and an operator is zero.
    """
    C: tl.constexpr = 64
    part, hv, b = place_of_program(tl.program_id(0), HV, (V + K) // BV)
    n, s = boundary_of(b, cu_chunks, num_sequences, least, apart, PACKED)
    _, _, first, chunks = sequence_of(n, cu_seqlens, cu_chunks, tokens, PACKED)
    count = segments_of(chunks, most, least, FEWEST)
    own = part < V // BV
    if s + 1 >= count or (s == 0 and not own):
        return
    begin, end = s * chunks // count, (s + 1) * chunks // count
    if FORGETS:
        walked, forgotten = chunks_that_forget(forgets, hv, first + end - 1, -1, end - begin, HV)
        begin = end - tl.where(forgotten & (part >= V // BV), 0, walked)
        if part == 0:
            tl.store(lost + b.to(tl.int64) * HV + hv, forgotten.to(tl.int32))
    row, dim_k, dim_v = tl.arange(0, C), tl.arange(0, BK), part * BV + tl.arange(0, BV)
    place = ((n * HV + hv).to(tl.int64) * V + dim_v)[None, :] * K + dim_k[:, None]
    state = ()
    for p in tl.static_range(K // BK):
        # A program that makes an operator begins with the identity; one that makes an offset has no such column.
        slab = tl.where(p * BK + dim_k[:, None] == dim_v[None, :] - V, 1.0, 0.0)
        if HAS_STATE:
            if s == 0:
                slab = tl.load(initial_state + place + p * BK)
        if FORGETS:
            slab = tl.where(forgotten, 0.0, slab)
        state += (slab,)
    for i in tl.range(begin, end, num_stages=STAGES):
        slot = (first + i).to(tl.int64) * HV + hv
        at = slot * C + row
        in_k = at[:, None] * K + dim_k[None, :]
        b_u = tl.load(u + at[:, None] * V + dim_v[None, :], own & (dim_v < V)[None, :], 0.0).to(tl.float32)
        erased = tl.zeros([C, BV], tl.float32)
        for p in tl.static_range(K // BK):
            low = state[p].to(u.dtype.element_ty)
            erased = tl.dot(tl.load(erase + in_k + p * BK), low, erased, input_precision=PRECISION)
        b_u = (b_u - erased).to(u.dtype.element_ty)
        after = ()
        for p in tl.static_range(K // BK):
            b_write = tl.trans(tl.load(write + in_k + p * BK))
            b_decay = tl.load(decay + slot * K + p * BK + dim_k)
            after += (tl.dot(b_write, b_u, state[p] * b_decay[:, None], input_precision=PRECISION),)
        state = after
    at = b.to(tl.int64) * HV + hv
    for p in tl.static_range(K // BK):
        dim = p * BK + dim_k
        if own:
            tl.store(offsets + (at * V + dim_v)[None, :] * K + dim[:, None], state[p])
        else:
            tl.store(operators + (at * K + dim_v - V)[None, :] * K + dim[:, None], state[p])


@triton.jit(do_not_specialize=["num_sequences", "tokens", "most", "least", "apart"])
def combine_kernel(
    offsets, operators, lost, cu_seqlens, cu_chunks, num_sequences, tokens, most, least, apart,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, FEWEST: tl.constexpr,
    MOST: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr, LOST: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Offsets become states at the boundaries, in order; REVERSE: gradients with respect to them, from the last.

    S_b = S_(b-1) P_b + O_b    dS_(b-1) = dS_b P_b^T + O_(b-1)    V / BV * HV * sequences programs; state [BV, K] in registers.
    LOST: a program for every boundary instead, of which those work that depend on no other boundary, each until the next such.
    """
    part, hv, z = place_of_program(tl.program_id(0), HV, V // BV)
    n, s = z, z * 0
    if LOST:
        n, s = boundary_of(z, cu_chunks, num_sequences, least, apart, PACKED)
    _, _, first, chunks = sequence_of(n, cu_seqlens, cu_chunks, tokens, PACKED)
    bounds = segments_of(chunks, most, least, FEWEST) - 1
    if bounds < 2 or s >= bounds:
        return
    if REVERSE and not LOST:
        s = bounds - 1
    here, steps = first_boundary(n, first, least, apart) + s, bounds - 1 - s
    if REVERSE:
        steps = s
    if LOST:
        # The flag of step i, from here to the i-th boundary after it (REVERSE: before it); of step 0, to this one.
        step = 1 + tl.arange(0, MOST)
        if REVERSE:
            own, flags, waits = here + 1, here + 1 - step, s + 1 < bounds
        else:
            own, flags, waits = here, here + step, s > 0
        if tl.load(lost + own.to(tl.int64) * HV + hv, waits, 1) == 0:
            return
        ends = tl.load(lost + flags.to(tl.int64) * HV + hv, step <= steps, 1) != 0
        steps = tl.min(tl.where(ends, step, MOST), 0) - 1
    dim_k, dim_v = tl.arange(0, BK), part * BV + tl.arange(0, BV)
    place, of_head = hv * V * K + dim_v[:, None] * K + dim_k[None, :], hv.to(tl.int64) * K * K
    state = ()
    for p in tl.static_range(K // BK):
        state += (tl.load(offsets + here.to(tl.int64) * HV * V * K + place + p * BK),)
    # What a step loads does not depend on the state, so it runs ahead.
    for i in tl.range(1, steps + 1, num_stages=STAGES):
        if REVERSE:
            at, behind = here - i, here - i + 1
        else:
            at, behind = here + i, here + i
        target = offsets + at.to(tl.int64) * HV * V * K + place
        operator = operators + behind.to(tl.int64) * HV * K * K + of_head
        after = ()
        for p in tl.static_range(K // BK):
            new = tl.load(target + p * BK)
            for q in tl.static_range(K // BK):
                if REVERSE:
                    block = tl.load(operator + (p * BK + dim_k)[None, :] * K + (q * BK + dim_k)[:, None])
                else:
                    block = tl.load(operator + (q * BK + dim_k)[:, None] * K + (p * BK + dim_k)[None, :])
                new = tl.dot(state[q], block, new, input_precision=PRECISION)
            tl.store(target + p * BK, new)
            after += (new,)
        state = after
