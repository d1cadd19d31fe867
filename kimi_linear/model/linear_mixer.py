"""What the linear-attention layers share: projections, short convolution, output gate and norm, state.

KDA, GDN and simple GLA differ only in how they forget and correct (``mix``); everything around that is the same, so a
comparison between them compares just that. Mamba-2 is the published layer, which differs in more.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kimi_linear.config import ModelConfig
from kimi_linear.model.parameters import ConvWeight, KeepsFP32, Linear, RMSNorm, fp32_parameter, init_rate, init_step
from kimi_linear.model.state import KDAState
from kimi_linear.ops.contract import BoundedGate, Impl, KDAOutput, SoftplusGate
from kimi_linear.ops.dispatch import AVAILABLE
from kimi_linear.ops.norm import gated_rms_norm
from kimi_linear.ops.short_conv import short_conv, short_conv_qkv

RECURRENT_TOKENS = 16
"""With a state, up to this many tokens go one by one; more go in chunks, with the same result."""


FUSED_TOKENS = 256
"""Above this many tokens, q, k and v are one product: joining the weights then costs less than joining the results."""


class LinearMixer(KeepsFP32):
    """Base of the linear-attention layers (arXiv 2510.26692, section 4).

    A subclass calls ``__init__`` with the number of gate values per head, makes its own projections, and writes
    ``mix``. Parameters are named as in the released checkpoint.

    Attributes:
        impl: which implementation of the operations runs, the convolution and the output norm among them.
    """

    FP32: ClassVar[tuple[str, ...]] = ("A_log", "dt_bias")
    OPS: ClassVar[tuple[str, ...]] = ()
    """The operations that ``mix`` calls, as ``kimi_linear.ops.AVAILABLE`` names them."""

    def __init__(self, config: ModelConfig, gate_channels: int) -> None:
        super().__init__()
        width, shape = config.hidden_size, config.linear
        self.impl: Impl = "auto"
        self.shape = shape
        self.gate_channels = gate_channels
        self.key_width = shape.num_heads * shape.head_dim
        self.value_width = shape.value_heads * shape.value_dim
        self.q_proj = Linear(width, self.key_width)
        self.k_proj = Linear(width, self.key_width)
        self.v_proj = Linear(width, self.value_width)
        if shape.conv_size:
            self.q_conv1d = ConvWeight(self.key_width, shape.conv_size)
            self.k_conv1d = ConvWeight(self.key_width, shape.conv_size)
            self.v_conv1d = ConvWeight(self.value_width, shape.conv_size)
        self.A_log = fp32_parameter(1, 1, shape.value_heads, 1)
        self.dt_bias = fp32_parameter(shape.value_heads * gate_channels)
        if shape.output_gate != "none":
            if shape.output_gate_rank == "full":
                self.g_proj = Linear(width, self.value_width)
            else:
                rank = shape.value_dim if shape.output_gate_rank is None else shape.output_gate_rank
                self.g_a_proj = Linear(width, rank)
                self.g_b_proj = Linear(rank, self.value_width, bias=shape.output_gate_bias)
        self.o_norm = RMSNorm(shape.value_dim, config.rms_norm_eps)
        self.o_proj = Linear(self.value_width, width)
        self.flag_parameters()

    @property
    def row_impl(self) -> Impl:
        """``impl`` for the convolution and the norm, whose specification is their plain torch form."""
        return "torch" if self.impl == "reference" else self.impl

    def check_impl(self, impl: Impl) -> None:
        """Raise ``ValueError`` unless every operation of this layer has ``impl``."""
        for op in self.OPS:
            if impl != "auto" and impl not in AVAILABLE[op]:
                raise ValueError(
                    f"impl: expected 'auto' or one that {op} has ({', '.join(AVAILABLE[op])}), got {impl!r}"
                )

    def init_weights(self, std: float, generator: torch.Generator | None) -> None:
        """First values of A_log and dt_bias; a bounded gate starts from rate one (arXiv 2607.24653, section 2.1.1)."""
        if self.shape.gate == "bounded":
            nn.init.zeros_(self.A_log)
        else:
            init_rate(self.A_log, generator)
        init_step(self.dt_bias, generator)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        cu_seqlens: Int[Tensor, "N1"] | None = None,
        state: KDAState | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the tokens of each sequence. With ``state``, continue from it and leave the new state in it."""
        q, k, v, window = self.project(x, cu_seqlens=cu_seqlens, state=state)
        initial_state = None if state is None else state.read()[0]
        recurrent = state is not None and x.shape[1] <= RECURRENT_TOKENS
        output, final_state = self.mix(
            x, q, k, v, initial_state=initial_state, cu_seqlens=cu_seqlens, recurrent=recurrent
        )
        if state is not None:
            state.write(final_state, window)
        return self.o_proj(self.gate_and_norm(output, self.output_gate(x)))

    def gate_and_norm(
        self, output: Float[Tensor, "B T HV V"], gate: Float[Tensor, "B T HV V"] | None
    ) -> Float[Tensor, "B T C"]:
        """Each head normed, then gated; side by side, C == HV * V."""
        activation = self.shape.output_gate
        return gated_rms_norm(
            output, gate, self.o_norm.weight, self.o_norm.eps, activation, impl=self.row_impl
        ).flatten(2)  # fmt: skip

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
        """The memory itself: forget, correct or add, read."""
        raise NotImplementedError

    def project(
        self, x: Float[Tensor, "B T D"], *, cu_seqlens: Int[Tensor, "N1"] | None = None, state: KDAState | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q [B, T, H, K], k, v [B, T, HV, V] after convolution and SiLU, and the convolution's new window."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        window = None if state is None else state.read()[1]
        if x.is_cuda and self.shape.conv_size:
            # Three products, and one kernel that convolves all three where they lie: no weight or result is joined.
            q, k, v = (projection(x) for projection in projections)
            taps = (self.q_conv1d.weight[:, 0], self.k_conv1d.weight[:, 0], self.v_conv1d.weight[:, 0])
            q, k, v, window = short_conv_qkv(
                q, k, v, taps, initial_state=window, cu_seqlens=cu_seqlens, impl=self.row_impl
            )  # fmt: skip
        else:
            mixed = self._joined(x, projections)
            if self.shape.conv_size:
                # One convolution over all channels: it is depthwise, so q, k and v still do not mix.
                taps = torch.cat([self.q_conv1d.weight, self.k_conv1d.weight, self.v_conv1d.weight])[:, 0]
                mixed, window = short_conv(
                    mixed, taps, initial_state=window, cu_seqlens=cu_seqlens, impl=self.row_impl
                )  # fmt: skip
            else:
                window = mixed.new_zeros(x.shape[0], mixed.shape[-1], 0)
                mixed = F.silu(mixed)
            q, k, v = mixed.split([self.key_width, self.key_width, self.value_width], dim=-1)
        key_shape = (self.shape.num_heads, self.shape.head_dim)
        value_shape = (self.shape.value_heads, self.shape.value_dim)
        return q.unflatten(-1, key_shape), k.unflatten(-1, key_shape), v.unflatten(-1, value_shape), window

    @staticmethod
    def _joined(x: Tensor, projections: tuple[nn.Module, ...]) -> Tensor:
        """All three projections side by side [B, T, 2*H*K + HV*V]."""
        # A projection that somebody replaced, by an adapter say, has a forward of its own to run.
        if x.shape[0] * x.shape[1] > FUSED_TOKENS and all(type(projection) is Linear for projection in projections):
            return F.linear(x, torch.cat([projection.weight for projection in projections]))  # type: ignore[arg-type]
        return torch.cat([projection(x) for projection in projections], dim=-1)

    def parameterised_gate(self, raw: Float[Tensor, "B T HV C"]) -> SoftplusGate | BoundedGate:
        """The gate that the configuration asks for, from its raw projection."""
        A_log, dt_bias = self.A_log.view(-1), self.dt_bias.view(-1, self.gate_channels)
        if self.shape.gate == "bounded":
            return BoundedGate(raw, A_log, dt_bias, self.shape.gate_lower_bound)
        return SoftplusGate(raw, A_log, dt_bias)

    def output_gate(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T HV V"] | None:
        """Raw gate on the normalised output, or None where there is none."""
        if self.shape.output_gate == "none":
            return None
        raw = self.g_proj(x) if self.shape.output_gate_rank == "full" else self.g_b_proj(self.g_a_proj(x))
        return raw.unflatten(-1, (self.shape.value_heads, self.shape.value_dim))

    def make_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> KDAState:
        """An empty memory and an empty window. The memory is fp32, or fp64 where ``dtype`` is."""
        shape = self.shape
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        window = max(0, shape.conv_size - 1)
        memory = (batch_size, shape.value_heads, shape.value_dim, shape.head_dim)
        channels = 2 * self.key_width + self.value_width
        return KDAState(
            recurrent=torch.zeros(memory, device=device, dtype=wide),
            conv=torch.zeros(batch_size, channels, window, device=device, dtype=dtype),
        )


def wide(x: Tensor) -> Tensor:
    """In fp32 at least: gates and beta are computed there."""
    return x if x.dtype.itemsize >= 4 else x.float()
