"""Run by test_operators.py in a process of its own: Triton's interpreter has to be asked for before kernels are imported.

``torch.ops.kimi_linear.chunk_kda_*`` on CPU tensors in fp32: the states handed out against the reference's, then schema,
fake kernel and gradient registration of every operator by ``torch.library.opcheck``. Prints one line per check: its kind,
its name, and the largest relative error or the verdict, tab-separated.
"""

from unittest.mock import patch

import torch

from kimi_linear.ops import chunk_mamba2, linear_attention
from kimi_linear.ops.chunk_kda_operator import BACKWARD, FORWARD, STATES, TRAIN
from kimi_linear.ops.kda_states import chunk_kda_states
from kimi_linear.testing.factories import KDAInputs, kda_inputs
from kimi_linear.testing.tolerances import relative_error

torch.set_num_threads(1)
# Of 24 seeds of the steep gate below two leave its gradient so small that fp32 itself rounds off more than the test allows.
torch.manual_seed(0)
LAYOUTS = {
    "batch": ({"batch": 2, "tokens": 130, "heads": 1, "v_heads": 2}, [(1, 128), (0, 64), (1, 64)]),
    "packed": ({"tokens": 210, "heads": 1, "lengths": [0, 130, 0, 80]}, [(3, 64), (1, 128), (1, 64)]),
}


def show(kind: str, name: str, value: object) -> None:
    print(kind, name, value, sep="\t", flush=True)


def operands(inputs: KDAInputs, state: torch.Tensor | None) -> tuple[object, ...]:
    """Arguments of ``chunk_kda_forward`` for the softplus gate or a plain one."""
    gate = inputs.gate
    of_gate = (None, None) if isinstance(gate, torch.Tensor) else (gate.A_log, gate.dt_bias)
    values = gate if isinstance(gate, torch.Tensor) else gate.x
    return (inputs.q, inputs.k, inputs.v, values, inputs.beta, *of_gate, state, inputs.cu_seqlens, None, 0.2, True)


for layout, (arguments, offsets) in LAYOUTS.items():
    inputs = kda_inputs(**arguments, key_dim=32, gate="init", raw=True, normalized=False)
    wide = inputs.to(torch.float64)
    exact = chunk_kda_states(
        *wide.positional(), offsets, scale=0.2, normalize_qk=True, initial_state=wide.initial_state,
        cu_seqlens=wide.cu_seqlens, impl="reference",
    )  # fmt: skip
    # As on a GPU, where nobody has read the lengths: a state of sequence 1 past its end, whose chunk would be the first of
    # sequence 3, which is asked for as well.
    beyond = [(1, 256)] if layout == "packed" else []
    asked = offsets + beyond
    got = STATES(*operands(inputs, inputs.initial_state), [n for n, _ in asked], [offset for _, offset in asked])
    show("value", f"{layout} output", relative_error(got[0], exact.output))
    show("value", f"{layout} final state", relative_error(got[1], exact.final_state))
    show("value", f"{layout} states", relative_error(got[2][: len(offsets)], exact.states))
    if beyond:
        show("past the end", layout, bool(got[2][-1].isnan().all()))

# Mamba-2 through the same kernels, where beta is 2^-40 and values are 2^40 times as large, at a gate that forgets within a token, too.
for strength in (0.01, 20.0):
    q, k, v = (torch.randn(1, 91, 1, 32) for _ in range(3))
    gate, state = -strength * torch.rand(1, 91, 1), torch.randn(2, 1, 32, 32)
    cu = torch.tensor([0, 30, 91], dtype=torch.int32)
    outcomes = []
    for impl, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v, gate, state)]
        with patch.object(linear_attention, "_choose", return_value=impl):
            out = chunk_mamba2(*leaves[:4], normalize_qk=True, initial_state=leaves[4], cu_seqlens=cu)
        sent = [torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y) for y in out]
        outcomes.append([*out, *torch.autograd.grad(tuple(out), leaves, sent)])
    names = ("output", "state", "dq", "dk", "dv", "dgate", "dstate")
    for name, x, y in zip(names, *outcomes, strict=True):
        show("mamba2", f"{strength} {name}", relative_error(x, y))

small = {"key_dim": 32, "normalized": False}
CASES = {
    "batch": (kda_inputs(1, 64, 1, raw=True, **small), True),
    "packed": (kda_inputs(1, 66, 1, raw=False, lengths=[64, 0, 2], **small), False),
}
for layout, (inputs, has_state) in CASES.items():
    given = operands(inputs, inputs.initial_state if has_state else None)
    leaves = tuple(x.clone().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in given)
    output, state, *saved = (x.detach() for x in TRAIN(*given))
    assert torch.equal(output, FORWARD(*given)[0])
    runs = {
        "chunk_kda_forward": (FORWARD, given),
        "chunk_kda_train": (TRAIN, leaves),
        "chunk_kda_backward": (BACKWARD, (*given, saved, output, output, state if has_state else None)),
        "chunk_kda_states": (STATES, (*given, [0] * has_state, [64] * has_state)),
    }
    for name, (operator, arguments) in runs.items():
        # What a forward leaves for chunks that packed sequences do not need is not written: no two runs agree there.
        left = name == "chunk_kda_train" and layout == "packed"
        checks = ["test_schema", "test_autograd_registration", "test_faketensor"] + ["test_aot_dispatch_dynamic"] * (
            not left
        )
        verdict = torch.library.opcheck(operator, arguments, test_utils=checks, raise_exception=False)
        show("opcheck", f"{name} {layout}", all(v == "SUCCESS" for v in verdict.values()) or verdict)
