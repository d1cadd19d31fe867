"""The core of a KDA layer for a decoded token, in one kernel, in place on a pool of slots.

    q, k, v = silu(convolve(window, raw))    q, k to unit length    S <- S Diag(2^g)    d = beta (v - S k)
    o = scale (S q + (k . q) d)              S <- S + d k^T         output = rms_norm(o) * weight * activation(gate)

A step is memory traffic: the state, 64 KiB a head at K = V = 128, is read once and written once; all else is 1 % of that.
What it waits for is latency. A program takes BV rows of a head's state [V, K], asks for everything that a token needs
before anything is computed, and makes q, k and the gate for itself.

Grid (V / BV, HV, B). Strides and numbers that a model fixes are constants, so a launch passes nothing but pointers. The state
stays in registers over the tokens of a call; ``keep`` names a slot for the state after each of them.

**The end of a head.** Two things need every program of a key head to be through: the norm of the output, which is one sum over
V, and the new window, which overwrites what the others still read. Where a head has one program, that is all (DIRECT). Where
all programs of a launch fit on the GPU at once, they wait for each other (WAIT): each leaves its sums of squares, in words of
64 bits that carry the call's number, reads those of the others until their number is right, and norms its own rows, which it
still holds. That is one way to the L2 and back, with no fence, no barrier and nothing to clear. Where they may not fit,
nobody may wait (TICKET): raw outputs go through ``scratch``, and the program that arrives last, by an atomic ticket,
does the rest. One token of many heads takes a program a head that goes through it in passes (PASSES, ``head_kernel``).
Words and tickets belong to a pool's slots (``tickets.py``).

**The same bits** however a head is cut, so that a launch may be chosen by the number of programs. The norm is one tree of
pairs, and two terms have one sum in either order, in any layout. Sums over K are those of a row, which never leaves a warp: a
tile of the state lies as [V, K/32, 32], lines of 128 bytes. S q is read from the same decayed state as S k, and squares of
q and k, which norm them afterwards, go along in the same reduction: it is one wait for all of them.

A call of S tokens gives bitwise what S calls give, so that speculative decoding changes nothing. Builds for different S are
compiled apart; left free to fuse products into sums, the compiler did so differently in each. So fusion is off, and the
places where it pays say ``tl.fma``.

**What is asked for early.** From sm_90 on the kernel may be launched while the one before it still runs (PDL). It waits for
that one's end before it uses anything, but it may ask: AHEAD = 1 brings the slot's rows and windows into the L2 before the
wait, AHEAD = 2 also goes on with that slot after it, while the slot is read again, and loads anew where the guess was wrong.
These are hints: no value that is used was read before the wait.

**What is stored at once.** Memory does better with large stores: many heads put their rows into shared memory, from which one
thread has them stored 8 KiB at a time (BULK; cp.async.bulk, sm_90 on). Large loads gain nothing, nor does asking for more at a
time: 64 KiB a processor are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from math import gcd
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kimi_linear.kernels.triton import compile_ahead
from kimi_linear.kernels.triton.common import LOG2E, log2_decay
from kimi_linear.kernels.triton.configs import Config, config_of
from kimi_linear.kernels.triton.ptx import (
    INTERPRETED,
    ask_ahead,
    publish,
    put_shared,
    shared_room,
    store_bulk,
    store_here,
    text_of,
    wait_for,
    wait_until_read,
)
from kimi_linear.kernels.triton.tickets import tickets_of

LANES = tl.constexpr(32)
"""Key channels side by side in a tile: 8 lanes of 4, which is one line of 128 bytes."""
DIRECT, WAIT, TICKET, PASSES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
"""How a head ends: by its only program, by programs that wait for each other, by whichever arrives last, or by its only
program, which goes through it in passes (``head_kernel``)."""
QUAD = tl.constexpr(4)
"""Rows whose sum of squares is one word: those that lie in one warp, in any launch."""


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def quad_sums(x, N: tl.constexpr):
    """[N] to [N / 4]. Two terms have one sum in either order, so a tree of pairs has the same bits in every layout."""
    pairs = tl.sum(tl.reshape(x, [N // 2, 2]), 1)
    return tl.sum(tl.reshape(pairs, [N // 4, 2]), 1)


@triton.jit
def tree_sum(x, N: tl.constexpr):
    """[N] to [1], a tree of pairs as in ``quad_sums``, but the first half with the second."""
    for level in tl.static_range(1, 9):
        if (N >> level) > 0:
            x = tl.sum(tl.reshape(x, [2, N >> level]), 0)
    return x


@triton.jit
def ask_for(
    memory, window, hv, start,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """What a program reads of its slot: rows of the state, and windows of q, k and v."""
    ask_ahead(memory + (hv * V + start) * K, BV * K * 4)
    if W > 1:
        COLUMN: tl.constexpr = (W - 1) * (window.dtype.element_ty.primitive_bitwidth // 8)
        h = hv // (HV // H)
        ask_ahead(window + h * K * (W - 1), K * COLUMN // 16 * 16)
        ask_ahead(window + (H + h) * K * (W - 1), K * COLUMN // 16 * 16)
        ask_ahead(window + (2 * H * K + hv * V + start) * (W - 1), BV * COLUMN // 16 * 16)


@triton.jit
def window_of(old, dim, place, W: tl.constexpr):
    """A convolution's window, oldest first, and dim, since no tuple is empty."""
    values = (dim,)
    for w in tl.static_range(W - 1):
        values = (tl.load(old + (place + dim) * (W - 1) + (W - 2 - w)),) + values  # noqa: RUF005
    return values


@triton.jit
def taps_of(taps, dim, W: tl.constexpr):
    """A convolution's weights, oldest first, and dim, since no tuple is empty."""
    values = (dim,)
    for w in tl.static_range(W):
        values = (tl.load(taps + dim * W + (W - 1 - w)).to(tl.float32),) + values  # noqa: RUF005
    return values


@triton.jit
def convolve_one(x, old, taps, W: tl.constexpr):
    """As ``convolve``, of what was loaded before."""
    y = x.to(tl.float32)
    if W > 0:
        y *= taps[W - 1]
        for w in tl.static_range(W - 1):
            y += old[w].to(tl.float32) * taps[w]
    return y


@triton.jit
def leave_one(x, values, old, dim, place, W: tl.constexpr):
    """The window after input x: that of ``window_of`` without its oldest."""
    for w in tl.static_range(W - 2):
        tl.store(old + (place + dim) * (W - 1) + w, values[w + 1])
    if W > 1:
        tl.store(old + (place + dim) * (W - 1) + (W - 2), x)


@triton.jit
def convolve(s, x, old, taps, stride_s, dim, place, W: tl.constexpr):
    """Shape of dim: the convolution at token s; the input itself where W == 0."""
    y = tl.load(x + s * stride_s + dim).to(tl.float32)
    if W > 0:
        y *= tl.load(taps + dim * W + (W - 1)).to(tl.float32)
        for w in tl.static_range(W - 1):
            token = s - (W - 1) + w
            there = tl.where(token < 0, old + (place + dim) * (W - 1) + (W - 1 + token), x + token * stride_s + dim)
            y += tl.load(there).to(tl.float32) * tl.load(taps + dim * W + w).to(tl.float32)
    return y


@triton.jit
def new_windows(x, old, stride_s, dim, here, place, S: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr):
    """[S, n, WIDE] the inputs up to each token of the call, oldest first: all but the first are its window."""
    s = tl.arange(0, triton.next_power_of_2(S))[:, None, None]
    w = tl.arange(0, WIDE)[None, None, :]
    token, wide = s - (W - 1) + w, dim[None, :, None]
    there = tl.where(token < 0, old + (place + wide) * (W - 1) + (W - 1 + token), x + token * stride_s + wide)
    return tl.load(there, here[None, :, None] & (token < S) & (w > 0) & (w < W), 0.0)


@triton.jit
def leave_windows(values, window, to, dim, here, place, WINDOW_SLOT: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr):
    """Write ``new_windows`` into the slots ``to`` [S]; a negative one is not written."""
    w = tl.arange(0, WIDE)[None, None, :]
    at = to[:, None, None] * WINDOW_SLOT + (place + dim[None, :, None]) * (W - 1) + (w - 1)
    tl.store(window + at, values, here[None, :, None] & (to[:, None, None] >= 0) & (w > 0) & (w < W))


@triton.jit
def add_all(a, b, c, d, e, v, w, x, y, z):
    return a + v, b + w, c + x, d + y, e + z


@triton.jit
def add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def add_three(a, b, c, x, y, z):
    return a + x, b + y, c + z


@triton.jit
def take_one(a, b):
    return a


@triton.jit
def one_of(x, ROWS: tl.constexpr, BV: tl.constexpr):
    """[BV, LANES] of equal rows to [ROWS, LANES]: one for each that a thread has."""
    return tl.reduce(tl.reshape(x, [BV // ROWS, ROWS, LANES]), 0, take_one)


@triton.jit
def every(x, ROWS: tl.constexpr, BV: tl.constexpr):
    """[ROWS] to [BV]."""
    return tl.reshape(tl.broadcast_to(x[None, :], [BV // ROWS, ROWS]), [BV])


@triton.jit
def finish(o, total, x, scales, V: tl.constexpr, EPS: tl.constexpr, ACTIVATION: tl.constexpr):
    """Root-mean-square norm of a head's output, given its sum of squares, then the gate: 0 none, 1 sigmoid, 2 swish."""
    o = o * tl.rsqrt(total / V + EPS) * scales
    if ACTIVATION > 0:
        o *= sigmoid(x) if ACTIVATION == 1 else x * sigmoid(x)
    return o


@triton.jit
def end_windows(
    b, h, slot, q, k, v, window, keep,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    HAS_KEEP: tl.constexpr, WINDOW_SLOT: tl.constexpr, Q_B: tl.constexpr, Q_S: tl.constexpr, K_B: tl.constexpr,
    K_S: tl.constexpr, V_B: tl.constexpr, V_S: tl.constexpr,
):  # fmt: skip
    """New windows of key head h of row b, after its last program has read the old ones."""
    GROUP: tl.constexpr = HV // H
    WIDE: tl.constexpr = triton.next_power_of_2(W)
    VALUES: tl.constexpr = triton.next_power_of_2(GROUP * V)
    all_v = tl.arange(0, VALUES)
    channel, channel_v = h * K + tl.arange(0, K), h * GROUP * V + all_v
    mine, every = all_v < GROUP * V, channel >= 0
    old = window + slot * WINDOW_SLOT
    x_q, x_k, x_v = q + b * Q_B, k + b * K_B, v + b * V_B
    token = tl.arange(0, triton.next_power_of_2(S))
    if HAS_KEEP:
        to = tl.load(keep + b * S + token, token < S, -1).to(tl.int64)
    else:
        to = tl.where(token == S - 1, slot, -1)
    new_q = new_windows(x_q, old, Q_S, channel, every, 0, S, W, WIDE)
    if S > 1:  # one after another: the windows of eight tokens fill the registers
        tl.debug_barrier()  # every thread has read what is overwritten now
        leave_windows(new_q, window, to, channel, every, 0, WINDOW_SLOT, W, WIDE)
    new_k = new_windows(x_k, old, K_S, channel, every, H * K, S, W, WIDE)
    if S > 1:
        tl.debug_barrier()
        leave_windows(new_k, window, to, channel, every, H * K, WINDOW_SLOT, W, WIDE)
    new_v = new_windows(x_v, old, V_S, channel_v, mine, 2 * H * K, S, W, WIDE)
    tl.debug_barrier()
    if S == 1:
        leave_windows(new_q, window, to, channel, every, 0, WINDOW_SLOT, W, WIDE)
        leave_windows(new_k, window, to, channel, every, H * K, WINDOW_SLOT, W, WIDE)
    leave_windows(new_v, window, to, channel_v, mine, 2 * H * K, WINDOW_SLOT, W, WIDE)


@triton.jit
def end_outputs(
    b, h, out_gate, weight, scratch, sums, output,
    H: tl.constexpr, HV: tl.constexpr, V: tl.constexpr, S: tl.constexpr, EPS: tl.constexpr, ACTIVATION: tl.constexpr,
    OG_B: tl.constexpr, OG_S: tl.constexpr,
):  # fmt: skip
    """Norms of the raw outputs in ``scratch`` of key head h of row b; ``sums`` has their sums of squares, by four."""
    GROUP: tl.constexpr = HV // H
    dim_v, quad = tl.arange(0, V), tl.arange(0, V // QUAD)
    scales = tl.load(weight + dim_v).to(tl.float32)
    for j in range(GROUP):
        hv = h * GROUP + j
        for s in range(S):
            head = (b * S + s) * HV + hv
            o = tl.load(scratch + head * V + dim_v, cache_modifier=".cg")  # other programs wrote them
            total = tree_sum(tl.load(sums + head * (V // QUAD) + quad, cache_modifier=".cg"), V // QUAD)
            x = scales
            if ACTIVATION > 0:
                x = tl.load(out_gate + b * OG_B + s * OG_S + hv * V + dim_v).to(tl.float32)
            o = finish(o, total, x, scales, V, EPS, ACTIVATION)
            tl.store(output + head * V + dim_v, o.to(output.dtype.element_ty))


@triton.jit(do_not_specialize=["last_slot"])
def decode_kernel(
    q, k, v, gate, beta, out_gate, A_log, dt_bias, taps_q, taps_k, taps_v, weight, memory, window, slots, keep, scratch,
    tickets, output, last_slot,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, W: tl.constexpr,
    S: tl.constexpr, GATE: tl.constexpr, LOWER_BOUND: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_KEEP: tl.constexpr, PDL: tl.constexpr, ROWS: tl.constexpr,
    AHEAD: tl.constexpr, END: tl.constexpr, MEMORY_SLOT: tl.constexpr, WINDOW_SLOT: tl.constexpr, Q_B: tl.constexpr,
    Q_S: tl.constexpr, K_B: tl.constexpr, K_S: tl.constexpr, V_B: tl.constexpr, V_S: tl.constexpr, G_B: tl.constexpr,
    G_S: tl.constexpr, BETA_B: tl.constexpr, BETA_S: tl.constexpr, OG_B: tl.constexpr, OG_S: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HV // H
    PROGRAMS: tl.constexpr = GROUP * (V // BV)
    ONE: tl.constexpr = S == 1 and not HAS_KEEP
    # ROWS: of a tile, those whose threads hold one row each
    HELD: tl.constexpr = END == WAIT  # the inputs of the convolution stay in registers, for the new window
    GUESS: tl.constexpr = AHEAD > 1 and HAS_SLOTS and HELD
    hv, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    h, start = hv // GROUP, tl.program_id(0) * BV
    dim_k, dim_v = tl.arange(0, K), start + tl.arange(0, BV)
    channel, channel_v = h * K + dim_k, hv * V + dim_v
    slot = b
    if AHEAD:  # the kernel before this one may still write all of this, slots too, so it is asked for but not used
        guess = b
        if HAS_SLOTS:
            guess = tl.load(slots + b, cache_modifier=".cg").to(tl.int64)
            guess = tl.minimum(tl.maximum(guess, 0), last_slot)
        ask_for(memory + guess * MEMORY_SLOT, window + guess * WINDOW_SLOT, hv, start, H, HV, K, V, BV, W)
    if PDL:
        cuda.gdc_wait()  # the kernel before this one has ended, and all that it wrote is there
        cuda.gdc_launch_dependents()
    if HAS_SLOTS:
        slot = tl.load(slots + b).to(tl.int64)
    x_q, x_k, x_v = q + b * Q_B, k + b * K_B, v + b * V_B
    rate = tl.load(A_log + hv).to(tl.float32)
    bias = tl.load(dt_bias + hv * K + dim_k).to(tl.float32)
    if HELD:  # asked for before the slot is known
        now_q, now_k, now_v = tl.load(x_q + channel), tl.load(x_k + channel), tl.load(x_v + channel_v)
        x = tl.load(gate + b * G_B + hv * K + dim_k).to(tl.float32)
        strength = tl.load(beta + b * BETA_B + hv).to(tl.float32)
        w_q, w_k, w_v = taps_of(taps_q, channel, W), taps_of(taps_k, channel, W), taps_of(taps_v, channel_v, W)
    part, lane = tl.arange(0, K // LANES)[None, :, None], tl.arange(0, LANES)[None, None, :]
    cells = (hv * V + dim_v[:, None, None]) * K + (part * LANES + lane)
    if GUESS:  # most guesses are right, and then this does not wait for the slot
        old = window + guess * WINDOW_SLOT
        old_q, old_k = window_of(old, channel, 0, W), window_of(old, channel, H * K, W)
        old_v = window_of(old, channel_v, 2 * H * K, W)
        state = tl.load(memory + guess * MEMORY_SLOT + cells)
        if slot != guess:
            guess = tl.maximum(slot, 0)
            old = window + guess * WINDOW_SLOT
            old_q, old_k = window_of(old, channel, 0, W), window_of(old, channel, H * K, W)
            old_v = window_of(old, channel_v, 2 * H * K, W)
            state = tl.load(memory + guess * MEMORY_SLOT + cells)
    if slot < 0:  # a padded row: no state is touched, and its output is zero rather than what was there
        for s in range(S):
            at = ((b * S + s) * HV + hv) * V + dim_v
            tl.store(output + at, tl.zeros([BV], output.dtype.element_ty))
        return
    old = window + slot * WINDOW_SLOT
    if not GUESS:
        if HELD:
            old_q, old_k = window_of(old, channel, 0, W), window_of(old, channel, H * K, W)
            old_v = window_of(old, channel_v, 2 * H * K, W)
        state = tl.load(memory + slot * MEMORY_SLOT + cells)
    words = tickets
    turn = slot
    if END == WAIT:  # one more than that of the last call with this slot
        words = tickets + slot * (HV * (V // QUAD) + H)
        turn = tl.load(words + HV * (V // QUAD) + h) + 1
        scales = tl.load(weight + dim_v).to(tl.float32)
        y = scales
        if ACTIVATION > 0:
            y = tl.load(out_gate + b * OG_B + channel_v).to(tl.float32)
    sums = output
    if END == TICKET and V != BV:
        sums = scratch + tl.num_programs(2).to(tl.int64) * (S * HV * V)  # of squares, behind the raw outputs
    o = tl.zeros([BV], tl.float32)
    for s in range(S):
        if HELD:
            b_q, b_k = convolve_one(now_q, old_q, w_q, W), convolve_one(now_k, old_k, w_k, W)
            b_v = convolve_one(now_v, old_v, w_v, W)
        else:
            b_q = convolve(s, x_q, old, taps_q, Q_S, channel, 0, W)
            b_k = convolve(s, x_k, old, taps_k, K_S, channel, H * K, W)
            b_v = convolve(s, x_v, old, taps_v, V_S, channel_v, 2 * H * K, W)
            x = tl.load(gate + b * G_B + s * G_S + hv * K + dim_k).to(tl.float32)
            strength = tl.load(beta + b * BETA_B + s * BETA_S + hv).to(tl.float32)
        to = slot
        if HAS_KEEP:
            to = tl.load(keep + b * S + s).to(tl.int64)
        b_q, b_k, b_v = b_q * sigmoid(b_q), b_k * sigmoid(b_k), b_v * sigmoid(b_v)
        decay = tl.exp2(log2_decay(x, rate, bias, LOWER_BOUND, GATE))
        state *= tl.reshape(decay, [K // LANES, LANES])[None, :, :]
        both = (b_q.to(tl.uint32, bitcast=True).to(tl.int64) << 32) | b_k.to(tl.uint32, bitcast=True).to(tl.int64)
        both = tl.reshape(both, [K // LANES, LANES])[None, :, :]  # one journey to the threads that hold the state
        wide_q = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        wide_k = both.to(tl.int32).to(tl.float32, bitcast=True)
        wide_q, wide_k = tl.broadcast_to(wide_q, state.shape), tl.broadcast_to(wide_k, state.shape)
        products = (state * wide_k, state * wide_q, wide_q * wide_q, wide_k * wide_k, wide_q * wide_k)
        held, seen, qq, kk, qk = tl.reduce(products, 1, add_all)
        held, seen = tl.reduce((held, seen), 1, add_both)
        first = (one_of(qq, ROWS, BV), one_of(kk, ROWS, BV), one_of(qk, ROWS, BV))
        qq, kk, qk = tl.reduce(first, 1, add_three)
        qq, kk, qk = every(qq, ROWS, BV), every(kk, ROWS, BV), every(qk, ROWS, BV)
        unit_q, unit_k = tl.rsqrt(qq + 1e-6) * SCALE, tl.rsqrt(kk + 1e-6)
        change = sigmoid(strength) * (b_v - held * unit_k)
        o = tl.fma(qk * unit_q * unit_k, change, seen * unit_q)
        squares = quad_sums(o * o, BV)
        at = ((b * S + s) * HV + hv) * V + dim_v
        quad = start // QUAD + tl.arange(0, BV // QUAD)
        if END == WAIT:
            publish(words + hv * (V // QUAD) + quad, squares, turn.to(tl.int32))
        elif V != BV:
            tl.store(scratch + at, o)
            tl.store(sums + ((b * S + s) * HV + hv) * (V // QUAD) + quad, squares)
        state = tl.fma((change * unit_k)[:, None, None], wide_k, state)
        if HAS_KEEP:
            if to >= 0:
                tl.store(memory + to * MEMORY_SLOT + cells, state)
        elif S > 1:
            if s == S - 1:
                tl.store(memory + to * MEMORY_SLOT + cells, state)
        if END != WAIT and V == BV:
            if ONE and END == DIRECT:
                tl.store(memory + slot * MEMORY_SLOT + cells, state)
            scales = tl.load(weight + dim_v).to(tl.float32)
            y = scales
            if ACTIVATION > 0:
                y = tl.load(out_gate + b * OG_B + s * OG_S + channel_v).to(tl.float32)
            o = finish(o, tree_sum(squares, V // QUAD), y, scales, V, EPS, ACTIVATION)
            tl.store(output + at, o.to(output.dtype.element_ty))
    arrived = PROGRAMS - 1
    if END == TICKET:
        tl.debug_barrier()  # the program's outputs are on their way, and its reads of the window done, before it says so
        arrived = tl.atomic_add(tickets + slot * H + h, 1, sem="acq_rel", scope="gpu")
    if ONE and END != DIRECT:  # after the ticket, which would otherwise wait for this to arrive
        tl.store(memory + slot * MEMORY_SLOT + cells, state)
    if END == WAIT:
        # What others read of the window they have in registers before they leave a word: its value depends on it.
        found = wait_for(words + hv * (V // QUAD) + tl.arange(0, V // QUAD), turn.to(tl.int32))
        o = finish(o, tree_sum(found, V // QUAD), y, scales, V, EPS, ACTIVATION)
        store_here(output + (b * HV + hv) * V + dim_v, o.to(output.dtype.element_ty))
        leave_one(now_v, old_v, old, channel_v, 2 * H * K, W)
        if (start == 0) & (hv % GROUP == 0):
            if GROUP > 1:
                ALL: tl.constexpr = GROUP * (V // QUAD)
                others = tl.minimum(tl.arange(0, triton.next_power_of_2(ALL)), ALL - 1)
                wait_for(words + h * ALL + others, turn.to(tl.int32))
            leave_one(now_q, old_q, old, channel, 0, W)
            leave_one(now_k, old_k, old, channel, H * K, W)
            tl.store(words + HV * (V // QUAD) + h, turn)
    else:
        if arrived == PROGRAMS - 1:
            if END == TICKET:
                tl.store(tickets + slot * H + h, 0)
                if V != BV:
                    end_outputs(b, h, out_gate, weight, scratch, sums, output, H, HV, V, S, EPS, ACTIVATION, OG_B, OG_S)
            if W > 1:
                end_windows(
                    b, h, slot, q, k, v, window, keep, H, HV, K, V, W, S, HAS_KEEP, WINDOW_SLOT, Q_B, Q_S, K_B, K_S,
                    V_B, V_S,
                )  # fmt: skip


@triton.jit(do_not_specialize=["last_slot"])
def head_kernel(
    q, k, v, gate, beta, out_gate, A_log, dt_bias, taps_q, taps_k, taps_v, weight, memory, window, slots, keep, scratch,
    tickets, output, last_slot,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, W: tl.constexpr,
    S: tl.constexpr, GATE: tl.constexpr, LOWER_BOUND: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_KEEP: tl.constexpr, PDL: tl.constexpr, ROWS: tl.constexpr,
    AHEAD: tl.constexpr, END: tl.constexpr, MEMORY_SLOT: tl.constexpr, WINDOW_SLOT: tl.constexpr, Q_B: tl.constexpr,
    Q_S: tl.constexpr, K_B: tl.constexpr, K_S: tl.constexpr, V_B: tl.constexpr, V_S: tl.constexpr, G_B: tl.constexpr,
    G_S: tl.constexpr, BETA_B: tl.constexpr, BETA_S: tl.constexpr, OG_B: tl.constexpr, OG_S: tl.constexpr,
    BULK: tl.constexpr,
):  # fmt: skip
    """``decode_kernel`` for one token of many heads, H == HV: a program goes through a whole head, BV rows at a time.

    The next rows are asked for before these are computed, and these are stored while those come: programs do not all read,
    then all write. BULK > 0: rows are stored by way of shared memory, so many bytes at a time. Grid (1, H, B).
    """
    COUNT: tl.constexpr = V // BV
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    dim_k, all_v, dim_v = tl.arange(0, K), tl.arange(0, V), tl.arange(0, BV)
    channel, channel_v = h * K + dim_k, h * V + all_v
    slot = b
    if AHEAD:  # as in decode_kernel: a hint
        guess = b
        if HAS_SLOTS:
            guess = tl.load(slots + b, cache_modifier=".cg").to(tl.int64)
            guess = tl.minimum(tl.maximum(guess, 0), last_slot)
        ask_for(memory + guess * MEMORY_SLOT, window + guess * WINDOW_SLOT, h, 0, H, HV, K, V, BV, W)
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    if HAS_SLOTS:
        slot = tl.load(slots + b).to(tl.int64)
    x_q, x_k, x_v = q + b * Q_B, k + b * K_B, v + b * V_B
    rate = tl.load(A_log + h).to(tl.float32)
    bias = tl.load(dt_bias + channel).to(tl.float32)
    now_q, now_k, now_v = tl.load(x_q + channel), tl.load(x_k + channel), tl.load(x_v + channel_v)
    x = tl.load(gate + b * G_B + channel).to(tl.float32)
    strength = tl.load(beta + b * BETA_B + h).to(tl.float32)
    w_q, w_k, w_v = taps_of(taps_q, channel, W), taps_of(taps_k, channel, W), taps_of(taps_v, channel_v, W)
    if slot < 0:  # a padded row
        tl.store(output + (b * HV + h) * V + all_v, tl.zeros([V], output.dtype.element_ty))
        return
    part, lane = tl.arange(0, K // LANES)[None, :, None], tl.arange(0, LANES)[None, None, :]
    cells = dim_v[:, None, None] * K + (part * LANES + lane)
    mine = memory + slot * MEMORY_SLOT + h * (V * K)
    old = window + slot * WINDOW_SLOT
    old_q, old_k = window_of(old, channel, 0, W), window_of(old, channel, H * K, W)
    old_v = window_of(old, channel_v, 2 * H * K, W)
    coming = tl.load(mine + cells)
    b_q, b_k = convolve_one(now_q, old_q, w_q, W), convolve_one(now_k, old_k, w_k, W)
    b_v = convolve_one(now_v, old_v, w_v, W)
    b_q, b_k, b_v = b_q * sigmoid(b_q), b_k * sigmoid(b_k), b_v * sigmoid(b_v)
    decay = tl.reshape(tl.exp2(log2_decay(x, rate, bias, LOWER_BOUND, GATE)), [K // LANES, LANES])[None, :, :]
    both = (b_q.to(tl.uint32, bitcast=True).to(tl.int64) << 32) | b_k.to(tl.uint32, bitcast=True).to(tl.int64)
    both = tl.reshape(both, [K // LANES, LANES])[None, :, :]  # one journey to the threads that hold the state
    wide_q = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    wide_k = both.to(tl.int32).to(tl.float32, bitcast=True)
    wide_q = tl.broadcast_to(wide_q, [BV, K // LANES, LANES])
    wide_k = tl.broadcast_to(wide_k, [BV, K // LANES, LANES])
    tl.debug_barrier()  # every thread has read what is overwritten now
    leave_one(now_q, old_q, old, channel, 0, W)
    leave_one(now_k, old_k, old, channel, H * K, W)
    leave_one(now_v, old_v, old, channel_v, 2 * H * K, W)
    IN_BULK: tl.constexpr = BULK > 0 and not INTERPRETED
    if IN_BULK:
        stage = shared_room(h, text_of(BV * K * 4))
    outputs, which = tl.zeros([COUNT, BV], tl.float32), tl.arange(0, COUNT)[:, None]
    power = sigmoid(strength)
    for i in range(COUNT):
        state = coming
        coming = tl.load(mine + (i + 1) * (BV * K) + cells, i + 1 < COUNT, 0.0)
        value = tl.gather(b_v, i * BV + dim_v, 0)
        state *= decay
        products = (state * wide_k, state * wide_q, wide_q * wide_q, wide_k * wide_k, wide_q * wide_k)
        held, seen, qq, kk, qk = tl.reduce(products, 1, add_all)
        held, seen = tl.reduce((held, seen), 1, add_both)
        first = (one_of(qq, ROWS, BV), one_of(kk, ROWS, BV), one_of(qk, ROWS, BV))
        qq, kk, qk = tl.reduce(first, 1, add_three)
        qq, kk, qk = every(qq, ROWS, BV), every(kk, ROWS, BV), every(qk, ROWS, BV)
        unit_q, unit_k = tl.rsqrt(qq + 1e-6) * SCALE, tl.rsqrt(kk + 1e-6)
        change = power * (value - held * unit_k)
        o = tl.fma(qk * unit_q * unit_k, change, seen * unit_q)
        state = tl.fma((change * unit_k)[:, None, None], wide_k, state)
        if IN_BULK:
            wait_until_read(stage)  # what was stored before
            tl.debug_barrier()
            put_shared(stage + cells * 4, state)
            store_bulk(mine + i * (BV * K), stage, BV * K * 4, BULK)
        else:
            tl.store(mine + i * (BV * K) + cells, state)
        outputs = tl.where(which == i, o[None, :], outputs)
    o = tl.reshape(outputs, [V])
    scales = tl.load(weight + all_v).to(tl.float32)
    y = scales
    if ACTIVATION > 0:
        y = tl.load(out_gate + b * OG_B + channel_v).to(tl.float32)
    o = finish(o, tree_sum(quad_sums(o * o, V), V // QUAD), y, scales, V, EPS, ACTIVATION)
    tl.store(output + (b * HV + h) * V + all_v, o.to(output.dtype.element_ty))
    if IN_BULK:
        wait_until_read(stage)  # the memory goes with the program


Step = tuple[Tensor | None, ...]
"""q, k, v, gate, beta, out_gate, A_log, dt_bias, taps_q, taps_k, taps_v, weight, memory, window, slots, keep: the kernel's
pointers in its order, ``scratch``, ``tickets`` and ``output`` apart; shapes as ``kimi_linear.ops.kda_decode`` has them."""
MEMORY, KEEP = 12, 15
"""Where ``memory`` and ``keep`` stand in a step."""
REGISTERS = 65536
"""Of a multiprocessor, on every architecture from sm_80 on."""
FEW_HEADS = 132
"""Value heads of all sequences together that leave processors of a large GPU idle; what counts then is a head's latency."""
MANY = 2**20
"""Sequences whose programs no GPU has room for at once."""


def shape_class(key_dim: int, tokens: int, heads: int) -> str:
    """Of the table: K, one token or more, and how many value heads all sequences have together."""
    count = "more tokens" if tokens > 1 else "one token, few heads" if heads <= FEW_HEADS else "one token, many heads"
    return f"K = {key_dim}, {count}"


def config_for(q: Tensor, v: Tensor, batch: int) -> Config:
    """The entry of the table for a step of ``batch`` sequences that is otherwise like this one; BV is no more than V."""
    config = config_of("kda_decode", q, shape_class(q.shape[3], q.shape[1], batch * v.shape[2]))
    return Config(constants={**config.constants, "BV": min(config["BV"], v.shape[3])}, num_warps=config.num_warps)


def ending_of(q: Tensor, v: Tensor, config: Config, kept: bool, batch: int) -> int:
    """How the programs of a head find each other, for ``batch`` sequences.

    They may wait for each other only where each is sure to run. Where all programs of a launch fit on the GPU at once, they
    are: in any order, and beside any kernel that ends by itself. Several such launches beside each other may not fit together;
    then it takes that programs start in the order of their index, as GPUs start them: only the last head of each launch is
    ever there in part. ``options_of`` keeps programs to the registers that this counts with.
    """
    (_, tokens, heads, _), (v_heads, value_dim) = q.shape, v.shape[2:]
    if "PASS" in config.constants and tokens == 1 and not kept and heads == v_heads:
        return PASSES.value
    programs = batch * v_heads * (value_dim // config["BV"])
    if programs == batch * heads:
        return DIRECT.value
    if tokens > 1 or kept or not q.is_cuda:
        return TICKET.value
    at_once = REGISTERS // (32 * config.num_warps * registers_of(config)) * processors(q.device.index)
    return WAIT.value if programs <= at_once else TICKET.value


def registers_of(config: Config) -> int:
    """At most, of a thread that waits for others."""
    return config.constants.get("registers", 168)


@cache
def processors(index: int) -> int:
    """Multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def options_of(config: Config, ending: int) -> dict[str, int | bool]:
    """As Triton's keywords. Rounding is as the source says, in every build: see the file's docstring."""
    options: dict[str, int | bool] = {"num_warps": config.num_warps, "num_stages": 1, "enable_fp_fusion": False}
    if "registers" in config.constants or ending == WAIT.value:
        options["maxnreg"] = registers_of(config)
    return options | ({"launch_pdl": True} if config["PDL"] else {})


def prepare(
    step: Step,
    *,
    lower_bound: float | None,
    eps: float,
    activation: str,
    config: Config | None = None,
    ending: int | None = None,
) -> Callable[[Step, Tensor], None]:
    """A function that runs the kernel on tensors of the same shapes, strides, dtypes and device as those of ``step``.

    The launcher that Triton makes binds and inspects every argument anew, which costs more than the step itself. Here that
    is done once: what remains of a launch is to read the addresses and to hand them over.

    ``lower_bound`` is None for the softplus gate. The output is [B, S, HV, V], contiguous.
    """
    q, v, memory = step[0], step[2], step[MEMORY]
    assert q is not None
    assert v is not None
    assert memory is not None
    (batch, tokens, heads, _), (v_heads, value_dim) = q.shape, v.shape[2:]
    kept, given = step[KEEP] is not None, config is not None or ending is not None
    config = config or config_for(q, v, batch)
    interpreted = not isinstance(decode_kernel, JITFunction)
    if interpreted:
        config = Config(constants={**config.constants, "PDL": 0}, num_warps=config.num_warps)
    if ending is None:
        ending = ending_of(q, v, config, kept, batch)
    last_slot = len(memory) - 1
    present = itemgetter(*(i for i, x in enumerate(step) if x is not None))
    absent = [i for i, x in enumerate(step) if x is None]
    # What is kept must not keep the first step's tensors, whose pool is large: it needs their shapes, strides and types.
    q, v = q.new_empty(1).expand(q.shape), v.new_empty(1).expand(v.shape)
    facts = tuple(
        None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in step
    )
    build = partial(_build_of, facts, lower_bound, eps, activation)
    mine = build(config, ending, True)
    grid = (mine.slices, v_heads, batch)
    quads = v_heads * (value_dim // QUAD.value)
    raw = batch * tokens * (v_heads * value_dim + quads) if mine.scratch else 0
    compiled: dict[object, Callable[[tuple[int, ...]], None]] = {}
    count = (quads + heads if ending == WAIT.value else heads) * (last_slot + 1)

    def needed(aligned: bool, *arguments: Any) -> Any:
        return build(config, ending, aligned).compile(*arguments)

    def rehearse(aligned: bool, *arguments: Any) -> Iterator[None]:
        """What this call waits for; then what other batches will need, which is not that where a configuration was given."""
        needed(aligned, *arguments)
        yield
        for other in () if given else batches_of(v):
            theirs = config_for(q, v, other)
            build(theirs, ending_of(q, v, theirs, kept, other), aligned).compile(*arguments)

    def run(now: Step, output: Tensor) -> None:
        if batch == 0:
            return
        # The allocator gives memory back in the stream's order, so dropping it after the launch is safe.
        scratch = output.new_empty(raw, dtype=torch.float32) if raw else None
        tickets = None if mine.tickets is None else tickets_of(now[MEMORY], count, mine.tickets)
        if interpreted:
            mine.kernel[grid](*now, scratch, tickets, output, last_slot, *mine.constants, **mine.options)
            return
        addresses = [*map(Tensor.data_ptr, present(now))]
        for i in absent:
            addresses.insert(i, 0)
        addresses += [0 if x is None else x.data_ptr() for x in (scratch, tickets, output)]
        # Compiled code may assume addresses that are multiples of 16; a view with others gets code of its own.
        aligned = gcd(*addresses) % 16 == 0
        known = True if aligned else tuple(address % 16 == 0 for address in addresses)
        launch = compiled.get(known)
        if launch is None:
            kernel = compile_ahead.call("kda_decode", needed, rehearse, (aligned, now, output, last_slot))
            constants = build(config, ending, aligned).constants
            launch = compiled[known] = launcher(kernel, grid, q.device.index, (last_slot, *constants))
        launch(addresses)

    return run


def batches_of(v: Tensor) -> tuple[int, ...]:
    """Numbers of sequences that together need every kernel which steps that differ in nothing else need.

    They are the fewest and the most of each class of the table: within one, launches that fit on the GPU at once come first.
    """
    few = FEW_HEADS // v.shape[2]
    return (1, few, few + 1, MANY) if few else (1, MANY)


class Build(NamedTuple):
    """What Triton compiles for a step.

    Attributes:
        kernel: the function.
        constants: its constants, in its order.
        options: Triton's keywords.
        slices: programs of a head.
        scratch, tickets: of what type it gets them; None where it needs none.
    """

    kernel: Any
    constants: tuple[object, ...]
    options: dict[str, int | bool]
    slices: int
    scratch: torch.dtype | None
    tickets: torch.dtype | None

    def compile(self, now: Step, output: Tensor, last_slot: int) -> Any:
        """The kernel for tensors of these types, and aligned like these."""
        return self.kernel.warmup(
            *now, self.scratch, self.tickets, output, last_slot, *self.constants, grid=(1,), **self.options
        )


def _build_of(
    step: Step, lower_bound: float | None, eps: float, activation: str, config: Config, ending: int, aligned: bool
) -> Build:
    """``aligned``: whether all tensors begin at multiples of 16 bytes."""
    v, memory = step[2], step[MEMORY]
    assert v is not None
    assert memory is not None
    passes = ending == PASSES.value
    if passes:
        config = Config(
            constants=config.constants | {"BV": min(config["PASS"], v.shape[3])}, num_warps=config.num_warps
        )
    slices = 1 if passes else v.shape[3] // config["BV"]
    constants = _constants(step, lower_bound, eps, activation, config, ending)
    if passes:
        bulk = config.constants.get("BULK", 0) if aligned and memory.stride(0) % 4 == 0 else 0
        constants += (min(bulk, config["BV"] * memory.shape[3] * 4),)
    return Build(
        kernel=head_kernel if passes else decode_kernel,
        constants=constants,
        options=options_of(config, ending),
        slices=slices,
        scratch=torch.float32 if ending == TICKET.value and slices > 1 else None,
        tickets={WAIT.value: torch.int64, TICKET.value: torch.int32}.get(ending),
    )


def launcher(kernel: Any, grid: tuple[int, int, int], device: int, rest: tuple[object, ...]) -> Callable[..., None]:
    """``kernel[grid]`` of addresses and ``rest`` on the current stream, without what Triton's own does for its hooks."""
    kernel[grid]  # makes the handles
    run, function, metadata = kernel.run, kernel.function, kernel.packed_metadata
    stream_of = driver.active.get_current_stream
    x, y, z = grid

    def launch(addresses: list[int]) -> None:
        run(x, y, z, stream_of(device), function, metadata, None, None, None, *addresses, *rest)

    return launch


def _constants(
    step: Step, lower_bound: float | None, eps: float, activation: str, config: Config, ending: int
) -> tuple[object, ...]:
    """The kernel's constants, in its order."""
    q, k, v, gate, beta, out_gate, _, _, taps, _, _, _, memory, window, slots, keep = step
    (_, tokens, heads, key_dim), (v_heads, value_dim) = q.shape, v.shape[2:]
    strides = []
    for x in (q, k, v, gate, beta, out_gate):
        strides += [0, 0] if x is None else [x.stride(0), x.stride(1) if tokens > 1 else 0]
    rows = min(config["BV"], QUAD.value * config.num_warps)
    kind, kinds = 1 if lower_bound is None else 2, ("none", "sigmoid", "swish")
    return (
        heads, v_heads, key_dim, value_dim, config["BV"], 0 if taps is None else taps.shape[1], tokens, kind,
        lower_bound or 0.0, key_dim**-0.5, eps, kinds.index(activation), slots is not None, keep is not None,
        config["PDL"], rows, config.constants.get("AHEAD", 0), ending, memory.stride(0), window.stride(0), *strides,
    )  # fmt: skip
