"""Norms of rows: root-mean-square, the same followed by the output gate of a linear-attention head, and unit length."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kimi_linear.ops.contract import NORM_EPS, Impl
from kimi_linear.ops.dispatch import choose_impl, row_facts
from kimi_linear.ops.library import define
from kimi_linear.ops.validation import check_gated_rms_norm, check_l2_normalize, check_rms_norm

GateActivation: TypeAlias = Literal["sigmoid", "swish", "none"]


def rms_norm(
    x: Float[Tensor, "*shape D"],
    weight: Float[Tensor, "D"],
    eps: float,
    *,
    dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, "*shape D"]:
    """``x * rsqrt(mean(x**2, -1) + eps) * weight``, computed in fp32 for 16-bit inputs and rounded once.

    Args:
        x: [..., D], any floating dtype.
        weight: [D].
        eps: added to the mean of squares, >= 0.
        dtype: of the result; x's where None. Another spares a pass over memory where only products read an fp32 stream.
        impl: which implementation; "auto" takes the fastest exact one.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device, eps or implementation.
    """
    check_rms_norm(x, weight, eps, dtype)
    if choose_impl(row_facts("rms_norm", x), impl).impl == "triton":
        return _RMS_NORM(x, weight, eps, dtype)
    dtype = x.dtype if dtype is None else dtype
    if weight.dtype == x.dtype == dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = torch.promote_types(torch.promote_types(x.dtype, dtype), torch.float32)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(dtype)


def gated_rms_norm(
    x: Float[Tensor, "*shape V"],
    gate: Float[Tensor, "*shape V"] | None,
    weight: Float[Tensor, "V"],
    eps: float,
    activation: GateActivation = "sigmoid",
    *,
    impl: Impl = "auto",
) -> Float[Tensor, "*shape V"]:
    """``rms_norm(x, weight, eps) * activation(gate)``: the norm first, then the gate (arXiv 2510.26692, Eq. 10).

    Args:
        x: [..., V] outputs of the heads.
        gate: [..., V] raw projection, or None where ``activation`` is "none".
        weight: [V], shared by the heads.
        eps: added to the mean of squares, >= 0.
        activation: "sigmoid" as released, "swish" (``gate * sigmoid(gate)``), or "none".
        impl: which implementation; "auto" takes the fastest exact one.

    Returns:
        [..., V] in x's dtype; everything between is fp32 (fp64 for fp64 inputs) and rounded once.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device, eps, activation or implementation, a gate
            without an activation or the reverse.
    """
    check_gated_rms_norm(x, gate, weight, eps, activation)
    if gate is None:
        return rms_norm(x, weight, eps, impl=impl)
    if choose_impl(row_facts("gated_rms_norm", x), impl).impl == "triton":
        return _GATED_RMS_NORM(x, gate, weight, eps, activation)
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps)
    gate = gate.to(wide)
    return (normed * (gate.sigmoid() if activation == "sigmoid" else F.silu(gate))).to(x.dtype)


def l2_normalize(
    x: Float[Tensor, "*shape D"], eps: float = NORM_EPS, *, impl: Impl = "auto"
) -> Float[Tensor, "*shape D"]:
    """``x * rsqrt(sum(x**2, -1) + eps)`` over the last dim, computed in fp32 for 16-bit inputs, in x's dtype.

    Args:
        x: [..., D], any floating dtype.
        eps: added to the sum of squares, >= 0.
        impl: which implementation; "auto" takes the fastest exact one.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, eps or implementation.
    """
    check_l2_normalize(x, eps)
    if choose_impl(row_facts("l2_normalize", x), impl).impl == "triton":
        return _L2_NORMALIZE(x, eps)
    from kimi_linear.kernels.torch.l2norm import L2Norm

    return L2Norm.apply(x, eps)  # type: ignore[return-value]


# The operators.


def _l2_forward(x, eps):
    from kimi_linear.kernels.triton.l2norm import forward

    return forward(x, eps)


def _l2_backward(x, dy, eps):
    from kimi_linear.kernels.triton.l2norm import backward

    return backward(x, dy, eps)


def _l2_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.eps = inputs
    ctx.save_for_backward(x)


def _l2_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    return _L2_NORMALIZE_BACKWARD(x, dy, ctx.eps), None


def _rms_forward(x, weight, eps, dtype=None):
    from kimi_linear.kernels.triton.gated_rmsnorm import forward

    return forward(x, None, weight, eps, "none", dtype=dtype)


def _rms_backward(x, weight, dy, eps, need_weight):
    from kimi_linear.kernels.triton.gated_rmsnorm import backward

    dx, _, dweight = backward(x, None, weight, dy, eps, "none", need_weight)
    return dx, dweight


def _rms_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _rms_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need_weight = ctx.needs_input_grad[1]
    dx, dweight = _RMS_NORM_BACKWARD(x, weight, dy, ctx.eps, need_weight)
    return dx, dweight if need_weight else None, None, None


def _gated_forward(x, gate, weight, eps, activation):
    from kimi_linear.kernels.triton.gated_rmsnorm import forward

    return forward(x, gate, weight, eps, activation)


def _gated_backward(x, gate, weight, dy, eps, activation, need_weight):
    from kimi_linear.kernels.triton.gated_rmsnorm import backward

    return backward(x, gate, weight, dy, eps, activation, need_weight)


def _gated_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gate, weight, ctx.eps, ctx.activation = inputs
    ctx.save_for_backward(x, gate, weight)


def _gated_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, gate, weight = ctx.saved_tensors
    need_weight = ctx.needs_input_grad[2]
    dx, dgate, dweight = _GATED_RMS_NORM_BACKWARD(x, gate, weight, dy, ctx.eps, ctx.activation, need_weight)
    return dx, dgate, dweight if need_weight else None, None, None


def _dense(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What every kernel here returns for an input like x: contiguous, whatever x's strides."""
    return x.new_empty(x.shape, dtype=dtype)


def _weight_or_nothing(weight: Tensor, needed: bool) -> Tensor:
    return weight.new_empty(weight.shape[0] if needed else 0)


_L2_NORMALIZE = define(
    "l2_normalize(Tensor x, float eps) -> Tensor",
    kernel=_l2_forward,
    fake=lambda x, eps: _dense(x),
    setup_context=_l2_save,
    backward=_l2_gradients,
)
_L2_NORMALIZE_BACKWARD = define(
    "l2_normalize_backward(Tensor x, Tensor dy, float eps) -> Tensor",
    kernel=_l2_backward,
    fake=lambda x, dy, eps: _dense(x),
)
_RMS_NORM = define(
    "rms_norm(Tensor x, Tensor weight, float eps, ScalarType? dtype=None) -> Tensor",
    kernel=_rms_forward,
    fake=lambda x, weight, eps, dtype=None: _dense(x, dtype),
    setup_context=_rms_save,
    backward=_rms_gradients,
)
_RMS_NORM_BACKWARD = define(
    "rms_norm_backward(Tensor x, Tensor weight, Tensor dy, float eps, bool need_weight) -> (Tensor, Tensor)",
    kernel=_rms_backward,
    fake=lambda x, weight, dy, eps, need_weight: (_dense(x), _weight_or_nothing(weight, need_weight)),
)
_GATED_RMS_NORM = define(
    "gated_rms_norm(Tensor x, Tensor gate, Tensor weight, float eps, str activation) -> Tensor",
    kernel=_gated_forward,
    fake=lambda x, gate, weight, eps, activation: _dense(x),
    setup_context=_gated_save,
    backward=_gated_gradients,
)
_GATED_RMS_NORM_BACKWARD = define(
    "gated_rms_norm_backward(Tensor x, Tensor gate, Tensor weight, Tensor dy, float eps, str activation, "
    "bool need_weight) -> (Tensor, Tensor, Tensor)",
    kernel=_gated_backward,
    fake=lambda x, gate, weight, dy, eps, activation, need_weight: (
        _dense(x),
        _dense(gate),
        _weight_or_nothing(weight, need_weight),
    ),
)
