"""config.json in the release layout: the released one field by field, the way back, and what is refused."""

from __future__ import annotations

import json

import pytest

from kimi_linear.config import PRESETS, ConfigError, ModelConfig, from_release, replace, to_release

# Kimi-Linear-48B-A3B's config.json.
RELEASED = {
    "architectures": ["KimiLinearForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_kimi.KimiLinearConfig"},
    "model_type": "kimi_linear",
    "dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "bos_token_id": 163584,
    "eos_token_id": 163586,
    "pad_token_id": 163839,
    "vocab_size": 163840,
    "tie_word_embeddings": False,
    "model_max_length": 1048576,
    "use_cache": True,
    "initializer_range": 0.02,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "hidden_size": 2304,
    "num_hidden_layers": 27,
    "intermediate_size": 9216,
    "head_dim": 72,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "mla_use_nope": True,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_shared_experts": 1,
    "moe_intermediate_size": 1024,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "routed_scaling_factor": 2.446,
    "use_grouped_topk": True,
    "num_expert_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
    "linear_attn_config": {
        "num_heads": 32,
        "head_dim": 128,
        "short_conv_kernel_size": 4,
        "kda_layers": [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26],
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
    },
}
VARIANTS = [f"{p}{b}" for p in PRESETS for b in ("", "/mla", "/mla-nope", "/gdn", "/mamba2", "/simple-gla")]


def test_the_released_file_is_read_and_written_field_by_field() -> None:
    config = ModelConfig.preset("kimi-linear-48b-a3b")
    assert from_release(RELEASED) == config
    written = to_release(config)
    del written["kimi_linear_config"]
    expected = {key: value for key, value in RELEASED.items() if key != "auto_map"}
    assert written == expected


@pytest.mark.parametrize("name", VARIANTS)
def test_every_preset_comes_back(name: str) -> None:
    config = ModelConfig.preset(name)
    written = json.loads(json.dumps(to_release(config)))
    assert from_release(written) == config
    own = written.pop("kimi_linear_config")
    if name.endswith(("gdn", "mamba2", "simple-gla")):
        assert written["model_type"] == "kimi_linear_variant"
        assert written["architectures"] == ["KimiLinearVariantForCausalLM"]
        with pytest.raises(ConfigError, match="kimi_linear_config: missing key"):
            from_release(written)
    else:
        assert written["model_type"] == "kimi_linear"
        assert from_release(written) == config
    assert ModelConfig.from_dict(own) == config


@pytest.mark.parametrize(
    ("changes", "variant"),
    [
        ({"linear": {"gate": "bounded", "gate_lower_bound": -4.0, "output_gate_rank": "full"}}, False),
        ({"linear": {"num_v_heads": 2, "v_head_dim": 64, "gate_rank": 64}}, False),
        ({"mixers": ("mla", "kda", "kda", "mla")}, False),
        ({"linear": {"num_v_heads": 4}}, True),
        ({"linear": {"output_gate": "swish"}}, True),
        ({"linear": {"gate_rank": 8}}, True),
        ({"mla": {"kv_norm_eps": 1e-6}}, True),
        ({"moe": {"bias_in_weights": True}}, True),
    ],
)
def test_what_the_layout_cannot_say_gets_another_name(changes: dict, variant: bool) -> None:
    config = ModelConfig.preset("tiny-moe", **changes)
    written = to_release(config)
    assert (written["model_type"] == "kimi_linear_variant") == variant
    assert from_release(written) == config
    if not variant:
        del written["kimi_linear_config"]
        read = from_release(written)
        assert read.layer_mixers == config.layer_mixers
        assert (read.linear.gate, read.linear.gate_lower_bound) == (config.linear.gate, config.linear.gate_lower_bound)
        assert read.linear.output_gate_rank == config.linear.output_gate_rank


def changed(**values: object) -> dict:
    return json.loads(json.dumps(RELEASED)) | values


def lists(kda: list[int], full: list[int]) -> dict:
    linear = RELEASED["linear_attn_config"] | {"kda_layers": kda, "full_attn_layers": full}
    return changed(num_hidden_layers=4, linear_attn_config=linear)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed(gate_upper_bound=1), "gate_upper_bound: unknown key"),
        (changed(linear_attn_config={**RELEASED["linear_attn_config"], "mode": 1}), "linear_attn_config.mode: unknown"),
        (changed(linear_attn_config=None), "linear_attn_config: missing key"),
        (changed(linear_attn_config=3), "linear_attn_config: expected an object, got int"),
        (changed(hidden_size=None), "hidden_size: missing key"),
        (changed(model_type="llama"), "model_type: expected 'kimi_linear', got 'llama'"),
        (changed(hidden_act="gelu"), "hidden_act: expected 'silu', got 'gelu'"),
        (changed(q_lora_rank=1536), "q_lora_rank: expected None, got 1536"),
        (changed(num_nextn_predict_layers=1), "num_nextn_predict_layers: expected 0"),
        (changed(num_key_value_heads=8), "num_key_value_heads: expected num_attention_heads == 32, got 8"),
        (changed(use_grouped_topk=False, num_expert_group=4), "use_grouped_topk: expected true"),
        (changed(rms_norm_eps="1e-5"), "rms_norm_eps: expected float, got '1e-5'"),
        (lists([0, 1, 2], [3]), "count layers from 1 to 4, got 0 to 3; add 1"),
        (lists([1, 2], [4]), "layer 3 is missing"),
        (lists([1, 2, 3], [3, 4]), "layer 3 is listed twice"),
        (lists([1, 2, 3], [4, 5]), r"expected layers from 1 to num_hidden_layers == 4, got \[5\]"),
        (to_release(ModelConfig.preset("tiny")) | {"hidden_size": 64}, "hidden_size: expected 128, as kimi_linear_config"),
    ],
)  # fmt: skip
def test_what_would_be_misread_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_release(values)


def test_our_own_part_must_agree_with_the_layer_lists() -> None:
    values = to_release(ModelConfig.preset("tiny"))
    values["kimi_linear_config"] = replace(ModelConfig.preset("tiny"), pattern="1:1").to_dict()
    with pytest.raises(ConfigError, match="linear_attn_config: expected"):
        from_release(values)
