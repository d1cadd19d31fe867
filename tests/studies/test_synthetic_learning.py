"""What the delta rule is for, at toy size: KDA learns each synthetic task, the same layer that only adds does not in those steps.

Stacks whose only element is popped and pushed anew are where the rule is needed: a sum still holds what was popped. Recall and palindrome
are learned sooner with it at these seeds and sizes, but a sum can hold as much there: more steps, another seed or another width
let it catch up or be the sooner one (docs/LOG.md). These two guard the training, and prove nothing about the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kimi_linear.data import MQAR, Palindrome, Stack
from kimi_linear.model.kda import KDA
from kimi_linear.ops import KDAOutput, l2_normalize
from kimi_linear.studies import synthetic
from kimi_linear.studies.synthetic import Cell, SyntheticConfig
from kimi_linear.studies.synthetic_training import Lane, Point


class OnlyAdds(KDA):
    """KDA without its correction, S = Diag(exp(g)) S + beta k v^T, in its parallel form."""

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, *, initial_state, cu_seqlens, recurrent) -> KDAOutput:
        q, k = l2_normalize(q), l2_normalize(k)
        total = self.gate(x).log_decay().cumsum(1)
        lower = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()[:, :, None, None]
        decay = (total[:, :, None] - total[:, None]).masked_fill(~lower, -torch.inf).exp()
        pairs = torch.einsum("brhk,brihk,bihk->brih", q, decay, k) * q.shape[-1] ** -0.5
        return KDAOutput(torch.einsum("brih,bih,bihv->brhv", pairs, self.beta(x), v), v.new_zeros(()))


@dataclass(frozen=True)
class Toy:
    task: Palindrome | MQAR | Stack
    layers: int
    head_dim: int
    init_std: float
    dt_shift: float
    steps: int
    seed: int
    learned: float
    """Share of answers that KDA gives rightly in the last point, at least."""
    unlearned: float
    """The same of the sum, at most."""


TOYS = [
    Toy(Stack(num_stacks=4, operations=32, vocab=16, pop_probability=1.0), 1, 8, 0.05, -3.0, 90, 1, 0.99, 0.75),
    Toy(MQAR(num_pairs=8, num_queries=8, vocab=64), 1, 12, 0.05, 0.0, 280, 2, 0.75, 0.3),
    Toy(Palindrome(length=8, vocab=8, distinct=True), 2, 6, 0.1, -3.0, 200, 0, 0.9, 0.7),
]


def lane_of(toy: Toy, *, adds: bool = False) -> Lane:
    config = SyntheticConfig(
        layers=toy.layers, width=64, heads=1, head_dim=toy.head_dim, feed_forward=64, batch_size=32, warmup=10,
        init_std=toy.init_std, dt_shift=toy.dt_shift, steps=toy.steps, point_every=20, schedule="constant", precision="fp32",
    )  # fmt: skip
    cell = Cell(task=toy.task.name, length=toy.task.sequence_length, mixer="kda", lr=1e-2, seed=toy.seed)
    plan = synthetic.lane_of(config, cell)
    plan = replace(plan, task=toy.task, model=replace(plan.model, vocab_size=toy.task.vocab_size))
    lane = Lane(plan, torch.device("cpu"))
    for block in lane.model.blocks if adds else ():
        block.self_attn.__class__ = OnlyAdds
    return lane


def train(lane: Lane) -> Point:
    while lane.advance():
        lane.poll()
    lane.poll(wait=True)
    return lane.curve.points[-1]


def test_without_its_correction_the_layer_is_the_same_for_one_token() -> None:
    """An empty memory has nothing to correct; from the second token on the two differ."""
    kda, adds = (lane_of(TOYS[0], adds=adds).model for adds in (False, True))
    tokens = torch.tensor([[3, 3, 5]])
    torch.testing.assert_close(kda(tokens)[:, :1], adds(tokens)[:, :1], rtol=1e-5, atol=1e-6)
    assert (kda(tokens)[:, 1:] - adds(tokens)[:, 1:]).abs().max() > 1e-4


@pytest.mark.parametrize("toy", TOYS, ids=lambda toy: toy.task.name)
def test_kda_learns_and_the_sum_does_not(toy: Toy) -> None:
    kda, adds = train(lane_of(toy)), train(lane_of(toy, adds=True))
    print(f"{toy.task.name}: kda {kda.token_accuracy:.3f}, without delta rule {adds.token_accuracy:.3f}")
    assert kda.token_accuracy >= toy.learned
    assert adds.token_accuracy <= toy.unlearned
