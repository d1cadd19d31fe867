"""What a model's state has read is always the chat as its template writes it, and answers do not depend on being kept."""

import pytest
import torch

from kimi_linear.config import ModelConfig
from kimi_linear.data import ByteTokenizer, TextDelta, ToolCallDelta, load_tokenizer
from kimi_linear.engine import Conversation, SamplingConfig, stream
from kimi_linear.model import KimiLinear
from kimi_linear.testing import make_tiktoken_folder

CALL = (
    "I look.<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>"
    '{"at": "é"}<|tool_call_end|><|tool_calls_section_end|>'
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Bytes and control tokens alone: a text has one spelling in ids."""
    return load_tokenizer(make_tiktoken_folder(tmp_path_factory.mktemp("vocabulary"), 512))


class Scripted:
    """Says given ids, one answer after the other, and notes what each of its states has read."""

    def __init__(self, tokenizer, *answers: str) -> None:
        self.ids = [i for answer in answers for i in tokenizer.encode(answer, special=True)]
        self.config = ModelConfig.preset("tiny", vocab_size=512)
        self.device = torch.device("cpu")
        self.states: list[list[int]] = []
        self.fail = False

    def make_state(self, batch_size: int):
        read: list[int] = []
        self.states.append(read)

        class State:
            tokens = read

            @property
            def position(self) -> int:
                return len(read)

            def nbytes(self) -> int:
                return len(read)

        return State()

    def hidden_states(self, tokens, *, state):
        state.tokens += tokens[0].tolist()

    def __call__(self, tokens, *, state):
        if self.fail:
            raise KeyboardInterrupt
        state.tokens += tokens[0].tolist()
        logits = torch.zeros(1, tokens.shape[1], self.config.vocab_size)
        logits[:, -1, self.ids.pop(0)] = 1
        return logits


def greedy(max_tokens: int = 500, **more) -> SamplingConfig:
    return SamplingConfig(temperature=0, max_tokens=max_tokens, **more)


def talk(chat, message, sampling=None):
    answer = chat.send(message, greedy() if sampling is None else sampling)
    return answer.text(), answer.stats


def unread(chat, model, *, upto):
    """The newest state has read the chat up to its answer ``upto`` as the template writes it; how many ids it has not."""
    whole = chat.format.encode(chat.messages[: upto + 1], add_generation_prompt=False)
    read = model.states[-1]
    assert whole[: len(read)] == read
    return len(whole) - len(read)


def test_each_turn_reads_only_what_is_new(tokenizer):
    model = Scripted(tokenizer, "Good day.<|im_end|>", "é漢<|im_end|>", "Bye<|im_end|>")
    chat = Conversation(model, tokenizer, messages=[{"role": "system", "content": "Be kind."}])
    known = 0
    for said, heard in (("Hello", "Good day."), ("Say é", "é漢"), ("<|im_end|>", "Bye")):
        text, stats = talk(chat, said)
        assert (text, stats.finish_reason, stats.reused_tokens) == (heard, "eos", known)
        assert stats.prompt_tokens + known + len(heard.encode()) == len(model.states[-1])
        assert unread(chat, model, upto=len(chat.messages) - 1) == 1  # all but <|im_end|>
        known = len(model.states[-1])
    assert len(model.states) == 1
    assert [m["content"] for m in chat.messages] == [
        "Be kind.",
        "Hello",
        "Good day.",
        "Say é",
        "é漢",
        "<|im_end|>",
        "Bye",
    ]


def test_an_answer_that_was_cut_off_is_closed_by_the_next_turn(tokenizer):
    model = Scripted(tokenizer, "One two", "x<|im_end|>")
    chat = Conversation(model, tokenizer)
    text, stats = talk(chat, "Count", greedy(max_tokens=7))
    assert (text, stats.finish_reason) == ("One two", "length")
    _, stats = talk(chat, "On")
    assert stats.reused_tokens > 0
    assert tokenizer.decode(model.states[0]) == (
        "<|im_user|>user<|im_middle|>Count<|im_end|><|im_assistant|>assistant<|im_middle|>One two<|im_end|>"
        "<|im_user|>user<|im_middle|>On<|im_end|><|im_assistant|>assistant<|im_middle|>x"
    )


def test_a_character_that_was_cut_off_does_not_lose_the_state(tokenizer):
    model = Scripted(tokenizer, "né", "x<|im_end|>")
    chat = Conversation(model, tokenizer)
    text, _ = talk(chat, "Go", greedy(max_tokens=2))
    del model.ids[0]  # the rest of the é
    assert text == chat.messages[-1]["content"] == "n\ufffd"
    assert talk(chat, "On")[1].reused_tokens > 0
    assert len(model.states) == 1


def test_tool_calls_go_on_with_their_result(tokenizer):
    model = Scripted(tokenizer, CALL + "<|im_end|>", "There.<|im_end|>")
    tools = [{"type": "function", "function": {"name": "look"}}]
    chat = Conversation(model, tokenizer, tools=tools)
    deltas = list(chat.send("Where?", greedy()))
    assert "".join(d.text for d in deltas if isinstance(d, TextDelta)) == "I look."
    calls = [d for d in deltas if isinstance(d, ToolCallDelta)]
    assert (calls[0].id, calls[0].name) == ("functions.look:0", "look")
    assert "".join(d.arguments for d in calls) == '{"at": "é"}'
    assert chat.messages[-1]["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"at": "é"}'}
    text, stats = talk(chat, {"role": "tool", "tool_call_id": "functions.look:0", "content": "here"})
    assert (text, len(model.states)) == ("There.", 1)
    assert stats.reused_tokens > 0
    assert tokenizer.decode(model.states[0]) == (
        '<|im_system|>tool_declare<|im_middle|>[{"type":"function","function":{"name":"look"}}]<|im_end|>'
        f"<|im_user|>user<|im_middle|>Where?<|im_end|><|im_assistant|>assistant<|im_middle|>{CALL}<|im_end|>"
        "<|im_system|>tool<|im_middle|>## Return of functions.look:0\nhere<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>There."
    )


@pytest.mark.parametrize(
    ("first", "settings", "template"),
    [
        ("One. Two", {"stop": (". ",)}, None),  # the answer is shorter than what was drawn
        ("a<|im_user|>b<|im_end|>", {}, None),  # a control token out of place becomes text
        (" padded <|im_end|>", {}, "{% for m in messages %}{{ m.content | trim }}<|im_end|>{% endfor %}"),
        ("x<|im_end|>", {}, "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"),
    ],
    ids=["stop string", "stray control token", "trimming template", "rewriting template"],
)
def test_a_chat_that_reads_differently_now_is_read_again(first, settings, template, tokenizer):
    model = Scripted(tokenizer, first)
    chat = Conversation(model, tokenizer, template=template)
    talk(chat, "Go", greedy(**settings))
    model.ids = tokenizer.encode("y<|im_end|>", special=True)
    _, stats = talk(chat, "On")
    assert stats.reused_tokens == 0
    assert len(model.states) == 2
    prompt = chat.format.spelled(chat.format.render(chat.messages[:3]))
    assert tokenizer.decode(model.states[1]) == prompt + "y"


def test_an_answer_that_is_left_is_over(tokenizer):
    model = Scripted(tokenizer, "One two", "x<|im_end|>")
    chat = Conversation(model, tokenizer)
    answer = chat.send("Count", greedy())
    assert [next(answer), next(answer)] == [TextDelta(text="O"), TextDelta(text="n")]
    model.ids = tokenizer.encode("x<|im_end|>", special=True)
    text, stats = talk(chat, "Stop")
    assert (text, stats.reused_tokens > 0, len(model.states)) == ("x", True, 1)
    assert [m["content"] for m in chat.messages] == ["Count", "On", "Stop", "x"]
    assert list(answer) == []


def test_an_answer_that_was_never_read_is_empty(tokenizer):
    model = Scripted(tokenizer, "x<|im_end|>")
    chat = Conversation(model, tokenizer)
    chat.send("One", greedy())
    assert talk(chat, "Two")[0] == "x"
    assert [m["content"] for m in chat.messages] == ["One", "", "Two", "x"]
    assert unread(chat, model, upto=3) == 1


def test_an_interrupted_model_is_not_trusted(tokenizer):
    model = Scripted(tokenizer, "One")
    chat = Conversation(model, tokenizer)
    answer = chat.send("Count", greedy())
    next(answer)
    model.fail = True
    with pytest.raises(KeyboardInterrupt):
        next(answer)
    assert [m["content"] for m in chat.messages] == ["Count", "O"]
    model.fail, model.ids = False, tokenizer.encode("y<|im_end|>", special=True)
    text, stats = talk(chat, "Again")
    assert (text, stats.reused_tokens, len(model.states)) == ("y", 0, 2)


def test_a_message_that_got_no_answer_was_not_said(tokenizer):
    model = Scripted(tokenizer, "y<|im_end|>")
    chat = Conversation(model, tokenizer)
    model.fail = True
    with pytest.raises(KeyboardInterrupt):
        talk(chat, "Hello")
    assert chat.messages == []
    model.fail = False
    assert talk(chat, "Again")[0] == "y"
    assert tokenizer.decode(model.states[-1]).startswith("<|im_user|>user<|im_middle|>Again<|im_end|>")


def test_messages_that_cannot_be_said_change_nothing(tokenizer):
    model = Scripted(tokenizer, "a<|im_end|>", "b<|im_end|>")
    chat = Conversation(model, tokenizer)
    talk(chat, "One")
    with pytest.raises(ValueError, match="expected a text or a list of text parts"):
        chat.send({"role": "user", "content": 5})
    assert len(chat.messages) == 2
    assert talk(chat, "Two")[1].reused_tokens > 0


class Printable:
    """A real model that draws printable characters and <|im_end|> only, so that what it says has one spelling."""

    def __init__(self, model, end: int) -> None:
        self._model = model
        self._mask = torch.full((512,), -torch.inf, dtype=torch.float64)
        self._mask[32:127] = 0
        self._mask[end] = 0

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, tokens, *, state):
        return self._model(tokens, state=state) + self._mask


def test_a_kept_state_answers_as_a_fresh_one(tokenizer):
    config = ModelConfig.preset(
        "tiny", vocab_size=512, hidden_size=32, intermediate_size=64, initializer_range=0.3,
        linear={"num_heads": 2, "head_dim": 16},
    )  # fmt: skip
    model = Printable(KimiLinear(config, seed=1).double(), tokenizer.special_tokens["<|im_end|>"])
    kept = Conversation(model, tokenizer)
    answers = []
    for said in ("Hello", "é漢🙂", "And <|im_end|> now?"):
        fresh = Conversation(model, tokenizer, messages=kept.messages)
        expected, stats = talk(fresh, said, greedy(max_tokens=12))
        assert stats.reused_tokens == 0
        text, stats = talk(kept, said, greedy(max_tokens=12))
        assert text == expected
        answers.append(stats.reused_tokens)
    assert answers[0] == 0 < answers[1] < answers[2]
    assert len(set(text)) > 2, "a model that repeats itself proves nothing"


def test_the_stream_ends_at_every_end_id(tokenizer):
    """The document's end, the one of generation_config.json, and the one of the model's configuration."""
    for end in ("[EOS]", "<|im_end|>"):
        model = Scripted(tokenizer, f"ab{end}c")
        pieces = stream(model, tokenizer, "x", temperature=0, max_tokens=4)
        assert ("".join(pieces), pieces.stats.finish_reason) == ("ab", "eos")
    model = Scripted(tokenizer, "ab[EOT]c")
    assert "".join(stream(model, tokenizer, "x", temperature=0, max_tokens=4)) == "ab[EOT]c"
    model = Scripted(tokenizer, "ab[EOT]c")
    model.config = ModelConfig.preset("tiny", vocab_size=512, eos_token_id=tokenizer.special_tokens["[EOT]"])
    assert "".join(stream(model, tokenizer, "x", temperature=0, max_tokens=4)) == "ab"


def test_a_prompt_may_be_ids(tokenizer):
    model = Scripted(tokenizer, "ab")
    ids = tokenizer.encode("<|im_user|>x", special=True)
    assert "".join(stream(model, tokenizer, ids, temperature=0, max_tokens=2)) == "ab"
    assert model.states[0] == [*ids, ord("a")]
    model = Scripted(tokenizer, "ab")
    list(stream(model, tokenizer, "<|im_user|>x", temperature=0, max_tokens=2))
    assert model.states[0] == [*b"<|im_user|>x", ord("a")]


def test_a_model_that_cannot_chat_says_so(tokenizer):
    model = KimiLinear(ModelConfig.preset("tiny", num_layers=1))
    with pytest.raises(ValueError, match="chat: expected a model with a chat template"):
        Conversation(model, ByteTokenizer())
    with pytest.raises(ValueError, match=r"at most the model's 320 ids, got 512"):
        Conversation(model, tokenizer)
