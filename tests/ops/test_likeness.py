"""Tensors like those of an earlier call: everything that a check or a kernel depends on is noticed, in C++ and in Python."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kimi_linear.ops.likeness import _compared, likeness

CHANGES: dict[str, Callable[[Tensor], object]] = {
    "shape": lambda x: x[:, :3],
    "shape of as many numbers": lambda x: x.view(3, 8),
    "stride": lambda x: x.t().contiguous().t(),
    "dtype": lambda x: x.to(torch.bfloat16),
    "device": lambda x: x.to("meta"),
    "gradient": lambda x: x.clone().requires_grad_(),
    "no tensor": lambda x: None,
}


@pytest.mark.parametrize("make", [likeness, _compared])
def test_what_a_kernel_depends_on_is_noticed(make: Callable[..., Callable[..., bool]]) -> None:
    first, second = torch.randn(4, 6), torch.arange(3)
    alike = make([first, second])
    assert alike(first, second)
    assert alike(torch.zeros(4, 6), torch.zeros(3, dtype=torch.int64))
    for name, change in CHANGES.items():
        assert not alike(change(first), second), name


@pytest.mark.parametrize("make", [likeness, _compared])
def test_a_tensor_that_changed_in_place_is_noticed(make: Callable[..., Callable[..., bool]]) -> None:
    x = torch.randn(4, 6)
    alike = make([x])
    x.t_()
    assert not alike(x)
