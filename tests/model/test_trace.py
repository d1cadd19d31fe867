"""What the trace shows is what the layer does."""

from __future__ import annotations

import torch

from kimi_linear.config import ModelConfig
from kimi_linear.model import KimiLinear
from kimi_linear.ops import l2_normalize, recurrent_kda

SMALL = ModelConfig.preset("tiny", hidden_size=32, linear={"num_heads": 2, "head_dim": 8, "num_v_heads": 4})


def test_the_error_is_what_one_step_writes() -> None:
    """With q = k and scale 1, the read after a step is S~^T k + beta ||k||^2 (v - S~^T k): it gives the error back."""
    model = KimiLinear(SMALL, seed=0).double()
    tokens = torch.randint(320, (2, 12))
    seen = []
    layer = model.blocks[0].self_attn
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with model.record() as trace, torch.no_grad():
        model(tokens)
    assert list(trace.layers) == [0, 1, 2]
    (got,) = trace.layers[0]
    with torch.no_grad():
        _, k, v, _ = layer.project(seen[0])
        beta, k = layer.beta(seen[0]), l2_normalize(k)
        read = recurrent_kda(k, k, v, got.log_decay, beta, scale=1.0, impl="reference").output
    strength = (beta[..., None] * k.square().sum(-1, keepdim=True).repeat_interleave(2, dim=2)).squeeze(-1)
    # v - read = (1 - strength) * error
    expected = (v - read).norm(dim=-1) / (1 - strength)
    torch.testing.assert_close(got.error, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(got.beta, beta)
    torch.testing.assert_close(got.value, v.norm(dim=-1))
    torch.testing.assert_close(got.error[:, 0], got.value[:, 0])
    assert bool((got.log_decay < 0).all())


def test_recording_changes_nothing_and_ends() -> None:
    model = KimiLinear(SMALL, seed=0)
    tokens, state = torch.randint(320, (1, 12)), model.make_state(1)
    with torch.no_grad():
        expected = model(tokens)
        with model.record() as whole:
            torch.testing.assert_close(model(tokens), expected, rtol=0, atol=0)
        with model.record() as pieces:
            model(tokens[:, :5], state=state)
            model(tokens[:, 5:], state=state)
        with model.record() as packed:
            model(torch.cat([tokens, tokens], 1), cu_seqlens=torch.tensor([0, 12, 24]))
        model(tokens)
    (one,) = whole.layers[1]
    joined = torch.cat([piece.error for piece in pieces.layers[1]], 1)
    torch.testing.assert_close(joined, one.error, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(packed.layers[1][0].error[:, 12:], one.error, rtol=1e-4, atol=1e-6)
    assert len(whole.layers[1]) == 1
