"""Accuracy by token and by sequence counts what it says."""

import pytest
import torch
import torch.nn.functional as F

from kimi_linear.data import Batch
from kimi_linear.evals.synthetic import TaskAccuracy, accuracy, measure

N = -100


def test_counts_by_token_and_by_sequence():
    targets = torch.tensor([[N, 1, 2], [N, 3, 0], [N, N, N], [1, N, N]])
    answers = torch.tensor([[0, 1, 2], [0, 3, 1], [0, 0, 0], [0, 0, 0]])
    counts = accuracy(F.one_hot(answers, 4).float(), targets)
    # Row 0 is all right, row 1 half, row 2 has nothing to answer, row 3 is wrong.
    assert (counts.right, counts.scored, counts.exact, counts.sequences) == (3, 5, 1, 3)
    assert counts.by_token == pytest.approx(3 / 5)
    assert counts.by_sequence == pytest.approx(1 / 3)


class Copy:
    """Tokens are drawn below 8, and the target of each place is its own token."""

    name, vocab_size, sequence_length = "copy", 8, 4

    def batch(self, generator: torch.Generator, batch_size: int) -> Batch:
        tokens = torch.randint(8, (batch_size, 4), generator=generator)
        return Batch(tokens=tokens, targets=tokens.clone(), cu_seqlens=None)


def test_a_perfect_model_scores_one_and_every_run_sees_the_same_sequences():
    seen: list[torch.Tensor] = []

    def echo(tokens, *, cu_seqlens=None):
        seen.append(tokens)
        return F.one_hot(tokens, 8).float()

    run = TaskAccuracy(task=Copy(), samples=10, batch_size=4)
    result = run(echo)
    assert result.metrics == {"token_accuracy": 1.0, "sequence_accuracy": 1.0, "sequences": 10.0}
    assert [len(t) for t in seen] == [4, 4, 2]
    first = torch.cat(seen)
    seen.clear()
    run(echo)
    assert torch.equal(torch.cat(seen), first)


def test_a_half_right_model_scores_half():
    def even(tokens, *, cu_seqlens=None):
        return F.one_hot(tokens // 2 * 2, 8).float()

    metrics = TaskAccuracy(task=Copy(), samples=2000, batch_size=500)(even).metrics
    assert metrics["token_accuracy"] == pytest.approx(0.5, abs=0.03)
    assert metrics["sequence_accuracy"] == pytest.approx(1 / 16, abs=0.03)


def test_packed_batches_are_refused():
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    packed = Batch(tokens=tokens, targets=tokens, cu_seqlens=torch.tensor([0, 2, 4]))
    with pytest.raises(ValueError, match="one sequence per row"):
        measure(lambda tokens, cu_seqlens=None: torch.zeros(1, 4, 8), [packed])
