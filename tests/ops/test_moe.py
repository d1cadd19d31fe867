"""The router and the experts against loops over tokens in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kimi_linear.ops import Routing, moe, moe_experts, route, swiglu
from kimi_linear.testing.tolerances import assert_close, assert_close_to_reference

F64 = torch.float64


def route_one(
    logits: Tensor, bias: Tensor, top_k: int, groups: int, kept: int, *, renormalize: bool, scale: float, biased: bool
) -> dict[int, float]:
    """Expert to weight for one token, in Python numbers."""
    scores = [1 / (1 + torch.exp(-x).item()) for x in logits]
    choice = [s + b for s, b in zip(scores, bias.tolist(), strict=True)]
    size = len(scores) // groups
    members = [range(i * size, (i + 1) * size) for i in range(groups)]
    best = sorted(members, key=lambda group: -sum(sorted(choice[e] for e in group)[-2:]))[:kept]
    chosen = sorted((e for group in best for e in group), key=lambda e: -choice[e])[:top_k]
    weights = {e: choice[e] if biased else scores[e] for e in chosen}
    total = sum(weights.values()) if renormalize else 1.0
    return {e: w / total * scale for e, w in weights.items()}


@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 2), (6, 3), (12, 5)])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_route_against_a_loop(groups: int, kept: int, renormalize: bool, biased: bool) -> None:
    logits, bias = torch.randn(20, 12, dtype=F64), 0.5 * torch.randn(12, dtype=F64)
    routing = route(
        logits, bias, top_k=3, num_groups=groups, groups_per_token=kept, renormalize=renormalize, scaling_factor=2.446,
        bias_in_weights=biased,
    )  # fmt: skip
    for t in range(20):
        expected = route_one(logits[t], bias, 3, groups, kept, renormalize=renormalize, scale=2.446, biased=biased)
        assert routing.experts[t].tolist() == list(expected)  # best first
        assert routing.weights[t].tolist() == pytest.approx(list(expected.values()), rel=1e-12)


def test_the_bias_selects_but_does_not_weigh() -> None:
    logits, bias = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([0.0, 0.0, 0.0, 5.0])
    routing = route(logits, bias, top_k=2, renormalize=False)
    assert routing.experts.tolist() == [[3, 0]]
    torch.testing.assert_close(routing.weights, logits[:, [3, 0]].sigmoid())


def test_a_group_of_negative_scores_is_not_overtaken_by_a_masked_one() -> None:
    """Masked experts must lose even against biased scores below zero."""
    bias = torch.tensor([-3.0, -3.0, -9.0, -9.0])
    routing = route(torch.zeros(1, 4), bias, top_k=2, num_groups=2, groups_per_token=1)
    assert sorted(routing.experts[0].tolist()) == [0, 1]


def test_router_works_in_fp32_for_16_bit_logits() -> None:
    logits, bias = torch.randn(50, 16).bfloat16(), torch.randn(16).bfloat16()
    routing, exact = route(logits, bias, top_k=4), route(logits.float(), bias.float(), top_k=4)
    assert routing.weights.dtype == torch.float32
    assert torch.equal(routing.experts, exact.experts)
    assert torch.equal(routing.weights, exact.weights)


def test_router_gradient() -> None:
    logits = torch.randn(4, 8, dtype=F64, requires_grad=True)
    bias = 0.1 * torch.randn(8, dtype=F64)
    for biased in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, b=biased: route(x, bias, top_k=3, scaling_factor=2.0, bias_in_weights=b).weights, (logits,)
        )


def make(
    tokens: int, experts: int = 5, top_k: int = 2, dtype: torch.dtype = F64
) -> tuple[Tensor, Routing, Tensor, Tensor]:
    x, logits = torch.randn(tokens, 8, dtype=F64), torch.randn(tokens, experts, dtype=F64)
    gate_up, down = torch.randn(experts, 32, 8, dtype=F64) / 3, torch.randn(experts, 8, 16, dtype=F64) / 4
    routing = route(logits.to(dtype), torch.zeros(experts), top_k=top_k, scaling_factor=1.5)
    return x.to(dtype), routing, gate_up.to(dtype), down.to(dtype)


def formula(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    inner, rows = down.shape[2], []
    for t in range(len(x)):
        total = torch.zeros_like(x[t])
        for expert, weight in zip(routing.experts[t].tolist(), routing.weights[t], strict=True):
            gate, up = gate_up[expert, :inner] @ x[t], gate_up[expert, inner:] @ x[t]
            total = total + weight * (down[expert] @ (gate / (1 + torch.exp(-gate)) * up))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("work", ["_one_by_one", "_grouped", "_few"])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 5, 2), (17, 5, 2), (6, 40, 1), (4, 3, 3)])
def test_experts_against_a_loop(
    work: str, tokens: int, experts: int, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and every gradient, with experts that no token visits among them."""
    if work == "_grouped" and not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no public grouped_mm")
    dtype = torch.float32 if work == "_grouped" else F64  # torch's grouped product has no fp64
    if work == "_few":
        monkeypatch.setattr(moe, "_few_fit", lambda *_: True)
    else:
        monkeypatch.setattr(moe, "_one_by_one", getattr(moe, work))
    x, routing, gate_up, down = make(tokens, experts, top_k, dtype)
    leaves = [t.detach().requires_grad_() for t in (x, routing.weights, gate_up, down)]
    routing = Routing(routing.experts, leaves[1])
    got = moe_experts(leaves[0], routing, *leaves[2:])
    want = formula(leaves[0], routing, *leaves[2:])
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert_close(got, want, "output", tolerance=tolerance)
    gradient = torch.randn_like(got)
    pairs = zip(torch.autograd.grad(got, leaves, gradient), torch.autograd.grad(want, leaves, gradient), strict=True)
    for name, (a, b) in zip(("x", "weights", "gate_up", "down"), pairs, strict=True):
        assert_close(a, b, f"gradient of {name}", tolerance=tolerance)


def test_experts_gradcheck() -> None:
    x, routing, gate_up, down = make(5)
    leaves = [t.requires_grad_() for t in (x, routing.weights, gate_up, down)]
    assert torch.autograd.gradcheck(
        lambda x, w, a, b: moe_experts(x, Routing(routing.experts, w), a, b), leaves, fast_mode=True
    )


def test_load_counts_the_tokens_of_every_expert() -> None:
    routing = make(50, experts=7, top_k=3)[1]
    load = moe.expert_load(routing, 9)
    assert load.dtype == torch.int64
    assert load.tolist() == [int((routing.experts == expert).sum()) for expert in range(9)]
    assert moe.expert_load(Routing(routing.experts[:0], routing.weights[:0]), 3).tolist() == [0, 0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, moe.FEW_TOKENS])
def test_few_tokens_on_a_gpu_against_a_loop(tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of the chosen experts, and nothing sorted; the grouped product gives the same."""
    x, routing, gate_up, down = (
        Routing(*(y.cuda() for y in t)) if isinstance(t, Routing) else t.cuda() for t in make(tokens, 40, 8, dtype)
    )
    monkeypatch.setattr(moe, "_one_by_one", None)
    with monkeypatch.context() as patch:
        patch.setattr(moe, "_grouped", None)
        few = moe_experts(x, routing, gate_up, down)
    exact = formula(x.double(), Routing(routing.experts, routing.weights.double()), gate_up.double(), down.double())
    plain = formula(x, Routing(routing.experts, routing.weights.to(dtype)), gate_up, down)
    assert_close_to_reference(few, exact, plain, "few")
    if dtype == torch.bfloat16:
        monkeypatch.setattr(moe, "_few_fit", lambda *_: False)
        assert_close_to_reference(moe_experts(x, routing, gate_up, down), exact, plain, "grouped")


@pytest.mark.gpu
@pytest.mark.unpoisoned  # the deterministic mode has waits of its own
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("tokens", [1, 2, 3, 64])
def test_the_host_never_waits_for_the_experts(tokens: int) -> None:
    x, _, gate_up, down = (t.cuda() if isinstance(t, Tensor) else t for t in make(tokens, 40, 8, torch.bfloat16))
    logits, bias = torch.randn(tokens, 40, device="cuda"), torch.zeros(40, device="cuda")

    def layer() -> Tensor:
        routing = route(logits, bias, top_k=8)
        return moe_experts(x, routing, gate_up, down) + moe.expert_load(routing, 40).sum()

    with torch.no_grad():
        layer()  # libraries set themselves up
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_experts_are_deterministic_and_ignore_the_neighbours() -> None:
    x, routing, gate_up, down = make(30, dtype=torch.float32)
    whole = moe_experts(x, routing, gate_up, down)
    assert torch.equal(whole, moe_experts(x, routing, gate_up, down))
    flipped = Routing(routing.experts.flip(0), routing.weights.flip(0))
    torch.testing.assert_close(moe_experts(x.flip(0), flipped, gate_up, down).flip(0), whole)


def test_bf16_experts() -> None:
    x, routing, gate_up, down = make(64, dtype=torch.bfloat16)
    got = moe_experts(x, routing, gate_up, down)
    assert got.dtype == torch.bfloat16
    exact = formula(x.double(), Routing(routing.experts, routing.weights.double()), gate_up.double(), down.double())
    plain = formula(x, Routing(routing.experts, routing.weights.bfloat16()), gate_up, down)
    assert_close_to_reference(got, exact, plain, "experts")


def test_no_token_at_all() -> None:
    x, routing, gate_up, down = make(3)
    empty = Routing(routing.experts[:0], routing.weights[:0])
    assert moe_experts(x[:0], empty, gate_up, down).shape == (0, 8)
    assert route(torch.zeros(0, 5), torch.zeros(5), top_k=2).experts.shape == (0, 2)


def test_swiglu() -> None:
    gate, up = torch.randn(4, 6, dtype=F64, requires_grad=True), torch.randn(4, 6, dtype=F64, requires_grad=True)
    assert_close(swiglu(gate, up), gate / (1 + torch.exp(-gate)) * up, "swiglu")
    assert torch.autograd.gradcheck(swiglu, (gate, up))


@pytest.mark.unchecked_shapes
def test_bad_input() -> None:
    logits, bias = torch.zeros(3, 12), torch.zeros(12)
    with pytest.raises(ValueError, match="top_k: expected 1 to 6, the experts that a token can reach, got 7"):
        route(logits, bias, top_k=7, num_groups=4, groups_per_token=2)
    with pytest.raises(ValueError, match="num_groups: expected a divisor of E == 12, got 5"):
        route(logits, bias, top_k=1, num_groups=5)
    with pytest.raises(ValueError, match="groups_per_token: expected 1 to num_groups == 1, got 2"):
        route(logits, bias, top_k=1, groups_per_token=2)
    with pytest.raises(ValueError, match=r"correction_bias: expected shape \[12\]"):
        route(logits, bias[:4], top_k=1)
    x, routing, gate_up, down = make(3)
    with pytest.raises(ValueError, match=r"gate_up: expected shape \[E, 2I, 8\]"):
        moe_experts(x, routing, gate_up.mT, down)
    with pytest.raises(ValueError, match=r"down: expected shape \[5, 8, 16\]"):
        moe_experts(x, routing, gate_up, down.mT)
    with pytest.raises(ValueError, match=r"routing.experts: expected experts in \[0, 5\), got \d+ to"):
        moe_experts(x, Routing(routing.experts + 5, routing.weights), gate_up, down)
    with pytest.raises(TypeError, match=r"down: expected torch\.float64, as x, got torch\.float32"):
        moe_experts(x, routing, gate_up, down.float())
    with pytest.raises(ValueError, match=r"up: expected shape \[3, 8\]"):
        swiglu(x, x[:2])
