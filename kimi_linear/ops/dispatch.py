"""Which implementation computes an operation: a pure function of facts, so that a test can ask without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from kimi_linear.ops.contract import Impl

AVAILABLE: dict[str, tuple[Impl, ...]] = {
    "chunk_kda": ("reference", "torch", "triton"),
    "recurrent_kda": ("reference", "torch"),
    "chunk_gdn": ("reference", "torch"),
    "recurrent_gdn": ("reference", "torch"),
    "chunk_mamba2": ("reference", "torch"),
    "recurrent_mamba2": ("reference", "torch"),
}
"""The implementations that each operation has, slowest first."""

TRITON_DTYPES = ("bfloat16",)
"""fp32 is left out: its configurations spill registers, up to 9.7 KB a thread, and have not been timed."""
TRITON_KEY_DIMS = (32, 64, 128)
"""256 is left out: the scan came out as NaN there on an H200 (Triton 3.6.0, eight warps)."""
TRITON_VALUE_DIMS = (32, 64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class OpFacts:
    """What the choice may depend on.

    Attributes:
        op: name of the operation, a key of ``AVAILABLE``.
        device: ``torch.device.type`` of the inputs.
        arch: compute capability such as (9, 0), or None off CUDA.
        dtype: name of q's dtype, such as "bfloat16".
        tokens: T.
        key_dim: K.
        value_dim: V.
        needs_grad: whether autograd records the call.
    """

    op: str
    device: str
    arch: tuple[int, int] | None
    dtype: str
    tokens: int
    key_dim: int
    value_dim: int
    needs_grad: bool


@dataclass(frozen=True)
class Choice:
    """An implementation, and the reason in words (``kimi-linear info`` prints both)."""

    impl: Impl
    reason: str


def choose_impl(facts: OpFacts, requested: Impl = "auto") -> Choice:
    """The implementation for ``facts``.

    Args:
        facts: what is known of the call.
        requested: "auto", or one implementation, which is then taken as it is.

    Raises:
        ValueError: ``requested`` is no implementation, or one that this operation does not have.
    """
    if requested not in get_args(Impl):
        raise ValueError(f"impl: expected one of {', '.join(get_args(Impl))}, got {requested!r}")
    available = AVAILABLE[facts.op]
    if requested != "auto":
        if requested not in available:
            raise ValueError(
                f"impl: {facts.op} has no {requested!r} implementation yet, only {', '.join(available)}; use impl='auto'"
            )
        obstacle = why_not_triton(facts) if requested == "triton" else None
        if obstacle is not None:
            raise ValueError(f"impl: {facts.op} with 'triton' {obstacle}")
        return Choice(requested, "asked for")
    if "triton" in available and facts.device == "cuda" and why_not_triton(facts) is None:
        return Choice("triton", "fastest exact implementation without a backward: three portable Triton kernels")
    how = "one step per token" if facts.op.startswith("recurrent") else "parallel chunks"
    return Choice("torch", f"fastest exact implementation on {facts.device}: {how} in plain torch")


def why_not_triton(facts: OpFacts) -> str | None:
    """What keeps the Triton kernels from computing ``facts``, and the way out; None where nothing does."""
    if facts.device != "cuda":
        return f"expected CUDA tensors, got {facts.device}; use impl='auto'"
    if facts.arch is None or facts.arch < (9, 0):
        return f"expected compute capability 9.0 or more (the kernels spill registers below), got {facts.arch}; use impl='auto'"
    if facts.needs_grad:
        return "has no backward yet; use impl='auto', or call under torch.no_grad()"
    if facts.dtype not in TRITON_DTYPES:
        return f"expected q in {', '.join(TRITON_DTYPES)}, got {facts.dtype}; use impl='auto'"
    if facts.key_dim not in TRITON_KEY_DIMS or facts.value_dim not in TRITON_VALUE_DIMS:
        allowed = f"K in {TRITON_KEY_DIMS} and V in {TRITON_VALUE_DIMS}"
        return f"expected {allowed}, got K == {facts.key_dim} and V == {facts.value_dim}; use impl='auto'"
    return None
