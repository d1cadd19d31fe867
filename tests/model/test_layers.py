"""Each layer equals its formula, written out by hand in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.config import LinearConfig, MLAConfig, ModelConfig, MoEConfig
from kimi_linear.model import KimiLinear
from kimi_linear.model.gdn import GDN
from kimi_linear.model.kda import KDA
from kimi_linear.model.mamba2 import Mamba2
from kimi_linear.model.mla import MLA
from kimi_linear.model.moe import MoE
from kimi_linear.model.simple_gla import SimpleGLA

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def config(**changes: object) -> ModelConfig:
    values: dict[str, object] = {
        "vocab_size": 11,
        "hidden_size": 12,
        "num_layers": 1,
        "intermediate_size": 16,
        "linear": LinearConfig(num_heads=2, head_dim=4),
        "mla": MLAConfig(num_heads=3, kv_lora_rank=5, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3),
        "initializer_range": 0.5,
    }
    return ModelConfig(**{**values, **changes})


def layer_of(kind: type, **changes: object) -> torch.nn.Module:
    mixer = {KDA: "kda", GDN: "gdn", Mamba2: "mamba2", SimpleGLA: "simple-gla", MLA: "mla"}[kind]
    layer = KimiLinear(config(mixers=(mixer,), **changes), seed=1).double().model.layers[0].self_attn
    assert isinstance(layer, kind)
    return layer


def conv(x: Tensor, taps: Tensor) -> Tensor:
    """Causal depthwise convolution and SiLU, one tap at a time."""
    size = taps.shape[-1]
    padded = F.pad(x, (0, 0, size - 1, 0))
    return F.silu(sum(taps[:, 0, w] * padded[:, w : w + x.shape[1]] for w in range(size)))


def heads(layer: torch.nn.Module, x: Tensor, *, unit: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """q and k of unit length, or as they come, [B, T, HV, K], v [B, T, HV, V]."""
    shape, out = layer.shape, []
    for name, count, width in (
        ("q", shape.num_heads, shape.head_dim),
        ("k", shape.num_heads, shape.head_dim),
        ("v", shape.value_heads, shape.value_dim),
    ):
        y = x @ getattr(layer, f"{name}_proj").weight.T
        y = conv(y, getattr(layer, f"{name}_conv1d").weight) if shape.conv_size else F.silu(y)
        y = y.unflatten(-1, (count, width))
        if name != "v":
            y = y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() if unit else y
            y = y.repeat_interleave(shape.value_heads // shape.num_heads, dim=2)
        out.append(y)
    return tuple(out)


def close(layer: torch.nn.Module, x: Tensor, o: Tensor) -> Tensor:
    """Head norm, output gate, output projection."""
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.o_norm.weight
    return (o * gate_of(layer, x).view_as(o)).flatten(2) @ layer.o_proj.weight.T


def gate_of(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """What the output is multiplied by, [B, T, HV * V]."""
    if layer.shape.output_gate == "none":
        return torch.ones(*x.shape[:2], layer.value_width, dtype=x.dtype)
    if layer.shape.output_gate_rank == "full":
        gate = x @ layer.g_proj.weight.T
    else:
        gate = x @ layer.g_a_proj.weight.T @ layer.g_b_proj.weight.T
    return gate.sigmoid() if layer.shape.output_gate == "sigmoid" else gate * gate.sigmoid()


def decay(layer: torch.nn.Module, raw: Tensor) -> Tensor:
    """[B, T, HV, K or 1] log-decay."""
    rate, raw = layer.A_log.exp().view(-1, 1), raw + layer.dt_bias.view(raw.shape[2:])
    if layer.shape.gate == "bounded":
        return layer.shape.gate_lower_bound * (rate * raw).sigmoid()
    return -rate * (1 + raw.exp()).log()


LINEAR = {
    "released": LinearConfig(num_heads=2, head_dim=4),
    "more value heads, other widths and ranks": LinearConfig(
        num_heads=2, head_dim=4, num_v_heads=4, v_head_dim=6, conv_size=3, gate_rank=2, output_gate_rank=5
    ),
    "bounded, full-rank swish": LinearConfig(
        num_heads=2, head_dim=4, gate="bounded", output_gate="swish", output_gate_rank="full"
    ),
    "no convolution, no output gate": LinearConfig(num_heads=2, head_dim=4, conv_size=0, output_gate="none"),
}


@pytest.mark.parametrize("kind", [KDA, GDN, SimpleGLA])
@pytest.mark.parametrize("shape", LINEAR.values(), ids=LINEAR.keys())
def test_linear_layer_is_its_formula(kind: type, shape: LinearConfig) -> None:
    layer = layer_of(kind, linear=shape)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    q, k, v = heads(layer, x)
    if kind is KDA:
        raw = (x @ layer.f_a_proj.weight.T @ layer.f_b_proj.weight.T).unflatten(-1, (shape.value_heads, -1))
    else:
        raw = (x @ layer.a_proj.weight.T)[..., None]
    alpha = decay(layer, raw).exp()
    memory, outputs = torch.zeros(2, shape.value_heads, shape.head_dim, shape.value_dim, dtype=torch.float64), []
    for t in range(9):
        memory = alpha[:, t, ..., None] * memory
        if kind is SimpleGLA:
            memory = memory + k[:, t, ..., :, None] * v[:, t, ..., None, :]
        else:
            beta = (x[:, t] @ layer.b_proj.weight.T).sigmoid()[..., None]
            answer = (memory * k[:, t, ..., :, None]).sum(-2)
            memory = memory + k[:, t, ..., :, None] * (beta * (v[:, t] - answer))[..., None, :]
        outputs.append(shape.head_dim**-0.5 * (memory * q[:, t, ..., :, None]).sum(-2))
    torch.testing.assert_close(layer(x), close(layer, x, torch.stack(outputs, 1)), **EXACT)


@pytest.mark.parametrize(
    "shape",
    [
        LinearConfig(num_heads=1, head_dim=4, num_v_heads=2, output_gate="swish", output_gate_rank="full"),
        LinearConfig(num_heads=2, head_dim=4, num_v_heads=4, v_head_dim=6, conv_size=3, output_gate_rank=5),
        LinearConfig(num_heads=2, head_dim=4, conv_size=0, output_gate="none"),
    ],
    ids=["published", "two groups, other widths, sigmoid", "no convolution, no output gate"],
)
def test_mamba2_is_its_formula(shape: LinearConfig) -> None:
    layer = layer_of(Mamba2, linear=shape)
    torch.nn.init.uniform_(layer.D)
    torch.nn.init.uniform_(layer.o_norm.weight)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    q, k, v = heads(layer, x, unit=False)
    step = (1 + (x @ layer.a_proj.weight.T + layer.dt_bias).exp()).log()[..., None]
    memory, outputs = torch.zeros(2, shape.value_heads, shape.head_dim, shape.value_dim, dtype=torch.float64), []
    for t in range(9):
        forgotten = (-layer.A_log.exp().view(-1, 1) * step[:, t]).exp()[..., None]
        memory = forgotten * memory + k[:, t, ..., :, None] * (step[:, t] * v[:, t])[..., None, :]
        outputs.append((memory * q[:, t, ..., :, None]).sum(-2) + layer.D.view(-1, 1) * v[:, t])
    o = torch.stack(outputs, 1).flatten(2) * gate_of(layer, x)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.o_norm.weight
    torch.testing.assert_close(layer(x), o @ layer.o_proj.weight.T, **EXACT)


def test_mamba2_starts_with_the_skip_open_and_a_convolution_that_is_heard() -> None:
    shape = LinearConfig(num_heads=1, head_dim=64, num_v_heads=2)
    layer = layer_of(Mamba2, hidden_size=64, linear=shape, initializer_range=0.02)
    assert layer.D.tolist() == [1.0, 1.0]
    for taps in (layer.q_conv1d, layer.k_conv1d, layer.v_conv1d):
        assert 0.45 < taps.weight.abs().max() <= 0.5
    assert layer_of(SimpleGLA, initializer_range=0.02).q_conv1d.weight.abs().max() < 0.1
    assert all(p._no_weight_decay for p in (layer.A_log, layer.dt_bias, layer.D))
    assert layer.bfloat16().D.dtype == torch.float64  # as it was, not rounded


@pytest.mark.parametrize("position", ["nope", "rope"])
def test_full_attention_is_its_formula(position: str) -> None:
    shape = MLAConfig(
        num_heads=3, kv_lora_rank=5, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3, position=position,
        kv_norm_eps=1e-3,
    )  # fmt: skip
    layer = layer_of(MLA, mla=shape)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    q = (x @ layer.q_proj.weight.T).view(2, 7, 3, 6)
    latent = x @ layer.kv_a_proj_with_mqa.weight.T
    compressed, shared = latent[..., :5], latent[..., 5:].clone()
    compressed = compressed / (compressed.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    kv = (compressed @ layer.kv_b_proj.weight.T).view(2, 7, 3, 7)
    if position == "rope":
        # One pair of width 2 turns by its position in radians.
        turn = torch.polar(torch.ones(7, dtype=torch.float64), torch.arange(7, dtype=torch.float64))
        q = q.clone()
        q[..., 4:] = torch.view_as_real(torch.view_as_complex(q[..., 4:].contiguous()) * turn[:, None])
        shared = torch.view_as_real(torch.view_as_complex(shared.contiguous()) * turn)
    expected = torch.zeros(2, 7, 3, 3, dtype=torch.float64)
    for t in range(7):
        for h in range(3):
            keys = torch.cat([kv[:, : t + 1, h, :4], shared[:, : t + 1]], -1)
            weights = ((keys @ q[:, t, h, :, None])[..., 0] * 6**-0.5).softmax(-1)
            expected[:, t, h] = (weights[..., None] * kv[:, : t + 1, h, 4:]).sum(1)
    torch.testing.assert_close(layer(x), expected.flatten(2) @ layer.o_proj.weight.T, **EXACT)


@pytest.mark.parametrize("bias_in_weights", [False, True])
def test_mixture_of_experts_is_its_formula_and_reports_load(bias_in_weights: bool) -> None:
    shape = MoEConfig(
        num_experts=5, experts_per_token=2, expert_size=3, num_shared_experts=2, first_dense_layers=0,
        scaling_factor=2.446, bias_in_weights=bias_in_weights,
    )  # fmt: skip
    layer = KimiLinear(config(moe=shape), seed=3).double().model.layers[0].feed_forward
    assert isinstance(layer, MoE)
    layer.gate.e_score_correction_bias.copy_(torch.tensor([0.5, 0.0, -0.5, 0.3, 0.1]))
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    expected, load = torch.zeros(2, 6, 12, dtype=torch.float64), torch.zeros(5, dtype=torch.long)
    for b in range(2):
        for t in range(6):
            token = x[b, t]
            scores = (layer.gate.weight @ token).sigmoid()
            biased = scores + layer.gate.e_score_correction_bias
            chosen = biased.topk(2).indices
            weights = (biased if bias_in_weights else scores)[chosen]
            for e, weight in zip(chosen.tolist(), (2.446 * weights / weights.sum()).tolist(), strict=True):
                gate, up = (layer.experts.gate_up[e] @ token).chunk(2)
                expected[b, t] += weight * (layer.experts.down[e] @ (F.silu(gate) * up))
                load[e] += 1
            shared = layer.shared_experts
            inner = F.silu(shared.gate_proj.weight @ token) * (shared.up_proj.weight @ token)
            expected[b, t] += shared.down_proj.weight @ inner
    torch.testing.assert_close(layer(x), expected, **EXACT)
    assert layer.load is not None
    assert layer.load.tolist() == load.tolist()


def test_block_and_model_are_their_formula() -> None:
    model = KimiLinear(config(num_layers=2, pattern="1:1"), seed=2).double()

    def norm(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    tokens = torch.randint(11, (2, 5))
    x = model.model.embed_tokens.weight[tokens]
    for layer in model.model.layers:
        x = x + layer.self_attn(norm(x))
        y = norm(x)
        gate, up = (y @ w.weight.T for w in (layer.mlp.gate_proj, layer.mlp.up_proj))
        x = x + (F.silu(gate) * up) @ layer.mlp.down_proj.weight.T
    torch.testing.assert_close(model(tokens), norm(x) @ model.lm_head.weight.T, **EXACT)


def test_tied_embeddings_are_the_output_projection() -> None:
    model = KimiLinear(config(tie_embeddings=True), seed=2)
    tokens = torch.randint(11, (1, 5))
    assert not any(name.startswith("lm_head") for name in model.state_dict())
    torch.testing.assert_close(model(tokens), model.hidden_states(tokens) @ model.model.embed_tokens.weight.T)
