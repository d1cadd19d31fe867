"""What a configuration is said to cost is what a model of it holds."""

import pytest
import torch

from kimi_linear.config import baseline, preset
from kimi_linear.engine.footprint import footprint
from kimi_linear.model import KimiLinear


@pytest.mark.parametrize("name", ["tiny", "tiny-moe", "tiny/mla", "tiny/gdn"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_context_bytes_are_those_of_a_state(name, tokens):
    config = preset(name)
    model = KimiLinear(config, seed=0).bfloat16()
    state = model.make_state(1)
    with torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.int64), state=state)
    assert footprint(config).context_bytes(tokens) == state.nbytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weight_bytes_are_those_of_a_model(dtype):
    model = KimiLinear(preset("tiny-moe")).to(dtype)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert footprint(preset("tiny-moe"), dtype).weight_bytes == sum(storages.values())


def test_active_parameters_leave_out_the_experts_that_a_token_does_not_visit():
    config = preset("tiny-moe")
    cost = footprint(config)
    model = KimiLinear(config)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    # Three MoE layers, 8 - 2 idle experts of 3 x 128 x 128.
    assert cost.parameters - cost.active_parameters == 3 * 6 * 3 * 128 * 128
    assert footprint(preset("tiny")).active_parameters == footprint(preset("tiny")).parameters


def test_the_released_model():
    cost = footprint(preset("kimi-linear-48b-a3b"))
    assert cost.parameters == 49_122_681_728
    # bf16, but for A_log and dt_bias of 20 layers and the bias of 26 routers.
    assert cost.weight_bytes == 2 * 49_122_681_728 + 2 * (20 * (32 + 4096) + 26 * 256)
    # 20 KDA layers of 32 x 128 x 128 fp32 and a window of 3 x 12,288 bf16; 7 latents of 576 bf16 per token.
    assert cost.state_bytes == 20 * (32 * 128 * 128 * 4 + 3 * 12_288 * 2)
    assert cost.token_bytes == 7 * 576 * 2
    assert footprint(baseline(preset("kimi-linear-48b-a3b"), "mla")).token_bytes == 27 * 576 * 2
