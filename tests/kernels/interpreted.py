"""Run by test_triton.py in a process of its own: Triton's interpreter has to be asked for before kernels are imported.

Every gate and layout through the real launch code, on CPU tensors in fp32 (the interpreter's bf16 products are wrong),
against the plain-torch kernel in fp64. Prints one line per case: name, error of the output, error of the state.
"""

import torch

from kimi_linear.kernels.triton.chunk_kda import chunk_kda
from kimi_linear.ops import chunk_kda as public
from kimi_linear.testing.factories import GATE_KINDS, KDAInputs, kda_inputs
from kimi_linear.testing.tolerances import relative_error

torch.set_num_threads(1)
LAYOUTS = {
    "batch": {"batch": 2, "tokens": 100, "heads": 1, "v_heads": 2, "key_dim": 32},
    "packed": {"tokens": 100, "heads": 1, "key_dim": 32, "value_dim": 64, "lengths": [0, 20, 1, 70, 0, 9]},
}


def run(inputs: KDAInputs) -> tuple[torch.Tensor, torch.Tensor]:
    gate = inputs.gate
    parts = (gate, None, None, None)
    if not isinstance(gate, torch.Tensor):
        parts = (gate.x, gate.A_log, gate.dt_bias, getattr(gate, "lower_bound", None))
    scale = inputs.q.shape[-1] ** -0.5
    return chunk_kda(
        inputs.q, inputs.k, inputs.v, *parts, inputs.beta, scale, True, inputs.initial_state, inputs.cu_seqlens
    )


for layout, arguments in LAYOUTS.items():
    for kind in GATE_KINDS:
        for raw in (True, False):
            inputs = kda_inputs(**arguments, gate=kind, raw=raw, normalized=False)
            wide = inputs.to(torch.float64)
            exact = public(
                *wide.positional(), normalize_qk=True, initial_state=wide.initial_state, cu_seqlens=wide.cu_seqlens
            )
            output, state = run(inputs)
            print(
                f"{layout},{kind},{'raw' if raw else 'plain'}",
                relative_error(output, exact.output),
                relative_error(state, exact.final_state),
            )
