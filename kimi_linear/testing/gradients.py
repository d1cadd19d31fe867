"""One call, forward and backward: every result of an operation by name, so that two implementations compare in a loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.ops import BoundedGate
from kimi_linear.testing.factories import KDAInputs


def results(
    run: Callable[[KDAInputs], tuple[Tensor, Tensor]], inputs: KDAInputs, *, seed: int = 0
) -> dict[str, Tensor]:
    """Outputs and input gradients of ``run(inputs)``.

    Args:
        run: gives (output, final_state), for instance ``lambda i: chunk_kda(*i.positional())``.
        inputs: where to differentiate.
        seed: of the random gradients of output and final_state that are sent back.

    Returns:
        "output", "final_state" and "d <leaf>" for every name in ``inputs.leaves()``; the gradient of an input that
        ``run`` does not use is zero.
    """
    leaves = inputs.with_grad()
    output, state = run(leaves)
    random = torch.Generator().manual_seed(seed)
    sent = [torch.randn(x.shape, generator=random, dtype=torch.float64).to(x.device, x.dtype) for x in (output, state)]
    named = leaves.leaves()
    gradients = torch.autograd.grad(
        [output, state], list(named.values()), sent, allow_unused=True, materialize_grads=True
    )
    back = {f"d {name}": gradient for name, gradient in zip(named, gradients, strict=True)}
    return {"output": output.detach(), "final_state": state.detach()} | back


def sizes_of_sums(inputs: KDAInputs, d_x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the magnitudes of the terms that the gradients of A_log [HV] and dt_bias [HV, K] add up, which may cancel.

    An error is to be judged by these where the sum itself is small. ``d_x`` [B, T, HV, K]: the gradient of the raw gate's x.
    """
    gate = inputs.gate
    assert not isinstance(gate, Tensor)
    z = gate.x + gate.dt_bias
    of_A = d_x * (z if isinstance(gate, BoundedGate) else F.softplus(z) / z.sigmoid())
    return of_A.abs().sum((0, 1, 3)).view_as(gate.A_log), d_x.abs().sum((0, 1)).view_as(gate.dt_bias)
