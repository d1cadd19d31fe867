"""Whether tensors are like those of an earlier call: shapes, strides, dtypes, devices, and whether they require a gradient.

An operation of a few microseconds cannot afford to check its arguments at every call: asking seventeen tensors for their
shape from Python costs more than the kernel. torch has the comparison in C++, for the guards of its compiler; where a
version of torch has it no longer, Python compares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None


def likeness(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A function of as many tensors: are they like ``tensors``? It keeps none of them alive. Grad mode is not looked at."""
    if TensorGuards is None:
        return _compared(tensors)
    guards: Any = TensorGuards  # whose stub has flat lists
    sizes, strides = [list(x.shape) for x in tensors], [list(x.stride()) for x in tensors]
    check: Callable[..., bool] = guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    return check


def _compared(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    known = [_facts(x) for x in tensors]
    return lambda *others: [_facts(x) for x in others] == known


def _facts(x: object) -> tuple[object, ...]:
    if not isinstance(x, Tensor):
        return (type(x),)
    return type(x), x.shape, x.stride(), x.dtype, x.device, x.requires_grad, x.is_inference()
