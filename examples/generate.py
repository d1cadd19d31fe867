"""Read a prompt once, continue it several ways: the state is a value that can be copied.

Run it on any model folder: python examples/generate.py runs/train "def main"
"""

import sys

import torch

import kimi_linear as kl
from kimi_linear.engine import SamplingConfig, generate_tokens


def main(folder: str, prompt: str = "def ", branches: int = 3, max_tokens: int = 48) -> list[str]:
    model, tokenizer = kl.load(folder)
    if tokenizer is None:
        raise SystemExit(f"{folder}: this model has no tokenizer; it reads ids, not text")
    ids = tokenizer.encode(prompt)

    # Everything the model knows of the prompt is in the state. For KDA layers its size does not depend on the prompt.
    state = model.make_state(1)
    with torch.inference_mode():
        model.hidden_states(torch.tensor([ids[:-1]]), state=state)
    print(f"{len(ids)} tokens read into {state.nbytes():,} bytes")

    texts = []
    for seed in range(branches):
        sampling = SamplingConfig(max_tokens=max_tokens, temperature=0.8, seed=seed)
        drawn = generate_tokens(
            model, ids[-1:], sampling, eos_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size, state=state.clone()
        )
        texts.append(tokenizer.decode(drawn))
        print(f"--- {seed}\n{prompt}{texts[-1]}")

    # The short way, for one continuation:
    for piece in kl.stream(model, tokenizer, prompt, max_tokens=max_tokens, seed=0):
        print(piece, end="", flush=True)
    print()
    return texts


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(f"usage: {sys.argv[0]} MODEL_FOLDER [PROMPT]")
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "def ")
