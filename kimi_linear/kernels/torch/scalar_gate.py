"""Linear attention with one scalar decay per head, in plain torch: chunks of 64 in parallel, or token by token.

Inside a chunk with running log-decay G (a cumulative sum that starts at the chunk), a token r reads what token i <= r
wrote times D[r, i] = exp(G_r - G_i), masked before exp so that every exponent is <= 0. The delta rule's corrections
solve a unit triangular system; without it the values are written as they are. Only the small state walks from chunk
to chunk. Sequences of different lengths walk together: they are sorted by length, and the walk narrows as they end.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 64


@dataclass(frozen=True)
class _Walk:
    """How sequences are cut into chunks, and the order in which their states are carried.

    Attributes:
        places: [T] place of each token in the padded buffer of M chunks, or None where it is dense already.
        chunks: M.
        rounds: for each step of the walk, the chunks taken, one of each sequence that still runs, longest first.
        order: [N] sequences from the longest to the shortest; ``inverse`` undoes it.
    """

    places: Tensor
    chunks: int
    rounds: list[Tensor]
    order: Tensor
    inverse: Tensor


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


def _walk(batch: int, tokens: int, cu_seqlens: Tensor | None, chunk: int, device: torch.device) -> _Walk:
    """Cut B rows of T tokens, or the packed sequences, into chunks; tokens are numbered through the whole batch."""
    lengths = [tokens] * batch
    if cu_seqlens is not None:
        lengths = [stop - start for start, stop in itertools.pairwise(cu_seqlens.tolist())]
    counts = [-(-length // chunk) for length in lengths]
    firsts = list(itertools.accumulate(counts, initial=0))
    starts = list(itertools.accumulate(lengths, initial=0))
    shifts = torch.tensor([chunk * c - s for c, s in zip(firsts[:-1], starts[:-1], strict=True)])
    places = torch.arange(starts[-1]) + shifts.repeat_interleave(torch.tensor(lengths))
    order = sorted(range(len(lengths)), key=lambda i: -counts[i])
    rounds = [
        torch.tensor([firsts[i] + step for i in order if counts[i] > step], device=device)
        for step in range(max(counts, default=0))
    ]
    positions = torch.tensor(order, device=device)
    return _Walk(places.to(device), firsts[-1], rounds, positions, positions.argsort())


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, tokens, heads, _ = q.shape
    repeat, out_dtype = v.shape[2] // heads, v.dtype
    dtype = torch.promote_types(q.dtype, torch.float32)
    walk = _walk(batch, tokens, cu_seqlens, CHUNK, q.device)
    state = _start(walk, initial_state, heads, v, q.shape[3])
    if walk.chunks == 0:
        return torch.zeros_like(v), state[walk.inverse].flatten(1, 2)

    def cut(x: Tensor, copies: int) -> Tensor:
        """[B, T, H * copies, ...] -> [M, H, copies, C, ...], zeros where a chunk is not full."""
        flat = x.to(dtype).flatten(0, 1)
        padded = flat.new_zeros(walk.chunks * CHUNK, *flat.shape[1:]).index_copy(0, walk.places, flat)
        padded = padded.unflatten(0, (walk.chunks, CHUNK)).unflatten(2, (heads, copies))
        return padded.movedim(1, 3)

    q, k, v = cut(q, 1), cut(k, 1), cut(v, repeat)
    # fp64: at strong gates G reaches thousands, where a difference of two fp32 sums would keep no digits.
    total = cut(g, repeat).double().cumsum(-1)
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    between = total[..., :, None] - total[..., None, :]
    decay = between.to(dtype).masked_fill(~lower, -torch.inf).exp()
    since, until = total.to(dtype).exp()[..., None], (total[..., -1:] - total).to(dtype).exp()[..., None]
    kept = since[..., -1:, :]
    queries, keys = (q @ k.mT) * decay, k * until

    if beta is not None:
        strength = cut(beta, repeat)[..., None]
        system = (strength * (k @ k.mT) * decay).tril(-1)
        sides = torch.cat([strength * v, strength * since * k], dim=-1)
        solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
        v, answers = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    # The walk: each step needs the state before it, so nothing else is in it.
    before, written, ended = [], [], []
    for chosen in walk.rounds:
        running = len(chosen)
        ended.append(state[running:])
        state = state[:running]
        values = v[chosen]
        if beta is not None:
            values = values - answers[chosen] @ state.mT
        before.append(state)
        written.append(values)
        state = state * kept[chosen] + values.mT @ keys[chosen]
    taken = torch.cat(walk.rounds).argsort()
    states, v = torch.cat(before)[taken], torch.cat(written)[taken]
    output = scale * ((q * since) @ states.mT + queries @ v)
    output = output.movedim(3, 1).flatten(2, 3).flatten(0, 1)[walk.places]
    final = torch.cat([state, *reversed(ended)])[walk.inverse]
    return output.unflatten(0, (batch, tokens)).to(out_dtype), final.flatten(1, 2)


def _recurrent(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, tokens, heads, _ = q.shape
    repeat, out_dtype = v.shape[2] // heads, v.dtype
    dtype = torch.promote_types(q.dtype, torch.float32)
    walk = _walk(batch, tokens, cu_seqlens, 1, q.device)
    state = _start(walk, initial_state, heads, v, q.shape[3])
    if walk.chunks == 0:
        return torch.zeros_like(v), state[walk.inverse].flatten(1, 2)
    q, k = (x.to(dtype).flatten(0, 1)[:, :, None, :, None] for x in (q, k))
    v, g = (x.to(dtype).flatten(0, 1).unflatten(1, (heads, repeat)) for x in (v, g))
    beta = beta if beta is None else beta.to(dtype).flatten(0, 1).unflatten(1, (heads, repeat))
    outputs, ended = [], []
    for chosen in walk.rounds:
        running = len(chosen)
        ended.append(state[running:])
        state = state[:running] * g[chosen].exp()[..., None, None]
        key, values = k[chosen], v[chosen]
        if beta is not None:
            values = beta[chosen][..., None] * (values - (state @ key)[..., 0])
        state = state + values[..., None] * key.mT
        outputs.append(scale * (state @ q[chosen])[..., 0])
    output = torch.cat(outputs)[torch.cat(walk.rounds).argsort()].flatten(1, 2)
    final = torch.cat([state, *reversed(ended)])[walk.inverse]
    return output.unflatten(0, (batch, tokens)).to(out_dtype), final.flatten(1, 2)


def _start(walk: _Walk, initial_state: Tensor | None, heads: int, like: Tensor, key_dim: int) -> Tensor:
    """The first states [N, H, HV/H, V, K], longest sequence first, in the precision of the walk."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    if initial_state is None:
        initial_state = like.new_zeros(len(walk.order), *like.shape[2:], key_dim, dtype=dtype)
    return initial_state.to(dtype)[walk.order].unflatten(1, (heads, -1))
