"""Root-mean-square norms: plain, and followed by the output gate of a linear-attention head."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kimi_linear.ops.validation import check_gated_rms_norm, check_rms_norm

GateActivation: TypeAlias = Literal["sigmoid", "swish", "none"]


def rms_norm(x: Float[Tensor, "*shape D"], weight: Float[Tensor, "D"], eps: float) -> Float[Tensor, "*shape D"]:
    """``x * rsqrt(mean(x**2, -1) + eps) * weight``, computed in fp32 for 16-bit inputs and rounded once, in x's dtype.

    Args:
        x: [..., D], any floating dtype.
        weight: [D].
        eps: added to the mean of squares, >= 0.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device or eps.
    """
    check_rms_norm(x, weight, eps)
    if weight.dtype == x.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)


def gated_rms_norm(
    x: Float[Tensor, "*shape V"],
    gate: Float[Tensor, "*shape V"] | None,
    weight: Float[Tensor, "V"],
    eps: float,
    activation: GateActivation = "sigmoid",
) -> Float[Tensor, "*shape V"]:
    """``rms_norm(x, weight, eps) * activation(gate)``: the norm first, then the gate (arXiv 2510.26692, Eq. 10).

    Args:
        x: [..., V] outputs of the heads.
        gate: [..., V] raw projection, or None where ``activation`` is "none".
        weight: [V], shared by the heads.
        eps: added to the mean of squares, >= 0.
        activation: "sigmoid" as released, "swish" (``gate * sigmoid(gate)``), or "none".

    Returns:
        [..., V] in x's dtype; everything between is fp32 (fp64 for fp64 inputs) and rounded once.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device, eps or activation, a gate without an
            activation or the reverse.
    """
    check_gated_rms_norm(x, gate, weight, eps, activation)
    if gate is None:
        return rms_norm(x, weight, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps)
    gate = gate.to(wide)
    return (normed * (gate.sigmoid() if activation == "sigmoid" else F.silu(gate))).to(x.dtype)
