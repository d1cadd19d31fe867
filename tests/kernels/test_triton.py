"""The Triton kernels without a GPU: interpreted at small shapes, and compiled for every architecture that they serve."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="needs triton; pip install -c constraints.txt triton")

HERE = Path(__file__).parent
SHARED_LIMIT = {90: 227 * 1024, 100: 227 * 1024}
"""Shared memory that one program may use, by architecture."""


def test_interpreted_at_every_gate_and_layout() -> None:
    """fp32, where the only errors are rounding: 1e-5 leaves two digits over what is seen, at gates up to e^-766."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / "interpreted.py")], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    cases = [line.split() for line in done.stdout.splitlines()]
    assert len(cases) == 20
    for name, *errors in cases:
        assert all(float(error) < 1e-5 for error in errors), (name, errors)


def compiled(kernel, arguments: dict[str, object], arch: int, warps: int, stages: int):
    """Compile for sm_``arch``. ``arguments``: a type as a string, or a constant; PRECISION is the one constant string."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: arguments[name] if isinstance(arguments.get(name), str) else "constexpr" for name in names}
    constants = {name: value for name, value in arguments.items() if not isinstance(value, str)} | {"PRECISION": "tf32"}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name.startswith("stride")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": stages}
    )


def stack_bytes(cubin: bytes) -> int:
    """Bytes of stack per thread, which is where spilled registers go."""
    tool = next((Path(triton.__file__).parent / "backends/nvidia/bin").glob("cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return max(int(n) for n in re.findall(r"STACK:(\d+)", usage))


SIZES = [(128, 128), (64, 64), (32, 32), (128, 256)]


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize(("key_dim", "value_dim"), SIZES)
def test_compiles_without_spills(key_dim: int, value_dim: int, arch: int) -> None:
    """Every bf16 configuration: no spilled register, no more shared memory than there is."""
    import triton.language as tl

    from kimi_linear.kernels.triton.chunk_kda import launch_of
    from kimi_linear.kernels.triton.fade import fade_kernel
    from kimi_linear.kernels.triton.pairs import pairs_kernel

    launch = launch_of(key_dim, value_dim, wide=False)
    pointers = dict.fromkeys(
        ("q", "k", "v", "gate", "erase", "u", "read", "write", "pairs_q", "solve", "output"), "*bf16"
    )
    pointers |= dict.fromkeys(("beta", "A_log", "dt_bias", "norms", "decay", "initial_state", "final_state"), "*fp32")
    pointers |= {"cu_seqlens": "*i64", "cu_chunks": "*i32", "scale": "fp32", "lower_bound": "fp32"}
    pointers |= dict.fromkeys(
        ("num_sequences", "tokens", "stride_q", "stride_k", "stride_v", "stride_g", "stride_beta"), "i32"
    )
    shape = {"H": 32, "HV": 32, "K": key_dim, "V": value_dim, "PACKED": True, "DOT": tl.bfloat16, "PRECISION": "tf32"}
    shape |= {"GATE": 1, "NORMALIZE": True}
    kernels = [
        (pairs_kernel, {"BK": launch.pairs_block}, launch.pairs_warps, 1),
        (fade_kernel, {"BK": launch.fade_block, "BV": launch.fade_block}, launch.fade_warps, 1),
    ]
    for kernel, blocks, warps, stages in kernels:
        known = {**pointers, **shape, **blocks}
        # "tf32" is a constant, not a type of an argument.
        arguments = {name: known[name] for name in kernel.arg_names if name != "PRECISION"}
        result = compiled(kernel, arguments, arch, warps, stages)
        assert result.metadata.shared <= SHARED_LIMIT[arch], (kernel, result.metadata.shared)
        assert stack_bytes(result.asm["cubin"]) == 0, kernel
