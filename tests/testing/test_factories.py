"""The factories give what their names promise: unit keys, and gates as strong as they say."""

import math

import pytest
import torch

from kimi_linear.ops import BoundedGate, SoftplusGate, chunk_kda
from kimi_linear.testing import GATE_KINDS, kda_inputs


def decay_of(gate, **changes):
    return kda_inputs(2, 256, 8, None, 64, gate=gate, dtype=torch.float64, **changes).log_decay


def worst_sum(g, tokens=16):
    return g.unfold(1, tokens, 1).sum(-1).min().item()


def test_init_gate_has_the_released_models_distribution():
    gate = kda_inputs(1, 64, 64, None, 64, gate="init", dtype=torch.float64, raw=True).gate
    A, dt = gate.A_log.exp(), torch.nn.functional.softplus(gate.dt_bias)
    assert 1 <= A.min() < 2 < 15 < A.max() <= 16
    assert dt.min() >= 1e-3 * (1 - 1e-9)
    assert dt.max() <= 1e-1 * (1 + 1e-9)
    assert dt.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.1)
    assert gate.x.mean().abs() < 0.01
    assert gate.x.std().item() == pytest.approx(1, abs=0.01)


def test_fast_gate_forgets_by_3_2_a_step():
    gate = kda_inputs(1, 256, 64, None, 32, gate="fast", dtype=torch.float64).gate
    assert gate.mean().item() == pytest.approx(-3.2, abs=0.3)


def test_bounded_gate_stays_above_its_bound():
    g = decay_of("bounded")
    assert g.min() > -5
    assert g.max() < 0
    assert decay_of("bounded", dt_bias=4.0).min() < -4.9


@pytest.mark.parametrize("shape", [(1, 17, 1, 1, 3), (2, 64, 2, 4, 16)])
def test_stress_gate_reaches_its_worst_case_in_the_smallest_shape(shape):
    g = kda_inputs(*shape, gate="stress").log_decay
    assert g.min() < -99
    assert worst_sum(g) < -766


def test_stress_gate_has_channels_of_every_bias_that_remember_and_forget():
    gate = kda_inputs(1, 64, 2, None, 8, gate="stress", raw=True).gate
    assert set(gate.dt_bias.unique().tolist()) == {-1.0, 0.0, 2.0}
    assert gate.A_log.exp().allclose(torch.tensor(16.0))


def test_mixed_gate_alternates_within_a_channel():
    g = decay_of("mixed")
    quiet = (g > -1e-3).double().mean(1)
    strong = (g < -1).double().mean(1)
    assert quiet.min() > 0.2
    assert strong.min() > 0.2


def test_unit_keys_and_beta_between_zero_and_one():
    inputs = kda_inputs(2, 33, 2, 4, 16, 8, dtype=torch.float64)
    torch.testing.assert_close(inputs.k.norm(dim=-1), torch.ones(2, 33, 2, dtype=torch.float64))
    assert 0 < inputs.beta.min() < inputs.beta.max() < 1
    assert inputs.v.shape == (2, 33, 4, 8)
    assert inputs.initial_state.shape == (2, 4, 8, 16)


def test_same_seed_same_values_in_every_dtype():
    fine, coarse, other = (
        kda_inputs(dtype=d, seed=s) for d, s in [(torch.float32, 3), (torch.bfloat16, 3), (torch.float32, 4)]
    )
    assert torch.equal(fine.q.bfloat16(), coarse.q)
    assert coarse.beta.dtype == torch.float32
    assert not torch.equal(fine.q, other.q)


@pytest.mark.parametrize(("gate", "kind"), [("init", SoftplusGate), ("bounded", BoundedGate)])
def test_raw_gate_means_the_same_decay(gate, kind):
    raw = kda_inputs(gate=gate, raw=True)
    assert isinstance(raw.gate, kind)
    assert torch.equal(raw.log_decay, kda_inputs(gate=gate).gate)


@pytest.mark.parametrize("gate", GATE_KINDS)
def test_every_gate_is_accepted_and_every_leaf_gets_a_gradient(gate):
    inputs = kda_inputs(1, 21, 1, 2, 4, gate=gate, raw=True, lengths=[0, 1, 20]).with_grad()
    output, state = chunk_kda(
        *inputs.positional(), initial_state=inputs.initial_state, cu_seqlens=inputs.cu_seqlens, impl="reference"
    )
    (output.sum() + state.sum()).backward()
    for name, leaf in inputs.leaves().items():
        assert leaf.grad is not None, name
        assert leaf.grad.isfinite().all(), name
        assert leaf.grad.norm() > 0, name


def test_to_keeps_the_rounded_values():
    inputs = kda_inputs(dtype=torch.bfloat16, raw=True)
    wide = inputs.to(torch.float64)
    assert wide.gate.x.dtype == wide.initial_state.dtype == torch.float64
    assert torch.equal(wide.k.bfloat16(), inputs.k)


@pytest.mark.parametrize("raw", [True, False])
def test_some_heads_alone_are_those_heads_of_all(raw):
    inputs = kda_inputs(1, 33, 3, 6, 8, raw=raw, lengths=[13, 20], dtype=torch.float64)
    whole, part = (
        chunk_kda(*i.positional(), initial_state=i.initial_state, cu_seqlens=i.cu_seqlens, impl="reference")
        for i in (inputs, inputs.heads([0, 2]))
    )
    torch.testing.assert_close(part.output, whole.output[:, :, [0, 1, 4, 5]], rtol=0, atol=0)
    torch.testing.assert_close(part.final_state, whole.final_state[:, [0, 1, 4, 5]], rtol=0, atol=0)


def test_leaves_share_memory_only_where_asked():
    inputs = kda_inputs()
    assert inputs.with_grad(clone=False).q.data_ptr() == inputs.q.data_ptr()
    assert inputs.with_grad().q.data_ptr() != inputs.q.data_ptr()
    assert not inputs.q.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("gate", GATE_KINDS)
def test_inputs_drawn_on_a_gpu_have_the_same_distribution(gate):
    here, there = (
        kda_inputs(1, 512, 64, None, 64, gate=gate, drawn_on=device, device=device).log_decay.cpu()
        for device in ("cpu", "cuda")
    )
    assert there.mean().item() == pytest.approx(here.mean().item(), rel=0.35)  # A of 64 heads: a mean's error of 6 %
    assert gate != "stress" or worst_sum(there) < -766


def test_bad_arguments_say_what_was_expected():
    with pytest.raises(ValueError, match="gate: expected one of init, fast"):
        kda_inputs(gate="mild")
    with pytest.raises(ValueError, match="sum to tokens == 64"):
        kda_inputs(lengths=[3, 4])
    with pytest.raises(ValueError, match="batch == 1"):
        kda_inputs(2, lengths=[64])
