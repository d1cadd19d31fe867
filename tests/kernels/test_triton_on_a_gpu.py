"""The Triton kernels on a GPU, through the public operation: exact at every gate, bitwise repeatable, far offsets."""

from __future__ import annotations

import pytest
import torch

from kimi_linear.ops import KDAOutput, chunk_kda
from kimi_linear.testing.factories import GATE_KINDS, KDAInputs, kda_inputs
from kimi_linear.testing.tolerances import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.unpoisoned]

LIMIT = 5e-3
"""Relative error of bf16 against fp64: the bound that the field's kernels are held to."""
LAYOUTS = {
    "batch": {"batch": 2, "tokens": 256, "heads": 2, "v_heads": 4},
    "odd": {"batch": 3, "tokens": 131, "heads": 1},
    "packed": {"tokens": 300, "heads": 2, "lengths": [0, 70, 1, 64, 0, 165]},
}


def call(inputs: KDAInputs, **changes: object) -> KDAOutput:
    arguments = {"initial_state": inputs.initial_state, "cu_seqlens": inputs.cu_seqlens, "impl": "triton"} | changes
    return chunk_kda(*inputs.positional(), normalize_qk=True, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate", GATE_KINDS)
def test_exact_at_every_gate(gate: str, layout: str, raw: bool) -> None:
    inputs = kda_inputs(
        **LAYOUTS[layout], key_dim=128, gate=gate, raw=raw, normalized=False, dtype=torch.bfloat16, device="cuda"
    )
    result = call(inputs)
    exact = call(inputs.to(torch.float64), impl="torch")
    assert relative_error(result.output, exact.output) < LIMIT
    assert relative_error(result.final_state, exact.final_state) < LIMIT


@pytest.mark.parametrize("key_dim", [32, 64, 128])
@pytest.mark.parametrize("value_dim", [32, 64, 128, 256])
def test_every_width(key_dim: int, value_dim: int) -> None:
    inputs = kda_inputs(
        1, 150, 2, key_dim=key_dim, value_dim=value_dim, raw=True, normalized=False, dtype=torch.bfloat16, device="cuda"
    )
    exact = call(inputs.to(torch.float64), impl="torch")
    assert relative_error(call(inputs).output, exact.output) < LIMIT


def test_two_runs_and_any_slot_are_bitwise_equal() -> None:
    lengths = [100, 64, 131]
    packed = kda_inputs(tokens=295, heads=2, key_dim=128, lengths=lengths, dtype=torch.bfloat16, device="cuda")
    first, second = call(packed), call(packed)
    assert torch.equal(first.output, second.output)
    assert torch.equal(first.final_state, second.final_state)
    start = 0
    for n, length in enumerate(lengths):
        own = slice(start, start + length)
        start += length
        parts = (x[:, own] for x in (packed.q, packed.k, packed.v, packed.log_decay, packed.beta))
        alone = chunk_kda(*parts, normalize_qk=True, initial_state=packed.initial_state[n : n + 1], impl="triton")
        assert torch.equal(alone.output, first.output[:, own])
        assert torch.equal(alone.final_state[0], first.final_state[n])


def test_the_past_does_not_depend_on_later_gates() -> None:
    inputs = kda_inputs(1, 192, 2, key_dim=128, gate="mixed", dtype=torch.bfloat16, device="cuda")
    outputs = []
    for later in (-1e-3, -99.0):
        gate = torch.cat([inputs.log_decay[:, :128], torch.full_like(inputs.log_decay[:, 128:], later)], dim=1)
        outputs.append(chunk_kda(inputs.q, inputs.k, inputs.v, gate, inputs.beta, impl="triton").output[:, :128])
    assert torch.equal(*outputs)


def test_offsets_past_two_to_the_31() -> None:
    """600K tokens of 32 heads of 128 are 2.5e9 numbers; the last tokens equal those of their segment alone."""
    tokens, tail = 600 * 1024, 512
    q, k, v, x = (torch.randn(1, tokens, 32, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    gate, beta = x.float().sigmoid_().neg_().mul_(3).to(torch.bfloat16), torch.rand(1, tokens, 32, device="cuda")
    del x
    head = (y[:, :-tail] for y in (q, k, v, gate, beta))
    state = chunk_kda(*head, normalize_qk=True, impl="triton").final_state
    last = chunk_kda(
        *(y[:, -tail:] for y in (q, k, v, gate, beta)), normalize_qk=True, initial_state=state, impl="triton"
    )
    whole = chunk_kda(q, k, v, gate, beta, normalize_qk=True, impl="triton")
    assert torch.equal(whole.output[:, -tail:], last.output)
    assert torch.equal(whole.final_state, last.final_state)


def test_auto_takes_it_without_a_gradient_only() -> None:
    inputs = kda_inputs(1, 64, 1, key_dim=128, dtype=torch.bfloat16, device="cuda")
    assert torch.equal(call(inputs, impl="auto").output, call(inputs).output)
    wanted = inputs.with_grad()
    with pytest.raises(ValueError, match="has no backward yet"):
        call(wanted)
    call(wanted, impl="auto").output.sum().backward()
    assert wanted.q.grad is not None
