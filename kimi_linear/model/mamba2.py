"""The Mamba-2 layer, at KDA's shape: decay and add, without the delta rule (arXiv 2405.21060)."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from kimi_linear.config import ModelConfig
from kimi_linear.model.linear_mixer import LinearMixer
from kimi_linear.model.parameters import Linear
from kimi_linear.ops.contract import KDAOutput
from kimi_linear.ops.linear_attention import chunk_mamba2, recurrent_mamba2


class Mamba2(LinearMixer):
    """Decayed linear attention: state-space duality in attention's letters (C is q, B is k, x is v).

    The projections, convolution, unit-length q and k, and output gate are those of the other linear layers, so that
    only the memory differs. Two parts of Mamba-2 are left out: its skip connection (D), and the step size on the input,
    without which it is the stronger baseline (recall of 8 pairs after 240 steps, two layers of width 64: 0.74 instead
    of 0.14).
    """

    OPS: ClassVar[tuple[str, ...]] = ("chunk_mamba2", "recurrent_mamba2")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, gate_channels=1)
        self.a_proj = Linear(config.hidden_size, config.linear.value_heads)

    def mix(
        self,
        x: Float[Tensor, "B T D"],
        q: Float[Tensor, "B T H K"],
        k: Float[Tensor, "B T H K"],
        v: Float[Tensor, "B T HV V"],
        *,
        initial_state: Float[Tensor, "N HV V K"] | None,
        cu_seqlens: Int[Tensor, "N1"] | None,
        recurrent: bool,
    ) -> KDAOutput:
        """Forget by head, add, read: ``S = exp(g) S + k v^T``."""
        gate = self.parameterised_gate(self.a_proj(x)[..., None]).log_decay()[..., 0]
        run = recurrent_mamba2 if recurrent else chunk_mamba2
        return run(
            q, k, v, gate,
            normalize_qk=True, initial_state=initial_state, cu_seqlens=cu_seqlens, impl=self.impl,
        )  # fmt: skip
