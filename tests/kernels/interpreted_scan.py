"""Run by test_scan.py in a process of its own: Triton's interpreter has to be asked for before kernels are imported.

The scans through their real launch code, on CPU tensors in fp32 (the interpreter's bf16 products are wrong), against the
recurrence over chunks in fp64 and its gradients by autograd. Prints one line per check: name, error, bound.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kimi_linear.kernels.triton.configs import Config
from kimi_linear.kernels.triton.cuts import Cut, plan
from kimi_linear.kernels.triton.scan import ScanResult, scan
from kimi_linear.kernels.triton.scan_backward import ScanGradients, scan_backward
from kimi_linear.testing.chunk_scan import ScanInputs, exact_scan, scan_inputs
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
    config: Config | None = None,
) -> tuple[Tensor, ScanResult]:  # fmt: skip
    output = torch.full_like(case.d_output, torch.nan)
    result = scan(
        case.erase, case.u, case.read, case.write, case.pairs_q, case.decay, case.initial_state if initial else None,
        output, case.cu_seqlens, case.cu_chunks, save=save, export=export, cut=cut, config=config, build_config=config,
    )  # fmt: skip
    return output, result


def run_backward(
    case: ScanInputs, operators: Tensor | None, cut: Cut, final: bool = True, config: Config | None = None
) -> ScanGradients:
    return scan_backward(
        case.erase, case.read, case.write, case.pairs_q, case.decay, case.d_output,
        case.d_final_state if final else None, operators, case.cu_seqlens, case.cu_chunks, cut=cut, config=config,
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
            compare(label, run_backward(case, result.operators, cut, config=config)._asdict(), wanted)


def exact_at_the_strongest_gates() -> None:
    for kind in ("stress", "mixed"):
        case = scan_inputs([330], 1, 32, 32, gate=kind)
        wanted = exact_scan(case)
        output, result = run(case, CUT)
        compare(f"gate {kind}", {"output": output, "final_state": result.final_state}, wanted)
        compare(f"gate {kind}", run_backward(case, result.operators, CUT)._asdict(), wanted)


def cut_with_little_room() -> None:
    """Many packed sequences, one long: boundaries lie by chunks, not by sequences."""
    case = scan_inputs([5, 700, 64, 3, 20, 1, 0, 9], 1, 32, 32)
    cut = Cut(most=6, least=2)
    assert plan(cut, 8, len(case.erase), packed=True).apart == 0
    wanted = exact_scan(case)
    output, result = run(case, cut)
    compare("little room", {"output": output, "final_state": result.final_state}, wanted)
    gradients = run_backward(case, result.operators, cut)
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
        with_zeros = run_backward(case, same.operators, cut)
        without = run_backward(case, same.operators, cut, final=False)
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
    for cut in (WHOLE, CUT, Cut(most=4, least=2)):
        output, result = run(packed, cut)
        gradients = run_backward(packed, result.operators, cut)
        assert packed.cu_chunks is not None
        assert packed.cu_seqlens is not None
        for n, length in enumerate(lengths):
            chunks = slice(int(packed.cu_chunks[n]), int(packed.cu_chunks[n + 1]))
            tokens = slice(int(packed.cu_seqlens[n]), int(packed.cu_seqlens[n + 1]))
            one = {name: x[chunks] for name, x in packed.tensors().items() if "state" not in name}
            one |= {name: x[n : n + 1] for name, x in packed.tensors().items() if "state" in name}
            one["d_output"] = packed.d_output[:, tokens].contiguous()
            alone = ScanInputs(**one, cu_seqlens=None, cu_chunks=None, lengths=(length,))
            own_output, own = run(alone, cut)
            own_gradients = run_backward(alone, own.operators, cut)
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


if __name__ == "__main__":
    exact_in_every_layout()
    exact_at_the_strongest_gates()
    cut_with_little_room()
    without_states()
    exports()
    bitwise_in_any_slot()
