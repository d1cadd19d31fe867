"""What a layer does around its memory: one product for q, k and v, with the same numbers; and which implementation runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from kimi_linear.config import ModelConfig
from kimi_linear.model import KimiLinear, linear_mixer
from kimi_linear.model.linear_mixer import LinearMixer
from kimi_linear.testing.tolerances import assert_close


def first_layer() -> LinearMixer:
    layer = KimiLinear(ModelConfig.preset("tiny"), seed=0).double().blocks[0].self_attn
    assert isinstance(layer, LinearMixer)
    return layer


def test_joined_weights_give_the_same_numbers_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, results = first_layer(), []
    x = torch.randn(2, 20, 128, dtype=torch.float64)
    for limit in (0, 1 << 30):
        monkeypatch.setattr(linear_mixer, "FUSED_TOKENS", limit)
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        q, k, v, _ = layer.project(leaf)
        (q.square().sum() + k.sin().sum() + v.cos().sum()).backward()
        weights = (layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight)
        results.append([q, k, v, leaf.grad, *(w.grad for w in weights)])
    for joined, separate in zip(*results, strict=True):
        assert_close(joined.detach(), separate.detach(), "joined")


def test_a_replaced_projection_runs_its_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner, self.weight = inner, inner.weight

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    monkeypatch.setattr(linear_mixer, "FUSED_TOKENS", 0)
    layer, x = first_layer(), torch.randn(1, 8, 128, dtype=torch.float64)
    layer.q_proj = Doubled(layer.q_proj)  # type: ignore[assignment]
    doubled = layer.project(x)[0]
    layer.q_proj = layer.q_proj.inner  # type: ignore[assignment]
    with torch.no_grad():
        layer.q_proj.weight.mul_(2)
    assert_close(doubled.detach(), layer.project(x)[0].detach(), "doubled")


def test_an_explicit_implementation_reaches_the_convolution_and_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch is their specification, so "reference" asks for that."""
    layer, x = first_layer(), torch.randn(1, 8, 128, dtype=torch.float64)
    asked: list[str] = []

    def watched(run: Callable[..., object], *args: object, impl: str = "auto", **named: object) -> object:
        asked.append(impl)
        return run(*args, impl=impl, **named)

    for name in ("short_conv", "gated_rms_norm"):
        monkeypatch.setattr(linear_mixer, name, partial(watched, getattr(linear_mixer, name)))
    for impl in ("auto", "torch", "reference"):
        layer.impl = impl
        layer(x)
    assert asked == ["auto", "auto", "torch", "torch", "torch", "torch"]
    layer.impl = "triton"
    with pytest.raises(ValueError, match="short_conv with 'triton' expected CUDA tensors, got cpu"):
        layer(x)
