"""``chunk_kda`` that also hands out the memory at chosen tokens: what a prefix cache keeps.

A later request that shares a prefix continues from the state at its end. States are handed out at multiples of ``CHUNK``
tokens, where the chunked kernels have them in registers anyway: on a GPU one is a store, no token is computed twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kimi_linear.ops.autocast import outside_autocast
from kimi_linear.ops.chunk_kda_operator import triton_chunk_kda_states
from kimi_linear.ops.contract import STATE_CHUNK, Gate, Impl, KDAStates, log_decay
from kimi_linear.ops.dispatch import choose_impl
from kimi_linear.ops.kda import kda_facts, scale_or_default
from kimi_linear.ops.norm import l2_normalize
from kimi_linear.ops.validation import check_kda, check_offsets


def chunk_kda_states(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T HV V"],
    gate: Gate,
    beta: Float[Tensor, "B T HV"],
    offsets: Sequence[tuple[int, int]],
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
    initial_state: Float[Tensor, "N HV V K"] | None = None,
    cu_seqlens: Int[Tensor, "N1"] | None = None,
    impl: Impl = "auto",
) -> KDAStates:
    """``chunk_kda`` (arXiv 2510.26692, Eqs. 2-9), and the memory after each of ``offsets``. Not differentiable.

    Output and final state are those of ``chunk_kda``. ``chunk_kda`` on the rest of a sequence with one of ``states`` as its
    ``initial_state`` continues it.

    Args:
        q, k, v, gate, beta, scale, normalize_qk, initial_state, cu_seqlens, impl: as for ``chunk_kda``.
        offsets: E pairs (sequence, tokens): the state of that sequence after its first ``tokens`` tokens, a multiple of
            64 from 64 to its length. In any order, none twice. Plain numbers, so that the host need not ask the GPU.

    Returns:
        ``KDAStates(output [B, T, HV, V], final_state [N, HV, V, K], states [E, HV, V, K])``, states in the order of
        ``offsets``, fp32. With Triton the host does not read the lengths of packed sequences: a state past the end of its
        sequence, which raises elsewhere, is NaN.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device, offset, sign or implementation, or a gradient
            asked for.
    """
    check_kda(q, k, v, gate, beta, initial_state, cu_seqlens)
    facts = kda_facts("chunk_kda_states", q, k, v, gate, beta, initial_state)
    choice = choose_impl(facts, impl)
    if facts.needs_grad:
        raise ValueError(
            "chunk_kda_states: states handed out have no gradient; call under torch.no_grad(), or use chunk_kda"
        )
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    # The other implementations read the lengths in any case; Triton on a GPU does not wait for them.
    known = cu_seqlens if cu_seqlens is None or choice.impl == "triton" else cu_seqlens.cpu()
    check_offsets(offsets, sequences, q.shape[1], known, STATE_CHUNK)
    scale = scale_or_default(scale, q)
    if choice.impl == "triton":
        return triton_chunk_kda_states(
            q, k, v, gate, beta, offsets, scale, normalize_qk, initial_state, cu_seqlens
        )  # fmt: skip
    g = log_decay(gate)
    if normalize_qk:
        q, k = l2_normalize(q), l2_normalize(k)
    if choice.impl == "torch":
        from kimi_linear.kernels.torch.chunk_kda import chunk_kda as run
    else:
        from kimi_linear.reference.kda import chunk_kda as run
    with outside_autocast(q):
        return _piecewise(run, (q, k, v, g, beta), offsets, scale, initial_state, cu_seqlens)


def _piecewise(
    run: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...], offsets: Sequence[tuple[int, int]],
    scale: float, initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> KDAStates:  # fmt: skip
    """One sequence after the other, cut at its offsets, each piece from the state that the piece before it left."""
    q, v = inputs[0], inputs[2]
    batch, tokens = q.shape[:2]
    spans = [(0, tokens)] * batch if cu_seqlens is None else list(itertools.pairwise(cu_seqlens.tolist()))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    output = torch.empty_like(v)
    final_state = q.new_zeros(len(spans), *v.shape[2:], q.shape[3], dtype=wide)
    if initial_state is not None:
        final_state.copy_(initial_state)
    states = final_state.new_empty(len(offsets), *final_state.shape[1:])
    places = {pair: i for i, pair in enumerate(offsets)}
    for n, (start, stop) in enumerate(spans):
        row = slice(n, n + 1) if cu_seqlens is None else slice(0, 1)
        ends = sorted({start + offset for m, offset in offsets if m == n} | {stop} - {start})
        for begin, end in itertools.pairwise([start, *ends]):
            part: tuple[Any, ...] = tuple(x[row, begin:end] for x in inputs)
            piece, state = run(*part, scale, final_state[n : n + 1])
            output[row, begin:end], final_state[n] = piece, state[0]
            place = places.get((n, end - start))
            if place is not None:
                states[place] = state[0]
    return KDAStates(output, final_state, states)
