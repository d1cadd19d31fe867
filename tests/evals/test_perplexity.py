"""Perplexity equals what one computes by hand, in all and by position."""

import math

import pytest
import torch

from kimi_linear.data import Batch
from kimi_linear.evals.perplexity import Perplexity, bucket_name, bucket_of, positions

VOCAB = 4


def uniform(tokens, *, cu_seqlens=None):
    return torch.zeros(*tokens.shape, VOCAB)


def batch(targets: list[list[int]], cu_seqlens: list[int] | None = None) -> Batch:
    t = torch.tensor(targets)
    return Batch(
        tokens=torch.zeros_like(t),
        targets=t,
        cu_seqlens=None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32),
    )


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    result = Perplexity(batches=lambda: [batch([[0, 1, 2, 3, -100]])], bytes_per_token=2.0)(uniform)
    assert result.metrics["tokens"] == 4
    assert result.metrics["loss"] == pytest.approx(math.log(4))
    assert result.metrics["perplexity"] == pytest.approx(4)
    assert result.metrics["bits_per_byte"] == pytest.approx(1.0)


def test_positions_are_scored_apart_and_add_up():
    def better_later(tokens, *, cu_seqlens=None):
        logits = torch.zeros(*tokens.shape, VOCAB)
        logits[:, :, 0] = torch.arange(tokens.shape[1], dtype=torch.float32)
        return logits

    def nll(place: int) -> float:
        return math.log(math.exp(place) + 3) - place

    two = [batch([[0, -100, 0, 0, 0]]), batch([[0, 0, 0, 0, 0]])]
    result = Perplexity(batches=lambda: two)(better_later)
    rows = {row["position"]: row for row in result.rows}
    assert {name: row["tokens"] for name, row in rows.items()} == {"1": 2, "2": 1, "3-4": 4, "5-8": 2}
    assert rows["2"]["loss"] == pytest.approx(nll(1), rel=1e-6)
    assert rows["3-4"]["loss"] == pytest.approx((nll(2) + nll(3)) / 2, rel=1e-6)
    assert rows["5-8"]["perplexity"] == pytest.approx(math.exp(nll(4)), rel=1e-6)
    whole = sum(row["loss"] * row["tokens"] for row in result.rows) / 9
    assert result.metrics["loss"] == pytest.approx(whole)
    assert "bits_per_byte" not in result.metrics


def test_positions_begin_again_at_every_packed_document():
    tokens = torch.zeros(1, 7, dtype=torch.int64)
    cu_seqlens = torch.tensor([0, 3, 3, 4, 7])  # the second document is empty
    assert positions(tokens, cu_seqlens).tolist() == [[1, 2, 3, 1, 1, 2, 3]]
    assert positions(tokens).tolist() == [[1, 2, 3, 4, 5, 6, 7]]


def test_packed_batches_reach_the_sampler_with_their_offsets():
    seen = []

    def spy(tokens, *, cu_seqlens=None):
        assert cu_seqlens is not None
        seen.append(cu_seqlens.tolist())
        return uniform(tokens)

    Perplexity(batches=lambda: [batch([[1, 2, 3]], [0, 1, 3])])(spy)
    assert seen == [[0, 1, 3]]


def test_buckets_double_exactly():
    assert bucket_of(torch.tensor([1, 2, 3, 4, 5, 8, 9, 2**40, 2**40 + 1])).tolist() == [0, 1, 2, 2, 3, 3, 4, 40, 41]
    assert [bucket_name(i) for i in range(5)] == ["1", "2", "3-4", "5-8", "9-16"]


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="at least one scored target"):
        Perplexity(batches=list)(uniform)


def test_a_hopeless_model_is_infinitely_perplexed_without_a_crash():
    def wrong(tokens, *, cu_seqlens=None):
        logits = torch.zeros(*tokens.shape, VOCAB)
        logits[..., 0] = 1e4
        return logits

    assert Perplexity(batches=lambda: [batch([[1]])])(wrong).metrics["perplexity"] == math.inf
