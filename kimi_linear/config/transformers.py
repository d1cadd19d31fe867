"""How transformers (>= 5.17) spells a Kimi Linear config.json, and what it leaves out.

Its file may hold the release's keys and its own together: a list of layer types that counts from 0, flat copies of
``linear_attn_config``, other names for the same numbers. ``settle`` turns that into the release's keys alone, and
refuses a file whose two halves disagree.
"""

from __future__ import annotations

from typing import Any

from kimi_linear.config.model import ConfigError, ModelConfig

SPELLINGS = {
    "max_position_embeddings": "model_max_length",
    "norm_topk_prob": "moe_renormalize",
    "n_group": "num_expert_group",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token",
    "n_shared_experts": "num_shared_experts",
}
"""transformers' own name of a key, and the release's."""
FLAT = {
    "linear_num_heads": "num_heads",
    "linear_head_dim": "head_dim",
    "linear_conv_kernel_dim": "short_conv_kernel_size",
}
"""Flat key, and the key of ``linear_attn_config`` that says the same."""
LINEAR, FULL, DENSE, SPARSE = "linear_attention", "full_attention", "dense", "sparse"
MUST_BE: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "attention_dropout": (0, 0.0),
    "rope_parameters": (None,),
}
"""Keys of transformers that are built here only with these values."""
WITHOUT_MEANING = ("pretraining_tp", "qk_head_dim")
OWN_KEYS = {*FLAT, *MUST_BE, *WITHOUT_MEANING, "layer_types", "mlp_layer_types"}
"""The keys that transformers adds to the release's."""
EXPERT_KEYS = (
    "num_experts", "num_experts_per_token", "moe_intermediate_size", "num_shared_experts", "num_expert_group", "topk_group",
    "moe_renormalize", "routed_scaling_factor",
)  # fmt: skip


def written_by_transformers(values: dict[str, Any]) -> bool:
    """Whether a config.json has keys that only transformers writes."""
    return "layer_types" in values or "mlp_layer_types" in values


def settle(values: dict[str, Any]) -> dict[str, Any]:
    """The release's keys of a config.json that transformers may have written; others pass as they are.

    Raises:
        ConfigError: the two spellings of a key, or the two ways of naming the layers, contradict each other, or a key of
            transformers has a value that is not built here.
    """
    settled = {key: value for key, value in values.items() if key not in OWN_KEYS and key not in SPELLINGS}
    for key, name in SPELLINGS.items():
        if key in values:
            _agree(key, values[key], settled.setdefault(name, values[key]), name)
    for key, allowed in MUST_BE.items():
        default_rope = key == "rope_parameters" and (values.get(key) or {}).get("rope_type") == "default"
        if key in values and values[key] not in allowed and not default_rope:
            raise ConfigError(f"{key}: expected {allowed[0]!r}, got {values[key]!r}; nothing else is built")
    if not written_by_transformers(values):
        for key, name in FLAT.items():
            if key in values:
                linear = settled.get("linear_attn_config") or {}
                _agree(key, values[key], linear.get(name), f"linear_attn_config.{name}")
        return settled
    if "layer_types" in values:
        settled["linear_attn_config"] = _linear(values)
    if "mlp_layer_types" in values:
        _dense(values, settled)
    return settled


def to_transformers(values: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The release's config.json with transformers' keys beside it, so that both kinds of reader find theirs.

    Args:
        values: complete, in the release's keys.
        config: the model that they describe.

    Raises:
        ConfigError: transformers has no such model.
    """
    linear, moe = config.linear, config.moe
    has = {
        "gate": (linear.gate, "softplus"),
        "output_gate": (linear.output_gate, "sigmoid"),
        "output_gate_rank": (linear.output_gate_rank in (None, linear.value_dim), True),
        "gate_rank": (linear.gate_rank in (None, linear.head_dim), True),
        "num_v_heads": (linear.value_heads, linear.num_heads),
        "v_head_dim": (linear.value_dim, linear.head_dim),
        "conv_size": (linear.conv_size > 0, True),
        "mla.position": (config.mla.position, "nope"),
        "mixers": (set(config.layer_mixers) <= {"kda", "mla"}, True),
        "num_shared_experts": (moe is None or moe.num_shared_experts > 0, True),
        "output_gate_bias": (linear.output_gate_bias, False),
        "tie_embeddings": (config.tie_embeddings, False),
    }
    for name, (got, expected) in has.items():
        if got != expected:
            value = getattr(linear, name, getattr(config, name, got))
            raise ConfigError(
                f"{name}: transformers' Kimi Linear has no {name} == {value!r}; this model stays in the release layout"
            )
    layers = range(config.num_layers)
    return {
        **values,
        "head_dim": config.mla.qk_rope_head_dim,
        "qk_head_dim": config.mla.qk_head_dim,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "pretraining_tp": 1,
        "layer_types": [FULL if config.layer_mixers[i] == "mla" else LINEAR for i in layers],
        "mlp_layer_types": [SPARSE if config.is_moe_layer(i) else DENSE for i in layers],
        **{key: values["linear_attn_config"][name] for key, name in FLAT.items()},
    }


def _linear(values: dict[str, Any]) -> dict[str, Any]:
    """``linear_attn_config`` from the flat keys and the layer types, which must agree with the one that is there."""
    types = values["layer_types"]
    strangers = sorted({str(t) for t in types} - {LINEAR, FULL})
    if strangers:
        raise ConfigError(f"layer_types: expected {LINEAR} and {FULL}, got {strangers[0]}")
    lists = {
        "kda_layers": [i for i, t in enumerate(types, start=1) if t == LINEAR],
        "full_attn_layers": [i for i, t in enumerate(types, start=1) if t == FULL],
    }
    there = dict(values.get("linear_attn_config") or {})
    flat = {name: values[key] for key, name in FLAT.items() if key in values}
    for name, value in {**flat, **lists}.items():
        _agree("layer_types" if name in lists else name, value, there.get(name), f"linear_attn_config.{name}")
    return {**flat, **lists, **there}


def _dense(values: dict[str, Any], settled: dict[str, Any]) -> None:
    """``first_k_dense_replace`` from the feed-forward types; no expert keys where all layers are dense."""
    types = values["mlp_layer_types"]
    dense = sum(t == DENSE for t in types)
    if list(types) != [DENSE] * dense + [SPARSE] * (len(types) - dense):
        raise ConfigError(
            f"mlp_layer_types: expected {DENSE} layers and then {SPARSE} ones, got {types}; nothing else is built"
        )
    there = settled.get("first_k_dense_replace")
    if not (dense == len(types) and there is None):
        _agree("mlp_layer_types", dense, there, "first_k_dense_replace")
    settled["first_k_dense_replace"] = dense
    if dense == len(types):
        for key in EXPERT_KEYS:
            settled.pop(key, None)


def _agree(key: str, value: Any, there: Any, name: str) -> None:
    if there is not None and there != value:
        raise ConfigError(
            f"{key}: expected {there!r}, as {name} says, got {value!r}; 'kimi-linear check' tells which of them the weights "
            "are of, and 'kimi-linear convert --repair' mends it"
        )
