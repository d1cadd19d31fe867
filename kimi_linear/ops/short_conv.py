"""The short causal convolution on q, k and v: depthwise, a few taps, with a state of the last inputs."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

from jaxtyping import Float, Int
from torch import Tensor

from kimi_linear.ops.contract import Impl
from kimi_linear.ops.dispatch import choose_impl, row_facts
from kimi_linear.ops.library import define
from kimi_linear.ops.validation import check_short_conv, check_widths

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
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "D W"],
    widths: tuple[int, int, int],
    *,
    bias: Float[Tensor, "D"] | None = None,
    activation: ConvActivation = "silu",
    initial_state: Float[Tensor, "N D W-1"] | None = None,
    cu_seqlens: Int[Tensor, "N1"] | None = None,
    impl: Impl = "auto",
) -> QKVConvOutput:
    """``short_conv`` of a fused projection, its channels handed out as q, k and v.

    The same numbers as ``short_conv(...).output.split(widths, -1)``. On a GPU it is one launch whose three outputs are
    dense, and whose backward reads three gradients and writes one: autograd of ``split`` would join them first.

    Args:
        x: [B, T, Dq+Dk+Dv] channels of q, k and v, in this order.
        weight: [Dq+Dk+Dv, W]; bias, activation, initial_state, cu_seqlens, impl: as for ``short_conv``.
        widths: (Dq, Dk, Dv).

    Returns:
        ``QKVConvOutput(q [B, T, Dq], k [B, T, Dk], v [B, T, Dv], final_state [N, Dq+Dk+Dv, W-1])``.

    Raises:
        TypeError, ValueError: as ``short_conv``; also for widths that do not add up to x's.
    """
    check_short_conv(x, weight, activation, initial_state, cu_seqlens, bias)
    check_widths("widths", widths, x)
    choice = choose_impl(row_facts("short_conv", x, taps=weight.shape[1]), impl)
    if choice.impl == "triton":
        silu = activation == "silu"
        return QKVConvOutput(*_SHORT_CONV_QKV(x, weight, bias, initial_state, cu_seqlens, silu, widths[0], widths[1]))
    from kimi_linear.kernels.torch.short_conv import short_conv as run

    output, final_state = run(x, weight, activation == "silu", initial_state, cu_seqlens, bias)
    q, k, v = output.split(widths, dim=-1)
    return QKVConvOutput(q, k, v, final_state)


# The operators. Arguments: x, weight, bias, initial_state, cu_seqlens, silu (, q's and k's width).


def _forward(x, weight, bias, state, cu_seqlens, silu):
    from kimi_linear.kernels.triton.short_conv import forward

    (output,), final_state = forward(x, weight, bias, state, cu_seqlens, silu, (x.shape[2],))
    return output, final_state


def _forward_qkv(x, weight, bias, state, cu_seqlens, silu, q_width, k_width):
    from kimi_linear.kernels.triton.short_conv import forward

    widths = (q_width, k_width, x.shape[2] - q_width - k_width)
    outputs, final_state = forward(x, weight, bias, state, cu_seqlens, silu, widths)
    return *outputs, final_state


def _backward(x, weight, bias, state, cu_seqlens, silu, d_final_state, *d_outputs):
    from kimi_linear.kernels.triton.short_conv import backward

    return backward(x, weight, bias, state, cu_seqlens, d_outputs, d_final_state, silu)


def _fake_final_state(x, weight, cu_seqlens):
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(sequences, x.shape[2], weight.shape[1] - 1)


def _fake_forward(x, weight, bias, state, cu_seqlens, silu):
    return x.new_empty(x.shape), _fake_final_state(x, weight, cu_seqlens)


def _fake_forward_qkv(x, weight, bias, state, cu_seqlens, silu, q_width, k_width):
    widths = (q_width, k_width, x.shape[2] - q_width - k_width)
    outputs = (x.new_empty(*x.shape[:2], width) for width in widths)
    return *outputs, _fake_final_state(x, weight, cu_seqlens)


def _fake_backward(x, weight, bias, state, cu_seqlens, silu, d_final_state, *d_outputs):
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    dstate = x.new_empty(0) if state is None else state.new_empty(state.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dstate


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, state, cu_seqlens, ctx.silu, *widths = inputs
    ctx.set_materialize_grads(False)
    ctx.widths = [*widths, x.shape[2] - sum(widths)]
    ctx.save_for_backward(x, weight, bias, state, cu_seqlens)


def _gradients(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Those of x, weight, bias, initial_state, and None for what is no tensor of numbers."""
    x, weight, bias, state, cu_seqlens = ctx.saved_tensors
    *d_outputs, d_final_state = gradients
    d_outputs = [
        x.new_zeros(*x.shape[:2], width) if d is None else d for d, width in zip(d_outputs, ctx.widths, strict=True)
    ]
    run = _SHORT_CONV_BACKWARD if len(d_outputs) == 1 else _SHORT_CONV_QKV_BACKWARD
    dx, dweight, dbias, dstate = run(x, weight, bias, state, cu_seqlens, ctx.silu, d_final_state, *d_outputs)
    nothing = (None,) * len(ctx.widths)  # cu_seqlens, silu, and two widths where there are three parts
    return dx, dweight, None if bias is None else dbias, None if state is None else dstate, None, *nothing


_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, bool silu"
_INPUT_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor)"
_SHORT_CONV_BACKWARD = define(
    f"short_conv_backward({_INPUTS}, Tensor? d_final_state, Tensor d_output) -> {_INPUT_GRADIENTS}",
    kernel=_backward,
    fake=_fake_backward,
)
_SHORT_CONV_QKV_BACKWARD = define(
    f"short_conv_qkv_backward({_INPUTS}, Tensor? d_final_state, Tensor dq, Tensor dk, Tensor dv) -> {_INPUT_GRADIENTS}",
    kernel=_backward,
    fake=_fake_backward,
)
_SHORT_CONV = define(
    f"short_conv({_INPUTS}) -> (Tensor, Tensor)",
    kernel=_forward,
    fake=_fake_forward,
    setup_context=_save,
    backward=_gradients,
)
_SHORT_CONV_QKV = define(
    f"short_conv_qkv({_INPUTS}, SymInt q_width, SymInt k_width) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_forward_qkv,
    fake=_fake_forward_qkv,
    setup_context=_save,
    backward=_gradients,
)
