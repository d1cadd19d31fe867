"""Kimi Delta Attention in parallel chunks, forward and backward: which kernels run, on which buffers, for how long.

    forward     prepare, solve (all chunks at once) -> scan (chunk after chunk)
    backward    scan_backward                                   d_u' and the gradient of every chunk's state
                value_backward                                  all chunks at once, and so on
                anchor                                          q and k with the gate in them
                anchored_backward, tile_backward, steep         products: of chunks that one anchor serves, of the others
                token_backward                                  back through the norm and the gate

Raw gate, l2 norm and beta go in as they are; no fp32 gate tensor is made. Exact at every gate. What is kept between the two
passes: saved.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from kimi_linear.kernels.triton.anchor import anchor_kernel
from kimi_linear.kernels.triton.anchored_backward import anchored_backward_kernel
from kimi_linear.kernels.triton.column_sum import column_sum
from kimi_linear.kernels.triton.common import stretches
from kimi_linear.kernels.triton.configs import config_of
from kimi_linear.kernels.triton.cuts import may_be_cut
from kimi_linear.kernels.triton.prepare import prepare_kernel
from kimi_linear.kernels.triton.saved import CHUNK, Saved, count_chunks
from kimi_linear.kernels.triton.scan import ScanResult, scan
from kimi_linear.kernels.triton.scan_backward import scan_backward
from kimi_linear.kernels.triton.segments import precision_of, shape_class
from kimi_linear.kernels.triton.solve import solve_kernel
from kimi_linear.kernels.triton.steep import steep_backward_kernel
from kimi_linear.kernels.triton.tile_backward import tile_backward_kernel
from kimi_linear.kernels.triton.token_backward import token_backward_kernel
from kimi_linear.kernels.triton.value_backward import value_backward_kernel


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The inputs of one call, checked by the caller.

    ``gate`` [B, T, HV, K] is a plain log-decay where ``A_log`` is None, a raw projection otherwise: of the softplus gate
    where ``lower_bound`` is None, of the bounded gate where it is not. q, k, v are bf16 or fp32.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    beta: Tensor
    A_log: Tensor | None
    dt_bias: Tensor | None
    lower_bound: float | None
    scale: float
    normalize: bool
    initial_state: Tensor | None
    cu_seqlens: Tensor | None


class _Tiles(NamedTuple):
    """What prepare.py finds out about tiles, and ``late``, which it fills; ``norms`` and ``served`` are for the backward."""

    late: Tensor
    anchors: Tensor
    totals: Tensor
    flags: Tensor
    norms: Tensor | None
    served: Tensor


class Prepared(NamedTuple):
    """What prepare.py and solve.py make of all chunks, in the order of ``scan``'s arguments; ``inverse`` is for the backward."""

    erase: Tensor
    u: Tensor
    read: Tensor
    write: Tensor
    pairs_q: Tensor
    decay: Tensor
    forgets: Tensor | None
    inverse: Tensor | None


class Gradients(NamedTuple):
    """With respect to the inputs of the same names; those of A_log and dt_bias are None for a plain gate."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    beta: Tensor
    A_log: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Sizes, the numbering of chunks, and what all the chunk kernels take."""

    sequences: int
    chunks: int
    cu_chunks: Tensor | None
    kind: int
    dot: tl.dtype
    precision: str


def forward(problem: Problem, *, export: Sequence[tuple[int, int]] = ()) -> tuple[Tensor, Tensor, Tensor | None]:
    """(output [B, T, HV, V] in v's dtype, final_state [N, HV, V, K] fp32, exported [E, HV, V, K] fp32 or None).

    ``export``: pairs of a sequence and a number of its tokens, a multiple of C, whose state is wanted.
    """
    problem = _laid_out(problem)
    layout = _layout_of(problem)
    prepared, _ = _prepare(problem, layout, save=False)
    output, result = _scan(problem, layout, prepared, save=False, export=export)
    return output, result.final_state, result.exported


def forward_to_train(problem: Problem) -> tuple[Tensor, Tensor, Saved]:
    """Output and final state as ``forward``, and what ``backward`` needs."""
    problem = _laid_out(problem)
    layout = _layout_of(problem)
    prepared, tiles = _prepare(problem, layout, save=True)
    output, result = _scan(problem, layout, prepared, save=True)
    assert prepared.inverse is not None
    assert tiles.norms is not None
    assert result.states is not None
    assert result.written is not None
    (_, v_heads, key_dim), operators, lost, forgets = (
        prepared.decay.shape,
        result.operators,
        result.lost,
        prepared.forgets,
    )
    if operators is None:
        operators = prepared.decay.new_empty(0, v_heads, key_dim, key_dim)
    if lost is None:
        lost = tiles.flags.new_empty(0, v_heads)
    if forgets is None:
        forgets = prepared.decay.new_empty(0, v_heads)
    return output, result.final_state, Saved(
        late=tiles.late, write=prepared.write, pairs_q=prepared.pairs_q, inverse=prepared.inverse, decay=prepared.decay,
        anchors=tiles.anchors, totals=tiles.totals, flags=tiles.flags, norms=tiles.norms, served=tiles.served, states=result.states,
        written=result.written, operators=operators, lost=lost, forgets=forgets,
    )  # fmt: skip


def backward(
    problem: Problem, saved: Saved, output: Tensor, d_output: Tensor, d_final_state: Tensor | None
) -> Gradients:
    """The gradients, of what ``forward_to_train`` gave; of its final state where ``d_final_state`` is given."""
    problem = _laid_out(problem)
    layout = _layout_of(problem)
    d_output, output = d_output.contiguous(), output.contiguous()
    d_final_state = None if d_final_state is None else d_final_state.float().contiguous()
    read, erase = saved.late
    reverse = scan_backward(
        erase, read, saved.write, saved.pairs_q, saved.decay, d_output, d_final_state, saved.operators, problem.cu_seqlens,
        layout.cu_chunks, forgets=saved.forgets if may_be_cut(*problem.v.shape[2:]) else None, lost=saved.lost,
        initial=problem.initial_state is not None,
    )  # fmt: skip
    d_right, d_states, d_initial = reverse.d_written, reverse.d_states, reverse.d_initial_state
    dv = torch.empty(problem.v.shape, dtype=problem.v.dtype, device=problem.v.device)
    of_pairs = _value_backward(problem, layout, saved.inverse, saved.written, d_right, output, d_output, dv)
    keys = _KeyGradients(problem, layout)
    if layout.chunks:
        _anchored_backward(problem, layout, saved, of_pairs, d_right, d_states, d_output, keys)
        _steep_backward(problem, layout, saved, of_pairs, keys)
    return keys.gradients(dv, d_initial)


def _prepare(problem: Problem, layout: _Layout, *, save: bool) -> tuple[Prepared, _Tiles]:
    q, k, v, gate, beta = problem.q, problem.k, problem.v, problem.gate, problem.beta
    (tokens, heads, key_dim), (v_heads, value_dim) = q.shape[1:], v.shape[2:]
    chunks, wide = layout.chunks, torch.float32

    def made(*shape: int, dtype: torch.dtype = q.dtype) -> Tensor:
        return torch.empty(chunks, v_heads, *shape, dtype=dtype, device=q.device)

    forgets = may_be_cut(v_heads, value_dim)
    late = torch.empty(2, chunks, v_heads, CHUNK, key_dim, dtype=q.dtype, device=q.device)
    prepared = Prepared(
        erase=late[1], u=made(CHUNK, value_dim), read=late[0], write=made(CHUNK, key_dim), pairs_q=made(CHUNK, CHUNK),
        decay=made(key_dim, dtype=wide), forgets=made(dtype=wide) if forgets else None, inverse=made(CHUNK, CHUNK) if save else None,
    )  # fmt: skip
    anchors, totals = made(4, key_dim, dtype=wide), made(4, key_dim, dtype=wide)
    tiles = _Tiles(
        late, anchors, totals, flags=made(4, dtype=torch.int32), norms=made(2, CHUNK, dtype=wide) if save else None,
        served=made(dtype=torch.int32),
    )  # fmt: skip
    # Entries of pairs_k are at most 1 for normalized keys, so fp16 serves: as exact as tf32, and half as wide.
    narrow = problem.normalize and layout.dot == tl.bfloat16
    pairs_k, cells = made(CHUNK, CHUNK, dtype=torch.float16 if narrow else wide), tl.float16 if narrow else tl.float32
    shape, packed = shape_class(key_dim, q.dtype), problem.cu_seqlens is not None
    preparing, solving = config_of("kda_prepare", q, shape), config_of("kda_solve", q, shape)
    if chunks:
        grid = (chunks, v_heads)
        place = (problem.cu_seqlens, layout.cu_chunks)
        given = (q, k, gate, problem.A_log, problem.dt_bias, *place)
        sizes = (problem.scale, problem.lower_bound or 0.0, layout.sequences, tokens)
        strides = (q.stride(1), k.stride(1), gate.stride(1), heads, v_heads, key_dim, layout.kind, problem.normalize, packed)  # fmt: skip
        prepare_kernel[grid](
            *given, late, prepared.write, prepared.pairs_q, pairs_k, prepared.decay, prepared.forgets, anchors, totals,
            tiles.flags, tiles.norms, tiles.served, *sizes, prepared.erase.numel(), *strides,
            min(preparing["BK"], key_dim), save, forgets, layout.dot, layout.precision, preparing.num_stages, **preparing.options,
        )  # fmt: skip
        solve_kernel[grid](
            v, beta, *place, pairs_k, prepared.erase, prepared.u, prepared.forgets, prepared.inverse,
            layout.sequences, tokens, v.stride(1), beta.stride(1), v_heads, key_dim, value_dim, solving["BK"], solving["BV"],
            problem.normalize, packed, save, forgets, cells, layout.dot, layout.precision, **solving.options,
        )  # fmt: skip
    return prepared, tiles


def _scan(
    problem: Problem, layout: _Layout, prepared: Prepared, *, save: bool, export: Sequence[tuple[int, int]] = ()
) -> tuple[Tensor, ScanResult]:
    output = torch.empty(problem.v.shape, dtype=problem.v.dtype, device=problem.v.device)
    return output, scan(
        *prepared[:6],
        problem.initial_state,
        output,
        problem.cu_seqlens,
        layout.cu_chunks,
        forgets=prepared.forgets,
        save=save,
        export=export,
    )


def _value_backward(
    problem: Problem, layout: _Layout, inverse: Tensor, written: Tensor, d_written: Tensor, output: Tensor,
    d_output: Tensor, dv: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(d_keys, d_pairs, sums, scales); ``dv`` is written, ``d_written`` becomes d_right."""
    v, beta, (chunks, v_heads) = problem.v, problem.beta, written.shape[:2]
    tokens, value_dim = v.shape[1], v.shape[3]
    d_keys, d_pairs = torch.empty_like(inverse), torch.empty_like(inverse)
    sums, scales = (
        torch.empty(chunks, v_heads, *more, dtype=torch.float32, device=v.device) for more in ((4, CHUNK), ())
    )
    config = config_of("kda_value_backward", v, shape_class(problem.q.shape[3], v.dtype))
    if chunks:
        value_backward_kernel[(chunks, v_heads)](
            v, beta, problem.cu_seqlens, layout.cu_chunks, inverse, written, d_written, output, d_output, dv, d_keys,
            d_pairs, sums, scales, layout.sequences, tokens, v.stride(1), beta.stride(1), v_heads, value_dim,
            min(config["BV"], value_dim), problem.cu_seqlens is not None, layout.dot, layout.precision,
            **config.options,
        )  # fmt: skip
    return d_keys, d_pairs, sums, scales


class _KeyGradients:
    """Where the gradients go that live in the key dim, and what every tile adds to those of the gate's parameters."""

    def __init__(self, problem: Problem, layout: _Layout) -> None:
        q, gate, (batch, tokens, heads, key_dim), v_heads = problem.q, problem.gate, problem.q.shape, problem.v.shape[2]
        self.problem, wide = problem, torch.float32
        # Value heads of one key head add up, in fp32.
        own = q.dtype if heads == v_heads else wide
        self.q, self.k = (torch.empty(batch, tokens, v_heads, key_dim, dtype=own, device=q.device) for _ in range(2))
        self.gate = torch.empty(gate.shape, dtype=gate.dtype, device=q.device)
        self.beta = torch.empty(batch, tokens, v_heads, dtype=wide, device=q.device)
        parts = 0 if problem.A_log is None else 4 * layout.chunks
        self.partial = torch.empty(parts, v_heads * (key_dim + 1), dtype=wide, device=q.device)

    def gradients(self, dv: Tensor, d_initial: Tensor | None) -> Gradients:
        """Summed up, in a fixed order."""
        p, dq, dk, (heads, v_heads) = self.problem, self.q, self.k, (self.problem.q.shape[2], dv.shape[2])
        if heads != v_heads:
            dq, dk = (x.unflatten(2, (heads, -1)).sum(3).to(p.q.dtype) for x in (dq, dk))
        d_A = d_bias = None
        if p.A_log is not None:
            assert p.dt_bias is not None
            found = torch.empty(self.partial.shape[1], 1, dtype=torch.float32, device=dv.device)
            column_sum(self.partial[:, None], found)
            d_bias, d_A = found[:-v_heads, 0], found[-v_heads:, 0].clone()  # results of an operator share no memory
            d_A, d_bias = d_A.view(p.A_log.shape).to(p.A_log.dtype), d_bias.view(p.dt_bias.shape).to(p.dt_bias.dtype)
        return Gradients(dq, dk, dv, self.gate, self.beta.to(p.beta.dtype), d_A, d_bias, d_initial)


AT_ONCE = 4096
"""Chunks times heads of which anchor.py's tensors are kept: enough for every processor, small beside what a forward leaves."""


def _anchored_backward(
    problem: Problem, layout: _Layout, saved: Saved, of_pairs: tuple[Tensor, Tensor, Tensor, Tensor], d_right: Tensor,
    d_states: Tensor, d_output: Tensor, results: _KeyGradients,
) -> None:  # fmt: skip
    """The gradients in the key dim, but for pairs inside steep tiles."""
    q, k, gate, beta, (tokens, heads, key_dim), (v_heads, value_dim) = (
        problem.q, problem.k, problem.gate, problem.beta, problem.q.shape[1:], problem.v.shape[2:],
    )  # fmt: skip
    d_keys, d_pairs, sums, scales = of_pairs
    shape, packed, lower_bound = (
        shape_class(key_dim, q.dtype),
        problem.cu_seqlens is not None,
        problem.lower_bound or 0.0,
    )
    anchor, anchored, tile, token = (
        config_of(f"kda_{name}", q, shape)
        for name in ("anchor", "anchored_backward", "tile_backward", "token_backward")
    )
    given = (q, k, gate, beta, problem.A_log, problem.dt_bias)
    strides = (q.stride(1), k.stride(1), gate.stride(1), beta.stride(1))
    at_once = min(layout.chunks, max(1, AT_ONCE // v_heads))
    late_q, late_k, early = (
        torch.empty(at_once, v_heads, CHUNK, key_dim, dtype=q.dtype, device=q.device) for _ in range(3)
    )
    factors = torch.empty(at_once, v_heads, 7, 4, key_dim, dtype=torch.float32, device=q.device)
    place = (problem.cu_seqlens, layout.cu_chunks)
    for first in range(0, layout.chunks, at_once):
        chunks = min(at_once, layout.chunks - first)
        anchor_kernel[(4 * chunks, v_heads)](
            *given, *place, saved.anchors, saved.totals, saved.norms, saved.served, late_q, late_k, early, factors,
            lower_bound, layout.sequences, tokens, first, *strides, heads, v_heads, key_dim, layout.kind, packed, layout.dot,
            **anchor.options,
        )  # fmt: skip
        products = (saved.states, d_states, saved.written, d_right, d_output, d_keys, d_pairs, scales)
        found = (late_q, late_k, early, results.q, results.k, results.gate, layout.sequences, tokens, first)
        anchored_backward_kernel[(chunks * -(-key_dim // anchored["BK"]), v_heads)](
            *products, saved.totals, saved.served, stretches(q.device), *place, *found, v_heads, key_dim, value_dim, anchored["BK"],
            min(anchored["BV"], value_dim), packed, layout.dot, layout.precision, **anchored.options,
        )  # fmt: skip
        tile_backward_kernel[(chunks * -(-key_dim // tile["BK"]), v_heads)](
            *products, saved.decay, saved.totals, saved.served, factors, stretches(q.device), *place, *found, v_heads, key_dim,
            value_dim, tile["BK"], min(tile["BV"], value_dim), packed, layout.dot, layout.precision,
            **tile.options,
        )  # fmt: skip
        token_backward_kernel[(4 * chunks, v_heads)](
            *given, *place, saved.anchors, saved.totals, saved.norms, sums, scales, saved.served, early, results.q, results.k,
            results.gate, results.beta, results.partial, problem.scale, lower_bound, layout.sequences, tokens, first,
            *strides, heads, v_heads, key_dim, layout.kind, problem.normalize, packed, layout.dot,
            **token.options,
        )  # fmt: skip


def _steep_backward(
    problem: Problem, layout: _Layout, saved: Saved, of_pairs: tuple[Tensor, Tensor, Tensor, Tensor],
    results: _KeyGradients,
) -> None:  # fmt: skip
    """The gradients of pairs inside steep tiles, added to the others."""
    q, k, gate, beta, (tokens, heads, key_dim), v_heads = (
        problem.q, problem.k, problem.gate, problem.beta, problem.q.shape[1:], problem.v.shape[2],
    )  # fmt: skip
    config = config_of("kda_steep_backward", q, shape_class(key_dim, q.dtype))
    d_keys, d_pairs, _, scales = of_pairs
    steep_backward_kernel[(4 * layout.chunks, v_heads)](
        q, k, gate, beta, problem.A_log, problem.dt_bias, problem.cu_seqlens, layout.cu_chunks, saved.anchors, saved.flags,
        saved.norms, d_keys, d_pairs, scales, results.q, results.k, results.gate, results.beta, results.partial,
        problem.lower_bound or 0.0, layout.sequences, tokens, q.stride(1), k.stride(1), gate.stride(1),
        beta.stride(1), heads, v_heads, key_dim, layout.kind, problem.cu_seqlens is not None, layout.dot,
        **config.options,
    )  # fmt: skip


def _layout_of(problem: Problem) -> _Layout:
    batch, tokens = problem.q.shape[:2]
    sequences, cu_chunks = batch, None
    cu_seqlens = problem.cu_seqlens
    if cu_seqlens is not None:
        sequences = cu_seqlens.numel() - 1
        # Sequence n begins at chunk n + (its first token) // C, which leaves room for as many as it may have: three small
        # launches, where counting exactly took nine. A chunk that nobody needs is empty, as are those behind the last.
        cu_chunks = torch.arange(sequences + 1, dtype=torch.int32, device=cu_seqlens.device).add_(cu_seqlens // CHUNK)
    return _Layout(
        sequences=sequences,
        chunks=count_chunks(batch, tokens, sequences, cu_seqlens is not None),
        cu_chunks=cu_chunks,
        kind=0 if problem.A_log is None else 1 if problem.lower_bound is None else 2,
        dot=tl.float32 if problem.q.dtype == torch.float32 else tl.bfloat16,
        precision=precision_of(problem.q.dtype),
    )


def _laid_out(problem: Problem) -> Problem:
    """The problem with tokens of every input at one stride and everything after them dense; copied only where not so."""
    q, k, v, gate, beta = (_rows(x) for x in (problem.q, problem.k, problem.v, problem.gate, problem.beta))
    A_log, dt_bias, initial_state = (
        None if x is None else x.contiguous() for x in (problem.A_log, problem.dt_bias, problem.initial_state)
    )
    return replace(
        problem, q=q, k=k, v=v, gate=gate, beta=beta, A_log=A_log, dt_bias=dt_bias, initial_state=initial_state
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    if x.is_contiguous():  # nearly always, and a tenth of the cost of looking closer
        return x
    dense = x[0, 0].is_contiguous() if x.numel() else True
    whole = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if dense and whole else x.contiguous()
