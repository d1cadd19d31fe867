"""The vocabulary for tests is one that the libraries read, the same on every machine, and has what tests are after."""

import hashlib

import pytest

from kimi_linear.data import load_tokenizer
from kimi_linear.testing import make_tiktoken_folder
from kimi_linear.testing.vocabulary import TEXT


def test_it_is_the_same_everywhere(tmp_path):
    ranks = (make_tiktoken_folder(tmp_path) / "tiktoken.model").read_bytes()
    assert hashlib.sha256(ranks).hexdigest()[:16] == "a8fb2bdc3cc5ae5f"


@pytest.mark.parametrize("size", [512, 600, 1024, 2000, 70_000])
def test_it_has_the_size_that_was_asked_for(tmp_path, size):
    import tiktoken.load

    folder = make_tiktoken_folder(tmp_path / "m", size)
    assert len(tiktoken.load.load_tiktoken_bpe(str(folder / "tiktoken.model"))) == size - 256
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == size
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_it_merges_and_it_splits_characters(tmp_path):
    tokenizer = load_tokenizer(make_tiktoken_folder(tmp_path))
    assert len(tokenizer.encode("the model reads")) < 8
    assert len(tokenizer.encode("漢")) == 3, "a character of several tokens"


def test_the_files_are_replaced(tmp_path):
    make_tiktoken_folder(tmp_path)
    assert load_tokenizer(tmp_path).chat_template is not None
    assert load_tokenizer(make_tiktoken_folder(tmp_path, 600, chat_template=False)).chat_template is None
    with pytest.raises(ValueError, match="vocab_size: expected at least 512"):
        make_tiktoken_folder(tmp_path, 511)
