"""The mixture-of-experts feed-forward layer: a router, many small experts of which each token visits a few, and shared ones.

The experts are stacked into two parameters, so that they cast, shard and optimise as two tensors; a checkpoint holds
them one by one.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kimi_linear.config import ModelConfig
from kimi_linear.model.mlp import MLP
from kimi_linear.model.parameters import KeepsFP32, fp32_parameter
from kimi_linear.ops.autocast import outside_autocast
from kimi_linear.ops.moe import Routing, expert_load, moe_experts, route


class Router(KeepsFP32):
    """Scores every expert for every token.

    ``e_score_correction_bias`` [E] shifts the choice of experts to balance their load. It is moved by a rule that reads
    ``MoE.load``, never by the gradient.
    """

    FP32: ClassVar[tuple[str, ...]] = ("e_score_correction_bias",)

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.e_score_correction_bias = fp32_parameter(num_experts, requires_grad=False)
        self.flag_parameters()

    def init_weights(self, std: float, generator: torch.Generator | None) -> None:
        """Normal weights, no correction."""
        nn.init.normal_(self.weight, std=std, generator=generator)
        nn.init.zeros_(self.e_score_correction_bias)

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        """Logits, computed in fp32: rounding them would change which experts win."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with outside_autocast(x):
            return F.linear(x.to(dtype), self.weight.to(dtype))


class Experts(nn.Module):
    """E SwiGLU experts, stacked: ``gate_up`` [E, 2I, D], gate rows first, and ``down`` [E, D, I]."""

    def __init__(self, num_experts: int, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * inner, width))
        self.down = nn.Parameter(torch.empty(num_experts, width, inner))

    def init_weights(self, std: float, generator: torch.Generator | None) -> None:
        """Normal weights."""
        nn.init.normal_(self.gate_up, std=std, generator=generator)
        nn.init.normal_(self.down, std=std, generator=generator)

    def forward(self, x: Float[Tensor, "T D"], routing: Routing) -> Float[Tensor, "T D"]:
        """Weighted sum of each token's experts."""
        return moe_experts(x, routing, self.gate_up, self.down)


class MoE(nn.Module):
    """Routed experts plus shared ones (arXiv 2510.26692, released checkpoint).

    Attributes:
        load: [E] int64, how many tokens of the latest forward each expert got; None before the first.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None
        moe = config.moe
        self.shape = moe
        self.load: Int[Tensor, "E"] | None = None
        self.gate = Router(config.hidden_size, moe.num_experts)
        self.experts = Experts(moe.num_experts, config.hidden_size, moe.expert_size)
        if moe.num_shared_experts:
            self.shared_experts = MLP(config.hidden_size, moe.num_shared_experts * moe.expert_size)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """[B, T, D] -> [B, T, D]; also sets ``load``."""
        moe, tokens = self.shape, x.flatten(0, 1)
        routing = route(
            self.gate(tokens),
            self.gate.e_score_correction_bias,
            top_k=moe.experts_per_token,
            num_groups=moe.num_groups,
            groups_per_token=moe.groups_per_token,
            renormalize=moe.renormalize,
            scaling_factor=moe.scaling_factor,
            bias_in_weights=moe.bias_in_weights,
        )
        self.load = expert_load(routing, moe.num_experts)
        output = self.experts(tokens, routing)
        if moe.num_shared_experts:
            output = output + self.shared_experts(tokens)
        return output.view_as(x)
