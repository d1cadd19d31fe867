"""The relatives of KDA that the paper compares it with: one scalar decay per head instead of one per channel.

    GDN      S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T       o_t = scale * S_t^T q_t
    Mamba-2  S_t = exp(g_t) S_{t-1} + k_t v_t^T                                     o_t = scale * S_t^T q_t

Gated DeltaNet is arXiv 2412.06464; the second is the state-space dual of arXiv 2405.21060 in attention's letters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kimi_linear.ops.autocast import outside_autocast
from kimi_linear.ops.chunk_kda_operator import triton_chunk_kda
from kimi_linear.ops.contract import Impl, KDAOutput
from kimi_linear.ops.dispatch import OpFacts, choose_impl, device_arch
from kimi_linear.ops.norm import l2_normalize
from kimi_linear.ops.validation import check_scalar_gate

if TYPE_CHECKING:
    from collections.abc import Callable

FORGIVING = 2.0**-40
"""A correction strength that erases nothing: 2^-20 of what a key held, were it written a million times."""


def chunk_gdn(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T HV V"],
    gate: Float[Tensor, "B T HV"],
    beta: Float[Tensor, "B T HV"],
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
    initial_state: Float[Tensor, "N HV V K"] | None = None,
    cu_seqlens: Int[Tensor, "N1"] | None = None,
    impl: Impl = "auto",
) -> KDAOutput:
    """Gated DeltaNet over whole sequences, in parallel chunks (arXiv 2412.06464). Differentiable.

    Args:
        q: [B, T, H, K] queries.
        k: [B, T, H, K] keys.
        v: [B, T, HV, V] values; HV is a multiple of H, and value head j reads key head j // (HV // H).
        gate: [B, T, HV] natural-log decay of the whole memory, <= 0.
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
    check_scalar_gate(q, k, v, gate, beta, initial_state, cu_seqlens)
    chosen = _choose("chunk_gdn", q, v, (q, k, v, gate, beta, initial_state), impl)
    if chosen == "triton":
        # KDA with one decay for all channels of a head is GDN, exactly; its kernels read that decay once per channel.
        by_channel = gate[..., None].expand(*gate.shape, q.shape[-1])
        factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
        return triton_chunk_kda(q, k, v, by_channel, beta, factor, normalize_qk, initial_state, cu_seqlens)
    if chosen == "torch":
        from kimi_linear.kernels.torch.scalar_gate import chunk_gdn as run
    else:
        from kimi_linear.reference.gdn import chunk_gdn as run
    return _call(run, q, k, v, (gate, beta), scale, normalize_qk, initial_state, cu_seqlens)


def recurrent_gdn(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T HV V"],
    gate: Float[Tensor, "B T HV"],
    beta: Float[Tensor, "B T HV"],
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
    initial_state: Float[Tensor, "N HV V K"] | None = None,
    cu_seqlens: Int[Tensor, "N1"] | None = None,
    impl: Impl = "auto",
) -> KDAOutput:
    """Gated DeltaNet token by token: what decoding uses. Arguments, result and errors as ``chunk_gdn``."""
    check_scalar_gate(q, k, v, gate, beta, initial_state, cu_seqlens)
    if _choose("recurrent_gdn", q, v, (q, k, v, gate, beta, initial_state), impl) == "torch":
        from kimi_linear.kernels.torch.scalar_gate import recurrent_gdn as run
    else:
        from kimi_linear.reference.gdn import recurrent_gdn as run
    return _call(run, q, k, v, (gate, beta), scale, normalize_qk, initial_state, cu_seqlens)


def chunk_mamba2(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T HV V"],
    gate: Float[Tensor, "B T HV"],
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
    initial_state: Float[Tensor, "N HV V K"] | None = None,
    cu_seqlens: Int[Tensor, "N1"] | None = None,
    impl: Impl = "auto",
) -> KDAOutput:
    """Decayed linear attention over whole sequences, in parallel chunks (arXiv 2405.21060). Differentiable.

    No delta rule: what a key held before is added to, not corrected. Arguments, result and errors as ``chunk_gdn``.
    """
    check_scalar_gate(q, k, v, gate, None, initial_state, cu_seqlens)
    chosen = _choose("chunk_mamba2", q, v, (q, k, v, gate, initial_state), impl)
    if chosen == "triton":
        # KDA writes beta (v - S k): at a tiny beta, and values as much larger, nothing is erased. Powers of two round nothing.
        by_channel, beta = gate[..., None].expand(*gate.shape, q.shape[-1]), torch.full_like(gate, FORGIVING)
        factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
        large = v * (1 / FORGIVING)
        return triton_chunk_kda(q, k, large, by_channel, beta, factor, normalize_qk, initial_state, cu_seqlens)
    if chosen == "torch":
        from kimi_linear.kernels.torch.scalar_gate import chunk_mamba2 as run
    else:
        from kimi_linear.reference.mamba2 import chunk_mamba2 as run
    return _call(run, q, k, v, (gate,), scale, normalize_qk, initial_state, cu_seqlens)


def recurrent_mamba2(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T HV V"],
    gate: Float[Tensor, "B T HV"],
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
    initial_state: Float[Tensor, "N HV V K"] | None = None,
    cu_seqlens: Int[Tensor, "N1"] | None = None,
    impl: Impl = "auto",
) -> KDAOutput:
    """Decayed linear attention token by token: what decoding uses. Arguments, result and errors as ``chunk_gdn``."""
    check_scalar_gate(q, k, v, gate, None, initial_state, cu_seqlens)
    if _choose("recurrent_mamba2", q, v, (q, k, v, gate, initial_state), impl) == "torch":
        from kimi_linear.kernels.torch.scalar_gate import recurrent_mamba2 as run
    else:
        from kimi_linear.reference.mamba2 import recurrent_mamba2 as run
    return _call(run, q, k, v, (gate,), scale, normalize_qk, initial_state, cu_seqlens)


def _call(
    run: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, ...], scale: float | None, normalize_qk: bool,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> KDAOutput:  # fmt: skip
    if normalize_qk:
        q, k = l2_normalize(q), l2_normalize(k)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    with outside_autocast(q):
        return KDAOutput(*run(q, k, v, *gates, scale, initial_state, cu_seqlens))


def _choose(op: str, q: Tensor, v: Tensor, tensors: tuple[Tensor | None, ...], impl: Impl) -> Impl:
    facts = OpFacts(
        op=op,
        device=q.device.type,
        arch=device_arch(q.device.index) if q.is_cuda else None,
        dtype=str(q.dtype).removeprefix("torch."),
        tokens=q.shape[1],
        key_dim=q.shape[-1],
        value_dim=v.shape[-1],
        needs_grad=torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors),
    )
    return choose_impl(facts, impl).impl
