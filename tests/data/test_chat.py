"""Messages become the release's format to the letter, no message writes a control token, and a template reaches nothing."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_linear.data import ByteTokenizer, ChatFormat, HFTokenizer, load_tokenizer
from kimi_linear.data.chat import built_in_template, joined, remainder
from kimi_linear.testing import make_tiktoken_folder

TOOLS = [{"type": "function", "function": {"name": "get_time", "parameters": {"zone": "é <'&'>"}}}]
CALL = {
    "id": "functions.get_time:0",
    "type": "function",
    "function": {"name": "get_time", "arguments": '{"zone":  "UTC"}'},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_tiktoken_folder(tmp_path_factory.mktemp("vocabulary")))


@pytest.fixture(scope="module")
def chat(tokenizer):
    return ChatFormat(tokenizer)


def said(chat, messages, **more):
    return chat.spelled(chat.render(messages, **more))


def user(text):
    return [{"role": "user", "content": text}]


def test_a_conversation_in_the_release_s_format(chat):
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "functions.get_time:0", "content": "12:00"},
        {"role": "assistant", "content": "Noon."},
        {
            "role": "user",
            "name": "ann",
            "content": [{"type": "text", "text": "Thank"}, {"type": "text", "text": " you"}],
        },
    ]
    expected = (
        '<|im_system|>tool_declare<|im_middle|>[{"type":"function","function":{"name":"get_time",'
        '"parameters":{"zone":"é <\'&\'>"}}}]<|im_end|>'
        "<|im_system|>system<|im_middle|>You are a helpful assistant.<|im_end|>"
        "<|im_user|>user<|im_middle|>What time is it?<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>Let me look.<|tool_calls_section_begin|><|tool_call_begin|>"
        'functions.get_time:0<|tool_call_argument_begin|>{"zone":  "UTC"}<|tool_call_end|><|tool_calls_section_end|>'
        "<|im_end|><|im_system|>tool<|im_middle|>## Return of functions.get_time:0\n12:00<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>Noon.<|im_end|>"
        "<|im_user|>ann<|im_middle|>Thank you<|im_end|>"
    )
    assert said(chat, messages, tools=TOOLS, add_generation_prompt=False) == expected
    assert said(chat, messages, tools=TOOLS) == expected + "<|im_assistant|>assistant<|im_middle|>"


def test_the_control_ids_are_where_they_belong(chat, tokenizer):
    special = tokenizer.special_tokens
    ids = chat.encode(user("Hi"))
    assert ids == [
        special["<|im_user|>"], *tokenizer.encode("user"), special["<|im_middle|>"], *tokenizer.encode("Hi"),
        special["<|im_end|>"], special["<|im_assistant|>"], *tokenizer.encode("assistant"), special["<|im_middle|>"],
    ]  # fmt: skip
    assert chat.parts_of(ids) == chat.render(user("Hi"))


def test_calls_without_an_id_are_numbered_through_the_chat(chat):
    call = {"function": {"name": "f", "arguments": {"a": "é", "b": 1}}}
    parts = chat.render(
        [{"role": "assistant", "tool_calls": [call, call]}, {"role": "assistant", "tool_calls": [call]}]
    )
    texts = [part for part in parts if isinstance(part, str)]
    assert [text for text in texts if text.startswith("functions")] == [f"functions.f:{i}" for i in range(3)]
    assert texts.count('{"a": "é", "b": 1}') == 3


SPELLINGS = [
    "<|im_end|>",
    "<|im_user|>",
    "[EOS]",
    "<|",
    "im_",
    "end|>",
    "<",
    "|>",
    "[",
    "]",
    "[EO",
    "S]",
    "x",
    " ",
    "é",
    "\n",
]
EVIL = st.lists(st.sampled_from(SPELLINGS), max_size=8).map("".join)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(texts=st.lists(EVIL, min_size=7, max_size=7))
def test_no_message_writes_a_control_token(chat, tokenizer, texts):
    """Wherever the text comes in, and however its halves are dealt out, the control ids are those of harmless words."""

    def chat_of(a, b, c, d, e, f, g):
        return [
            {"role": "system", "content": a},
            {"role": "user", "name": f"n{b}", "content": [{"type": "text", "text": b}, {"type": "text", "text": c}]},
            {"role": "assistant", "content": d, "tool_calls": [{"id": f"i{e}", "function": {"name": f"f{e}", "arguments": {e: f}}}]},
            {"role": "tool", "tool_call_id": f"i{e}", "content": g},
        ]  # fmt: skip

    def tools_of(text):
        return [{"type": "function", "function": {"name": text, "description": text}}]

    harmless = chat.render(chat_of(*["x"] * 7), tools=tools_of("x"))
    parts = chat.render(chat_of(*texts), tools=tools_of(texts[0]))
    assert [part for part in parts if isinstance(part, int)] == [part for part in harmless if isinstance(part, int)]
    spelled = chat.spelled(parts)
    for text in (texts[0], texts[1] + texts[2], texts[3], f"## Return of i{texts[4]}\n{texts[6]}"):
        assert text in spelled
    assert (
        json.loads(next(p for p in parts if isinstance(p, str) and p.startswith("[{")))[0]["function"]["name"]
        == texts[0]
    )
    ids = tokenizer.encode_parts(parts)
    assert chat.parts_of(ids) == parts
    assert tokenizer.decode(ids) == spelled


def test_a_template_may_take_texts_apart(tokenizer):
    """Halves of a token from a template and from a message do not make one."""
    chat = ChatFormat(
        tokenizer,
        "{{ messages[1].content }}><{{ messages[0].content }}{{ messages[1].content | upper }}>{{ messages[0].content | trim }}<|im_end|>",
    )
    end = tokenizer.special_tokens["<|im_end|>"]
    messages = [*user("|im_end|>"), *user("<|im_end|")]
    assert chat.render(messages) == ("<|im_end|><|im_end|><|IM_END|>|im_end|>", end)


@pytest.fixture
def folder(tmp_path):
    return make_tiktoken_folder(tmp_path / "m", chat_template=False)


def test_the_folder_s_template_comes_first_and_the_built_in_last(folder):
    config = folder / "tokenizer_config.json"
    values = json.loads(config.read_text())
    assert said(ChatFormat(load_tokenizer(folder)), user("x")).startswith("<|im_user|>user<|im_middle|>x<|im_end|>")
    config.write_text(json.dumps(values | {"chat_template": "A{{ messages[0].content }}"}))
    assert said(ChatFormat(load_tokenizer(folder)), user("x")) == "Ax"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D{{ messages[0].content }}"}]
    config.write_text(json.dumps(values | {"chat_template": named}))
    assert said(ChatFormat(load_tokenizer(folder)), user("x")) == "Dx"
    (folder / "chat_template.jinja").write_text("B{{ bos_token }}{{ messages[0].content }}{{ thinking }}")
    tokenizer = load_tokenizer(folder)
    assert ChatFormat(tokenizer).render(user("x"), variables={"thinking": False}) == ("B", 768, "xFalse")
    assert said(ChatFormat(tokenizer, "C"), user("x")) == "C"
    config.write_text(json.dumps(values | {"chat_template": named[:1]}))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="several with one named 'default', got list"):
        load_tokenizer(folder)


def test_a_vocabulary_without_roles_cannot_chat():
    with pytest.raises(ValueError, match=r"chat: expected a model with a chat template.*kimi-linear generate"):
        ChatFormat(ByteTokenizer())
    # With a template of its own it can: this one needs no role tokens.
    assert ChatFormat(ByteTokenizer(), "{{ messages[0].content }}{{ eos_token }}").encode(user("a")) == [97, 256]
    assert ChatFormat(ByteTokenizer(), "{{ messages[0].content }}").encode(user("<|endoftext|>")) == list(
        b"<|endoftext|>"
    )


TEMPLATES = {
    "built in": built_in_template(),
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') | trim + '<|im_end|>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "blocks": """{%- set ns = namespace(n=0) -%}
{% for m in messages %}
    {% if m.role == 'tool' %}
        {% continue %}
    {% endif %}
    {% set ns.n = ns.n + 1 %}
    {% generation %}{{ ns.n }}: {{ m | tojson(indent=2) }}{% endgeneration %}

{% endfor %}
{{ tools | tojson }}{{ m is defined }}{{ bos_token }}""",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name, tokenizer):
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [
        {"role": "system", "content": "Sei höflich. <b>'&'</b>"},
        {"role": "user", "content": " x \n"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": CALL["id"], "content": "12"},
    ]
    theirs, _ = render_jinja_template(
        [messages], tools=TOOLS,
        chat_template=TEMPLATES[name], add_generation_prompt=True, bos_token="[BOS]",
    )  # fmt: skip
    assert said(ChatFormat(tokenizer, TEMPLATES[name]), messages, tools=TOOLS) == theirs[0]


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'a': 1}) }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ lipsum.__globals__['os'] }}",
    "{{ '{0.__class__}'.format(messages) }}x{{ ('%s' % 1).__class__.__base__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ range(10**9) | list }}",
    "{{ 1 // 0 }}",
    "{{ raise_exception('no system prompt, please') }}",
    "{% for a in range(9999) %}{% for b in range(99) %}{{ 'x' * 999 }}{% endfor %}{% endfor %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_reaches_nothing(template, tokenizer, monkeypatch):
    monkeypatch.setattr("kimi_linear.data.chat.MAX_RENDERED", 10**6)
    messages = user("x")
    with pytest.raises(ValueError, match=r"^chat template: .*; change the messages, or the template of the folder$"):
        ChatFormat(tokenizer, template).render(messages)
    assert messages == [{"role": "user", "content": "x"}]


def test_a_template_that_does_not_parse_is_refused_with_its_line(tokenizer):
    with pytest.raises(ValueError, match=r"chat template, line 2: expected jinja"):
        ChatFormat(tokenizer, "a\n{% if %}")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: expected at least one"),
        ("Hi", "messages: expected a list of messages, got 'Hi'"),
        ([5], r"messages\[0\]: expected an object"),
        ([{"content": "x"}], r"messages\[0\]\.role: expected a text, got None"),
        ([{"role": "user"}], r"messages\[0\]\.content: expected a text or a list of text parts, got None"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content: expected a text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], r"content\[0\]: .*reads text alone"),
        ([{"role": "user", "content": [{"type": "text", "text": "x", "cache": 1}]}], r"content\[0\]: expected"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\]\.tool_call_id: expected a text, got None"),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], r"tool_calls: expected only in an assistant's"),
        ([{"role": "assistant", "tool_calls": [{}]}], r"tool_calls\[0\]: expected"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}], r"function\.arguments: expected JSON"),
        (
            [{"role": "assistant", "tool_calls": [CALL | {"type": "custom"}]}],
            r"\.type: expected 'function', got 'custom'",
        ),
        ([{"role": "user", "content": "x", "reasoning": "y"}], r"messages\[0\]\.reasoning: expected one of role"),
        ([{"role": "user", "content": "x", "extra": {1: 2}}], r"messages\[0\]\.extra: expected texts as keys, got 1"),
        ([{"role": "user", "content": "x", "extra": object()}], r"messages\[0\]\.extra: expected a JSON value"),
    ],
)
def test_messages_of_another_form_are_refused(tokenizer, messages, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ChatFormat(NoTemplate(tokenizer)).render(messages)


def test_nothing_is_dropped(chat, tokenizer):
    built_in = ChatFormat(NoTemplate(tokenizer))
    with pytest.raises(ValueError, match="variables: the built-in chat template reads none, got thinking"):
        built_in.render(user("x"), variables={"thinking": True})
    with pytest.raises(TypeError, match=r"tools\[0\]: expected an object"):
        chat.render(user("x"), tools=["f"])
    with pytest.raises(TypeError, match=r"tools: expected a list"):
        chat.render(user("x"), tools={"f": 1})


class NoTemplate:
    """A tokenizer whose folder has no chat template."""

    chat_template = None

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


def test_a_tokenizer_json_keeps_messages_apart_too(tmp_path):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    characters = {chr(i): i for i in range(33, 127)} | {"▁": 127}
    backend = Tokenizer(models.BPE(characters, []))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken("<word>", special=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, HFTokenizer)
    begin, end, word = (backend.token_to_id(name) for name in ("<s>", "</s>", "<word>"))
    assert tokenizer.special_tokens == {"<s>": begin, "</s>": end}
    spelled = [ord(c) for c in "</s>"]
    assert tokenizer.encode("a</s><word>") == [127, ord("a"), *spelled, word]
    assert tokenizer.encode("</s>", special=True) == [end]
    assert tokenizer.encode_all(["</s>"])[0].tolist() == [127, *spelled]
    chat = ChatFormat(tokenizer, "<s>{{ messages[0].content }}</s>")
    # As the library reads the text as a whole: no space in front of what follows a token.
    assert chat.encode(user("hi")) == backend.encode("<s>hi</s>", add_special_tokens=False).ids
    assert chat.encode(user("</s>")) == [begin, 127, *spelled, end]


def test_parts_join_and_are_taken_off():
    assert joined(["a", "", "b", 1, "", 2, "c"]) == ("ab", 1, 2, "c")
    assert remainder(("ab", 1, "cd"), ()) == ("ab", 1, "cd")
    assert remainder(("ab", 1, "cd"), ("ab", 1, "c")) == ("d",)
    assert remainder(("ab", 1, "cd"), ("ab", 1)) == ("cd",)
    assert remainder(("ab", 1, "cd"), ("ab", 1, "cd")) == ()
    assert remainder(("ab", 1, "cd"), ("a",)) == ("b", 1, "cd")
    assert remainder(("ab", 1, "cd"), ("ab", 2)) is None
    assert remainder(("ab", 1, "cd"), ("ab", 1, "ce")) is None
    assert remainder(("ab", 1), ("ab", 1, "c")) is None
    assert remainder(("ab", 1), ("ab", "b")) is None
