"""Which parameters each optimizer moves, and that stacked experts are moved like separate matrices."""

import pytest
import torch
from torch import nn

from kimi_linear.config import ModelConfig
from kimi_linear.model import KimiLinear
from kimi_linear.training import TrainConfig, balance_experts, build_optimizers


def moe_model():
    moe = {"num_experts": 4, "experts_per_token": 2, "expert_size": 24}
    return KimiLinear(small_config("tiny-moe", num_layers=2, moe=moe), seed=0)


def small_config(preset="tiny", **changes):
    linear, mla = {"num_heads": 1, "head_dim": 16}, {"num_heads": 1, "qk_nope_head_dim": 16, "v_head_dim": 16}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "vocab_size": 64, "pattern": "1:1"}
    return ModelConfig.preset(preset, linear=linear, mla=mla, **{**sizes, **changes})


def random_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator)


def test_muon_on_stacked_experts_is_muon_on_separate_matrices():
    model = moe_model()
    config = TrainConfig(optimizer="muon", weight_decay=0.3)
    experts = model.blocks[1].block_sparse_moe.experts

    def matrices(gate_up, down):
        gates, ups = gate_up[:, :24], gate_up[:, 24:]
        return [m for stack in (gates, ups, down) for m in stack]

    separate = [nn.Parameter(m.detach().clone()) for m in matrices(experts.gate_up, experts.down)]
    torch_muon = torch.optim.Muon(
        separate, lr=1e-2, momentum=0.95, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"
    )  # fmt: skip
    ours = build_optimizers(model, config)
    before = experts.gate_up.detach().clone()
    for step in range(3):
        random_gradients(model, step)
        for p, grad in zip(separate, matrices(experts.gate_up.grad, experts.down.grad), strict=True):
            p.grad = grad.clone()
        torch_muon.step()
        ours.step(1e-2)
    for p, stacked in zip(separate, matrices(experts.gate_up, experts.down), strict=True):
        assert torch.equal(p, stacked)
    assert not torch.equal(before, experts.gate_up)


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    model = moe_model()
    optimizers = build_optimizers(model, TrainConfig(optimizer="muon"))
    muon = {p.data_ptr() for group in optimizers.parts["muon"].param_groups for p in group["params"]}
    adamw = {p.data_ptr() for group in optimizers.parts["adamw"].param_groups for p in group["params"]}
    kinds = {name: p.data_ptr() in muon for name, p in model.named_parameters() if p.requires_grad}
    by_adamw = {name.split(".")[-2] + "." + name.split(".")[-1] for name, is_muon in kinds.items() if not is_muon}
    assert by_adamw == {
        "embed_tokens.weight", "norm.weight", "input_layernorm.weight", "post_attention_layernorm.weight",
        "o_norm.weight", "kv_a_layernorm.weight", "q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight",
        "self_attn.A_log", "self_attn.dt_bias",
    }  # fmt: skip
    for name, p in model.named_parameters():
        assert p.requires_grad == ((p.data_ptr() in muon) != (p.data_ptr() in adamw)), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_shrinks_matrices_and_nothing_else(optimizer):
    model = moe_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    build_optimizers(model, TrainConfig(optimizer=optimizer, weight_decay=0.5)).step(0.1)
    for name, p in model.named_parameters():
        small = p.ndim < 2 or name.endswith("A_log")
        expected = before[name] if small else before[name] * (1 - 0.1 * 0.5)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_saved_state_continues_bit_for_bit(optimizer, tmp_path):
    config = TrainConfig(optimizer=optimizer)
    one, two = moe_model(), moe_model()
    first = build_optimizers(one, config)
    for step in range(2):
        random_gradients(one, step)
        first.step(1e-2)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    two.load_state_dict(one.state_dict())
    second = build_optimizers(two, config)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for model, optimizers in ((one, first), (two, second)):
        random_gradients(model, 7)
        optimizers.step(1e-2)
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_states_of_other_optimizers_and_moved_models_are_refused():
    model = moe_model()
    adamw = build_optimizers(model, TrainConfig())
    muon = build_optimizers(model, TrainConfig(optimizer="muon"))
    with pytest.raises(ValueError, match=r"expected the state of \['adamw', 'muon'\], got that of \['adamw'\]"):
        muon.load_state_dict(adamw.state_dict())
    random_gradients(model, 0)
    experts = model.blocks[1].block_sparse_moe.experts
    experts.down.data = experts.down.data.clone()
    with pytest.raises(RuntimeError, match="expected its weights where the optimizer was built"):
        muon.step(1e-2)


def test_zero_grad_forgets_stacks_too():
    model = moe_model()
    optimizers = build_optimizers(model, TrainConfig(optimizer="muon"))
    random_gradients(model, 0)
    optimizers.step(1e-3)
    optimizers.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    before = model.blocks[1].block_sparse_moe.experts.down.detach().clone()
    optimizers.step(1e-3)
    assert torch.equal(before, model.blocks[1].block_sparse_moe.experts.down)


def test_balancing_moves_the_bias_against_the_load():
    model = moe_model()
    model(torch.randint(64, (2, 40)))
    moe = model.blocks[1].block_sparse_moe
    moe.load = torch.tensor([10, 30, 20, 20])
    balance_experts(model, 0.01)
    assert moe.gate.e_score_correction_bias.tolist() == pytest.approx([0.01, -0.01, 0.0, 0.0])


def test_balancing_evens_out_a_skewed_router():
    model = moe_model()
    moe = model.blocks[1].block_sparse_moe
    with torch.no_grad():
        moe.gate.e_score_correction_bias.copy_(torch.tensor([0.5, 0.0, 0.0, -0.5]))
    tokens = torch.randint(64, (2, 64))
    spreads = []
    for _ in range(50):
        with torch.no_grad():
            model(tokens)
        spreads.append(int(moe.load.max() - moe.load.min()))
        balance_experts(model, 0.025)
    assert spreads[0] == 128
    assert min(spreads[-10:]) < 32
