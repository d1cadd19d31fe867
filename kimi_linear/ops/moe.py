"""Mixture of experts: the router that chooses, and the experts that work.

Scores are sigmoids. A correction bias, kept by the balancing rule and not by the gradient, takes part in choosing the
experts but not in weighing them (the auxiliary-loss-free routing of DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kimi_linear.ops.autocast import autocast_like_linear
from kimi_linear.ops.dispatch import choose_impl, row_facts
from kimi_linear.ops.library import define
from kimi_linear.ops.validation import check_moe_experts, check_route, check_swiglu

FEW_TOKENS = 2
"""Up to this many tokens copy their experts on a GPU. A copy moves three times the bytes that a product alone reads."""


class Routing(NamedTuple):
    """Result of ``route``.

    Attributes:
        experts: [T, k] int64, the experts of each token, best first, all different.
        weights: [T, k] fp32 (fp64 for fp64 logits), how much each counts.
    """

    experts: Tensor
    weights: Tensor


def route(
    logits: Float[Tensor, "T E"],
    correction_bias: Float[Tensor, "E"],
    *,
    top_k: int,
    num_groups: int = 1,
    groups_per_token: int = 1,
    renormalize: bool = True,
    scaling_factor: float = 1.0,
    bias_in_weights: bool = False,
) -> Routing:
    """Choose ``top_k`` experts for each token, and their weights. Differentiable in ``logits``.

    Args:
        logits: [T, E] router outputs.
        correction_bias: [E], added to the sigmoid scores for the choice.
        top_k: experts of a token.
        num_groups: equal groups of neighbouring experts; a group scores the sum of its two best biased scores.
        groups_per_token: how many best groups a token may choose from.
        renormalize: scale the weights of a token to sum to one (1e-20 added to the sum).
        scaling_factor: multiplies the weights last.
        bias_in_weights: gather the weights from the biased scores, as the publisher's remote code does.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape or device, or numbers that do not fit E.
    """
    check_route(logits, correction_bias, top_k, num_groups, groups_per_token)
    wide = torch.promote_types(logits.dtype, torch.float32)
    scores = logits.to(wide).sigmoid()
    biased = scores + correction_bias.to(wide)
    choice = biased.detach()
    if num_groups > 1:
        groups = choice.unflatten(-1, (num_groups, -1))
        best = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1).topk(groups_per_token, dim=-1).indices
        allowed = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, True)
        choice = groups.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)
    experts = choice.topk(top_k, dim=-1).indices
    weights = (biased if bias_in_weights else scores).gather(-1, experts)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return Routing(experts, weights * scaling_factor)


def swiglu(gate: Float[Tensor, "*shape I"], up: Float[Tensor, "*shape I"]) -> Float[Tensor, "*shape I"]:
    """``silu(gate) * up``: the inside of a feed-forward layer, dense or expert.

    On a GPU, where a gradient is wanted, it is one kernel that rounds once, and silu(gate) is not kept. Differentiable, there once.

    Args:
        gate, up: [..., I], of one dtype. Slices of a fused projection are read where they lie.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape or device.
    """
    check_swiglu(gate, up)
    # Without a gradient it is a product like others: two launches of torch, which take the host less time than one of ours.
    needs_grad = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
    if needs_grad and choose_impl(row_facts("swiglu", gate)).impl == "triton":
        return _SWIGLU(gate, up)
    return F.silu(gate) * up


def moe_experts(
    x: Float[Tensor, "T D"],
    routing: Routing,
    gate_up: Float[Tensor, "E I2 D"],
    down: Float[Tensor, "E D I"],
) -> Float[Tensor, "T D"]:
    """Weighted sum of SwiGLU experts: ``sum_j w_j down_e(silu(gate_e x) * up_e x)`` with e = experts[:, j].

    Tokens are sorted by expert, so that each expert is one matrix product; on a GPU one or two tokens take copies of
    their experts instead. In 16 bits on a GPU the host never waits. Deterministic, and differentiable in x, the weights
    of the routing, gate_up and down.

    Args:
        x: [T, D].
        routing: what ``route`` returned for these tokens.
        gate_up: [E, 2I, D], gate rows first, then up rows.
        down: [E, D, I].

    Returns:
        [T, D] in x's dtype, or that of an active autocast; the sum over the experts is taken in the precision of
        the routing's weights.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape or device, or an expert outside [0, E).
    """
    x, gate_up, down = autocast_like_linear(x, gate_up, down)
    check_moe_experts(x, routing.experts, routing.weights, gate_up, down)
    tokens, top_k = routing.experts.shape
    if tokens * top_k == 0:
        return torch.zeros_like(x)
    if _few_fit(x, routing, gate_up, down):
        parts = _few(x, routing.experts, gate_up, down)
    else:
        order = routing.experts.flatten().argsort(stable=True)
        place = order.argsort()
        counts = expert_load(routing, gate_up.shape[0])
        rows = _Rows.apply(x, order // top_k, place, top_k)
        work = _grouped if _grouped_fits(x, gate_up) else _one_by_one
        parts = _Rows.apply(work(rows, counts, gate_up, down), place, order, 1).view(tokens, top_k, -1)
    return (parts.to(routing.weights.dtype) * routing.weights[..., None]).sum(1).to(x.dtype)


def expert_load(routing: Routing, num_experts: int) -> Int[Tensor, "E"]:
    """How many tokens chose each of ``num_experts`` experts, [E] int64; the host does not wait for it.

    ``torch.bincount`` reads the largest value to the host, on a GPU once for every layer.
    """
    experts = routing.experts.flatten()
    return experts.new_zeros(num_experts).scatter_add_(0, experts, torch.ones_like(experts))


def _few(x: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """[T, D] and [T, k] -> [T, k, D], each token against copies of its own experts: two batched products.

    Sorting, and a grouped product over hundreds of experts of which eight have a row, take longer than the copies.
    """
    chosen = experts.flatten()
    rows = x[:, None].expand(-1, experts.shape[1], -1).reshape(len(chosen), -1, 1)
    inner = swiglu(*torch.bmm(gate_up[chosen], rows).chunk(2, dim=1))
    return torch.bmm(down[chosen], inner).view(*experts.shape, -1)


def _few_fit(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> bool:
    """On a GPU, one or two tokens without a gradient: that of a copy would be as large as all experts together."""
    tensors = (x, routing.weights, gate_up, down)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return x.is_cuda and not needs_grad and len(x) <= FEW_TOKENS


def _one_by_one(rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """[R, D] sorted by expert -> [R, D]; experts without tokens cost nothing. Needs the counts on the host."""
    # split and unbind: one gradient for all experts, where indexing would make a full-size one for each.
    parts = zip(rows.split(counts.tolist()), gate_up.unbind(), down.unbind(), strict=True)
    return torch.cat(
        [F.linear(swiglu(*F.linear(x, inner).chunk(2, dim=-1)), outer) for x, inner, outer in parts if len(x)]
    )


def _grouped(rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The same in two grouped products, with no synchronisation."""
    stops = counts.cumsum(0).to(torch.int32)
    inner = swiglu(*F.grouped_mm(rows, gate_up.mT, offs=stops).chunk(2, dim=-1))
    return F.grouped_mm(inner, down.mT, offs=stops)


def _grouped_fits(x: Tensor, gate_up: Tensor) -> bool:
    """What torch's grouped product takes: bf16 on CUDA from compute capability 8.0 on, rows of whole 16 bytes."""
    if not (x.is_cuda and x.dtype == torch.bfloat16 and hasattr(F, "grouped_mm")):
        return False
    _, inner, width = gate_up.shape
    return torch.cuda.get_device_capability(x.device) >= (8, 0) and width % 8 == 0 and inner % 16 == 0


class _Rows(torch.autograd.Function):
    """``x[index]`` where each row of x is taken ``copies`` times; ``inverse`` lists, row by row, where the copies went.

    Its gradient gathers and sums, where autograd's own would scatter-add: deterministic, and faster on a CPU.
    """

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x[index]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (inverse,) = ctx.saved_tensors
        return grad[inverse].unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


# The operators.


def _swiglu_forward(gate, up):
    from kimi_linear.kernels.triton.swiglu import forward

    return forward(gate, up)


def _swiglu_backward(gate, up, dy):
    from kimi_linear.kernels.triton.swiglu import backward

    return backward(gate, up, dy)


def _swiglu_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = ctx.saved_tensors
    return _SWIGLU_BACKWARD(gate, up, dy)


_SWIGLU = define(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    kernel=_swiglu_forward,
    fake=lambda gate, up: gate.new_empty(gate.shape),
    setup_context=_swiglu_save,
    backward=_swiglu_gradients,
)
_SWIGLU_BACKWARD = define(
    "swiglu_backward(Tensor gate, Tensor up, Tensor dy) -> (Tensor, Tensor)",
    kernel=_swiglu_backward,
    fake=lambda gate, up, dy: (gate.new_empty(gate.shape), up.new_empty(up.shape)),
)
