"""What the public operations take and return: the gate types and the output tuple.

The type of a gate says what it means, so that no boolean changes the meaning of an input:

- a plain ``Tensor`` is the log-decay itself, natural logarithm, <= 0;
- ``SoftplusGate`` is the unbounded gate of the released 48B checkpoint;
- ``BoundedGate`` is the lower-bounded gate of its successors. It is another function, not a clamp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Impl: TypeAlias = Literal["auto", "reference", "torch", "triton", "hopper"]
"""Which implementation computes an operation. ``"auto"`` chooses; every other value works or raises."""

NORM_EPS = 1e-6
"""Added to the sum of squares when ``normalize_qk`` scales q and k to unit length."""


STATE_CHUNK = 64
"""States are handed out after multiples of this many tokens: the chunk of the GPU kernels."""


class KDAOutput(NamedTuple):
    """Result of ``chunk_kda`` and ``recurrent_kda``.

    Attributes:
        output: [B, T, HV, V], in the dtype of v.
        final_state: [N, HV, V, K], value-major, fp32 (fp64 where the inputs are fp64): the memory after each
            sequence's last token.
    """

    output: Tensor
    final_state: Tensor


class KDAStates(NamedTuple):
    """Result of ``chunk_kda_states``.

    Attributes:
        output, final_state: as of ``KDAOutput``.
        states: [E, HV, V, K], value-major, in final_state's dtype: the memory after each of the offsets asked for.
    """

    output: Tensor
    final_state: Tensor
    states: Tensor


@dataclass(frozen=True, eq=False)
class SoftplusGate:
    """Log-decay ``-exp(A_log) * softplus(x + dt_bias)``, unbounded below (arXiv 2510.26692, released checkpoint).

    Attributes:
        x: [B, T, HV, K], the raw gate projection, any floating dtype.
        A_log: [HV] fp32, log of the per-head rate.
        dt_bias: [HV, K] fp32.
    """

    x: Tensor
    A_log: Tensor
    dt_bias: Tensor

    def log_decay(self) -> Float[Tensor, "B T HV K"]:
        """The gate as a plain log-decay [B, T, HV, K], computed in fp32 (fp64 for fp64 inputs), differentiable."""
        x = self.x if self.x.dtype.itemsize >= 4 else self.x.float()
        return -self.A_log.to(x.dtype).exp()[:, None] * F.softplus(x + self.dt_bias.to(x.dtype))


@dataclass(frozen=True, eq=False)
class BoundedGate:
    """Log-decay ``lower_bound * sigmoid(exp(A_log) * (x + dt_bias))``, in (lower_bound, 0) (arXiv 2607.24653, Eq. 5).

    Attributes:
        x: [B, T, HV, K], the raw gate projection, any floating dtype.
        A_log: [HV] fp32.
        dt_bias: [HV, K] fp32.
        lower_bound: strongest log-decay of one step, negative.
    """

    x: Tensor
    A_log: Tensor
    dt_bias: Tensor
    lower_bound: float = -5.0

    def log_decay(self) -> Float[Tensor, "B T HV K"]:
        """The gate as a plain log-decay [B, T, HV, K], computed in fp32 (fp64 for fp64 inputs), differentiable."""
        x = self.x if self.x.dtype.itemsize >= 4 else self.x.float()
        return self.lower_bound * (self.A_log.to(x.dtype).exp()[:, None] * (x + self.dt_bias.to(x.dtype))).sigmoid()


Gate: TypeAlias = Tensor | SoftplusGate | BoundedGate
"""How a token forgets: the log-decay itself, or a raw projection with the function that makes one."""


def log_decay(gate: Gate) -> Float[Tensor, "B T HV K"]:
    """Any gate as a plain natural-log decay [B, T, HV, K]."""
    return gate if isinstance(gate, Tensor) else gate.log_decay()


def gate_values(gate: Gate) -> Tensor:
    """The tensor of shape [B, T, HV, K] that a gate carries: the log-decay itself, or the raw projection."""
    return gate if isinstance(gate, Tensor) else gate.x
