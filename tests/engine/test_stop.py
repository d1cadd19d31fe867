"""Stop strings cut exactly, however the text is split into pieces."""

import itertools

import pytest

from kimi_linear.engine.stop import StopMatcher


def run(pieces: list[str], stop: tuple[str, ...]) -> tuple[str, bool]:
    matcher = StopMatcher(stop)
    shown = ""
    for piece in pieces:
        shown += matcher.push(piece)
        if matcher.stopped:
            return shown, True
    return shown + matcher.finish(), False


def splits(text: str):
    for cuts in itertools.product([False, True], repeat=len(text) - 1):
        pieces, last = [], 0
        for i, cut in enumerate(cuts, start=1):
            if cut:
                pieces.append(text[last:i])
                last = i
        yield [*pieces, text[last:]]


@pytest.mark.parametrize(
    ("text", "stop", "shown", "stopped"),
    [
        ("one\n\ntwo", ("\n\n",), "one", True),
        ("aab aac", ("aac",), "aab ", True),
        ("abcabd", ("abd",), "abc", True),
        ("no stop", ("zz",), "no stop", False),
        ("half END", ("ENDING",), "half END", False),
        ("xabcdx", ("abcd", "bc"), "xa", True),  # "bc" is complete first
        ("xabcx", ("abc", "bc"), "x", True),  # both are complete at once: the one that began first
        ("stop", ("stop",), "", True),
        ("plain", (), "plain", False),
    ],
)
def test_every_split_gives_the_same_text(text, stop, shown, stopped):
    for pieces in splits(text):
        assert run(pieces, stop) == (shown, stopped), pieces


def test_text_is_held_back_no_longer_than_needed():
    matcher = StopMatcher(("</end>",))
    assert matcher.push("a <") == "a "
    assert matcher.push("/b") == "</b"
    assert matcher.push("</en") == ""
    assert matcher.finish() == "</en"
