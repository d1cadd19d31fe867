"""The triangular inverse of each chunk, and what it is applied to: one program per chunk and value head.

    A = (I + pairs_k)^-1    erase = A Diag(beta) faded    u = A Diag(beta) v

Level by level: X holds the inverses of the diagonal blocks of 1, 2, ... 32 tokens, L the cells of pairs_k that join two of
them; X <- X - X L X. Repeated squaring of pairs_k would lose its precision at real gates.

Slices are 64 wide even where K or V is 32: with 32 columns the products came out wrong on an H200 (Triton 3.6.0).
Grid (chunks, HV). ``erase`` [chunks, HV, C, K] holds ``faded`` of prepare.py and is overwritten; u [chunks, HV, C, V]; with SAVE
also inverse (A) [chunks, HV, C, C].
"""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_linear.kernels.triton.common import chunk_of


@triton.jit(do_not_specialize=["num_sequences", "tokens"])
def solve_kernel(
    v, beta, cu_seqlens, cu_chunks, pairs_k, erase, u, inverse, num_sequences, tokens, stride_v, stride_beta,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr,
    SAVE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = 64
    chunk, hv = tl.program_id(0), tl.program_id(1)
    start, stop = chunk_of(chunk, cu_chunks, cu_seqlens, num_sequences, tokens, C, PACKED)
    if start >= stop:
        return
    at = chunk.to(tl.int64) * HV + hv
    v, beta = v + start * stride_v + hv * V, beta + start * stride_beta + hv
    pairs_k, erase, u = pairs_k + at * C * C, erase + at * C * K, u + at * C * V
    row = tl.arange(0, C)
    valid = row < (stop - start).to(tl.int32)
    r, c = row[:, None], row[None, :]
    cell = r * C + c
    b_beta = tl.load(beta + row * stride_beta, valid, 0.0).to(tl.float32)
    cells = tl.load(pairs_k + cell)
    solve = tl.where(r == c, 1.0, 0.0) - tl.where((r == c + 1) & (r % 2 == 1), cells.to(tl.float32), 0.0)
    for level in range(1, 6):
        beside = tl.where(((r >> level) == (c >> level) + 1) & (((r >> level) & 1) == 1), cells, 0.0).to(cells.dtype)
        blocks = solve.to(cells.dtype)
        step = tl.dot(blocks, beside, input_precision=PRECISION)
        solve -= tl.dot(step.to(cells.dtype), blocks, input_precision=PRECISION)
    if SAVE:
        tl.store(inverse + at * C * C + cell, solve.to(DOT))
    right = (solve * b_beta[None, :]).to(DOT)
    for part in range(tl.cdiv(V, BV)):
        dim = (part * BV + tl.arange(0, BV))[None, :]
        b_v = tl.load(v + r * stride_v + dim, valid[:, None] & (dim < V), 0.0).to(DOT)
        tl.store(u + r * V + dim, tl.dot(right, b_v, input_precision=PRECISION).to(DOT), dim < V)
    for part in range(tl.cdiv(K, BK)):
        dim = (part * BK + tl.arange(0, BK))[None, :]
        # Every thread has read its part of the slice before the product begins, so that it may be overwritten after.
        b_erase = tl.dot(right, tl.load(erase + r * K + dim, dim < K, 0.0), input_precision=PRECISION)
        tl.store(erase + r * K + dim, b_erase.to(DOT), dim < K)
