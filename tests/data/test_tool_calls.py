"""Tool calls are read wherever the text is cut, ids and spellings are told apart, and no text is lost."""

import itertools
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_linear.data import ChatFormat, TextDelta, ToolCallDelta, ToolCallParser, load_tokenizer, parse_tool_calls
from kimi_linear.data.tool_calls import ARGUMENTS_BEGIN, CALL_BEGIN, CALL_END, MARKS, SECTION_BEGIN, SECTION_END
from kimi_linear.testing import make_tiktoken_folder

OURS = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
TWO = (
    f'Let me see. {SECTION_BEGIN}{CALL_BEGIN}functions.look:0{ARGUMENTS_BEGIN}{{"where": "漢字"}}{CALL_END}'
    f"{CALL_BEGIN} functions.a.b:1 {ARGUMENTS_BEGIN}{{}}{CALL_END}{SECTION_END}Done."
)
SOUP = st.lists(
    st.sampled_from([*MARKS, "functions.f:0", "f:1", "call_7", '{"a": 1}', " ", "\n", "text", "<|tool", "é", "<", "|>"]),
    max_size=12,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_tiktoken_folder(tmp_path_factory.mktemp("vocabulary")))


def read(pieces, tokenizer=None):
    """(parser, all deltas)."""
    parser = ToolCallParser(tokenizer)
    deltas = [delta for piece in pieces for delta in parser.push(piece)]
    return parser, [*deltas, *parser.finish()]


def told(deltas):
    """What a reader of the deltas knows: the text, and (id, name, arguments) of each call."""
    text, calls = "", []
    for delta in deltas:
        if isinstance(delta, TextDelta):
            assert delta.text
            text += delta.text
        elif delta.name is not None:
            assert delta.index == len(calls)
            calls.append((delta.id, delta.name, delta.arguments))
        else:
            assert delta.id is None
            calls[delta.index] = (*calls[delta.index][:2], calls[delta.index][2] + delta.arguments)
    return text, calls


def known(parser):
    return parser.text, [(call.id, call.name, call.arguments) for call in parser.calls]


def test_calls_and_text_come_apart():
    text, calls = parse_tool_calls(TWO)
    assert text == "Let me see. Done."
    assert [(c.id, c.name, c.parsed(), c.closed) for c in calls] == [
        ("functions.look:0", "look", {"where": "漢字"}, True),
        ("functions.a.b:1", "a.b", {}, True),
    ]


def test_deltas_come_as_soon_as_they_are_certain():
    parser = ToolCallParser()
    assert parser.push("a <|tool_ca") == [TextDelta(text="a ")]
    assert parser.push("t") == [TextDelta(text="<|tool_cat")]
    assert parser.push(f"{CALL_BEGIN}functions.f:3") == []
    assert parser.push(f"{ARGUMENTS_BEGIN}{{") == [
        ToolCallDelta(index=0, id="functions.f:3", name="f"),
        ToolCallDelta(index=0, arguments="{"),
    ]
    assert parser.push("}<|tool_call_en") == [ToolCallDelta(index=0, arguments="}")]
    assert not parser.calls[0].closed
    assert parser.push("d|>") == []
    assert parser.calls[0].closed
    assert parser.finish() == []


@OURS
@given(cuts=st.sets(st.integers(1, len(TWO) - 1)))
def test_it_does_not_matter_where_the_text_is_cut(cuts):
    ends = [0, *sorted(cuts), len(TWO)]
    parser, deltas = read([TWO[a:b] for a, b in itertools.pairwise(ends)])
    whole, calls = parse_tool_calls(TWO)
    assert told(deltas) == known(parser) == (whole, [(c.id, c.name, c.arguments) for c in calls])


def squeezed(text):
    """Without white space and the marks of sections: those are all that a parser may leave out."""
    return re.sub(r"\s", "", text.replace(SECTION_BEGIN, "").replace(SECTION_END, ""))


@OURS
@given(pieces=SOUP)
def test_no_text_is_lost_however_broken_the_answer(pieces):
    """The deltas, written out again in order, are the answer."""
    parser, deltas = read(pieces)
    assert told(deltas) == known(parser)
    out, open_call = "", None
    for delta in deltas:
        if isinstance(delta, TextDelta) or delta.name is not None:
            out += CALL_END if open_call is not None and parser.calls[open_call].closed else ""
            open_call = None
        if isinstance(delta, TextDelta):
            out += delta.text
        else:
            out += "" if delta.name is None else CALL_BEGIN + delta.id + ARGUMENTS_BEGIN
            out, open_call = out + delta.arguments, delta.index
    out += CALL_END if open_call is not None and parser.calls[open_call].closed else ""
    assert squeezed(out) == squeezed("".join(pieces))


@OURS
@given(pieces=SOUP)
def test_ids_read_as_texts_do(tokenizer, pieces):
    """Marks as ids and everything else as ordinary tokens; a spelling is read the same when no mark is made of halves."""
    by_id = [tokenizer.special_tokens[p] if p in MARKS else p for p in pieces]
    parser, deltas = read(tokenizer.encode_parts(by_id), tokenizer)
    assert told(deltas) == known(parser)
    if "".join(pieces).count("<|tool") == sum(piece in MARKS for piece in pieces):
        assert known(parser) == known(read(["".join(pieces)])[0])


def test_a_mark_spelled_in_ordinary_tokens_is_text(tokenizer):
    parser, _ = read(tokenizer.encode(TWO), tokenizer)
    assert known(parser) == (TWO, [])
    parser, _ = read(tokenizer.encode(TWO, special=True), tokenizer)
    assert len(parser.calls) == 2


def test_a_character_that_a_mark_breaks_off_is_shown(tokenizer):
    begin = tokenizer.special_tokens[CALL_BEGIN]
    assert known(read([0xE6, 0xBC, begin], tokenizer)[0]) == (f"\ufffd{CALL_BEGIN}", [])


@pytest.mark.parametrize(
    ("answer", "text", "calls"),
    [
        (f"{CALL_BEGIN}functions.f:0{ARGUMENTS_BEGIN}{{}}{CALL_END}", "", [("f", "{}", True)]),
        (f"a{CALL_BEGIN}functions.f:0{ARGUMENTS_BEGIN}{{", "a", [("f", "{", False)]),
        (f"a{CALL_BEGIN}functions.f:0", f"a{CALL_BEGIN}functions.f:0", []),
        (f"a{CALL_BEGIN}functions.f:0{CALL_END}b", f"a{CALL_BEGIN}functions.f:0{CALL_END}b", []),
        (
            f"{CALL_BEGIN}call_7{ARGUMENTS_BEGIN}{{}}{CALL_END}",
            f"{CALL_BEGIN}call_7{ARGUMENTS_BEGIN}{{}}{CALL_END}",
            [],
        ),
        (f"{SECTION_BEGIN}so {CALL_BEGIN}f:0{ARGUMENTS_BEGIN}1{CALL_END}\n{SECTION_END}", "so ", [("f", "1", True)]),
        (f"x{SECTION_END}y", f"x{SECTION_END}y", []),
        (f"{ARGUMENTS_BEGIN}", ARGUMENTS_BEGIN, []),
        (
            f"{CALL_BEGIN}f:0{ARGUMENTS_BEGIN}{{}}{CALL_BEGIN}g:1{ARGUMENTS_BEGIN}[]{SECTION_END}",
            SECTION_END,
            [("f", "{}", False), ("g", "[]", False)],
        ),
        (
            f"{SECTION_BEGIN}{CALL_BEGIN}f:0{ARGUMENTS_BEGIN}{{}}{SECTION_END}after",
            "after",
            [("f", "{}", False)],
        ),
        ("<|tool_call_beg", "<|tool_call_beg", []),
        ("", "", []),
    ],
)
def test_what_is_no_call_is_text(answer, text, calls):
    said, made = parse_tool_calls(answer)
    assert (said, [(c.name, c.arguments, c.closed) for c in made]) == (text, calls)


@pytest.mark.parametrize("arguments", ["", "{", "[1]", "5", "{" * 100_000, '{"a": }'])
def test_broken_arguments_are_an_error_when_they_are_asked_for(arguments):
    _, calls = parse_tool_calls(f"{CALL_BEGIN}functions.f:0{ARGUMENTS_BEGIN}{arguments}{CALL_END}")
    assert calls[0].arguments == arguments
    with pytest.raises(ValueError, match=r"functions\.f:0: expected"):
        calls[0].parsed()


def test_ids_and_texts_are_not_mixed_up(tokenizer):
    with pytest.raises(TypeError, match="expected a text, as no tokenizer was given, got 5"):
        ToolCallParser().push(5)
    with pytest.raises(TypeError, match="expected an id, as a tokenizer was given, got 'x'"):
        ToolCallParser(tokenizer).push("x")


def test_what_was_read_is_rendered_again_to_the_same_ids(tokenizer):
    """A chat goes on from the state of the model only if this holds."""
    chat = ChatFormat(tokenizer)
    question = [{"role": "user", "content": "Where?"}]
    answer = TWO.replace(" functions.a.b:1 ", "functions.a.b:1").removesuffix("Done.")
    parser, _ = read(tokenizer.encode(answer, special=True), tokenizer)
    prompt, whole = chat.render(question), chat.render([*question, parser.message()], add_generation_prompt=False)
    assert chat.spelled(whole) == chat.spelled(prompt) + answer + "<|im_end|>"
    assert parser.message()["content"] == "Let me see. "
