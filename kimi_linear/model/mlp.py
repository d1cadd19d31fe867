"""The dense feed-forward layer: SwiGLU."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from kimi_linear.model.parameters import Linear
from kimi_linear.ops.moe import swiglu


class MLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``, each token alone."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, inner)
        self.up_proj = Linear(width, inner)
        self.down_proj = Linear(inner, width)

    def forward(self, x: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape D"]:
        """[..., D] -> [..., D]."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
