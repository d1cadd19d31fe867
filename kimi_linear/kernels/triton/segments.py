"""Long sequences with few heads: a sequence cut into segments that run at once, exactly.

Over a stretch of chunks the scan is affine in the state that enters: S -> S P + O, with an operator P [K, K] and an offset
O [V, K]. So: *build* O and P of every segment at once, O as a scan from zero and P as one whose "values" are the rows of the
identity and whose u is zero; *combine* them in order, in fp32; then every segment scans again from its true state.
The first segment starts from the sequence's own state and needs no P, the last needs neither. Backward, the operator of a
segment is P transposed, so the forward's serve again.

How a sequence is cut depends on its own length and on the head counts, never on its neighbours, its slot or the GPU: its
output is bitwise the same alone and in any batch. The price: a batch of many long sequences of few heads is cut as well,
where it would fill the GPU whole, and does 7.5 / 3.5 of the products.
Boundary b lies behind segment s of sequence n, b = (first boundary of n) + s. offsets [boundaries, HV, V, K] fp32 hold O and,
once combined, the state at the boundary; operators [boundaries, HV, K, K] fp32.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_linear.kernels.triton.configs import Config, config_of
from kimi_linear.kernels.triton.cuts import Plan


@cache
def shape_class(key_dim: int, dtype: torch.dtype) -> str:
    """Under which the table keeps the scans' configurations."""
    return f"K={key_dim} {torch.finfo(dtype).bits} bit"


def precision_of(dtype: torch.dtype) -> str:
    """Of products: fp32 operands are split in three tf32 terms each, which keeps fp32's accuracy on the matrix unit."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def build(
    erase: Tensor, u: Tensor, write: Tensor, decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    cu_chunks: Tensor | None, *, plan: Plan, sequences: int, tokens: int, config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(offsets, operators) of every segment but the last; an offset of a first segment is already the state at its end."""
    (v_heads, key_dim), value_dim = erase.shape[1::2], u.shape[3]
    config = config or config_of("kda_scan_build", erase, shape_class(key_dim, erase.dtype))
    block = min(config["BV"], key_dim, value_dim)
    offsets = decay.new_empty(plan.boundaries, v_heads, value_dim, key_dim)
    operators = decay.new_empty(plan.boundaries, v_heads, key_dim, key_dim)
    build_kernel[((value_dim + key_dim) // block * v_heads * plan.boundaries,)](
        erase, u, write, decay, initial_state, offsets, operators, cu_seqlens, cu_chunks,
        sequences, tokens, plan.cut.most, plan.cut.least, plan.apart,
        v_heads, key_dim, value_dim, min(config["BK"], key_dim), block, plan.cut.FEWEST, cu_seqlens is not None,
        initial_state is not None,
        config.num_stages, precision_of(erase.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return offsets, operators


def combine(
    offsets: Tensor, operators: Tensor, cu_seqlens: Tensor | None, cu_chunks: Tensor | None, *, plan: Plan,
    sequences: int, tokens: int, reverse: bool,
) -> None:  # fmt: skip
    """``offsets`` become states at the boundaries, in place; ``reverse``: gradients with respect to them."""
    v_heads, value_dim, key_dim = offsets.shape[1:]
    config = config_of("kda_scan_combine", offsets, "any")
    block = config["BV"]
    combine_kernel[(value_dim // block * v_heads * sequences,)](
        offsets, operators, cu_seqlens, cu_chunks, tokens, plan.cut.most, plan.cut.least, plan.apart,
        v_heads, key_dim, value_dim, block, config["BK"], plan.cut.FEWEST, cu_seqlens is not None, reverse,
        config.num_stages, "tf32x3",
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


@triton.jit(do_not_specialize=["num_sequences", "tokens", "most", "least", "apart"])
def build_kernel(
    erase, u, write, decay, initial_state, offsets, operators, cu_seqlens, cu_chunks,
    num_sequences, tokens, most, least, apart,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, FEWEST: tl.constexpr,
    PACKED: tl.constexpr, HAS_STATE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Offset and operator of every segment but the last. (V + K) / BV * HV * boundaries programs; state [K, BV] in registers."""
    C: tl.constexpr = 64
    part, hv, b = place_of_program(tl.program_id(0), HV, (V + K) // BV)
    n, s = boundary_of(b, cu_chunks, num_sequences, least, apart, PACKED)
    _, _, first, chunks = sequence_of(n, cu_seqlens, cu_chunks, tokens, PACKED)
    count = segments_of(chunks, most, least, FEWEST)
    own = part < V // BV
    if s + 1 >= count or (s == 0 and not own):
        return
    row, dim_k, dim_v = tl.arange(0, C), tl.arange(0, BK), part * BV + tl.arange(0, BV)
    place = ((n * HV + hv).to(tl.int64) * V + dim_v)[None, :] * K + dim_k[:, None]
    state = ()
    for p in tl.static_range(K // BK):
        # A program that makes an operator begins with the identity; one that makes an offset has no such column.
        slab = tl.where(p * BK + dim_k[:, None] == dim_v[None, :] - V, 1.0, 0.0)
        if HAS_STATE:
            if s == 0:
                slab = tl.load(initial_state + place + p * BK)
        state += (slab,)
    for i in tl.range(s * chunks // count, (s + 1) * chunks // count, num_stages=STAGES):
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


@triton.jit(do_not_specialize=["tokens", "most", "least", "apart"])
def combine_kernel(
    offsets, operators, cu_seqlens, cu_chunks, tokens, most, least, apart,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, FEWEST: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Offsets become states at the boundaries, in order; REVERSE: gradients with respect to them, from the last.

    S_b = S_(b-1) P_b + O_b    dS_(b-1) = dS_b P_b^T + O_(b-1)    V / BV * HV * sequences programs; state [BV, K] in registers.
    """
    part, hv, n = place_of_program(tl.program_id(0), HV, V // BV)
    _, _, first, chunks = sequence_of(n, cu_seqlens, cu_chunks, tokens, PACKED)
    bounds = segments_of(chunks, most, least, FEWEST) - 1
    if bounds < 2:
        return
    begin = first_boundary(n, first, least, apart)
    dim_k, dim_v = tl.arange(0, K), part * BV + tl.arange(0, BV)
    place = dim_v[:, None] * K + dim_k[None, :]
    for i in range(1, bounds):
        if REVERSE:
            at, before = begin + bounds - 1 - i, begin + bounds - i
            operator = operators + (before.to(tl.int64) * HV + hv) * K * K
        else:
            at, before = begin + i, begin + i - 1
            operator = operators + (at.to(tl.int64) * HV + hv) * K * K
        target = offsets + (at.to(tl.int64) * HV + hv) * V * K + place
        entering = offsets + ((before.to(tl.int64) * HV + hv) * V + dim_v)[:, None] * K
        state = tl.load(target)
        for block in tl.range(K // BK, num_stages=STAGES):
            dim = block * BK + tl.arange(0, BK)
            if REVERSE:
                b_operator = tl.load(operator + dim_k[None, :] * K + dim[:, None])
            else:
                b_operator = tl.load(operator + dim[:, None] * K + dim_k[None, :])
            state = tl.dot(tl.load(entering + dim[None, :]), b_operator, state, input_precision=PRECISION)
        tl.store(target, state)
        tl.debug_barrier()  # the next step reads what other threads of this program have just stored
