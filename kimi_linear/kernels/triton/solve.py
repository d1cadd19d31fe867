"""The triangular inverse of a chunk, and what it is applied to: one program per chunk and value head.

    A = (I + strict lower Diag(beta) pairs_k)^-1    erase = A Diag(beta) k 2^P    u = A Diag(beta) v

A level by level: X holds the inverses of the diagonal blocks of 1, 2, ... 32 tokens, L the cells of pairs_k that join two of
them; X <- X - X L X. Repeated squaring of pairs_k would lose its precision at real gates.

Slices are 64 wide even where K or V is 32: with 32 columns the products came out wrong on an H200 (Triton 3.6.0).
Grid (chunks, HV). ``erase`` [chunks, HV, C, K] holds k 2^P and is overwritten; u [chunks, HV, C, V]; with SAVE also inverse (A)
[chunks, HV, C, C]. With FORGETS prepare.py's ``forgets`` becomes 1e30 where it is no bound: where keys are not normalized or a beta
lies outside 0 to 2, I - beta k k^T may lengthen a state.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_linear.kernels.triton.common import chunk_of


@triton.jit(do_not_specialize=["num_sequences", "tokens"])
def solve_kernel(
    v, beta, cu_seqlens, cu_chunks, pairs_k, erase, u, forgets, inverse,
    num_sequences, tokens, stride_v, stride_beta, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, NORMALIZE: tl.constexpr, PACKED: tl.constexpr, SAVE: tl.constexpr, FORGETS: tl.constexpr,
    CELLS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = 64
    chunk, hv = tl.program_id(0), tl.program_id(1)
    start, stop = chunk_of(chunk, cu_chunks, cu_seqlens, num_sequences, tokens, C, PACKED)
    if start >= stop:
        return
    at = chunk.to(tl.int64) * HV + hv
    v, beta = v + start * stride_v + hv * V, beta + start * stride_beta + hv
    erase, u = erase + at * C * K, u + at * C * V
    row = tl.arange(0, C)
    r, c = row[:, None], row[None, :]
    cell = r * C + c
    valid = row < (stop - start).to(tl.int32)
    keys = tl.load(pairs_k + at * C * C + cell, r > c, 0.0).to(tl.float32)
    b_beta = tl.load(beta + row * stride_beta, valid, 0.0).to(tl.float32)
    dim_v, dim_k = tl.arange(0, BV)[None, :], tl.arange(0, BK)[None, :]
    # Asked for before the inverse, whose products wait for each other: it arrives meanwhile.
    if BV >= V:
        b_v = tl.load(v + r * stride_v + dim_v, valid[:, None] & (dim_v < V), 0.0).to(DOT)
    if BK >= K:
        b_k = tl.load(erase + r * K + dim_k, dim_k < K, 0.0)
    if FORGETS:
        if (tl.min(b_beta, 0) < 0.0) | (tl.max(b_beta, 0) > 2.0) | (not NORMALIZE):
            tl.store(forgets + at, 1e30)
    cells = (keys * b_beta[:, None]).to(CELLS)
    solve = tl.where(r == c, 1.0, 0.0) - tl.where((r == c + 1) & (r % 2 == 1), cells.to(tl.float32), 0.0)
    for level in range(1, 6):
        beside = tl.where(((r >> level) == (c >> level) + 1) & (((r >> level) & 1) == 1), cells, 0.0).to(CELLS)
        blocks = solve.to(CELLS)
        step = tl.dot(blocks, beside, input_precision=PRECISION)
        solve -= tl.dot(step.to(CELLS), blocks, input_precision=PRECISION)
    if SAVE:
        tl.store(inverse + at * C * C + cell, solve.to(DOT))
    right = (solve * b_beta[None, :]).to(DOT)
    if BV >= V:
        tl.store(u + r * V + dim_v, tl.dot(right, b_v, input_precision=PRECISION).to(DOT), dim_v < V)
    else:
        for part in range(V // BV):
            dim = part * BV + dim_v
            b_v = tl.load(v + r * stride_v + dim, valid[:, None], 0.0).to(DOT)
            tl.store(u + r * V + dim, tl.dot(right, b_v, input_precision=PRECISION).to(DOT))
    # Every thread has read its part of the slice before the product begins, so that it may be overwritten after.
    if BK >= K:
        tl.store(erase + r * K + dim_k, tl.dot(right, b_k, input_precision=PRECISION).to(DOT), dim_k < K)
    else:
        for part in range(K // BK):
            dim = part * BK + dim_k
            b_k = tl.load(erase + r * K + dim)
            tl.store(erase + r * K + dim, tl.dot(right, b_k, input_precision=PRECISION).to(DOT))
