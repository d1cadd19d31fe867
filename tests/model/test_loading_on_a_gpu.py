"""Weights streamed to a GPU: every bit arrives, through pinned buffers, and bad numbers are seen there too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kimi_linear as kl
from kimi_linear.model import streaming
from kimi_linear.model.checkpoint import CheckpointError, release_tensors
from kimi_linear.ops.moe import _grouped, _grouped_fits, _one_by_one
from kimi_linear.testing.tolerances import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.unpoisoned]


@pytest.mark.parametrize("piece", [1 << 10, 8 << 20])
@pytest.mark.parametrize(("stored", "dtype"), [("bfloat16", None), ("float32", None), ("float32", "bfloat16")])
def test_every_bit_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, stored: str, dtype: str
) -> None:
    monkeypatch.setattr(streaming, "BLOCK_BYTES", piece)
    model = kl.KimiLinear(kl.ModelConfig.preset("tiny-moe"), seed=0).to(getattr(torch, stored))
    kl.save(model, tmp_path / "m", max_shard_bytes=1 << 20)
    loaded, _ = kl.load(tmp_path / "m", device="cuda", dtype=dtype and getattr(torch, dtype))
    expected = release_tensors(model.to(loaded.dtype))
    found = release_tensors(loaded)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.is_cuda
        assert torch.equal(tensor.cpu(), expected[name]), name


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_a_number_that_is_not_finite_is_seen(tmp_path: Path, bad: float) -> None:
    model = kl.KimiLinear(kl.ModelConfig.preset("tiny"), seed=0)
    with torch.no_grad():
        model.blocks[2].self_attn.o_proj.weight[-1, -1] = bad
    kl.save(model, tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"model.layers.2.self_attn.o_proj.weight: expected finite numbers"):
        kl.load(tmp_path / "m", device="cuda")


@pytest.mark.parametrize("tokens", [1, 7, 4096])
def test_grouped_experts_are_the_experts_one_by_one(tokens: int) -> None:
    """The released model's shape, bf16: as near to fp64 as the loop is."""
    experts, width, inner = 64, 2304, 1024
    gate_up = (torch.randn(experts, 2 * inner, width, device="cuda") * 0.02).bfloat16()
    down = (torch.randn(experts, width, inner, device="cuda") * 0.02).bfloat16()
    chosen = torch.rand(tokens, experts, device="cuda").topk(8, dim=-1).indices.flatten()
    counts = torch.bincount(chosen, minlength=experts)
    rows = torch.randn(tokens * 8, width, device="cuda").bfloat16()
    assert _grouped_fits(rows, gate_up)
    loop, grouped = (work(rows, counts, gate_up, down) for work in (_one_by_one, _grouped))
    exact = _one_by_one(rows.double(), counts, gate_up.double(), down.double())
    assert relative_error(grouped, exact) < 2 * relative_error(loop, exact) + 1e-3
