"""Simple gated linear attention, at KDA's shape: decay by head and add, without the delta rule (arXiv 2312.06635)."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from kimi_linear.config import ModelConfig
from kimi_linear.model.linear_mixer import LinearMixer
from kimi_linear.model.parameters import Linear
from kimi_linear.ops.contract import KDAOutput
from kimi_linear.ops.linear_attention import chunk_mamba2, recurrent_mamba2


class SimpleGLA(LinearMixer):
    """Mamba-2's memory in the other linear layers' surroundings.

    Projections, convolution, unit-length q and k, and output gate are those of KDA and GDN, so that only the memory
    differs: GDN without its delta rule. ``Mamba2`` is the published layer around the same memory.
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
