"""Our models under lm-eval: the numbers are those of a plain forward pass and of our own evaluation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kimi_linear.data import Batch, ByteTokenizer
from kimi_linear.engine import stream
from kimi_linear.evals import Perplexity
from kimi_linear.integrations import lm_eval as integration
from kimi_linear.model import KimiLinear

from .local_task import answers, documents, evaluate
from .tiny import tiny_model

# lm-eval warns on import, and so does what it imports; our own warnings are errors as everywhere.
pytestmark = pytest.mark.filterwarnings("default", "error:::kimi_linear")


@pytest.fixture(scope="module")
def model() -> KimiLinear:
    return tiny_model()


def plain(model: KimiLinear, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One forward pass over one request."""
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        logprobs = model(ids).double().log_softmax(-1)[0, len(context) - 1 : -1]
    target = torch.tensor(continuation)
    return float(logprobs.gather(1, target[:, None]).sum()), bool((logprobs.argmax(-1) == target).all())


@pytest.mark.parametrize("batch_tokens", [1, 37, 8192])
def test_scores_are_those_of_each_request_alone(model: KimiLinear, batch_tokens: int) -> None:
    """Lengths of every kind, packed alone, by a few, all together; one continuation is the greedy one."""
    generator = np.random.default_rng(0)
    pairs = [
        (generator.integers(0, 256, a).tolist(), generator.integers(0, 256, b).tolist())
        for a, b in [(1, 1), (5, 3), (70, 2), (1, 40), (12, 0), (3, 3)]
    ]
    with torch.no_grad():
        pairs.append((pairs[1][0], [int(model(torch.tensor([pairs[1][0]]))[0, -1].argmax())]))
    found = integration.score(model, pairs, batch_tokens=batch_tokens)
    for (context, continuation), (logprob, greedy) in zip(pairs, found, strict=True):
        expected = plain(model, context, continuation) if continuation else (0.0, True)
        assert math.isclose(logprob, expected[0], abs_tol=1e-4)
        assert greedy == expected[1]
    assert found[-1].greedy
    assert not found[3].greedy


@pytest.fixture(scope="module")
def result(model: KimiLinear, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return evaluate(integration.lm(model, ByteTokenizer(), max_new_tokens=5), tmp_path_factory.mktemp("tasks"))


def test_choices(model: KimiLinear, result: dict[str, Any]) -> None:
    expected, right = [], []
    for document in documents():
        context = ByteTokenizer().encode(document["question"])
        scores = [plain(model, context, ByteTokenizer().encode(" " + choice)) for choice in document["choices"]]
        expected += scores
        right.append(int(np.argmax([score for score, _ in scores])) == document["gold"])
    found = [response[0] for response in answers(result, "choice")]
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    np.testing.assert_allclose([a for a, _ in found], [a for a, _ in expected], atol=1e-4)
    assert result["results"]["choice"]["acc,none"] == np.mean(right)


def test_perplexity_is_that_of_our_own_evaluation(model: KimiLinear, result: dict[str, Any]) -> None:
    """lm-eval begins a document with its prefix token, as our packing does with the document before it."""
    encoded = [torch.tensor([256, *ByteTokenizer().encode(document["text"])]) for document in documents()]
    length = sum(len(ids) - 1 for ids in encoded)
    batch = Batch(
        tokens=torch.cat([ids[:-1] for ids in encoded])[None],
        targets=torch.cat([ids[1:] for ids in encoded])[None],
        cu_seqlens=torch.tensor([0, *np.cumsum([len(ids) - 1 for ids in encoded])], dtype=torch.int32),
    )
    ours = Perplexity(batches=lambda: [batch], bytes_per_token=1.0)(model)
    assert ours.metrics["tokens"] == length
    assert math.isclose(
        result["results"]["perplexity"]["bits_per_byte,none"], ours.metrics["bits_per_byte"], rel_tol=1e-6
    )


def test_generation_is_that_of_our_sampler(model: KimiLinear, result: dict[str, Any]) -> None:
    """Greedy, up to the stop string, which is no part of the answer."""
    found = [response[0] for response in answers(result, "generation")]
    for document, text in zip(documents(), found, strict=True):
        pieces = stream(model, ByteTokenizer(), document["question"], max_tokens=12, temperature=0, stop=("e",))
        assert text == "".join(pieces)
        assert "e" not in text
    assert len(set(found)) > 1


def test_a_window_reads_a_long_document_in_pieces(model: KimiLinear) -> None:
    from lm_eval.api.instance import Instance

    text = documents()[-1]["text"]
    request = [Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)]
    ids = [256, *ByteTokenizer().encode(text)]
    (whole,) = integration.lm(model, ByteTokenizer()).loglikelihood_rolling(request)
    assert math.isclose(whole, plain(model, ids[:1], ids[1:])[0], rel_tol=1e-6)
    (found,) = integration.lm(model, ByteTokenizer(), window=100).loglikelihood_rolling(request)
    # Every piece but the last begins a window of its own; the last is read after as much as the window holds.
    pieces = [ids[i : i + 101] for i in range(0, len(ids) - 1, 100)]
    rest = len(pieces[-1]) - 1
    expected = sum(plain(model, piece[:1], piece[1:])[0] for piece in pieces[:-1])
    expected += plain(model, ids[-101:-rest], ids[-rest:])[0]
    assert math.isclose(found, expected, rel_tol=1e-6)
    assert abs(found - whole) > 0.1


def test_chat_templates(model: KimiLinear, tmp_path: Path) -> None:
    """The control tokens that the template writes reach the model as such; without it the same text is only text."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}assistant:"
    tokenizer = ByteTokenizer(chat_template=template)
    result = evaluate(integration.lm(model, tokenizer), tmp_path, ("choice", "generation"), apply_chat_template=True)
    assert integration.lm(model, tokenizer).chat_template(True) == template
    found = [response[0][0] for response in answers(result, "choice")]
    contexts = [[*b"user: ", *d["question"].encode(), 256, *b"assistant:"] for d in documents()]
    expected = [
        plain(model, context, [*choice.encode()])[0]
        for context, document in zip(contexts, documents(), strict=True)
        for choice in document["choices"]
    ]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    texts = [response[0] for response in answers(result, "generation")]
    streams = [stream(model, tokenizer, c, max_tokens=12, temperature=0, stop=("e",)) for c in contexts]
    assert texts == ["".join(pieces) for pieces in streams]
    with pytest.raises(ValueError, match="gen_prefix"):
        integration.lm(model, tokenizer).apply_chat_template([], add_generation_prompt=False)


class Named(ByteTokenizer):
    """A tokenizer with no end and more ids than the model."""

    eos_id = None


def test_bad_arguments(model: KimiLinear) -> None:
    with pytest.raises(ValueError, match="batch_tokens: expected at least 1, got 0"):
        integration.lm(model, ByteTokenizer(), batch_tokens=0)
    big = Named()
    big.vocab_size = 5000
    with pytest.raises(ValueError, match="tokenizer: expected at most the model's 257 ids, got 5000"):
        integration.lm(model, big)
    headless = KimiLinear(dataclasses.replace(model.config, bos_token_id=None))
    with pytest.raises(ValueError, match="prefix_id: expected a token to begin with"):
        integration.lm(headless, Named())
    with pytest.raises(ValueError, match=r"pairs\[1\]: expected a context"):
        integration.score(model, [([1], [2]), ([], [2])])


@pytest.mark.parametrize(
    ("asked", "message"),
    [({"num_beams": 4}, "got also num_beams"), ({"repetition_penalty": 1.2}, "got also repetition_penalty")],
)
def test_settings_that_are_not_ours_are_refused(model: KimiLinear, asked: dict[str, Any], message: str) -> None:
    from lm_eval.api.instance import Instance

    request = [Instance(request_type="generate_until", doc={}, arguments=("a", {"until": ["\n"], **asked}), idx=0)]
    with pytest.raises(ValueError, match=message):
        integration.lm(model, ByteTokenizer()).generate_until(request)


def test_sampling_settings_arrive(model: KimiLinear) -> None:
    from lm_eval.api.instance import Instance

    asked = {"until": [], "do_sample": True, "temperature": 0.9, "top_k": 7, "seed": 5}
    request = [Instance(request_type="generate_until", doc={}, arguments=("abc", asked), idx=0)]
    (found,) = integration.lm(model, ByteTokenizer(), max_new_tokens=9).generate_until(request)
    expected = stream(model, ByteTokenizer(), "abc", max_tokens=9, temperature=0.9, top_k=7, seed=5)
    assert found == "".join(expected)


def test_without_lm_eval_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch, model: KimiLinear) -> None:
    import sys

    make: Callable[[], type] = integration._lm_class.__wrapped__
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ImportError, match=r"install it with pip install 'kimi-linear\[eval\]'"):
        make()
