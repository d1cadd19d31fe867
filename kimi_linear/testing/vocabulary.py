"""A small vocabulary in the release's files, for tests and benchmarks: Kimi's own is not free to carry around.

The ranks are trained here on a few lines in many scripts, so that a character may be one token, several, or shared by two.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path

RESERVED = 256
"""Ids after the ranks."""

SPECIAL_TOKENS = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "[EOT]",
    10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>",
    13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>",
    17: "<|im_middle|>",
    254: "[UNK]",
    255: "[PAD]",
}
"""Names of reserved ids by their distance from the first, as the release has them."""

TEXT = """\
The model reads text and writes text; the state of a layer never grows, whatever the length of what it has read.
def forward(self, tokens):\n    return self.head(self.norm(self.layers(tokens)))\n
for i in range(100):\n    print(f"{i} times {i} is {i * i}")\n
It's what we'll do: they've said that I'm here, don't you'd think? WORDS and Words and words.
La fenêtre était déjà ouverte à Noël; où étiez-vous, chère Françoise? Größe, Straße, Übung.
Привет, как дела? Это простой текст для словаря. Γειά σου Κόσμε, τι κάνεις;
語言模型讀取文字並寫出文字。模型的狀態不會增長。今天天气很好,我们去公园散步吧。
これは小さな語彙のためのテキストです。カタカナとひらがな。안녕하세요, 반갑습니다.
مرحبا بالعالم، كيف حالك؟ שלום עולם. नमस्ते दुनिया, आप कैसे हैं? สวัสดีชาวโลก
🙂🙃😀 👩‍🚀 👨‍👩‍👧‍👦 🇫🇷🇯🇵 ❤️ ✅ ∑ ∫ √ ≤ ≥ α β γ 𝛂 e\u0301
{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}
"""


def make_tiktoken_folder(path: str | Path, vocab_size: int = 1024, *, chat_template: bool = True) -> Path:
    """Write a tokenizer in the release's layout into ``path``, which is made if need be; returns it.

    Args:
        path: the folder; its tokenizer files are replaced, other files stay.
        vocab_size: all ids, the 256 reserved ones included; from 512 to 16 million. The released one has 163,840.
        chat_template: whether to write chat_template.jinja, the built-in one.

    Raises:
        ValueError: a size out of range.
    """
    if vocab_size < 2 * RESERVED:
        raise ValueError(
            f"vocab_size: expected at least {2 * RESERVED} (256 bytes, 256 reserved ids), got {vocab_size}"
        )
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    first = vocab_size - RESERVED
    tokens = itertools.islice(_tokens(), first)
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (folder / "tiktoken.model").write_text("".join(lines), encoding="ascii")
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False) | {"special": True}
    config = {
        "added_tokens_decoder": {str(first + at): {"content": name, **flags} for at, name in SPECIAL_TOKENS.items()},
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1048576,
        "tokenizer_class": "TikTokenTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": first + 2}) + "\n", encoding="utf-8")
    template = folder / "chat_template.jinja"
    template.unlink(missing_ok=True)
    if chat_template:
        template.write_bytes(files("kimi_linear.data").joinpath("chat_template.jinja").read_bytes())
    return folder


def _tokens() -> Iterator[bytes]:
    """Every byte, then what was trained, then pairs and triples of bytes for as many as are asked for."""
    seen = set(_trained())
    yield from _trained()
    for length in (2, 3):
        for values in itertools.product(range(256), repeat=length):
            token = bytes(values)
            if token not in seen:
                yield token


@cache
def _trained() -> tuple[bytes, ...]:
    """Byte-pair merges of ``TEXT``, the most frequent pair first, until every word is one token."""
    words = Counter(re.findall(r" ?\w+|\s+|[^\w\s]+", TEXT))
    split = {word: [bytes((byte,)) for byte in word.encode()] for word in words}
    tokens = [bytes((byte,)) for byte in range(256)]
    seen = set(tokens)
    while True:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, parts in split.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
        # Equal counts go to the smaller bytes, so that every machine makes the same file.
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None:
            return tuple(tokens)
        if best[0] + best[1] not in seen:  # another pair may have made the same bytes before
            tokens.append(best[0] + best[1])
            seen.add(tokens[-1])
        split = {word: _merged(parts, best) for word, parts in split.items()}


def _merged(parts: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    done: list[bytes] = []
    for part in parts:
        if done and (done[-1], part) == pair:
            done[-1] += part
        else:
            done.append(part)
    return done
