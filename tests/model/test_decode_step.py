"""The fused step of a KDA layer against the layer's own path, on states of its own and on a pool that others share."""

from __future__ import annotations

import pytest
import torch

from kimi_linear.config import ModelConfig
from kimi_linear.model import KDAState, KimiLinear, ModelState
from kimi_linear.model.kda import KDA
from kimi_linear.testing.tolerances import assert_close

SHAPE = {"num_heads": 2, "head_dim": 8, "num_v_heads": 4, "v_head_dim": 12}
KINDS = {
    "released": {},
    "bounded": {"gate": "bounded", "gate_lower_bound": -5.0},
    "no window": {"conv_size": 0},
    "swish": {"output_gate": "swish", "output_gate_rank": "full"},
    "no output gate": {"output_gate": "none"},
}


def layer_of(kind: str) -> KDA:
    config = ModelConfig.preset("tiny", hidden_size=32, linear=SHAPE | KINDS[kind])
    layer = KimiLinear(config, seed=0).double().blocks[0].self_attn
    assert isinstance(layer, KDA)
    return layer


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_layers_forward(kind: str) -> None:
    layer, x = layer_of(kind), torch.randn(3, 9, 32, dtype=torch.float64)
    with torch.no_grad():
        state = layer.make_state(3, x.device, x.dtype)
        layer(x[:, :5], state=state)
        twin = state.clone()
        expected = layer(x[:, 5:], state=state)
        memory = twin.recurrent
        pieces = [layer.step(x[:, 5:6], twin), layer.step(x[:, 6:], twin)]
    assert_close(torch.cat(pieces, dim=1), expected, "output")
    assert_close(twin.recurrent, state.recurrent, "memory")
    if layer.shape.conv_size:
        assert_close(twin.conv, state.conv, "window")
    assert twin.recurrent is memory  # in place


@pytest.mark.parametrize("fused", [False, True])
def test_a_pool_of_slots_is_updated_where_it_lies(fused: bool) -> None:
    layer, x = layer_of("released"), torch.randn(2, 4, 32, dtype=torch.float64)
    pool = layer.make_state(5, x.device, x.dtype)
    before = pool.recurrent.clone()
    state = KDAState(recurrent=pool.recurrent, conv=pool.conv, slots=torch.tensor([3, 1]))
    own = layer.make_state(2, x.device, x.dtype)
    with torch.no_grad():
        for part in x.split(2, dim=1):
            got = layer.step(part, state) if fused else layer(part, state=state)
            assert_close(got, layer(part, state=own), "output")
    assert state.recurrent is pool.recurrent
    assert_close(pool.recurrent[[3, 1]], own.recurrent, "memory")
    assert torch.equal(pool.conv[[3, 1]], own.conv)
    assert torch.equal(pool.recurrent[[0, 2, 4]], before[[0, 2, 4]])


def test_a_pooled_state_is_cloned_and_selected_by_sequence() -> None:
    pool = KDAState(recurrent=torch.randn(5, 1, 2, 2), conv=torch.randn(5, 4, 3))
    state = KDAState(recurrent=pool.recurrent, conv=pool.conv, slots=torch.tensor([4, 0, 2]))
    assert state.batch_size == 3
    assert state.nbytes() == 3 * (4 + 12) * 4
    copy, chosen = state.clone(), ModelState(layers=[state]).select([2, 0]).layers[0]
    pool.recurrent.zero_()
    assert isinstance(chosen, KDAState)
    assert copy.slots is None
    assert chosen.recurrent.shape[0] == 2
    assert torch.equal(chosen.recurrent, copy.recurrent[[2, 0]])
    assert torch.equal(chosen.conv, pool.conv[[2, 4]])
    assert copy.recurrent.all()


def test_without_a_kernel_the_layer_takes_its_own_path() -> None:
    layer = layer_of("released")
    x = torch.randn(1, 1, 32, dtype=torch.float64)
    with torch.no_grad():
        assert not layer.steps(x, layer.make_state(1, x.device, x.dtype))
