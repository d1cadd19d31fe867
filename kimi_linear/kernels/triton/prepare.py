"""What the gate makes of q and k, and the pairs of tokens: one program per chunk and value head, tile after tile of 16 tokens.

    read = scale q 2^P    keys = k 2^P    write = k 2^(P_C - P)    decay = 2^(P_C)
    pairs_q[r, i] = sum_k scale q_r k_i 2^(P_r - P_i), i <= r    pairs_k the same with k_r, and i < r

P is the running log2-decay in the chunk. Each tile has an origin N, the integer below P at its start, channel by channel, and

    late = q 2^(P - N - a), k 2^(P - N - a)    early = k 2^(N + a - P)

where a is the anchor of each channel: 0, so that what a token holds depends on the tokens before it alone, while the channel
forgets at most 2^-MAX_RANGE in the tile; where it forgets more, an integer near P - N at the last token that is not below -DEEPEST (for fp32
less, as common.py says). A channel that forgets more than 2^-MAX_RANGE from there on too is steep: there a = 0, ``anchors`` holds
STEEP, early is anchored at the tile's end, and the pairs inside the tile are left to steep.py.

From one origin to another all factors are powers of two, which round nothing: late, rounded to bf16 once, becomes ``read`` and ``keys``,
and early, rounded once, what later tiles meet and, but for a last factor between 1 and 2, ``write``. So keys stay in registers, two in each, and one
instruction moves both. One product of late, [2 * 16, K], and the keys of this tile and of the three before, [4 * 16, K], gives all pairs.

A program's tiles are [L, S, P, CH]: row l P + p and channel s CH + c. So a warp has whole columns, and sums over rows need no other warp.
The next tile's q, k and gate are on their way while one is at work. For fp32, whose keys and products would spill, channels come in slices of BK.
Grid (chunks, HV). Outputs lie chunk by chunk: late [2, chunks, HV, C, K] (read, then keys), write [chunks, HV, C, K], pairs_q,
pairs_k [chunks, HV, C, C] (pairs_k below its diagonal only), decay [chunks, HV, K] fp32; for steep.py and the backward anchors,
totals (log2-decay of a tile) [chunks, HV, 4, K] fp32, flags [chunks, HV, 4] int32, a bit for every G channels of a tile, set
where one of them is steep; with SAVE also norms [chunks, HV, 2, C] fp32, what the rows of k and of q were scaled by, and
``served`` [chunks, HV] int32, 1 where an anchor in the chunk's middle serves all its channels. With FORGETS ``forgets``
[chunks, HV] fp32, for segments.py: the sum over tokens of the slowest channel's log2-decay, a bound of the chunk's log2-norm
as a map of states, if solve.py agrees.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_linear.kernels.triton.common import (
    DEEPEST,
    DEEPEST_FP32,
    MAX_RANGE,
    MAX_RANGE_FP32,
    STEEP,
    G,
    chunk_log2_decay,
    chunk_of,
    power2,
)
from kimi_linear.kernels.triton.steep import add_steep_pairs, one_serves


@triton.jit
def floats(x):
    """fp32, of bf16 by a shift and a mask for every two: the compiler takes three instructions."""
    if x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 one; shl.b32 one, $2, 16; mov.b32 $0, one; and.b32 one, $2, 0xffff0000; mov.b32 $1, one; }",
            "=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:  # noqa: RET505
        return x.to(tl.float32)


@triton.jit
def packed(x, DOT: tl.constexpr):
    """fp32 [..., n] rounded to bf16, two in an int32 [..., n / 2]: what a loop carries fills a register each. fp32 stays as it is."""
    if DOT == tl.float32:
        return x
    else:  # noqa: RET505
        low, high = tl.split(tl.reshape(x, x.shape[:-1] + [x.shape[-1] // 2, 2]))  # noqa: RUF005
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def unpacked(x, DOT: tl.constexpr):
    """``packed``, as bf16."""
    if DOT == tl.float32:
        return x
    else:  # noqa: RET505
        low, high = x.to(tl.int16).to(tl.bfloat16, bitcast=True), (x >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        return tl.reshape(tl.join(low, high), x.shape[:-1] + [x.shape[-1] * 2])  # noqa: RUF005


@triton.jit
def shifted(x, exponent, DOT: tl.constexpr):
    """``packed`` x times 2^exponent [S, CH], which are integers."""
    factor = over_tile(packed(power2(exponent, DOT), DOT))
    if DOT == tl.float32:
        return x * factor
    else:  # noqa: RET505
        return tl.inline_asm_elementwise(
            "{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }", "=r,r,r",
            [x, tl.broadcast_to(factor, x.shape)], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def scaled(x, factor, DOT: tl.constexpr):
    """``packed`` x times any factor [S, CH], rounded again."""
    if DOT == tl.float32:
        return x * over_tile(factor)
    else:  # noqa: RET505
        low, high = (x << 16).to(tl.float32, bitcast=True), (x & -65536).to(tl.float32, bitcast=True)
        wide = tl.reshape(tl.join(low, high), x.shape[:-1] + [x.shape[-1] * 2])  # noqa: RUF005
        return packed(wide * over_tile(factor), DOT)


@triton.jit
def over_tile(x):
    """[S, CH] to the axes of a tile."""
    return x[None, :, None, :]


@triton.jit
def over_rows(x):
    """[L, P] to the axes of a tile."""
    return x[:, None, :, None]


@triton.jit
def as_operand(a, b, c, d, COUNT: tl.constexpr, DOT: tl.constexpr):
    """``packed`` tiles under each other, [16 COUNT, BK]; a and b alone where COUNT is 2.

    By choosing and not by joining: a join would put rows that are 16 apart side by side in registers, and shared memory after them.
    """
    shape: tl.constexpr = (1, a.shape[0], a.shape[1], a.shape[2], a.shape[3])
    which = tl.arange(0, COUNT)[:, None, None, None, None]
    x = tl.where(which == 0, tl.reshape(a, shape), tl.reshape(b, shape))
    if COUNT == 4:
        x = tl.where(which < 2, x, tl.where(which == 2, tl.reshape(c, shape), tl.reshape(d, shape)))
    x = tl.permute(unpacked(x, DOT), (0, 1, 3, 2, 4))
    x = tl.reshape(x, (COUNT * 16, x.shape[3] * x.shape[4]))
    if DOT == tl.float32:
        return x
    else:  # noqa: RET505  (from where joins are in sight, Triton lays operands out for half-wide loads: five moves a product)
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.bfloat16, is_pure=False, pack=2)


@triton.jit
def before_lane(sum_a, before_a, sum_b, before_b):
    """For a scan of (sum of a lane's rows, 0): (sum so far, sum of the lanes before), which holds nothing of its own lane."""
    return sum_a + sum_b, sum_a + before_b


@triton.jit(do_not_specialize=["num_sequences", "tokens"])
def prepare_kernel(
    q, k, gate, A_log, dt_bias, cu_seqlens, cu_chunks, late, write, pairs_q, pairs_k, decay, forgets, anchors, totals, flags, norms, served,
    scale, lower_bound, num_sequences, tokens, size, stride_q, stride_k, stride_g,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr, NORMALIZE: tl.constexpr, PACKED: tl.constexpr,
    BK: tl.constexpr, SAVE: tl.constexpr, FORGETS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = 64
    # In fp32 rows are added up one after the other, as the backward does it: in another order totals differ by a rounding of hundreds.
    L: tl.constexpr = 1 if DOT == tl.float32 else 4
    P: tl.constexpr = 16 // L
    CH: tl.constexpr = 64 if BK >= 64 else BK
    S: tl.constexpr = BK // CH
    IN_ONE: tl.constexpr = 1 if DOT == tl.float32 else 2  # numbers that lie in one of ``packed``
    widest: tl.constexpr = MAX_RANGE_FP32 if DOT == tl.float32 else MAX_RANGE
    deepest: tl.constexpr = DEEPEST_FP32 if DOT == tl.float32 else DEEPEST
    tl.static_assert(BK == K or DOT == tl.float32)  # slices add up their pairs in memory: 16 bits are too few
    chunk, hv = tl.program_id(0), tl.program_id(1)
    h = hv // (HV // H)
    start, stop = chunk_of(chunk, cu_chunks, cu_seqlens, num_sequences, tokens, C, PACKED)
    if start >= stop:
        return
    # Bases are 64-bit scalars, so that offsets inside the chunk are 32-bit: half the registers.
    at = chunk.to(tl.int64) * HV + hv
    left = (stop - start).to(tl.int32)
    q, k, gate = q + start * stride_q + h * K, k + start * stride_k + h * K, gate + start * stride_g + hv * K
    late, write, pairs_q, pairs_k = late + at * C * K, write + at * C * K, pairs_q + at * C * C, pairs_k + at * C * C
    anchors, totals, flags, decay = anchors + at * 4 * K, totals + at * 4 * K, flags + at * 4, decay + at * K
    if DOT != tl.float32:
        late, write = late.to(tl.pointer_type(tl.int32)), write.to(tl.pointer_type(tl.int32))
    if SAVE:
        norms += at * 2 * C
    l, s, p_ = tl.arange(0, L)[:, None], tl.arange(0, S)[:, None], tl.arange(0, P)[None, :]
    row, in_slice = l * P + p_, s * CH + tl.arange(0, CH)[None, :]
    two_in_slice = s * (CH // IN_ONE) + tl.arange(0, CH // IN_ONE)[None, :]
    token_of, r, c = over_rows(row), tl.arange(0, 16)[:, None], tl.arange(0, 64)[None, :]
    amount = 0.0
    if GATE != 0:
        amount = tl.exp2(tl.load(A_log + hv).to(tl.float32) * 1.4426950408889634)
        dt_bias += hv * K
    bits, steep_groups, one_tile = 0.0, tl.zeros([4], tl.int32), tl.arange(0, 4)
    tile_of = tl.arange(0, 4)[:, None, None]
    norms_k, norms_q = tl.full([4, L, P], 1.0, tl.float32), tl.full([4, L, P], 1.0, tl.float32) * scale
    slowest_of = tl.full([4, L, P], float("-inf"), tl.float32)
    if BK < K and NORMALIZE:
        sum_k, sum_q = tl.zeros([4, L, P], tl.float32), tl.zeros([4, L, P], tl.float32)
        every = (tile_of * 16 + row[None, :, :])[:, :, :, None]
        for part in range(K // BK):
            d = (part * BK + tl.arange(0, BK))[None, None, None, :]
            x = tl.load(k + every * stride_k + d, every < left, 0.0)
            sum_k += tl.sum(x * x, 3)
            x = tl.load(q + every * stride_q + d, every < left, 0.0)
            sum_q += tl.sum(x * x, 3)
        norms_k, norms_q = tl.rsqrt(sum_k + 1e-6), tl.rsqrt(sum_q + 1e-6) * scale
    dim, d, two_d = in_slice, over_tile(in_slice), over_tile(two_in_slice)
    bias = tl.zeros([S, CH], tl.float32)
    none = tl.zeros([L, S, P, CH // IN_ONE], tl.float32 if DOT == tl.float32 else tl.int32)
    if GATE != 0:
        bias = tl.load(dt_bias + dim).to(tl.float32)
    origin, rest = tl.zeros([S, CH], tl.float32), tl.zeros([S, CH], tl.float32)  # of P at the tile's start
    # Keys of the tile before, of the one before that, and so on, from this tile's origin.
    one, two, three = none, none, none
    # One loop for both, as Triton reads the inside of a loop in a loop four times.
    for step in tl.range(4 * (K // BK), num_stages=STAGES):
        part, tile = 0, step
        if BK < K:
            part, tile = step // 4, step % 4
            dim = part * BK + in_slice
            d, two_d = over_tile(dim), over_tile(part * (BK // IN_ONE) + two_in_slice)
            if GATE != 0:
                bias = tl.load(dt_bias + dim).to(tl.float32)
            if tile == 0:
                origin, rest = tl.zeros([S, CH], tl.float32), tl.zeros([S, CH], tl.float32)
                one, two, three = none, none, none
        token = tile * 16 + token_of
        # A tile past the end is zeros, and forgets nothing: the scan reads whole chunks.
        inside = token < left
        x = floats(tl.load(gate + token * stride_g + d, inside, 0.0))
        if GATE != 0:
            x += over_tile(bias)
        g = chunk_log2_decay(x, tl.where(inside, amount, 0.0), tl.where(inside, lower_bound, 0.0), GATE, DOT)
        if FORGETS:
            slowest = tl.max(tl.max(g, 3), 1)
            if BK == K:
                bits += tl.sum(tl.sum(slowest, 1), 0)
            else:
                slowest_of = tl.where(tile_of == tile, tl.maximum(slowest_of, slowest[None, :, :]), slowest_of)
        of_lane = tl.sum(g, 2, keep_dims=True)
        _, before = tl.associative_scan((of_lane, of_lane * 0.0), 0, before_lane)
        p = tl.cumsum(g, 2) + before
        total = tl.sum(tl.sum(of_lane, 2), 0)
        if DOT == tl.float32:  # summed in another order it would be off by a rounding of hundreds
            total = tl.sum(tl.sum(tl.where(token_of == 15, p, 0.0), 2), 0)
        end = rest + total
        onward = tl.floor(end)
        p += over_tile(rest)
        tl.store(totals + tile * K + dim, total)
        # Of what few tiles have to do nothing outlives this branch but ``mark``: registers are what the others lack.
        mark, groups = tl.zeros([S, CH], tl.float32), 0
        if tl.min(tl.min(total, 1), 0) < -widest:
            deep = tl.floor(tl.min(tl.min(tl.where(p >= -deepest, p, 0.0), 2), 0))
            mark = tl.where(total >= -widest, 0.0, tl.minimum(deep, 0.0))
            steep = total - mark < -widest
            mark = tl.where(steep, STEEP, mark)
            group = tl.max(tl.reshape(steep.to(tl.int32), [BK // G, G]), 1)
            groups = tl.sum(group << (part * (BK // G) + tl.arange(0, BK // G)), 0)
            anchor = tl.minimum(mark, 0.0)
            p -= over_tile(anchor)
            one, two, three = shifted(one, anchor, DOT), shifted(two, anchor, DOT), shifted(three, anchor, DOT)
        tl.store(anchors + tile * K + dim, mark)
        into = power2(p, DOT)
        # q first, and done with, before k comes: both at once are too many registers.
        b_q = floats(tl.load(q + token * stride_q + d, inside, 0.0))
        norm_q, norm_k = tl.full([L, P], 1.0, tl.float32) * scale, tl.full([L, P], 1.0, tl.float32)
        if BK < K:
            norm_q = tl.sum(tl.where(tile_of == tile, norms_q, 0.0), 0)
            norm_k = tl.sum(tl.where(tile_of == tile, norms_k, 0.0), 0)
        elif NORMALIZE:
            norm_q = tl.rsqrt(tl.sum(tl.sum(b_q * b_q, 3), 1) + 1e-6) * scale
        late_q = packed(b_q * (over_rows(norm_q) * into), DOT)
        b_k = floats(tl.load(k + token * stride_k + d, inside, 0.0))
        if BK == K and NORMALIZE:
            norm_k = tl.rsqrt(tl.sum(tl.sum(b_k * b_k, 3), 1) + 1e-6)
        b_k *= over_rows(norm_k)
        own = packed(b_k * power2(over_tile(tl.where(mark == STEEP, onward, 0.0)) - p, DOT), DOT)
        near = shifted(own, tl.where(mark == STEEP, -1000.0, 0.0), DOT)
        rows, to_start = token * (K // IN_ONE) + two_d, origin + tl.minimum(mark, 0.0)
        late_k = packed(b_k * into, DOT)
        tl.store(late + size // IN_ONE + rows, shifted(late_k, to_start, DOT))
        tl.store(late + rows, shifted(late_q, to_start, DOT))
        found = tl.dot(
            as_operand(late_q, late_k, late_k, late_k, 2, DOT), tl.trans(as_operand(near, one, two, three, 4, DOT)),
            input_precision=PRECISION,
        )  # fmt: skip
        of_q, of_k = tl.split(tl.permute(tl.reshape(found, [2, 16, 64]), (1, 2, 0)))
        # Column c belongs to the tile c // 16 before this one; where there is none its keys are zeros, and the cells those of later tiles.
        cell, earlier = (tile * 16 + r) * C + ((tile - c // 16) & 3) * 16 + c % 16, (c >= 16) | (r > c)
        if part > 0:
            of_q, of_k = of_q + tl.load(pairs_q + cell), of_k + tl.load(pairs_k + cell)
        tl.store(pairs_q + cell, tl.where(earlier | (r == c), of_q, 0.0).to(DOT))
        tl.store(pairs_k + cell, tl.where(earlier, of_k, 0.0).to(pairs_k.dtype.element_ty))
        steep_groups = tl.where(one_tile == tile, steep_groups | groups, steep_groups)
        if SAVE:
            tl.store(norms + tile * 16 + row, norm_k)
            tl.store(norms + C + tile * 16 + row, norm_q)
        fade = onward - tl.minimum(mark, 0.0)
        next_two, next_three = shifted(one, fade, DOT), shifted(two, fade, DOT)
        one = shifted(own, tl.where(mark == STEEP, 0.0, fade), DOT)
        origin, rest = origin + onward, end - onward
        if tile == 3:
            last, rows = power2(rest, DOT), token_of * (K // IN_ONE) + two_d
            TILE: tl.constexpr = 16 * K // IN_ONE
            tl.store(decay + dim, power2(origin + rest, DOT))
            tl.store(write + 3 * TILE + rows, scaled(one, last, DOT))
            tl.store(write + 2 * TILE + rows, scaled(next_two, last, DOT))
            tl.store(write + TILE + rows, scaled(next_three, last, DOT))
            tl.store(write + rows, scaled(shifted(three, fade, DOT), last, DOT))
        two, three = next_two, next_three
    tl.store(flags + one_tile, steep_groups)
    any_steep = tl.max(steep_groups, 0) > 0
    if SAVE or any_steep:
        tl.debug_barrier()  # what other threads have stored of totals, anchors, pairs and flags is there
    if SAVE:
        tl.store(served + at, (one_serves(totals, K, DOT) & (any_steep == 0)).to(tl.int32))
    if any_steep:
        for tile in range(4):
            groups = tl.load(flags + tile)
            if groups > 0:
                add_steep_pairs(
                    q, k, gate, dt_bias, anchors, pairs_q, pairs_k, tile, groups, left, amount, lower_bound, scale,
                    stride_q, stride_k, stride_g, K, GATE, NORMALIZE, DOT,
                )  # fmt: skip
    if FORGETS:
        if BK < K:
            bits = tl.sum(tl.sum(tl.sum(slowest_of, 2), 1), 0)
        tl.store(forgets + at, bits)
