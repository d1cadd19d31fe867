"""Corpora: which documents are read, how a budget samples them, and how they are split."""

import numpy as np
import pytest
import torch

from kimi_linear.data import ByteTokenizer, Documents, read_documents, stdlib_source, tokenize


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "texts"
    (root / "b").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / "z.txt").write_text("zz")
    (root / "a.txt").write_text("né", encoding="utf-8")
    (root / "b" / "c.md").write_text("# c")
    (root / "b" / "d.bin").write_bytes(b"\xff")
    (root / ".git" / "x.txt").write_text("hidden")
    return root


def test_folder_is_read_sorted_by_suffix(folder):
    documents = read_documents(folder)
    assert documents.names == ("a.txt", "b/c.md", "z.txt")
    assert documents.texts == ("né", "# c", "zz")
    assert read_documents(folder, suffixes=(".txt",)).names == ("a.txt", "z.txt")
    assert read_documents(folder / "z.txt").texts == ("zz",)


def test_files_that_are_not_text_are_an_error_or_reported(folder):
    with pytest.raises(ValueError, match=r"d\.bin: expected UTF-8 text, got byte 0xff at 0"):
        read_documents(folder, suffixes=(".bin", ".txt"))
    documents = read_documents(folder, suffixes=(".bin", ".txt"), skip_unreadable=True)
    assert (documents.names, documents.unreadable) == (("a.txt", "z.txt"), ("b/d.bin",))
    with pytest.raises(FileNotFoundError, match=r"expected files ending in \.rs, got none"):
        read_documents(folder, suffixes=(".rs",))
    with pytest.raises(FileNotFoundError, match="got nothing there"):
        read_documents(folder / "nowhere")


def test_budget_takes_a_stable_sample_and_cuts_the_last(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text("€" * 10, encoding="utf-8")
    documents = read_documents(tmp_path, max_bytes=100)
    assert len(documents) == 4
    assert documents.left_out == 36
    # 30 + 30 + 30 + 10 bytes, where 10 bytes hold three whole characters.
    assert sorted(len(text) for text in documents.texts) == [3, 10, 10, 10]
    assert set(read_documents(tmp_path, max_bytes=300).names) > set(documents.names)
    assert documents.names != ("00.txt", "01.txt", "02.txt", "03.txt")


def test_tokens_end_each_document_with_eos():
    documents = Documents(names=("a", "b", "c"), texts=("hi", "", "é"))
    corpus = tokenize(documents, ByteTokenizer())
    assert corpus.tokens.tolist() == [104, 105, 256, 256, 195, 169, 256]
    assert corpus.offsets.tolist() == [0, 3, 4, 7]
    assert corpus.tokens.numpy().dtype == np.uint16
    assert corpus.document(2).tolist() == [195, 169, 256]
    assert corpus.gather(torch.tensor([[0, 6]])).tolist() == [[104, 256]]


def test_fingerprint_sees_tokens_boundaries_and_names():
    def fingerprint(names, texts):
        return tokenize(Documents(names=names, texts=texts), ByteTokenizer()).fingerprint

    same = fingerprint(("a", "b"), ("x", "y"))
    assert same == fingerprint(("a", "b"), ("x", "y"))
    assert same != fingerprint(("a", "b"), ("x", "z"))
    assert same != fingerprint(("a", "c"), ("x", "y"))
    assert same != fingerprint(("b", "a"), ("x", "y"))


def test_split_keeps_documents_whole_and_stable():
    names = tuple(f"doc{i}" for i in range(300))
    corpus = tokenize(Documents(names=names, texts=names), ByteTokenizer())
    train, held_out = corpus.split(0.1)
    assert sorted(train.names + held_out.names) == sorted(names)
    assert 15 <= len(held_out.names) <= 50
    assert train.num_tokens + held_out.num_tokens == corpus.num_tokens
    for part in (train, held_out):
        for i, name in enumerate(part.names):
            assert part.document(i).tolist() == [*name.encode(), 256]
    # A document keeps its side when others go.
    fewer = tokenize(Documents(names=names[:150], texts=names[:150]), ByteTokenizer()).split(0.1)
    assert set(fewer[1].names) == set(held_out.names) & set(names[:150])


def test_split_of_one_document_holds_out_its_end():
    corpus = tokenize(Documents(names=("book",), texts=("0123456789" * 10,)), ByteTokenizer())
    train, held_out = corpus.split(0.1)
    assert train.num_tokens == 91
    assert ByteTokenizer().decode(held_out.document(0).tolist()) == "123456789<|endoftext|>"


def test_standard_library_is_there_and_is_code():
    documents = stdlib_source(max_bytes=200_000)
    assert sum(len(text.encode()) for text in documents.texts) >= 199_990
    assert documents.left_out > 300
    assert all(name.endswith(".py") and "test" not in name.split("/") for name in documents.names)
    assert documents == stdlib_source(max_bytes=200_000)
