"""Run by test_triton.py in a process of its own: Triton's interpreter has to be asked for before kernels are imported.

Channels that forget more than one anchor serves, at chosen places of a chunk, in fp32 against the reference in fp64. Prints
one line per case: its kind and name, what prepare.py made of it (tiles times channels that are anchored, that are steep), and
the largest relative error of output, state and gradients; for a prefix, the largest difference between later gates; for small
gradients, the largest from what the same gradients give at their usual size.
"""

import math

import torch
from interpreted import problem_of

from kimi_linear.kernels.triton.chunk_kda import _laid_out, _layout_of, _prepare, backward, forward_to_train
from kimi_linear.ops import chunk_kda as public
from kimi_linear.testing.factories import KDAInputs, kda_inputs
from kimi_linear.testing.tolerances import relative_error

torch.set_num_threads(1)
LOG2E = torch.tensor(1.4426950408889634)
K = 32


def log_decay(exponent: float) -> float:
    """The fp32 number whose product with log2(e) is ``exponent`` exactly, as the kernel multiplies."""
    near = torch.tensor(exponent / float(LOG2E)).view(torch.int32) + torch.arange(-4, 5, dtype=torch.int32)
    found = [x for x in near.view(torch.float32) if x * LOG2E == exponent]
    assert found, f"no fp32 number gives {exponent}"
    return float(found[0])


def inputs_of(tokens: int) -> KDAInputs:
    """One head with quiet gates, to be overwritten in place."""
    inputs = kda_inputs(1, tokens, 1, key_dim=K, normalized=False, seed=1)
    inputs.log_decay.clamp_(min=-0.05)
    return inputs


def case(name: str, inputs: KDAInputs) -> None:
    wide = inputs.to(torch.float64).with_grad()
    exact = public(*wide.positional(), normalize_qk=True, initial_state=wide.initial_state, impl="reference")
    torch.manual_seed(0)
    d_output, d_state = torch.randn_like(exact.output), torch.randn_like(exact.final_state)
    leaves = [wide.q, wide.k, wide.v, wide.log_decay, wide.beta, wide.initial_state]
    true = torch.autograd.grad((exact.output, exact.final_state), leaves, (d_output, d_state))
    problem = problem_of(inputs)
    _, tiles = _prepare(_laid_out(problem), _layout_of(problem), save=False)
    steep, anchored = tiles.anchors > 0, tiles.anchors < 0
    assert torch.equal(tiles.flags > 0, steep.any(-1))
    output, state, saved = forward_to_train(problem)
    found = [x for x in backward(problem, saved, output, d_output.float(), d_state.float()) if x is not None]
    pairs = zip((output, state, *found), (exact.output, exact.final_state, *true), strict=True)
    print("case", name, int(anchored.sum()), int(steep.sum()), max(float(relative_error(a, b)) for a, b in pairs))


def planted(tokens: int, strong: range, steps: list[float]) -> KDAInputs:
    """Channels 0, 1, ... forget 2^steps at each strong token; the quiet ones between make pairs that matter."""
    inputs = inputs_of(tokens)
    for channel, exponent in enumerate(steps):
        inputs.log_decay[:, strong, :, channel] = exponent * math.log(2)
    return inputs


def runs(*parts: tuple[int, float]) -> KDAInputs:
    """Channel 0 forgets some steps of 2^x, then some of 2^y, in a tile in which it forgets nothing besides."""
    inputs, token = inputs_of(64), 16
    inputs.log_decay[:, 16:32, :, 0] = 0
    for steps, exponent in parts:
        inputs.log_decay[:, token : token + steps, :, 0] = log_decay(exponent)
        token += steps
    return inputs


def prefix(name: str, cut: int, tokens: int = 48) -> None:
    """Output and gradients before ``cut``, which lies inside a tile, at later gates that leave it flat and make it steep."""
    base = kda_inputs(1, tokens, 1, key_dim=K, gate="fast", normalized=False, seed=2)
    torch.manual_seed(0)
    d_output = torch.randn(1, tokens, 1, K)
    d_output[:, cut:] = 0
    runs, kinds = [], []
    for later in (-1e-3, -8.0, -99.0):
        inputs = base.to(torch.float32)
        inputs.log_decay[:, cut:] = later
        problem = problem_of(inputs)
        anchors = _prepare(_laid_out(problem), _layout_of(problem), save=False)[1].anchors[0, 0, cut // 16]
        kinds.append((int((anchors < 0).sum()), int((anchors > 0).sum())))
        output, _, saved = forward_to_train(problem)
        gradients = backward(problem, saved, output, d_output, None)
        runs.append([x[:, :cut] for x in (output, *gradients[:5])])
    errors = [[float(relative_error(a, b)) for a, b in zip(run, runs[0], strict=True)] for run in runs[1:]]
    of_output, of_gradients = max(e[0] for e in errors), max(max(e[1:]) for e in errors)
    print("prefix", name, *(n for kind in kinds for n in kind), of_output, of_gradients)


def small(name: str, inputs: KDAInputs, size: float = 2.0**-60) -> None:
    """Gradients of a loss that small, beside anchors as far away as they get."""
    problem = problem_of(inputs)
    output, _, saved = forward_to_train(problem)
    torch.manual_seed(0)
    d_output = torch.randn_like(output)
    usual, found = (backward(problem, saved, output, d_output * x, None) for x in (1.0, size))
    pairs = [(a / size, b) for a, b in zip(found, usual, strict=True) if a is not None and b is not None]
    print("small", name, max(float(relative_error(a, b)) for a, b in pairs))


if __name__ == "__main__":
    case("one-tile", planted(64, range(35, 48, 4), [-80.0, -100.0, -140.0]))
    case("partial-last-tile", planted(37, range(33, 37, 2), [-130.0, -240.0]))
    case("first-token-of-a-tile", planted(64, range(16, 17), [-130.0, -400.0]))
    # Exactly what one anchor at the start serves; exactly as deep as an anchor lies, and as far as it serves from there.
    case("exactly-the-range", runs((5, -16.0)))
    case("exactly-the-deepest", runs((5, -14.0), (5, -16.0)))
    over = runs((5, -14.0), (5, -16.0))
    over.log_decay[:, 25, :, 0] -= 1e-4
    case("just-over", over)
    small("exactly-the-range", runs((5, -16.0)))
    small("exactly-the-deepest", runs((5, -14.0), (5, -16.0)))
    prefix("early", 5)
    prefix("late", 37)
