"""Numbers read as people write them, and progress shows without a terminal too."""

import io

import pytest
from rich.console import Console

from kimi_linear.cli import console as speech


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (60, "1 min 00 s"), (125.4, "2 min 05 s"), (4799, "1 h 19 min")],
)
def test_seconds(value, text):
    assert speech.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**31, "2.0 GiB"), (3 * 2**40, "3.0 TiB")],
)
def test_memory(value, text):
    assert speech.memory(value) == text


@pytest.mark.parametrize(("value", "text"), [(950, "950"), (8123, "8.1k"), (49_122_681_728, "49.1B"), (2e12, "2.0T")])
def test_count(value, text):
    assert speech.count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (12345, "12,345"), (0.123456, "0.1235"), (65536.0, "65,536"), (1.0, "1"), ("a", "a"), (True, "True")],
)
def test_cell(value, text):
    assert speech.cell(value) == text


def test_a_table_aligns_numbers_to_the_right():
    shown = io.StringIO()
    Console(file=shown, width=60).print(speech.table([{"name": "a", "loss": 1.5}, {"name": "bcd", "loss": 10.25}]))
    assert [line.rstrip() for line in shown.getvalue().splitlines()] == [
        "name   loss",
        "a       1.5",
        "bcd   10.25",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_track_passes_everything_on_and_shows_the_last(terminal):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=80)
    seen = list(speech.track(range(1, 11), 10, console, step=lambda i: i, describe=lambda i: f"loss [{i}]"))
    assert seen == list(range(1, 11))
    assert "10/10" in shown.getvalue()
    assert "loss [10]" in shown.getvalue()


def test_peak_memory_is_that_of_the_process():
    block = bytearray(64 * 2**20)
    assert speech.peak_memory() > len(block)
