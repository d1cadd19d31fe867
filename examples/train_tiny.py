"""Train a small hybrid on the Python standard library's source, in a few lines of the library.

Run it: python examples/train_tiny.py        (about four minutes on 2 cores; run it again and it resumes)
"""

import kimi_linear as kl
from kimi_linear.data import ByteTokenizer, stdlib_source, tokenize
from kimi_linear.training import TrainConfig, Trainer


def main(
    folder: str = "runs/train_tiny", steps: int = 500, batch_size: int = 16, max_bytes: int | None = None
) -> float:
    # Three KDA layers, then one of full attention without positions: one period of the released model's pattern.
    config = kl.ModelConfig.preset("tiny")
    model = kl.KimiLinear(config, seed=0)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters: {', '.join(config.layer_mixers)}")

    tokenizer = ByteTokenizer()
    corpus = tokenize(stdlib_source(max_bytes=max_bytes), tokenizer)
    train, held_out = corpus.split(validation=0.05)

    settings = TrainConfig(
        steps=steps, batch_size=batch_size, sequence_length=256, lr=2e-3, eval_every=100, eval_batches=8
    )
    trainer = Trainer(model, tokenizer, train, held_out, settings, folder)
    loss = float("nan")
    # A plain loop: leave it when you like, a checkpoint is saved, and the next run goes on from there.
    for at in trainer.run():
        loss = at.loss
        if at.val_loss is not None or at.step % 20 == 0:
            held = "" if at.val_loss is None else f"  held out {at.val_loss:.3f}"
            print(f"step {at.step}  loss {at.loss:.3f}{held}  {at.tokens_per_second:,.0f} tokens/s")

    for piece in kl.stream(model, tokenizer, "def ", max_tokens=120, seed=0):
        print(piece, end="", flush=True)
    print()
    return loss


if __name__ == "__main__":
    main()
