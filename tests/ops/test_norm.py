"""The norms against their formula in fp64; low precision is computed in fp32 and rounded once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kimi_linear.ops import gated_rms_norm, l2_normalize, rms_norm
from kimi_linear.testing.tolerances import assert_close, assert_close_to_reference

EPS = 1e-5


def formula(x: Tensor, weight: Tensor, gate: Tensor | None = None, *, activation: str = "sigmoid") -> Tensor:
    y = x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight
    if gate is None:
        return y
    swish = gate if activation == "swish" else 1.0
    return y * swish / (1 + torch.exp(-gate))


def test_norm_is_its_formula() -> None:
    x, weight = torch.randn(3, 5, 16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    x[0, 0] = 1e-4  # eps counts here
    x[0, 1] = 0
    assert_close(rms_norm(x, weight, EPS), formula(x, weight), "rms_norm")


@pytest.mark.parametrize("activation", ["sigmoid", "swish"])
def test_gate_comes_after_the_norm(activation: str) -> None:
    x, gate = torch.randn(2, 3, 4, 16, dtype=torch.float64), torch.randn(2, 3, 4, 16, dtype=torch.float64)
    weight = torch.randn(16, dtype=torch.float64)
    got = gated_rms_norm(x, gate, weight, EPS, activation)  # type: ignore[arg-type]
    assert_close(got, formula(x, weight, gate, activation=activation), activation)
    assert torch.equal(gated_rms_norm(x, None, weight, EPS, "none"), rms_norm(x, weight, EPS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_low_precision_is_as_exact_as_fp32_rounded_once(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x, gate = (torch.randn(64, 128).to(dtype) for _ in range(2))
    weight = (1 + 0.1 * torch.randn(128)).to(weight_dtype)
    for name, got, parts in (
        ("rms_norm", rms_norm(x, weight, EPS), (x, weight)),
        ("gated", gated_rms_norm(x, gate, weight, EPS), (x, weight, gate)),
    ):
        assert got.dtype == dtype
        exact, plain = formula(*(p.double() for p in parts)), formula(*(p.float() for p in parts)).to(dtype)
        # One rounding and no more: not twice the error, as two roundings would be.
        assert_close_to_reference(got, exact, plain, name, factor=1.05 if dtype == torch.bfloat16 else 2.0)


def test_a_norm_rounds_as_a_cast_after_it_would() -> None:
    x, weight, sent = torch.randn(64, 128), 1 + 0.1 * torch.randn(128), torch.randn(64, 128).bfloat16()
    leaves = (x.requires_grad_(), weight.requires_grad_())
    narrow, wide = rms_norm(*leaves, EPS, dtype=torch.bfloat16), rms_norm(*leaves, EPS)
    assert torch.equal(narrow, wide.bfloat16())
    gradients = [torch.autograd.grad(y, leaves, sent.to(y.dtype)) for y in (narrow, wide)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    with pytest.raises(TypeError, match=r"dtype: expected a floating dtype or None, got torch\.int32"):
        rms_norm(*leaves, EPS, dtype=torch.int32)


def test_large_values_do_not_overflow_the_variance() -> None:
    x = torch.full((1, 8), 300.0, dtype=torch.float16)  # 300**2 is above fp16's 65504
    torch.testing.assert_close(rms_norm(x, torch.ones(8, dtype=torch.float16), EPS), torch.ones_like(x))


def test_gradients() -> None:
    x, gate = (torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (x, weight))
    for activation in ("sigmoid", "swish"):
        assert torch.autograd.gradcheck(
            lambda x, g, w, a=activation: gated_rms_norm(x, g, w, EPS, a),  # type: ignore[arg-type]
            (x, gate, weight),
        )


def test_unit_length() -> None:
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    x[0, 0] = 0
    assert_close(l2_normalize(x, EPS), x / (x.pow(2).sum(-1, keepdim=True) + EPS).sqrt(), "l2_normalize")
    assert torch.autograd.gradcheck(lambda x: l2_normalize(x, EPS), (x.requires_grad_(),))


def test_no_token_at_all() -> None:
    assert rms_norm(torch.zeros(2, 0, 4), torch.ones(4), EPS).shape == (2, 0, 4)
    assert gated_rms_norm(torch.zeros(0, 4), torch.zeros(0, 4), torch.ones(4), EPS).shape == (0, 4)


@pytest.mark.unchecked_shapes
def test_bad_input() -> None:
    x, weight = torch.zeros(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"weight: expected shape \[4\].*got \[3\]"):
        rms_norm(x, torch.ones(3), EPS)
    with pytest.raises(ValueError, match="eps: expected a number >= 0, got nan"):
        rms_norm(x, weight, float("nan"))
    with pytest.raises(ValueError, match="gate: expected a tensor with activation='sigmoid', got None"):
        gated_rms_norm(x, None, weight, EPS)
    with pytest.raises(ValueError, match="gate: expected None with activation='none', got a tensor"):
        gated_rms_norm(x, x, weight, EPS, "none")
    with pytest.raises(ValueError, match=r"gate: expected shape \[2, 4\].*got \[4\]"):
        gated_rms_norm(x, weight, weight, EPS)
    with pytest.raises(ValueError, match="activation: expected one of sigmoid, swish, none, got 'gelu'"):
        gated_rms_norm(x, x, weight, EPS, "gelu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="eps: expected a number >= 0, got -1"):
        l2_normalize(x, -1)
    with pytest.raises(ValueError, match=r"x: expected shape \[\.\.\., D\], got a number"):
        l2_normalize(torch.tensor(1.0))
