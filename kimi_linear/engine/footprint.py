"""What a configuration costs before any weight is made: parameters, and the memory that a context takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kimi_linear.config import ModelConfig
from kimi_linear.model import KimiLinear

STATE_ITEM = 4
"""Bytes per number of a recurrent state: fp32, whatever the model's dtype."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Sizes of one configuration in one dtype. A context of T tokens takes ``state_bytes + T * token_bytes`` per
    sequence."""

    parameters: int
    """All parameters."""
    active_parameters: int
    """Parameters that one token uses: all but the routed experts that it does not visit."""
    weight_bytes: int
    """Memory for the weights: all in the dtype but A_log, dt_bias and the router's bias, which stay in fp32."""
    state_bytes: int
    """Per sequence, however long: recurrent matrices (fp32) and convolution windows of the linear layers."""
    token_bytes: int
    """Per token and sequence: the latents of the full-attention layers."""

    def context_bytes(self, tokens: int) -> int:
        """Memory for a context of ``tokens`` tokens, one sequence."""
        return self.state_bytes + tokens * self.token_bytes


def footprint(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> Footprint:
    """Count ``config`` on the meta device, where weights have shapes and no memory.

    Args:
        config: any configuration.
        dtype: of the weights, the latents and the convolution windows; the recurrent matrices are fp32 always.
    """
    with torch.device("meta"):
        model = KimiLinear(config).to(dtype)
    parameters = sum(p.numel() for p in model.parameters())
    linear = config.linear
    heads, value_heads = linear.num_heads, linear.value_heads
    channels = 2 * heads * linear.head_dim + value_heads * linear.value_dim
    state = value_heads * linear.value_dim * linear.head_dim * STATE_ITEM
    state += channels * max(linear.conv_size - 1, 0) * dtype.itemsize
    full = sum(mixer == "mla" for mixer in config.layer_mixers)
    return Footprint(
        parameters=parameters,
        active_parameters=parameters - _idle_expert_parameters(config),
        weight_bytes=sum(p.nbytes for p in model.parameters()),
        state_bytes=(config.num_layers - full) * state,
        token_bytes=full * config.mla.latent_dim * dtype.itemsize,
    )


def _idle_expert_parameters(config: ModelConfig) -> int:
    if config.moe is None:
        return 0
    layers = sum(config.is_moe_layer(i) for i in range(config.num_layers))
    idle = config.moe.num_experts - config.moe.experts_per_token
    return layers * idle * 3 * config.hidden_size * config.moe.expert_size  # gate, up and down
