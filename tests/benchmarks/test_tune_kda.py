"""The tuner's candidates for chunked KDA: entries of the table, launched as asked, and timed alone. Nothing runs: they are compiled."""

from __future__ import annotations

import pytest

from kimi_linear.kernels.triton.configs import Config, table
from tests.kernels.launches import compiled_for

pytest.importorskip("triton", reason="needs triton; pip install -c constraints.txt triton")
tune_kda = pytest.importorskip("benchmarks.ops.tune_kda", reason="benchmarks are not installed with the package")

CHUNK_KERNELS = (
    "prepare", "solve", "value_backward", "anchor", "anchored_backward", "tile_backward", "token_backward",
    "steep_backward",
)  # fmt: skip


def test_candidates_are_entries_of_the_table() -> None:
    problems = tune_kda.problems()
    assert {p.kernel for p in problems} == {f"kda_{name}" for name in CHUNK_KERNELS}
    for problem in problems:
        for classes in table()[problem.kernel].values():
            present = classes[problem.shape_class]
            assert all(set(c.constants) == set(present.constants) for c in problem.candidates), problem.kernel
        assert len({str(c) for c in problem.candidates}) == len(problem.candidates), problem.kernel


@pytest.mark.unpoisoned
@pytest.mark.parametrize(("name", "times"), [("prepare", 2), ("token_backward", 1)])
def test_a_candidate_is_judged_by_whole_calls_and_timed_alone(
    name: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_kda, "TOKENS", 64)
    monkeypatch.setattr(tune_kda, "WIDTH", 32)
    problem = next(p for p in tune_kda.problems() if (p.kernel, p.shape_class) == (f"kda_{name}", "K=32 16 bit"))
    run = problem.build("cpu")
    wide = Config(constants=problem.candidates[0].constants, num_warps=8)
    with compiled_for(90) as launches:
        results = run(wide)
    whole = [launch.kernel for launch in launches]
    assert {f"{name}_kernel" for name in CHUNK_KERNELS} <= set(whole)
    # For each gate output, state, the gradients of all eight inputs, and output and state of a forward alone.
    assert len(results) == 2 * 12
    with compiled_for(90) as launches:
        again = run(wide)
    assert [launch.kernel for launch in launches] == [f"{name}_kernel"] * 2 * times
    assert all(".reqntid 256" in launch.ptx for launch in launches)
    assert all(a is b for a, b in zip(again, results, strict=True))
