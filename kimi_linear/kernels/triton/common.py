"""What the kernels share: a chunk's place in the tokens, the gate in the kernel, sums over stretches of tokens."""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = 64
"""C, tokens per chunk, in four tiles of 16."""
LOG2E = tl.constexpr(1.4426950408889634)


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
def gate_slice(
    gate, A_log, dt_bias, token, valid, hv, dim, stride_g, lower_bound, K: tl.constexpr, GATE: tl.constexpr
):  # fmt: skip
    """Log2-decay [C, BK] of a slice of key channels, zero past the sequence's end."""
    x = tl.load(gate + token[:, None] * stride_g + hv * K + dim[None, :], valid[:, None], 0.0).to(tl.float32)
    if GATE == 0:
        g = log2_decay(x, 0.0, 0.0, lower_bound, GATE)
    else:
        bias = tl.load(dt_bias + hv * K + dim).to(tl.float32)
        g = log2_decay(x, tl.load(A_log + hv).to(tl.float32), bias[None, :], lower_bound, GATE)
    return tl.where(valid[:, None], g, 0.0)


@triton.jit
def stretch_sum(selection, g, DOT: tl.constexpr):
    """``selection @ g`` for a 0/1 matrix: sums over any stretch of tokens on the matrix unit, where a scan over rows would
    shuffle. For bf16 inputs g goes in as two bf16 terms, which keeps 16 bits of every exponent."""
    if DOT == tl.float32:
        return tl.dot(selection.to(tl.float32), g, input_precision="ieee")
    high = g.to(tl.bfloat16)
    low = (g - high.to(tl.float32)).to(tl.bfloat16)
    return tl.dot(selection.to(tl.bfloat16), low, tl.dot(selection.to(tl.bfloat16), high))
