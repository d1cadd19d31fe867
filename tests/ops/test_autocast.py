"""Inside ``torch.autocast`` the memory keeps its precision, and products take autocast's dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kimi_linear import ops
from kimi_linear.ops import Routing


def inputs(dtype: torch.dtype) -> list[Tensor]:
    q, k, v = (torch.randn(1, 70, 2, 8).to(dtype) for _ in range(3))
    return [q, k, v, -torch.rand(1, 70, 2), torch.rand(1, 70, 2)]


@pytest.mark.parametrize(
    "name", ["chunk_kda", "recurrent_kda", "chunk_gdn", "recurrent_gdn", "chunk_mamba2", "recurrent_mamba2"]
)
@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_memory_is_the_same_inside_and_outside(name: str, impl: str, dtype: torch.dtype) -> None:
    op: Callable[..., ops.KDAOutput] = getattr(ops, name)
    arguments = inputs(dtype)[: 4 if "mamba2" in name else 5]
    if "kda" in name:
        arguments[3] = arguments[3][..., None].expand(-1, -1, -1, 8)
    expected = op(*arguments, normalize_qk=True, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = op(*arguments, normalize_qk=True, impl=impl)
    assert torch.equal(got.output, expected.output)
    assert torch.equal(got.final_state, expected.final_state)


def test_convolution_norms_and_router_are_the_same_inside_and_outside() -> None:
    x, weight, gate = torch.randn(2, 9, 8), torch.randn(8, 4), torch.randn(2, 9, 8)

    def run() -> list[Tensor]:
        return [
            ops.short_conv(x, weight).output,
            ops.rms_norm(x, weight[:, 0], 1e-5),
            ops.gated_rms_norm(x, gate, weight[:, 0], 1e-5),
            ops.route(x[0], torch.zeros(8), top_k=2).weights,
            ops.rotary(x, torch.arange(9), 1e4),
        ]

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_products_take_autocasts_dtype_whatever_mixture_comes() -> None:
    """fp32 parameters meet bf16 activations in every training step; the result is that of rounded inputs."""
    x, gate_up, down = torch.randn(7, 8).bfloat16(), torch.randn(4, 16, 8), torch.randn(4, 8, 8)
    routing = ops.route(torch.randn(7, 4), torch.zeros(4), top_k=2)
    q, k, v = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8).bfloat16(), torch.randn(1, 5, 2, 6)
    latent, kv_up = torch.randn(1, 5, 12).bfloat16(), torch.randn(2, 10, 8)

    def run(cast: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return [
            ops.moe_experts(cast(x), Routing(*routing), cast(gate_up), cast(down)),
            ops.mla_attention(cast(q), cast(k), cast(v), scale=0.3),
            ops.mla_absorbed(cast(q[..., :4]), cast(q[..., 4:]), cast(latent), cast(kv_up), scale=0.3),
        ]

    expected = run(lambda tensor: tensor.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(lambda tensor: tensor)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b)
    gate_up.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ops.moe_experts(x, routing, gate_up, down).float().square().sum()
    loss.backward()
    assert gate_up.grad is not None
    assert gate_up.grad.dtype == torch.float32
    assert gate_up.grad.abs().sum() > 0
