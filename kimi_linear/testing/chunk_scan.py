"""The scan over chunks by itself: inputs as the chunk-parallel kernels make them, and its exact result with gradients.

    u' = u - erase S^T    o = read S^T + N u'    S <- S Diag(decay) + u'^T write

The kernels' own preparation is not used: factors come from the definition, pair by pair, in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.testing.factories import GateKind, kda_inputs

CHUNK = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class ScanInputs:
    """Arguments of the scan and of its reverse. Rows past a sequence's end are zeros; spare chunks at the end are NaN."""

    erase: Tensor
    """[chunks, HV, C, K]."""
    u: Tensor
    """[chunks, HV, C, V]."""
    read: Tensor
    """[chunks, HV, C, K]."""
    write: Tensor
    """[chunks, HV, C, K]."""
    pairs_q: Tensor
    """[chunks, HV, C, C]."""
    decay: Tensor
    """[chunks, HV, K] fp32."""
    initial_state: Tensor
    """[N, HV, V, K] fp32."""
    d_output: Tensor
    """[B, T, HV, V]."""
    d_final_state: Tensor
    """[N, HV, V, K] fp32."""
    cu_seqlens: Tensor | None
    """[N+1], or None."""
    cu_chunks: Tensor | None
    """[N+1] int32, or None."""
    lengths: tuple[int, ...]
    """Tokens of each sequence."""

    def tensors(self) -> dict[str, Tensor]:
        """Every floating-point tensor by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor) and "cu_" not in name}

    def stretch(self, begin: int, end: int) -> ScanInputs:
        """Some chunks of a single sequence, between states and gradients of zero."""
        parts = {name: x[begin:end] for name, x in self.tensors().items()}
        parts |= {name: torch.zeros_like(x) for name, x in self.tensors().items() if name.endswith("_state")}
        parts["d_output"] = self.d_output[:, begin * CHUNK : end * CHUNK].contiguous()
        return ScanInputs(**parts, cu_seqlens=None, cu_chunks=None, lengths=(parts["d_output"].shape[1],))

    def repeated(self, *, heads: int = 1, times: int = 1) -> ScanInputs:
        """Larger ones for timing: every head ``heads`` times, and one sequence's chunks again and again, ``times`` times."""
        if times > 1 and (len(self.lengths) != 1 or self.lengths[0] % CHUNK):
            raise ValueError(
                f"times: expected one sequence of whole chunks of {CHUNK} tokens to repeat, got lengths {self.lengths}"
            )
        grown: dict[str, Tensor] = {}
        for name, value in self.tensors().items():
            by_token, by_state = name == "d_output", name.endswith("_state")
            shape = [1] * value.ndim
            shape[2 if by_token else 1] = heads
            if not by_state:
                shape[1 if by_token else 0] = times
            grown[name] = value.repeat(shape)
        return ScanInputs(
            **grown,
            cu_seqlens=None if self.cu_seqlens is None else self.cu_seqlens * times,
            cu_chunks=None if self.cu_chunks is None else self.cu_chunks * times,
            lengths=tuple(length * times for length in self.lengths),
        )


def scan_inputs(
    lengths: list[int], heads: int, key_dim: int, value_dim: int, *, packed: bool = True, gate: GateKind = "init",
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0, spare: int = 0,
) -> ScanInputs:  # fmt: skip
    """Inputs for sequences of ``lengths`` tokens; not ``packed``: rows of a batch, which have one length.

    ``spare``: chunks more than there are, as a bound from lengths on the device has them.
    """
    assert packed or len(set(lengths)) == 1
    tokens = sum(lengths)
    drawn = kda_inputs(
        1, tokens, heads, None, key_dim, value_dim, gate=gate, lengths=lengths, dtype=torch.float64, seed=seed
    )
    columns = (drawn.q, drawn.k, drawn.v, drawn.log_decay, drawn.beta[..., None])
    sizes = [-(-length // CHUNK) for length in lengths]
    parts: list[Tensor] = []
    for column in columns:
        pieces = [
            F.pad(x, (0, 0, 0, 0, 0, size * CHUNK - len(x)))
            for x, size in zip(column[0].split(lengths), sizes, strict=True)
        ]
        parts.append(torch.cat(pieces).unflatten(0, (-1, CHUNK)).transpose(1, 2).to(device))
    factors = _factors(parts, key_dim**-0.5)
    random = torch.Generator().manual_seed(seed + 1)
    shape = (1, tokens) if packed else (len(lengths), lengths[0])
    d_output = torch.randn(*shape, heads, value_dim, generator=random)
    d_final = torch.randn(drawn.initial_state.shape, generator=random)
    made = {name: F.pad(x, (0, 0) * (x.ndim - 1) + (0, spare), value=torch.nan) for name, x in factors.items()}
    return ScanInputs(
        **{name: x.to(torch.float32 if name == "decay" else dtype).contiguous() for name, x in made.items()},
        initial_state=drawn.initial_state.float().to(device),
        d_output=d_output.to(device, dtype),
        d_final_state=d_final.to(device),
        cu_seqlens=torch.tensor([0, *lengths], device=device).cumsum(0) if packed else None,
        cu_chunks=torch.tensor([0, *sizes], device=device).cumsum(0).to(torch.int32) if packed else None,
        lengths=tuple(lengths),
    )


def patchy(weak: ScanInputs, strong: ScanInputs) -> ScanInputs:
    """A third of the chunks of ``strong``, the others of ``weak``: of some stretches all is forgotten, of others nearly nothing."""
    random = torch.Generator().manual_seed(0)
    chosen = (torch.rand(weak.erase.shape[:2], generator=random) < 1 / 3).to(weak.erase.device)
    parts = {
        name: torch.where(chosen.view(*chosen.shape, *[1] * (x.ndim - 2)), getattr(strong, name), x)
        for name, x in weak.tensors().items() if not name.endswith("_state") and name != "d_output"
    }  # fmt: skip
    return replace(weak, **parts)


def forgotten(inputs: ScanInputs) -> Tensor:
    """``forgets`` of the scan, [chunks, HV] fp32: log2 of the norm of Diag(decay) - erase^T write, above it by log2(K) / 32 at most.

    Not log2 of the largest decay: keys carry a state from channel to channel, and each may forget at another time.
    """
    steps = inputs.erase.double().mT @ inputs.write.double()
    steps = torch.diag_embed(inputs.decay.double()) - steps
    largest = steps.abs().amax((-2, -1), keepdim=True)
    power = steps / largest.clamp_min(torch.finfo(torch.float64).tiny)
    power = power @ power.mT
    for _ in range(3):  # the norm of A A^T to the eighth, by Frobenius, is above |A|^16 and at most sqrt(K) times it
        power = power @ power
    return (largest.squeeze((-2, -1)).log2() + power.norm(dim=(-2, -1)).log2() / 16).float()


def _factors(parts: list[Tensor], scale: float) -> dict[str, Tensor]:
    """What the scan reads, from q, k, v, g and beta [chunks, HV, C, ...] in fp64; one chunk at a time, for the memory."""
    q, k, v, g, beta = parts
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    made: dict[str, list[Tensor]] = {
        name: [] for name in ("erase", "u", "read", "write", "pairs_q", "decay")
    }  # fmt: skip
    for c_q, c_k, c_v, c_g, c_beta in zip(q, k, v, g, beta, strict=True):
        total = c_g.cumsum(1)
        faded = (total[:, :, None] - total[:, None]).masked_fill(~lower[..., None], -torch.inf).exp()
        keys = torch.einsum("hrk,hik,hrik->hri", c_k, c_k, faded).tril(-1)
        unit = torch.eye(CHUNK, dtype=q.dtype, device=q.device)
        solve = torch.linalg.solve_triangular(
            unit + c_beta * keys, c_beta.squeeze(-1).diag_embed(), upper=False, unitriangular=True
        )
        made["erase"].append(solve @ (c_k * total.exp()))
        made["u"].append(solve @ c_v)
        made["read"].append(scale * c_q * total.exp())
        made["write"].append(c_k * (total[:, -1:] - total).exp())
        made["pairs_q"].append(scale * torch.einsum("hrk,hik,hrik->hri", c_q, c_k, faded))
        made["decay"].append(total[:, -1].exp())
    if len(q) == 0:
        heads, key_dim, value_dim = q.shape[1], q.shape[-1], v.shape[-1]
        widths = {"erase": key_dim, "u": value_dim, "read": key_dim, "write": key_dim, "pairs_q": CHUNK}
        empty = {name: q.new_empty(0, heads, CHUNK, width) for name, width in widths.items()}
        return {**empty, "decay": q.new_empty(0, heads, key_dim)}
    return {name: torch.stack(parts) for name, parts in made.items()}


def exact_scan(inputs: ScanInputs) -> dict[str, Tensor]:
    """The scan and its gradients in fp64 by autograd, under the names that the kernels give them.

    The loss is sum(o * d_output) + sum(final_state * d_final_state). States and gradients are of the chunks that there
    are; ``ends`` [chunks, HV, V, K] is the state at each chunk's end.
    """
    wide = {name: x.double() for name, x in inputs.tensors().items()}
    initial = wide["initial_state"].requires_grad_()
    outputs: list[Tensor] = []
    finals: list[Tensor] = []
    starts: list[Tensor] = []
    ends: list[Tensor] = []
    written: list[Tensor] = []
    chunk = 0
    for n, length in enumerate(inputs.lengths):
        state, rows = initial[n], []
        for _ in range(-(-length // CHUNK)):
            starts.append(state)
            erased = wide["erase"][chunk] @ state.mT
            written.append(wide["u"][chunk] - erased)
            rows.append(wide["read"][chunk] @ state.mT + wide["pairs_q"][chunk] @ written[-1])
            state = state * wide["decay"][chunk][:, None] + written[-1].mT @ wide["write"][chunk]
            ends.append(state)
            chunk += 1
        finals.append(state)
        if rows:
            outputs.append(torch.cat(rows, dim=1)[:, :length].transpose(0, 1))
    output, final_state = torch.cat(outputs).view_as(inputs.d_output), torch.stack(finals)
    loss = (output * wide["d_output"]).sum() + (final_state * wide["d_final_state"]).sum()
    d_initial, *rest = torch.autograd.grad(loss, [initial, *ends, *written])
    results = {
        "output": output, "final_state": final_state, "states": torch.stack(starts), "ends": torch.stack(ends),
        "written": torch.stack(written), "d_initial_state": d_initial,
        "d_states": torch.stack(rest[: len(ends)]), "d_written": torch.stack(rest[len(ends) :]),
    }  # fmt: skip
    return {name: x.detach() for name, x in results.items()}
