"""How long the first call of an operation takes in a fresh process with empty caches: what a user waits before anything runs.

    python -m benchmarks.ops.first_call            (on a GPU; --device cpu shows the plain torch paths)

Each operation gets a process and an empty Triton cache of its own. Starting Python, importing torch and opening the device
are not counted: the clock runs from the operation's call to its result. Right after it the same operation is called at other
lengths, of which the slowest counts: it may wait for what is still compiled beside it. When that is done, new lengths are called twice
each: a kernel compiled again for a length shows as a first call slower than the second. The run fails where a call takes longer
than 5 seconds, or a new length costs a quarter of one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks._report import RESULTS, write_report
from kimi_linear import ops
from kimi_linear.testing.decode import decode_inputs
from kimi_linear.testing.factories import kda_inputs

LIMIT = 5.0
"""Seconds that a first call may take."""
REPEATED = 0.25
"""Seconds that another length may cost at its first call: compiling one kernel again takes more."""
LENGTHS = (1000, 4100, 17, 2048)
"""Tokens: the first call's, and those right after it. Longer first, since that waits for most; short; a multiple of every block."""
LATER = (1001, 4200, 33, 2176, 9000)
"""Tokens of what is called when nothing is compiled any more."""
HEADS, DIM = 4, 128
PATIENCE = 180
"""Seconds after which a process is given up."""


def _chunk(tokens: int, device: str, *, backward: bool) -> Callable[[], object]:
    inputs = kda_inputs(
        1, tokens, HEADS, key_dim=DIM, raw=True, normalized=False, dtype=torch.bfloat16, device=device, drawn_on=device
    )
    if not backward:
        return lambda: ops.chunk_kda(*inputs.positional(), normalize_qk=True)
    leaves = inputs.with_grad()
    return lambda: ops.chunk_kda(*leaves.positional(), normalize_qk=True).output.sum().backward()


def _recurrent(tokens: int, device: str) -> Callable[[], object]:
    rows = -(-tokens // 32)  # a batch that decodes
    inputs = kda_inputs(
        rows, 1, HEADS, key_dim=DIM, raw=True, normalized=False, dtype=torch.bfloat16, device=device, drawn_on=device
    )
    return lambda: ops.recurrent_kda(*inputs.positional(), normalize_qk=True, initial_state=inputs.initial_state)


def _decode(tokens: int, device: str) -> Callable[[], object]:
    rows = -(-tokens // 32)
    return decode_inputs(rows, 1, HEADS, key_dim=DIM, dtype=torch.bfloat16, device=device).step


def _rows(tokens: int, device: str, width: int = HEADS * DIM) -> torch.Tensor:
    return torch.randn(1, tokens, width, dtype=torch.bfloat16, device=device)


def _conv(tokens: int, device: str) -> Callable[[], object]:
    x, weight = _rows(tokens, device), torch.randn(HEADS * DIM, 4, dtype=torch.bfloat16, device=device)
    return lambda: ops.short_conv(x, weight)


def _norm(tokens: int, device: str) -> Callable[[], object]:
    x, gate = (_rows(tokens, device).unflatten(-1, (HEADS, DIM)) for _ in range(2))
    weight = torch.ones(DIM, device=device)
    return lambda: ops.gated_rms_norm(x, gate, weight, 1e-5)


def _l2(tokens: int, device: str) -> Callable[[], object]:
    x = _rows(tokens, device).unflatten(-1, (HEADS, DIM))
    return lambda: ops.l2_normalize(x)


OPERATIONS: dict[str, Callable[[int, str], Callable[[], object]]] = {
    "chunk_kda": lambda tokens, device: _chunk(tokens, device, backward=False),
    "chunk_kda, backward too": lambda tokens, device: _chunk(tokens, device, backward=True),
    "recurrent_kda, one token": _recurrent,
    "kda_decode, one token": _decode,
    "short_conv": _conv,
    "gated_rms_norm": _norm,
    "l2_normalize": _l2,
}
"""By name: (tokens, device) to the call. In decoding, tokens are rows of a batch."""


def _seconds(call: Callable[[], object], device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def measure_here(name: str, device: str) -> dict[str, float]:
    """Seconds of the first call of one operation, of the slowest right after it, and what another length costs later; for a fresh
    process.
    """
    torch.mm(
        torch.ones(8, 8, device=device), torch.ones(8, 8, device=device)
    )  # opens the device and its matrix library
    first, *others = (_seconds(call, device) for call in [OPERATIONS[name](tokens, device) for tokens in LENGTHS])
    if torch.device(device).type == "cuda":
        from kimi_linear.kernels.triton.compile_ahead import wait_for_later

        wait_for_later()
    calls = [OPERATIONS[name](tokens, device) for tokens in LATER]
    later = max(_seconds(call, device) - _seconds(call, device) for call in calls)
    return {"first": first, "right after": max(others), "later": later}


def measure(name: str, device: str) -> dict[str, float]:
    """``measure_here`` in a process of its own, whose Triton cache is empty.

    Raises:
        RuntimeError: the process failed, with its last words, or took too long.
    """
    words = [sys.executable, "-m", "benchmarks.ops.first_call", "--device", device, "--inside", name]
    with tempfile.TemporaryDirectory() as cache:
        place = {"TRITON_CACHE_DIR": cache, "TORCHINDUCTOR_CACHE_DIR": cache}
        root = Path(__file__).parents[2]
        env = {**os.environ, **place}
        try:
            done = subprocess.run(words, cwd=root, env=env, capture_output=True, text=True, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"first call of {name}: no result after {PATIENCE} s") from None
    if done.returncode:
        raise RuntimeError(f"first call of {name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


COLUMNS = ("operation", "first call, s", "another length right after it, s", "a new length later costs, s", "verdict")


def row_of(name: str, found: dict[str, float]) -> list[object]:
    """A table row for ``COLUMNS``; the verdict is "ok" or what was exceeded."""
    slow = [f"{which} over {LIMIT:g} s" for which in ("first", "right after") if found[which] > LIMIT]
    slow += [f"a length over {REPEATED:g} s: compiled again?"] if found["later"] > REPEATED else []
    return [
        name,
        f"{found['first']:.2f}",
        f"{found['right after']:.2f}",
        f"{found['later']:.3f}",
        "; ".join(slow) or "ok",
    ]


def main() -> int:
    """Measure every operation, or one; write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=list(OPERATIONS), default=list(OPERATIONS), metavar="OPERATION")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the page")
    parser.add_argument("--inside", choices=list(OPERATIONS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(measure_here(arguments.inside, arguments.device)))
        return 0
    rows = []
    for name in arguments.only:
        try:
            rows.append(row_of(name, measure(name, arguments.device)))
        except RuntimeError as error:  # one that is broken must not hide the others; the page and the exit code say so
            print(error, file=sys.stderr)
            rows.append([name, *["–"] * (len(COLUMNS) - 2), "failed"])
        print(*rows[-1], sep="  ", flush=True)
    write_report(
        "first_call",
        title="The first call of each operation, with cold caches",
        about=f"A fresh process and an empty Triton cache for each operation, H = {HEADS}, K = V = {DIM}, bf16, impl=\"auto\", "
        f"{LENGTHS[0]} tokens; right after it {', '.join(map(str, LENGTHS[1:]))}, the slowest counts; when nothing is compiled any more "
        f"{', '.join(map(str, LATER))}, each twice, and the difference counts. In decoding, a sequence for every 32 tokens. "
        f"Allowed: {LIMIT:g} s for a call, and {REPEATED:g} s for a new length later.",
        columns=COLUMNS,
        rows=rows,
        device=arguments.device,
        packages=("triton",),
        folder=arguments.out,
    )  # fmt: skip
    return int(any(row[-1] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
