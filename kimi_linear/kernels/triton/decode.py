"""The core of a KDA layer for a decoded token, in one kernel, in place on a pool of slots.

    q, k, v = silu(convolve(window, raw))    q, k to unit length    S <- S Diag(2^g)    d = beta (v - S k)
    o = scale (S q + (k . q) d)              S <- S + d k^T         output = rms_norm(o) * weight * activation(gate)

A step is memory traffic: the state, 64 KiB a head at K = V = 128, is read once and written once; all else is 1 % of that.
What it waits for is latency. So a program takes BV rows of a head's state [V, K], few enough that others of the same
processor load while it computes; it asks for everything that a token needs at once, the state first, before anything is
computed; and it makes q, k and the gate for itself.

Two things need every program of a key head to be through: the norm of the output, which is one sum over V, and the new
window, which overwrites what the others still read. The program that arrives last does both; which one that is, an atomic
ticket says (``tickets.py``). Raw outputs travel through ``scratch``, also where a head has one program only: however a
head is cut, its norm is one sum in one order, so that a launch may be chosen by the number of programs and still give the same bits.

S q is read from the same decayed state as S k, so that both sums run at once, in one reduction. A tile of the state lies
as [V, K/32, 32], lines of 128 bytes; a row of it never leaves a warp, so its sum does not depend on BV or on the warps.

Grid (V / BV, HV, B). Strides and numbers that a model fixes are constants, so a launch passes nothing but pointers. The state
stays in registers over the tokens of a call; ``keep`` names a slot for the state after each of them. All new windows are
written at the end.

A call of S tokens gives bitwise what S calls give, so that speculative decoding changes nothing. Builds for different S are
compiled apart; left free to fuse products into sums, the compiler did so differently in each. So fusion is off, and the two
places where it pays say ``tl.fma``.

From sm_90 on the kernel may be launched while the one before it still runs (PDL): it waits for that one's end before it
reads anything, so only the launch itself is hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda
from triton.runtime.jit import JITFunction

from kimi_linear.kernels.triton.common import LOG2E, log2_decay
from kimi_linear.kernels.triton.configs import Config, config_of
from kimi_linear.kernels.triton.tickets import tickets_of

LANES = tl.constexpr(32)
"""Key channels side by side in a tile: 8 lanes of 4, which is one line of 128 bytes."""


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def convolve(s, x, old, taps, stride_s, dim, place, W: tl.constexpr):
    """Shape of dim: SiLU of the convolution at token s; of the input itself where W == 0."""
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
def add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def add_three(a, b, c, x, y, z):
    return a + x, b + y, c + z


@triton.jit
def finish(o, x, scales, V: tl.constexpr, EPS: tl.constexpr, ACTIVATION: tl.constexpr):
    """Root-mean-square norm of a head's output, then the gate: 0 none, 1 sigmoid, 2 swish."""
    o = o * tl.rsqrt(tl.sum(o * o, 0) / V + EPS) * scales
    if ACTIVATION > 0:
        o *= sigmoid(x) if ACTIVATION == 1 else x * sigmoid(x)
    return o


@triton.jit
def end_head(
    b, h, slot, q, k, v, out_gate, weight, window, keep, scratch, output,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, HAS_KEEP: tl.constexpr, WINDOW_SLOT: tl.constexpr,
    Q_B: tl.constexpr, Q_S: tl.constexpr, K_B: tl.constexpr, K_S: tl.constexpr, V_B: tl.constexpr, V_S: tl.constexpr,
    OG_B: tl.constexpr, OG_S: tl.constexpr,
):  # fmt: skip
    """Norms of the raw outputs in ``scratch``, and new windows, of key head h of row b."""
    GROUP: tl.constexpr = HV // H
    WIDE: tl.constexpr = triton.next_power_of_2(W)
    VALUES: tl.constexpr = triton.next_power_of_2(GROUP * V)
    dim_k, dim_v, all_v = tl.arange(0, K), tl.arange(0, V), tl.arange(0, VALUES)
    channel, channel_v = h * K + dim_k, h * GROUP * V + all_v
    mine = all_v < GROUP * V
    old, every = window + slot * WINDOW_SLOT, dim_k >= 0
    x_q, x_k, x_v = q + b * Q_B, k + b * K_B, v + b * V_B
    if W > 1:
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
        if S > 1:
            tl.debug_barrier()
            leave_windows(new_v, window, to, channel_v, mine, 2 * H * K, WINDOW_SLOT, W, WIDE)
    scales = tl.load(weight + dim_v).to(tl.float32)
    for j in range(GROUP):
        hv = h * GROUP + j
        for s in range(S):
            at = ((b * S + s) * HV + hv) * V + dim_v
            o = tl.load(scratch + at, cache_modifier=".cg")  # other programs wrote them
            x = scales
            if ACTIVATION > 0:
                x = tl.load(out_gate + b * OG_B + s * OG_S + hv * V + dim_v).to(tl.float32)
            tl.store(output + at, finish(o, x, scales, V, EPS, ACTIVATION).to(output.dtype.element_ty))
    if W > 1 and S == 1:  # asked for above, so that one wait serves them and the outputs
        tl.debug_barrier()
        leave_windows(new_q, window, to, channel, every, 0, WINDOW_SLOT, W, WIDE)
        leave_windows(new_k, window, to, channel, every, H * K, WINDOW_SLOT, W, WIDE)
        leave_windows(new_v, window, to, channel_v, mine, 2 * H * K, WINDOW_SLOT, W, WIDE)


@triton.jit
def decode_kernel(
    q, k, v, gate, beta, out_gate, A_log, dt_bias, taps_q, taps_k, taps_v, weight, memory, window, slots, keep, scratch,
    tickets, output,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, W: tl.constexpr,
    S: tl.constexpr, GATE: tl.constexpr, LOWER_BOUND: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_KEEP: tl.constexpr, PDL: tl.constexpr,
    MEMORY_SLOT: tl.constexpr, WINDOW_SLOT: tl.constexpr, Q_B: tl.constexpr, Q_S: tl.constexpr, K_B: tl.constexpr,
    K_S: tl.constexpr, V_B: tl.constexpr, V_S: tl.constexpr, G_B: tl.constexpr, G_S: tl.constexpr, BETA_B: tl.constexpr,
    BETA_S: tl.constexpr, OG_B: tl.constexpr, OG_S: tl.constexpr,
):  # fmt: skip
    if PDL:
        cuda.gdc_wait()  # the kernel before this one has ended, and all that it wrote is there
        cuda.gdc_launch_dependents()
    GROUP: tl.constexpr = HV // H
    PROGRAMS: tl.constexpr = GROUP * (V // BV)
    hv, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    h = hv // GROUP
    slot = b
    if HAS_SLOTS:
        slot = tl.load(slots + b).to(tl.int64)
    dim_k, dim_v = tl.arange(0, K), tl.program_id(0) * BV + tl.arange(0, BV)
    if slot < 0:  # a padded row: no state is touched, and its output is zero rather than what was there
        for s in range(S):
            at = ((b * S + s) * HV + hv) * V + dim_v
            tl.store(output + at, tl.zeros([BV], output.dtype.element_ty))
        return
    part, lane = tl.arange(0, K // LANES)[None, :, None], tl.arange(0, LANES)[None, None, :]
    cells = (hv * V + dim_v[:, None, None]) * K + (part * LANES + lane)
    state = tl.load(memory + slot * MEMORY_SLOT + cells)
    old = window + slot * WINDOW_SLOT
    x_q, x_k, x_v = q + b * Q_B, k + b * K_B, v + b * V_B
    channel, channel_v = h * K + dim_k, hv * V + dim_v
    rate = tl.load(A_log + hv).to(tl.float32)
    bias = tl.load(dt_bias + hv * K + dim_k).to(tl.float32)
    for s in range(S):
        b_q = convolve(s, x_q, old, taps_q, Q_S, channel, 0, W)
        b_k = convolve(s, x_k, old, taps_k, K_S, channel, H * K, W)
        b_v = convolve(s, x_v, old, taps_v, V_S, channel_v, 2 * H * K, W)
        x = tl.load(gate + b * G_B + s * G_S + hv * K + dim_k).to(tl.float32)
        strength = tl.load(beta + b * BETA_B + s * BETA_S + hv).to(tl.float32)
        to = slot
        if HAS_KEEP:
            to = tl.load(keep + b * S + s).to(tl.int64)
        b_q, b_k, b_v = b_q * sigmoid(b_q), b_k * sigmoid(b_k), b_v * sigmoid(b_v)
        strength = sigmoid(strength)
        decay = tl.exp2(log2_decay(x, rate, bias, LOWER_BOUND, GATE))
        qq, kk, qk = tl.reduce((b_q * b_q, b_k * b_k, b_q * b_k), 0, add_three)
        unit_q, unit_k = tl.rsqrt(qq + 1e-6) * SCALE, tl.rsqrt(kk + 1e-6)
        b_q, b_k, straight = b_q * unit_q, b_k * unit_k, qk * unit_q * unit_k
        state *= tl.reshape(decay, [K // LANES, LANES])[None, :, :]
        wide_k = tl.reshape(b_k, [K // LANES, LANES])[None, :, :]
        wide_q = tl.reshape(b_q, [K // LANES, LANES])[None, :, :]
        held, seen = tl.reduce(tl.reduce((state * wide_k, state * wide_q), 1, add_both), 1, add_both)
        change = strength * (b_v - held)
        state = tl.fma(change[:, None, None], wide_k, state)
        tl.store(scratch + ((b * S + s) * HV + hv) * V + dim_v, tl.fma(straight, change, seen))
        if HAS_KEEP:
            if to >= 0:
                tl.store(memory + to * MEMORY_SLOT + cells, state)
        elif S > 1:
            if s == S - 1:
                tl.store(memory + to * MEMORY_SLOT + cells, state)
    tl.debug_barrier()  # the program's outputs are on their way, and its reads of the window done, before it says so
    arrived = 0
    if PROGRAMS > 1:
        arrived = tl.atomic_add(tickets + slot * H + h, 1, sem="acq_rel", scope="gpu")
    if S == 1 and not HAS_KEEP:  # after the ticket, which would otherwise wait for this to arrive
        tl.store(memory + slot * MEMORY_SLOT + cells, state)
    if arrived == PROGRAMS - 1:
        if PROGRAMS > 1:
            tl.store(tickets + slot * H + h, 0)
        end_head(
            b, h, slot, q, k, v, out_gate, weight, window, keep, scratch, output,
            H, HV, K, V, W, S, EPS, ACTIVATION, HAS_KEEP, WINDOW_SLOT, Q_B, Q_S, K_B, K_S, V_B, V_S, OG_B, OG_S,
        )  # fmt: skip


Step = tuple[Tensor | None, ...]
"""q, k, v, gate, beta, out_gate, A_log, dt_bias, taps_q, taps_k, taps_v, weight, memory, window, slots, keep: the kernel's
pointers in its order, ``scratch``, ``tickets`` and ``output`` apart; shapes as ``kimi_linear.ops.kda_decode`` has them."""
MEMORY = 12
"""Where ``memory`` stands in a step."""
FEW_HEADS = 132
"""Value heads of all sequences together that leave processors of a large GPU idle; what counts then is a head's latency."""


def shape_class(key_dim: int, tokens: int, heads: int) -> str:
    """Of the table: K, one token or more, and how many value heads all sequences have together."""
    count = "more tokens" if tokens > 1 else "one token, few heads" if heads <= FEW_HEADS else "one token, many heads"
    return f"K = {key_dim}, {count}"


def config_for(q: Tensor, v: Tensor) -> Config:
    """The entry of the table for a step; BV is no more than V."""
    config = config_of("kda_decode", q, shape_class(q.shape[3], q.shape[1], v.shape[0] * v.shape[2]))
    return Config(constants={**config.constants, "BV": min(config["BV"], v.shape[3])}, num_warps=config.num_warps)


def options_of(config: Config) -> dict[str, int | bool]:
    """As Triton's keywords. Rounding is as the source says, in every build: see the file's docstring."""
    options: dict[str, int | bool] = {"num_warps": config.num_warps, "num_stages": 1, "enable_fp_fusion": False}
    if "registers" in config.constants:
        options["maxnreg"] = config["registers"]
    return options | ({"launch_pdl": True} if config["PDL"] else {})


def prepare(
    step: Step, *, lower_bound: float | None, eps: float, activation: str, config: Config | None = None
) -> Callable[[Step, Tensor], None]:
    """A function that runs the kernel on tensors of the same shapes, strides, dtypes and device as those of ``step``.

    The launcher that Triton makes binds and inspects every argument anew, which costs more than the step itself. Here that
    is done once: what remains of a launch is to read the addresses and to hand them over.

    ``lower_bound`` is None for the softplus gate. The output is [B, S, HV, V], contiguous.
    """
    q, v = step[0], step[2]
    assert q is not None
    assert v is not None
    config = config or config_for(q, v)
    interpreted = not isinstance(decode_kernel, JITFunction)
    if interpreted:
        config = Config(constants={**config.constants, "PDL": 0}, num_warps=config.num_warps)
    constants, options = _constants(step, lower_bound, eps, activation, config), options_of(config)
    (batch, _, heads, _), (v_heads, value_dim) = q.shape, v.shape[2:]
    grid = (value_dim // config["BV"], v_heads, batch)
    shared = grid[0] * v_heads // heads > 1  # by several programs: a key head
    compiled: dict[object, Any] = {}

    def run(now: Step, output: Tensor) -> None:
        if batch == 0:
            return
        # The allocator gives memory back in the stream's order, so dropping it after the launch is safe.
        scratch = torch.empty_like(output, dtype=torch.float32)
        tickets = tickets_of(now[MEMORY], heads) if shared else None
        tensors = (*now, scratch, tickets, output)
        if interpreted:
            decode_kernel[grid](*tensors, *constants, **options)
            return
        addresses = [None if x is None else x.data_ptr() for x in tensors]
        bits = 0
        for address in addresses:
            bits |= address or 0
        # Compiled code may assume addresses that are multiples of 16; a view with others gets code of its own.
        known = True if bits & 15 == 0 else tuple((address or 0) % 16 == 0 for address in addresses)
        launch = compiled.get(known)
        if launch is None:
            kernel = decode_kernel.warmup(*tensors, *constants, grid=grid, **options)
            launch = compiled[known] = kernel[grid]
        launch(*addresses, *constants)

    return run


def _constants(
    step: Step, lower_bound: float | None, eps: float, activation: str, config: Config
) -> tuple[object, ...]:
    """The kernel's constants, in its order."""
    q, k, v, gate, beta, out_gate, _, _, taps, _, _, _, memory, window, slots, keep = step
    (_, tokens, heads, key_dim), (v_heads, value_dim) = q.shape, v.shape[2:]
    strides = []
    for x in (q, k, v, gate, beta, out_gate):
        strides += [0, 0] if x is None else [x.stride(0), x.stride(1) if tokens > 1 else 0]
    kind, kinds = 1 if lower_bound is None else 2, ("none", "sigmoid", "swish")
    return (
        heads, v_heads, key_dim, value_dim, config["BV"], 0 if taps is None else taps.shape[1], tokens, kind,
        lower_bound or 0.0, key_dim**-0.5, eps, kinds.index(activation), slots is not None, keep is not None,
        config["PDL"], memory.stride(0), window.stride(0), *strides,
    )  # fmt: skip
