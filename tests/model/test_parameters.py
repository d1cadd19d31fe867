"""Counts, first values, and the parameters that keep their precision."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from kimi_linear.config import ModelConfig
from kimi_linear.model import KimiLinear

WIDE = ("A_log", "dt_bias", "e_score_correction_bias")


def test_the_released_model_has_its_exact_size() -> None:
    with torch.device("meta"):
        model = KimiLinear(ModelConfig.preset("kimi-linear-48b-a3b"))
    assert sum(p.numel() for p in model.parameters()) == 49_122_681_728
    layers = [sum(p.numel() for p in block.self_attn.parameters()) for block in model.blocks]
    assert (layers[0], layers[3]) == (39_514_272, 29_114_880)
    assert len(list(model.buffers())) == 0


def test_first_values() -> None:
    config = ModelConfig.preset("tiny-moe", linear={"num_heads": 64, "head_dim": 32})
    model = KimiLinear(config, seed=0)
    rates = torch.cat([block.self_attn.A_log.detach().exp().flatten() for block in model.blocks[:3]])
    assert 1 <= rates.min() < 1.5 < 15.5 < rates.max() <= 16
    assert rates.mean() == pytest.approx(8.5, abs=1)
    steps = torch.cat([F.softplus(block.self_attn.dt_bias.detach()) for block in model.blocks[:3]]).log10()
    assert -3 - 1e-4 <= steps.min() < -2.99 < -1.01 < steps.max() <= -1 + 1e-4
    assert steps.mean() == pytest.approx(-2, abs=0.03)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert bool((parameter == 1).all()), name
        elif name.endswith("e_score_correction_bias"):
            assert not parameter.any()
        elif not name.endswith(WIDE):
            spread = 0.02 * (1 + 4 / math.sqrt(2 * parameter.numel()))
            assert 0.04 - spread < parameter.detach().std() < spread, name
    bounded = KimiLinear(ModelConfig.preset("tiny", linear={"gate": "bounded"}), seed=0)
    assert not bounded.blocks[0].self_attn.A_log.any()


def test_a_seed_gives_the_same_model_and_leaves_the_global_generator() -> None:
    config = ModelConfig.preset("tiny")
    before = torch.get_rng_state()
    one, two, other = (KimiLinear(config, seed=seed).state_dict() for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    torch.manual_seed(5)
    drawn = KimiLinear(config).state_dict()
    torch.manual_seed(5)
    assert all(torch.equal(drawn[name], value) for name, value in KimiLinear(config).state_dict().items())


@pytest.mark.parametrize("cast", ["bfloat16", "half", "to", "meta"])
def test_wide_parameters_keep_their_precision_and_their_flags(cast: str) -> None:
    model = KimiLinear(ModelConfig.preset("tiny-moe"), seed=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith(WIDE)}
    objects = {name: p for name, p in model.named_parameters() if name.endswith(WIDE)}
    if cast == "to":
        model.to("cpu", torch.bfloat16)
    elif cast == "meta":
        model.to("meta").to(torch.bfloat16)
    else:
        getattr(model, cast)()
    after = dict(model.named_parameters())
    for name, parameter in after.items():
        wide = name.endswith(WIDE)
        assert (parameter.dtype == torch.float32) == wide, name
        assert getattr(parameter, "_no_weight_decay", False) == wide, name
        if wide and cast != "meta":
            assert torch.equal(parameter, before[name])
            assert parameter is objects[name]
            assert parameter.requires_grad == (not name.endswith("e_score_correction_bias"))
    model.to_empty(device="cpu")
    assert all(p.dtype == torch.float32 and p._no_weight_decay for n, p in model.named_parameters() if n.endswith(WIDE))
    assert {p.dtype for n, p in model.double().named_parameters()} == {torch.float64}


def test_copies_and_assigned_values_stay_wide_and_flagged() -> None:
    model = KimiLinear(ModelConfig.preset("tiny-moe"), seed=0)
    copied, assigned = copy.deepcopy(model), KimiLinear(model.config, seed=1)
    assigned.load_state_dict({name: value.bfloat16() for name, value in model.state_dict().items()}, assign=True)
    for other in (copied, assigned):
        for name, parameter in other.named_parameters():
            assert getattr(parameter, "_no_weight_decay", False) == name.endswith(WIDE), name
    assert {p.dtype for n, p in assigned.named_parameters() if n.endswith(WIDE)} == {torch.float32}
    assert assigned.dtype == torch.bfloat16
    assert not assigned.blocks[1].feed_forward.gate.e_score_correction_bias.requires_grad


def test_gradients_keep_the_precision_of_their_parameters() -> None:
    model = KimiLinear(ModelConfig.preset("tiny"), seed=0)
    model(torch.randint(320, (1, 9))).sum().backward()
    A_log = model.blocks[0].self_attn.A_log
    before = A_log.grad.clone()
    model.bfloat16()
    assert torch.equal(A_log.grad, before)
    assert model.lm_head is None
    assert model.model.embed_tokens.weight.grad.dtype == torch.bfloat16


def test_names_are_those_of_the_release() -> None:
    with torch.device("meta"):
        names = dict(KimiLinear(ModelConfig.preset("kimi-linear-48b-a3b")).named_parameters())
    shapes = {
        "model.embed_tokens.weight": [163840, 2304],
        "lm_head.weight": [163840, 2304],
        "model.norm.weight": [2304],
        "model.layers.0.input_layernorm.weight": [2304],
        "model.layers.0.post_attention_layernorm.weight": [2304],
        "model.layers.0.mlp.gate_proj.weight": [9216, 2304],
        "model.layers.0.mlp.down_proj.weight": [2304, 9216],
        "model.layers.2.self_attn.q_conv1d.weight": [4096, 1, 4],
        "model.layers.2.self_attn.A_log": [1, 1, 32, 1],
        "model.layers.2.self_attn.dt_bias": [4096],
        "model.layers.2.self_attn.f_a_proj.weight": [128, 2304],
        "model.layers.2.self_attn.g_b_proj.weight": [4096, 128],
        "model.layers.2.self_attn.b_proj.weight": [32, 2304],
        "model.layers.2.self_attn.o_norm.weight": [128],
        "model.layers.3.self_attn.q_proj.weight": [6144, 2304],
        "model.layers.3.self_attn.kv_a_proj_with_mqa.weight": [576, 2304],
        "model.layers.3.self_attn.kv_a_layernorm.weight": [512],
        "model.layers.3.self_attn.kv_b_proj.weight": [8192, 512],
        "model.layers.26.self_attn.o_proj.weight": [2304, 4096],
        "model.layers.26.block_sparse_moe.gate.weight": [256, 2304],
        "model.layers.26.block_sparse_moe.gate.e_score_correction_bias": [256],
        "model.layers.26.block_sparse_moe.shared_experts.up_proj.weight": [1024, 2304],
        "model.layers.26.block_sparse_moe.experts.gate_up": [256, 2048, 2304],
        "model.layers.26.block_sparse_moe.experts.down": [256, 2304, 1024],
    }
    assert {name: list(names[name].shape) for name in shapes} == shapes


def test_expert_load_counts_every_choice() -> None:
    model = KimiLinear(ModelConfig.preset("tiny-moe"), seed=0)
    assert model.expert_load() == {}
    with torch.no_grad():
        model(torch.randint(320, (2, 9)))
    loads = model.expert_load()
    assert list(loads) == [1, 2, 3]
    assert {int(load.sum()) for load in loads.values()} == {2 * 9 * 2}
