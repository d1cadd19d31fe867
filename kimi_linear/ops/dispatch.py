"""Which implementation computes an operation: a pure function of facts, so that a test can ask without a GPU."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from kimi_linear.ops.contract import Impl

AVAILABLE: dict[str, tuple[Impl, ...]] = {
    "chunk_kda": ("reference", "torch", "triton"),
    "chunk_kda_states": ("reference", "torch", "triton"),
    "recurrent_kda": ("reference", "torch", "triton"),
    "kda_decode": ("reference", "torch", "triton"),
    "chunk_gdn": ("reference", "torch", "triton"),
    "recurrent_gdn": ("reference", "torch"),
    "chunk_mamba2": ("reference", "torch", "triton"),
    "recurrent_mamba2": ("reference", "torch"),
    "short_conv": ("torch", "triton"),
    "l2_normalize": ("torch", "triton"),
    "rms_norm": ("torch", "triton"),
    "gated_rms_norm": ("torch", "triton"),
    "swiglu": ("torch", "triton"),
}
"""The implementations that each operation has, slowest first."""

TRITON_KEY_DIMS = {"bfloat16": (32, 64, 128, 256), "float32": (32, 64, 128)}
"""By dtype of q. In fp32 the kernels for 256 would spill KBs a thread."""
TRITON_VALUE_DIMS = (32, 64, 128, 256)

ROW_OPS = ("short_conv", "l2_normalize", "rms_norm", "gated_rms_norm", "swiglu")
"""Operations at memory speed on rows of channels, forward and backward, on any architecture from sm_80 up."""
ROW_DTYPES = ("bfloat16", "float16", "float32")
ROW_WIDTH = 8192
"""A norm keeps a row in one program's registers."""
ROW_TAPS = 8


def _has_triton() -> bool:
    """Asked without importing it."""
    try:
        return importlib.util.find_spec("triton") is not None
    except ImportError:  # an import hook that blocks it
        return False


HAS_TRITON = _has_triton()
"""torch brings triton to Linux only."""

STEP_OPS = ("kda_decode", "recurrent_kda")
"""Operations that go token by token in one kernel, on any dtype of 16 or 32 bits and any architecture from sm_80 up."""
STEP_TOKENS = 8
"""Most tokens of a sequence in one ``kda_decode``."""
STEP_DIMS = (32, 64, 128, 256)
STEP_DTYPES = ("bfloat16", "float16", "float32")


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
        taps: W of ``short_conv``.
        has_triton: whether triton is installed; asked by the operations on rows.
    """

    op: str
    device: str
    arch: tuple[int, int] | None
    dtype: str
    tokens: int
    key_dim: int
    value_dim: int
    needs_grad: bool
    taps: int = 0
    has_triton: bool = HAS_TRITON


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
        if facts.op in ROW_OPS:
            return Choice("triton", "fastest exact implementation: one Triton kernel at memory speed")
        if facts.op in STEP_OPS:
            return Choice("triton", "fastest exact implementation without a backward: one Triton kernel")
        return Choice("triton", "fastest exact implementation: portable Triton kernels, parallel over chunks")
    how = "one step per token" if facts.op in STEP_OPS or facts.op.startswith("recurrent") else "parallel chunks"
    how = "rows of channels" if facts.op in ROW_OPS else how
    return Choice("torch", f"fastest exact implementation on {facts.device}: {how} in plain torch")


def why_not_triton(facts: OpFacts) -> str | None:
    """What keeps the Triton kernels from computing ``facts``, and the way out; None where nothing does."""
    if facts.device != "cuda":
        return f"expected CUDA tensors, got {facts.device}; use impl='auto'"
    if facts.op in STEP_OPS:
        return _why_no_triton_step(facts)
    if facts.op in ROW_OPS:
        return _why_no_triton_rows(facts)
    if facts.arch is None or facts.arch < (8, 0):
        return f"expected compute capability 8.0 or more, got {facts.arch}; use impl='auto'"
    if facts.dtype not in TRITON_KEY_DIMS:
        return f"expected q in {', '.join(TRITON_KEY_DIMS)}, got {facts.dtype}; use impl='auto'"
    key_dims = TRITON_KEY_DIMS[facts.dtype]
    if facts.key_dim not in key_dims or facts.value_dim not in TRITON_VALUE_DIMS:
        allowed = f"K in {key_dims} and V in {TRITON_VALUE_DIMS}"
        return f"expected {allowed}, got K == {facts.key_dim} and V == {facts.value_dim}; use impl='auto'"
    return None


def _why_no_triton_step(facts: OpFacts) -> str | None:
    if facts.op == "kda_decode" and facts.tokens > STEP_TOKENS:
        return f"expected at most {STEP_TOKENS} tokens, got {facts.tokens}; use chunk_kda or recurrent_kda"
    if facts.arch is None or facts.arch < (8, 0):
        return f"expected compute capability 8.0 or more, got {facts.arch}; use impl='auto'"
    if facts.needs_grad:
        return "has no backward; use impl='auto', or call under torch.no_grad()"
    if facts.dtype not in STEP_DTYPES:
        return f"expected q in {', '.join(STEP_DTYPES)}, got {facts.dtype}; use impl='auto'"
    if facts.key_dim not in STEP_DIMS or facts.value_dim not in STEP_DIMS:
        return f"expected K and V in {STEP_DIMS}, got K == {facts.key_dim} and V == {facts.value_dim}; use impl='auto'"
    return None


def _why_no_triton_rows(facts: OpFacts) -> str | None:
    if not facts.has_triton:
        return "expected triton to be installed, and it is not; pip install triton, or use impl='auto'"
    if facts.arch is None or facts.arch < (8, 0):
        return f"expected compute capability 8.0 or more, got {facts.arch}; use impl='auto'"
    if facts.dtype not in ROW_DTYPES:
        return f"expected x in {', '.join(ROW_DTYPES)}, got {facts.dtype}; use impl='auto'"
    if facts.op == "short_conv":
        return None if facts.taps <= ROW_TAPS else f"expected W <= {ROW_TAPS} taps, got {facts.taps}; use impl='auto'"
    if facts.op == "swiglu":
        return None
    return None if facts.key_dim <= ROW_WIDTH else f"expected D <= {ROW_WIDTH}, got {facts.key_dim}; use impl='auto'"


def row_facts(op: str, x: Tensor, taps: int = 0) -> OpFacts:
    """Facts of an operation of ``ROW_OPS`` on x [..., D]: K and V are D, T the rows. A gradient changes nothing."""
    width = x.shape[-1]
    return OpFacts(
        op=op,
        device=x.device.type,
        arch=device_arch(x.device.index) if x.is_cuda else None,
        dtype=str(x.dtype).removeprefix("torch."),
        tokens=x.numel() // max(1, width),
        key_dim=width,
        value_dim=width,
        needs_grad=False,
        taps=taps,
    )


def device_arch(index: int) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(index)


# A device does not change, so torch.compile may take the answer for a constant. This is what
# torch.compiler.assume_constant_result sets; calling that would import the compiler, which takes a second.
device_arch._dynamo_marked_constant = True  # type: ignore[attr-defined]
