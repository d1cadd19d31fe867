"""Inputs of a decoding step as a real model makes them, gates at every strength, and a pool with room to spare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kimi_linear.ops.contract import BoundedGate, Impl, SoftplusGate
from kimi_linear.ops.decode import ConvTaps, DecodePool, HeadNorm, kda_decode
from kimi_linear.ops.norm import GateActivation
from kimi_linear.testing.factories import GateKind, kda_inputs


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodeInputs:
    """Arguments of ``kda_decode``, named as they are there."""

    q: Tensor
    """[B, S, H, K], raw."""
    k: Tensor
    """[B, S, H, K], raw."""
    v: Tensor
    """[B, S, HV, V], raw."""
    gate: SoftplusGate | BoundedGate
    """[B, S, HV, K], raw."""
    beta: Tensor
    """[B, S, HV], raw."""
    pool: DecodePool
    """Random states: more slots than rows."""
    taps: ConvTaps | None
    """[channels, W]."""
    norm: HeadNorm
    """[B, S, HV, V]."""

    def step(
        self,
        *,
        slots: Tensor | None = None,
        keep: Tensor | None = None,
        out: Tensor | None = None,
        impl: Impl = "auto",
    ) -> Tensor:
        """``kda_decode`` of these inputs; their pool is written into."""
        parts = (self.q, self.k, self.v, self.gate, self.beta, self.pool, self.taps, self.norm)
        return kda_decode(*parts, slots=slots, keep=keep, out=out, impl=impl)

    def exact(self) -> DecodeInputs:
        """The same values in fp64, with a pool of their own, for the exact reference."""
        return self._map(lambda x: x.to(torch.float64, copy=True))

    def fresh(self) -> DecodeInputs:
        """The same inputs with a pool of their own."""
        return replace(self, pool=DecodePool(memory=self.pool.memory.clone(), window=self.pool.window.clone()))

    def rows(self, rows: slice, tokens: slice = slice(None)) -> DecodeInputs:
        """Some rows and tokens, on the same pool."""

        def part(x: Tensor) -> Tensor:
            return x[rows, tokens]

        return replace(
            self,
            q=part(self.q),
            k=part(self.k),
            v=part(self.v),
            gate=replace(self.gate, x=part(self.gate.x)),
            beta=part(self.beta),
            norm=replace(self.norm, gate=None if self.norm.gate is None else part(self.norm.gate)),
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> DecodeInputs:
        gate, norm, taps = self.gate, self.norm, self.taps
        return DecodeInputs(
            q=change(self.q),
            k=change(self.k),
            v=change(self.v),
            gate=replace(gate, x=change(gate.x), A_log=change(gate.A_log), dt_bias=change(gate.dt_bias)),
            beta=change(self.beta),
            pool=DecodePool(memory=change(self.pool.memory), window=change(self.pool.window)),
            taps=None if taps is None else ConvTaps(q=change(taps.q), k=change(taps.k), v=change(taps.v)),
            norm=replace(
                norm, weight=change(norm.weight), gate=None if norm.gate is None else change(norm.gate)
            ),
        )  # fmt: skip


def decode_inputs(
    batch: int = 1,
    tokens: int = 1,
    heads: int = 2,
    v_heads: int | None = None,
    key_dim: int = 32,
    value_dim: int | None = None,
    *,
    slots: int | None = None,
    conv_size: int = 4,
    gate: GateKind = "init",
    activation: GateActivation = "sigmoid",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> DecodeInputs:
    """Random inputs, the same on every machine for the same arguments.

    Args:
        batch, tokens, heads, v_heads, key_dim, value_dim: B, S, H, HV (H where None), K, V (K where None).
        slots: of the pool; ``(S + 1) * B + 1`` where None, room for every row's own and the kept ones.
        conv_size: W, 0 for no convolution.
        gate: strength, as in ``kda_inputs``.
        activation: of the output gate.
        dtype: of everything but the memory and the gate's parameters, which are fp32, or fp64 where this is.
        device: where the tensors go; they are drawn on the CPU.
        seed: of the generator.
    """
    v_heads, value_dim = v_heads or heads, value_dim or key_dim
    slots = slots or (tokens + 1) * batch + 1
    base = kda_inputs(
        batch, tokens, heads, v_heads, key_dim, value_dim, gate=gate, raw=True, normalized=False, dtype=dtype,
        device=device, seed=seed,
    )  # fmt: skip
    assert isinstance(base.gate, SoftplusGate | BoundedGate)
    random = torch.Generator().manual_seed(seed + 1)

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return (size * torch.randn(shape, generator=random)).to(device, dtype)

    keys, values = heads * key_dim, v_heads * value_dim
    taps = None
    if conv_size:
        size = conv_size**-0.5
        taps = ConvTaps(
            q=normal(keys, conv_size, size=size),
            k=normal(keys, conv_size, size=size),
            v=normal(values, conv_size, size=size),
        )
    state = torch.randn(slots, v_heads, value_dim, key_dim, generator=random)
    return DecodeInputs(
        q=base.q,
        k=base.k,
        v=base.v,
        gate=base.gate,
        beta=normal(batch, tokens, v_heads),
        pool=DecodePool(
            memory=state.to(device, base.initial_state.dtype),
            window=normal(slots, 2 * keys + values, max(0, conv_size - 1)),
        ),
        taps=taps,
        norm=HeadNorm(
            weight=1 + normal(value_dim, size=0.1),
            eps=1e-5,
            gate=None if activation == "none" else normal(batch, tokens, v_heads, value_dim),
            activation=activation,
        ),
    )
