"""Streams of every tokenizer: pieces joined are the whole, and no piece holds half a character."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_linear.data import ByteTokenizer, load_tokenizer
from kimi_linear.testing import make_tiktoken_folder

SCRIPTS = "aZ 0\n漢かカ한éŞاहสе́👩‍🚀🇫🇷❤️𝛂\u0301"
TEXT = st.text(st.one_of(st.sampled_from(SCRIPTS), st.characters(exclude_categories=["Cs"])), max_size=40)
KINDS = ["bytes", "tiktoken", "byte-level", "byte-fallback", "word-piece"]
OURS = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def hf(folder, kind):
    """A ``tokenizer.json`` of one of the families that decode in different ways."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    folder.mkdir()
    if kind == "byte-level":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=320, special_tokens=["<|end|>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        backend.train_from_iterator(["the quick brown 漢字 👩‍🚀 " * 5], trainer)
    elif kind == "byte-fallback":
        tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "漢"]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        backend = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        tokens = ["[UNK]", *SCRIPTS.replace(" ", "").replace("\n", ""), "##a", "##Z", "##漢", "##é"]
        vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
        backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.decoder = decoders.WordPiece()
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root = tmp_path_factory.mktemp("streams")
    made = {"bytes": ByteTokenizer(), "tiktoken": load_tokenizer(make_tiktoken_folder(root / "tiktoken"))}
    return made | {kind: hf(root / kind, kind) for kind in KINDS if kind not in made}


def pieces_of(tokenizer, ids):
    decoder = tokenizer.decoder()
    return [*(decoder.push(token) for token in ids), decoder.finish()]


@pytest.mark.parametrize("kind", ["bytes", "tiktoken", "byte-level"])
@OURS
@given(text=TEXT)
def test_a_text_comes_back_whole_character_by_character(kind, tokenizers, text):
    tokenizer = tokenizers[kind]
    pieces = pieces_of(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text)) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    for piece in pieces:
        piece.encode("utf-8")  # no half of a surrogate pair either


@OURS
@given(text=TEXT)
def test_words_and_bytes_in_turn_decode_as_the_library_says(tokenizers, text):
    tokenizer = tokenizers["byte-fallback"]
    ids = tokenizer.encode(text)
    assert (
        tokenizer.decode(ids) == tokenizer._tokenizer.decode(ids, skip_special_tokens=False) == text.replace("▁", " ")
    )


@OURS
@given(text=TEXT)
def test_a_text_streams_as_it_decodes(tokenizers, text):
    tokenizer = tokenizers["word-piece"]
    ids = tokenizer.encode(text)
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@OURS
@given(data=st.data())
def test_any_ids_stream_as_they_decode(kind, tokenizers, data):
    """Random ids are mostly broken UTF-8, and some are no ids at all."""
    tokenizer = tokenizers[kind]
    ids = data.draw(st.lists(st.integers(-1, tokenizer.vocab_size + 1), max_size=40))
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize(("kind", "first"), [("bytes", 0), ("tiktoken", 0), ("byte-fallback", 1)])
@OURS
@given(blob=st.binary(max_size=40))
def test_u_fffd_comes_only_for_bytes_that_are_no_character(kind, first, tokenizers, blob):
    pieces = pieces_of(tokenizers[kind], [first + byte for byte in blob])
    assert "".join(pieces) == blob.decode("utf-8", errors="replace")


def test_a_character_comes_with_its_last_byte(tokenizers):
    """Not later: a reader must not wait for a token that is not needed."""
    for kind in ("bytes", "tiktoken"):
        assert pieces_of(tokenizers[kind], "a€🙂".encode()) == ["a", "", "", "€", "", "", "", "🙂", ""]
    level = tokenizers["byte-level"]
    ids = level.encode("€")
    assert pieces_of(level, ids) == [*[""] * (len(ids) - 1), "€", ""]


def test_control_tokens_end_a_character_that_was_begun(tokenizers):
    tokenizer = tokenizers["tiktoken"]
    end = tokenizer.special_tokens["<|im_end|>"]
    assert pieces_of(tokenizer, [0xE6, 0xBC, end, 0x41]) == ["", "", "\ufffd<|im_end|>", "A", ""]


def test_long_streams_of_a_window_stay_right(tokenizers):
    """Past the window's cut, many times over."""
    text = "the quick 漢字 brown 👩‍🚀 naïve " * 40
    tokenizer = tokenizers["byte-level"]
    assert "".join(pieces_of(tokenizer, tokenizer.encode(text))) == text
