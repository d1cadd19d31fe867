"""g1.py SHARD: errors and first-call times of the new classes."""
import sys, time, torch
from kimi_linear.ops import chunk_kda, dispatch
from kimi_linear.testing.factories import GATE_KINDS, kda_inputs
from kimi_linear.testing.tolerances import relative_error
dispatch.why_not_triton = lambda facts: None
LAYOUTS = {"batch": {"batch": 2, "tokens": 256, "heads": 2, "v_heads": 4}, "odd": {"batch": 3, "tokens": 131, "heads": 1}, "packed": {"tokens": 300, "heads": 2, "lengths": [0, 70, 1, 64, 0, 165]}}
def call(x, impl="triton"):
    return chunk_kda(*x.positional(), normalize_qk=True, initial_state=x.initial_state, cu_seqlens=x.cu_seqlens, impl=impl)
def grads(x, do, ds, impl):
    w = x.with_grad(); g = w.gate
    of = {"gate": g} if isinstance(g, torch.Tensor) else {"gate": g.x, "A_log": g.A_log, "dt_bias": g.dt_bias}
    leaves = {"q": w.q, "k": w.k, "v": w.v, "beta": w.beta, **of, "h0": w.initial_state}
    r = call(w, impl)
    got = torch.autograd.grad([r.output, r.final_state], list(leaves.values()), [do.to(r.output.dtype), ds.to(r.final_state.dtype)])
    return r, dict(zip(leaves, got))
def check(name, x):
    gen = torch.Generator("cuda").manual_seed(1)
    do = torch.randn(x.v.shape, generator=gen, device="cuda").to(x.v.dtype)
    ds = torch.randn(x.initial_state.shape, generator=gen, device="cuda")
    t = time.time(); r, got = grads(x, do, ds, "triton"); torch.cuda.synchronize(); t = time.time() - t
    e, true = grads(x.to(torch.float64), do.double(), ds.double(), "torch")
    errs = {"out": relative_error(r.output, e.output), "state": relative_error(r.final_state, e.final_state)}
    errs |= {n: relative_error(got[n], true[n]) for n in got}
    _, again = grads(x, do, ds, "triton")
    same = all(torch.equal(got[n], again[n]) for n in got)
    bf = x.q.dtype == torch.bfloat16
    bad = not same or any(not (v < ((5e-3 if n in ("out", "state") else 1e-2) if bf else (1e-5 if n in ("out", "state") else 1e-4))) for n, v in errs.items())
    print("BAD" if bad else "ok ", name, f"first {t:.1f}s", "same" if same else "DIFFERENT", " ".join(f"{n}={v:.1e}" for n, v in errs.items()), flush=True)
def at_gates(tag, dim, vdim, dtype, layout, raw):
    for gate in GATE_KINDS:
        check(f"{tag} {layout} raw={int(raw)} {gate}", kda_inputs(**LAYOUTS[layout], key_dim=dim, value_dim=vdim, gate=gate, raw=raw, normalized=False, dtype=dtype, device="cuda"))
def width(K, V, dtype):
    check(f"width K={K} V={V} {dtype}", kda_inputs(1, 150, 2, key_dim=K, value_dim=V, raw=True, normalized=False, dtype=dtype, device="cuda"))
b, f = torch.bfloat16, torch.float32
jobs = []
for layout in LAYOUTS:
    for raw in (True, False):
        jobs.append(lambda layout=layout, raw=raw: at_gates("bf16-256", 256, 256, b, layout, raw))
        jobs.append(lambda layout=layout, raw=raw: at_gates("fp32-128", 128, 128, f, layout, raw))
jobs.append(lambda: [width(256, V, b) for V in (32, 64, 128)])
jobs.append(lambda: [width(K, V, f) for K, V in ((32, 32), (32, 64), (32, 128), (32, 256))])
jobs.append(lambda: [width(K, V, f) for K, V in ((64, 32), (64, 64), (64, 128), (64, 256))])
jobs.append(lambda: [width(K, V, f) for K, V in ((128, 32), (128, 64), (128, 256))])
# long, cut into segments (few heads): scans of segments
jobs.append(lambda: [check("long cut bf16-256", kda_inputs(1, 4096, 1, key_dim=256, value_dim=256, raw=True, normalized=False, dtype=b, device="cuda")),
                     check("long cut fp32-128", kda_inputs(1, 4096, 1, key_dim=128, value_dim=128, raw=True, normalized=False, dtype=f, device="cuda"))])
if __name__ == "__main__":
    try:
        jobs[int(sys.argv[1])]()
    except Exception as error:
        import traceback; traceback.print_exc(); print("BAD job", sys.argv[1], type(error).__name__, str(error)[:300], flush=True)
