"""The Mamba-2 layer as published (arXiv 2405.21060, section 7)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kimi_linear.config import ModelConfig
from kimi_linear.model.linear_mixer import LinearMixer, wide
from kimi_linear.model.parameters import Linear, RMSNorm, fp32_parameter
from kimi_linear.ops.contract import KDAOutput
from kimi_linear.ops.linear_attention import chunk_mamba2, recurrent_mamba2
from kimi_linear.ops.norm import rms_norm


class Mamba2(LinearMixer):
    """State-space duality in attention's letters: C is q, B is k, x is v, a head's step size dt is ``step``.

    What sets it apart from ``SimpleGLA``, around the same memory: a token is written with its step size, q and k keep
    their length, values also go past the memory (``D``), and the output gate comes before a norm over all heads. Its
    groups are key heads: the publisher's default is one, with ``num_v_heads`` heads. The convolution has no bias here,
    and first steps and rates are those of the other layers, which are Mamba's.
    """

    FP32: ClassVar[tuple[str, ...]] = (*LinearMixer.FP32, "D")
    OPS: ClassVar[tuple[str, ...]] = ("chunk_mamba2", "recurrent_mamba2")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, gate_channels=1)
        self.a_proj = Linear(config.hidden_size, config.linear.value_heads)
        self.D = fp32_parameter(config.linear.value_heads)
        self.o_norm = RMSNorm(self.value_width, config.rms_norm_eps)
        for taps in (self.q_conv1d, self.k_conv1d, self.v_conv1d) if self.shape.conv_size else ():
            # The length of q and k counts here: from taps as small as the other weights the memory would hardly be heard.
            taps.bound = self.shape.conv_size**-0.5
        self.flag_parameters()

    def init_weights(self, std: float, generator: torch.Generator | None) -> None:
        """First values of A_log, dt_bias and D, which is one."""
        super().init_weights(std, generator)
        nn.init.ones_(self.D)

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
        """Forget by head, add, read: ``S = exp(-A step) S + step k v^T``, ``o = S^T q + D v``."""
        step = F.softplus(wide(self.a_proj(x)) + self.dt_bias)
        run = recurrent_mamba2 if recurrent else chunk_mamba2
        output, final_state = run(
            q, k, (wide(v) * step[..., None]).to(v.dtype), -self.A_log.view(-1).exp() * step,
            scale=1.0, initial_state=initial_state, cu_seqlens=cu_seqlens, impl=self.impl,
        )  # fmt: skip
        return KDAOutput((wide(output) + self.D[:, None] * wide(v)).to(v.dtype), final_state)

    def gate_and_norm(
        self, output: Float[Tensor, "B T HV V"], gate: Float[Tensor, "B T HV V"] | None
    ) -> Float[Tensor, "B T C"]:
        """The gate first, then one norm over all heads."""
        gated = wide(output)
        if gate is not None:
            gated = gated * (F.silu(wide(gate)) if self.shape.output_gate == "swish" else wide(gate).sigmoid())
        return rms_norm(gated.flatten(2), self.o_norm.weight, self.o_norm.eps, dtype=output.dtype, impl=self.row_impl)
