"""Our KDA behind fla's ``chunk_kda`` on a GPU, against fla's own kernels in the same process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kimi_linear.integrations import fla as integration
from kimi_linear.integrations import transformers as host

pytestmark = [
    pytest.mark.gpu,
    # fla and Triton warn of each other; our own warnings are errors as everywhere.
    pytest.mark.filterwarnings("default", "error:::kimi_linear"),
    # Triton's autotuner times kernels on memory of its own.
    pytest.mark.unpoisoned,
]


@pytest.fixture
def chunk_kda() -> Iterator[Any]:
    """fla's operation; the registration is undone afterwards."""
    operation = pytest.importorskip("fla.ops.kda", reason="needs fla-core >= 0.6 beside a GPU").chunk_kda
    yield operation
    integration.unregister()


def call(tokens: int, **changes: Any) -> dict[str, Any]:
    """A call as fla's layer makes it: raw gate, beta as a logit, norm in the kernel."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    wide = {"dtype": torch.float32}
    return {
        "q": draw(1, tokens, 4, 128), "k": draw(1, tokens, 4, 128), "v": draw(1, tokens, 4, 128),
        "g": draw(1, tokens, 4, 128), "beta": draw(1, tokens, 4), "A_log": draw(4, **wide).abs(),
        "dt_bias": draw(512, **wide) - 4, "initial_state": draw(1, 4, 128, 128, **wide),
        "use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True,
        "output_final_state": True, **changes,
    }  # fmt: skip


CALLS = {
    "softplus": {},
    "bounded": {"safe_gate": True, "lower_bound": -5.0},
    "value-major state": {"state_v_first": True},
    "beta up to 2": {"allow_neg_eigval": True},
}


@pytest.mark.parametrize("changes", CALLS.values(), ids=CALLS)
@torch.no_grad()
def test_our_kernels_agree_with_flas(chunk_kda: Any, changes: dict[str, Any]) -> None:
    """Both against fp64: ours is at most twice as far as fla's, or within a bf16 rounding of the largest output."""
    arguments = call(1000, **changes)
    theirs = chunk_kda(**arguments)
    integration.register(impl="triton")
    ours = chunk_kda(**arguments)
    exact = integration.translate(
        {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    ).run("reference")
    for mine, other, expected in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == other.dtype
        assert mine.shape == other.shape
        error, limit = ((x.double() - expected).abs().max() for x in (mine, other))
        print(f"error {error:.2e}, fla {limit:.2e}, size {expected.abs().max():.2e}")
        assert error <= torch.maximum(2 * limit, expected.abs().max() * 2**-8)
    assert not torch.equal(ours[0], theirs[0]), "fla's own kernels ran both times"


@torch.no_grad()
def test_packed_sequences(chunk_kda: Any) -> None:
    bounds = torch.tensor([0, 3, 200, 201, 1000], device="cuda")
    state = torch.randn(4, 4, 128, 128, device="cuda")
    arguments = call(1000, cu_seqlens=bounds, initial_state=state)
    theirs = chunk_kda(**arguments)
    integration.register(impl="triton")
    for mine, other in zip(chunk_kda(**arguments), theirs, strict=True):
        assert (mine.float() - other.float()).abs().max() <= 0.02 * other.float().abs().max()


def test_auto_takes_what_a_kernel_of_ours_computes(chunk_kda: Any) -> None:
    """Otherwise fla's kernels run, which have a backward whatever ours have."""
    integration.register()
    arguments = call(300)
    with torch.no_grad():
        assert integration.why_not(arguments, "auto") is None
    arguments["q"].requires_grad_()
    chunk_kda(**arguments)[0].float().square().sum().backward()
    assert bool(arguments["q"].grad.isfinite().all())
    assert bool(arguments["q"].grad.any())


@torch.no_grad()
def test_transformers_on_a_gpu_with_our_kernels(tmp_path: Any) -> None:
    """A bf16 model with heads of 32, prefill in Triton, then cached decoding: as close to fp32 as transformers' own."""
    pytest.importorskip("transformers", reason="needs transformers >= 5.17 beside a GPU")
    from .tiny import from_pretrained, saved, tiny_model, tokens

    folder = saved(tiny_model(linear={"head_dim": 32}), tmp_path / "m")
    ids = tokens(2, 300).cuda()
    # Where fla is installed transformers calls its kernels on a CPU, too, where they do not run.
    host.patch(impl="reference")
    exact = from_pretrained(folder)(ids.cpu()).logits
    host.unpatch()
    native = from_pretrained(folder, dtype=torch.bfloat16).cuda()
    expected = (native(ids, use_cache=False).logits.cpu().float() - exact).abs().median()
    host.patch(impl="auto")
    model = from_pretrained(folder, dtype=torch.bfloat16).cuda()
    result = model(ids[:, :280], use_cache=True)
    pieces, cache = [result.logits], result.past_key_values
    for i in range(280, 300):
        result = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        pieces, cache = [*pieces, result.logits], result.past_key_values
    error = (torch.cat(pieces, dim=1).cpu().float() - exact).abs().median()
    print(f"median error {error:.4f}, transformers {expected:.4f}")
    assert error <= 2 * expected
