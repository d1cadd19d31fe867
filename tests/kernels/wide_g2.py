"""g2.py CLASS [warm]: time T=8192."""
import sys, time, statistics, torch
from unittest.mock import patch
from kimi_linear.ops import chunk_kda, dispatch
from kimi_linear.testing.factories import kda_inputs
from kimi_linear.kernels.triton import scan, scan_backward, configs
from kimi_linear.kernels.triton.configs import Config
dispatch.why_not_triton = lambda facts: None
which, warm = sys.argv[1], len(sys.argv) > 2
H, D, dtype = (16, 256, torch.bfloat16) if which == "256" else (32, 128, torch.float32) if which == "fp32" else (32, 128, torch.bfloat16)
x = kda_inputs(1, 8192, H, key_dim=D, raw=True, normalized=False, dtype=dtype, device="cuda")
do = torch.randn_like(x.v)
def fwd(impl="triton"):
    with torch.no_grad(): return chunk_kda(*x.positional(), normalize_qk=True, impl=impl).output
g = x.with_grad()
leaves = [g.q, g.k, g.v, g.beta, g.gate.x, g.gate.A_log, g.gate.dt_bias]
def both(impl="triton"):
    return torch.autograd.grad(chunk_kda(*g.positional(), normalize_qk=True, impl=impl).output, leaves, do)
def ms(f, n=15):
    f(); f(); out = []
    flush = torch.empty(64 << 20, device="cuda", dtype=torch.int32)
    for _ in range(n):
        flush.zero_(); a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record(); f(); b.record(); torch.cuda.synchronize(); out.append(a.elapsed_time(b))
    return statistics.median(out)
t = time.time(); fwd(); torch.cuda.synchronize(); t1 = time.time() - t
t = time.time(); both(); torch.cuda.synchronize(); t2 = time.time() - t
print(f"{which} first call: forward {t1:.2f} s, with backward {t2:.2f} s", flush=True)
if not warm:
    print(f"{which} triton forward {ms(fwd):.3f} ms, forward+backward {ms(both):.3f} ms", flush=True)
    print(f"{which} torch forward {ms(lambda: fwd('torch'), 3):.1f} ms", flush=True)
    print(f"{which} torch forward+backward {ms(lambda: both('torch'), 3):.1f} ms", flush=True)
if which == "256":
    real = scan.config_of
    for name, module, cands in (("kda_scan", scan, ((256,16,4,2),(128,16,4,2),(64,16,4,2),(64,32,4,1),(128,32,4,1),(64,16,4,1))),
                          ("kda_scan_backward", scan_backward, ((256,16,4,2),(64,32,4,2),(128,32,4,2),(64,32,4,1),(128,16,4,2),(64,16,4,1)))):
        base = None
        for bk, bv, w, s in cands:
            c = Config(constants={"BK": bk, "BV": bv}, num_warps=w, num_stages=s)
            with patch.object(module, "config_of", lambda k, *a, c=c: c if k == name else real(k, *a)):
                out = both()
                if not warm:
                    base = base or out
                    from kimi_linear.testing.tolerances import relative_error
                    print(name, c, f"{ms(fwd if name == 'kda_scan' else both):.3f} ms", "largest difference", max(relative_error(a, b.double()) for a, b in zip(out, base)), flush=True)
