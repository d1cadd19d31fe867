"""The piecewise loss equals torch's, in value and gradient, and never holds all logits."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kimi_linear.training import linear_cross_entropy


def make(tokens=50, width=8, vocab=33, dtype=torch.float64):
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, width, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocab, (tokens,))
    targets[::3] = -100
    return hidden, weight, targets


def gradients(loss, *inputs):
    return torch.autograd.grad(3.0 * loss, inputs)


@pytest.mark.parametrize("max_logits", [1, 33 * 7, 33 * 49, 1 << 20])
def test_equals_cross_entropy(max_logits):
    hidden, weight, targets = make()
    ours = linear_cross_entropy(hidden, weight, targets, max_logits=max_logits)
    expected = F.cross_entropy(hidden @ weight.T, targets)
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=0)
    for a, b in zip(gradients(ours, hidden, weight), gradients(expected, hidden, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-15)


def test_extreme_logits_stay_finite():
    hidden, weight, targets = make(dtype=torch.float32)
    scaled = (hidden * 1e4).detach().requires_grad_()
    ours = linear_cross_entropy(scaled, weight, targets, max_logits=33 * 5)
    torch.testing.assert_close(ours, F.cross_entropy(scaled @ weight.T, targets))
    assert all(torch.isfinite(g).all() for g in gradients(ours, scaled, weight))


def test_nothing_scored_is_zero():
    hidden, weight, targets = make()
    for max_logits in (33, 1 << 20):
        loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100), max_logits=max_logits)
        assert loss.item() == 0
        assert all(not g.any() for g in gradients(loss, hidden, weight))


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, targets = make()
    loss = linear_cross_entropy(hidden, weight.detach(), targets, max_logits=33)
    (ours,) = gradients(loss, hidden)
    (expected,) = gradients(F.cross_entropy(hidden @ weight.detach().T, targets), hidden)
    torch.testing.assert_close(ours, expected)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets, max_logits=33).requires_grad


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_logits_are_never_all_alive():
    hidden, weight, targets = make(tokens=400, vocab=100)
    with Largest() as pieces:
        linear_cross_entropy(hidden, weight, targets, max_logits=1000).backward()
    # The largest are now the gradient of the hidden states and the logits of ten tokens.
    assert pieces.numel == 400 * 8
    with Largest() as whole:
        linear_cross_entropy(hidden, weight, targets).backward()
    assert whole.numel == 400 * 100


def test_autocast_runs_in_bf16_and_sums_in_fp32():
    hidden, weight, targets = make(tokens=300, dtype=torch.float32)
    exact = F.cross_entropy(hidden @ weight.T, targets)
    exact_grads = gradients(exact, hidden, weight)
    with torch.autocast("cpu", torch.bfloat16):
        whole = linear_cross_entropy(hidden, weight, targets)
        pieces = linear_cross_entropy(hidden, weight, targets, max_logits=33 * 16)
    assert pieces.dtype == torch.float32
    for loss in (whole, pieces):
        assert abs(loss - exact) / exact < 2**-8
        for ours, expected in zip(gradients(loss, hidden, weight), exact_grads, strict=True):
            assert ours.dtype == torch.float32
            # Two roundings of relative size 2**-9 each, in the products' inputs and in the slopes.
            assert (ours - expected).norm() / expected.norm() < 2**-6
