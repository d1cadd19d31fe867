"""Run by test_pointwise_on_a_gpu.py in a process of its own: the operators under torch's checks, and one graph of the
public operations from the compiler. Prints one line per check: its name and the verdict, tab-separated."""

import torch

from kimi_linear.ops import gated_rms_norm, l2_normalize, rms_norm, short_conv, short_conv_qkv

ops = torch.ops.kimi_linear
torch.manual_seed(0)


def made(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def show(name: str, value: object) -> None:
    print(name, value, sep="\t", flush=True)


x, weight, bias, state = made(2, 9, 96), made(96, 4), made(96), made(2, 96, 3)
cu = torch.tensor([0, 0, 5, 9], dtype=torch.int32, device="cuda")
CHECKS = {
    "short_conv": (x, weight, bias, state, None, True),
    "short_conv_qkv": (*(made(1, 9, 32) for _ in range(3)), *(made(32, 4) for _ in range(3)), None, cu, True),
    "l2_normalize": (x, 1e-6),
    "rms_norm": (x, bias, 1e-5),
    "swiglu": (x, made(2, 9, 96)),
    "gated_rms_norm": (x, made(2, 9, 96), bias, 1e-5, "swish"),
}
for name, arguments in CHECKS.items():
    verdict = torch.library.opcheck(getattr(ops, name).default, arguments, raise_exception=False)
    show(name, all(v == "SUCCESS" for v in verdict.values()) or verdict)


def layer(x: torch.Tensor, cu: torch.Tensor, taps: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    q, k, v, _ = short_conv_qkv(x, x * 2, x * 3, (taps, taps, taps), cu_seqlens=cu)
    y = short_conv(q + k, taps, cu_seqlens=cu).output
    return rms_norm(gated_rms_norm(l2_normalize(y), v, weight, 1e-5), weight, 1e-5)


compiled = torch.compile(layer, fullgraph=True, dynamic=True)
for tokens in (64, 33, 1, 200):
    cu = torch.tensor([0, tokens // 2, tokens], device="cuda")
    leaves = (made(1, tokens, 128), made(128, 4), made(128))
    outcomes = []
    for run in (layer, compiled):
        y = run(leaves[0], cu, *leaves[1:])
        outcomes.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    # The compiler keeps x * 2 and q + k in fp32 where eager mode rounds them: close, not equal.
    close = [torch.allclose(a.float(), b.float(), rtol=0.05, atol=0.02 * float(a.float().abs().max())) for a, b in zip(*outcomes, strict=True)]  # fmt: skip
    show(f"compiled T={tokens}", all(close) or close)
