"""Pairs inside the tiles and channels that prepare.py calls steep, and their backward, without products.

    pairs_k[r, i] += sum_k k_r k_i 2^(p_r - p_i), i < r    pairs_q the same with scale q_r, and i <= r

p as in prepare.py, in fp32: the exponent is known to 2^-12 even where a step forgets 2^-140. Few tiles come here, for a steep
channel forgets more than 2^-MAX_RANGE in a tile twice over; groups of G channels that have one are computed whole. Forward, prepare.py
does it at the end of a chunk; the backward's kernel finds nothing to do in nearly all programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_linear.kernels.triton.common import STEEP, G, chunk_log2_decay, chunk_of, gate_gradient, power2


@triton.jit
def one_serves(totals, K: tl.constexpr, DOT: tl.constexpr):
    """Whether an anchor in the middle of a chunk serves every channel of it, if none is steep."""
    WIDEST: tl.constexpr = 60.0 if DOT == tl.float32 else 220.0
    dim = tl.arange(0, K)
    whole = tl.zeros([K], tl.float32)
    for tile in tl.static_range(4):
        whole += tl.load(totals + tile * K + dim)
    return tl.min(whole, 0) >= -WIDEST


@triton.jit
def _rows(x, row, inside, stride, K: tl.constexpr, NORMALIZE: tl.constexpr):
    """What the rows [16] of q or k are scaled by."""
    if NORMALIZE:
        dim = tl.arange(0, K)
        whole = tl.load(x + row[:, None] * stride + dim[None, :], inside, 0.0).to(tl.float32)
        return tl.rsqrt(tl.sum(whole * whole, 1) + 1e-6)
    return tl.full([16], 1.0, tl.float32)


@triton.jit
def _add(to, value, mask):
    tl.store(to, (tl.load(to, mask, 0.0).to(tl.float32) + value).to(to.dtype.element_ty), mask)


@triton.jit
def add_steep_pairs(
    q, k, gate, dt_bias, anchors, pairs_q, pairs_k, tile, groups, left, amount, lower_bound, scale, stride_q, stride_k, stride_g,
    K: tl.constexpr, GATE: tl.constexpr, NORMALIZE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Of one tile, whose ``groups`` have a steep channel; all pointers at its chunk. Key by key, as ``steep_backward_kernel``."""
    C: tl.constexpr = 64
    row = tl.arange(0, 16)
    r, c, token = row[:, None], row[None, :], tile * 16 + row
    inside, key_of = (token < left)[:, None], token[:, None]
    norm_k = _rows(k, token, inside, stride_k, K, NORMALIZE)
    norm_q = _rows(q, token, inside, stride_q, K, NORMALIZE) * scale
    of_q, of_k = tl.zeros([16, 16], tl.float32), tl.zeros([16, 16], tl.float32)
    for group in range(K // G):
        if (groups >> group) & 1:
            dim = group * G + tl.arange(0, G)
            d = dim[None, :]
            here = inside & (tl.load(anchors + tile * K + dim) == STEEP)[None, :]
            b_k = tl.load(k + key_of * stride_k + d, here, 0.0).to(tl.float32) * norm_k[:, None]
            b_q = tl.load(q + key_of * stride_q + d, here, 0.0).to(tl.float32) * norm_q[:, None]
            x = tl.load(gate + key_of * stride_g + d, inside, 0.0).to(tl.float32)
            if GATE != 0:
                x += tl.load(dt_bias + dim).to(tl.float32)[None, :]
            p = tl.cumsum(tl.where(here, chunk_log2_decay(x, amount, lower_bound, GATE, DOT), 0.0), 0)
            for i in range(16):
                k_i, p_i = tl.sum(tl.where(r == i, b_k, 0.0), 0), tl.sum(tl.where(r == i, p, 0.0), 0)
                faded = k_i[None, :] * power2(tl.minimum(p - p_i[None, :], 0.0), DOT)
                of_q += tl.where(c == i, tl.sum(b_q * faded, 1)[:, None], 0.0)
                of_k += tl.where(c == i, tl.sum(b_k * faded, 1)[:, None], 0.0)
    cell = token[:, None] * C + tile * 16 + c
    _add(pairs_q + cell, of_q, r >= c)
    _add(pairs_k + cell, of_k, r > c)


@triton.jit(do_not_specialize=["num_sequences", "tokens"])
def steep_backward_kernel(
    q, k, gate, beta, A_log, dt_bias, cu_seqlens, cu_chunks, anchors, flags, norms, d_keys, d_pairs, scales,
    dq, dk, d_gate, d_beta, partial, lower_bound, num_sequences, tokens, stride_q, stride_k, stride_g, stride_beta,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Added to what token_backward.py has left, in its dtype, its partial sums too; its grid. Key by key: half the time of
    all pairs at once, which eight warps hand to each other through shared memory."""
    C: tl.constexpr = 64
    chunk, tile, hv = tl.program_id(0) // 4, tl.program_id(0) % 4, tl.program_id(1)
    at = chunk.to(tl.int64) * HV + hv
    start, stop = chunk_of(chunk, cu_chunks, cu_seqlens, num_sequences, tokens, C, PACKED)
    start += tile * 16
    if start >= stop:
        return
    groups = tl.load(flags + at * 4 + tile)
    if groups == 0:
        return
    h = hv // (HV // H)
    row = tl.arange(0, 16)
    r, valid = row[:, None], row < (stop - start).to(tl.int32)
    inside = valid[:, None]
    unscale = 1.0 / tl.load(scales + at)
    norm = norms + at * 2 * C + tile * 16 + row
    norm_k, norm_q = tl.load(norm)[:, None], tl.load(norm + C)[:, None]
    b_beta = tl.load(beta + (start + row) * stride_beta + hv, valid, 0.0).to(tl.float32)[:, None]
    corner = at * C * C + (tile * 16 + row) * C + tile * 16
    d_keys, d_pairs = d_keys + corner, d_pairs + corner  # zero on and above the diagonal
    q, k, gate = q + start * stride_q + h * K, k + start * stride_k + h * K, gate + start * stride_g + hv * K
    tile_sums = (chunk.to(tl.int64) * 4 + tile) * HV * (K + 1)
    amount, sum_A, to_beta = 0.0, 0.0, tl.zeros([16], tl.float32)
    if GATE != 0:
        amount = tl.exp2(tl.load(A_log + hv).to(tl.float32) * 1.4426950408889634)
        dt_bias += hv * K
    for group in range(K // G):
        if (groups >> group) & 1:
            dim = group * G + tl.arange(0, G)
            d = dim[None, :]
            steep = tl.load(anchors + (at * 4 + tile) * K + dim) == STEEP
            here = inside & steep[None, :]
            b_k = tl.load(k + r * stride_k + d, here, 0.0).to(tl.float32) * norm_k
            b_q = tl.load(q + r * stride_q + d, here, 0.0).to(tl.float32) * norm_q
            x = tl.load(gate + r * stride_g + d, inside, 0.0).to(tl.float32)
            if GATE != 0:
                x += tl.load(dt_bias + dim).to(tl.float32)[None, :]
            g = tl.where(here, chunk_log2_decay(x, amount, lower_bound, GATE, DOT), 0.0)
            p = tl.cumsum(g, 0)
            to_q, to_p = tl.zeros([16, G], tl.float32), tl.zeros([16, G], tl.float32)
            to_k, z = tl.zeros([16, G], tl.float32), tl.zeros([16, G], tl.float32)
            for i in range(16):
                k_i, p_i = tl.sum(tl.where(r == i, b_k, 0.0), 0), tl.sum(tl.where(r == i, p, 0.0), 0)
                of_keys = (tl.load(d_keys + i).to(tl.float32) * unscale)[:, None]
                of_pairs = (tl.load(d_pairs + i).to(tl.float32) * unscale)[:, None]
                factor = power2(tl.minimum(p - p_i[None, :], 0.0), DOT)
                faded = k_i[None, :] * factor
                to_q += of_pairs * faded
                to_p += of_keys * faded
                onto = (of_pairs * b_q + of_keys * b_beta * b_k) * factor
                z += onto * k_i[None, :]
                onto = tl.sum(onto, 0)
                to_k += tl.where(r == i, onto[None, :], 0.0)
                z -= tl.where(r == i, (onto * k_i)[None, :], 0.0)
            to_beta += tl.sum(b_k * to_p, 1)
            token = (start * HV + hv) * K + r * (HV * K) + d
            _add(dq + token, to_q * norm_q, here)
            _add(dk + token, (to_k + b_beta * to_p) * norm_k, here)
            # Of all later tokens in the tile: all of them less those up to the one before.
            dg = tl.sum(z, 0)[None, :] - tl.cumsum(z, 0) + z
            dx, of_A = gate_gradient(x, g, dg, amount, lower_bound, GATE, DOT)
            _add(d_gate + token, dx, here)
            if GATE != 0:
                _add(partial + tile_sums + hv * K + dim, tl.sum(tl.where(here, dx, 0.0), 0), steep)
                sum_A += tl.sum(tl.sum(tl.where(here, of_A, 0.0), 1), 0)
    _add(d_beta + (start + row) * HV + hv, to_beta, valid)
    if GATE != 0:
        place = partial + tile_sums + HV * K + hv
        tl.store(place, tl.load(place) + sum_A)
