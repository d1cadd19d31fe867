"""The model that comes with the package: small enough, loaded like any release, and what its card says of it is so."""

from __future__ import annotations

import json
import math
import re
import socket

import pytest
import torch
import torch.nn.functional as F

import kimi_linear as kl
from kimi_linear.cli.main import main
from kimi_linear.folder import shipped_folder
from kimi_linear.studies import nano_package
from kimi_linear.studies.nano_text import FREE

PROSE = (
    "My ideas flow so rapidly that I have not time to express them; by which means my letters sometimes convey no ideas "
    "at all to my correspondents. The ladies of the house were very glad to see her, and she stayed with them for a week."
)
CODE = """import os


def read_config(path):
    \"\"\"Return the contents of the file as a dictionary.\"\"\"
    if not os.path.exists(path):
        raise ValueError("expected a file, got %r" % path)
    with open(path) as f:
        return json.load(f)
"""


@pytest.fixture(scope="module")
def results() -> dict:
    return json.loads((shipped_folder() / nano_package.RESULTS).read_text())


def test_the_weights_are_bf16_and_fit():
    model, tokenizer = kl.load("nano")
    assert model.dtype == torch.bfloat16
    assert model.config.layer_mixers == ("kda", "kda", "kda", "mla") * 2
    assert tokenizer.vocab_size == model.config.vocab_size
    assert sum(f.stat().st_size for f in shipped_folder().glob("*.safetensors")) <= nano_package.MAX_BYTES


@pytest.mark.parametrize(("text", "most"), [(PROSE, 2.0), (CODE, 1.6)], ids=["prose", "code"])
def test_it_has_learned_prose_and_code(text, most):
    """Far fewer bits per byte than the 2.2 of a general compressor on long text: the weights are those of the card."""
    model, tokenizer = kl.load("nano", dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        nats = F.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="sum")
    assert float(nats) / math.log(2) / len(text.encode()) < most


def test_the_card_is_drawn_from_the_results(results):
    assert (shipped_folder() / nano_package.CARD).read_text() == nano_package.card(results)


def test_every_text_is_free(results):
    prose = [s["licence"] for s in results["sources"] if s["kind"] == "prose"]
    assert all(re.match(r"public domain|CC0", licence) for licence in prose)
    assert all(
        FREE.fullmatch(s["licence"])
        for s in results["sources"]
        if s["kind"] == "code" and s["get"] == "" and "Python 3" not in s["name"]
    )


def test_bare_generate_and_chat_use_it_without_a_network(tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--seed", "0", "--max-tokens", "40", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    words = re.findall(r"[a-z]+", out.lower())
    assert out.startswith("Once upon a time")
    assert len(words) > 20
    assert {"the", "of", "and", "to", "a"} & set(words[4:])

    class Lines:
        lines = ["It is a truth", "She said"]

        def isatty(self) -> bool:
            return False

        def readline(self) -> str:
            return self.lines.pop(0) + "\n" if self.lines else ""

    monkeypatch.setattr("sys.stdin", Lines())
    assert main(["chat", "--seed", "0", "--max-tokens", "8", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) >= 2
    known = [int(n) for n in re.findall(r"(\d+) known", err)]
    assert known[0] == 0
    assert known[1] >= 8  # the second turn goes on from the state of the first
