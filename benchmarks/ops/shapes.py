"""The shapes that every operator benchmark is run at, what each must move and compute, and how its inputs are drawn.

    python -m benchmarks.ops.shapes            prints the registry

A shape has one name in every table. ``shapes_of`` resolves what a command line says: names, or a group of them.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from kimi_linear.testing.factories import GATE_KINDS, GateKind, KDAInputs, kda_inputs

BF16 = 2
FP32 = 4
CHUNK = 64
"""Tokens of a chunk in the operation count, whatever an implementation uses: one count for all."""
TIMED_GATES: tuple[GateKind, ...] = ("init", "fast")
"""Gates at which speed is taken. The others are checked and not timed: no model spends its time there."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One call of the operation: heads, and one sequence or several packed ones. K == V == ``dim``, bf16."""

    name: str
    heads: int
    """H, key heads."""
    lengths: tuple[int, ...]
    """Tokens of each sequence."""
    v_heads: int = 0
    """HV, value heads; H where 0."""
    dim: int = 128
    """K and V."""

    @property
    def tokens(self) -> int:
        """T, of all sequences."""
        return sum(self.lengths)

    @property
    def values(self) -> int:
        """HV."""
        return self.v_heads or self.heads

    @property
    def packed(self) -> bool:
        """Whether the call has ``cu_seqlens``."""
        return len(self.lengths) > 1

    @property
    def elements(self) -> int:
        """T * HV: what work and memory grow with."""
        return self.tokens * self.values

    @property
    def forward_bytes(self) -> int:
        """What a forward must move, whatever the algorithm: q, k, v, raw gate, beta in, output and final state out.

        Where HV == H == 1 that is 10 * 128 + 2 = 1,282 bytes a token and head, and the state.
        """
        inputs = 2 * self.heads * self.dim + self.values * (2 * self.dim + 1)
        output = self.values * self.dim
        state = len(self.lengths) * self.values * self.dim**2 * FP32
        return self.tokens * (inputs + output) * BF16 + state

    @property
    def backward_bytes(self) -> int:
        """What a backward must move besides: the inputs and the output's gradient in, the inputs' gradients out."""
        inputs = 2 * self.heads * self.dim + self.values * (2 * self.dim + 1)
        return self.tokens * (2 * inputs + self.values * self.dim) * BF16

    def bytes_of(self, mode: str) -> int:
        """The floor of "forward", or of "backward", which means forward and backward."""
        return self.forward_bytes + (self.backward_bytes if mode == "backward" else 0)

    def flops_of(self, mode: str) -> int:
        """Multiplications and additions of the chunk form with C = 64; "backward" is three times a forward.

        Per token and head: the pairs q k and k k (4 C K), the inverse (2 C^2 / 3) times k and v (2 C (K + V)), pairs times
        values (2 C V), and three products with the state (6 K V). A backward has two products for each of a forward;
        what an implementation computes again is not counted.
        """
        d = self.dim
        per_token = 10 * CHUNK * d + 6 * d * d + 2 * CHUNK**2 // 3
        return self.elements * per_token * (3 if mode == "backward" else 1)

    def attention_flops(self, mode: str) -> int:
        """Of causal softmax attention over the same sequences: 2 n^2 d forward, 2.5 times that more for a backward."""
        forward = 2 * sum(n * n for n in self.lengths) * self.dim * self.values
        return int(forward * 3.5) if mode == "backward" else forward

    def draw(self, gate: GateKind, *, device: torch.device | str, seed: int = 0) -> KDAInputs:
        """Raw bf16 inputs, not normalised, drawn on the device: on a CPU the long ones would take minutes."""
        inputs = kda_inputs(
            1, self.tokens, self.heads, self.values, self.dim, gate=gate, raw=True, normalized=False,
            lengths=self.lengths if self.packed else None, dtype=torch.bfloat16, device=device, drawn_on=device, seed=seed,
        )  # fmt: skip
        # A model's beta is the sigmoid of a bf16 projection.
        return dataclasses.replace(inputs, beta=inputs.beta.to(torch.bfloat16))


def _short(sequences: int, least: int, most: int) -> tuple[int, ...]:
    draw = random.Random(0)
    return tuple(draw.randint(least, most) for _ in range(sequences))


MIXED = (1300, 547, 2048, 963, 271, 3063)
SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="8k-h32", heads=32, lengths=(8192,)),
        Shape(name="64k-h32", heads=32, lengths=(65536,)),
        Shape(name="packed-h96", heads=96, lengths=MIXED),
        Shape(name="64k-h4", heads=4, lengths=(65536,)),
        Shape(name="64k-h16", heads=16, lengths=(65536,)),
        Shape(name="packed-h32", heads=32, lengths=MIXED),
        Shape(name="short-h32", heads=32, lengths=_short(256, 16, 256)),
        Shape(name="gva-8k-h8", heads=8, v_heads=32, lengths=(8192,)),
        Shape(name="8k-h4", heads=4, lengths=(8192,)),
        Shape(name="1m-h4", heads=4, lengths=(1 << 20,)),
        Shape(name="1m-h32", heads=32, lengths=(1 << 20,)),
        Shape(name="toy-whole", heads=2, lengths=(96,), dim=32),
        Shape(name="toy-packed", heads=2, lengths=(40, 1, 23), dim=32),
        Shape(name="toy-gva", heads=1, v_heads=2, lengths=(65,), dim=32),
    )
}
"""By name; the order is that of importance, so that a run which is cut short has the first ones."""
GROUPS = {
    "standard": tuple(name for name in SHAPES if not name.startswith(("toy", "1m-h32"))),
    "targets": ("8k-h32", "64k-h32", "packed-h96", "64k-h4"),
    "all": tuple(name for name in SHAPES if not name.startswith("toy")),
    "toy": tuple(name for name in SHAPES if name.startswith("toy")),
}
"""Names for several shapes. ``1m-h32`` holds 43 GB of inputs and outputs, so "standard" leaves it out."""


def shapes_of(names: Sequence[str]) -> list[Shape]:
    """The shapes that names and groups mean, each once, in the order given.

    Raises:
        ValueError: a name that is neither.
    """
    found: dict[str, Shape] = {}
    for name in names:
        if name not in SHAPES and name not in GROUPS:
            raise ValueError(f"shapes: expected names of {', '.join([*SHAPES, *GROUPS])}, got {name!r}")
        members = GROUPS.get(name, (name,))
        found |= {member: SHAPES[member] for member in members}
    return list(found.values())


def gates_of(names: Sequence[str]) -> list[GateKind]:
    """Gate names, checked.

    Raises:
        ValueError: an unknown one.
    """
    for name in names:
        if name not in GATE_KINDS:
            raise ValueError(f"gates: expected names of {', '.join(GATE_KINDS)}, got {name!r}")
    return [cast(GateKind, name) for name in dict.fromkeys(names)]


def main() -> None:
    """Print the registry."""
    print(
        f"{'name':12} {'T':>9} {'N':>5} {'H':>4} {'HV':>4} {'K=V':>4} {'forward MB':>11} {'+ backward MB':>14} {'GFLOP':>8}"
    )
    for s in SHAPES.values():
        moved = [s.bytes_of(mode) / 1e6 for mode in ("forward", "backward")]
        print(
            f"{s.name:12} {s.tokens:9} {len(s.lengths):5} {s.heads:4} {s.values:4} {s.dim:4} "
            f"{moved[0]:11.1f} {moved[1]:14.1f} {s.flops_of('forward') / 1e9:8.1f}"
        )
    for name, members in GROUPS.items():
        print(f"group {name}: {', '.join(members)}")


if __name__ == "__main__":
    main()
