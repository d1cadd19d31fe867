"""The Gated DeltaNet layer, at KDA's shape: the delta rule with one decay for a whole head (arXiv 2412.06464)."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from kimi_linear.config import ModelConfig
from kimi_linear.model.linear_mixer import LinearMixer, wide
from kimi_linear.model.parameters import Linear
from kimi_linear.ops.contract import KDAOutput
from kimi_linear.ops.linear_attention import chunk_gdn, recurrent_gdn


class GDN(LinearMixer):
    """Gated DeltaNet: a gate (a) and a correction strength (b) per head, both straight from the token."""

    OPS: ClassVar[tuple[str, ...]] = ("chunk_gdn", "recurrent_gdn")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, gate_channels=1)
        self.a_proj = Linear(config.hidden_size, config.linear.value_heads)
        self.b_proj = Linear(config.hidden_size, config.linear.value_heads)

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
        """Forget by head, correct by the delta rule, read."""
        gate = self.parameterised_gate(self.a_proj(x)[..., None]).log_decay()[..., 0]
        run = recurrent_gdn if recurrent else chunk_gdn
        beta = wide(self.b_proj(x)).sigmoid()
        return run(
            q, k, v, gate, beta,
            normalize_qk=True, initial_state=initial_state, cu_seqlens=cu_seqlens, impl=self.impl,
        )  # fmt: skip
