"""The pointwise Triton kernels on a GPU, through the public operations: exact, repeatable, far offsets, graphs, compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kimi_linear.ops import gated_rms_norm, l2_normalize, rms_norm, short_conv, short_conv_qkv, swiglu
from kimi_linear.testing.tolerances import assert_close_to_reference, relative_error

from .pointwise_cases import LENGTHS, Case, conv_case, norm_case, qkv_case, results, swiglu_case

pytestmark = [pytest.mark.gpu, pytest.mark.unpoisoned]

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
HERE = Path(__file__).parent


def convolve(x, weight, bias, state, cu, silu) -> tuple[Tensor, ...]:
    activation = "silu" if silu else "none"
    return short_conv(
        x, weight, bias=bias, activation=activation, initial_state=state, cu_seqlens=cu, impl="triton"
    )  # fmt: skip


def convolve_qkv(q, k, v, q_weight, k_weight, v_weight, state, cu, silu) -> tuple[Tensor, ...]:
    assert silu
    weights = (q_weight, k_weight, v_weight)
    return short_conv_qkv(q, k, v, weights, initial_state=state, cu_seqlens=cu, impl="triton")


OPS = SimpleNamespace(
    short_conv=convolve,
    short_conv_qkv=convolve_qkv,
    swiglu=swiglu,
    l2_normalize=lambda x, eps: l2_normalize(x, eps, impl="triton"),
    rms_norm=lambda x, weight, eps: rms_norm(x, weight, eps, impl="triton"),
    gated_rms_norm=lambda x, gate, weight, eps, kind: gated_rms_norm(x, gate, weight, eps, kind, impl="triton"),
)


def judge(case: Case) -> None:
    """Twice the error of the formula in fp32, rounded once to the leaves' dtype, plus rounding: for every result."""
    got, exact = results(case, case.run), results(case, case.formula, torch.float64)
    plain = results(case, case.formula, torch.float32)
    for name, value in got.items():
        assert_close_to_reference(value, exact[name], plain[name].to(value.dtype), f"{case.name}: {name}")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 8])
def test_convolution(taps: int, packed: bool, dtype: torch.dtype) -> None:
    for width, bias, silu in ((512, False, True), (200, True, True), (33, True, False)):
        judge(conv_case(
            OPS, width=width, taps=taps, packed=packed, bias=bias, silu=silu, tokens=300, dtype=dtype, device="cuda",
        ))  # fmt: skip


@pytest.mark.parametrize("tokens", [0, 1, 2, 63, 64, 65, 128, 131, 1000])
def test_convolution_at_every_length(tokens: int) -> None:
    judge(conv_case(OPS, width=256, taps=4, packed=False, batch=3, tokens=tokens, dtype=torch.bfloat16, device="cuda"))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_convolution_of_q_k_and_v(fused: bool, packed: bool, dtype: torch.dtype) -> None:
    for widths in ((256, 256, 512), (33, 64, 128)):
        judge(qkv_case(OPS, widths=widths, packed=packed, fused=fused, dtype=dtype, device="cuda"))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["l2", "rms", "sigmoid", "swish"])
def test_norms(kind: str, dtype: torch.dtype) -> None:
    for width in (32, 64, 100, 128, 256, 1024, 2304, 4096, 8192):
        judge(norm_case(OPS, kind, width, layout="dense", rows=(5, 3), dtype=dtype, device="cuda"))
    for layout in ("dense", "slice", "heads"):
        judge(norm_case(OPS, kind, 128, layout=layout, rows=(2, 1000, 3), dtype=dtype, device="cuda"))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("halves", [False, True])
def test_the_product_of_a_feed_forward(halves: bool, dtype: torch.dtype) -> None:
    for width in (1, 40, 512, 1408, 9216):
        judge(swiglu_case(OPS, width, rows=(5, 301), halves=halves, dtype=dtype, device="cuda"))


def test_a_norm_rounds_as_a_cast_after_it_would() -> None:
    """But for sums in another order. More rows than one program of the second stage walks through."""
    x, weight = (torch.randn(n, 256, device="cuda").squeeze(0).requires_grad_() for n in (20000, 1))
    sent = torch.randn_like(x).bfloat16()
    narrow, wide = (rms_norm(x, weight, 1e-5, dtype=dtype, impl="triton") for dtype in (torch.bfloat16, None))
    assert narrow.dtype == torch.bfloat16
    assert (narrow != wide.bfloat16()).float().mean() < 1e-3
    assert relative_error(narrow, wide) < 2**-8
    gradients = [torch.autograd.grad(y, (x, weight), sent.to(y.dtype)) for y in (narrow, wide)]
    for a, b in zip(*gradients, strict=True):
        assert relative_error(a, b) < 1e-6


def test_a_sequence_alone_is_bitwise_the_same_as_packed() -> None:
    """Outputs, final states, and the gradients of inputs and initial states; those of the weight sum over all tokens."""
    case = conv_case(OPS, width=384, taps=4, packed=True, dtype=torch.bfloat16, device="cuda")
    packed = results(case, case.run)
    again = results(case, case.run)
    assert all(torch.equal(packed[name], again[name]) for name in packed)
    random = torch.Generator().manual_seed(1)
    dy = torch.randn(packed["output 0"].shape, generator=random).to("cuda", torch.bfloat16)
    dfinal = torch.randn(packed["output 1"].shape, generator=random).to("cuda", torch.bfloat16)
    start = 0
    for n, length in enumerate(LENGTHS):
        own = slice(start, start + length)
        start += length
        x = case.leaves["x"][:, own, :384].clone().requires_grad_()
        state = case.leaves["state"][n : n + 1].clone().requires_grad_()
        y, final = convolve(x, case.leaves["weight"], None, state, None, True)
        assert torch.equal(y, packed["output 0"][:, own])
        assert torch.equal(final[0], packed["output 1"][n])
        sent = [dy[:, own], dfinal[n : n + 1]]
        dx, dstate = torch.autograd.grad([y, final], [x, state], sent)
        assert torch.equal(dx, packed["d x"][:, own, :384])
        assert torch.equal(dstate[0], packed["d state"][n])


def test_a_row_is_bitwise_the_same_in_any_place() -> None:
    x, gate = (torch.randn(1000, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight = torch.randn(128, device="cuda")
    whole = OPS.gated_rms_norm(x, gate, weight, 1e-5, "sigmoid")
    for rows in (slice(0, 1), slice(7, 8), slice(500, 999)):
        assert torch.equal(OPS.gated_rms_norm(x[rows], gate[rows], weight, 1e-5, "sigmoid"), whole[rows])


def test_offsets_past_two_to_the_31() -> None:
    """600K tokens of 4,096 channels are 2.5e9 numbers; the last tokens equal those of their segment alone."""
    tokens, tail = 600 * 1024, 300
    x = torch.randn(1, tokens, 4096, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(4096, 4, device="cuda")
    state = x.detach()[:, -tail - 3 : -tail].mT.contiguous()
    part = x.detach()[:, -tail:].clone().requires_grad_()
    whole, alone = short_conv(x, weight, impl="triton"), short_conv(part, weight, initial_state=state, impl="triton")
    assert torch.equal(whole.output[:, -tail:], alone.output)
    assert torch.equal(whole.final_state, alone.final_state)
    dy = torch.randn_like(alone.output)
    sent = torch.zeros_like(whole.output)
    sent[:, -tail:] = dy
    dx, dpart = torch.autograd.grad(whole.output, x, sent)[0], torch.autograd.grad(alone.output, part, dy)[0]
    assert torch.equal(dx[:, -tail:], dpart)
    del whole, sent, dx
    rows, scale = x.detach().unflatten(-1, (32, 128)), torch.randn(128, device="cuda")
    y = gated_rms_norm(rows, rows, scale, 1e-5, impl="triton")[:, -tail:]
    assert torch.equal(y, gated_rms_norm(rows[:, -tail:], rows[:, -tail:], scale, 1e-5, impl="triton"))


def test_a_graph_replays_the_numbers_of_eager_mode() -> None:
    cases = [
        conv_case(OPS, width=256, taps=4, packed=True, dtype=torch.bfloat16, device="cuda"),
        norm_case(OPS, "sigmoid", 128, dtype=torch.bfloat16, device="cuda"),
    ]
    for case in cases:

        def step(case: Case = case) -> list[Tensor]:
            # Leaves of its own: autograd ties a leaf to the stream on which it was first used.
            leaves = {name: x.detach().requires_grad_() for name, x in case.leaves.items()}
            outputs = case.run(leaves)
            loss = sum(y.float().square().sum() for y in outputs)
            return [*outputs, *torch.autograd.grad(loss, list(leaves.values()))]

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for x in case.leaves.values():
            x.normal_()
        graph.replay()
        expected = step()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_auto_takes_them() -> None:
    x, weight = torch.randn(1, 40, 256, device="cuda", dtype=torch.bfloat16), torch.randn(256, 4, device="cuda")
    assert torch.equal(short_conv(x, weight).output, short_conv(x, weight, impl="triton").output)
    assert torch.equal(rms_norm(x, weight[:, 0], 1e-5), rms_norm(x, weight[:, 0], 1e-5, impl="triton"))
    wide = short_conv(x.double(), weight.double())
    assert torch.equal(wide.output, short_conv(x.double(), weight.double(), impl="torch").output)


def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, got {torch.cuda.device_count()}")
    x = torch.randn(5, 128, device="cuda:1", dtype=torch.bfloat16)
    torch.testing.assert_close(l2_normalize(x, impl="triton"), l2_normalize(x, impl="torch"))


def test_operators_keep_torchs_rules_and_compile_to_one_graph() -> None:
    """opcheck of every operator on CUDA tensors and torch.compile(fullgraph=True) of the public operations, in a process
    without our shape checks, whose wrappers the compiler cannot see through."""
    command = [sys.executable, str(HERE / "pointwise_compiled.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    verdicts = dict(line.split("\t") for line in done.stdout.splitlines())
    assert len(verdicts) == 10
    assert {name: verdict for name, verdict in verdicts.items() if verdict != "True"} == {}
