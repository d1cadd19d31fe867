"""The two models of the nano study: the hybrid, and full attention with rotary positions at the same number of parameters."""

from __future__ import annotations

from typing import Literal, TypeAlias

from kimi_linear.config import ModelConfig

Which: TypeAlias = Literal["nano", "twin"]
"""The 3:1 hybrid of KDA and full attention without positions, or full attention with RoPE in every layer."""

TWIN = {"intermediate_size": 752, "mla": {"kv_lora_rank": 128}}
"""What the twin gets for the gates and convolutions that it lacks: a wider latent and feed-forward."""


def model_of(which: Which, vocab_size: int, eos_id: int | None) -> ModelConfig:
    """8 layers of width 256 with 4 heads of 64: 8.1 M parameters with 5,120 tokens, 15.4 MiB in bf16."""
    changes = {} if which == "nano" else TWIN
    name = "mini" if which == "nano" else "mini/mla"
    return ModelConfig.preset(name, vocab_size=vocab_size, eos_token_id=eos_id, **changes)


def tiny_model_of(which: Which, vocab_size: int, eos_id: int | None) -> ModelConfig:
    """The same two shapes at a size that a CPU trains in seconds, to try the whole way."""
    changes = {} if which == "nano" else {"intermediate_size": 416, "mla": {"kv_lora_rank": 96}}
    name = "tiny" if which == "nano" else "tiny/mla"
    return ModelConfig.preset(name, vocab_size=vocab_size, eos_token_id=eos_id, **changes)


def training_flops(config: ModelConfig, sequence_length: int) -> float:
    """Floating-point operations of forward and backward per token: 6 for each weight that multiplies, and the scores.

    The embedding is a look-up and counts once, as the output projection. Attention counts half of all pairs; the
    recurrence's products, 2 K V for each of writing, correcting and reading a head, count as the recurrence needs them,
    not as a chunked form computes them.
    """
    import torch

    from kimi_linear.model import KimiLinear

    with torch.device("meta"):
        model = KimiLinear(config)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    if not config.tie_embeddings:
        matrices -= config.vocab_size * config.hidden_size
    linear, mla = config.linear, config.mla
    memory = 6 * linear.value_heads * linear.head_dim * linear.value_dim
    scores = 2 * mla.num_heads * (mla.qk_head_dim + mla.v_head_dim) * sequence_length / 2
    mixers = sum(scores if mixer == "mla" else memory for mixer in config.layer_mixers)
    return 6.0 * matrices + 3.0 * mixers
