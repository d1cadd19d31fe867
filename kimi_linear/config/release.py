"""The release layout's config.json, written and read: the keys of Kimi-Linear-48B-A3B, field by field.

A model that those keys can describe is written so that every reader of the layout takes it. Our own configuration rides
along under ``OWN_KEY``, for the axes that the layout cannot say; a model that needs them is given another architecture
name, so that a foreign reader refuses it instead of running something else. Layers count from 1 in the layout.
"""

from __future__ import annotations

from typing import Any

from kimi_linear.config.model import MAX_LAYERS, ConfigError, Mixer, ModelConfig
from kimi_linear.config.transformers import OWN_KEYS, SPELLINGS, settle

MODEL_TYPE, ARCHITECTURE = "kimi_linear", "KimiLinearForCausalLM"
VARIANT_TYPE, VARIANT_ARCHITECTURE = "kimi_linear_variant", "KimiLinearVariantForCausalLM"
"""What a model is called that the release layout cannot describe."""
OWN_KEY = "kimi_linear_config"
LAYOUT_VERSION = "4.57.1"
"""The transformers release that the released config.json names."""

WITHOUT_MEANING: dict[str, str] = {
    "architectures": "names a class of the reader",
    "auto_map": "names remote code, which is never run",
    "transformers_version": "names the writer",
    "_name_or_path": "names where the file came from",
    "dtype": "says how the weights are stored; kimi_linear.load reads it",
    "torch_dtype": "the same under its older name",
    "head_dim": "legacy hidden_size // heads; the layers have their own widths",
    "use_cache": "a choice of the caller",
}
"""Keys that are legal in a config.json and change nothing in the model, each with its reason."""

ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "q_lora_rank": (None,),
    "rope_scaling": (None,),
    "moe_router_activation_func": ("sigmoid",),
    "moe_layer_freq": (1,),
    "num_nextn_predict_layers": (0, None),
}
"""Keys of which only these values are built; the first is what we write, and what an absent key means."""

RENAMED: dict[str, str] = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "intermediate_size": "intermediate_size",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "initializer_range",
    "model_max_length": "max_position_embeddings",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
"""Key of the layout, and field of ``ModelConfig``."""
RENAMED_MLA: dict[str, str] = {
    "num_attention_heads": "num_heads",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "rope_theta": "rope_theta",
}
"""Key of the layout, and field of ``MLAConfig``."""
RENAMED_MOE: dict[str, str] = {
    "num_experts": "num_experts",
    "num_experts_per_token": "experts_per_token",
    "moe_intermediate_size": "expert_size",
    "num_shared_experts": "num_shared_experts",
    "first_k_dense_replace": "first_dense_layers",
    "num_expert_group": "num_groups",
    "topk_group": "groups_per_token",
    "moe_renormalize": "renormalize",
    "routed_scaling_factor": "scaling_factor",
}
"""Key of the layout, and field of ``MoEConfig``."""
RENAMED_LINEAR: dict[str, str] = {
    "num_heads": "num_heads",
    "head_dim": "head_dim",
    "short_conv_kernel_size": "conv_size",
}
"""Key of the layout's ``linear_attn_config``, and field of ``LinearConfig``."""
LAYER_LISTS = ("kda_layers", "full_attn_layers")
OTHER_KEYS = (
    "model_type", "num_key_value_heads", "mla_use_nope", "use_grouped_topk", "linear_attn_config", OWN_KEY,
)  # fmt: skip
LINEAR_KEYS = {*RENAMED_LINEAR, *LAYER_LISTS, "gate_lower_bound", "use_full_rank_gate"}
PATTERNS = ("0:1", "1:1", "3:1", "7:1", "15:1", "1:0")
"""The paper's ratios; a list of layers that one of them makes is read back as that pattern."""


def to_release(config: ModelConfig, *, dtype: str = "bfloat16") -> dict[str, Any]:
    """The config.json of ``config`` in the release layout, every key of the released file but ``auto_map``.

    Args:
        config: any model.
        dtype: name of the dtype that the weights are stored in.
    """
    values = _plain(config)
    variant = _variant(config, values)
    return {
        "architectures": [VARIANT_ARCHITECTURE if variant else ARCHITECTURE],
        "model_type": VARIANT_TYPE if variant else MODEL_TYPE,
        "dtype": dtype,
        "transformers_version": LAYOUT_VERSION,
        "head_dim": config.hidden_size // config.mla.num_heads,
        "use_cache": True,
        **values,
        OWN_KEY: config.to_dict(),
    }


def from_release(values: dict[str, Any]) -> ModelConfig:
    """The model that a config.json in the release layout describes, whether or not transformers' keys stand beside it.

    Raises:
        ConfigError: an unknown or missing key, a value that is not built, layer lists that do not cover the layers once
            each counting from 1, or transformers' keys or our own configuration contradicting the layout's keys.
    """
    known = {*RENAMED, *RENAMED_MLA, *RENAMED_MOE, *ONLY, *WITHOUT_MEANING, *OTHER_KEYS}
    _no_unknown(values, {*known, *OWN_KEYS, *SPELLINGS}, "")
    values = settle(values)
    kind = values.get("model_type")
    if kind not in (MODEL_TYPE, VARIANT_TYPE):
        raise ConfigError(f"model_type: expected {MODEL_TYPE!r}, got {kind!r}; is this another model's config.json?")
    if OWN_KEY not in values:
        if kind == VARIANT_TYPE:
            raise ConfigError(f"{OWN_KEY}: missing key; a {VARIANT_TYPE} model is described by it alone")
        return _read(values)
    config = ModelConfig.from_dict(values[OWN_KEY])
    for key, expected in _plain(config).items():
        if key in values and values[key] != expected and not (config.moe is None and values[key] is None):
            raise ConfigError(
                f"{key}: expected {expected!r}, as {OWN_KEY} says, got {values[key]!r}; "
                f"delete {OWN_KEY} to read the other keys alone"
            )
    return config


def _plain(config: ModelConfig) -> dict[str, Any]:
    """The keys with meaning, without our own."""
    layers = {name: [i + 1 for i, m in enumerate(config.layer_mixers) if (m == "mla") == (name == "full_attn_layers")]
              for name in LAYER_LISTS}  # fmt: skip
    linear: dict[str, Any] = {key: getattr(config.linear, name) for key, name in RENAMED_LINEAR.items()} | layers
    if config.linear.gate == "bounded":
        linear["gate_lower_bound"] = config.linear.gate_lower_bound
    if config.linear.output_gate_rank == "full":
        linear["use_full_rank_gate"] = True
    moe = config.moe
    return {
        **{key: getattr(config, name) for key, name in RENAMED.items()},
        **{key: getattr(config.mla, name) for key, name in RENAMED_MLA.items()},
        # Without expert keys every reader builds dense layers; transformers, which has defaults for them, is told here.
        **(
            {"first_k_dense_replace": config.num_layers}
            if moe is None
            else {key: getattr(moe, name) for key, name in RENAMED_MOE.items()}
        ),
        **{key: allowed[0] for key, allowed in ONLY.items()},
        "num_key_value_heads": config.mla.num_heads,
        "mla_use_nope": config.mla.position == "nope",
        "use_grouped_topk": True,
        "linear_attn_config": linear,
    }


def _variant(config: ModelConfig, values: dict[str, Any]) -> bool:
    """Whether the layout's keys alone would be read back as another model."""
    try:
        read = _read(values)
    except ConfigError:
        return True
    return _normal(read) != _normal(config)


def _normal(config: ModelConfig) -> dict[str, Any]:
    """What the model computes, however the configuration spells it."""
    linear, moe = config.linear, config.moe
    return config.to_dict() | {
        "pattern": None,
        "mixers": config.layer_mixers,
        "linear_mixer": None,
        "linear": (
            linear.num_heads, linear.head_dim, linear.value_heads, linear.value_dim, linear.conv_size, linear.gate,
            linear.gate_lower_bound if linear.gate == "bounded" else None,
            linear.head_dim if linear.gate_rank is None else linear.gate_rank,
            linear.output_gate, linear.value_dim if linear.output_gate_rank is None else linear.output_gate_rank,
            linear.output_gate_bias,
        ),
        "mla": config.mla.__dict__ | {"kv_norm_eps": config.kv_norm_eps},
        "moe": None if moe is None else moe.__dict__,
    }  # fmt: skip


def _read(values: dict[str, Any]) -> ModelConfig:
    """The layout's keys alone."""
    for key, allowed in ONLY.items():
        if key in values and values[key] not in allowed:
            shown = " or ".join(map(repr, allowed))
            raise ConfigError(f"{key}: expected {shown}, got {values[key]!r}; nothing else is built")
    layers = _need(values, "num_hidden_layers")
    heads = _need(values, "num_attention_heads")
    if values.get("num_key_value_heads", heads) != heads:
        got = values["num_key_value_heads"]
        raise ConfigError(f"num_key_value_heads: expected num_attention_heads == {heads}, got {got}")
    linear_values = _need(values, "linear_attn_config")
    mixers = _mixers(linear_values, layers)
    fields = {name: values[key] for key, name in RENAMED.items() if key in values}
    for key in ("vocab_size", "hidden_size", "intermediate_size"):
        _need(values, key)
    fields |= {
        "linear": _linear(linear_values),
        "mla": {name: values[key] for key, name in RENAMED_MLA.items() if key in values}
        | {"position": "nope" if values.get("mla_use_nope", True) else "rope"},
        "moe": _moe(values),
    }
    for pattern in PATTERNS:
        config = ModelConfig.from_dict(fields | {"pattern": pattern})
        if config.layer_mixers == mixers:
            return config
    return ModelConfig.from_dict(fields | {"mixers": mixers})


def _linear(values: dict[str, Any]) -> dict[str, Any]:
    fields = {name: values[key] for key, name in RENAMED_LINEAR.items() if key in values}
    _need(values, "num_heads", "linear_attn_config.")
    if values.get("gate_lower_bound") is not None:
        fields |= {"gate": "bounded", "gate_lower_bound": values["gate_lower_bound"]}
    if values.get("use_full_rank_gate"):
        fields["output_gate_rank"] = "full"
    return fields


def _moe(values: dict[str, Any]) -> dict[str, Any] | None:
    if values.get("num_experts") is None:
        return None
    fields = {name: values[key] for key, name in RENAMED_MOE.items() if values.get(key) is not None}
    for key in ("num_experts_per_token", "moe_intermediate_size"):
        _need(values, key)
    fields.setdefault("first_dense_layers", 0)
    fields.setdefault("num_shared_experts", 0)
    if not values.get("use_grouped_topk", True) and fields.get("num_groups", 1) != 1:
        raise ConfigError(
            f"use_grouped_topk: expected true, as num_expert_group == {fields['num_groups']} asks for, got false"
        )
    return fields


def _mixers(values: dict[str, Any], layers: int) -> tuple[Mixer, ...]:
    """The mixer of each layer, from two lists that count from 1 and cover each layer once."""
    _no_unknown(values, LINEAR_KEYS, "linear_attn_config.")
    if type(layers) is not int or not 0 < layers <= MAX_LAYERS:
        raise ConfigError(f"num_hidden_layers: expected an integer from 1 to {MAX_LAYERS:,}, got {layers!r}")
    kda, full = (_need(values, name, "linear_attn_config.") for name in LAYER_LISTS)
    for name, numbers in zip(LAYER_LISTS, (kda, full), strict=True):
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise ConfigError(f"linear_attn_config.{name}: expected a list of layer numbers, got {numbers!r:.100}")
    listed = sorted([*kda, *full])
    if listed == list(range(1, layers + 1)):
        return tuple("kda" if i in kda else "mla" for i in range(1, layers + 1))
    if listed == list(range(layers)):
        raise ConfigError(
            f"linear_attn_config: expected kda_layers and full_attn_layers to count layers from 1 to {layers}, got 0 to "
            f"{layers - 1}; add 1 to each number"
        )
    for i in range(1, layers + 1):
        if listed.count(i) != 1:
            times = "missing" if i not in listed else "listed twice"
            raise ConfigError(
                f"linear_attn_config: expected kda_layers and full_attn_layers to name each layer from 1 to {layers} once; "
                f"layer {i} is {times}"
            )
    strangers = [i for i in listed if not 1 <= i <= layers]
    raise ConfigError(f"linear_attn_config: expected layers from 1 to num_hidden_layers == {layers}, got {strangers}")


def _no_unknown(values: object, known: set[str], prefix: str) -> None:
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'config.json'}: expected an object, got {type(values).__name__}")
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(
            f"{prefix}{unknown[0]}: unknown key; it may change the model, so it is not ignored; "
            f"known are {', '.join(sorted(known))}"
        )


def _need(values: dict[str, Any], key: str, prefix: str = "") -> Any:
    if values.get(key) is None:
        raise ConfigError(
            f"{prefix}{key}: missing key; the release layout has it; 'kimi-linear check' tells what else is wrong, and "
            "'kimi-linear convert --repair' writes what the weights settle"
        )
    return values[key]
