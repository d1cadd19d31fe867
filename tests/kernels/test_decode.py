"""The step kernels without a GPU: interpreted at small shapes, and compiled for every architecture that they serve."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .launches import resources

triton = pytest.importorskip("triton", reason="needs triton; pip install -c constraints.txt triton")

HERE = Path(__file__).parent
STATIC_SHARED = 48 * 1024


def test_interpreted_at_every_gate_and_layout() -> None:
    """fp32, where the only errors are rounding: 1e-5 leaves a digit over what is seen. Windows are copied, so exact."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / "interpreted_decode.py")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    cases = [line.split() for line in done.stdout.splitlines()]
    assert len(cases) == 41
    for name, output, state, rest in cases:
        assert float(output) < 1e-5, name
        assert float(state) < 1e-5, name
        assert float(rest) == 0, name


def compiled(kernel, types: dict[str, str], constants: dict[str, object], arch: int, options: dict[str, int]):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    given = {name: constants.get(name) for name in names if name not in types}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "")[:1] == "*"}
    return triton.compile(
        ASTSource(kernel, signature, given, aligned), target=GPUTarget("cuda", arch, 32), options=options
    )


def compiled_step(width: int, tokens: int, arch: int, count: str = "many heads", heads: int = 32, **overrides):
    """The kernel as the released model's layers launch it, with per-token states where there are several tokens."""
    from kimi_linear.kernels.triton.configs import lookup
    from kimi_linear.kernels.triton.decode import PASSES, decode_kernel, head_kernel, options_of

    count = "more tokens" if tokens > 1 else f"one token, {count}"
    config = lookup("kda_decode", (arch // 10, arch % 10), f"K = {width}, {count}")
    types = dict.fromkeys(("q", "k", "v", "gate", "beta", "out_gate", "weight", "window", "output"), "*bf16")
    types |= dict.fromkeys(("taps_q", "taps_k", "taps_v"), "*bf16")
    types |= dict.fromkeys(("A_log", "dt_bias", "memory", "scratch"), "*fp32")
    types |= dict.fromkeys(("slots", "keep"), "*i32") | {"last_slot": "i32"}
    row = heads * width
    constants = {"H": heads, "HV": heads, "K": width, "V": width, "BV": min(width, config["BV"]), "W": 4, "S": tokens}
    constants |= {"GATE": 1, "LOWER_BOUND": 0.0, "SCALE": width**-0.5, "EPS": 1e-5, "ACTIVATION": 1, "HAS_SLOTS": True}
    several = min(width, config["BV"]) < width
    end = 0 if not several else 1 if count == "one token, few heads" else 2
    if tokens == 1 and "PASS" in config.constants:
        end, constants["BV"] = PASSES.value, min(width, config["PASS"])
    end = overrides.get("END", end)
    types["tickets"] = "*i64" if end == 1 else "*i32"
    constants |= {"END": end, "AHEAD": config.constants.get("AHEAD", 0)}
    constants["ROWS"] = min(constants["BV"], 4 * config.num_warps)
    constants["BULK"] = config.constants.get("BULK", 0)
    constants |= {"HAS_KEEP": tokens > 1, "PDL": config["PDL"], "MEMORY_SLOT": row * width, "WINDOW_SLOT": 9 * row}
    for name, size in (("Q", row), ("K", row), ("V", row), ("G", row), ("BETA", heads), ("OG", row)):
        constants |= {f"{name}_B": tokens * size, f"{name}_S": size if tokens > 1 else 0}
    constants |= overrides
    kernel = head_kernel if end == PASSES.value else decode_kernel
    return compiled(kernel, types, constants, arch, options_of(config, constants["END"]))


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("width", [32, 64, 128, 256])
def test_a_step_compiles_without_spills(width: int, tokens: int, arch: int) -> None:
    for count in ("few heads", "many heads") if tokens == 1 and width in (32, 128) else ("many heads",):
        result = compiled_step(width, tokens, arch, count)
        assert result.metadata.shared <= STATIC_SHARED
        assert resources(result.asm["cubin"])[1] == 0


def sums(ttgir: str) -> list[tuple[int, int, str]]:
    """(axis, its size, how threads lie) of every sum but those of two terms, which have one result in either order.

    How threads lie: as Triton prints it, without the warps, which share rows, and the number of rows that a thread has.
    """
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.\w+<\{(.*)\}>$", ttgir, re.MULTILINE))
    found = []
    for reduce in re.finditer(
        r'"tt\.reduce"\(.*?<\{axis = (\d).*?\}\) : \(tensor<([\dx]+)xf32, (.*?)>(?:, tensor|\) ->)', ttgir, re.S
    ):
        axis, shape, layout = int(reduce[1]), [int(n) for n in reduce[2].split("x")], reduce[3]
        (name,) = set(re.findall(r"#\w+(?=[,}>]|$)", layout.replace("#ttg.slice", "")))
        lie = re.sub(r"(warpsPerCTA|warp|register) = \[.*?\](?:, (?=[a-z])|$)", "", layouts[name])
        if shape[axis] != 2 and axis > 0:
            found.append((axis, shape[axis], lie))
    return found


@pytest.mark.parametrize("width", [32, 64, 128, 256])
def test_rounding_depends_neither_on_the_number_of_tokens_nor_of_heads(width: int) -> None:
    """Builds for other S chose other products to fuse into sums; entries of the table cut a head otherwise.

    So every operation that could be fused carries its rounding. A sum over V is a tree of pairs, and one over K stays in a
    row, whose terms lie in the same threads of one warp however many rows and warps there are.
    """
    orders = []
    for tokens, count in ((1, "few heads"), (1, "many heads"), (2, ""), (5, "")):
        asm = compiled_step(width, tokens, 90, count).asm
        assert re.findall(r"\b(?:mul|add|sub)(?:\.ftz)?\.f32\b", asm["ptx"]) == []
        orders.append(sums(asm["ttgir"]))
    axes = 1 if width == 64 else 2  # of the state and of what goes beside it; two halves are a pair
    assert len(orders[0]) == axes + 1, orders[0]  # and q and k, whose rows are all the same
    for order in orders:  # a head in passes sums in each of them
        assert order == orders[0] * (len(order) // len(orders[0]))


def test_nothing_is_read_before_the_kernel_before_has_ended() -> None:
    """From sm_90 on a step may be launched early; what stands before the wait could be read before it is written.

    But for the slot, which is a guess until it is read again: what is brought into the L2 for it is not read before either.
    """
    for count in ("few heads", "many heads"):
        ptx = compiled_step(128, 1, 90, count).asm["ptx"]
        before, after = ptx.split("griddepcontrol.wait")
        assert [line for line in before.splitlines() if re.search(r"\bld\.global", line)] == re.findall(
            r"^.*ld\.global\.cg\.b32.*$", before, re.MULTILINE
        )
        assert len(re.findall(r"\bld\.global", before)) == 1
        assert "st.global" not in before
        assert "prefetch" in before
        assert after.index("ld.global") > 0
        assert "griddepcontrol.launch_dependents" in after
    assert "griddepcontrol" not in compiled_step(128, 1, 80).asm["ptx"]


def test_rows_of_a_pass_are_stored_in_bulk() -> None:
    """Threads put four neighbours into shared memory at a time, so these have to lie in one thread, one after the other."""
    asm = compiled_step(128, 1, 90).asm
    assert len(re.findall(r"cp\.async\.bulk\.global\.shared::cta\.bulk_group \[", asm["ptx"])) == 4
    assert "st.global.v4" not in asm["ptx"]
    put = re.search(r"elementwise_inline_asm \"st\.shared\.v4.*xf32, (#\w+)>", asm["ttgir"])
    assert put is not None
    layout = re.search(
        rf"^{put[1]} = #ttg\.blocked<{{sizePerThread = \[1, 1, (\d+)\].*order = \[2,", asm["ttgir"], re.M
    )
    assert layout is not None
    assert int(layout[1]) % 4 == 0
    room = re.search(r"\.b8 room\[(\d+)\]", asm["ptx"])
    assert room is not None
    assert compiled_step(128, 1, 90).metadata.shared + int(room[1]) <= STATIC_SHARED
    for arch in (80, 90):
        assert "cp.async.bulk.global" not in compiled_step(128, 1, arch, BULK=0).asm["ptx"]


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("width", [32, 128, 256])
def test_the_recurrent_kernel_compiles_without_spills(width: int, arch: int) -> None:
    from kimi_linear.kernels.triton.recurrent_kda import TILE, recurrent_kernel

    types = dict.fromkeys(("q", "k", "v", "gate", "output"), "*bf16") | {"slots": "*i32", "cu_seqlens": "*i64"}
    types |= dict.fromkeys(("beta", "A_log", "dt_bias", "initial_state", "final_state"), "*fp32")
    types |= {"scale": "fp32", "lower_bound": "fp32", "tokens": "i32"}
    types |= {f"{name}_{axis}": "i32" for name in ("q", "k", "v", "g", "beta") for axis in "bt"}
    constants = {"H": 4, "HV": 8, "K": width, "V": width, "BV": min(width, TILE // width), "GATE": 1, "NORMALIZE": True}
    constants |= {"PACKED": True, "HAS_STATE": False, "HAS_SLOTS": True, "SLOT": 8 * width * width}
    result = compiled(recurrent_kernel, types, constants, arch, {"num_warps": 1, "num_stages": 1})
    assert result.metadata.shared <= STATIC_SHARED
    assert resources(result.asm["cubin"])[1] == 0
