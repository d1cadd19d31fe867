"""Linear attention with one scalar decay per head, in plain torch: parallel chunks, or token by token.

Inside a chunk with running log-decay G, token r reads what token i <= r wrote times D[r, i] = exp(G_r - G_i), masked
before exp so that every exponent is <= 0. With the delta rule the values written solve a unit triangular system,
without it they are v. Then, as for KDA, only the small state walks from chunk to chunk:

    u = T Diag(beta) (v - exp(G) k S^T)     T = (I + Diag(beta) StrictTril(k k^T * D))^-1     (without delta rule u = v)
    o = exp(G) q S^T + (q k^T * D) u        S <- exp(G_C) S + u^T (exp(G_C - G) k)

Rows are chunks of one head in scan order (layout.py). The backward is autograd's, but for T.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kimi_linear.kernels.torch.layout import ChunkLayout

AT_ONCE = 64
"""Chunks up to which states without delta rule are one product: beyond, its square grows past the walk's cost."""

CHUNK = 32  # forward and backward on one core at B=16, T=256, H=2, K=V=64: 43 ms, and 59 with chunks of 64


def chunk_gdn(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gated DeltaNet. Shapes as ``kimi_linear.ops.chunk_gdn``; (output, final_state)."""
    return _chunked(q, k, v, g, beta, scale, initial_state, cu_seqlens)


def chunk_mamba2(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float,
    initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Decayed linear attention. Shapes as ``kimi_linear.ops.chunk_mamba2``; (output, final_state)."""
    return _chunked(q, k, v, g, None, scale, initial_state, cu_seqlens)


def recurrent_gdn(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gated DeltaNet token by token. Shapes as ``kimi_linear.ops.recurrent_gdn``; (output, final_state)."""
    return _recurrent(q, k, v, g, beta, scale, initial_state, cu_seqlens)


def recurrent_mamba2(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float,
    initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Decayed linear attention token by token. Shapes as ``kimi_linear.ops.recurrent_mamba2``."""
    return _recurrent(q, k, v, g, None, scale, initial_state, cu_seqlens)


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out_dtype, heads = v.dtype, v.shape[2]
    layout = ChunkLayout.of(q, CHUNK, cu_seqlens)
    state = _first_state(layout, initial_state, q, v)
    if not layout.active:
        return torch.zeros_like(v), layout.unsort(state, heads)
    q, k, v, g, beta = _split(layout, q * scale, k, v, g, beta)
    decay, since, until = _decays(g)
    reads, writes, pairs = q * since, k * until, (q @ k.mT) * decay
    erase = None
    if beta is not None:
        strength = beta[..., None]
        inverse = _UnitInverse.apply((strength * (k @ k.mT) * decay).tril(-1))
        v, erase = inverse @ (strength * v), inverse @ (strength * since * k)
    if erase is None and _walks_at_once(layout):
        states, state = _states_at_once(state, v.mT @ writes, g)
        output = torch.baddbmm(pairs @ v, reads, states.mT)
        return layout.join(output, heads).to(out_dtype), layout.unsort(state, heads)
    # split, not slices: the gradient of each slice would be a tensor of the whole size.
    steps = [count * heads for count in layout.active]
    walk = [x.split(steps) for x in (v, writes, since[:, -1:], *([] if erase is None else [erase]))]
    states, written, ended = [], [], []
    for u, write, kept, *erased in zip(*walk, strict=True):
        ended.append(state[len(u) :])
        state = state[: len(u)]
        if erased:
            u = torch.baddbmm(u, erased[0], state.mT, alpha=-1)
        states.append(state)
        written.append(u)
        state = torch.baddbmm(state * kept, u.mT, write)
    output = torch.baddbmm(pairs @ torch.cat(written), reads, torch.cat(states).mT)
    state = torch.cat([state, *reversed(ended)])
    return layout.join(output, heads).to(out_dtype), layout.unsort(state, heads)


def _walks_at_once(layout: ChunkLayout) -> bool:
    """Whether few chunks, as many in each sequence, let ``_states_at_once`` replace the walk over them."""
    return len(layout.active) <= AT_ONCE and layout.active[-1] == len(layout.lengths)


def _states_at_once(state: Tensor, added: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The state at each chunk's start, and the last, of what chunks add: no delta rule, so one product over chunks.

    state [R/N, V, K], added [R, V, K], g [R, C] of N chunks in scan order -> [R, V, K], [R/N, V, K].
    """
    rows = state.shape[0]
    parts = torch.cat([state, added]).unflatten(0, (-1, rows)).transpose(0, 1)
    # The first state does not decay before it is there; each chunk's part decays through the chunks after its own.
    totals = g.double().sum(-1).unflatten(0, (-1, rows)).T
    decay = _between(torch.cat([torch.zeros_like(totals[:, :1]), totals], dim=1).cumsum(-1), g.dtype)
    states = (decay @ parts.flatten(2)).view_as(parts).transpose(0, 1)
    return states[:-1].flatten(0, 1), states[-1]


def _decays(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """g [R, C] -> D [R, C, C]; the decay from the chunk's start to each token, and from it to the end, [R, C, 1].

    Sums are taken in fp64: at strong gates G reaches thousands, and a difference of such sums in fp32 keeps no digit of
    a weak decay between them. They are one number per token, so this costs nothing.
    """
    total = g.double().cumsum(-1)
    since, until = total.to(g.dtype).exp(), (total[:, -1:] - total).to(g.dtype).exp()
    return _between(total, g.dtype), since[..., None], until[..., None]


def _between(total: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(total_r - total_i) for i <= r and else 0, [R, C, C] of running log-decays [R, C] fp64."""
    lower = torch.ones(total.shape[1], total.shape[1], dtype=torch.bool, device=total.device).tril()
    between = (total[:, :, None] - total[:, None, :]).to(dtype)
    return between.masked_fill(~lower, -torch.inf).exp()


class _UnitInverse(torch.autograd.Function):
    """(I + A)^-1 of strictly lower triangular A [R, C, C]; the backward is two products instead of another solve."""

    @staticmethod
    def forward(ctx: FunctionCtx, system):  # type: ignore[override]
        identity = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
        inverse = torch.linalg.solve_triangular(system, identity, upper=False, unitriangular=True)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx, d_inverse):  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return torch.bmm(torch.bmm(inverse.mT, d_inverse), inverse.mT).neg_().tril_(-1)


def _recurrent(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out_dtype, heads = v.dtype, v.shape[2]
    layout = ChunkLayout.of(q, 1, cu_seqlens)
    state = _first_state(layout, initial_state, q, v)
    if not layout.active:
        return torch.zeros_like(v), layout.unsort(state, heads)
    q, k, v, g, beta = _split(layout, q * scale, k, v, g, beta)
    steps = [count * heads for count in layout.active]
    walk = [x.split(steps) for x in (q, k, v, g.exp()[..., None], *([] if beta is None else [beta[..., None]]))]
    outputs, ended = [], []
    for query, key, u, kept, *strength in zip(*walk, strict=True):
        ended.append(state[len(u) :])
        state = state[: len(u)] * kept
        if strength:
            u = strength[0] * (u - key @ state.mT)
        state = torch.baddbmm(state, u.mT, key)
        outputs.append(query @ state.mT)
    state = torch.cat([state, *reversed(ended)])
    return layout.join(torch.cat(outputs), heads).to(out_dtype), layout.unsort(state, heads)


def _split(
    layout: ChunkLayout, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Every input as chunks [R, C, ...] in fp32 or fp64, with q and k repeated for the value heads that share them."""
    repeat = v.shape[2] // q.shape[2]
    if repeat > 1:
        q, k = q.repeat_interleave(repeat, dim=2), k.repeat_interleave(repeat, dim=2)
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v, g = (layout.split(x.to(wide)) for x in (q, k, v, g))
    return q, k, v, g, None if beta is None else layout.split(beta.to(wide))


def _first_state(layout: ChunkLayout, initial_state: Tensor | None, q: Tensor, v: Tensor) -> Tensor:
    """[N * HV, V, K] in fp32 or fp64, longest sequence first."""
    wide = torch.promote_types(q.dtype, torch.float32)
    if initial_state is None:
        return q.new_zeros(len(layout.lengths) * v.shape[2], v.shape[3], q.shape[3], dtype=wide)
    return layout.sort(initial_state.to(wide))
