"""Tokenizers: exact ids, round trips through a folder, and streams that never split a character."""

import json
import random

import pytest

from kimi_linear.data import ByteTokenizer, HFTokenizer, Tokenizer, load_tokenizer

TEXTS = ["", "def f(x):\n    return x\n", "naïve café ≤ 𝛂 漢字 👩‍🚀", "tab\tnul\0end"]


def stream(tokenizer, ids):
    decoder = tokenizer.decoder()
    pieces = [decoder.push(token) for token in ids]
    return [*pieces, decoder.finish()]


@pytest.fixture
def hf_folder(tmp_path):
    """A byte-level BPE trained here, so that characters span several tokens."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the quick brown fox " * 5, "the the the"], trainer)
    folder = tmp_path / "hf"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    return folder


def test_bytes_are_the_ids():
    tokenizer = ByteTokenizer()
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.encode("né") == [110, 195, 169]
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert tokenizer.encode("<|endoftext|>") == list(b"<|endoftext|>")
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode_all([text, "x"])[0].tolist() == tokenizer.encode(text)


def test_bytes_decode_names_what_they_cannot_mean():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([65, 257, 66, -1, 319]) == "A\ufffdB\ufffd\ufffd"
    assert tokenizer.decode([65, 195, 256, 66]) == "A\ufffd<|endoftext|>B"
    with pytest.raises(ValueError, match=r"expected characters that UTF-8 can hold, got '\\udc80' at position 1"):
        tokenizer.encode("a\udc80")


def test_byte_stream_holds_incomplete_characters():
    tokenizer = ByteTokenizer()
    assert stream(tokenizer, "a€".encode()) == ["a", "", "", "€", ""]
    assert stream(tokenizer, "a€".encode()[:-1]) == ["a", "", "", "\ufffd"]


def test_byte_folder_round_trip_and_is_readable_by_others(tmp_path):
    ByteTokenizer().save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)
    other = HFTokenizer.load(tmp_path)
    assert (other.vocab_size, other.eos_id) == (257, 256)
    everything = bytes(range(256)).decode("latin-1")
    for text in [*TEXTS, everything]:
        assert other.encode(text) == ByteTokenizer().encode(text)
        assert other.decode(other.encode(text)) == text


def test_bytes_keep_a_chat_template(tmp_path):
    ByteTokenizer(chat_template="é\r\n{{ messages[0].content }}").save(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, ByteTokenizer)
    assert tokenizer.chat_template == "é\r\n{{ messages[0].content }}"


def test_a_folder_without_the_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a folder with tokenizer\.json, found none"):
        HFTokenizer.load(tmp_path)


def test_hf_round_trip_keeps_ids_and_companions(hf_folder, tmp_path):
    (hf_folder / "tiktoken.model").write_bytes(b"another form of it")
    (hf_folder / "tokenizer.json").write_text((hf_folder / "tokenizer.json").read_text() + " \n")
    tokenizer = load_tokenizer(hf_folder)
    assert isinstance(tokenizer, HFTokenizer)
    assert tokenizer.eos_id == 0
    assert len(tokenizer.encode("the quick")) < len("the quick")
    copy = tmp_path / "copy"
    copy.mkdir()
    tokenizer.save(copy)
    again = load_tokenizer(copy)
    assert again.eos_id == 0
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == text
        assert tokenizer.encode_all([text])[0].tolist() == tokenizer.encode(text)
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == {p.name: p.read_bytes() for p in hf_folder.iterdir()}


def test_hf_unknown_ids_are_shown(hf_folder):
    tokenizer = load_tokenizer(hf_folder)
    ids = tokenizer.encode("the fox")
    assert tokenizer.decode([*ids, tokenizer.vocab_size + 5, *ids]) == "the fox\ufffdthe fox"


@pytest.mark.parametrize("kind", ["bytes", "hf"])
def test_stream_equals_decode_and_never_splits(kind, hf_folder):
    tokenizer = ByteTokenizer() if kind == "bytes" else load_tokenizer(hf_folder)
    text = "the quick 漢字 brown 👩‍🚀 naïve " * 20
    pieces = stream(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    # Random ids are mostly broken UTF-8: the stream still adds up to what decode says.
    rng = random.Random(0)
    for _ in range(50):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(60)]
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_folders_without_or_with_broken_tokenizers(tmp_path, hf_folder):
    assert load_tokenizer(tmp_path / "hf" / "..") is None
    (hf_folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected a tokenizer\.json of the tokenizers library"):
        load_tokenizer(hf_folder)
    (hf_folder / "tokenizer_config.json").write_text('{"eos_token": "<nowhere>"')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: expected JSON"):
        load_tokenizer(hf_folder)


def test_hf_eos_must_be_in_the_vocabulary(hf_folder):
    (hf_folder / "tokenizer_config.json").write_text('{"eos_token": "<nowhere>"}')
    with pytest.raises(ValueError, match=r"eos_token: expected a token of tokenizer\.json, got '<nowhere>'"):
        load_tokenizer(hf_folder)


def test_hf_without_the_library(hf_folder, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'kimi-linear\[hf\]'"):
        load_tokenizer(hf_folder)
