"""The configuration: patterns, changes, dictionaries, and what it refuses."""

from __future__ import annotations

import pytest

from kimi_linear.config import PRESETS, ConfigError, ModelConfig, MoEConfig, replace


def test_patterns_place_the_full_layers() -> None:
    config = ModelConfig.preset("kimi-linear-48b-a3b")
    full = [i for i, mixer in enumerate(config.layer_mixers) if mixer == "mla"]
    assert full == [3, 7, 11, 15, 19, 23, 26]
    assert replace(config, pattern="1:0").layer_mixers == ("kda",) * 27
    assert replace(config, pattern="0:1").layer_mixers == ("mla",) * 27
    assert replace(config, num_layers=5, pattern="1:1").layer_mixers == ("kda", "mla", "kda", "mla", "mla")


def test_a_change_of_a_nested_part_keeps_the_rest() -> None:
    config = ModelConfig.preset("tiny-moe", linear={"gate": "bounded"}, moe={"num_experts": 16})
    assert (config.linear.gate, config.linear.head_dim) == ("bounded", 64)
    assert (config.moe.num_experts, config.moe.scaling_factor) == (16, 2.446)
    dense = ModelConfig.preset("tiny", moe={"num_experts": 4, "experts_per_token": 2, "expert_size": 8})
    assert dense.moe == MoEConfig(num_experts=4, experts_per_token=2, expert_size=8)


@pytest.mark.parametrize(
    "name", [f"{p}{b}" for p in PRESETS for b in ("", "/mla", "/mla-nope", "/gdn", "/mamba2", "/simple-gla")]
)
def test_dictionaries_give_back_the_same_configuration(name: str) -> None:
    config = ModelConfig.preset(name)
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 3}, "hidden: expected a field of ModelConfig"),
        ({"linear": {"heads": 3}}, "linear.heads: unknown key"),
        ({"moe": {"num_experts": 3}}, "moe.expert_size: missing key"),
        ({"num_layers": 0}, r"num_layers: expected a positive integer below 2\*\*31, got 0"),
        ({"pattern": "3-1"}, "pattern: expected 'linear:full'"),
        ({"mixers": ("kda",)}, "mixers: expected one mixer for each of num_layers == 4, got 1"),
        ({"linear": {"num_v_heads": 3}}, "num_v_heads: expected a multiple of num_heads == 2, got 3"),
        (
            {"linear": {"gate": "bounded"}, "linear_mixer": "mamba2"},
            "linear.gate: expected 'softplus' where a layer is mamba2",
        ),
        ({"linear": {"conv_size": "4"}}, "linear.conv_size: expected int, got '4'"),
        ({"eos_token_id": 320}, r"eos_token_id: expected a token in \[0, 320\), got 320"),
    ],
)
def test_bad_values_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.preset("tiny", **changes)


def test_wrong_types_in_a_dictionary_are_named() -> None:
    values = ModelConfig.preset("tiny").to_dict()
    for key, value, message in (
        ("rms_norm_eps", "1e-5", "rms_norm_eps: expected float, got '1e-5'"),
        ("tie_embeddings", 1.5, "tie_embeddings: expected bool, got 1.5"),
        ("linear", [1], "linear: expected an object"),
        ("width", 1, "width: unknown key"),
    ):
        with pytest.raises(ConfigError, match=message):
            ModelConfig.from_dict(values | {key: value})
    with pytest.raises(ConfigError, match="config: expected an object"):
        ModelConfig.from_dict([1])
