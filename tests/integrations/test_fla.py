"""Our KDA behind fla's ``chunk_kda``: in a process with fla, and its translation without."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kimi_linear.integrations import fla as integration
from kimi_linear.ops import BoundedGate, SoftplusGate

ORACLES = Path(sys.prefix) / "oracles"
"""Where ``make install-dev`` puts fla: outside the environment, because transformers would call its GPU kernels."""


def path_with_fla() -> str | None:
    """A PYTHONPATH under which fla can be imported, or None."""
    if (ORACLES / "fla").is_dir():
        return str(ORACLES)
    return "" if importlib.util.find_spec("fla") is not None else None


def test_values_gradients_and_refusals_in_a_process_with_fla() -> None:
    path = path_with_fla()
    if path is None:
        pytest.skip(f"needs fla-core >= 0.6: make install-dev puts it into {ORACLES}")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "fla_checks.py")],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "ok"


def call(**changes: object) -> dict[str, object]:
    """A call by fla's names, key dim 8, value dim 4."""
    torch.manual_seed(0)
    return {
        "q": torch.randn(1, 5, 2, 8), "k": torch.randn(1, 5, 2, 8), "v": torch.randn(1, 5, 2, 4),
        "g": -torch.rand(1, 5, 2, 8), "beta": torch.rand(1, 5, 2), **changes,
    }  # fmt: skip


def test_the_gate_is_translated_by_what_it_means() -> None:
    rates = {"A_log": torch.randn(1, 1, 2, 1), "dt_bias": torch.randn(16)}
    plain = integration.translate(call())
    assert isinstance(plain.gate, torch.Tensor)
    softplus = integration.translate(call(use_gate_in_kernel=True, **rates)).gate
    assert isinstance(softplus, SoftplusGate)
    assert torch.equal(softplus.dt_bias, rates["dt_bias"].view(2, 8))
    bounded = integration.translate(call(use_gate_in_kernel=True, lower_bound=-3.0, **rates)).gate
    assert isinstance(bounded, BoundedGate)
    assert bounded.lower_bound == -3.0
    # Without use_gate_in_kernel the bound only tells fla's kernels what they may assume.
    assert isinstance(integration.translate(call(lower_bound=-3.0, safe_gate=True)).gate, torch.Tensor)


def test_the_state_changes_its_layout_both_ways() -> None:
    state = torch.randn(1, 2, 8, 4)
    theirs = integration.translate(call(initial_state=state, output_final_state=True))
    _, final = theirs.run("reference")
    assert final.shape == state.shape
    first = integration.translate(call(initial_state=state.mT, output_final_state=True, state_v_first=True))
    assert torch.equal(first.run("reference")[1], final.mT)
    assert integration.translate(call(initial_state=state)).run("reference")[1] is None


def test_plain_torch_is_no_reason_to_leave_flas_kernels() -> None:
    """On a GPU a call is taken only where a kernel of ours computes it; asked here of the facts alone."""
    assert integration.why_not(call(), "auto") is None
    on_meta = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in call().items()}
    assert "fla's own is faster than plain torch" in integration.why_not(on_meta, "auto")
    assert integration.why_not(on_meta, "torch") is None
    assert "'triton' expected CUDA tensors" in integration.why_not(call(), "triton")


def test_without_fla_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla", None)
    monkeypatch.setitem(sys.modules, "fla.backends", None)
    with pytest.raises(ImportError, match=r"fla: expected fla-core 0\.6 or later"):
        integration.register()
    with pytest.raises(ValueError, match="impl: expected 'auto' or one of reference, torch, triton"):
        integration.register(impl="cuda")
