"""The Kimi Delta Attention layer: each key channel forgets at its own speed (arXiv 2510.26692, section 4)."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from kimi_linear.config import ModelConfig
from kimi_linear.model.linear_mixer import LinearMixer, wide
from kimi_linear.model.parameters import Linear
from kimi_linear.ops.contract import BoundedGate, KDAOutput, SoftplusGate
from kimi_linear.ops.kda import chunk_kda, recurrent_kda


class KDA(LinearMixer):
    """Kimi Delta Attention: a gate per key channel of low rank (f_a, f_b), and a correction strength per head (b)."""

    OPS: ClassVar[tuple[str, ...]] = ("chunk_kda", "recurrent_kda")

    def __init__(self, config: ModelConfig) -> None:
        shape = config.linear
        super().__init__(config, gate_channels=shape.head_dim)
        rank = shape.head_dim if shape.gate_rank is None else shape.gate_rank
        self.f_a_proj = Linear(config.hidden_size, rank)
        self.f_b_proj = Linear(rank, shape.value_heads * shape.head_dim)
        self.b_proj = Linear(config.hidden_size, shape.value_heads)

    def gate(self, x: Float[Tensor, "B T D"]) -> SoftplusGate | BoundedGate:
        """Forgetting gate of each token, value head and key channel."""
        raw = self.f_b_proj(self.f_a_proj(x))
        return self.parameterised_gate(raw.unflatten(-1, (self.shape.value_heads, self.shape.head_dim)))

    def beta(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T HV"]:
        """Correction strength in (0, 1), fp32."""
        return wide(self.b_proj(x)).sigmoid()

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
        """Forget by channel, correct by the delta rule, read (Eq. 1)."""
        run = recurrent_kda if recurrent else chunk_kda
        gate, beta = self.gate(x), self.beta(x)
        return run(
            q, k, v, gate, beta,
            normalize_qk=True, initial_state=initial_state, cu_seqlens=cu_seqlens, impl=self.impl,
        )  # fmt: skip
