"""Causal depthwise convolution of a few taps with SiLU, forward and backward: every number is read once and written once.

    z_t = bias + sum_w weight[w] x_{t-W+1+w}      y_t = silu(z_t) or z_t      x before a sequence: its initial state
    dz_t = dy_t silu'(z_t)      dx_t = sum_w weight[w] dz_{t+W-1-w}      dweight[w] = sum_t dz_t x_{t-W+1+w}

A program owns BT tokens of one sequence and BD channels, and walks the tokens with the last W-1 inputs in registers; the
backward keeps the last W-1 dz beside them, makes z again, and runs W-1 tokens into the next tile. U tokens are loaded
ahead of their arithmetic: loads in flight are what memory speed needs. dweight and dbias leave as one fp32 partial per
tile, [tiles, W (+ 1), D], and are summed in a fixed order by ``column_sum``.

Tiles of packed sequences need no table: sequence n begins at tile cu_seqlens[n] // BT + n, which leaves each at least the
tiles that it needs, and at most one spare. So T // BT + N tiles in all, known without reading cu_seqlens.

x, weight and y may be three tensors each, the channels of q, k and v in three parts: one launch convolves all three
projections of a layer, and nothing is joined or split in memory, forward or backward. State and dweight are of all channels.

Grid: tiles x channel blocks in one dimension, channels fastest, so that neighbours read neighbouring memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_linear.kernels.triton.column_sum import column_sum
from kimi_linear.kernels.triton.configs import Config, config_of


@triton.jit
def tile_of(tile, cu_seqlens, tokens, num_sequences, BT: tl.constexpr, PACKED: tl.constexpr):
    """(sequence, its first token, its end, the tile's first token), int64; the last lies past the end in a spare tile."""
    if PACKED:
        low, high = 0, num_sequences
        while high - low > 1:  # the last sequence whose tiles begin at or before this one
            middle = (low + high) // 2
            if tl.load(cu_seqlens + middle) // BT + middle <= tile:
                low = middle
            else:
                high = middle
        first = tl.load(cu_seqlens + low).to(tl.int64)
        stop = tl.load(cu_seqlens + low + 1).to(tl.int64)
        return tl.full([], 0, tl.int64) + low, first, stop, first + (tile - (first // BT + low)) * BT
    per_sequence = tl.maximum(tl.cdiv(tokens, BT), 1)
    n = (tile // per_sequence).to(tl.int64)
    return n, n * tokens, (n + 1) * tokens, n * tokens + (tile % per_sequence) * BT


@triton.jit
def channels_of(block, width, width0, width1, PARTS: tl.constexpr, BD: tl.constexpr):
    """(part 0 to 2, its first channel, its width, the block's first channel in the part)."""
    if PARTS == 1:
        return block * 0, block * 0, width, block * BD
    blocks0, blocks1 = tl.cdiv(width0, BD), tl.cdiv(width1, BD)
    second, third = block >= blocks0, block >= blocks0 + blocks1
    part = second.to(tl.int32) + third.to(tl.int32)
    before = tl.where(third, width0 + width1, tl.where(second, width0, 0))
    own = tl.where(third, width - width0 - width1, tl.where(second, width1, width0))
    skipped = tl.where(third, blocks0 + blocks1, tl.where(second, blocks0, 0))
    return part, before, own, (block - skipped) * BD


@triton.jit
def part_of(part, first, second, third, PARTS: tl.constexpr):
    """The pointer or number that belongs to a part."""
    if PARTS == 1:
        return first
    return tl.where(part == 2, third, tl.where(part == 1, second, first))


@triton.jit
def input_at(x, state, n, t, first, local, channel, live, stride_x, width, W: tl.constexpr, HAS_STATE: tl.constexpr):
    """Input [BD] at token t >= first - W + 1: from x, or before the sequence from its initial state, as x would hold it."""
    value = tl.load(x + t * stride_x + local, live & (t >= first), 0.0)
    if HAS_STATE:
        at = (n * width + channel) * (W - 1) + (t - first + W - 1)
        old = tl.load(state + at, live & (t < first), 0.0).to(x.dtype.element_ty)
        value = tl.where(t >= first, value, old)
    return value


@triton.jit
def taps_of(weight, local, live, W: tl.constexpr):
    """The W taps [BD] in fp32."""
    taps = ()
    for w in tl.static_range(W):
        taps += (tl.load(weight + local * W + w, live, 0.0).to(tl.float32),)
    return taps


@triton.jit(do_not_specialize=["tokens", "num_sequences"])
def forward_kernel(
    x0, x1, x2, w0, w1, w2, bias, state, cu_seqlens, y0, y1, y2, final,
    tokens, num_sequences, blocks, stride_x0, stride_x1, stride_x2, width, width0, width1,
    W: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, PACKED: tl.constexpr,
    PARTS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile, block = pid // blocks, pid % blocks
    n, first, stop, start = tile_of(tile, cu_seqlens, tokens, num_sequences, BT, PACKED)
    if (start >= stop) & (start > first):
        return
    part, before, own_width, own_start = channels_of(block, width, width0, width1, PARTS, BD)
    local = own_start + tl.arange(0, BD)
    live, channel = local < own_width, before + local
    x, y = part_of(part, x0, x1, x2, PARTS), part_of(part, y0, y1, y2, PARTS)
    stride_x = part_of(part, stride_x0, stride_x1, stride_x2, PARTS)
    taps = taps_of(part_of(part, w0, w1, w2, PARTS), local, live, W)
    if HAS_BIAS:
        origin = tl.load(bias + channel, live, 0.0).to(tl.float32)
    else:
        origin = tl.zeros([BD], tl.float32)
    window = ()
    for j in tl.static_range(W - 1):
        old = input_at(x, state, n, start - (W - 1) + j, first, local, channel, live, stride_x, width, W, HAS_STATE)
        window += (old.to(tl.float32),)
    count = tl.minimum(stop - start, BT).to(tl.int32)
    from_x, to_y = x + start * stride_x, y + start * own_width
    for i in range(0, count, U):
        for u in tl.static_range(U):
            now = tl.load(from_x + (i + u) * stride_x + local, live & (i + u < count), 0.0)
            window += (now.to(tl.float32),)
        for u in tl.static_range(U):
            z = origin
            for w in tl.static_range(W):
                z += window[u + w] * taps[w]
            if SILU:
                z = z / (1.0 + tl.exp(-z))
            tl.store(to_y + (i + u) * own_width + local, z.to(y.dtype.element_ty), live & (i + u < count))
        window = window[U:]
    if start + BT >= stop:
        for j in tl.static_range(W - 1):
            last = input_at(x, state, n, stop - (W - 1) + j, first, local, channel, live, stride_x, width, W, HAS_STATE)
            tl.store(final + (n * width + channel) * (W - 1) + j, last, live)


@triton.jit(do_not_specialize=["tokens", "num_sequences"])
def backward_kernel(
    x0, x1, x2, w0, w1, w2, bias, state, cu_seqlens, dy0, dy1, dy2, dfinal, dx0, dx1, dx2, dstate, partial,
    tokens, num_sequences, blocks, stride_x0, stride_x1, stride_x2, stride_dy0, stride_dy1, stride_dy2,
    width, width0, width1,
    W: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_DFINAL: tl.constexpr,
    PACKED: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile, block = pid // blocks, pid % blocks
    n, first, stop, start = tile_of(tile, cu_seqlens, tokens, num_sequences, BT, PACKED)
    part, before, own_width, own_start = channels_of(block, width, width0, width1, PARTS, BD)
    local = own_start + tl.arange(0, BD)
    live, channel = local < own_width, before + local
    x, dy, dx = (
        part_of(part, x0, x1, x2, PARTS),
        part_of(part, dy0, dy1, dy2, PARTS),
        part_of(part, dx0, dx1, dx2, PARTS),
    )
    stride_x = part_of(part, stride_x0, stride_x1, stride_x2, PARTS)
    stride_dy = part_of(part, stride_dy0, stride_dy1, stride_dy2, PARTS)
    zero = tl.zeros([BD], tl.float32)
    to = partial + tile.to(tl.int64) * (W + HAS_BIAS) * width + channel
    if (start >= stop) & (start > first):
        for w in tl.static_range(W + HAS_BIAS):
            tl.store(to + w * width, zero, live)
        return
    dtaps, dorigin = (), zero
    for _ in tl.static_range(W):
        dtaps += (zero,)
    taps = taps_of(part_of(part, w0, w1, w2, PARTS), local, live, W)
    if HAS_BIAS:
        origin = tl.load(bias + channel, live, 0.0).to(tl.float32)
    else:
        origin = zero
    xs, dzs = (), ()
    for j in tl.static_range(W - 1):
        old = input_at(x, state, n, start - (W - 1) + j, first, local, channel, live, stride_x, width, W, HAS_STATE)
        xs += (old.to(tl.float32),)
        dzs += (zero,)
    left = tl.minimum(stop - start, BT + W - 1).to(tl.int32)  # tokens of the sequence that count here
    count = tl.minimum(left, BT)  # tokens of the tile
    from_x, from_dy, to_dx = x + start * stride_x, dy + start * stride_dy, dx + start * own_width
    for i in range(0, count + W - 1, U):
        dys = ()
        for u in tl.static_range(U):
            here = live & (i + u < left)
            xs += (tl.load(from_x + (i + u) * stride_x + local, here, 0.0).to(tl.float32),)
            dys += (tl.load(from_dy + (i + u) * stride_dy + local, here, 0.0).to(tl.float32),)
        for u in tl.static_range(U):
            dz = dys[u]
            if SILU:
                z = origin
                for w in tl.static_range(W):
                    z += xs[u + w] * taps[w]
                s = 1.0 / (1.0 + tl.exp(-z))
                dz = dz * (s * (1.0 + z * (1.0 - s)))
            dzs += (dz,)
            counted = tl.where(i + u < count, dz, 0.0)
            more = ()
            for w in tl.static_range(W):
                more += (dtaps[w] + counted * xs[u + w],)
            dtaps = more
            dorigin += counted
            p = i + u - (W - 1)  # the input whose last use was this token
            d = zero
            for w in tl.static_range(W):
                d += dzs[u + W - 1 - w] * taps[w]
            if HAS_DFINAL:
                slot = (start + p - (stop - (W - 1))).to(tl.int32)
                kept = (slot >= 0) & (p < count)
                d += tl.load(dfinal + (n * width + channel) * (W - 1) + slot, live & kept, 0.0).to(tl.float32)
            tl.store(to_dx + p * own_width + local, d.to(dx.dtype.element_ty), live & (p >= 0) & (p < count))
            if HAS_STATE:
                at = (n * width + channel) * (W - 1) + p + (W - 1)
                tl.store(dstate + at, d.to(dstate.dtype.element_ty), live & (p < 0) & (start == first))
        xs, dzs = xs[U:], dzs[U:]
    for w in tl.static_range(W):
        tl.store(to + w * width, dtaps[w], live)
    if HAS_BIAS:
        tl.store(to + W * width, dorigin, live)


def shape_class(x: Tensor, taps: int) -> str:
    """Few taps in 16 bits are the released shape; the window of more, or of fp32, takes more registers."""
    return f"{'16' if x.dtype.itemsize == 2 else '32'} bit, {'W <= 4' if taps <= 4 else 'W <= 8'}"


def forward(
    xs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None,
    silu: bool, config: Config | None = None,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """(outputs [B, T, D_i], final_state [N, D, W-1]) for one or three parts xs [B, T, D_i] with weights [D_i, W]; D is
    all channels. A bias [D] goes with one part."""
    parts, taps = _parts(xs, weights), weights[0].shape[1]
    xs, widths, x = parts.xs, parts.widths, parts.xs[0]
    batch, tokens = x.shape[:2]
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    outputs = [x.new_empty(batch, tokens, width) for width in widths]
    final = x.new_empty(sequences, sum(widths), taps - 1)
    config = config or config_of("short_conv_forward", x, shape_class(x, taps))
    tiles, blocks = _grid(batch, tokens, sequences, widths, cu_seqlens is not None, config)
    if tiles * blocks:
        forward_kernel[(tiles * blocks,)](
            *_three(xs), *_three(parts.weights), _dense(bias), _dense(state), _dense(cu_seqlens), *_three(outputs), final,
            tokens, sequences, blocks, *_three([x.stride(1) for x in xs]), sum(widths), widths[0], widths[1 % len(widths)],
            W=taps, SILU=silu, HAS_BIAS=bias is not None, HAS_STATE=state is not None and taps > 1,
            PACKED=cu_seqlens is not None, PARTS=len(xs), **config.launch,
        )  # fmt: skip
    return outputs, final


def backward(
    xs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None,
    d_outputs: Sequence[Tensor], d_final: Tensor | None, silu: bool, config: Config | None = None,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx [B, T, D_i] of each part, dweight [D, W], dbias [D], dstate [N, D, W-1]); the last two are empty without a bias
    or a state."""
    parts, taps = _parts(xs, weights), weights[0].shape[1]
    xs, widths, x = parts.xs, parts.widths, parts.xs[0]
    dys = [token_rows(dy) for dy in d_outputs]
    (batch, tokens), width = x.shape[:2], sum(widths)
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    config = config or config_of("short_conv_backward", x, shape_class(x, taps))
    tiles, blocks = _grid(batch, tokens, sequences, widths, cu_seqlens is not None, config)
    dxs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs]
    dstate = x.new_empty(0) if state is None else torch.empty_like(state, memory_format=torch.contiguous_format)
    dweight = weights[0].new_empty(width, taps)
    dbias = x.new_empty(0) if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format)
    partial = torch.empty(tiles, taps + (bias is not None), width, dtype=torch.float32, device=x.device)
    if tiles * blocks:
        backward_kernel[(tiles * blocks,)](
            *_three(xs), *_three(parts.weights), _dense(bias), _dense(state), _dense(cu_seqlens), *_three(dys),
            _dense(d_final), *_three(dxs), dstate, partial, tokens, sequences, blocks,
            *_three([x.stride(1) for x in xs]), *_three([dy.stride(1) for dy in dys]), width, widths[0],
            widths[1 % len(widths)], W=taps, SILU=silu, HAS_BIAS=bias is not None,
            HAS_STATE=state is not None and taps > 1, HAS_DFINAL=d_final is not None and taps > 1,
            PACKED=cu_seqlens is not None, PARTS=len(xs), **config.launch,
        )  # fmt: skip
    column_sum(partial, dweight, dbias if bias is not None else None)
    return dxs, dweight, dbias, dstate


class _Parts(NamedTuple):
    """One or three inputs as the kernels read them, their weights, and their channels."""

    xs: list[Tensor]
    weights: list[Tensor]
    widths: list[int]


def _parts(xs: Sequence[Tensor], weights: Sequence[Tensor]) -> _Parts:
    return _Parts([token_rows(x) for x in xs], [w.contiguous() for w in weights], [x.shape[2] for x in xs])


def _three(of_parts: Sequence[Any]) -> tuple[Any, Any, Any]:
    """One for each part; a single part stands for all three, and the kernel reads the first."""
    return of_parts[0], of_parts[-2 % len(of_parts)], of_parts[-1]


def token_rows(x: Tensor) -> Tensor:
    """``x`` [B, T, D] with dense channels and all B*T tokens at one stride, as a slice of a fused projection is; copied
    only where it is not so."""
    batch, tokens, width = x.shape
    dense = width <= 1 or x.stride(2) == 1
    one_stride = batch <= 1 or tokens <= 1 or x.stride(0) == tokens * x.stride(1)
    if tokens <= 1 and batch > 1:  # one token of each sequence: its stride says nothing
        x = x.as_strided(x.shape, (x.stride(0), x.stride(0), x.stride(2)))
    return x if dense and one_stride else x.contiguous()


def _grid(
    batch: int, tokens: int, sequences: int, widths: Sequence[int], packed: bool, config: Config
) -> tuple[int, int]:
    """Tiles of tokens and blocks of channels."""
    tiles = tokens // config["BT"] + sequences if packed else batch * max(1, triton.cdiv(tokens, config["BT"]))
    return tiles, sum(triton.cdiv(width, config["BD"]) for width in widths)


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
