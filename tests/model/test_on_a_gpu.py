"""The whole model on a GPU against the same model on the CPU: logits, gradients, decoding, packing."""

from __future__ import annotations

import pytest
import torch

from kimi_linear.config import ModelConfig
from kimi_linear.model import KimiLinear
from kimi_linear.model.kda import KDA
from kimi_linear.testing.tolerances import relative_error

pytestmark = pytest.mark.gpu

PRESETS = ["tiny", "tiny-moe", "tiny/mla", "tiny/gdn", "tiny/mamba2", "tiny/simple-gla"]
TOLERANCE = 2e-5
"""fp32 products in another order, through four layers."""


def twins(preset: str) -> tuple[KimiLinear, KimiLinear, torch.Tensor]:
    torch.backends.cuda.matmul.allow_tf32 = False
    model = KimiLinear(ModelConfig.preset(preset), seed=0)
    twin = KimiLinear(model.config, seed=1)
    twin.load_state_dict(model.state_dict())
    return model, twin.cuda(), torch.randint(0, 256, (2, 100))


@pytest.mark.unpoisoned  # torch's attention backward warns in the deterministic mode that poisoning needs
@pytest.mark.parametrize("preset", PRESETS)
def test_logits_and_gradients(preset: str) -> None:
    model, twin, tokens = twins(preset)
    here, there = model(tokens), twin(tokens.cuda())
    assert relative_error(there.cpu(), here) < TOLERANCE
    here.square().mean().backward()
    there.square().mean().backward()
    for (name, a), (_, b) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        if a.grad is not None:
            assert b.grad is not None, name
            assert relative_error(b.grad.cpu(), a.grad) < 50 * TOLERANCE, name


@pytest.mark.parametrize("preset", PRESETS)
def test_decoding_equals_the_whole(preset: str) -> None:
    _, twin, tokens = twins(preset)
    tokens = tokens[:, :24].cuda()
    with torch.no_grad():
        whole = twin(tokens)
        state = twin.make_state(2)
        pieces = [twin(tokens[:, :17], state=state), *(twin(tokens[:, t : t + 1], state=state) for t in range(17, 24))]
    assert relative_error(torch.cat(pieces, dim=1).cpu(), whole.cpu()) < TOLERANCE


@pytest.mark.parametrize("preset", ["tiny", "tiny/mla"])
def test_packed_equals_separate(preset: str) -> None:
    _, twin, tokens = twins(preset)
    tokens = tokens[:1].cuda()
    cu_seqlens = torch.tensor([0, 33, 33, 100], device="cuda")
    with torch.no_grad():
        packed = twin(tokens, cu_seqlens=cu_seqlens)
        separate = torch.cat([twin(tokens[:, :33]), twin(tokens[:, 33:])], dim=1)
    assert relative_error(packed.cpu(), separate.cpu()) < TOLERANCE


def test_bf16_model_keeps_its_gates_in_fp32() -> None:
    """A model cast to bf16 stays near the fp32 one, and A_log and dt_bias keep every bit."""
    model, twin, tokens = twins("tiny")
    exact = model(tokens)
    gates = twin.blocks[0].self_attn.A_log.clone()
    twin = twin.to(torch.bfloat16)
    assert torch.equal(twin.blocks[0].self_attn.A_log, gates)
    with torch.no_grad():
        assert relative_error(twin(tokens.cuda()).float().cpu(), exact) < 0.03


def test_a_bf16_model_decodes_through_the_fused_step() -> None:
    """The same logits as its own path, and its states stay where they are, as a CUDA graph needs."""
    config = ModelConfig.preset("tiny", linear={"num_heads": 2, "head_dim": 64})
    model = KimiLinear(config, seed=0).cuda().bfloat16()
    layer, tokens = model.blocks[0].self_attn, torch.randint(0, 256, (2, 40), device="cuda")
    assert isinstance(layer, KDA)
    with torch.no_grad():
        whole = model(tokens).float()
        state = model.make_state(2)
        assert layer.steps(torch.zeros(2, 1, 128, dtype=torch.bfloat16, device="cuda"), state.layers[0])
        model(tokens[:, :30], state=state)
        memory = state.layers[0].recurrent
        pieces = [model(part, state=state).float() for part in tokens[:, 30:].split([1, 1, 4, 4], dim=1)]
        assert state.layers[0].recurrent is memory
    assert relative_error(torch.cat(pieces, dim=1), whole[:, 30:]) < 0.03


@pytest.mark.unpoisoned  # the deterministic mode has waits of its own
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("preset", ["tiny-moe", "tiny/mla"])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_decoded_token_never_makes_the_host_wait(preset: str, rows: int) -> None:
    model = KimiLinear(ModelConfig.preset(preset), seed=0).to("cuda", torch.bfloat16)
    tokens = torch.randint(0, 256, (rows, 20), device="cuda")
    with torch.no_grad():
        state = model.make_state(rows)
        model(tokens, state=state)
        model(tokens[:, :1], state=state)  # kernels are compiled, libraries set up
        torch.cuda.set_sync_debug_mode("error")
        try:
            logits = model(tokens[:, 1:2], state=state)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(logits).all()
