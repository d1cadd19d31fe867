"""The short causal convolution on q, k and v: depthwise, a few taps, with a state of the last inputs."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kimi_linear.ops.contract import Impl
from kimi_linear.ops.dispatch import choose_impl, row_facts
from kimi_linear.ops.library import define
from kimi_linear.ops.validation import check_short_conv, check_short_conv_qkv

ConvActivation: TypeAlias = Literal["silu", "none"]


class ConvOutput(NamedTuple):
    """Result of ``short_conv``.

    Attributes:
        output: [B, T, D], in the dtype of x.
        final_state: [N, D, W-1], in the dtype of x: the last W-1 inputs of each sequence, oldest first.
    """

    output: Tensor
    final_state: Tensor


class QKVConvOutput(NamedTuple):
    """Result of ``short_conv_qkv``.

    Attributes:
        q, k, v: [B, T, Dq], [B, T, Dk] and [B, T, Dv], in the dtype of x.
        final_state: [N, Dq+Dk+Dv, W-1], as that of ``short_conv``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    final_state: Tensor


def short_conv(
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "D W"],
    *,
    bias: Float[Tensor, "D"] | None = None,
    activation: ConvActivation = "silu",
    initial_state: Float[Tensor, "N D W-1"] | None = None,
    cu_seqlens: Int[Tensor, "N1"] | None = None,
    impl: Impl = "auto",
) -> ConvOutput:
    """Causal depthwise convolution over the tokens of each sequence: ``y_t = bias + sum_w weight[:, w] * x_{t-W+1+w}``.

    ``weight[:, -1]`` multiplies the current token, as in ``torch.nn.functional.conv1d`` with a weight [D, 1, W].
    Differentiable, once, in x, weight, bias and initial_state.

    Args:
        x: [B, T, D]. A slice of a fused projection is read where it lies.
        weight: [D, W], W >= 1 taps; the Triton kernel takes up to 8.
        bias: [D], added before the activation; none where None.
        activation: applied to the result, "silu" or "none".
        initial_state: [N, D, W-1] inputs before the first token, oldest first; zero where None.
        cu_seqlens: [N+1] int32 or int64 offsets of packed sequences, with B == 1, which never see each other. Without
            it every batch row is a sequence, N == B.
        impl: which implementation; "auto" takes the fastest exact one.

    Returns:
        ``ConvOutput(output [B, T, D], final_state [N, D, W-1])``. A sequence shorter than W-1 keeps the newest part
        of its initial state; an empty one hands it through. 16-bit inputs are accumulated in fp32.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device, offset, activation or implementation.
    """
    check_short_conv(x, weight, activation, initial_state, cu_seqlens, bias)
    choice = choose_impl(row_facts("short_conv", x, taps=weight.shape[1]), impl)
    if choice.impl == "triton":
        return ConvOutput(*_SHORT_CONV(x, weight, bias, initial_state, cu_seqlens, activation == "silu"))
    from kimi_linear.kernels.torch.short_conv import short_conv as run

    return ConvOutput(*run(x, weight, activation == "silu", initial_state, cu_seqlens, bias))


def short_conv_qkv(
    q: Float[Tensor, "B T Dq"],
    k: Float[Tensor, "B T Dk"],
    v: Float[Tensor, "B T Dv"],
    weights: tuple[Float[Tensor, "Dq W"], Float[Tensor, "Dk W"], Float[Tensor, "Dv W"]],
    *,
    activation: ConvActivation = "silu",
    initial_state: Float[Tensor, "N D W-1"] | None = None,
    cu_seqlens: Int[Tensor, "N1"] | None = None,
    impl: Impl = "auto",
) -> QKVConvOutput:
    """``short_conv`` of the three projections of a layer at once: the numbers are those of three calls.

    On a GPU it is one launch forward and one backward, and no tensor is joined or split. Differentiable, once.

    Args:
        q: [B, T, Dq]; k: [B, T, Dk]; v: [B, T, Dv]: of one dtype. Slices of a fused projection are read where they lie.
        weights: taps of q [Dq, W], k [Dk, W] and v [Dv, W], of one dtype.
        activation, cu_seqlens, impl: as for ``short_conv``.
        initial_state: [N, Dq+Dk+Dv, W-1], the channels of q, k and v in this order; zero where None.

    Returns:
        ``QKVConvOutput(q [B, T, Dq], k [B, T, Dk], v [B, T, Dv], final_state [N, Dq+Dk+Dv, W-1])``.

    Raises:
        TypeError, ValueError: as ``short_conv``; also for parts whose batch, tokens, dtypes or taps differ.
    """
    check_short_conv_qkv((q, k, v), weights, activation, initial_state, cu_seqlens)
    choice = choose_impl(row_facts("short_conv", q, taps=weights[0].shape[1]), impl)
    if choice.impl == "triton":
        return QKVConvOutput(*_SHORT_CONV_QKV(q, k, v, *weights, initial_state, cu_seqlens, activation == "silu"))
    from kimi_linear.kernels.torch.short_conv import short_conv as run

    x = torch.cat([q, k, v], dim=-1)
    output, final_state = run(x, torch.cat(weights), activation == "silu", initial_state, cu_seqlens)
    q, k, v = output.split([q.shape[2], k.shape[2], v.shape[2]], dim=-1)
    return QKVConvOutput(q, k, v, final_state)


# The operators: one tensor of channels, with an optional bias.


def _forward(x, weight, bias, state, cu_seqlens, silu):
    from kimi_linear.kernels.triton.short_conv import forward

    (output,), final_state = forward([x], [weight], bias, state, cu_seqlens, silu)
    return output, final_state


def _backward(x, weight, bias, state, cu_seqlens, silu, d_output, d_final_state):
    from kimi_linear.kernels.triton.short_conv import backward

    (dx,), *others = backward([x], [weight], bias, state, cu_seqlens, [d_output], d_final_state, silu)
    return dx, *others


def _fake_forward(x, weight, bias, state, cu_seqlens, silu):
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(sequences, x.shape[2], weight.shape[1] - 1)


def _fake_backward(x, weight, bias, state, cu_seqlens, silu, d_output, d_final_state):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), _like(bias, x), _like(state, x)


def _like(optional: Tensor | None, x: Tensor) -> Tensor:
    """The gradient of an optional input: dense, or empty where there was none."""
    return x.new_empty(0) if optional is None else optional.new_empty(optional.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.silu = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, d_output: Tensor | None, d_final_state: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, state, cu_seqlens = ctx.saved_tensors
    d_output = torch.zeros_like(x) if d_output is None else d_output
    dx, dweight, dbias, dstate = _SHORT_CONV_BACKWARD(
        x, weight, bias, state, cu_seqlens, ctx.silu, d_output, d_final_state
    )
    return dx, dweight, None if bias is None else dbias, None if state is None else dstate, None, None


_SHORT_CONV_BACKWARD = define(
    "short_conv_backward(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, bool silu, "
    "Tensor d_output, Tensor? d_final_state) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_backward,
    fake=_fake_backward,
)
_SHORT_CONV = define(
    "short_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, bool silu) "
    "-> (Tensor, Tensor)",
    kernel=_forward,
    fake=_fake_forward,
    setup_context=_save,
    backward=_gradients,
)

# The operators: q, k and v.


def _forward_qkv(q, k, v, q_weight, k_weight, v_weight, state, cu_seqlens, silu):
    from kimi_linear.kernels.triton.short_conv import forward

    outputs, final_state = forward([q, k, v], [q_weight, k_weight, v_weight], None, state, cu_seqlens, silu)
    return *outputs, final_state


def _backward_qkv(q, k, v, q_weight, k_weight, v_weight, state, cu_seqlens, silu, dq, dk, dv, d_final_state):
    from kimi_linear.kernels.triton.short_conv import backward

    weights = [q_weight, k_weight, v_weight]
    dxs, dweight, _, dstate = backward([q, k, v], weights, None, state, cu_seqlens, [dq, dk, dv], d_final_state, silu)
    return *dxs, dweight, dstate


def _fake_forward_qkv(q, k, v, q_weight, k_weight, v_weight, state, cu_seqlens, silu):
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    width, taps = q.shape[2] + k.shape[2] + v.shape[2], q_weight.shape[1]
    return *(x.new_empty(x.shape) for x in (q, k, v)), q.new_empty(sequences, width, taps - 1)


def _fake_backward_qkv(q, k, v, q_weight, k_weight, v_weight, state, cu_seqlens, silu, dq, dk, dv, d_final_state):
    width, taps = q.shape[2] + k.shape[2] + v.shape[2], q_weight.shape[1]
    return *(x.new_empty(x.shape) for x in (q, k, v)), q_weight.new_empty(width, taps), _like(state, q)


def _gradients_qkv(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    *saved, state, cu_seqlens = ctx.saved_tensors
    xs, weights = saved[:3], saved[3:]
    dys = [torch.zeros_like(x) if dy is None else dy for x, dy in zip(xs, gradients[:3], strict=True)]
    *dxs, dweight, dstate = _SHORT_CONV_QKV_BACKWARD(*xs, *weights, state, cu_seqlens, ctx.silu, *dys, gradients[3])
    dweights = dweight.split([x.shape[2] for x in xs])
    return *dxs, *dweights, None if state is None else dstate, None, None


_QKV_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor q_weight, Tensor k_weight, Tensor v_weight, Tensor? initial_state, "
    "Tensor? cu_seqlens, bool silu"
)
_SHORT_CONV_QKV_BACKWARD = define(
    f"short_conv_qkv_backward({_QKV_INPUTS}, Tensor dq, Tensor dk, Tensor dv, Tensor? d_final_state) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_backward_qkv,
    fake=_fake_backward_qkv,
)
_SHORT_CONV_QKV = define(
    f"short_conv_qkv({_QKV_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_forward_qkv,
    fake=_fake_forward_qkv,
    setup_context=_save,
    backward=_gradients_qkv,
)
