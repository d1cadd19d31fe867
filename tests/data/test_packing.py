"""Batches: every token once per epoch, no leak, exact resume."""

import itertools

import pytest
import torch

from kimi_linear.data import IGNORE, MQAR, ByteTokenizer, CorpusStream, Documents, TaskStream, in_order, tokenize


def make_corpus(count=23, seed=0):
    """Documents whose tokens, taken with their neighbour, are nearly all different, so that places can be told."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for i in range(count):
        length = int(torch.randint(0, 90, (), generator=generator))
        texts.append("".join(chr(0x100 + (37 * i + j) % 1500) for j in range(length)))
    return tokenize(Documents(names=tuple(f"d{i}" for i in range(count)), texts=tuple(texts)), ByteTokenizer())


def epoch_of(stream):
    batches = []
    while stream.epoch < 1:
        batches.append(next(stream))
    return batches


def pairs(corpus):
    """(token, following token of the same document or -100) at every place."""
    nexts = torch.full((corpus.num_tokens,), IGNORE)
    for a, b in zip(corpus.offsets[:-1].tolist(), corpus.offsets[1:].tolist(), strict=True):
        nexts[a : b - 1] = corpus.tokens[a + 1 : b].long()
    return sorted(zip(corpus.tokens.tolist(), nexts.tolist(), strict=True))


def test_packed_epoch_reads_every_token_with_its_successor_once():
    corpus = make_corpus()
    # As many tokens in all as batches need, so that the epoch ends with a batch.
    for length, batch_size in ((7, 5), (16, 3), (1000, 1)):
        stream = CorpusStream(corpus, batch_size=batch_size, sequence_length=length, packing="packed", seed=3)
        seen = []
        while len(seen) < corpus.num_tokens:
            batch = next(stream)
            assert batch.tokens.shape == (1, length * batch_size)
            seen += zip(batch.tokens[0].tolist(), batch.targets[0].tolist(), strict=True)
        assert sorted(seen[: corpus.num_tokens]) == pairs(corpus)


def test_packed_sequences_are_pieces_of_one_document():
    corpus = make_corpus()
    documents = [corpus.document(i).tolist() for i in range(len(corpus.names))]
    stream = CorpusStream(corpus, batch_size=4, sequence_length=16, packing="packed")
    for _ in range(30):
        batch = next(stream)
        cu = batch.cu_seqlens.tolist()
        assert (cu[0], cu[-1]) == (0, 64)
        for a, b in itertools.pairwise(cu):
            tokens, targets = batch.tokens[0, a:b].tolist(), batch.targets[0, a:b].tolist()
            assert 1 <= b - a <= 16
            holders = [d for d in documents for i in range(len(d)) if d[i : i + b - a] == tokens]
            assert holders
            assert targets[:-1] == tokens[1:]
            # An end of document has nothing after it; every other last token has the document's next one.
            assert (targets[-1] == IGNORE) == (tokens[-1] == 256)
            assert targets[-1] == IGNORE or any(_follows(d, tokens, targets[-1]) for d in holders)


def _follows(document, tokens, token):
    run = [*tokens, token]
    return any(document[i : i + len(run)] == run for i in range(len(document)))


def test_rows_epoch_reads_every_token_once_and_targets_follow():
    corpus = make_corpus()
    stream_tokens = corpus.tokens.long()
    expected = sorted(zip(stream_tokens[:-1].tolist(), stream_tokens[1:].tolist(), strict=True))
    stream = CorpusStream(corpus, batch_size=1, sequence_length=32, packing="rows", seed=1)
    for _ in range(2):
        epoch = int(stream.epoch)
        seen = []
        while int(stream.epoch) == epoch:
            batch = next(stream)
            assert batch.tokens.shape == (1, 32)
            assert batch.cu_seqlens is None
            scored = batch.targets[0] != IGNORE
            seen += zip(batch.tokens[0][scored].tolist(), batch.targets[0][scored].tolist(), strict=True)
        assert sorted(seen) == expected


def test_order_is_shuffled_by_seed_and_epoch_and_nothing_else():
    corpus = make_corpus()

    def tokens(seed, count=40):
        stream = CorpusStream(corpus, batch_size=2, sequence_length=16, packing="rows", seed=seed)
        return torch.stack([next(stream).tokens for _ in range(count)])

    assert torch.equal(tokens(0), tokens(0))
    assert not torch.equal(tokens(0), tokens(1))
    stream = CorpusStream(corpus, batch_size=2, sequence_length=16, packing="rows")
    first = [b.tokens for b in epoch_of(stream)]
    second = [next(stream).tokens for _ in first]
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("packing", ["packed", "rows"])
def test_resume_continues_exactly_where_the_state_was_taken(packing, tmp_path):
    corpus = make_corpus()

    def make():
        return CorpusStream(corpus, batch_size=3, sequence_length=8, packing=packing, seed=5)

    for taken in (0, 1, 17, 90):
        stream = make()
        for _ in range(taken):
            next(stream)
        torch.save(stream.state_dict(), tmp_path / "state.pt")
        resumed = make()
        resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for _ in range(60):
            a, b = next(stream), next(resumed)
            assert torch.equal(a.tokens, b.tokens)
            assert torch.equal(a.targets, b.targets)
            assert packing == "rows" or torch.equal(a.cu_seqlens, b.cu_seqlens)


def test_state_of_other_data_is_refused():
    corpus = make_corpus()
    state = CorpusStream(corpus, batch_size=3, sequence_length=8).state_dict()
    with pytest.raises(ValueError, match="fingerprint: expected the data of the saved run"):
        CorpusStream(make_corpus(seed=1), batch_size=3, sequence_length=8).load_state_dict(state)
    with pytest.raises(ValueError, match=r"batch_size: expected the data of the saved run \(3\), got 4"):
        CorpusStream(corpus, batch_size=4, sequence_length=8).load_state_dict(state)


def test_bad_arguments():
    corpus = make_corpus()
    with pytest.raises(ValueError, match="expected at least 1, got 0 and 8"):
        CorpusStream(corpus, batch_size=0, sequence_length=8)
    with pytest.raises(ValueError, match="packing: expected 'packed' or 'rows', got 'row'"):
        CorpusStream(corpus, batch_size=1, sequence_length=8, packing="row")
    empty = tokenize(Documents(names=(), texts=()), ByteTokenizer())
    with pytest.raises(ValueError, match="expected at least one token, got none"):
        CorpusStream(empty, batch_size=1, sequence_length=8)


@pytest.mark.parametrize("packing", ["packed", "rows"])
def test_in_order_scores_every_target_once(packing):
    corpus = make_corpus()
    batches = in_order(corpus, batch_size=4, sequence_length=16, packing=packing)
    scored = sum(int((b.targets != IGNORE).sum()) for b in batches)
    documents = len(corpus.names)
    assert scored == corpus.num_tokens - (documents if packing == "packed" else 1)
    few = in_order(corpus, batch_size=4, sequence_length=16, packing=packing, max_batches=3)
    assert len(few) == 3
    assert torch.equal(few[0].tokens, batches[0].tokens)
    assert torch.equal(few[-1].tokens, batches[-1].tokens)


def test_task_stream_resumes_and_names_its_task():
    task = MQAR(num_pairs=4, num_queries=2, vocab=16)
    stream = TaskStream(task, batch_size=3, seed=1)
    next(stream)
    resumed = TaskStream(task, batch_size=3, seed=9)
    resumed.load_state_dict(stream.state_dict())
    assert torch.equal(next(stream).tokens, next(resumed).tokens)
    with pytest.raises(ValueError, match="task: expected that of the saved run"):
        TaskStream(MQAR(num_pairs=5, num_queries=2, vocab=16), batch_size=3).load_state_dict(stream.state_dict())
