"""The short causal convolution on q, k and v: depthwise, a few taps, with a state of the last inputs."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

from jaxtyping import Float, Int
from torch import Tensor

from kimi_linear.ops.validation import check_short_conv

ConvActivation: TypeAlias = Literal["silu", "none"]


class ConvOutput(NamedTuple):
    """Result of ``short_conv``.

    Attributes:
        output: [B, T, D], in the dtype of x.
        final_state: [N, D, W-1], in the dtype of x: the last W-1 inputs of each sequence, oldest first.
    """

    output: Tensor
    final_state: Tensor


def short_conv(
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "D W"],
    *,
    activation: ConvActivation = "silu",
    initial_state: Float[Tensor, "N D W-1"] | None = None,
    cu_seqlens: Int[Tensor, "N1"] | None = None,
) -> ConvOutput:
    """Causal depthwise convolution over the tokens of each sequence: ``y_t = sum_w weight[:, w] * x_{t-W+1+w}``.

    ``weight[:, -1]`` multiplies the current token, as in ``torch.nn.functional.conv1d`` with a weight [D, 1, W].
    Differentiable in x, weight and initial_state.

    Args:
        x: [B, T, D].
        weight: [D, W], W >= 1 taps.
        activation: applied to the result, "silu" or "none".
        initial_state: [N, D, W-1] inputs before the first token, oldest first; zero where None.
        cu_seqlens: [N+1] int32 or int64 offsets of packed sequences, with B == 1, which never see each other. Without
            it every batch row is a sequence, N == B.

    Returns:
        ``ConvOutput(output [B, T, D], final_state [N, D, W-1])``. A sequence shorter than W-1 keeps the newest part
        of its initial state; an empty one hands it through. 16-bit inputs are accumulated in fp32.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device, offset or activation.
    """
    check_short_conv(x, weight, activation, initial_state, cu_seqlens)
    from kimi_linear.kernels.torch.short_conv import short_conv as run

    return ConvOutput(*run(x, weight, activation == "silu", initial_state, cu_seqlens))
