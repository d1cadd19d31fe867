"""Kimi Delta Attention in parallel chunks: plain torch, own backward, exact at every gate.

With P_r the decay (a sum of g) from the chunk's start to token r and S_r from token r to its end, one chunk computes

    M[r, i] = sum_k k_r k_i exp(decay after i, up to r)   (i < r)      T = (I + Diag(beta) M)^-1
    u = T Diag(beta) (v - (k exp P) S^T)                               corrected values [C, V]
    o = (q exp P) S^T + N u,   N as M with q_r and i <= r              S <- S exp(P_C) + u^T (k exp S)

M and N are the hard part: exp(P_r) exp(-P_i) overflows once a chunk forgets more than e^88. Here they are made by a
binary hierarchy (see ``_pairs``) in which every factor is a plain product of decays, so <= 1: nothing overflows, nothing
cancels, and no [C, C, K] tensor exists. Rows are chunks of one head in scan order (layout.py); the parts that are
parallel over chunks run over blocks of rows that fit a core's cache.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kimi_linear.kernels.torch.layout import ChunkLayout

CHUNK = 32
BLOCK_ELEMENTS = 1 << 18
"""Of one [rows, C, K] tensor of a block: 1 MiB in fp32, so that the few tensors of a block stay in cache."""


def chunk_kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output [B, T, HV, V] in v's dtype, final_state [N, HV, V, K]). g [B, T, HV, K] is a log-decay <= 0."""
    dtype, out_dtype, heads = torch.float64 if q.dtype == torch.float64 else torch.float32, v.dtype, v.shape[2]
    repeat = heads // q.shape[2]
    if repeat > 1:
        q, k = q.repeat_interleave(repeat, dim=2), k.repeat_interleave(repeat, dim=2)
    layout = ChunkLayout.of(q, CHUNK, cu_seqlens)
    q, k, v, g, beta = (layout.split(x.to(dtype)) for x in (q * scale, k, v, g, beta))
    if initial_state is None:
        state = q.new_zeros(len(layout.lengths) * heads, v.shape[-1], q.shape[-1])
    else:
        state = layout.sort(initial_state.to(dtype))
    active = tuple(count * heads for count in layout.active)
    output, state = _ChunkKDA.apply(q, k, v, g, beta, state, active)
    return layout.join(output, heads).to(out_dtype), layout.unsort(state, heads)


class _ChunkKDA(torch.autograd.Function):
    """q, k, g [R, C, K]; v [R, C, V]; beta [R, C]; state [N*HV, V, K]; R = sum(active) rows in scan order."""

    @staticmethod
    def forward(ctx: FunctionCtx, q, k, v, g, beta, state, active):  # type: ignore[override]
        rows, size, key_dim = q.shape
        pairs_k, pairs_q, inverse = (q.new_empty(rows, size, size) for _ in range(3))
        read, write, erase = (torch.empty_like(q) for _ in range(3))  # q exp P, k exp S, T Diag(beta) k exp P
        decay = q.new_empty(rows, 1, key_dim)  # exp P_C
        u = torch.empty_like(v)
        identity = torch.eye(size, dtype=q.dtype, device=q.device)
        for block in _blocks(rows, size * key_dim):
            prefix, suffix = _pairs(k[block], q[block], g[block], pairs_k[block], pairs_q[block])
            strength = beta[block, :, None]
            torch.mul(q[block], prefix, out=read[block])
            torch.mul(k[block], suffix, out=write[block])
            decay[block] = prefix[:, -1:]
            inverse[block] = torch.linalg.solve_triangular(
                identity + strength * pairs_k[block], identity, upper=False, unitriangular=True
            )
            torch.bmm(inverse[block], strength * k[block] * prefix, out=erase[block])
            torch.bmm(inverse[block], strength * v[block], out=u[block])
        states = q.new_empty(rows, v.shape[-1], key_dim)  # before each chunk
        state, row = state.clone(), 0
        for count in active:
            part, live = slice(row, row + count), state[:count]
            states[part] = live
            u[part].baddbmm_(erase[part], live.mT, alpha=-1)
            live.mul_(decay[part]).baddbmm_(u[part].mT, write[part])
            row += count
        output = torch.bmm(read, states.mT).baddbmm_(pairs_q, u)
        ctx.active = active  # type: ignore[attr-defined]
        ctx.save_for_backward(q, k, v, g, beta, pairs_k, pairs_q, inverse, read, write, erase, decay, u, states)
        return output, state

    @staticmethod
    @once_differentiable
    def backward(ctx, d_output, d_state):  # type: ignore[override]
        q, k, v, g, beta, pairs_k, pairs_q, inverse, read, write, erase, decay, u, states = ctx.saved_tensors
        rows, size, key_dim = q.shape
        d_u = torch.bmm(pairs_q.mT, d_output)
        d_states = torch.bmm(d_output.mT, read)  # with respect to the state before each chunk, then after it
        d_state, row = d_state.clone(), rows
        for count in reversed(ctx.active):
            part, live = slice(row - count, row), d_state[:count]
            d_u[part].baddbmm_(write[part], live.mT)
            after = live.clone()
            live.mul_(decay[part]).add_(d_states[part]).baddbmm_(d_u[part].mT, erase[part], alpha=-1)
            d_states[part] = after
            row -= count
        dq, dk, dv, dg, d_beta = (torch.empty_like(x) for x in (q, k, v, g, beta))
        for block in _blocks(rows, size * key_dim):
            levels, prefix, suffix = _levels(g[block])
            strength, before, after = beta[block, :, None], states[block], d_states[block]
            # Through u = T Diag(beta) (v - k exp(P) S^T).
            d_right = torch.bmm(inverse[block].mT, d_u[block])
            d_matrix = torch.bmm(d_right, u[block].mT).neg_().tril_(-1)
            faded = k[block] * prefix
            error = torch.baddbmm(v[block], faded, before.mT, alpha=-1)
            d_beta[block] = (d_right * error).sum(-1) + (d_matrix * pairs_k[block]).sum(-1)
            d_right *= strength
            dv[block] = d_right
            d_faded = torch.bmm(d_right, before).neg_()
            # Through the reads, the writes and the decay of the state.
            d_read, d_write = torch.bmm(d_output[block], before), torch.bmm(u[block], after)
            d_prefix = (d_faded * faded).addcmul_(d_read, read[block])
            d_prefix[:, -1] += (before * after).sum(1) * decay[block, 0]
            d_suffix = d_write * write[block]
            torch.mul(d_faded, prefix, out=dk[block]).addcmul_(d_write, suffix)
            torch.mul(d_read, prefix, out=dq[block])
            # Through the pairs.
            d_pairs_q = torch.bmm(d_output[block], u[block].mT)
            d_matrix *= strength
            _pairs_backward(
                k[block], q[block], levels, d_matrix, d_pairs_q, dk[block], dq[block], d_prefix, d_suffix
            )  # fmt: skip
            dg[block] = d_prefix
        return dq, dk, dv, dg, d_beta, d_state, None


def _blocks(rows: int, elements: int) -> list[slice]:
    step = max(1, BLOCK_ELEMENTS // elements)
    return [slice(row, min(row + step, rows)) for row in range(0, rows, step)]


def _sizes(x: Tensor) -> list[int]:
    """Half-blocks of every level for x [rows, C, ...]: 1, 2, 4, ... C / 2."""
    return [1 << level for level in range(x.shape[1].bit_length() - 1)]


def _halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The earlier and the later halves [rows, C / (2 size), size, ...] of all blocks of 2 * size tokens, as views."""
    halves = x.unflatten(1, (-1, 2, size))
    return halves.select(2, 0), halves.select(2, 1)


def _climb(prefix: Tensor, suffix: Tensor, size: int) -> None:
    """From the decays within blocks of ``size`` tokens to those within blocks of 2 * size; [rows, C, K] in place.

    ``prefix`` is what is left at token r of what was there when its block began, ``suffix`` what is left at the block's
    end of what was there after token i. Products of factors <= 1: none overflows, none divides, and only g's own exp is
    ever taken.
    """
    (prefix_0, prefix_1), (suffix_0, _) = _halves(prefix, size), _halves(suffix, size)
    suffix_0 *= prefix_1[:, :, -1:]
    prefix_1 *= prefix_0[:, :, -1:]


def _cells(pairs: Tensor, size: int) -> Tensor:
    """The cells [rows, blocks, size, size] of the [rows, C, C] matrix that pair later with earlier halves, as a view."""
    blocks = pairs.unflatten(1, (-1, 2 * size)).unflatten(3, (-1, 2 * size)).diagonal(0, 1, 3)
    return blocks[:, size:, :size].permute(0, 3, 1, 2)


def _faded(k: Tensor, q: Tensor, early: Tensor, late: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Faded keys of the earlier halves, faded keys and faded queries of the later halves, each [rows * blocks, size, K].

    ``early`` and ``late`` [rows, blocks, size, K] are the suffixes of the earlier and the prefixes of the later halves.
    """
    (early_k, late_k), late_q = _halves(k, size), _halves(q, size)[1]
    return (early_k * early).flatten(0, 1), (late_k * late).flatten(0, 1), (late_q * late).flatten(0, 1)


def _pairs(k: Tensor, q: Tensor, g: Tensor, pairs_k: Tensor, pairs_q: Tensor) -> tuple[Tensor, Tensor]:
    """Fill ``pairs_k`` and ``pairs_q`` [rows, C, C]; returns exp P and exp S [rows, C, K] of the whole chunk.

    At the level of half-blocks of ``size`` tokens, a token i of an earlier half and a token r of the later half beside it
    meet at the boundary: the key fades by i's suffix, then by r's prefix.
    """
    pairs_k.zero_()
    pairs_q.zero_()
    pairs_q.diagonal(dim1=1, dim2=2).copy_((k * q).sum(-1))
    prefix, suffix = g.exp(), torch.ones_like(g)
    for size in _sizes(g):
        early_k, late_k, late_q = _faded(k, q, _halves(suffix, size)[0], _halves(prefix, size)[1], size)
        for pairs, late in ((pairs_k, late_k), (pairs_q, late_q)):
            cells = _cells(pairs, size)
            cells.copy_(torch.bmm(late, early_k.mT).view(cells.shape))
        _climb(prefix, suffix, size)
    return prefix, suffix


def _levels(g: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """The suffixes of the earlier and prefixes of the later halves of every level, and exp P and exp S at the top."""
    prefix, suffix, levels = g.exp(), torch.ones_like(g), []
    for size in _sizes(g):
        levels.append((_halves(suffix, size)[0].clone(), _halves(prefix, size)[1].clone()))
        _climb(prefix, suffix, size)
    return levels, prefix, suffix


def _pairs_backward(
    k: Tensor, q: Tensor, levels: list[tuple[Tensor, Tensor]], d_pairs_k: Tensor, d_pairs_q: Tensor,
    dk: Tensor, dq: Tensor, d_prefix: Tensor, d_suffix: Tensor,
) -> None:  # fmt: skip
    """Add to ``dk`` and ``dq``, and turn ``d_prefix`` into the gradient of g, down the levels that ``_pairs`` climbed.

    ``d_prefix`` and ``d_suffix`` are with respect to the logarithms P and S, which are plain sums of g.
    """
    diagonal = d_pairs_q.diagonal(dim1=1, dim2=2)[..., None]
    dk.addcmul_(diagonal, q)
    dq.addcmul_(diagonal, k)
    for size, (early, late) in reversed(list(zip(_sizes(k), levels, strict=True))):
        (d_prefix_0, d_prefix_1), (d_suffix_0, _) = _halves(d_prefix, size), _halves(d_suffix, size)
        d_prefix_0[:, :, -1] += d_prefix_1.sum(2)
        d_prefix_1[:, :, -1] += d_suffix_0.sum(2)
        early_k, late_k, late_q = _faded(k, q, early, late, size)
        d_cells_k, d_cells_q = (_cells(d_pairs, size).flatten(0, 1) for d_pairs in (d_pairs_k, d_pairs_q))
        d_early_k = torch.bmm(d_cells_k.mT, late_k).baddbmm_(d_cells_q.mT, late_q)
        d_late_k, d_late_q = torch.bmm(d_cells_k, early_k), torch.bmm(d_cells_q, early_k)
        dk_0, dk_1 = _halves(dk, size)
        for d_input, d_log, factor, faded, d_faded in (
            (dk_0, d_suffix_0, early, early_k, d_early_k),
            (dk_1, d_prefix_1, late, late_k, d_late_k),
            (_halves(dq, size)[1], d_prefix_1, late, late_q, d_late_q),
        ):
            d_input.addcmul_(d_faded.view(factor.shape), factor)
            d_log.addcmul_(d_faded.view(factor.shape), faded.view(factor.shape))
