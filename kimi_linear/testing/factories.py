"""Inputs as a real model makes them: unit keys, sigmoid beta, and gates at every strength that occurs.

A kernel that is right at mild gates and wrong at strong ones passes every test on ``logsigmoid(randn)``. So the gate
is named by where it occurs:

- ``"init"``: the released model at initialisation, A ~ U(1, 16), softplus(dt_bias) log-uniform in [1e-3, 1e-1];
- ``"fast"``: mean log-decay about -3.2 a step;
- ``"bounded"``: the successors' gate, every step in (-5, 0);
- ``"stress"``: A = 16 and dt_bias in {-1, 0, +2}: steps to -99 and 16-token sums below -766, planted in the last
  channel so that the smallest shape has them;
- ``"mixed"``: strong runs and near-zero runs within one channel, so that what follows a strong decay still matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.ops.contract import BoundedGate, Gate, SoftplusGate, log_decay

GateKind: TypeAlias = Literal["init", "fast", "bounded", "stress", "mixed"]
"""How strongly a test's gates forget; ``kda_inputs`` says what each means."""
GATE_KINDS: tuple[GateKind, ...] = get_args(GateKind)
"""Every ``GateKind``, for ``pytest.mark.parametrize``."""

FAST_BIAS = -1.09
"""dt_bias with a mean log-decay of -8.5 * E[softplus(x - 1.09)] = -3.2, for A ~ U(1, 16) and x ~ N(0, 1)."""
STRESS_BIAS = (-1.0, 0.0, 2.0)
STRESS_RUN = 1.0
"""x of the planted 16-token run: 16 * 16 * softplus(1 + 2) = 780."""
STRESS_STEP = 4.2
"""x of the planted single step after it: 16 * softplus(4.2 + 2) = 99."""
MIXED_QUIET = -12.0
"""x of a near-zero run: a log-decay of -16 * softplus(-12 + bias), at most 7.3e-4 a step for bias 2."""


@dataclass(frozen=True, kw_only=True, eq=False)
class KDAInputs:
    """Arguments of ``chunk_kda`` and ``recurrent_kda``, named as they are there."""

    q: Tensor
    """[B, T, H, K]."""
    k: Tensor
    """[B, T, H, K]."""
    v: Tensor
    """[B, T, HV, V]."""
    gate: Gate
    """[B, T, HV, K]: plain log-decay, ``SoftplusGate`` or ``BoundedGate``."""
    beta: Tensor
    """[B, T, HV] in (0, 1)."""
    initial_state: Tensor
    """[N, HV, V, K]."""
    cu_seqlens: Tensor | None = None
    """[N+1], or None."""

    @property
    def log_decay(self) -> Tensor:
        """The gate as a plain log-decay [B, T, HV, K]."""
        return log_decay(self.gate)

    def positional(self) -> tuple[Tensor, Tensor, Tensor, Gate, Tensor]:
        """(q, k, v, gate, beta): the positional arguments of the public operations."""
        return self.q, self.k, self.v, self.gate, self.beta

    def leaves(self) -> dict[str, Tensor]:
        """Every differentiable input by name; a raw gate's parts are "gate.x", "gate.A_log" and "gate.dt_bias"."""
        named = {name: getattr(self, name) for name in ("q", "k", "v", "beta", "initial_state")}
        if isinstance(self.gate, Tensor):
            return named | {"gate": self.gate}
        return named | {f"gate.{part}": getattr(self.gate, part) for part in ("x", "A_log", "dt_bias")}

    def to(self, dtype: torch.dtype) -> KDAInputs:
        """The same values in another floating dtype; ``torch.float64`` gives the exact reference its inputs."""
        return self._map(lambda x: x.to(dtype))

    def with_grad(self, *, clone: bool = True) -> KDAInputs:
        """The same values as fresh leaves that require a gradient; without ``clone`` they share their memory."""
        return self._map(lambda x: (x.detach().clone() if clone else x.detach()).requires_grad_())

    def heads(self, keys: Sequence[int]) -> KDAInputs:
        """Copies of some key heads with every value head that reads them: a part that an exact reference can afford."""
        repeat = self.v.shape[2] // self.q.shape[2]
        values = [repeat * key + i for key in keys for i in range(repeat)]
        gate: Gate = self.gate
        if isinstance(gate, Tensor):
            gate = gate[:, :, values]
        else:
            gate = replace(gate, x=gate.x[:, :, values], A_log=gate.A_log[values], dt_bias=gate.dt_bias[values])
        return replace(
            self,
            q=self.q[:, :, list(keys)],
            k=self.k[:, :, list(keys)],
            v=self.v[:, :, values],
            gate=gate,
            beta=self.beta[:, :, values],
            initial_state=self.initial_state[:, values],
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> KDAInputs:
        gate = self.gate
        if isinstance(gate, Tensor):
            gate = change(gate)
        else:
            gate = replace(gate, x=change(gate.x), A_log=change(gate.A_log), dt_bias=change(gate.dt_bias))
        return KDAInputs(
            q=change(self.q),
            k=change(self.k),
            v=change(self.v),
            gate=gate,
            beta=change(self.beta),
            initial_state=change(self.initial_state),
            cu_seqlens=self.cu_seqlens,
        )


def kda_inputs(
    batch: int = 1,
    tokens: int = 64,
    heads: int = 2,
    v_heads: int | None = None,
    key_dim: int = 32,
    value_dim: int | None = None,
    *,
    gate: GateKind = "init",
    dt_bias: float | None = None,
    raw: bool = False,
    normalized: bool = True,
    lengths: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    drawn_on: torch.device | str = "cpu",
    seed: int = 0,
) -> KDAInputs:
    """Random inputs, the same on every machine for the same arguments where they are drawn on the CPU.

    Args:
        batch, tokens, heads, v_heads, key_dim, value_dim: B, T, H, HV (H where None), K, V (K where None).
        gate: strength of the gate, see the module's docstring.
        dt_bias: one bias for every channel, instead of the kind's own.
        raw: hand the gate over as ``SoftplusGate`` or ``BoundedGate``, not as a log-decay.
        normalized: q and k of unit length; otherwise they need ``normalize_qk=True``.
        lengths: lengths of packed sequences, 0 allowed, summing to ``tokens``; needs ``batch == 1``.
        dtype: of q, k, v and a raw gate's x. beta, the log-decay, the gate's parameters and the state are fp32, or
            fp64 where this is.
        device: where the tensors go.
        drawn_on: device of the random generator. On the CPU the draw is in fp64, and takes minutes for 10^9 numbers;
            elsewhere it is in fp32, and other than the CPU's.
        seed: of the generator.

    Raises:
        ValueError: an unknown gate, or lengths that do not fit.
    """
    if gate not in GATE_KINDS:
        raise ValueError(f"gate: expected one of {', '.join(GATE_KINDS)}, got {gate!r}")
    if lengths is not None and (batch != 1 or sum(lengths) != tokens or min(lengths, default=-1) < 0):
        raise ValueError(
            f"lengths: expected lengths >= 0 that sum to tokens == {tokens}, with batch == 1, "
            f"got {list(lengths)} and batch == {batch}"
        )
    v_heads, value_dim = v_heads or heads, value_dim or key_dim
    random = torch.Generator(drawn_on).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=random.device, dtype=_draw_dtype(random))

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k = normal(batch, tokens, heads, key_dim), normal(batch, tokens, heads, key_dim)
    if normalized:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    v = normal(batch, tokens, v_heads, value_dim)
    beta = normal(batch, tokens, v_heads).sigmoid()
    sequences = batch if lengths is None else len(lengths)
    state = normal(sequences, v_heads, value_dim, key_dim)
    x, A, bias = _gate_parameters(gate, (batch, tokens, v_heads, key_dim), random)
    if dt_bias is not None:
        bias = torch.full_like(bias, dt_bias)
    kind = BoundedGate if gate == "bounded" else SoftplusGate
    made = kind(x.to(device, dtype), A.log().to(device, wide), bias.to(device, wide))
    return KDAInputs(
        q=q.to(device, dtype),
        k=k.to(device, dtype),
        v=v.to(device, dtype),
        gate=made if raw else made.log_decay(),
        beta=beta.to(device, wide),
        initial_state=state.to(device, wide),
        cu_seqlens=None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).to(device),
    )


def _draw_dtype(random: torch.Generator) -> torch.dtype:
    """fp64 on a CPU, so that every dtype rounds the same values; fp32 elsewhere, for half the memory and time."""
    return torch.float64 if random.device.type == "cpu" else torch.float32


def _gate_parameters(
    kind: GateKind, shape: tuple[int, int, int, int], random: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, T, HV, K], A [HV] and dt_bias [HV, K], on the generator's device."""
    tokens, heads, key_dim = shape[1:]
    device, dtype = random.device, _draw_dtype(random)
    x = torch.randn(shape, generator=random, device=device, dtype=dtype)
    A = 1 + 15 * torch.rand(heads, generator=random, device=device, dtype=dtype)
    if kind in ("init", "bounded"):
        low, high = math.log(1e-3), math.log(1e-1)
        dt = (low + (high - low) * torch.rand(heads, key_dim, generator=random, device=device, dtype=dtype)).exp()
        bias = dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus
        return x, torch.ones_like(A) if kind == "bounded" else A, bias
    if kind == "fast":
        return x, A, torch.full((heads, key_dim), FAST_BIAS, device=device, dtype=dtype)
    A = torch.full_like(A, 16.0)
    bias = torch.tensor(STRESS_BIAS, device=device, dtype=dtype).repeat(-(-key_dim // 3))[:key_dim].repeat(heads, 1)
    bias[:, -1] = STRESS_BIAS[-1]
    if kind == "stress":
        start = max(0, tokens - 17) // 2
        x[:, start : start + 16, :, -1] = STRESS_RUN
        x[:, start + 16 : start + 17, :, -1] = STRESS_STEP
        return x, A, bias
    # Runs of 1 to 8 tokens, strong and quiet in turn, at other places in every channel.
    length = torch.randint(1, 9, (1, 1, heads, key_dim), generator=random, device=device)
    shift = torch.randint(0, 16, (1, 1, heads, key_dim), generator=random, device=device)
    position = torch.arange(tokens, device=device)[None, :, None, None]
    quiet = (position + shift) // length % 2 == 1
    return torch.where(quiet, MIXED_QUIET, x), A, bias
