"""Synthetic tasks, checked by solving them: the answer follows from the tokens before it, by the task's own rule."""

import pytest
import torch

from kimi_linear.data import IGNORE, MQAR, Palindrome, Stack


def draw(task, batch_size=16, seed=0):
    batch = task.batch(torch.Generator().manual_seed(seed), batch_size)
    assert batch.cu_seqlens is None
    assert batch.tokens.shape == batch.targets.shape == (batch_size, task.sequence_length)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.tokens.min() >= 0
    assert batch.tokens.max() < task.vocab_size
    return batch


def rows(batch):
    return zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)


def test_palindrome_is_the_reverse_and_scores_all_but_the_given_symbol():
    task = Palindrome(length=7, vocab=10)
    for tokens, targets in rows(draw(task)):
        symbols = tokens[:7]
        assert tokens[7:] == [10, *symbols[::-1]]
        assert targets == [IGNORE] * 8 + symbols[-2::-1] + [IGNORE]


def test_mqar_answers_with_the_value_of_the_key():
    task = MQAR(num_pairs=6, num_queries=4, vocab=20)
    for tokens, targets in rows(draw(task)):
        memory = dict(zip(tokens[0:12:2], tokens[1:12:2], strict=True))
        assert len(memory) == 6
        assert max(memory) < 10 <= min(memory.values())
        assert tokens[12] == 20
        queries = tokens[13:]
        assert len(set(queries)) == 4
        assert targets == [IGNORE] * 13 + [memory[key] for key in queries]


@pytest.mark.parametrize("pop_probability", [0.5, 0.9])
def test_stack_pops_what_was_pushed_last(pop_probability):
    task = Stack(num_stacks=3, operations=60, vocab=8, pop_probability=pop_probability)
    push, pop = 11, 12
    pops = pushes = 0
    for tokens, targets in rows(draw(task)):
        stacks = {8: [], 9: [], 10: []}
        for i in range(0, len(tokens), 3):
            mark, stack, element = tokens[i : i + 3]
            if mark == pop:
                assert element == stacks[stack].pop()
                assert targets[i : i + 3] == [IGNORE, element, IGNORE]
                pops += 1
            else:
                assert mark == push
                stacks[stack].append(element)
                assert targets[i : i + 3] == [IGNORE] * 3
                pushes += 1
    # Pops happen wherever asked for and possible: a walk of this length is mostly off the floor at one half.
    assert 0.3 < pops / (pops + pushes) < 0.5


def test_everything_is_drawn_uniformly():
    batch = draw(MQAR(num_pairs=5, num_queries=5, vocab=20), batch_size=4000)
    first_keys = torch.bincount(batch.tokens[:, 0], minlength=10)
    values = torch.bincount(batch.tokens[:, 1:10:2].flatten() - 10, minlength=10)
    asked = (batch.tokens[:, 11:12] == batch.tokens[:, 0:10:2]).float().argmax(1).bincount(minlength=5)
    for counts in (first_keys, values, asked):
        expected = counts.sum() / len(counts)
        # Six standard deviations of a multinomial count.
        assert (counts - expected).abs().max() < 6 * expected.sqrt()


def test_a_palindrome_of_distinct_symbols_repeats_none() -> None:
    task = Palindrome(length=20, vocab=24, distinct=True)
    tokens = task.batch(torch.Generator().manual_seed(0), 50).tokens
    assert all(len(set(row)) == 20 for row in tokens[:, :20].tolist())
    assert len(set(tokens[:, 0].tolist())) > 10
    assert torch.equal(tokens[:, :20].flip(1), tokens[:, 21:])
    with pytest.raises(ValueError, match="vocab: expected at least 20, got 19"):
        Palindrome(length=20, vocab=19, distinct=True)


@pytest.mark.parametrize("task", [Palindrome(), MQAR(), Stack()], ids=lambda t: t.name)
def test_a_generator_repeats_and_moves_on(task):
    generator = torch.Generator().manual_seed(4)
    first, second = task.batch(generator, 4), task.batch(generator, 4)
    assert torch.equal(first.tokens, draw(task, 4, seed=4).tokens)
    assert not torch.equal(first.tokens, second.tokens)


@pytest.mark.parametrize("kind", [Palindrome, MQAR, Stack])
@pytest.mark.parametrize("tokens", [256, 1024])
def test_for_length_fills_the_length(kind, tokens):
    task = kind.for_length(tokens)
    assert tokens - 3 < task.sequence_length <= tokens
    draw(task, 2)


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_pairs: expected at most the 8 different keys of vocab == 16, got 9"):
        MQAR(num_pairs=9, num_queries=1, vocab=16)
    with pytest.raises(ValueError, match="length: expected at least 2, got 1"):
        Palindrome(length=1)
    with pytest.raises(ValueError, match=r"pop_probability: expected a number in \(0, 1\], got 0"):
        Stack(pop_probability=0)


@pytest.mark.parametrize(
    "task",
    [Palindrome(length=7, vocab=10), MQAR(num_pairs=6, num_queries=4, vocab=20), Stack(num_stacks=3, operations=30)],
)
def test_scored_holds_every_target(task):
    targets = draw(task).targets
    columns = (targets != IGNORE).any(0)
    inside = torch.zeros_like(columns)
    inside[task.scored] = True
    assert columns.any()
    assert not columns[~inside].any()
    assert task.name == "stack" or columns[inside].all()


def test_mqar_asks_for_every_key_before_it_asks_again():
    task = MQAR(num_pairs=6, num_queries=15, vocab=12)
    for tokens, targets in rows(draw(task)):
        memory = dict(zip(tokens[0:12:2], tokens[1:12:2], strict=True))
        assert max(memory) < 6 <= min(memory.values())
        queries = tokens[13:]
        assert sorted(queries[:6]) == sorted(queries[6:12]) == sorted(memory)
        assert len(set(queries[12:])) == 3
        assert targets[13:] == [memory[key] for key in queries]


def test_symbols_for_a_length():
    assert MQAR.for_length(1024, vocab=2048) == MQAR(num_pairs=341, num_queries=341, vocab=2048)
    assert MQAR.for_length(1024, asked=2) == MQAR(num_pairs=255, num_queries=510, vocab=510)
    assert Palindrome.for_length(1024, vocab=None, distinct=True) == Palindrome(length=511, vocab=511, distinct=True)


@pytest.mark.parametrize("vocab", [12, 40])
def test_mqar_shows_no_value_twice_where_asked_to(vocab):
    task = MQAR(num_pairs=6, num_queries=6, vocab=vocab, distinct=True)
    batch = draw(task, batch_size=200)
    values = batch.tokens[:, 1:12:2]
    assert values.min() >= vocab // 2
    assert values.max() < vocab
    assert all(len(set(row)) == 6 for row in values.tolist())
    assert len(set(map(tuple, values.tolist()))) > 100
    # Every pair's value is asked for once.
    assert torch.equal(batch.targets[:, -6:].sort(1).values, values.sort(1).values)


def test_mqar_shows_as_it_did_before_values_could_be_distinct():
    """Sequences of the study are seeded by this text."""
    assert repr(MQAR(num_pairs=2, num_queries=3, vocab=8)) == "MQAR(num_pairs=2, num_queries=3, vocab=8)"
    shown = "MQAR(num_pairs=2, num_queries=3, vocab=8, distinct=True)"
    assert repr(MQAR(num_pairs=2, num_queries=3, vocab=8, distinct=True)) == shown
