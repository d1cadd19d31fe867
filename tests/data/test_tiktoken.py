"""The release's vocabulary: ids against a merge written out here, control tokens only where asked for, files byte for byte."""

import base64
import itertools
import json
import sys
from functools import cache

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_linear.data import Tokenizer, load_tokenizer
from kimi_linear.data.tiktoken import SPLIT_PATTERN, TiktokenTokenizer
from kimi_linear.testing import make_tiktoken_folder

SCRIPTS = "abc XYZ'sll'VE 019 \t\n\r漢字かなカナ한국 éüŞǅʰا́ह्न 👩‍🚀🇫🇷<|im_end|>[]{}.,;\u00a0\u3000\ufffd𝛂"
TEXT = st.text(st.one_of(st.sampled_from(SCRIPTS), st.characters(exclude_categories=["Cs"])), max_size=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiktoken_folder(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def ranks_of(folder):
    lines = (folder / "tiktoken.model").read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}


def merged(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Byte-pair merging as it is defined: the neighbours with the lowest rank first, the left one of equals."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        joint = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not joint:
            return [ranks[part] for part in parts]
        _, at = min(joint)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Hello world", ["Hello", " world"]),
        ("它是KDA层", ["它是", "KDA", "层"]),
        ("12345 67", ["123", "45", " ", "67"]),
        ("it's WE'LL Don'T", ["it's", " WE'LL", " Don'T"]),
        ("camelCaseWord", ["camel", "Case", "Word"]),
        ("HTTPServer", ["HTTPServer"]),
        ("a  b   \n  c\t", ["a", " ", " b", "   \n", " ", " c", "\t"]),
        ("x=(y)\n\nz", ["x", "=(", "y", ")\n\n", "z"]),
        ("é e\u0301", ["é", " e\u0301"]),
        ("かな漢字", ["かな", "漢字"]),
        ("...wait", ["...", "wait"]),
    ],
)
def test_text_is_cut_as_the_release_cuts_it(text, pieces):
    assert regex.findall(SPLIT_PATTERN, text, regex.V1) == pieces


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(text=TEXT)
def test_ids_are_those_of_merging_written_out(folder, tokenizer, text):
    ranks = ranks_of_cached(folder)
    expected = [i for piece in regex.findall(SPLIT_PATTERN, text, regex.V1) for i in merged(piece.encode(), ranks)]
    assert tokenizer.encode(text) == expected
    assert tokenizer.decode(expected) == text
    assert tokenizer.encode_all([text, "x"])[0].tolist() == expected


ranks_of_cached = cache(ranks_of)


def test_ids_and_names_are_the_release_s(tmp_path):
    tokenizer = load_tokenizer(make_tiktoken_folder(tmp_path, 163_840))
    assert isinstance(tokenizer, TiktokenTokenizer)
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.vocab_size == 163_840
    assert (tokenizer.eos_id, tokenizer.end_ids) == (163_585, {163_585, 163_586})
    named = {
        "[BOS]": 163_584, "[EOS]": 163_585, "<|im_end|>": 163_586, "<|im_user|>": 163_587, "<|im_assistant|>": 163_588,
        "<|start_header_id|>": 163_590, "<|end_header_id|>": 163_591, "[EOT]": 163_593, "[UNK]": 163_838, "[PAD]": 163_839,
        "<|reserved_token_163589|>": 163_589,
    }  # fmt: skip
    assert {name: tokenizer.special_tokens[name] for name in named} == named
    assert sorted(tokenizer.special_tokens.values()) == list(range(163_584, 163_840))
    assert tokenizer.named_tokens == {
        "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]", "pad_token": "[PAD]",
    }  # fmt: skip


def test_a_control_token_in_a_text_is_text_unless_asked_for(tokenizer):
    end, user = tokenizer.special_tokens["<|im_end|>"], tokenizer.special_tokens["<|im_user|>"]
    text = "a<|im_end|>b<|im_user|>"
    plain = tokenizer.encode(text)
    assert max(plain) < 768
    assert tokenizer.decode(plain) == text
    assert tokenizer.encode(text, special=True) == [*tokenizer.encode("a"), end, *tokenizer.encode("b"), user]
    assert tokenizer.decode(tokenizer.encode(text, special=True)) == text
    assert tokenizer.encode_parts(["<|im_end|>", end, "a", "b"]) == [
        *tokenizer.encode("<|im_end|>"), end, *tokenizer.encode("a"), *tokenizer.encode("b"),
    ]  # fmt: skip
    assert all(ids.max() < 768 for ids in tokenizer.encode_all([text, text]))
    assert tokenizer.encode_all([text])[0].dtype == np.int32


def test_marks_that_the_files_do_not_call_special_are_control_tokens_too(folder, tmp_path):
    values = json.loads((folder / "tokenizer_config.json").read_text())
    mark = next(e for e in values["added_tokens_decoder"].values() if e["content"] == "<|tool_call_begin|>")
    mark["special"] = False
    (tmp_path / "tiktoken.model").write_bytes((folder / "tiktoken.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    assert max(load_tokenizer(tmp_path).encode("<|tool_call_begin|>")) < 768


def test_ids_without_a_meaning_and_broken_bytes_are_shown(tokenizer):
    a, first, second = (tokenizer.encode(c)[0] for c in ("a", "\x00", "\x01"))
    assert (first, second) == (0, 1)  # single bytes are their own rank here
    assert tokenizer.decode([a, 1024, -1, a]) == "a\ufffd\ufffda"
    assert tokenizer.decode([a, 0xE6, 0xBC, 770, a]) == "a\ufffd<|im_end|>a"
    with pytest.raises(ValueError, match=r"expected characters that UTF-8 can hold, got '\\udc80' at position 1"):
        tokenizer.encode("a\udc80")
    with pytest.raises(ValueError, match="UTF-8"):
        tokenizer.encode_all(["a\udc80"])


@pytest.mark.parametrize("text", ["def" * 10_000, "x " * 199_999 + "\ndef self", " " * 60_000 + "def"])
def test_long_inputs_are_cut_where_the_release_cuts_them(tokenizer, text):
    """400,000 characters at a time, and after 25,000 of a run without, or of only, white space; counted one by one."""
    expected: list[int] = []
    for start in range(0, len(text), 400_000):
        part, begin, length = text[start : start + 400_000], 0, 0
        for i, character in enumerate(part):
            same = i > 0 and character.isspace() == part[i - 1].isspace()
            length = length + 1 if same else 1
            if length > 25_000:
                expected += tokenizer._encoding.encode_ordinary(part[begin:i])
                begin, length = i, 1
        expected += tokenizer._encoding.encode_ordinary(part[begin:])
    assert tokenizer.encode(text) == expected
    assert tokenizer.decode(expected) == text
    assert text.startswith("  ") or expected != tokenizer._encoding.encode_ordinary(text), "no cut made a difference"


def test_saving_writes_the_same_bytes(folder, tmp_path):
    (tmp_path / "a").mkdir()
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    values = json.loads(files["tokenizer_config.json"])
    # Spacing, order and unknown keys of a file are nobody's business but its owner's.
    files["tokenizer_config.json"] = json.dumps(
        {"odd": [1.50], "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}, **values},
        separators=(" ,", " :"),
    ).encode()
    files["tokenization_kimi.py"] = b"raise SystemExit('this code must never run')\r\n"
    files["special_tokens_map.json"] = b"{}"
    for name, blob in files.items():
        (tmp_path / "a" / name).write_bytes(blob)
    (tmp_path / "b").mkdir()
    load_tokenizer(tmp_path / "a").save(tmp_path / "b")
    assert {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()} == files


def test_a_link_out_of_the_folder_is_not_carried_along(folder, tmp_path):
    """Saving would copy what it leads to; the hub's cache, which is made of links, is left in peace."""
    (tmp_path / "secret").write_text("{}")
    snapshot = tmp_path / "hub" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "hub" / "blobs").mkdir()
    for path in folder.iterdir():
        (tmp_path / "hub" / "blobs" / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert load_tokenizer(snapshot).encode("a") == load_tokenizer(folder).encode("a")
    (snapshot / "special_tokens_map.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"special_tokens_map\.json: expected a file of .*, got a link to .*secret"):
        load_tokenizer(snapshot)


@pytest.mark.parametrize("module", ["../secret", "other/repository--module", "a b", "", "é"])
def test_no_file_outside_the_folder_is_carried_along(folder, tmp_path, module):
    (tmp_path / "secret.py").write_text("x")
    inner = tmp_path / "m"
    inner.mkdir()
    for path in folder.iterdir():
        (inner / path.name).write_bytes(path.read_bytes())
    values = json.loads((inner / "tokenizer_config.json").read_text())
    values["auto_map"] = {"AutoTokenizer": [f"{module}.Class", None]}
    (inner / "tokenizer_config.json").write_text(json.dumps(values))
    (tmp_path / "out").mkdir()
    load_tokenizer(inner).save(tmp_path / "out")
    assert not any(path.suffix == ".py" for path in (tmp_path / "out").iterdir())


def broken(folder, tmp_path, ranks=None, **config):
    """A copy of ``folder`` with other ranks or values of tokenizer_config.json."""
    lines = (folder / "tiktoken.model").read_bytes().splitlines(keepends=True)
    (tmp_path / "tiktoken.model").write_bytes(b"".join(ranks(lines) if ranks else lines))
    values = json.loads((folder / "tokenizer_config.json").read_text()) | config
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    return tmp_path


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (lambda lines: lines[:200], r"each of the 256 bytes, got none for byte 200 \(56 are missing\)"),
        (lambda lines: [*lines[:300], b"%%% 300\n"], "line 301: expected base64 text, a space and a rank"),
        (lambda lines: [*lines[:300], b"YWI=\n"], "line 301: expected base64 text"),
        (lambda lines: [*lines[:300], b"YWI= x\n"], "line 301: expected base64 text"),
        (lambda lines: [*lines[:300], lines[301]], "line 301: expected a new token with rank 300, got rank 301"),
        (lambda lines: [*lines[:300], b"YQ== 300\n"], "line 301: .* got the token came before"),
        (lambda lines: [], "256 are missing"),
    ],
)
def test_a_broken_vocabulary_is_refused(folder, tmp_path, ranks, message):
    with pytest.raises(ValueError, match=rf"tiktoken\.model.*{message}"):
        load_tokenizer(broken(folder, tmp_path, ranks))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"added_tokens_decoder": {"7": {"content": "x"}}}, r"expected ids in \[768, 1024\).*got '7'"),
        ({"added_tokens_decoder": {"1024": {"content": "x"}}}, r"got '1024'"),
        ({"added_tokens_decoder": {"768": "x"}}, r"\.768: expected an object with the token's text"),
        ({"added_tokens_decoder": {"768": {"content": "x"}, "769": {"content": "x"}}}, "got 'x' twice"),
        ({"added_tokens_decoder": []}, "expected an object of ids and tokens, got list"),
        ({"eos_token": "[NOWHERE]"}, r"eos_token: expected a token of added_tokens_decoder, got '\[NOWHERE\]'"),
        ({"eos_token": 5}, "eos_token: expected a token's text, got 5"),
        ({"chat_template": 5}, "chat_template: expected jinja text"),
    ],
)
def test_contradicting_files_are_refused(folder, tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(broken(folder, tmp_path, **config))


@pytest.mark.parametrize("eos", [[1024], -1, True, "x", [1.0]])
def test_end_ids_must_be_ids(folder, tmp_path, eos):
    broken(folder, tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id: expected ids in \[0, 1024\)"):
        load_tokenizer(tmp_path)


def test_several_end_ids(folder, tmp_path):
    broken(folder, tmp_path, eos_token="[EOT]")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [770, 769]}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.end_ids) == (777, {769, 770, 777})


def test_without_the_library(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ImportError, match=r"tiktoken library.*pip install tiktoken"):
        load_tokenizer(folder)
