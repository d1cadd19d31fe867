"""Generation with carried state gives what recomputing everything gives, and text comes out whole."""

import pytest
import torch

from kimi_linear.config import ModelConfig
from kimi_linear.data import ByteTokenizer
from kimi_linear.engine import SamplingConfig, generate_tokens, stream
from kimi_linear.model import KimiLinear

GREEDY = SamplingConfig(temperature=0, max_tokens=12)
PROMPT = [(7 * i * i + 3 * i) % 256 for i in range(37)]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "linear": {"num_heads": 2, "head_dim": 16},
    "mla": {"num_heads": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
    # Larger weights than a training begins with: the answers must depend on the prompt.
    "initializer_range": 0.3,
}


def model_of(preset: str) -> KimiLinear:
    return KimiLinear(ModelConfig.preset(preset, **SMALL), seed=1).double()


def recomputed(model: KimiLinear, prompt: list[int], steps: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("preset", ["tiny", "tiny/mla", "tiny/mla-nope", "tiny/gdn", "tiny/mamba2", "tiny/simple-gla"])
@pytest.mark.parametrize("segment", [1, 5, 1024])
def test_carried_state_gives_what_recomputing_gives(preset, segment):
    model = model_of(preset)
    expected = recomputed(model, PROMPT, 12)
    assert list(generate_tokens(model, PROMPT, GREEDY, segment=segment)) == expected
    assert len(set(expected)) > 2, "a model that repeats itself proves nothing"


def test_a_state_is_continued():
    model = model_of("tiny")
    whole = list(generate_tokens(model, PROMPT, GREEDY))
    state = model.make_state(1)
    first = list(generate_tokens(model, PROMPT, SamplingConfig(temperature=0, max_tokens=5), state=state))
    # The last drawn token has not been read yet, so it is what comes next.
    rest = list(generate_tokens(model, first[-1:], SamplingConfig(temperature=0, max_tokens=7), state=state))
    assert first + rest == whole
    assert state.position == len(PROMPT) + 11


def test_the_seed_decides_the_text():
    model = model_of("tiny")

    def draw(seed: int) -> list[int]:
        return list(generate_tokens(model, PROMPT, SamplingConfig(temperature=1, seed=seed, max_tokens=20)))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_rows_of_the_embedding_beyond_the_tokenizer_are_never_drawn():
    model = model_of("tiny")
    hot = SamplingConfig(temperature=100, seed=0, max_tokens=60)
    assert max(generate_tokens(model, PROMPT, hot)) >= 257
    assert max(generate_tokens(model, PROMPT, hot, vocab_size=257)) < 257


def test_the_end_token_is_the_last():
    model = model_of("tiny")
    ids = list(generate_tokens(model, PROMPT, GREEDY))
    end = ids[4]
    assert list(generate_tokens(model, PROMPT, GREEDY, eos_id=end)) == ids[: ids.index(end) + 1]


def test_no_tokens_are_asked_for():
    assert list(generate_tokens(model_of("tiny"), PROMPT, SamplingConfig(max_tokens=0))) == []


def test_bad_input_is_refused_at_the_call():
    model = model_of("tiny")
    with pytest.raises(ValueError, match="prompt: expected at least one token"):
        generate_tokens(model, [], GREEDY)
    with pytest.raises(ValueError, match="segment: expected at least 1"):
        generate_tokens(model, PROMPT, GREEDY, segment=0)
    with pytest.raises(ValueError, match="got 320"):
        list(generate_tokens(model, [1, 320], GREEDY))


class Scripted:
    """Says a given text byte by byte, whatever it is asked: a model whose answers a test knows."""

    def __init__(self, text: bytes, *, eos: bool = False) -> None:
        self.ids = [*text, *([256] if eos else [])]
        self.config = ModelConfig.preset("tiny")
        self.device = torch.device("cpu")

    def make_state(self, batch_size: int):
        class State:
            position = 0

            def nbytes(self) -> int:
                return self.position

        return State()

    def hidden_states(self, tokens, *, state):
        state.position += tokens.shape[1]

    def __call__(self, tokens, *, state):
        self.first = getattr(self, "first", state.position)
        logits = torch.zeros(1, tokens.shape[1], self.config.vocab_size)
        logits[:, -1, self.ids[state.position - self.first]] = 1
        state.position += tokens.shape[1]
        return logits


def say(text: str | bytes, prompt: str = "abc", **settings) -> tuple[list[str], str | None]:
    script = text.encode() if isinstance(text, str) else text
    eos = settings.pop("eos", False)
    settings.setdefault("max_tokens", len(script) + eos)
    pieces = stream(Scripted(script, eos=eos), ByteTokenizer(), prompt, temperature=0, **settings)  # type: ignore[arg-type]
    shown = list(pieces)
    assert all(shown), "an empty piece"
    return shown, pieces.stats.finish_reason


def test_characters_are_never_split():
    assert say("aé漢🙂z") == (["a", "é", "漢", "🙂", "z"], "length")


def test_a_character_that_was_cut_off_is_shown_as_such():
    assert say("né", max_tokens=2) == (["n", "\N{REPLACEMENT CHARACTER}"], "length")


def test_stop_strings_cut_exactly():
    pieces, reason = say("one\n\ntwo", stop=["\n\n", "two"])
    assert ("".join(pieces), reason) == ("one", "stop")
    pieces, reason = say("one\n.two\n", stop=["\n\n"])
    assert ("".join(pieces), reason) == ("one\n.two\n", "length")


def test_the_end_of_a_document_ends_the_text():
    assert say("ab", eos=True) == (["a", "b"], "eos")


def test_what_was_held_back_is_shown_at_the_end_of_a_document():
    pieces, reason = say("ab", eos=True, stop=["bc"])
    assert ("".join(pieces), reason) == ("ab", "eos")


def test_an_empty_prompt_begins_a_document():
    pieces = stream(Scripted(b"x"), ByteTokenizer(), "", temperature=0, max_tokens=1)  # type: ignore[arg-type]
    assert (list(pieces), pieces.stats.prompt_tokens) == (["x"], 1)


def test_stats_say_what_was_done():
    model = model_of("tiny").float()
    pieces = stream(model, ByteTokenizer(), "hello", temperature=0, max_tokens=9)
    list(pieces)
    assert (pieces.stats.prompt_tokens, pieces.stats.generated_tokens) == (5, 9)
    state = model.make_state(1)
    model(torch.zeros(1, 13, dtype=torch.int64), state=state)  # the last drawn token was not read
    assert pieces.stats.state_bytes == state.nbytes()
    assert pieces.stats.prefill_seconds > 0
    assert pieces.stats.tokens_per_second == pytest.approx(8 / pieces.stats.decode_seconds)


def test_settings_are_checked_before_the_first_piece():
    model, tokenizer = model_of("tiny"), ByteTokenizer()
    with pytest.raises(ValueError, match="top_p"):
        stream(model, tokenizer, "x", top_p=2)
    with pytest.raises(TypeError, match="stop: expected a tuple of strings"):
        stream(model, tokenizer, "x", stop="end")


def test_a_tokenizer_of_another_model_is_refused():
    class Large(ByteTokenizer):
        vocab_size = 1000

    with pytest.raises(ValueError, match=r"at most the model's 320 ids, got 1000"):
        stream(model_of("tiny"), Large(), "x")
