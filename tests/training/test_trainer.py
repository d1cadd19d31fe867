"""The loop: it learns, resumes bit for bit, validates exactly, and stops before it spoils the weights."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kimi_linear.data import IGNORE, MQAR, Batch, ByteTokenizer, in_order
from kimi_linear.training import NonFiniteError, Trainer, latest, read_metrics

from .tiny_run import config, tiny_corpus, tiny_model


def losses(trainer, count=None):
    found = []
    for metrics in trainer.run():
        found.append(metrics.loss)
        if len(found) == count:
            break
    return found


def make(folder, model=None, data=None, val=None, **changes):
    return Trainer(model or tiny_model(), ByteTokenizer(), data or tiny_corpus(), val, config(**changes), folder)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_weights(one, two):
    for name, p in weights(one).items():
        assert torch.equal(p, two.get_parameter(name)), name


def test_learns_what_the_letter_before_says(tmp_path):
    """Letters by themselves are worth ln 16 = 2.77 nats, after the letter before ln 2 = 0.69: memory is needed."""
    train, held_out = tiny_corpus(documents=60).split(0.1)
    trainer = make(tmp_path, data=train, val=held_out, steps=60, batch_size=4, lr=1e-2, eval_every=30)
    metrics = list(trainer.run())
    assert metrics[0].loss == pytest.approx(math.log(257), abs=0.2)
    assert metrics[-1].val_loss < 1.5
    assert metrics[-1].val_perplexity == math.exp(metrics[-1].val_loss)
    assert [m.step for m in metrics if m.val_loss is not None] == [30, 60]


def test_first_loss_and_norm_are_those_of_the_model(tmp_path):
    corpus, model = tiny_corpus(), tiny_model()
    trainer = make(tmp_path, data=corpus, packing="packed")
    batch = next(make(tmp_path / "other", data=corpus, packing="packed")._stream)
    expected = F.cross_entropy(model(batch.tokens, cu_seqlens=batch.cu_seqlens)[0], batch.targets[0])
    norm = torch.stack([g.norm() for g in torch.autograd.grad(expected, list(model.parameters()))]).norm()
    metrics = next(trainer.run())
    assert metrics.loss == pytest.approx(expected.item(), rel=1e-6)
    assert metrics.grad_norm == pytest.approx(float(norm), rel=1e-5)
    assert metrics.tokens == batch.num_tokens == 64


def test_validation_is_the_mean_over_scored_tokens(tmp_path):
    corpus = tiny_corpus(documents=3)
    trainer = make(tmp_path, val=corpus, eval_every=1, eval_batches=100)
    nats, count = 0.0, 0
    for batch in in_order(corpus, batch_size=1, sequence_length=32):
        logits = trainer.model(batch.tokens)[0].double()
        nats += float(F.cross_entropy(logits, batch.targets[0], ignore_index=IGNORE, reduction="sum").detach())
        count += int((batch.targets != IGNORE).sum())
    assert count == corpus.num_tokens - 1
    assert trainer.validate() == pytest.approx(nats / count, rel=1e-6)


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("tiny", {"packing": "packed"}),
        ("tiny", {"optimizer": "muon", "schedule": "cosine"}),
        ("tiny-moe", {"optimizer": "muon"}),
        ("tiny", {"precision": "bf16"}),
    ],
)
def test_resumes_bit_for_bit(tmp_path, preset, changes):
    def model():
        moe = {"moe": {"num_experts": 4, "experts_per_token": 2, "expert_size": 16}} if preset == "tiny-moe" else {}
        return tiny_model(preset, **moe)

    whole = make(tmp_path / "whole", model(), **changes)
    expected = losses(whole)
    first = losses(make(tmp_path / "run", model(), **changes), count=4)
    resumed = make(tmp_path / "run", model(), **changes)
    assert (resumed.step, resumed.tokens) == (4, 4 * 64)
    assert first + losses(resumed) == expected
    assert_same_weights(whole.model, resumed.model)
    assert [line["loss"] for line in read_metrics(tmp_path / "run")] == expected
    assert losses(make(tmp_path / "run", model(), **changes)) == []


@pytest.mark.unpoisoned  # as in the other process, where torch's deterministic mode is off
def test_resumes_bit_for_bit_after_a_kill(tmp_path):
    expected = losses(make(tmp_path / "whole", save_every=3))
    script = Path(__file__).parent / "tiny_run.py"
    with subprocess.Popen([sys.executable, script, tmp_path / "run"], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            step, loss = line.split()
            assert float.fromhex(loss) == expected[int(step) - 1]
            if step == "8":
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    # Killed at once after step 8, so the newest checkpoint is of step 6.
    resumed = make(tmp_path / "run", save_every=3)
    assert resumed.step == 6
    assert losses(resumed) == expected[6:]


def test_ctrl_c_leaves_a_checkpoint_of_the_last_whole_step(tmp_path):
    """An interrupt in the middle of a forward pass: the step it breaks off is done again, on the same batch."""
    expected = losses(make(tmp_path / "whole"))
    trainer = make(tmp_path / "run")
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    trainer.model.model.norm.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        losses(trainer)
    assert latest(tmp_path / "run").name == "step-00000003"
    assert losses(make(tmp_path / "run")) == expected[3:]


def test_ctrl_c_in_an_update_waits_for_its_end(tmp_path):
    expected = losses(make(tmp_path / "whole"))
    trainer = make(tmp_path / "run")
    adamw = trainer._optimizers.parts["adamw"]
    adamw.register_step_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        losses(trainer)
    assert signal.getsignal(signal.SIGINT) is handler
    assert latest(tmp_path / "run").name == "step-00000001"
    assert losses(make(tmp_path / "run")) == expected[1:]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_step_changes_nothing_and_keeps_the_last_checkpoint(tmp_path, where):
    trainer = make(tmp_path, save_every=2)
    steps = trainer.run()
    for _ in range(3):
        next(steps)
    before = weights(trainer.model)
    norm = trainer.model.model.norm
    if where == "loss":
        norm.register_forward_hook(lambda module, inputs, output: output * math.nan)
    else:
        norm.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(
        NonFiniteError, match=r"step 4: expected a finite loss and gradient, .*/step-00000002\. Lower lr"
    ):
        next(steps)
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, before[name]), name
    assert latest(tmp_path).name == "step-00000002"


def test_bf16_keeps_weights_in_fp32_and_follows_fp32(tmp_path):
    fp32 = losses(make(tmp_path / "fp32"))
    trainer = make(tmp_path / "bf16", precision="bf16")
    bf16 = losses(trainer)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert bf16 != fp32
    assert bf16 == pytest.approx(fp32, rel=2**-8)


def test_clipping_and_schedule_reach_the_update(tmp_path):
    trainer = make(tmp_path, lr=1e-2, warmup=0.5, decay=0.5, min_lr=0.1, grad_clip=1e-3)
    seen = []
    trainer._optimizers.parts["adamw"].register_step_pre_hook(
        lambda *_: seen.append(torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm().item())
    )
    metrics = list(trainer.run())
    assert [m.lr for m in metrics] == pytest.approx(
        [2e-3, 4e-3, 6e-3, 8e-3, 1e-2, 8.2e-3, 6.4e-3, 4.6e-3, 2.8e-3, 1e-3]
    )
    assert seen == pytest.approx([1e-3] * 10, rel=1e-3)
    assert all(m.grad_norm > 1e-2 for m in metrics)


def test_trains_on_tasks_and_on_any_stream(tmp_path):
    task = MQAR(num_pairs=4, num_queries=4, vocab=16)
    trainer = Trainer(tiny_model(vocab_size=17), None, task, task, config(steps=3, eval_every=3), tmp_path / "task")
    metrics = list(trainer.run())
    assert metrics[-1].tokens == 3 * 2 * task.sequence_length
    assert metrics[0].loss == pytest.approx(math.log(17), abs=0.3)
    assert metrics[-1].val_loss == trainer.validate()

    class Same:
        batch_of = Batch(tokens=torch.zeros(1, 8, dtype=torch.int64), targets=torch.ones(1, 8, dtype=torch.int64))

        def __iter__(self):
            return self

        def __next__(self):
            return self.batch_of

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            assert state == {}

    found = losses(make(tmp_path / "stream", data=Same(), steps=8, lr=1e-2))
    assert found[-1] < found[0] - 1


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"model: expected fp32 weights, got torch\.bfloat16"):
        make(tmp_path, tiny_model().to(torch.bfloat16))
    with pytest.raises(TypeError, match=r"train_data: expected a Corpus, a task, .* got list without __next__"):
        make(tmp_path, data=[1])
    with pytest.raises(TypeError, match="val_data: expected batches that can be read again"):
        make(tmp_path, val=iter([1]), eval_every=1)
    with pytest.raises(ValueError, match=r"train_data: expected tokens below the model's vocab_size == 64, got 256"):
        make(tmp_path, tiny_model(vocab_size=64))
    with pytest.raises(ValueError, match="val_data: expected tokens below the model's vocab_size == 257, got 512"):
        make(tmp_path, val=MQAR(), eval_every=1)


def test_another_run_is_not_continued(tmp_path):
    losses(make(tmp_path, steps=1))
    with pytest.raises(ValueError, match=r"lr: expected 0\.002 as in the run that is resumed, got 0\.1"):
        make(tmp_path, lr=0.1)
    with pytest.raises(ValueError, match="fingerprint: expected the data of the saved run"):
        make(tmp_path, data=tiny_corpus(documents=5))
    with pytest.raises(FileExistsError, match=r"expected one without checkpoints, got .*, which holds step-00000001"):
        Trainer(tiny_model(), None, tiny_corpus(), None, config(), tmp_path, resume=False)


def test_a_finished_run_can_be_made_longer(tmp_path):
    losses(make(tmp_path, steps=3))
    longer = make(tmp_path, steps=5)
    assert [m.step for m in longer.run()] == [4, 5]
