"""The Kimi Delta Attention layer: each key channel forgets at its own speed (arXiv 2510.26692, section 4)."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kimi_linear.config import ModelConfig
from kimi_linear.model.linear_mixer import LinearMixer, wide
from kimi_linear.model.parameters import Linear
from kimi_linear.model.state import KDAState
from kimi_linear.ops.contract import BoundedGate, KDAOutput, SoftplusGate
from kimi_linear.ops.decode import ConvTaps, DecodePool, HeadNorm, kda_decode
from kimi_linear.ops.dispatch import OpFacts, choose_impl, device_arch
from kimi_linear.ops.kda import chunk_kda, recurrent_kda


class KDA(LinearMixer):
    """Kimi Delta Attention: a gate per key channel of low rank (f_a, f_b), and a correction strength per head (b)."""

    OPS: ClassVar[tuple[str, ...]] = ("chunk_kda", "recurrent_kda", "kda_decode")

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

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        cu_seqlens: Int[Tensor, "N1"] | None = None,
        state: KDAState | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the tokens of each sequence. With ``state``, continue from it and leave the new state in it."""
        if state is not None and cu_seqlens is None and self.steps(x, state):
            return self.step(x, state)
        return super().forward(x, cu_seqlens=cu_seqlens, state=state)

    def steps(self, x: Float[Tensor, "B T D"], state: KDAState) -> bool:
        """Whether these tokens go through the fused step: few of them, no gradient, and a kernel for it."""
        if self.impl not in ("auto", "triton") or not x.is_cuda or torch.is_autocast_enabled("cuda"):
            return False
        facts = OpFacts(
            op="kda_decode",
            device=x.device.type,
            arch=device_arch(x.device.index),
            dtype=str(x.dtype).removeprefix("torch."),
            tokens=x.shape[1],
            key_dim=self.shape.head_dim,
            value_dim=self.shape.value_dim,
            needs_grad=torch.is_grad_enabled(),
        )
        return state.conv.dtype == x.dtype and choose_impl(facts).impl == "triton"

    def step(self, x: Float[Tensor, "B T D"], state: KDAState) -> Float[Tensor, "B T D"]:
        """``forward`` for at most eight tokens between the projections in one operation, which writes into the state."""
        shape, taps = self.shape, None
        if shape.conv_size:
            taps = ConvTaps(
                q=self.q_conv1d.weight[:, 0], k=self.k_conv1d.weight[:, 0], v=self.v_conv1d.weight[:, 0]
            )  # fmt: skip
        q, k = (projection(x).unflatten(-1, (-1, shape.head_dim)) for projection in (self.q_proj, self.k_proj))
        v = self.v_proj(x).unflatten(-1, (-1, shape.value_dim))
        gate = self.output_gate(x)
        norm = HeadNorm(weight=self.o_norm.weight, eps=self.o_norm.eps, gate=gate, activation=shape.output_gate)
        pool = DecodePool(memory=state.recurrent, window=state.conv)
        output = kda_decode(
            q, k, v, self.gate(x), self.b_proj(x), pool, taps, norm, slots=state.slots, impl=self.impl
        )  # fmt: skip
        return self.o_proj(output.flatten(2))

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
