"""Where tokens may be seen from: segments, packed sequences, later tokens, and shared key heads."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from kimi_linear.reference.dplr import chunk_dplr, recurrent_dplr
from kimi_linear.reference.gdn import chunk_gdn, recurrent_gdn
from kimi_linear.reference.kda import chunk_kda, recurrent_kda
from kimi_linear.reference.mamba2 import chunk_mamba2, recurrent_mamba2
from kimi_linear.reference.parallel import parallel_kda
from kimi_linear.testing import assert_close, kda_inputs, results

SCALE = 0.3
LENGTHS = (5, 0, 1, 20, 0)


def kda(run):
    return lambda i: run(i.q, i.k, i.v, i.log_decay, i.beta, SCALE, i.initial_state, i.cu_seqlens)


def gdn(run):
    return lambda i: run(i.q, i.k, i.v, i.log_decay[..., 0], i.beta, SCALE, i.initial_state, i.cu_seqlens)


def mamba2(run):
    return lambda i: run(i.q, i.k, i.v, i.log_decay[..., 0], SCALE, i.initial_state, i.cu_seqlens)


def dplr(run):
    """Free vectors a = k / 2 and b = q / 2, so that nothing is tied."""
    return lambda i: run(i.q, i.k, i.v, i.log_decay, i.k / 2, i.q / 2, SCALE, i.initial_state, i.cu_seqlens)


RUNS = {
    "recurrent_kda": kda(recurrent_kda),
    "chunk_kda": kda(chunk_kda),
    "parallel_kda": kda(parallel_kda),
    "recurrent_gdn": gdn(recurrent_gdn),
    "chunk_gdn": gdn(chunk_gdn),
    "recurrent_mamba2": mamba2(recurrent_mamba2),
    "chunk_mamba2": mamba2(chunk_mamba2),
    "recurrent_dplr": dplr(recurrent_dplr),
    "chunk_dplr": dplr(chunk_dplr),
}
every_run = pytest.mark.parametrize("name", RUNS)


def inputs(**more):
    return kda_inputs(1, 26, 1, 2, 5, 3, gate="mixed", dtype=torch.float64, **more)


def tokens_of(i, start, stop, state):
    """The tokens [start, stop) of unpacked inputs as a sequence of their own, from ``state``."""
    part = {name: getattr(i, name)[:, start:stop] for name in ("q", "k", "v", "gate", "beta")}
    return replace(i, **part, initial_state=state, cu_seqlens=None)


@every_run
def test_segments_with_carried_state_are_the_whole(name):
    def in_segments(i):
        outputs, state = [], i.initial_state
        for start, stop in ((0, 3), (3, 3), (3, 20), (20, 26)):
            output, state = RUNS[name](tokens_of(i, start, stop, state))
            outputs.append(output)
        return torch.cat(outputs, dim=1), state

    left, right = results(in_segments, inputs()), results(RUNS[name], inputs())
    for what in right:
        assert_close(left[what], right[what], what)


@every_run
def test_packed_sequences_are_separate_ones(name):
    def separately(i):
        outputs, states, start = [], [], 0
        for n, length in enumerate(LENGTHS):
            output, state = RUNS[name](tokens_of(i, start, start + length, i.initial_state[n : n + 1]))
            outputs.append(output)
            states.append(state)
            start += length
        return torch.cat(outputs, dim=1), torch.cat(states)

    packed = inputs(lengths=LENGTHS)
    left, right = results(RUNS[name], packed), results(separately, packed)
    for what in right:
        assert_close(left[what], right[what], what)
    for n in (1, 4):
        assert torch.equal(left["final_state"][n], packed.initial_state[n]), "an empty sequence hands its state through"


@every_run
def test_later_tokens_change_nothing_before_them(name):
    """Outputs and gradients of the first 11 tokens are the same, bit for bit, whatever follows.

    Also when a later token's gate forgets everything: a chunk must never be scaled by its last decay.
    """
    first = 11
    base = inputs()
    other = inputs(seed=1)
    gate = torch.cat([base.gate[:, :first], torch.full_like(base.gate[:, first:], -90.0)], dim=1)
    later = {
        part: torch.cat([getattr(base, part)[:, :first], getattr(other, part)[:, first:]], dim=1)
        for part in ("q", "k", "v", "beta")
    }

    def prefix_output(i):
        output = RUNS[name](i)[0][:, :first]
        return output, 0 * output

    left = results(prefix_output, replace(base, gate=gate, **later))
    right = results(prefix_output, base)
    for what in right:
        if what in ("output", "d initial_state"):
            assert torch.equal(left[what], right[what]), what
        elif what.startswith("d "):
            assert torch.equal(left[what][:, :first], right[what][:, :first]), what
            assert left[what][:, first:].count_nonzero() == 0, f"{what}: a later token got a gradient"


@every_run
def test_value_heads_share_key_heads(name):
    """HV = 4 over H = 2: value head j reads key head j // 2."""
    grouped = kda_inputs(2, 19, 2, 4, 5, 3, dtype=torch.float64)
    repeated = replace(grouped, q=grouped.q[:, :, [0, 0, 1, 1]], k=grouped.k[:, :, [0, 0, 1, 1]])
    left, right = results(RUNS[name], grouped), results(RUNS[name], repeated)
    for what in ("output", "final_state", "d v", "d gate", "d beta"):
        assert_close(left[what], right[what], what)
    for what in ("d q", "d k"):
        assert_close(left[what], right[what].unflatten(2, (2, 2)).sum(3), what)


@every_run
def test_no_initial_state_is_a_zero_one_and_batch_rows_are_apart(name):
    i = kda_inputs(3, 7, 1, 2, 5, 3, dtype=torch.float64)
    zero = replace(i, initial_state=torch.zeros_like(i.initial_state))
    output, state = RUNS[name](replace(i, initial_state=None))
    for row in range(3):
        alone = replace(
            zero,
            **{part: getattr(zero, part)[row : row + 1] for part in ("q", "k", "v", "gate", "beta", "initial_state")},
        )
        one_output, one_state = RUNS[name](alone)
        assert_close(output[row : row + 1], one_output, "output")
        assert_close(state[row : row + 1], one_state, "final_state")


@every_run
def test_half_precision_inputs_are_computed_in_fp32(name):
    i = kda_inputs(1, 19, 1, 2, 5, 3, dtype=torch.bfloat16)
    output, state = RUNS[name](i)
    exact_output, exact_state = RUNS[name](i.to(torch.float64))
    assert output.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert_close(output, exact_output, "output", tolerance=2**-8)
    assert_close(state, exact_state, "final_state", tolerance=1e-6)


@pytest.mark.parametrize("gate", ["fast", "stress", "mixed"])
@every_run
def test_fp32_stands_at_strong_gates(name, gate):
    """Everything finite, and as near to fp64 as sums of decays in fp32 allow (a chunk's sum of -1000 rounds to 6e-5)."""
    i = kda_inputs(1, 40, 1, 2, 5, 3, gate=gate)
    exact = results(RUNS[name], i.to(torch.float64))
    for what, got in results(RUNS[name], i).items():
        assert_close(got, exact[what], what, tolerance=1e-4)


BLOCKED = """
import importlib, pkgutil, sys
for name in ("triton", "transformers", "numpy", "fla", "einops"):
    sys.modules[name] = None
import kimi_linear.reference as reference
names = [m.name for m in pkgutil.iter_modules(reference.__path__, "kimi_linear.reference.")]
for name in names:
    importlib.import_module(name)
import torch
from kimi_linear.reference.kda import chunk_kda
x = torch.ones(1, 3, 1, 2)
print(len(names), chunk_kda(x, x, x, -x, torch.ones(1, 3, 1), 1.0)[0].shape)
"""


def test_the_reference_needs_nothing_but_torch():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BLOCKED], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    count, shape = done.stdout.split(maxsplit=1)
    assert int(count) >= 7
    assert "[1, 3, 1, 2]" in shape
