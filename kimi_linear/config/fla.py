"""The config.json of fla's KDAForCausalLM (flash-linear-attention 0.6), read and written.

fla's model has KDA in every layer and dense feed-forwards; it has no MLA and no mixture of experts. Its output gate
always carries a bias.
"""

from __future__ import annotations

from typing import Any

from kimi_linear.config.model import ConfigError, LinearConfig, MLAConfig, ModelConfig
from kimi_linear.config.release import OWN_KEY

MODEL_TYPE, ARCHITECTURE = "kda", "KDAForCausalLM"
RENAMED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "initializer_range",
    "max_position_embeddings": "max_position_embeddings",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
"""fla's key, and the field of ``ModelConfig``."""
DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 24, "norm_eps": 1e-6, "tie_word_embeddings": False,
    "initializer_range": 0.02, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "num_heads": 16,
    "head_dim": 128, "expand_v": 1.0, "conv_size": 4, "use_short_conv": True, "hidden_ratio": 4,
}  # fmt: skip
"""What fla takes for an absent key."""
MUST_BE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("swish", "silu"),
    "allow_neg_eigval": (False,),
    "attn": (None,),
    "attnres_block_size": (None,),
}
"""Keys that are built here only with these values; the first is what we write."""
WITHOUT_MEANING = (
    "architectures", "auto_map", "transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "attn_mode",
    "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "use_l2warp", "model_type", "fuse_linear_cross_entropy",
)  # fmt: skip
"""Keys that choose an implementation or name a writer and change nothing in the model."""
OTHER_KEYS = (
    "num_heads", "head_dim", "num_v_heads", "expand_v", "conv_size", "use_short_conv", "safe_gate", "lower_bound",
    "intermediate_size", "hidden_ratio", OWN_KEY,
)  # fmt: skip
SAFE_BOUND = -5.0
"""Strongest bounded gate that fla's kernels take."""


def to_fla(config: ModelConfig, *, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of ``config`` for fla's KDAForCausalLM.

    Raises:
        ConfigError: fla has no such model; the message says which field.
    """
    linear = config.linear
    for ok, name, expected in (
        (
            set(config.layer_mixers) == {"kda"},
            "mixers",
            "KDA in every layer (pattern '1:0'); fla has no MLA, GDN or Mamba-2 in it",
        ),
        (config.moe is None, "moe", "dense feed-forwards; fla's KDA has no mixture of experts"),
        (linear.output_gate == "sigmoid", "linear.output_gate", "'sigmoid'"),
        (linear.output_gate_rank in (None, linear.value_dim), "linear.output_gate_rank", "None, a low-rank gate"),
        (_rank(linear) == linear.value_dim, "linear.gate_rank", "V, the width of a value head"),
        (
            linear.gate == "softplus" or linear.gate_lower_bound >= SAFE_BOUND,
            "linear.gate_lower_bound",
            f"at least {SAFE_BOUND}",
        ),
    ):
        if not ok:
            raise ConfigError(f"{name}: for fla's layout expected {expected}; this model cannot be written for it")
    bounded = linear.gate == "bounded"
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        **{key: getattr(config, name) for key, name in RENAMED.items()},
        "num_heads": linear.num_heads,
        "head_dim": linear.head_dim,
        "num_v_heads": linear.num_v_heads,
        "expand_v": linear.value_dim / linear.head_dim,
        "conv_size": linear.conv_size or 4,
        "use_short_conv": linear.conv_size > 0,
        "safe_gate": bounded,
        "lower_bound": linear.gate_lower_bound if bounded else None,
        "intermediate_size": config.intermediate_size,
        "hidden_ratio": None,
        **{key: allowed[0] for key, allowed in MUST_BE.items()},
        OWN_KEY: config.to_dict(),
    }


def from_fla(values: dict[str, Any], *, output_gate_bias: bool = False) -> ModelConfig:
    """The model that a config.json of fla's KDAForCausalLM describes.

    Args:
        values: of config.json.
        output_gate_bias: whether the weights' biases of the output gate are other than zero; the file does not say.

    Raises:
        ConfigError: an unknown key, a value that is not built, or our own configuration contradicting fla's keys.
    """
    if values.get("model_type") != MODEL_TYPE:
        raise ConfigError(f"model_type: expected {MODEL_TYPE!r}, got {values.get('model_type')!r}")
    unknown = sorted(set(values) - {*RENAMED, *MUST_BE, *WITHOUT_MEANING, *OTHER_KEYS})
    if unknown:
        raise ConfigError(f"{unknown[0]}: unknown key; it may change the model, so it is not ignored")
    for key, allowed in MUST_BE.items():
        if key in values and values[key] not in allowed:
            raise ConfigError(f"{key}: expected {allowed[0]!r}, got {values[key]!r}; nothing else is built")
    if OWN_KEY in values:
        return _own(values, output_gate_bias)
    full = {**DEFAULTS, **values}

    def get(key: str) -> Any:
        return full.get(key)

    bound = get("lower_bound")
    value_dim = get("head_dim") * get("expand_v")
    if value_dim != int(value_dim):
        raise ConfigError(f"expand_v: expected a whole number of channels, got {value_dim}")
    linear = LinearConfig(
        num_heads=get("num_heads"),
        head_dim=get("head_dim"),
        num_v_heads=get("num_v_heads"),
        v_head_dim=None if value_dim == get("head_dim") else int(value_dim),
        conv_size=get("conv_size") if get("use_short_conv") else 0,
        gate="softplus" if bound is None else "bounded",
        gate_lower_bound=-5.0 if bound is None else bound,
        gate_rank=None if value_dim == get("head_dim") else int(value_dim),
        output_gate_bias=output_gate_bias,
    )
    fields: dict[str, Any] = {name: get(key) for key, name in RENAMED.items()}
    inner = get("intermediate_size")
    if inner is None:
        # fla rounds two thirds of the ratio up to a multiple of 256.
        ratio = get("hidden_ratio") or DEFAULTS["hidden_ratio"]
        inner = -(-int(get("hidden_size") * ratio * 2 / 3) // 256) * 256
    mla = MLAConfig(num_heads=get("num_heads"))
    return ModelConfig(**fields, intermediate_size=inner, linear=linear, mla=mla, pattern="1:0")


def _own(values: dict[str, Any], output_gate_bias: bool) -> ModelConfig:
    own = {**values[OWN_KEY], "linear": {**values[OWN_KEY].get("linear", {}), "output_gate_bias": output_gate_bias}}
    config = ModelConfig.from_dict(own)
    for key, expected in to_fla(config).items():
        if key in values and key not in (*WITHOUT_MEANING, OWN_KEY) and values[key] != expected:
            raise ConfigError(
                f"{key}: expected {expected!r}, as {OWN_KEY} says, got {values[key]!r}; delete {OWN_KEY} to read the other "
                "keys alone"
            )
    return config


def _rank(linear: LinearConfig) -> int:
    return linear.head_dim if linear.gate_rank is None else linear.gate_rank
