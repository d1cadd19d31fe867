"""States handed out on the way, on a GPU: bitwise those of the prefix alone, in any batch, at far offsets, compiled."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kimi_linear.ops import chunk_kda, chunk_kda_states
from kimi_linear.testing.factories import GATE_KINDS, KDAInputs, kda_inputs
from kimi_linear.testing.tolerances import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.unpoisoned]

LIMIT = 5e-3
"""Relative error of bf16 against fp64: the bound that the field's kernels are held to."""
LENGTHS = [0, 300, 64, 0, 131]
OFFSETS = [(4, 64), (1, 256), (2, 64), (1, 64), (4, 128)]


def inputs_of(key_dim: int, value_dim: int, gate: str = "init", heads: int = 2) -> KDAInputs:
    return kda_inputs(
        1, sum(LENGTHS), heads, 2 * heads, key_dim, value_dim, gate=gate, raw=True, normalized=False, lengths=LENGTHS,
        dtype=torch.bfloat16, device="cuda",
    )  # fmt: skip


def places(inputs: KDAInputs) -> dict[str, object]:
    return {"normalize_qk": True, "initial_state": inputs.initial_state, "cu_seqlens": inputs.cu_seqlens}


@pytest.mark.parametrize(("key_dim", "value_dim"), [(128, 128), (64, 64), (32, 32), (128, 256)])
@pytest.mark.parametrize("gate", GATE_KINDS)
def test_exact_at_every_gate(gate: str, key_dim: int, value_dim: int) -> None:
    inputs = inputs_of(key_dim, value_dim, gate)
    got = chunk_kda_states(*inputs.positional(), OFFSETS, impl="triton", **places(inputs))
    wide = inputs.to(torch.float64)
    exact = chunk_kda_states(*wide.positional(), OFFSETS, impl="torch", **places(wide))
    for found, true in zip(got, exact, strict=True):
        assert relative_error(found, true) < LIMIT


def test_bitwise_the_output_of_chunk_kda_and_the_state_of_the_prefix() -> None:
    inputs = inputs_of(128, 128)
    got = chunk_kda_states(*inputs.positional(), OFFSETS, **places(inputs))
    whole = chunk_kda(*inputs.positional(), **places(inputs))
    assert torch.equal(got.output, whole.output)
    assert torch.equal(got.final_state, whole.final_state)
    parts = (inputs.q, inputs.k, inputs.v, inputs.log_decay, inputs.beta)
    plain = chunk_kda_states(*parts, OFFSETS, **places(inputs))
    starts = [0, 0, 300, 364, 364]
    for (n, offset), state in zip(OFFSETS, plain.states, strict=True):
        prefix = tuple(x[:, starts[n] : starts[n] + offset] for x in parts)
        alone = chunk_kda(*prefix, normalize_qk=True, initial_state=inputs.initial_state[n : n + 1], impl="triton")
        assert torch.equal(state, alone.final_state[0]), (n, offset)
        rest = tuple(x[:, starts[n] + offset : starts[n] + LENGTHS[n]] for x in parts)
        onward = chunk_kda(*rest, normalize_qk=True, initial_state=state[None], impl="triton")
        assert torch.equal(onward.final_state[0], plain.final_state[n])
        assert torch.equal(onward.output, plain.output[:, starts[n] + offset : starts[n] + LENGTHS[n]])


def test_a_long_sequence_of_few_heads_that_is_cut_into_segments() -> None:
    """4 heads over 16K tokens: 256 chunks in sixteen segments; states within and at the edges of them."""
    inputs = kda_inputs(1, 16384, 4, key_dim=128, raw=True, normalized=False, dtype=torch.bfloat16, device="cuda")
    offsets = [(0, 64 * chunks) for chunks in (1, 31, 32, 33, 200, 256)]
    got = chunk_kda_states(*inputs.positional(), offsets, normalize_qk=True, impl="triton")
    wide = inputs.to(torch.float64)
    exact = chunk_kda_states(*wide.positional(), offsets, normalize_qk=True, impl="torch")
    assert relative_error(got.states, exact.states) < LIMIT
    assert torch.equal(got.states[-1], got.final_state[0])


def test_past_the_end_of_a_packed_sequence_is_nan_and_nobody_elses() -> None:
    inputs = inputs_of(128, 128)
    expected = chunk_kda_states(*inputs.positional(), OFFSETS, **places(inputs)).states
    # The chunk after the last of sequence 2 is the first of sequence 4, whose state is asked for too.
    got = chunk_kda_states(*inputs.positional(), [*OFFSETS, (2, 128)], **places(inputs)).states
    assert got[-1].isnan().all()
    assert torch.equal(got[:-1], expected)


COMPILED = """
import torch
from kimi_linear.ops import chunk_kda_states
from kimi_linear.ops.chunk_kda_operator import BACKWARD, FORWARD, STATES, TRAIN
from kimi_linear.testing.factories import kda_inputs

inputs = kda_inputs(1, 150, 2, 4, 64, lengths=[100, 50], dtype=torch.bfloat16, device="cuda")
parts, places = inputs.positional(), {"initial_state": inputs.initial_state, "cu_seqlens": inputs.cu_seqlens}
run = lambda *x: [y * 2 for y in chunk_kda_states(*x, [(0, 64)], **places)]
with torch.no_grad():
    for a, b in zip(torch.compile(run, fullgraph=True)(*parts), run(*parts), strict=True):
        assert torch.equal(a, b)
given = (*parts, None, None, inputs.initial_state, inputs.cu_seqlens, None, 0.1, False)
output, state, *saved = (x.detach() for x in TRAIN(*given))
torch.library.opcheck(FORWARD, given)
torch.library.opcheck(BACKWARD, (*given, saved, output, output, state))
torch.library.opcheck(STATES, (*given, [0], [64]))
"""


def test_operators_keep_torchs_rules_and_compile_without_a_break() -> None:
    """In a process of its own: the compiler does not look through the wrappers that check shapes here."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
