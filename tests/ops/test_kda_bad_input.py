"""Bad input to the KDA operations: the name, what was expected, what came, and the way out."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kimi_linear.ops import BoundedGate, OpFacts, SoftplusGate, choose_impl, chunk_kda, recurrent_kda
from kimi_linear.testing.factories import kda_inputs

pytestmark = pytest.mark.unchecked_shapes

GOOD = kda_inputs(batch=2, tokens=4, heads=2, v_heads=4, key_dim=8, value_dim=6)
PACKED = kda_inputs(tokens=10, heads=2, key_dim=8, lengths=[4, 6])


def arguments(**changes: object) -> dict[str, object]:
    q, k, v, gate, beta = GOOD.positional()
    return {"q": q, "k": k, "v": v, "gate": gate, "beta": beta} | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": GOOD.q[0]}, ValueError, r"q: expected shape \[B, T, H, K\], got \[4, 2, 8\]"),
        ({"q": [1.0]}, TypeError, r"q: expected a torch.Tensor, got list"),
        ({"q": GOOD.q.long()}, TypeError, r"q: expected one of float64.*got torch.int64; convert it with q.float\(\)"),
        ({"k": GOOD.k[..., :7]}, ValueError, r"k: expected shape \[2, 4, 2, 8\].*got \[2, 4, 2, 7\]"),
        ({"k": GOOD.k.double()}, TypeError, r"k: expected torch.float32, as q, got torch.float64"),
        ({"v": GOOD.v[:, :, :3]}, ValueError, r"HV to be a multiple of H == 2, got HV == 3"),
        ({"v": GOOD.v[:, :2]}, ValueError, r"v: expected shape \[2, 4, HV, V\], got \[2, 2, 4, 6\]"),
        ({"beta": GOOD.beta[..., None]}, ValueError, r"beta: expected shape \[2, 4, 4\] \(B, T, HV\)"),
        ({"gate": GOOD.log_decay[:, :, :2]}, ValueError, r"gate: expected shape \[2, 4, 4, 8\] \(B, T, HV, K\)"),
        ({"gate": -GOOD.log_decay}, ValueError, r"gate: expected a log-decay <= 0 .*SoftplusGate\(x, A_log, dt_bias\)"),
        ({"gate": GOOD.log_decay * torch.nan}, ValueError, r"gate: expected a log-decay <= 0 everywhere"),
        ({"gate": 0.5}, TypeError, r"gate: expected a Tensor, SoftplusGate or BoundedGate, got float"),
        (
            {"gate": SoftplusGate(GOOD.log_decay, torch.zeros(3), torch.zeros(4, 8))},
            ValueError,
            r"gate.A_log: expected shape \[4\] \(HV\), got \[3\]",
        ),
        (
            {"gate": BoundedGate(GOOD.log_decay, torch.zeros(4), torch.zeros(32))},
            ValueError,
            r"gate.dt_bias: expected shape \[4, 8\] \(HV, K\), got \[32\]",
        ),
        (
            {"gate": BoundedGate(GOOD.log_decay, torch.zeros(4), torch.zeros(4, 8), lower_bound=5.0)},
            ValueError,
            r"gate.lower_bound: expected a negative number, got 5.0",
        ),
        (
            {"initial_state": torch.zeros(2, 4, 8, 6)},
            ValueError,
            r"initial_state: expected shape \[2, 4, 6, 8\].*got \[2, 4, 8, 6\].*transpose",
        ),
        (
            {"initial_state": torch.zeros(2, 4, 6, 8, dtype=torch.bfloat16)},
            TypeError,
            r"initial_state: expected torch.float32, got torch.bfloat16",
        ),
        ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, r"need B == 1, got B == 2; flatten"),
        ({"impl": "cuda"}, ValueError, r"impl: expected one of auto, reference, torch, triton, hopper, got 'cuda'"),
        (
            {"impl": "hopper"},
            ValueError,
            r"impl: chunk_kda has no 'hopper' implementation yet, only reference, torch, triton",
        ),
        ({"k": GOOD.k.to("meta")}, ValueError, r"k: expected device cpu, where q is, got meta; move it"),
    ],
)
def test_chunk_kda_refuses(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        chunk_kda(**arguments(**changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        (torch.tensor([0, 4, 9]), ValueError, r"to run from 0 to T == 10, got 0 to 9"),
        (torch.tensor([0, 7, 4, 10]), ValueError, r"never fall, got 7 then 4 at index 1; pass cumulative lengths"),
        (torch.tensor([0.0, 10.0]), TypeError, r"cu_seqlens: expected int32 or int64, got torch.float32"),
        (torch.tensor([10]), ValueError, r"cu_seqlens: expected shape \[N\+1\] with N >= 1, got \[1\]"),
    ],
)
def test_cu_seqlens(cu_seqlens: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        chunk_kda(*PACKED.positional(), cu_seqlens=cu_seqlens)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (torch.tensor([0, 5]), r"state_indices: expected slots in \[0, 5\), got \[0, 5\]"),
        (torch.tensor([2, 2]), r"state_indices: expected distinct slots .*got \[2, 2\]"),
        (torch.tensor([2]), r"state_indices: expected shape \[2\] \(N\), got \[1\]"),
    ],
)
def test_state_indices(slots: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recurrent_kda(*GOOD.positional(), initial_state=torch.zeros(5, 4, 6, 8), state_indices=slots)


def test_state_indices_need_a_pool_and_no_gradient() -> None:
    slots = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="expected initial_state to hold the pool of slots, got None"):
        recurrent_kda(*GOOD.positional(), state_indices=slots)
    q, k, v, gate, beta = GOOD.with_grad().positional()
    with pytest.raises(ValueError, match="in place has no gradient"):
        recurrent_kda(q, k, v, gate, beta, initial_state=torch.zeros(5, 4, 6, 8), state_indices=slots)


def test_a_misspelt_argument_is_an_error() -> None:
    with pytest.raises(TypeError, match="normalise_qk"):
        chunk_kda(**arguments(normalise_qk=True))  # type: ignore[call-arg]


def test_the_choice_is_a_pure_function_of_facts() -> None:
    """It can be asked about a GPU that is not there, and an explicit choice never falls back."""
    hopper = OpFacts(
        op="chunk_kda", device="cuda", arch=(9, 0), dtype="bfloat16", tokens=8192, key_dim=128, value_dim=128,
        needs_grad=False,
    )  # fmt: skip
    assert choose_impl(hopper).impl == "triton"
    for served in ({"arch": (8, 6)}, {"dtype": "float32"}, {"key_dim": 256, "value_dim": 256}, {"needs_grad": True}):
        assert choose_impl(dataclasses.replace(hopper, **served)).impl == "triton"
    assert choose_impl(hopper, "reference").impl == "reference"
    obstacles = {
        "expected compute capability 8.0 or more": {"arch": (7, 5)},
        "expected CUDA tensors, got cpu": {"device": "cpu", "arch": None},
        "expected q in bfloat16, float32, got float16": {"dtype": "float16"},
        r"expected K in \(32, 64, 128, 256\) and V in .*, got K == 96 and V == 128": {"key_dim": 96},
        r"expected K in \(32, 64, 128\) and V in .*, got K == 256 and V == 128": {"key_dim": 256, "dtype": "float32"},
    }
    for message, change in obstacles.items():
        facts = dataclasses.replace(hopper, **change)
        assert choose_impl(facts).impl == "torch"
        assert choose_impl(facts).reason
        with pytest.raises(ValueError, match=message):
            choose_impl(facts, "triton")
    with pytest.raises(ValueError, match="no 'triton' implementation yet"):
        choose_impl(dataclasses.replace(hopper, op="recurrent_gdn"), "triton")
