"""Watching the memory at work: what each KDA layer forgets and corrects at every token.

Nothing of this is in the layers' own path: recording hooks onto them from outside, and repeats the recurrence once more
on what they saw.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kimi_linear.model.kda import KDA
from kimi_linear.model.linear_mixer import wide
from kimi_linear.ops.contract import log_decay
from kimi_linear.ops.norm import l2_normalize
from kimi_linear.reference.kda import kda_step
from kimi_linear.reference.sequences import by_token, over_sequences


@dataclass(frozen=True, kw_only=True, eq=False)
class KDATrace:
    """One forward of one KDA layer.

    Attributes:
        log_decay: [B, T, HV, K] natural logarithm of what each key channel keeps; its half-life is
            ``-ln 2 / log_decay`` tokens.
        beta: [B, T, HV] strength of the correction.
        error: [B, T, HV] size of the correction asked for, ``||v - S~^T k||`` with S~ the decayed memory: how far the
            memory's answer was from the token's value.
        value: [B, T, HV] ``||v||``, to compare it with.
    """

    log_decay: Tensor
    beta: Tensor
    error: Tensor
    value: Tensor


@dataclass(kw_only=True, eq=False)
class Trace:
    """What was recorded.

    Attributes:
        layers: by index of the block, one ``KDATrace`` per forward, in order.
    """

    layers: dict[int, list[KDATrace]] = field(default_factory=dict)


@contextmanager
def record(model: Any) -> Iterator[Trace]:
    """Record every KDA layer of a ``KimiLinear`` while the context is open. Costs a token-by-token recurrence."""
    trace, hooks = Trace(), []
    for index, block in enumerate(model.blocks):
        if isinstance(block.self_attn, KDA):
            kept = trace.layers.setdefault(index, [])
            hooks.append(block.self_attn.register_forward_pre_hook(_hook(kept), with_kwargs=True))
    try:
        yield trace
    finally:
        for hook in hooks:
            hook.remove()


def _hook(kept: list[KDATrace]) -> Any:
    def before_forward(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(layer, KDA)
        kept.append(_trace(layer, *args, **kwargs))

    return before_forward


@torch.no_grad()
def _trace(layer: KDA, x: Tensor, *, cu_seqlens: Tensor | None, state: Any) -> KDATrace:
    q, k, v, _ = layer.project(x, cu_seqlens=cu_seqlens, state=state)
    g, beta = log_decay(layer.gate(x)), layer.beta(x)
    memory = None if state is None else state.read()[0]
    error, _ = over_sequences(by_token(_error_step), (q, l2_normalize(k), wide(v), g, beta), 1.0, memory, cu_seqlens)
    return KDATrace(log_decay=g, beta=beta, error=error.norm(dim=-1), value=wide(v).norm(dim=-1))


def _error_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """As ``kda_step``, but the output is v - S~^T k instead of the read."""
    decayed = state * g.exp()[..., None, :]
    error = v - (decayed @ k[..., None])[..., 0]
    return error, kda_step(state, q, k, v, g, beta, scale)[1]
