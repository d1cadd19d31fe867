"""The scans on a GPU: right at every gate and width whole and cut, with and without bounds on what is forgotten, bitwise the same in any slot, far offsets, in a graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kimi_linear.testing.chunk_scan import ScanInputs, exact_scan, forgotten, patchy, scan_inputs
from kimi_linear.testing.factories import GATE_KINDS
from kimi_linear.testing.tolerances import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.unpoisoned]

BOUND, GRADIENT_BOUND = 5e-3, 1e-2
"""Relative errors of bf16 against fp64: the bounds that the whole operation is held to."""
LENGTHS = [100, 0, 1, 64, 900]


def both(inputs: ScanInputs, most: int, forgets: Tensor | None = None) -> dict[str, Tensor]:
    """Forward with all that it saves and backward, sequences cut in at most ``most`` segments."""
    from kimi_linear.kernels.triton.cuts import Cut
    from kimi_linear.kernels.triton.scan import scan
    from kimi_linear.kernels.triton.scan_backward import scan_backward

    x, cut = inputs, Cut(most=most, least=2)
    output = torch.full_like(x.d_output, torch.nan)
    result = scan(
        x.erase, x.u, x.read, x.write, x.pairs_q, x.decay, x.initial_state, output, x.cu_seqlens, x.cu_chunks,
        forgets=forgets, save=True, cut=cut,
    )  # fmt: skip
    gradients = scan_backward(
        x.erase, x.read, x.write, x.pairs_q, x.decay, x.d_output, x.d_final_state, result.operators, x.cu_seqlens,
        x.cu_chunks, forgets=forgets, lost=result.lost, cut=cut,
    )  # fmt: skip
    names = ("final_state", "states", "written")
    return {"output": output, **{name: getattr(result, name) for name in names}, **gradients._asdict()}


def hold(results: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    for name, got in results.items():
        error = relative_error(got[: len(exact[name])], exact[name])
        assert error < (GRADIENT_BOUND if name.startswith("d_") else BOUND), (name, error)


@pytest.mark.parametrize("most", [1, 6])
@pytest.mark.parametrize("gate", GATE_KINDS)
def test_right_at_every_gate(gate: str, most: int) -> None:
    inputs = scan_inputs(LENGTHS, 2, 128, 128, gate=gate, dtype=torch.bfloat16, device="cuda", spare=3)
    hold(both(inputs, most), exact_scan(inputs))


@pytest.mark.parametrize("most", [1, 6])
@pytest.mark.parametrize("value_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("key_dim", [32, 64, 128, 256])
def test_every_width(key_dim: int, value_dim: int, most: int) -> None:
    inputs = scan_inputs([600], 1, key_dim, value_dim, dtype=torch.bfloat16, device="cuda")
    hold(both(inputs, most), exact_scan(inputs))


@pytest.mark.parametrize("gate", ["fast", "stress"])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_right_where_stretches_forget_all(dim: int, gate: str) -> None:
    """By their own bounds, and by those of some chunks alone."""
    weak, strong = (
        scan_inputs(LENGTHS, 2, dim, dim, gate=kind, dtype=torch.bfloat16, device="cuda", spare=3)
        for kind in ("init", gate)
    )
    inputs = patchy(weak, strong)
    exact, forgets = exact_scan(inputs), forgotten(inputs)
    hold(both(inputs, 7, forgets), exact)
    forgets[::2] = 1e30
    hold(both(inputs, 7, forgets), exact)


def test_bitwise_the_same_where_nothing_is_forgotten() -> None:
    inputs = scan_inputs(LENGTHS, 2, 128, 128, dtype=torch.bfloat16, device="cuda", spare=3)
    used = int(inputs.cu_chunks[-1])  # type: ignore[index]
    plain = both(inputs, 6)
    for forgets in (forgotten(inputs), torch.full_like(inputs.decay[..., 0], 1e30)):
        told = both(inputs, 6, forgets)
        for name in plain:
            part = slice(None) if name.endswith(("output", "_state")) else slice(used)
            assert torch.equal(told[name][part], plain[name][part]), name


@pytest.mark.parametrize("bits", [(-0.01, -0.018), (-0.22, -0.35, -0.65, -0.98, -2.0)])
def test_windows_are_as_long_as_told(bits: tuple[float, ...]) -> None:
    """With false bounds, up to 100 chunks of segments of 128: states and gradients at a boundary are those of the window alone."""
    inputs = scan_inputs([4096], 2, 128, 128, packed=False, dtype=torch.bfloat16, device="cuda").repeated(times=8)
    from kimi_linear.kernels.triton.segments import GONE

    random = torch.Generator().manual_seed(0)
    forgets = GONE.value * torch.tensor(bits)[torch.randint(len(bits), (512, 2), generator=random)]
    forgets[:, 1] = forgets[:, 0]  # so that one stretch is the window of both heads
    told, column = both(inputs, 4, forgets.cuda()), forgets[:, 0].tolist()
    for boundary in (128, 256, 384):
        begin = next(c for c in reversed(range(boundary)) if sum(column[c:boundary]) < -GONE.value)
        end = next(c for c in range(boundary, 512) if sum(column[boundary : c + 1]) < -GONE.value) + 1
        assert boundary - begin < 128
        assert end - boundary < 128
        state = both(inputs.stretch(begin, boundary), 1)["final_state"][0]
        assert relative_error(told["states"][boundary], state) < BOUND
        gradient = both(inputs.stretch(boundary, end), 1)["d_initial_state"][0]
        assert relative_error(told["d_states"][boundary - 1], gradient) < GRADIENT_BOUND


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("most", [1, 6])
def test_two_runs_and_any_slot_are_bitwise_equal(most: int, told: bool) -> None:
    inputs = scan_inputs(LENGTHS, 2, 128, 128, dtype=torch.bfloat16, device="cuda", spare=3)
    from kimi_linear.kernels.triton.segments import GONE

    # Of these gates false, so that much of what enters a segment is cut off.
    forgets = torch.full_like(inputs.decay[..., 0], -0.75 * GONE.value) if told else None
    first, second = both(inputs, most, forgets), both(inputs, most, forgets)
    used = int(inputs.cu_chunks[-1])  # type: ignore[index]
    for name in first:
        part = slice(None) if name.endswith(("output", "_state")) else slice(used)
        assert torch.equal(first[name][part], second[name][part]), name
    # Two chunks are one segment, alone of the configuration for whole sequences, beside longer ones of that for segments.
    begin = {name: x[:2] for name, x in inputs.tensors().items() if "state" not in name}
    begin |= {name: x[:1] for name, x in inputs.tensors().items() if "state" in name}
    begin["d_output"] = inputs.d_output[:, :100].contiguous()
    few = replace(inputs, **begin, cu_seqlens=None, cu_chunks=None, lengths=(100,))
    alone = both(few, most, None if forgets is None else forgets[:2])
    assert torch.equal(alone["output"], first["output"][:, :100])
    assert torch.equal(alone["final_state"][0], first["final_state"][0])
    assert torch.equal(alone["d_initial_state"][0], first["d_initial_state"][0])
    for name in ("states", "written", "d_states", "d_written"):
        assert torch.equal(alone[name], first[name][:2]), name
    last = {name: x[used - 15 : used] for name, x in inputs.tensors().items() if "state" not in name}
    last |= {name: x[-1:] for name, x in inputs.tensors().items() if "state" in name}
    last["d_output"] = inputs.d_output[:, -900:].contiguous()
    many = replace(inputs, **last, cu_seqlens=None, cu_chunks=None, lengths=(900,))
    alone = both(many, most, None if forgets is None else forgets[used - 15 : used].clone())
    assert torch.equal(alone["output"], first["output"][:, -900:])
    assert torch.equal(alone["final_state"][0], first["final_state"][-1])
    assert torch.equal(alone["d_initial_state"][0], first["d_initial_state"][-1])
    for name in ("states", "written", "d_states", "d_written"):
        assert torch.equal(alone[name], first[name][used - 15 : used]), name


def test_offsets_past_two_to_the_31() -> None:
    """576K tokens of 32 heads of 128 are 2.4e9 numbers: the last chunks equal those of a scan that begins there."""
    few = scan_inputs([1024], 4, 128, 128, packed=False, gate="fast", dtype=torch.bfloat16, device="cuda")
    long = both(few.repeated(heads=8, times=576), 1)
    entering = long["states"][-16].float()[None].contiguous()
    short = few.repeated(heads=8)
    last = both(replace(short, initial_state=entering), 1)
    # States are kept in bf16, so what enters differs by a rounding.
    assert relative_error(long["output"][:, -1024:], last["output"]) < BOUND
    assert relative_error(long["d_written"][-16:], last["d_written"]) == 0


def test_a_graph_replays_what_ran() -> None:
    inputs = scan_inputs(LENGTHS, 2, 128, 128, dtype=torch.bfloat16, device="cuda", spare=3)
    forgets = forgotten(inputs)
    eager = both(inputs, 6, forgets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both(inputs, 6, forgets)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured["output"], eager["output"])
    assert torch.equal(captured["d_initial_state"], eager["d_initial_state"])
