"""The pointwise Triton kernels without a GPU: interpreted, registered, compiled for every architecture, and chosen."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from kimi_linear.ops import OpFacts, choose_impl, gated_rms_norm, l2_normalize, rms_norm, short_conv, short_conv_qkv
from kimi_linear.ops.dispatch import ROW_OPS, row_facts

from .launches import SHARED_LIMIT, Launch, compiled_for

triton = pytest.importorskip("triton", reason="needs triton; pip install -c constraints.txt triton")

HERE = Path(__file__).parent


@cache
def interpreted() -> dict[str, dict[str, str]]:
    """What interpreted_pointwise.py printed: kind, name, value."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "interpreted_pointwise.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, str]] = {}
    for kind, name, value in (line.split("\t") for line in done.stdout.splitlines()):
        found.setdefault(kind, {})[name] = value
    return found


def test_interpreted_values_and_gradients() -> None:
    """fp32, where the only errors are rounding: 1e-6 is eight roundings, and what is seen is two."""
    errors = interpreted()["value"]
    assert len(errors) == 28
    assert {name: error for name, error in errors.items() if not float(error) < 1e-6} == {}


def test_a_norm_hands_out_another_dtype() -> None:
    """The gradients are those of a cast after it, bit for bit."""
    assert interpreted()["narrow"] == {"output": "True", "gradients": "True"}


def test_operators_keep_torchs_rules() -> None:
    """Schema, fake kernel, gradient registration, and tracing with dynamic shapes, of every operator."""
    verdicts = interpreted()["opcheck"]
    assert len(verdicts) == 14
    assert {name: verdict for name, verdict in verdicts.items() if verdict != "True"} == {}


def test_one_graph_for_the_compiler() -> None:
    """torch.compile(fullgraph=True) gives the numbers of eager mode, bit for bit, at several lengths."""
    assert interpreted()["compile"] == {"T=9": "True", "T=5": "True", "T=1": "True"}


def test_a_second_derivative_is_refused() -> None:
    assert "has no derivative" in interpreted()["twice"]["l2_normalize"]


def test_operators_refuse_cpu_tensors_outside_the_interpreter() -> None:
    with pytest.raises(RuntimeError, match=r"kimi_linear::l2_normalize: expected CUDA tensors, got cpu; .*impl='auto'"):
        torch.ops.kimi_linear.l2_normalize(torch.ones(2, 4), 1e-6)


def launch_convolutions(dtype: torch.dtype, taps: int, *, simple: bool) -> None:
    """Forward and backward of one dense part, or of the most that a variant holds: a bias, a state, packed sequences, and
    then three parts. The width of the second is divided by no vector."""
    from kimi_linear.kernels.triton.short_conv import backward, forward

    for width, parts in [(512, 1)] if simple else [(100, 1), (512, 3)]:
        xs = [torch.zeros(1, 64, width, dtype=dtype) for _ in range(parts)]
        weights = [torch.zeros(width, taps, dtype=dtype) for _ in range(parts)]
        bias = None if simple or parts == 3 else torch.zeros(width, dtype=dtype)
        state = None if simple else torch.zeros(3, parts * width, taps - 1, dtype=dtype)
        cu = None if simple else torch.tensor([0, 3, 3, 64], dtype=torch.int32)
        forward(xs, weights, bias, state, cu, True)
        backward(xs, weights, bias, state, cu, xs, state, True)


def launch_norms(dtype: torch.dtype, width: int) -> None:
    """The most that a variant holds, swish; and the product of a feed-forward."""
    from kimi_linear.kernels.triton import gated_rmsnorm, l2norm, swiglu

    x, weight = torch.zeros(8, width, dtype=dtype), torch.zeros(width)
    l2norm.forward(x, 1e-6)
    l2norm.backward(x, x, 1e-6)
    gated_rmsnorm.forward(x, x, weight, 1e-5, "swish")
    gated_rmsnorm.backward(x, x, weight, x, 1e-5, "swish", True)
    swiglu.forward(x, x)
    swiglu.backward(x, x, x)


def check(launches: list[Launch], arch: int) -> None:
    for launch in launches:
        assert launch.stack == 0, f"{launch.kernel} on sm_{arch} spills {launch.stack} bytes"
        assert launch.shared <= SHARED_LIMIT[arch], f"{launch.kernel} on sm_{arch} takes {launch.shared} bytes"


@pytest.mark.unpoisoned
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_convolutions_compile_without_spills(dtype: torch.dtype, arch: int) -> None:
    with compiled_for(arch) as launches:
        for taps in (4, 8):
            launch_convolutions(dtype, taps, simple=False)
    assert len(launches) == 2 * 2 * 3
    check(launches, arch)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_norms_compile_without_spills(arch: int) -> None:
    """Every class of widths at its widest, in bf16; and the head's width in fp32."""
    with compiled_for(arch) as launches:
        for width in (64, 128, 256, 1024, 4096, 8192):
            launch_norms(torch.bfloat16, width)
        launch_norms(torch.float32, 128)
    check(launches, arch)


@pytest.mark.unpoisoned
def test_memory_is_read_in_vectors() -> None:
    """Four bf16 channels a thread leave as one 8-byte access, also where the part of q, k or v is chosen in the kernel."""
    with compiled_for(90) as launches:
        launch_convolutions(torch.bfloat16, 4, simple=True)
        launch_convolutions(torch.bfloat16, 4, simple=False)
    one_part, _, three_parts = [launch for launch in launches if launch.kernel == "forward_kernel"]
    for launch in (one_part, three_parts):
        assert "ld.global.v2.b32" in launch.ptx
        assert "st.global.v2.b32" in launch.ptx


@pytest.mark.unpoisoned
def test_no_length_needs_a_new_compilation() -> None:
    from kimi_linear.kernels.triton import gated_rmsnorm, short_conv

    with compiled_for(90) as launches:
        for tokens in (1, 2, 16, 17, 64, 1000):
            x, weight = torch.zeros(1, tokens, 64, dtype=torch.bfloat16), torch.zeros(64, 4)
            cu = torch.tensor([0] * tokens + [tokens], dtype=torch.int32)
            short_conv.forward([x], [weight], None, None, cu, True)
            short_conv.backward([x], [weight], None, None, cu, [x], None, True)
            gated_rmsnorm.forward(x, x, weight[:, 0], 1e-5, "sigmoid")
            gated_rmsnorm.backward(x, x, weight[:, 0], x, 1e-5, "sigmoid", True)
    kernels = {(launch.kernel, launch.variant) for launch in launches}
    assert sorted(kernel for kernel, _ in kernels) == [
        "backward_kernel",
        "backward_kernel",
        "column_sum_kernel",
        "column_sum_kernel",
        "forward_kernel",
        "forward_kernel",
    ]  # one of each for the convolution and for the norm, whatever the length


def facts(op: str, **changes: object) -> OpFacts:
    known: dict[str, object] = {
        "op": op, "device": "cuda", "arch": (9, 0), "dtype": "bfloat16", "tokens": 8192, "key_dim": 128, "value_dim": 128,
        "needs_grad": True, "taps": 4, "has_triton": True,
    }  # fmt: skip
    return OpFacts(**(known | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("op", ROW_OPS)
def test_choice(op: str) -> None:
    assert choose_impl(facts(op)).impl == "triton"
    assert choose_impl(facts(op, arch=(8, 0), dtype="float32")).impl == "triton"
    assert choose_impl(facts(op), "torch").impl == "torch"
    refusals = {
        "expected CUDA tensors, got cpu": {"device": "cpu", "arch": None},
        r"expected compute capability 8\.0 or more, got \(7, 5\)": {"arch": (7, 5)},
        "expected x in bfloat16, float16, float32, got float64": {"dtype": "float64"},
        "expected triton to be installed": {"has_triton": False},
    }
    if op == "short_conv":
        refusals["expected W <= 8 taps, got 9"] = {"taps": 9}
    elif op != "swiglu":
        refusals["expected D <= 8192, got 8193"] = {"key_dim": 8193}
    for message, changes in refusals.items():
        assert choose_impl(facts(op, **changes)).impl == "torch"
        with pytest.raises(ValueError, match=f"impl: {op} with 'triton' {message}.*use impl='auto'"):
            choose_impl(facts(op, **changes), "triton")
    with pytest.raises(ValueError, match=f"{op} has no 'reference' implementation"):
        choose_impl(facts(op), "reference")


def test_facts_of_rows() -> None:
    seen = row_facts("short_conv", torch.zeros(2, 5, 24), taps=4)
    assert (seen.device, seen.arch, seen.dtype, seen.tokens, seen.key_dim, seen.taps) == (
        "cpu",
        None,
        "float32",
        10,
        24,
        4,
    )


def test_explicit_triton_never_falls_back() -> None:
    x, weight = torch.zeros(1, 3, 8), torch.ones(8)
    for call in (
        lambda: short_conv(x, torch.zeros(8, 4), impl="triton"),
        lambda: short_conv_qkv(x, x, x, (torch.zeros(8, 4),) * 3, impl="triton"),
        lambda: rms_norm(x, weight, 1e-5, impl="triton"),
        lambda: gated_rms_norm(x, x, weight, 1e-5, impl="triton"),
        lambda: l2_normalize(x, impl="triton"),
    ):
        with pytest.raises(ValueError, match="with 'triton' expected CUDA tensors, got cpu"):
            call()
