"""The Mamba-2 layer, at KDA's shape: decay and add, without the delta rule (arXiv 2405.21060)."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kimi_linear.config import ModelConfig
from kimi_linear.model.linear_mixer import LinearMixer, wide
from kimi_linear.model.parameters import Linear, outside_autocast
from kimi_linear.ops.contract import KDAOutput
from kimi_linear.ops.linear_attention import chunk_mamba2, recurrent_mamba2


class Mamba2(LinearMixer):
    """State-space duality in attention's letters: C is q, B is k, x is v, and the step size dt scales decay and input.

    The projections, convolution, unit-length q and k, and output gate are those of the other linear layers, so that
    only the memory differs. Mamba-2's skip connection (its D) is left out for the same reason.
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
        """Forget by head, add, read: ``S = exp(-A dt) S + k (dt v)^T``."""
        raw = self.a_proj(x)[..., None]
        gate = self.parameterised_gate(raw).log_decay()[..., 0]
        step = F.softplus(wide(raw) + self.dt_bias[:, None])
        run = recurrent_mamba2 if recurrent else chunk_mamba2
        v = (v * step).to(v.dtype)
        with outside_autocast(x):
            return run(
                q, k, v, gate,
                normalize_qk=True, initial_state=initial_state, cu_seqlens=cu_seqlens, impl=self.impl,
            )  # fmt: skip
