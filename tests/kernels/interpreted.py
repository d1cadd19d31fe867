"""Run by test_triton.py in a process of its own: Triton's interpreter has to be asked for before kernels are imported.

Every gate and layout through the real launch code, on CPU tensors in fp32 (the interpreter's bf16 products are wrong),
against the plain-torch kernel in fp64. Prints one line per case: name, then the relative errors of the output, of the state
and of every gradient. Those of A_log and dt_bias are sums over tokens and channels whose terms cancel: their errors are relative
to the sum of the terms' magnitudes.
"""

import torch

from kimi_linear.kernels.triton.chunk_kda import Problem, backward, forward_to_train
from kimi_linear.ops import chunk_kda as public
from kimi_linear.testing.factories import GATE_KINDS, KDAInputs, kda_inputs
from kimi_linear.testing.gradients import sizes_of_sums
from kimi_linear.testing.tolerances import relative_error

torch.set_num_threads(1)
torch.manual_seed(0)
LAYOUTS = {
    "batch": {"batch": 2, "tokens": 40, "heads": 1, "v_heads": 2, "key_dim": 32},
    "packed": {"tokens": 91, "heads": 1, "key_dim": 32, "value_dim": 64, "lengths": [0, 20, 0, 70, 1]},
}


def problem_of(inputs: KDAInputs) -> Problem:
    gate = inputs.gate
    plain = isinstance(gate, torch.Tensor)
    return Problem(
        q=inputs.q,
        k=inputs.k,
        v=inputs.v,
        gate=gate if plain else gate.x,
        beta=inputs.beta,
        A_log=None if plain else gate.A_log,
        dt_bias=None if plain else gate.dt_bias,
        lower_bound=None if plain else getattr(gate, "lower_bound", None),
        scale=inputs.q.shape[-1] ** -0.5,
        normalize=True,
        initial_state=inputs.initial_state,
        cu_seqlens=inputs.cu_seqlens,
    )


def leaves(inputs: KDAInputs) -> list[torch.Tensor]:
    gate = inputs.gate
    parts = [gate] if isinstance(gate, torch.Tensor) else [gate.x, gate.A_log, gate.dt_bias]
    return [inputs.q, inputs.k, inputs.v, parts[0], inputs.beta, *parts[1:], inputs.initial_state]


def main() -> None:
    for layout, arguments in LAYOUTS.items():
        for kind in GATE_KINDS:
            for raw in (True, False):
                inputs = kda_inputs(**arguments, gate=kind, raw=raw, normalized=False)
                wide = inputs.to(torch.float64)
                wanted = [x.requires_grad_() for x in leaves(wide)]
                exact = public(
                    wide.q, wide.k, wide.v, wide.gate, wide.beta, normalize_qk=True, initial_state=wide.initial_state,
                    cu_seqlens=wide.cu_seqlens, impl="torch",
                )  # fmt: skip
                d_output, d_state = torch.randn_like(exact.output), torch.randn_like(exact.final_state)
                weights = (d_output, d_state)
                true = torch.autograd.grad((exact.output, exact.final_state), wanted, weights)
                sizes = list(true)
                if raw:
                    sizes[5:7] = sizes_of_sums(wide, true[3])
                problem = problem_of(inputs)
                output, state, saved = forward_to_train(problem)
                gradients = backward(problem, saved, output, d_output.float(), d_state.float())
                found = [x for x in gradients if x is not None]
                errors = [relative_error(output, exact.output), relative_error(state, exact.final_state)]
                errors += [(a - b).norm() / size.norm() for a, b, size in zip(found, true, sizes, strict=True)]
                print(f"{layout},{kind},{'raw' if raw else 'plain'}", *(f"{float(e):.3g}" for e in errors))


if __name__ == "__main__":
    main()
