"""What the chunk kernels share: a chunk's place in the tokens, the gate in the kernel, sums over stretches of tokens.

A sum of log-decays over any stretch of a chunk's tokens is one row of a 0/1 matrix times g, so it runs on the matrix unit,
where a scan over rows would shuffle. The matrices are constants in global memory: built in the kernel from comparisons
they cost more instructions than the products that they feed.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from kimi_linear.kernels.triton.saved import CHUNK

LOG2E = tl.constexpr(1.4426950408889634)
MAX_RANGE = tl.constexpr(120.0)  # 2^120 times a product of normalized rows stays finite in fp32 and bf16
DEEPEST = tl.constexpr(110.0)  # of an anchor: 2^-110 times what is above 2^-16 is no denormal yet
# In fp32 neither must the last of the three tf32 terms that it is multiplied as be a denormal, 2^-22 of the whole.
MAX_RANGE_FP32 = tl.constexpr(80.0)
DEEPEST_FP32 = tl.constexpr(70.0)
FAR = tl.constexpr(40.0)  # 2^-24 is fp32's rounding
STEEP = tl.constexpr(1.0)  # in place of an anchor, which is never above 0
G = tl.constexpr(16)
"""Channels of a group, which has one bit in a tile's flags: steep channels are few."""
TILE = tl.constexpr(0)  # of ``stretches``: from the start of a tile of 16 through the token
REST = tl.constexpr(1)  # after the token to its tile's end
INTO = tl.constexpr(2)  # from the chunk's start through the token


@cache
def stretches(device: torch.device) -> torch.Tensor:
    """[3, C, C] bf16 of 0 and 1: row r of each marks the tokens whose log-decays are summed for token r."""
    r, c = torch.arange(CHUNK)[:, None], torch.arange(CHUNK)[None, :]
    tile = r // 16 == c // 16
    return torch.stack([tile & (c <= r), tile & (c > r), c <= r]).to(device=device, dtype=torch.bfloat16)


@triton.jit
def chunk_of(chunk, cu_chunks, cu_seqlens, num_sequences, tokens, C: tl.constexpr, PACKED: tl.constexpr):
    """(first token, end of its sequence) of a chunk in the flattened tokens; an empty range past the last chunk."""
    if PACKED:
        low, high = 0, num_sequences
        while high - low > 1:  # the last sequence whose chunks begin at or before this one
            middle = (low + high) // 2
            if tl.load(cu_chunks + middle) <= chunk:
                low = middle
            else:
                high = middle
        start = tl.load(cu_seqlens + low).to(tl.int64)
        stop = tl.load(cu_seqlens + low + 1).to(tl.int64)
        return start + (chunk - tl.load(cu_chunks + low)) * C, stop
    per_sequence = tl.cdiv(tokens, C)
    n = (chunk // per_sequence).to(tl.int64)
    return n * tokens + (chunk % per_sequence) * C, (n + 1) * tokens


@triton.jit
def reach(totals, dim, K: tl.constexpr):
    """The first distance between tiles, 2 to 4, at which no channel of ``dim`` leaves a pair more than 2^-FAR, for ``totals``
    [4, K] of a chunk: the tiles between two tokens forget the rest. Less than a rounding of fp32 is lost with such pairs."""
    one, other = tl.load(totals + K + dim, dim < K, -99.0), tl.load(totals + 2 * K + dim, dim < K, -99.0)
    near, far = tl.max(tl.maximum(one, other), 0) < -FAR, tl.max(one + other, 0) < -FAR
    return tl.where(near, 2, tl.where(far, 3, 4))


@triton.jit
def power2(x, DOT: tl.constexpr):
    """2^x. For 16-bit inputs one instruction that flushes denormals, where ``tl.exp2`` takes four to keep them."""
    if DOT == tl.float32:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def log2(x, DOT: tl.constexpr):
    """Base-2 logarithm, as ``power2``."""
    if DOT == tl.float32:
        return tl.log2(x)
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def load_gate(gate, dt_bias, row, valid, dim, stride, GATE: tl.constexpr):
    """Gate values [C, BK] of a slice of key channels in fp32, with the bias where the gate is a raw projection."""
    x = tl.load(gate + row[:, None] * stride + dim[None, :], valid[:, None], 0.0).to(tl.float32)
    if GATE != 0:
        x += tl.load(dt_bias + dim).to(tl.float32)[None, :]
    return x


@triton.jit
def chunk_log2_decay(x, amount, lower_bound, GATE: tl.constexpr, DOT: tl.constexpr):
    """Log2-decay of ``load_gate``: 0 a plain natural-log decay, 1 the softplus gate, 2 the bounded gate; amount = e^A_log."""
    z = x * LOG2E
    if GATE == 0:
        return z
    if GATE == 1:
        return tl.maximum(z, log2(1.0 + power2(tl.minimum(z, 126.0), DOT), DOT)) * -amount
    return lower_bound * LOG2E / (1.0 + power2(z * -amount, DOT))


@triton.jit
def log2_decay(x, A_log, dt_bias, lower_bound, GATE: tl.constexpr):
    """Log2-decay of gate values x: 0 a plain natural-log decay, 1 the softplus gate, 2 the bounded gate."""
    if GATE == 0:
        return x * LOG2E
    z = x + dt_bias
    if GATE == 1:
        softplus = tl.where(z > 20.0, z * LOG2E, tl.log2(1.0 + tl.exp2(z * LOG2E)))
        return softplus * -tl.exp2(A_log * LOG2E)
    return lower_bound * LOG2E / (1.0 + tl.exp2(-z * LOG2E * tl.exp2(A_log * LOG2E)))


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


@triton.jit
def split(g, DOT: tl.constexpr):
    """g as two bf16 terms, which keep 16 bits of every log-decay; as it is for fp32 inputs."""
    if DOT == tl.float32:
        return g, g
    else:  # noqa: RET505  (said, because without it Triton wants the types of both returns to agree)
        high = g.to(tl.bfloat16)
        return high, (g - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def stretch_sum(selection, high, low, DOT: tl.constexpr):
    """``selection @ g`` for a matrix of ``stretches`` (or its transpose) and a ``split`` g."""
    if DOT == tl.float32:
        return tl.dot(selection.to(tl.float32), high, input_precision="ieee")
    else:  # noqa: RET505
        return tl.dot(selection, low, tl.dot(selection, high))
