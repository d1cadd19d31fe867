"""What is timed against what: our implementations, fla's kernel, and PyTorch's softmax attention, at the same inputs.

A variant is a function of ``KDAInputs`` that gives the output [B, T, HV, V]. ``forward`` and ``training`` bind one to its
inputs: the calls that a timer repeats.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.ops import AVAILABLE, Choice, Impl, SoftplusGate, choose_impl, chunk_kda, kda_facts
from kimi_linear.testing.factories import KDAInputs

Variant: TypeAlias = Callable[[KDAInputs], Tensor]


def ours(impl: Impl) -> Variant:
    """The public operation, gate and l2 norm included."""
    return lambda i: chunk_kda(*i.positional(), normalize_qk=True, cu_seqlens=i.cu_seqlens, impl=impl).output


def choice(inputs: KDAInputs, impl: Impl, *, needs_grad: bool) -> Choice:
    """What ``impl`` resolves to for these inputs.

    Raises:
        ValueError: an explicit implementation that cannot compute them, and why.
    """
    with torch.set_grad_enabled(needs_grad):
        if needs_grad:
            inputs = inputs.with_grad(clone=False)
        return choose_impl(kda_facts("chunk_kda", *inputs.positional(), None), impl)


def our_variants(inputs: KDAInputs, *, needs_grad: bool) -> tuple[dict[str, Variant], dict[str, str]]:
    """Every implementation of ours that computes these inputs, the specification left out, and why others do not."""
    able: dict[str, Variant] = {}
    unable: dict[str, str] = {}
    for impl in AVAILABLE["chunk_kda"]:
        if impl == "reference":
            continue
        try:
            choice(inputs, impl, needs_grad=needs_grad)
        except ValueError as error:
            unable[impl] = str(error)
        else:
            able[impl] = ours(impl)
    return able, unable


def has_fla(inputs: KDAInputs) -> bool:
    """Whether fla is installed and has this gate on this device."""
    found = importlib.util.find_spec("fla") is not None
    return found and inputs.q.is_cuda and isinstance(inputs.gate, SoftplusGate)


def fla(inputs: KDAInputs) -> Tensor:
    """fla's chunk_kda, with its own gate and l2 norm inside and the final state made, as ours makes it."""
    from fla.ops.kda import chunk_kda as attend  # type: ignore[import-not-found]

    gate = inputs.gate
    assert isinstance(gate, SoftplusGate)
    return attend(
        inputs.q, inputs.k, inputs.v, gate.x, inputs.beta, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
        A_log=gate.A_log, dt_bias=gate.dt_bias.flatten(), output_final_state=True, cu_seqlens=inputs.cu_seqlens,
    )[0]  # fmt: skip


def softmax_inputs(inputs: KDAInputs) -> KDAInputs:
    """The inputs of ``softmax_attention``: one key head for each value head, as multi-head attention has."""
    repeat = inputs.v.shape[2] // inputs.q.shape[2]
    if repeat == 1:
        return inputs
    return replace(inputs, q=inputs.q.repeat_interleave(repeat, 2), k=inputs.k.repeat_interleave(repeat, 2))


def softmax_attention(lengths: Sequence[int]) -> Variant:
    """PyTorch's causal scaled_dot_product_attention of q, k and v, by cuDNN or flash on CUDA.

    Packed sequences go in as one jagged tensor on CUDA, told their lengths so that the host need not ask the GPU; on a
    CPU, where jagged tensors have no fast path, one after the other.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shortest, longest = min(lengths), max(lengths)

    def attend(inputs: KDAInputs) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
        if not inputs.q.is_cuda:
            return _sequence_by_sequence(q, k, v, inputs.cu_seqlens).transpose(1, 2)
        if inputs.cu_seqlens is None:
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        cu = inputs.cu_seqlens
        jq, jk, jv = (
            torch.nested.nested_tensor_from_jagged(x[0], cu, min_seqlen=shortest, max_seqlen=longest).transpose(1, 2)
            for x in (inputs.q, inputs.k, inputs.v)
        )
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            packed = F.scaled_dot_product_attention(jq, jk, jv, is_causal=True)
        return packed.transpose(1, 2).values()[None]

    return attend


def _sequence_by_sequence(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    lengths = cu_seqlens.diff().tolist()
    parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(a, b, c, is_causal=True) for a, b, c in parts], dim=2)


def forward(variant: Variant, inputs: KDAInputs) -> Callable[[], Tensor]:
    """A forward that autograd does not record."""

    def call() -> Tensor:
        with torch.no_grad():
            return variant(inputs)

    return call


def training_leaves(inputs: KDAInputs) -> Mapping[str, Tensor]:
    """What a training step differentiates, by name: every leaf but the initial state, which no variant is given."""
    return {name: leaf for name, leaf in inputs.leaves().items() if name != "initial_state"}


def training(
    variant: Variant, inputs: KDAInputs, weight: Tensor, names: Sequence[str] | None = None
) -> Callable[[], tuple[Tensor, ...]]:
    """A forward, and a backward of ``weight`` to the leaves named, all of them where None; ``inputs`` must be leaves."""
    leaves = training_leaves(inputs)
    wanted = [leaves[name] for name in names or leaves]
    return lambda: torch.autograd.grad(variant(inputs), wanted, weight)
