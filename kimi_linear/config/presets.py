"""Named model configurations: the released model field by field, scaled-down ones, and same-shape baselines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from kimi_linear.config.model import ConfigError, LinearConfig, MLAConfig, ModelConfig, MoEConfig, replace

BYTE_VOCAB = 320
"""256 bytes and a few special tokens, padded to a multiple of 64 for the matrix units."""


def kimi_linear_48b_a3b() -> ModelConfig:
    """The released Kimi-Linear-48B-A3B, 49,122,681,728 parameters (its config.json)."""
    return ModelConfig(
        vocab_size=163840,
        hidden_size=2304,
        num_layers=27,
        intermediate_size=9216,
        linear=LinearConfig(num_heads=32, head_dim=128),
        mla=MLAConfig(num_heads=32),
        moe=MoEConfig(num_experts=256, experts_per_token=8, expert_size=1024, scaling_factor=2.446),
        bos_token_id=163584,
        eos_token_id=163586,
        pad_token_id=163839,
    )


def scaled_down(
    *, hidden_size: int, num_layers: int, num_heads: int, head_dim: int, vocab_size: int, moe: MoEConfig | None = None
) -> ModelConfig:
    """A small dense hybrid with the released model's proportions, tied embeddings and SwiGLU of 8/3 the width."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        intermediate_size=-(-8 * hidden_size // 3 // 64) * 64,
        linear=LinearConfig(num_heads=num_heads, head_dim=head_dim),
        mla=MLAConfig(
            num_heads=num_heads,
            kv_lora_rank=max(64, hidden_size // 4),
            qk_nope_head_dim=head_dim,
            qk_rope_head_dim=max(16, head_dim // 2),
            v_head_dim=head_dim,
        ),
        moe=moe,
        tie_embeddings=True,
        max_position_embeddings=65536,
    )


def tiny() -> ModelConfig:
    """About 1M parameters on bytes: trains on a laptop in minutes; what tests and the demo use."""
    return scaled_down(hidden_size=128, num_layers=4, num_heads=2, head_dim=64, vocab_size=BYTE_VOCAB)


def mini() -> ModelConfig:
    """About 7M parameters on bytes: an evening on a CPU, minutes on a GPU."""
    return scaled_down(hidden_size=256, num_layers=8, num_heads=4, head_dim=64, vocab_size=BYTE_VOCAB)


def small() -> ModelConfig:
    """About 45M parameters besides a 32K vocabulary: under an hour on one data-centre GPU."""
    return scaled_down(hidden_size=512, num_layers=12, num_heads=4, head_dim=128, vocab_size=32768)


def medium() -> ModelConfig:
    """About 190M parameters besides a 32K vocabulary: hours on one data-centre GPU."""
    return scaled_down(hidden_size=1024, num_layers=16, num_heads=8, head_dim=128, vocab_size=32768)


def tiny_moe() -> ModelConfig:
    """``tiny`` with eight experts, two at a time: every part of the released model at test size."""
    moe = MoEConfig(num_experts=8, experts_per_token=2, expert_size=128, scaling_factor=2.446)
    return replace(tiny(), moe=moe)


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "kimi-linear-48b-a3b": kimi_linear_48b_a3b,
    "tiny": tiny,
    "tiny-moe": tiny_moe,
    "mini": mini,
    "small": small,
    "medium": medium,
}
"""Every named configuration."""

Baseline = Literal["mla", "mla-nope", "gdn", "mamba2", "simple-gla"]
"""What ``baseline`` puts in place of the KDA layers."""


def baseline(config: ModelConfig, kind: Baseline) -> ModelConfig:
    """The same shape with another mixer: what the paper compares Kimi Linear with.

    "mla": full attention in every layer, with rotary positions (without any it would be no fair baseline);
    "mla-nope": the same without positions; "gdn", "mamba2", "simple-gla": that mixer in place of every
    KDA layer, with KDA's heads and output gate.
    """
    if kind in ("mla", "mla-nope"):
        position = "rope" if kind == "mla" else "nope"
        return replace(config, pattern="0:1", mixers=None, mla={"position": position})
    if kind in ("gdn", "mamba2", "simple-gla"):
        mixers = (
            None if config.mixers is None else tuple(kind if m == config.linear_mixer else m for m in config.mixers)
        )
        return replace(config, linear_mixer=kind, mixers=mixers)
    raise ConfigError(f"baseline: expected one of {', '.join(get_args(Baseline))}, got {kind!r}")


def preset(name: str) -> ModelConfig:
    """The configuration called ``name``, or ``name/baseline`` such as ``tiny/mla``.

    Raises:
        ConfigError: there is none of that name.
    """
    base, _, other = name.partition("/")
    if base not in PRESETS:
        raise ConfigError(f"preset: expected one of {', '.join(PRESETS)}, got {base!r}")
    config = PRESETS[base]()
    return baseline(config, other) if other else config  # type: ignore[arg-type]
