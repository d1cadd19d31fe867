"""The core of a KDA layer for a decoded token, in one kernel, in place on a pool of slots.

    q, k, v = silu(convolve(window, raw))    q, k to unit length    S <- S Diag(2^g)    d = beta (v - S k)
    o = scale (S q + (k . q) d)              S <- S + d k^T         output = rms_norm(o) * weight * activation(gate)

A step is memory traffic: the state, 64 KiB a head at K = V = 128, is read once and written once; all else is 1 % of that.
So one program holds a whole head in registers. It is then the only one that touches its window, and the only one that
needs the sum of squares of its outputs: no race, no second pass, no waiting for others. Value heads that share a key head
share a program. A head too large for the registers goes through in slices of V, its outputs through ``scratch``.

S q is read from the same decayed state as S k, so that both sums run at once, in one reduction. A tile of the state lies
as [V, K/32, 32]: a sum over K then takes three shuffles among eight lanes, not five among 32.

Grid (H, B). Strides and numbers that a model fixes are constants, so a launch passes nothing but pointers. The state stays
in registers over the tokens of a call; ``keep`` names a slot for the state after each of them. The old window is read until
the last token is through; all new windows are written at the end.

A call of S tokens gives bitwise what S calls give, so that speculative decoding changes nothing. Builds for different S are
compiled apart; left free to fuse products into sums, the compiler did so differently in each. So fusion is off, and the two
places where it pays say ``tl.fma``. Blocks and warps, which set the order of every sum, do not depend on S.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from kimi_linear.kernels.triton.common import LOG2E, log2_decay

LANES = tl.constexpr(32)
"""Key channels side by side in a tile: 8 lanes of 4, which is one line of 128 bytes."""


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def inputs_to(s, x, old, stride_s, dim, place, W: tl.constexpr, WIDE: tl.constexpr):
    """[..., n, WIDE], the W latest inputs of token(s) ``s`` of this call, oldest first: from the window, or from the call."""
    w = tl.arange(0, WIDE)
    token = s - (W - 1) + w
    before = tl.load(old + (place + dim) * (W - 1) + (W - 1 + token), (token < 0) & (w < W), 0.0)
    here = tl.load(x + token * stride_s + dim, (token >= 0) & (w < W), 0.0)
    return tl.where(token < 0, before.to(x.dtype.element_ty), here)


@triton.jit
def convolve(s, x, old, taps, stride_s, dim, place, W: tl.constexpr, WIDE: tl.constexpr):
    """[n], SiLU of the convolution at token s; of the input itself where W == 0."""
    if W == 0:
        y = tl.load(x + s * stride_s + dim).to(tl.float32)
    else:
        w = tl.arange(0, WIDE)[None, :]
        weights = tl.load(taps + dim[:, None] * W + w, w < W, 0.0).to(tl.float32)
        y = tl.sum(inputs_to(s, x, old, stride_s, dim[:, None], place, W, WIDE).to(tl.float32) * weights, 1)
    return y * sigmoid(y)


@triton.jit
def new_windows(x, old, stride_s, dim, place, S: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr):
    """[S, n, WIDE] the inputs up to each token of the call: all but the oldest are its window."""
    s = tl.arange(0, triton.next_power_of_2(S))[:, None, None]
    return inputs_to(s, x, old, stride_s, dim[None, :, None], place, W, WIDE)


@triton.jit
def leave_windows(values, window, to, dim, place, WINDOW_SLOT: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr):
    """Write ``new_windows`` into the slots ``to`` [S]; a negative one is not written."""
    w = tl.arange(0, WIDE)[None, None, :]
    at = to[:, None, None] * WINDOW_SLOT + (place + dim[None, :, None]) * (W - 1) + (w - 1)
    tl.store(window + at, values.to(window.dtype.element_ty), (to[:, None, None] >= 0) & (w > 0) & (w < W))


@triton.jit
def unit(x):
    """x at unit length, as ``l2_normalize`` makes it."""
    return x * tl.rsqrt(tl.sum(x * x, 0) + 1e-6)


@triton.jit
def add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def finish(o, out_gate, gate_at, weight, output, dim, V: tl.constexpr, EPS: tl.constexpr, ACTIVATION: tl.constexpr):
    """Root-mean-square norm of a head's output, then the gate: 0 none, 1 sigmoid, 2 swish."""
    o = o * tl.rsqrt(tl.sum(o * o, 0) / V + EPS) * tl.load(weight + dim).to(tl.float32)
    if ACTIVATION > 0:
        x = tl.load(out_gate + gate_at + dim).to(tl.float32)
        o *= sigmoid(x) if ACTIVATION == 1 else x * sigmoid(x)
    tl.store(output + dim, o.to(output.dtype.element_ty))


@triton.jit
def decode_kernel(
    q, k, v, gate, beta, out_gate, A_log, dt_bias, taps_q, taps_k, taps_v, weight, memory, window, slots, keep, scratch,
    output,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, W: tl.constexpr,
    S: tl.constexpr, GATE: tl.constexpr, LOWER_BOUND: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_KEEP: tl.constexpr,
    MEMORY_SLOT: tl.constexpr, WINDOW_SLOT: tl.constexpr, Q_B: tl.constexpr, Q_S: tl.constexpr, K_B: tl.constexpr,
    K_S: tl.constexpr, V_B: tl.constexpr, V_S: tl.constexpr, G_B: tl.constexpr, G_S: tl.constexpr, BETA_B: tl.constexpr,
    BETA_S: tl.constexpr, OG_B: tl.constexpr, OG_S: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HV // H
    WIDE: tl.constexpr = triton.next_power_of_2(W)
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = b
    if HAS_SLOTS:
        slot = tl.load(slots + b).to(tl.int64)
    dim_k, dim_all = tl.arange(0, K), tl.arange(0, V)
    if slot < 0:  # a padded row: no state is touched, and its output is zero rather than what was there
        for s in range(S):
            for j in range(GROUP):
                at = ((b * S + s) * HV + h * GROUP + j) * V
                tl.store(output + at + dim_all, tl.zeros([V], output.dtype.element_ty))
        return
    old = window + slot * WINDOW_SLOT
    x_q, x_k, x_v = q + b * Q_B, k + b * K_B, v + b * V_B
    channel = h * K + dim_k
    part, lane = tl.arange(0, K // LANES)[None, :, None], tl.arange(0, LANES)[None, None, :]
    for j in range(GROUP):
        hv = h * GROUP + j
        rate = tl.load(A_log + hv).to(tl.float32)
        bias = tl.load(dt_bias + hv * K + dim_k).to(tl.float32)
        for slice_v in range(V // BV):
            dim_v = slice_v * BV + tl.arange(0, BV)
            cells = (hv * V + dim_v[:, None, None]) * K + (part * LANES + lane)
            state = tl.load(memory + slot * MEMORY_SLOT + cells)
            for s in range(S):
                b_q = unit(convolve(s, x_q, old, taps_q, Q_S, channel, 0, W, WIDE)) * SCALE
                b_k = unit(convolve(s, x_k, old, taps_k, K_S, channel, H * K, W, WIDE))
                b_v = convolve(s, x_v, old, taps_v, V_S, hv * V + dim_v, 2 * H * K, W, WIDE)
                x = tl.load(gate + b * G_B + s * G_S + hv * K + dim_k).to(tl.float32)
                strength = sigmoid(tl.load(beta + b * BETA_B + s * BETA_S + hv).to(tl.float32))
                straight = tl.sum(b_q * b_k, 0)
                decay = tl.exp2(log2_decay(x, rate, bias, LOWER_BOUND, GATE))
                wide_q = tl.reshape(b_q, [K // LANES, LANES])[None, :, :]
                wide_k = tl.reshape(b_k, [K // LANES, LANES])[None, :, :]
                state *= tl.reshape(decay, [K // LANES, LANES])[None, :, :]
                held, seen = tl.reduce(tl.reduce((state * wide_k, state * wide_q), 1, add_both), 1, add_both)
                change = strength * (b_v - held)
                state = tl.fma(change[:, None, None], wide_k, state)
                o = tl.fma(straight, change, seen)
                at = ((b * S + s) * HV + hv) * V
                if BV == V:
                    gate_at = b * OG_B + s * OG_S + hv * V
                    finish(o, out_gate, gate_at, weight, output + at, dim_v, V, EPS, ACTIVATION)
                else:
                    tl.store(scratch + at + dim_v, o)
                if HAS_KEEP:
                    to = tl.load(keep + b * S + s).to(tl.int64)
                    if to >= 0:
                        tl.store(memory + to * MEMORY_SLOT + cells, state)
                elif s == S - 1:
                    tl.store(memory + slot * MEMORY_SLOT + cells, state)
    if W > 1:
        token = tl.arange(0, triton.next_power_of_2(S))
        if HAS_KEEP:
            to = tl.load(keep + b * S + token, token < S, -1).to(tl.int64)
        else:
            to = tl.where(token == S - 1, slot, -1)
        new_q = new_windows(x_q, old, Q_S, channel, 0, S, W, WIDE)
        new_k = new_windows(x_k, old, K_S, channel, H * K, S, W, WIDE)
        for j in range(GROUP):
            channel_v = (h * GROUP + j) * V + dim_all
            new_v = new_windows(x_v, old, V_S, channel_v, 2 * H * K, S, W, WIDE)
            tl.debug_barrier()  # every thread has read this head's window before one writes it
            leave_windows(new_v, window, to, channel_v, 2 * H * K, WINDOW_SLOT, W, WIDE)
        leave_windows(new_q, window, to, channel, 0, WINDOW_SLOT, W, WIDE)
        leave_windows(new_k, window, to, channel, H * K, WINDOW_SLOT, W, WIDE)
    if BV < V:
        tl.debug_barrier()  # the slices' outputs are written
        for j in range(GROUP):
            hv = h * GROUP + j
            for s in range(S):
                at = ((b * S + s) * HV + hv) * V
                o = tl.load(scratch + at + dim_all)
                gate_at = b * OG_B + s * OG_S + hv * V
                finish(o, out_gate, gate_at, weight, output + at, dim_all, V, EPS, ACTIVATION)


Step = tuple[Tensor | None, ...]
"""q, k, v, gate, beta, out_gate, A_log, dt_bias, taps_q, taps_k, taps_v, weight, memory, window, slots, keep: the kernel's
pointers in its order, ``scratch`` and ``output`` apart; shapes as ``kimi_linear.ops.kda_decode`` has them."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Rows of a slice of the state, warps of a program, and the most registers a thread may take (None: any)."""

    block: int
    warps: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int | bool]:
        """As Triton's keywords. Rounding is as the source says, in every build: see the file's docstring."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": 1, "enable_fp_fusion": False, **limit}


def launch_of(key_dim: int, value_dim: int, tokens: int, arch: int) -> Launch:
    """The configuration for K and V in {32, 64, 128, 256} on sm_``arch``; none of them spills on sm_80, sm_90 and sm_100.

    A program takes as much of a head as half of the registers hold. For one token it is kept to 128 of them a thread, so
    that a second program loads while the first one stores.
    """
    block = min(value_dim, 8192 // key_dim if key_dim == 256 else 16384 // key_dim)
    warps = 8 if key_dim == 256 else max(1, min(8, block * key_dim // 2048))
    tight = warps == 8 and key_dim <= 128 and tokens == 1 and arch < 100
    return Launch(block=block, warps=warps, registers=128 if tight else None)


def prepare(
    step: Step, *, lower_bound: float | None, eps: float, activation: str, launch: Launch | None = None
) -> Callable[[Step, Tensor], None]:
    """A function that runs the kernel on tensors of the same shapes, strides, dtypes and device as those of ``step``.

    The launcher that Triton makes binds and inspects every argument anew, which costs more than the step itself. Here that
    is done once: what remains of a launch is to read the addresses and to hand them over.

    ``lower_bound`` is None for the softplus gate. The output is [B, S, HV, V], contiguous.
    """
    q, v = step[0], step[2]
    launch = launch or launch_of(q.shape[3], v.shape[3], q.shape[1], _arch(q))
    constants = _constants(step, lower_bound, eps, activation, launch)
    grid, shape, sliced = (q.shape[2], q.shape[0], 1), v.shape, launch.block < v.shape[3]
    options = launch.options
    compiled: dict[object, object] = {}

    def run(now: Step, output: Tensor) -> None:
        if grid[1] == 0:
            return
        # The allocator gives memory back in the stream's order, so dropping it after the launch is safe.
        scratch = torch.empty(shape, dtype=torch.float32, device=output.device) if sliced else None
        tensors = (*now, scratch, output)
        if not isinstance(decode_kernel, JITFunction):  # Triton's interpreter
            decode_kernel[grid](*tensors, *constants, **options)
            return
        addresses = [None if x is None else x.data_ptr() for x in tensors]
        bits = 0
        for address in addresses:
            bits |= address or 0
        # Compiled code may assume addresses that are multiples of 16; a view with others gets code of its own.
        known = True if bits & 15 == 0 else tuple((address or 0) % 16 == 0 for address in addresses)
        kernel = compiled.get(known)
        if kernel is None:
            kernel = compiled[known] = decode_kernel.warmup(*tensors, *constants, grid=grid, **options)
        kernel[grid](*addresses, *constants)

    return run


def _constants(
    step: Step, lower_bound: float | None, eps: float, activation: str, launch: Launch
) -> tuple[object, ...]:
    """The kernel's constants, in its order."""
    q, k, v, gate, beta, out_gate, _, _, taps, _, _, _, memory, window, slots, keep = step
    (_, tokens, heads, key_dim), (v_heads, value_dim) = q.shape, v.shape[2:]
    strides = []
    for x in (q, k, v, gate, beta, out_gate):
        strides += [0, 0] if x is None else [x.stride(0), x.stride(1) if tokens > 1 else 0]
    kind, kinds = 1 if lower_bound is None else 2, ("none", "sigmoid", "swish")
    return (
        heads, v_heads, key_dim, value_dim, launch.block, 0 if taps is None else taps.shape[1], tokens, kind,
        lower_bound or 0.0, key_dim**-0.5, eps, kinds.index(activation), slots is not None, keep is not None,
        memory.stride(0), window.stride(0), *strides,
    )  # fmt: skip


def _arch(x: Tensor) -> int:
    """Of x's device, such as 90; the interpreter takes that too."""
    major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)
    return 10 * major + minor
