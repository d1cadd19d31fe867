"""Kimi Delta Attention: the public operations ``chunk_kda`` and ``recurrent_kda``.

The memory of one head is a matrix S [K, V]. Each token forgets by channel, corrects by the delta rule, and reads
(arXiv 2510.26692, Eq. 1):

    S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T        o_t = scale * S_t^T q_t

Both operations compute this; the chunked one in parallel over the tokens of a chunk.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kimi_linear.ops.autocast import outside_autocast
from kimi_linear.ops.chunk_kda_operator import triton_chunk_kda
from kimi_linear.ops.contract import Gate, Impl, KDAOutput, log_decay
from kimi_linear.ops.dispatch import OpFacts, choose_impl, device_arch
from kimi_linear.ops.norm import l2_normalize
from kimi_linear.ops.recurrent import triton_recurrent_kda
from kimi_linear.ops.validation import check_kda


def chunk_kda(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T HV V"],
    gate: Gate,
    beta: Float[Tensor, "B T HV"],
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
    initial_state: Float[Tensor, "N HV V K"] | None = None,
    cu_seqlens: Int[Tensor, "N1"] | None = None,
    impl: Impl = "auto",
) -> KDAOutput:
    """Kimi Delta Attention over whole sequences, in parallel chunks (arXiv 2510.26692, Eqs. 2-9). Differentiable.

    Args:
        q: [B, T, H, K] queries.
        k: [B, T, H, K] keys.
        v: [B, T, HV, V] values; HV is a multiple of H, and value head j reads key head j // (HV // H).
        gate: the decay per token and key channel: a Tensor [B, T, HV, K] of natural-log decays <= 0, or a
            ``SoftplusGate`` or ``BoundedGate`` of raw projections.
        beta: [B, T, HV] strength of the correction, in [0, 2].
        scale: multiplies the output; K**-0.5 where None.
        normalize_qk: scale q and k to unit length first, ``x * rsqrt(sum(x**2) + 1e-6)``.
        initial_state: [N, HV, V, K] memory before the first token, value-major, fp32; zero where None.
        cu_seqlens: [N+1] int32 or int64 offsets of packed sequences, with B == 1. An empty sequence is legal and
            hands its state through. Without it every batch row is a sequence, N == B.
        impl: which implementation; "auto" takes the fastest exact one.

    Returns:
        ``KDAOutput(output [B, T, HV, V] in v's dtype, final_state [N, HV, V, K] fp32)``.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device, offset, sign or implementation.
    """
    check_kda(q, k, v, gate, beta, initial_state, cu_seqlens)
    choice = choose_impl(kda_facts("chunk_kda", q, k, v, gate, beta, initial_state), impl)
    scale = scale_or_default(scale, q)
    if choice.impl == "triton":
        return triton_chunk_kda(q, k, v, gate, beta, scale, normalize_qk, initial_state, cu_seqlens)
    g = log_decay(gate)
    if normalize_qk:
        q, k = l2_normalize(q), l2_normalize(k)
    if choice.impl == "torch":
        from kimi_linear.kernels.torch.chunk_kda import chunk_kda as run
    else:
        from kimi_linear.reference.kda import chunk_kda as run
    with outside_autocast(q):
        return KDAOutput(*run(q, k, v, g, beta, scale, initial_state, cu_seqlens))


def recurrent_kda(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T HV V"],
    gate: Gate,
    beta: Float[Tensor, "B T HV"],
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
    initial_state: Float[Tensor, "S HV V K"] | None = None,
    cu_seqlens: Int[Tensor, "N1"] | None = None,
    state_indices: Int[Tensor, "N"] | None = None,
    impl: Impl = "auto",
) -> KDAOutput:
    """Kimi Delta Attention token by token (arXiv 2510.26692, Eq. 1): what decoding uses. Arguments as ``chunk_kda``.

    Args:
        initial_state: as in ``chunk_kda``; with ``state_indices`` a pool of slots [S, HV, V, K] instead.
        state_indices: [N] slot of each sequence in the pool. The slots are read, and updated in place;
            ``final_state`` is then the pool itself. Not differentiable.

    Raises:
        TypeError, ValueError: as ``chunk_kda``; also for a slot outside the pool or used twice, and for
            ``state_indices`` where a gradient is asked for.
    """
    check_kda(q, k, v, gate, beta, initial_state, cu_seqlens, state_indices)
    facts = kda_facts("recurrent_kda", q, k, v, gate, beta, initial_state)
    choice = choose_impl(facts, impl)
    if state_indices is not None and facts.needs_grad:
        raise ValueError("state_indices: an update in place has no gradient; call under torch.no_grad()")
    scale = scale_or_default(scale, q)
    if choice.impl == "triton":
        return triton_recurrent_kda(
            q, k, v, gate, beta, scale, normalize_qk, initial_state, cu_seqlens, state_indices
        )  # fmt: skip
    g = log_decay(gate)
    if normalize_qk:
        q, k = l2_normalize(q), l2_normalize(k)
    if choice.impl == "torch":
        from kimi_linear.kernels.torch.recurrent_kda import recurrent_kda as run
    else:
        from kimi_linear.reference.kda import recurrent_kda as run
    slots = None if state_indices is None else state_indices.long()
    state = initial_state if slots is None or initial_state is None else initial_state[slots]
    with outside_autocast(q):
        output, final_state = run(q, k, v, g, beta, scale, state, cu_seqlens)
    if slots is None:
        return KDAOutput(output, final_state)
    assert initial_state is not None
    initial_state[slots] = final_state
    return KDAOutput(output, initial_state)


def scale_or_default(scale: float | None, q: Tensor) -> float:
    """``scale`` as given, or K**-0.5."""
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def kda_facts(
    op: str, q: Tensor, k: Tensor, v: Tensor, gate: Gate, beta: Tensor, initial_state: Tensor | None
) -> OpFacts:
    """What the choice of an implementation of ``op`` depends on, for these arguments (shapes as ``chunk_kda``).

    ``choose_impl(kda_facts("chunk_kda", ...), impl)`` is what the operation itself asks.
    """
    of_gate = (gate,) if isinstance(gate, Tensor) else (gate.x, gate.A_log, gate.dt_bias)
    tensors = (q, k, v, beta, initial_state, *of_gate)
    return OpFacts(
        op=op,
        device=q.device.type,
        arch=device_arch(q.device.index) if q.is_cuda else None,
        dtype=str(q.dtype).removeprefix("torch."),
        tokens=q.shape[1],
        key_dim=q.shape[-1],
        value_dim=v.shape[-1],
        needs_grad=torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors),
    )
