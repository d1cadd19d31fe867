"""Run by test_scan.py in a process of its own: Triton's interpreter has to be asked for before kernels are imported.

The scans through their real launch code, on CPU tensors in fp32 (the interpreter's bf16 products are wrong), against the
recurrence over chunks in fp64 and its gradients by autograd. Prints one line per check: name, error, bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kimi_linear.kernels.triton.configs import Config
from kimi_linear.kernels.triton.cuts import Cut, plan
from kimi_linear.kernels.triton.scan import ScanResult, scan
from kimi_linear.kernels.triton.scan_backward import ScanGradients, scan_backward
from kimi_linear.kernels.triton.segments import GONE, build
from kimi_linear.testing.chunk_scan import ScanInputs, exact_scan, forgotten, patchy, scan_inputs
from kimi_linear.testing.tolerances import relative_error

torch.set_num_threads(1)
BOUND = 2e-6
"""A dozen times what fp32 rounding costs here; an error in a formula costs 1e-2 and more."""
WHOLE, CUT = Cut(most=1), Cut(most=5, least=1)


def report(name: str, error: float, bound: float = BOUND) -> None:
    print(name.replace(" ", "_"), error, bound)


def compare(name: str, got: dict[str, Tensor | None], wanted: dict[str, Tensor]) -> None:
    for part, actual in got.items():
        assert actual is not None, (name, part)
        report(f"{name} {part}", relative_error(actual[: len(wanted[part])], wanted[part]))


def run(
    case: ScanInputs, cut: Cut, save: bool = True, export: Sequence[tuple[int, int]] = (), initial: bool = True,
    config: Config | None = None, forgets: Tensor | None = None,
) -> tuple[Tensor, ScanResult]:  # fmt: skip
    output = torch.full_like(case.d_output, torch.nan)
    result = scan(
        case.erase, case.u, case.read, case.write, case.pairs_q, case.decay, case.initial_state if initial else None,
        output, case.cu_seqlens, case.cu_chunks, forgets=forgets, save=save, export=export, cut=cut, config=config, build_config=config,
    )  # fmt: skip
    return output, result


def run_backward(
    case: ScanInputs, result: ScanResult, cut: Cut, final: bool = True, config: Config | None = None,
    forgets: Tensor | None = None,
) -> ScanGradients:  # fmt: skip
    return scan_backward(
        case.erase, case.read, case.write, case.pairs_q, case.decay, case.d_output,
        case.d_final_state if final else None, result.operators, case.cu_seqlens, case.cu_chunks, forgets=forgets,
        lost=result.lost, cut=cut, config=config,
    )  # fmt: skip


def exact_in_every_layout() -> None:
    """Forward, what it saves, exports and the reverse, whole and cut."""
    cases = {
        "packed": scan_inputs([0, 100, 1, 64, 300, 0], 2, 32, 64, spare=3),
        "rows": scan_inputs([290, 290], 1, 32, 32, packed=False),
        "slabs": scan_inputs([330], 1, 64, 32),
    }
    slabs = Config(constants={"BK": 32, "BV": 16}, num_warps=4, num_stages=2)
    for name, case in cases.items():
        wanted = exact_scan(case)
        for cut in (WHOLE, CUT):
            label = f"{name} {'cut' if cut is CUT else 'whole'}"
            config = slabs if name == "slabs" else None
            output, result = run(case, cut, config=config)
            compare(
                label,
                {"output": output, **{p: getattr(result, p) for p in ("final_state", "states", "written")}},
                wanted,
            )
            assert (result.operators is None) == (cut is WHOLE)
            compare(label, run_backward(case, result, cut, config=config)._asdict(), wanted)


def exact_at_the_strongest_gates() -> None:
    for kind in ("stress", "mixed"):
        case = scan_inputs([330], 1, 32, 32, gate=kind)
        wanted = exact_scan(case)
        output, result = run(case, CUT)
        compare(f"gate {kind}", {"output": output, "final_state": result.final_state}, wanted)
        compare(f"gate {kind}", run_backward(case, result, CUT)._asdict(), wanted)


def cut_with_little_room() -> None:
    """Many packed sequences, one long: boundaries lie by chunks, not by sequences."""
    case = scan_inputs([5, 700, 64, 3, 20, 1, 0, 9], 1, 32, 32)
    cut = Cut(most=6, least=2)
    assert plan(cut, 8, len(case.erase), packed=True).apart == 0
    wanted = exact_scan(case)
    output, result = run(case, cut)
    compare("little room", {"output": output, "final_state": result.final_state}, wanted)
    gradients = run_backward(case, result, cut)
    compare("little room", gradients._asdict(), wanted)
    whole = run(case, WHOLE)[0]
    report("little room was cut", float(torch.equal(whole, output)), 0.0)


def without_states() -> None:
    """No initial state is one of zeros; no final gradient likewise; nothing saved is nothing made."""
    case = scan_inputs([300], 1, 32, 32)
    for cut in (WHOLE, CUT):
        for given in (case.initial_state, case.d_final_state):
            given.zero_()
        output, result = run(case, cut, save=False, initial=False)
        assert result[1:4] == (None, None, None)
        zeros, same = run(case, cut)
        report("no initial state", relative_error(output, zeros), 0.0)
        with_zeros = run_backward(case, same, cut)
        without = run_backward(case, same, cut, final=False)
        for part, a, b in zip(without._fields, without, with_zeros, strict=True):
            assert a is not None
            assert b is not None
            report(f"no final gradient {part}", relative_error(a, b), 0.0)


def exports() -> None:
    """The state after a number of tokens is the state at that chunk's end, wherever the cut falls."""
    case = scan_inputs([70, 0, 320, 130], 1, 32, 32, spare=1)
    ends, starts = exact_scan(case)["ends"], [0, 2, 2, 7]
    asked = [(2, 128), (0, 64), (2, 320), (3, 128)]
    for cut in (WHOLE, CUT):
        exported = run(case, cut, save=False, export=asked)[1].exported
        assert exported is not None
        for (n, tokens), state in zip(asked, exported, strict=True):
            report(f"export {n} {tokens}", relative_error(state, ends[starts[n] + tokens // 64 - 1]))
    for wrong in ([(0, 64), (0, 64)], [(0, 32)], [(0, 0)]):
        with pytest.raises(ValueError, match="multiple of 64"):
            run(case, WHOLE, export=wrong)


def bitwise_in_any_slot() -> None:
    """Alone, packed among others, or a row of a batch: the same bits, cut or not. The cut follows a sequence's own length."""
    lengths = [100, 520, 64, 300]
    packed = scan_inputs(lengths, 1, 32, 32, spare=4)
    # Not true of these gates, so that most of what enters a segment is cut off.
    false = torch.full(packed.erase.shape[:2], -30.0)
    for cut, forgets in ((WHOLE, None), (CUT, None), (Cut(most=4, least=2), None), (CUT, false)):
        output, result = run(packed, cut, forgets=forgets)
        gradients = run_backward(packed, result, cut, forgets=forgets)
        assert packed.cu_chunks is not None
        assert packed.cu_seqlens is not None
        for n, length in enumerate(lengths):
            chunks = slice(int(packed.cu_chunks[n]), int(packed.cu_chunks[n + 1]))
            tokens = slice(int(packed.cu_seqlens[n]), int(packed.cu_seqlens[n + 1]))
            one = {name: x[chunks] for name, x in packed.tensors().items() if "state" not in name}
            one |= {name: x[n : n + 1] for name, x in packed.tensors().items() if "state" in name}
            one["d_output"] = packed.d_output[:, tokens].contiguous()
            alone = ScanInputs(**one, cu_seqlens=None, cu_chunks=None, lengths=(length,))
            own_forgets = None if forgets is None else forgets[chunks]
            own_output, own = run(alone, cut, forgets=own_forgets)
            own_gradients = run_backward(alone, own, cut, forgets=own_forgets)
            pairs = [
                (own_output, output[:, tokens]),
                (own.final_state[0], result.final_state[n]),
                (own.states, result.states[chunks]),
                (own_gradients.d_states, gradients.d_states[chunks]),
                (own_gradients.d_written, gradients.d_written[chunks]),
                (own_gradients.d_initial_state[0], gradients.d_initial_state[n]),
            ]
            assert all(torch.equal(a, b) for a, b in pairs), (cut, n)
            report(f"bitwise {n}", 0.0)


def exact_where_bounds_are_told() -> None:
    """What is cut off is not missed and what is not is not lost; operators that are zero say so."""
    packed, rows = ([0, 100, 1, 64, 800, 300, 0], 2, 32, 64), ([650, 650], 1, 32, 32)
    cases = {
        "packed": (patchy(*(scan_inputs(*packed, gate=gate, spare=3) for gate in ("init", "stress"))), 7),
        "rows": (patchy(*(scan_inputs(*rows, gate=gate, packed=False) for gate in ("init", "stress"))), 11),
        "slow": (scan_inputs([52 * 64], 1, 32, 32, gate="mixed", seed=7), 4),  # half of each segment is left out
    }
    for name, (case, most) in cases.items():
        wanted, forgets, cut = exact_scan(case), forgotten(case), Cut(most=most, least=1)
        output, result = run(case, cut, forgets=forgets)
        parts = {"output": output, **{p: getattr(result, p) for p in ("final_state", "states", "written")}}
        compare(f"{name} told", parts, wanted)
        compare(f"{name} told", run_backward(case, result, cut, forgets=forgets)._asdict(), wanted)
        assert result.lost is not None
        assert (result.lost == 1).any(), name
        assert name == "slow" or (result.lost == 0).any(), name


def bitwise(name: str, a: NamedTuple, b: NamedTuple, but: Sequence[str] = ()) -> None:
    for part, x, y in zip(a._fields, a, b, strict=True):
        if part not in but and x is not None:
            report(f"{name} {part}", float(not torch.equal(x, y)), 0.0)


def bitwise_the_same_where_nothing_is_forgotten() -> None:
    """At weak gates, and where each cut would have to cross a chunk of which nothing is known."""
    case, cut = scan_inputs([12 * 64], 2, 32, 32), Cut(most=4, least=1)
    claimed = torch.full(case.erase.shape[:2], -0.75 * GONE.value)
    barred = claimed.clone()
    barred[1::3] = 1e30  # the middle one of every segment
    plain_output, plain = run(case, cut)
    plain_gradients = run_backward(case, plain, cut)
    for name, forgets in {"weak": forgotten(case), "barred": barred, "claimed": claimed}.items():
        output, result = run(case, cut, forgets=forgets)
        gradients = run_backward(case, result, cut, forgets=forgets)
        assert result.lost is not None
        report(f"{name} lost", float((result.lost != int(name == "claimed")).sum()), 0.0)
        if name == "claimed":  # a false bound shows, or the others would prove nothing
            assert not torch.equal(output, plain_output)
            assert not torch.equal(gradients.d_states, plain_gradients.d_states)
        else:
            report(f"{name} output", float(not torch.equal(output, plain_output)), 0.0)
            assert result.operators is not None
            assert plain.operators is not None
            # Nobody needs, nor writes, the operator of a first segment.
            report(f"{name} operators", float(not torch.equal(result.operators[1:], plain.operators[1:])), 0.0)
            bitwise(name, result, plain, but=("operators", "lost"))
            bitwise(name, gradients, plain_gradients)


def windows_are_as_long_as_told() -> None:
    """With false bounds: a state at a boundary is that of a scan over the last chunks before it that the bounds ask for, from
    zero; a gradient that of the first chunks behind it."""
    case, cut, segments = scan_inputs([30 * 64 - 20], 1, 32, 32), Cut(most=5, least=1), 5
    random = torch.Generator().manual_seed(1)
    forgets = GONE.value * torch.tensor([-0.22, -0.35, -0.65, -0.98, -2.0])[torch.randint(5, (30, 1), generator=random)]
    result = run(case, cut, forgets=forgets)[1]
    gradients = run_backward(case, result, cut, forgets=forgets)
    assert result.states is not None
    bits = forgets[:, 0].tolist()
    for s in range(1, segments):
        boundary = 6 * s
        begin = next(c for c in reversed(range(boundary)) if sum(bits[c:boundary]) < -GONE.value)
        end = next(c for c in range(boundary, 30) if sum(bits[boundary : c + 1]) < -GONE.value) + 1
        before, behind = case.stretch(begin, boundary), case.stretch(boundary, end)
        state = run(before, WHOLE)[1].final_state
        report(f"window before {s}", relative_error(result.states[boundary], state[0]))
        d_state = run_backward(behind, run(behind, WHOLE)[1], WHOLE).d_initial_state
        assert d_state is not None
        report(f"window behind {s}", relative_error(gradients.d_states[boundary - 1], d_state[0]))


def what_is_forgotten_is_not_read() -> None:
    """Over segments of 90 chunks, with NaN wherever the windows do not reach, of 81 chunks and of one; nor is an initial state."""
    case, cut = scan_inputs([90 * 64], 1, 32, 32, packed=False).repeated(times=4), Cut(most=4)
    forgets = torch.full((360, 1), -GONE.value / 80)
    forgets[179] = -GONE.value - 1
    read = torch.zeros(360, dtype=torch.bool)
    for begin, end in ((9, 90), (179, 180), (189, 270)):
        read[begin:end] = True
    poisoned = {
        name: torch.where(read.view(-1, *[1] * (x.ndim - 1)), x, torch.nan)
        for name, x in case.tensors().items() if name in ("erase", "u", "write", "decay")
    }  # fmt: skip
    made = plan(cut, 1, 360, packed=False)
    offsets, operators, lost = build(
        **poisoned, initial_state=torch.full_like(case.initial_state, torch.nan), cu_seqlens=None, cu_chunks=None, plan=made,
        sequences=1, tokens=360 * 64, forgets=forgets,
    )  # fmt: skip
    assert lost is not None
    report("all lost", float((lost != 1).sum()), 0.0)
    report("operators", float(operators[1:].abs().max()), 0.0)
    for b, (begin, end) in enumerate(((9, 90), (179, 180), (9, 90))):
        report(f"offset {b}", relative_error(offsets[b], run(case.stretch(begin, end), WHOLE)[1].final_state[0]))


if __name__ == "__main__":
    exact_in_every_layout()
    exact_at_the_strongest_gates()
    cut_with_little_room()
    without_states()
    exports()
    bitwise_in_any_slot()
    exact_where_bounds_are_told()
    bitwise_the_same_where_nothing_is_forgotten()
    windows_are_as_long_as_told()
    what_is_forgotten_is_not_read()
