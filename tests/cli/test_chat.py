"""``chat`` in a pipe and on a terminal, and ``generate`` with a model that has a chat template."""

import os
import signal
import sys

import pytest

from kimi_linear.cli.main import main
from kimi_linear.config import ModelConfig
from kimi_linear.data import ByteTokenizer, ChatFormat, load_tokenizer
from kimi_linear.engine import Conversation, SamplingConfig, stream
from kimi_linear.folder import load, save
from kimi_linear.model import KimiLinear
from kimi_linear.testing import make_tiktoken_folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def model(tmp_path):
    """A model that chats, as the newest under runs/: bytes and control tokens, printable after a fixed seed."""
    tokenizer = load_tokenizer(make_tiktoken_folder(tmp_path / "vocabulary", 512))
    config = ModelConfig.preset("tiny", num_layers=2, pattern="1:1", initializer_range=0.2, vocab_size=512)
    save(KimiLinear(config, seed=0), tmp_path / "runs" / "m", tokenizer)
    return tmp_path / "runs" / "m"


class Lines:
    """Standard input with these lines."""

    def __init__(self, *lines: str, terminal: bool = False) -> None:
        self._lines = [line + "\n" for line in lines]
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def readline(self) -> str:
        return self._lines.pop(0) if self._lines else ""


def answers(model, *turns, seed=1, max_tokens=5, system=None):
    loaded, tokenizer = load(model)
    said = [] if system is None else [{"role": "system", "content": system}]
    chat = Conversation(loaded, tokenizer, messages=said)
    return [
        chat.send(text, SamplingConfig(max_tokens=max_tokens, seed=seed + i)).text() for i, text in enumerate(turns)
    ]


FLAGS = ["chat", "--seed", "1", "--max-tokens", "5"]


def test_every_line_of_a_pipe_is_a_turn(model, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Lines("Hello", "", "in two \\", "lines", "//help"))
    assert main(FLAGS) == 0
    out, err = capsys.readouterr()
    assert out == "".join(text + "\n" for text in answers(model, "Hello", "in two \nlines", "/help"))
    assert "runs/m" in err
    assert err.count("known") == 3
    assert "turns 3" in err
    assert "peak memory" in err


def test_the_last_line_may_lack_its_end_and_the_input_may_be_empty(model, capsys, monkeypatch):
    lines = Lines("Hello \\")
    monkeypatch.setattr(sys, "stdin", lines)
    assert main(FLAGS) == 0
    assert capsys.readouterr().out == answers(model, "Hello ")[0] + "\n"
    monkeypatch.setattr(sys, "stdin", Lines())
    assert main(FLAGS) == 0
    assert capsys.readouterr().out == ""


def test_a_system_prompt_and_commands(model, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Lines("Hi", "/new", "Hi", "/what", "/exit", "never"))
    assert main([*FLAGS, "--system", "Be brief."]) == 0
    out, err = capsys.readouterr()
    first = answers(model, "Hi", system="Be brief.")[0]
    second = answers(model, "Hi", system="Be brief.", seed=2)[0]
    assert out == f"{first}\n{second}\n"
    assert first != second
    assert "no command '/what'" in err
    assert err.count(", 0 known") == 2


def test_ctrl_c_on_a_terminal_stops_the_answer_alone(model, capsys, monkeypatch):
    said = iter(["Hello", "Again"])

    def typed(prompt):
        line = next(said, None)
        if line is None:
            raise EOFError
        return line

    from kimi_linear.engine import conversation

    draw, struck = conversation.draw, []

    def struck_once(*args):
        for i, _ in enumerate(draw(*args)):
            if i == 2 and not struck:
                struck.append(i)
                os.kill(os.getpid(), signal.SIGINT)
            yield ord("a") + i % 26  # an untrained model would draw control tokens out of place

    monkeypatch.setattr(conversation, "draw", struck_once)
    monkeypatch.setattr(sys, "stdin", Lines(terminal=True))
    monkeypatch.setattr("builtins.input", typed)
    before = signal.getsignal(signal.SIGINT)
    assert main(["chat", "--seed", "1", "--max-tokens", "30"]) == 0
    assert signal.getsignal(signal.SIGINT) is before
    out, err = capsys.readouterr()
    assert out.splitlines() == ["abc", "abcdefghijklmnopqrstuvwxyzabcd"]
    turns = [line for line in err.splitlines() if "known" in line]
    assert turns[0].endswith("stopped")
    assert ", 0 known" in turns[0]
    # The state was kept, so the second turn reads only its own message and what closes the first.
    assert ", 0 known" not in turns[1]


def test_ctrl_c_in_a_pipe_ends_everything(model, capsys, monkeypatch):
    from kimi_linear.engine import conversation

    def interrupted(*args):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(conversation, "draw", interrupted)
    monkeypatch.setattr(sys, "stdin", Lines("Hello", "Again"))
    assert main(FLAGS) == 130
    assert "Interrupted" in capsys.readouterr().err


def test_a_model_that_cannot_chat_is_told_what_it_can(tmp_path, capsys, monkeypatch):
    save(KimiLinear(ModelConfig.preset("tiny", num_layers=1)), tmp_path / "runs" / "m", ByteTokenizer())
    monkeypatch.setattr(sys, "stdin", Lines("Hello"))
    assert main(FLAGS) == 1
    assert "continue plain text with: kimi-linear generate" in capsys.readouterr().err
    save(KimiLinear(ModelConfig.preset("tiny", num_layers=1)), tmp_path / "without")
    assert main([*FLAGS, "--model", "without"]) == 1
    assert "expected a tokenizer beside the model" in capsys.readouterr().err


def test_generate_takes_the_prompt_for_a_message_where_there_is_a_template(model, capsys):
    loaded, tokenizer = load(model)
    greedy = ["generate", "--temperature", "0", "--max-tokens", "12"]
    assert main([*greedy, "Hello <|im_end|>"]) == 0
    out, err = capsys.readouterr()
    ids = ChatFormat(tokenizer).encode([{"role": "user", "content": "Hello <|im_end|>"}])
    answer = "".join(stream(loaded, tokenizer, ids, temperature=0, max_tokens=12))
    assert out == answer + "\n"
    assert "--raw" in err
    assert main([*greedy, "--raw", "Hello <|im_end|>"]) == 0
    out, err = capsys.readouterr()
    raw = "".join(stream(loaded, tokenizer, "Hello <|im_end|>", temperature=0, max_tokens=12))
    assert out == f"Hello <|im_end|>{raw}\n"
    assert raw != answer
    assert "--raw" not in err
