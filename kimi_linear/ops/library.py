"""How an operation that a Triton kernel computes becomes an operator of torch: schema, fake kernel, gradient.

``define`` registers all three when an ``ops`` file is imported, with torch alone. The kernel is a function that imports
its Triton file inside its body, so that a machine without triton imports everything, ``torch.compile(fullgraph=True)``
sees one opaque node with known shapes, and a CUDA graph records the launches.

    def _double(x: Tensor) -> Tensor:
        from kimi_linear.kernels.triton.double import double as run

        return run(x)

    DOUBLE = define("double(Tensor x) -> Tensor", kernel=_double, fake=torch.empty_like, backward=...)

Public operations validate, choose an implementation, and call the operator where the choice is "triton".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

NAMESPACE = "kimi_linear"
Operator: TypeAlias = Callable[..., Any]


def define(
    schema: str,
    *,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    rehearse: Callable[..., object] | None = None,
) -> Operator:
    """Register ``torch.ops.kimi_linear.<name>`` and return its overload, which is called by position.

    Args:
        schema: ``name(Tensor x, ...) -> (Tensor, ...)`` in torch's schema language. The first argument is a tensor, the
            one whose device the kernel runs on. Outputs are new tensors that alias neither the inputs nor each other.
        kernel: computes it, on CUDA tensors, or on CPU tensors under Triton's interpreter. It receives the arguments in
            the schema's order and returns what the schema says.
        fake: the same for shapes, dtypes and strides alone.
        setup_context: ``(ctx, inputs, output) -> None``, what ``backward`` will need; see
            ``torch.library.register_autograd``. Only with ``backward``.
        backward: ``(ctx, *gradients)`` to the gradients of the inputs, by calling another operator. Without one, asking
            for a gradient raises.
        rehearse: for an operation of many Triton kernels, what runs without launching anything, so that a first call finds out
            what to compile: ``kernel``, or more where more will be needed soon. See kernels/triton/compile_ahead.py.

    Returns:
        The overload ``torch.ops.kimi_linear.<name>.default``.
    """
    name = schema.partition("(")[0]
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema.removeprefix(name), tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, ("cpu", "cuda"), _on_device(name, kernel, rehearse))
    torch.library.register_fake(qualified, fake)
    torch.library.register_autograd(qualified, backward or _no_gradient(name), setup_context=setup_context)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _on_device(name: str, kernel: Callable[..., Any], rehearse: Callable[..., object] | None) -> Callable[..., Any]:
    """``kernel`` with the device of its first argument current, which is the device that Triton launches on."""

    def run(x: Tensor, *rest: Any) -> Any:
        if x.is_cuda:
            with torch.cuda.device(x.device):
                if rehearse is None:
                    return kernel(x, *rest)
                from kimi_linear.kernels.triton.compile_ahead import call

                return call(name, kernel, rehearse, (x, *rest))
        if not interpreted():
            raise RuntimeError(
                f"{NAMESPACE}::{name}: expected CUDA tensors, got {x.device}; kimi_linear.ops with impl='auto' takes any "
                "device, and Triton's interpreter (TRITON_INTERPRET=1, set before anything is imported) takes CPU tensors"
            )
        return kernel(x, *rest)

    return run


def _no_gradient(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            f"{NAMESPACE}::{name} has no derivative, since the operations are differentiable once; a second derivative needs "
            "impl='reference', where there is one"
        )

    return backward


def interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, for tests."""
    from triton import knobs

    return bool(knobs.runtime.interpret)
