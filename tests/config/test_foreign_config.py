"""config.json as transformers and fla write it: read as the release's, and refused where it contradicts itself."""

from __future__ import annotations

import pytest

from kimi_linear.config import ConfigError, ModelConfig, from_release, replace, to_release
from kimi_linear.config.fla import from_fla, to_fla
from kimi_linear.config.transformers import settle, to_transformers

TINY = ModelConfig.preset("tiny-moe", tie_embeddings=False)
KDA = ModelConfig.preset("tiny", pattern="1:0")
# What transformers 5.17 writes for a new KimiLinearConfig with these sizes and the paper's layer types.
SCRATCH = {
    "architectures": ["KimiLinearForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
    "dtype": "float32", "eos_token_id": 2, "head_dim": 4, "hidden_act": "silu", "hidden_size": 16, "initializer_range": 0.02,
    "intermediate_size": 24, "kv_lora_rank": 16,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention", "full_attention"],
    "linear_conv_kernel_dim": 4, "linear_head_dim": 8, "linear_num_heads": 2,
    "mlp_layer_types": ["dense", "dense", "sparse", "sparse", "sparse"], "model_max_length": 1048576,
    "model_type": "kimi_linear", "moe_intermediate_size": 8, "moe_renormalize": True, "num_attention_heads": 2,
    "num_expert_group": 1, "num_experts": 4, "num_experts_per_token": 2, "num_hidden_layers": 5, "num_key_value_heads": 2,
    "num_shared_experts": 1, "pad_token_id": 0, "pretraining_tp": 1, "q_lora_rank": None, "qk_head_dim": 12,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "rms_norm_eps": 1e-05, "routed_scaling_factor": 2.446,
    "tie_word_embeddings": False, "topk_group": 1, "transformers_version": "5.17.0", "use_cache": True, "v_head_dim": 8,
    "vocab_size": 40,
}  # fmt: skip


def test_a_file_that_transformers_wrote_from_scratch_is_read_by_its_own_keys() -> None:
    config = from_release(SCRATCH)
    assert config.layer_mixers == ("kda", "kda", "kda", "mla", "mla")
    assert [config.is_moe_layer(i) for i in range(5)] == [False, False, True, True, True]
    assert (config.linear.num_heads, config.linear.head_dim, config.linear.conv_size) == (2, 8, 4)
    assert config.mla.position == "nope"


def test_all_layers_dense_means_no_experts() -> None:
    config = from_release(SCRATCH | {"mlp_layer_types": ["dense"] * 5})
    assert config.moe is None
    written = to_release(config)
    assert written["first_k_dense_replace"] == 5
    assert not any("expert" in key for key in written)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["sliding_attention"] * 5}, "layer_types: expected linear_attention and full_attention, got sliding"),
        ({"layer_types": ["linear_attention"] * 4}, "layer 5 is missing"),
        ({"mlp_layer_types": ["sparse", "dense", "sparse", "sparse", "sparse"]}, "mlp_layer_types: expected dense layers and then"),
        ({"first_k_dense_replace": 1}, "mlp_layer_types: expected 1, as first_k_dense_replace says, got 2"),
        ({"num_local_experts": 8}, "num_local_experts: expected 4, as num_experts says, got 8"),
        ({"attention_bias": True}, "attention_bias: expected False"),
        ({"attention_dropout": 0.1}, "attention_dropout: expected 0"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters: expected None"),
        ({"gate_lower_bound": -5.0}, "gate_lower_bound: unknown key"),
        ({"linear_attn_config": {"kda_layers": [1, 2, 3, 4], "full_attn_layers": [5]}}, "layer_types: expected .*, as linear_attn_config.kda_layers says"),
        ({"linear_attn_config": {"num_heads": 4}}, "num_heads: expected 4, as linear_attn_config.num_heads says, got 2"),
    ],
)  # fmt: skip
def test_contradictions_and_what_is_not_built(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_release(SCRATCH | changes)


def test_harmless_additions_are_taken() -> None:
    other = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "num_local_experts": 4, "n_group": 1}
    assert from_release(SCRATCH | other) == from_release(SCRATCH)


def test_the_keys_for_transformers_stand_beside_the_release_and_come_off_again() -> None:
    values = to_release(TINY)
    both = to_transformers(values, TINY)
    assert both["layer_types"] == ["linear_attention"] * 3 + ["full_attention"]
    assert both["mlp_layer_types"] == ["dense"] + ["sparse"] * 3
    assert (both["linear_num_heads"], both["linear_head_dim"], both["linear_conv_kernel_dim"]) == (2, 64, 4)
    assert from_release(both) == TINY
    assert settle(both) | {"head_dim": values["head_dim"]} == values


def test_successors_of_the_released_model_are_told_by_their_keys() -> None:
    """Same model_type, another function: the bounded gate and the full-rank output gate are in linear_attn_config."""
    base = to_release(TINY)
    del base["kimi_linear_config"]
    linear = base["linear_attn_config"]
    read = from_release(base | {"linear_attn_config": linear | {"gate_lower_bound": -5.0, "use_full_rank_gate": True}})
    assert (read.linear.gate, read.linear.gate_lower_bound, read.linear.output_gate_rank) == ("bounded", -5.0, "full")
    read = from_release(base | {"linear_attn_config": linear | {"gate_lower_bound": None, "use_full_rank_gate": False}})
    assert (read.linear.gate, read.linear.output_gate_rank) == ("softplus", None)
    for key, value in (("mla_use_output_gate", True), ("attn_res_block_size", 6), ("routed_expert_hidden_size", 32)):
        with pytest.raises(ConfigError, match=f"{key}: unknown key; it may change the model"):
            from_release(base | {key: value})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gate": "bounded", "gate_lower_bound": -3.0},
        {"num_v_heads": 4, "v_head_dim": 32, "gate_rank": 32},
        {"conv_size": 0},
    ],
)
def test_fla_without_our_own_key_describes_the_same_layers(changes: dict) -> None:
    config = replace(KDA, linear=changes)
    values = to_fla(config)
    assert from_fla(values) == config
    del values["kimi_linear_config"]
    read = from_fla(values)
    assert (read.linear.value_heads, read.linear.value_dim, read.linear.conv_size) == (
        config.linear.value_heads, config.linear.value_dim, config.linear.conv_size,
    )  # fmt: skip
    assert (read.linear.gate, read.layer_mixers) == (config.linear.gate, config.layer_mixers)
    assert (read.intermediate_size, read.rms_norm_eps) == (config.intermediate_size, config.rms_norm_eps)


def test_fla_defaults_are_its_own() -> None:
    read = from_fla({"model_type": "kda", "hidden_size": 1024})
    assert (read.intermediate_size, read.rms_norm_eps, read.linear.num_heads) == (2816, 1e-6, 16)
    with pytest.raises(ConfigError, match="expand_v: expected a whole number"):
        from_fla({"model_type": "kda", "expand_v": 1.3})
    with pytest.raises(ConfigError, match="model_type: expected 'kda'"):
        from_fla({"model_type": "gla"})


def test_the_bias_of_the_output_gate_makes_a_variant() -> None:
    config = replace(TINY, linear={"output_gate_bias": True})
    assert to_release(config)["model_type"] == "kimi_linear_variant"
    assert from_release(to_release(config)) == config
    with pytest.raises(ConfigError, match="output_gate_bias: expected false where there is no low-rank"):
        replace(TINY, linear={"output_gate_bias": True, "output_gate_rank": "full"})
