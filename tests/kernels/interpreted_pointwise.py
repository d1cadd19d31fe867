"""Run by test_pointwise.py in a process of its own: Triton's interpreter has to be asked for before kernels are imported.

The real operators, ``torch.ops.kimi_linear.*``, on CPU tensors: values and gradients against the formulas in fp64, then
schema, fake kernel and gradient registration by ``torch.library.opcheck``, then ``torch.compile(fullgraph=True)``.
Prints one line per check: its kind, its name, and the largest relative error or the verdict, tab-separated.
"""

from unittest.mock import patch

import torch
from pointwise_cases import Case, conv_case, norm_case, qkv_case, results, swiglu_case

import kimi_linear.ops.moe
import kimi_linear.ops.norm
import kimi_linear.ops.short_conv  # noqa: F401  (registers the operators)
from kimi_linear.kernels.triton import configs
from kimi_linear.kernels.triton.column_sum import column_sum
from kimi_linear.testing.tolerances import relative_error

torch.set_num_threads(1)
ops = torch.ops.kimi_linear


def value_cases() -> list[Case]:
    convs = [
        conv_case(ops, width=40, taps=4, packed=False, bias=True),
        conv_case(ops, width=33, taps=4, packed=True),
        conv_case(ops, width=16, taps=8, packed=True, bias=True, silu=False, index=torch.int64),
        conv_case(ops, width=8, taps=2, packed=False, state=False, tokens=70),
        conv_case(ops, width=8, taps=1, packed=False, state=False, silu=False),
        conv_case(ops, width=24, taps=4, packed=False, batch=3, tokens=1),
        qkv_case(ops, widths=(16, 48, 33), packed=False, fused=False),
        qkv_case(ops, widths=(32, 32, 32), packed=True, fused=True),
    ]
    kinds = ("l2", "rms", "sigmoid", "swish")
    norms = [norm_case(ops, kind, 32, layout=layout) for kind in kinds for layout in ("dense", "slice", "heads")]
    products = [swiglu_case(ops, 40), swiglu_case(ops, 1500, rows=(2, 2)), swiglu_case(ops, 32, halves=False)]
    return convs + norms + [norm_case(ops, kind, 300, rows=(5,)) for kind in kinds] + products


def show(kind: str, name: str, value: object) -> None:
    print(kind, name, value, sep="\t", flush=True)


def small_tiles(kernel: str, arch: tuple[int, int], shape_class: str) -> configs.Config:
    """Tiles that these short sequences cross, and a row block and a number of programs that they fill."""
    if kernel.startswith("short_conv"):
        return configs.Config(constants={"BT": 16, "BD": 64, "U": 2 if "W <= 8" in shape_class else 4})
    if kernel == "column_sum":
        return configs.Config(constants={"BP": 2, "BD": 32})
    constants = {"BR": 4} | ({"PROGRAMS": 3} if kernel == "gated_rmsnorm_backward" else {})
    return configs.Config(constants=constants)


with patch.object(configs, "lookup", small_tiles):
    for case in value_cases():
        exact, got = results(case, case.formula, torch.float64), results(case, case.run)
        show("value", case.name, max(relative_error(got[name], exact[name]) for name in exact))

    # More parts than one program walks through, and a bias's row beside those of the taps.
    partial, target, last = torch.randn(29, 5, 40), torch.empty(40, 4), torch.empty(40)
    column_sum(partial, target, last)
    exact = partial.double().sum(0).T
    show("value", "column_sum", relative_error(torch.cat([target, last[:, None]], 1), exact))

x, weight, bias = torch.randn(2, 9, 24), torch.randn(24, 4), torch.randn(24)
leaves, sent = [x.clone().requires_grad_(), bias.clone().requires_grad_()], torch.randn_like(x).bfloat16()
narrow, wide = ops.rms_norm(*leaves, 1e-5, torch.bfloat16), ops.rms_norm(*leaves, 1e-5)
gradients = [torch.autograd.grad(y, leaves, sent.to(y.dtype)) for y in (narrow, wide)]
# The interpreter cuts bits off where a GPU rounds.
show("narrow", "output", narrow.dtype == torch.bfloat16 and torch.allclose(narrow.float(), wide, rtol=2**-7, atol=0))
show("narrow", "gradients", all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)))

cu, state, final = torch.tensor([0, 0, 5, 9], dtype=torch.int32), torch.randn(2, 24, 3), torch.randn(2, 24, 3)
thirds, taps = x.split(8, dim=-1), weight.split(8)
CHECKS = {
    "short_conv": (x, weight, bias, state, None, True),
    "short_conv_backward": (x, weight, bias, state, None, True, torch.randn_like(x), final),
    "short_conv_qkv": (*thirds, *taps, None, None, True),
    "short_conv_qkv_backward": (*thirds, *taps, state, None, True, *thirds, None),
    "l2_normalize": (x, 1e-6),
    "l2_normalize_backward": (x, x, 1e-6),
    "rms_norm": (x, bias, 1e-5),
    "rms_norm_backward": (x, bias, x.bfloat16(), 1e-5, True),
    "gated_rms_norm": (x, x + 1, bias, 1e-5, "swish"),
    "swiglu": (x, x + 1),
    "swiglu_backward": (x, x + 1, x),
    "gated_rms_norm_backward": (x, x, bias, x, 1e-5, "sigmoid", False),
}
for name, arguments in CHECKS.items():
    wanted = not name.endswith("_backward")
    leaves = tuple(a.clone().requires_grad_(wanted) if isinstance(a, torch.Tensor) else a for a in arguments)
    verdict = torch.library.opcheck(getattr(ops, name).default, leaves, raise_exception=False)
    show("opcheck", name, all(v == "SUCCESS" for v in verdict.values()) or verdict)
cast = (x.clone().requires_grad_(), bias.clone().requires_grad_(), 1e-5, torch.bfloat16)
show("opcheck", "rms_norm cast", set(torch.library.opcheck(ops.rms_norm.default, cast).values()) == {"SUCCESS"})
packed = (x[:1].clone().requires_grad_(), weight.clone().requires_grad_(), None, None, cu, True)
show("opcheck", "short_conv packed", set(torch.library.opcheck(ops.short_conv.default, packed).values()) == {"SUCCESS"})


def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    y, _ = ops.short_conv(x, weight, None, None, None, True)
    return ops.gated_rms_norm(ops.l2_normalize(y, 1e-6), x, bias, 1e-5, "sigmoid")


compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
for tokens in (9, 5, 1):
    outcomes = []
    for run in (layer, compiled):
        leaves = [t.clone().requires_grad_() for t in (x[:, :tokens], weight, bias)]
        y = run(*leaves)
        outcomes.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    show("compile", f"T={tokens}", all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True)))

leaf = x.clone().requires_grad_()
(once,) = torch.autograd.grad(ops.l2_normalize(leaf, 1e-6).sum(), leaf, create_graph=True)
try:
    once.sum().backward()
    show("twice", "l2_normalize", "gave a second derivative")
except RuntimeError as error:
    show("twice", "l2_normalize", error)
