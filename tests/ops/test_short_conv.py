"""The short convolution against torch's own in fp64, with state, packed, and in low precision."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.kernels.torch import short_conv as kernel
from kimi_linear.ops import short_conv, short_conv_qkv
from kimi_linear.testing.tolerances import assert_close_to_reference

F64 = torch.float64


def formula(x: Tensor, weight: Tensor, silu: bool, state: Tensor | None = None) -> Tensor:
    """torch's depthwise convolution over [history, x]."""
    taps = weight.shape[1]
    state = x.new_zeros(x.shape[0], x.shape[2], taps - 1) if state is None else state
    y = F.conv1d(torch.cat([state, x.mT], dim=-1), weight[:, None], groups=x.shape[2]).mT
    return F.silu(y) if silu else y


@pytest.mark.parametrize("taps", [1, 2, 4, 5])
@pytest.mark.parametrize("tokens", [1, 2, 37])
def test_equals_conv1d_on_history_and_input(taps: int, tokens: int) -> None:
    x, weight = torch.randn(2, tokens, 6, dtype=F64), torch.randn(6, taps, dtype=F64)
    state = torch.randn(2, 6, taps - 1, dtype=F64)
    for activation in ("silu", "none"):
        out = short_conv(x, weight, activation=activation, initial_state=state)
        torch.testing.assert_close(out.output, formula(x, weight, activation == "silu", state))
        seen = torch.cat([state, x.mT], dim=-1)
        assert torch.equal(out.final_state, seen[:, :, seen.shape[2] - taps + 1 :])
    torch.testing.assert_close(short_conv(x, weight).output, formula(x, weight, True))


def test_the_last_tap_is_the_current_token() -> None:
    x = torch.randn(1, 5, 1)
    weight = torch.tensor([[0.0, 0.0, 10.0, 1.0]])
    expected = x + 10 * F.pad(x, (0, 0, 1, 0))[:, :-1]
    torch.testing.assert_close(short_conv(x, weight, activation="none").output, expected)


def test_gradients_of_every_input() -> None:
    x, weight = torch.randn(2, 6, 3, dtype=F64, requires_grad=True), torch.randn(3, 4, dtype=F64, requires_grad=True)
    state = torch.randn(2, 3, 3, dtype=F64, requires_grad=True)
    for activation in ("silu", "none"):
        assert torch.autograd.gradcheck(
            lambda x, w, s, a=activation: short_conv(x, w, activation=a, initial_state=s),  # type: ignore[arg-type]
            (x, weight, state),
        )


def test_gradients_of_packed_sequences() -> None:
    x, weight = torch.randn(1, 7, 2, dtype=F64, requires_grad=True), torch.randn(2, 3, dtype=F64, requires_grad=True)
    state = torch.randn(4, 2, 2, dtype=F64, requires_grad=True)
    cu = torch.tensor([0, 1, 1, 5, 7])
    assert torch.autograd.gradcheck(
        lambda x, w, s: short_conv(x, w, initial_state=s, cu_seqlens=cu), (x, weight, state)
    )


def test_packed_sequences_equal_separate_ones() -> None:
    bounds = [0, 2, 2, 3, 20, 41]
    x, weight, state = torch.randn(1, 41, 8), torch.randn(8, 4), torch.randn(5, 8, 3)
    packed = short_conv(x, weight, initial_state=state, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        alone = short_conv(x[:, start:stop], weight, initial_state=state[i : i + 1])
        torch.testing.assert_close(packed.output[:, start:stop], alone.output)
        assert torch.equal(packed.final_state[i : i + 1], alone.final_state)
    assert torch.equal(packed.final_state[1], state[1])  # the empty one hands its state through


@pytest.mark.parametrize("cut", [0, 1, 3, 30])
def test_segments_with_carried_state_equal_the_whole(cut: int) -> None:
    x, weight = torch.randn(2, 30, 8), torch.randn(8, 4)
    whole = short_conv(x, weight)
    first = short_conv(x[:, :cut], weight)
    second = short_conv(x[:, cut:], weight, initial_state=first.final_state)
    torch.testing.assert_close(torch.cat([first.output, second.output], dim=1), whole.output)
    assert torch.equal(second.final_state, whole.final_state)


@pytest.mark.parametrize("elements", [1, 24, 100, 1 << 30])
def test_blocks_change_nothing(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(1)
        x, weight = torch.randn(3, 19, 8, requires_grad=True), torch.randn(8, 4, requires_grad=True)
        output = short_conv(x, weight).output
        return [output, *torch.autograd.grad(output.square().sum(), (x, weight))]

    expected = run()
    monkeypatch.setattr(kernel, "BLOCK_ELEMENTS", elements)
    for name, got, want in zip(("output", "dx", "dweight"), run(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_bf16_is_rounded_once() -> None:
    x, weight = torch.randn(2, 64, 16).bfloat16(), torch.randn(16, 4).bfloat16()
    out = short_conv(x, weight)
    assert out.output.dtype == out.final_state.dtype == torch.bfloat16
    exact = formula(x.double(), weight.double(), True)
    assert_close_to_reference(out.output, exact, formula(x.float(), weight.float(), True).bfloat16(), "output")


def test_no_token_at_all() -> None:
    state = torch.randn(2, 4, 3)
    out = short_conv(torch.zeros(2, 0, 4), torch.randn(4, 4), initial_state=state)
    assert out.output.shape == (2, 0, 4)
    assert torch.equal(out.final_state, state)
    packed = short_conv(
        torch.zeros(1, 0, 4), torch.randn(4, 4), initial_state=state, cu_seqlens=torch.zeros(3, dtype=torch.int32)
    )
    assert packed.output.shape == (1, 0, 4)
    assert torch.equal(packed.final_state, state)


def test_the_bias_comes_before_the_activation() -> None:
    x, weight, bias = torch.randn(2, 9, 6, dtype=F64), torch.randn(6, 4, dtype=F64), torch.randn(6, dtype=F64)
    for activation in ("silu", "none"):
        expected = formula(x, weight, False) + bias
        got = short_conv(x, weight, bias=bias, activation=activation).output
        torch.testing.assert_close(got, F.silu(expected) if activation == "silu" else expected)
        leaves = [leaf.clone().requires_grad_() for leaf in (x, weight, bias)]
        assert torch.autograd.gradcheck(
            lambda x, w, b, a=activation: short_conv(x, w, bias=b, activation=a).output,  # type: ignore[arg-type]
            leaves,
        )


@pytest.mark.parametrize("packed", [False, True])
def test_q_k_and_v_at_once_are_three_convolutions(packed: bool) -> None:
    widths, cu = (6, 4, 10), torch.tensor([0, 3, 3, 12]) if packed else None
    sequences = 3 if packed else 2
    batch = 1 if packed else 2
    parts = [torch.randn(batch, 12, width, dtype=F64, requires_grad=True) for width in widths]
    weights = tuple(torch.randn(width, 4, dtype=F64, requires_grad=True) for width in widths)
    state = torch.randn(sequences, sum(widths), 3, dtype=F64, requires_grad=True)
    *together, final = short_conv_qkv(*parts, weights, initial_state=state, cu_seqlens=cu)
    separate = [
        short_conv(x, w, initial_state=s, cu_seqlens=cu)
        for x, w, s in zip(parts, weights, state.split(widths, dim=1), strict=True)
    ]
    for got, expected in zip(together, separate, strict=True):
        torch.testing.assert_close(got, expected.output)
    assert torch.equal(final, torch.cat([out.final_state for out in separate], dim=1))
    leaves = [*parts, *weights, state]
    sent = [torch.randn_like(y) for y in (*together, final)]
    finals = torch.cat([out.final_state for out in separate], dim=1)
    expected = torch.autograd.grad([*(out.output for out in separate), finals], leaves, sent)
    for got, want in zip(torch.autograd.grad([*together, final], leaves, sent), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.unchecked_shapes
def test_bad_input() -> None:
    x, weight = torch.zeros(2, 5, 4), torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"bias: expected shape \[4\] \(D\), got \[3\]"):
        short_conv(x, weight, bias=torch.zeros(3))
    with pytest.raises(ValueError, match=r"k: expected shape \[2, 5, 4\].*as q\), got \[2, 6, 4\]"):
        short_conv_qkv(x, torch.zeros(2, 6, 4), x, (weight, weight, weight))
    with pytest.raises(ValueError, match=r"weights \(v\): expected shape \[4, 3\].*got \[4, 2\]"):
        short_conv_qkv(x, x, x, (weight, weight, weight[:, :2]))
    with pytest.raises(TypeError, match=r"v: expected torch\.float32, as q, got torch\.float64"):
        short_conv_qkv(x, x, x.double(), (weight, weight, weight))
    with pytest.raises(
        ValueError, match=r"initial_state: expected shape \[2, 12, 2\] \(N, Dq\+Dk\+Dv, W-1\), got \[2, 4, 2\]"
    ):
        short_conv_qkv(x, x, x, (weight, weight, weight), initial_state=torch.zeros(2, 4, 2))
    with pytest.raises(ValueError, match=r"weight: expected shape \[4, W\].*got \[4, 1, 3\].*squeeze"):
        short_conv(x, weight[:, None])
    with pytest.raises(ValueError, match=r"activation: expected one of silu, none, got 'relu'"):
        short_conv(x, weight, activation="relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"initial_state: expected shape \[2, 4, 2\] \(N, D, W-1\), got \[2, 2, 4\]"):
        short_conv(x, weight, initial_state=torch.zeros(2, 2, 4))
    with pytest.raises(ValueError, match="packed sequences need B == 1, got B == 2"):
        short_conv(x, weight, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(TypeError, match=r"x: expected one of float64.*got torch\.int64"):
        short_conv(x.long(), weight)
