"""Training and evaluation tools on transformers' model with our KDA in it: real runs, each checked against numbers.

What a packed batch should give comes from transformers' own unpatched model, one document at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from kimi_linear.data import ByteTokenizer
from kimi_linear.integrations import lm_eval as our_lm
from kimi_linear.integrations import transformers as integration

from .local_task import SUBJECTS, answers, evaluate
from .tiny import from_pretrained, furthest, publisher, tiny_model, tokens

# The hosts warn of each other; our own warnings are errors as everywhere.
pytestmark = pytest.mark.filterwarnings("default", "error:::kimi_linear")

TEXTS = [f"The {subject} is {'very ' * i}old." for i, subject in enumerate(SUBJECTS)]


def encoded() -> list[list[int]]:
    """The texts as documents, each with the token that ends it."""
    return [[*ByteTokenizer().encode(text), 256] for text in TEXTS]


@torch.no_grad()
def loss_of_documents(model: Any) -> float:
    """Mean loss of the texts' tokens, each document read alone, but its first token."""
    assert not integration.is_patched()
    total, count = 0.0, 0
    for ids in map(torch.tensor, encoded()):
        logits = model(ids[None]).logits[0]
        total += float(F.cross_entropy(logits[:-1], ids[1:], reduction="sum"))
        count += len(ids) - 1
    return total / count


@torch.no_grad()
def loss_of_one_row(model: Any) -> float:
    """The same with every document in sight of those before it: what a leak would give."""
    ids = torch.tensor([token for document in encoded() for token in document])
    logprobs = model(ids[None]).logits[0].log_softmax(-1)
    starts = torch.tensor([len(document) for document in encoded()]).cumsum(0)[:-1]
    targets = ids.clone()
    targets[starts] = -100
    return float(F.nll_loss(logprobs[:-1], targets[1:]))


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    """What every training run here has in common: all documents in each step, on a CPU, nothing written."""
    return {
        "output_dir": str(folder), "per_device_train_batch_size": len(TEXTS), "max_steps": 8, "learning_rate": 3e-3,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "gradient_checkpointing": True, "bf16": False, **changes,
    }  # fmt: skip


def losses(trainer: Any) -> list[float]:
    """The loss that the run logged at each step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def expected(folder: Path) -> float:
    """The loss of the first step: documents alone; far from what a leak gives."""
    model = from_pretrained(folder)
    loss = loss_of_documents(model)
    assert abs(loss_of_one_row(model) - loss) > 0.01
    return loss


@pytest.mark.parametrize("flash_kwargs", [False, True], ids=["position_ids", "cu_seq_lens_q"])
def test_trainer_with_flattened_batches(folder: Path, tmp_path: Path, expected: float, flash_kwargs: bool) -> None:
    from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

    integration.patch()
    model = from_pretrained(folder)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments(tmp_path)),
        train_dataset=[{"input_ids": ids} for ids in encoded()],
        data_collator=DataCollatorWithFlattening(
            return_flash_attn_kwargs=flash_kwargs, return_position_ids=not flash_kwargs
        ),
    )
    trainer.train()
    found = losses(trainer)
    assert found[0] == pytest.approx(expected, abs=1e-3)
    assert found[-1] < 0.8 * found[0]
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    # An expert that no token visited has no gradient; every stacked tensor holds some that were.
    assert still == []
    # What was trained is saved in the release layout's names and comes back.
    model.eval()
    model.save_pretrained(tmp_path / "trained")
    with torch.no_grad():
        assert furthest(from_pretrained(tmp_path / "trained")(tokens()).logits, model(tokens()).logits) == 0
    assert set(load_file(tmp_path / "trained/model.safetensors")) == set(load_file(folder / "model.safetensors"))


def test_sft_trainer_with_packing(folder: Path, tmp_path: Path, expected: float) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    integration.patch()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    trainer = SFTTrainer(
        model=from_pretrained(folder),
        args=SFTConfig(**arguments(tmp_path, packing=True, max_length=128)),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
    )
    packed = trainer.train_dataset["seq_lengths"]
    assert sorted(n for row in packed for n in row) == sorted(len(ids) for ids in encoded())
    assert len(packed) < len(TEXTS), "some documents share a row"
    trainer.train()
    found = losses(trainer)
    assert found[0] == pytest.approx(expected, abs=1e-3)
    assert found[-1] < 0.8 * found[0]


def test_lora(folder: Path, tmp_path: Path) -> None:
    """Adapters on projections of both kinds of layer train, are saved, merged and loaded; the model itself stays."""
    from peft import LoraConfig, PeftModel, get_peft_model

    integration.patch()
    base = from_pretrained(folder)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "f_a_proj", "g_b_proj", "kv_b_proj"]
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    ids = torch.tensor([token for document in encoded() for token in document])[None]
    positions = torch.cat([torch.arange(len(document)) for document in encoded()])[None]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    history = []
    for _ in range(8):
        loss = model(ids, position_ids=positions, labels=ids).loss
        loss.backward()
        unused = [name for name, p in model.named_parameters() if "lora_B" in name and not p.grad.any()]
        assert unused == [], "an adapter that the layer walks past"
        optimizer.step()
        optimizer.zero_grad()
        history.append(float(loss.detach()))
    assert history[-1] < 0.9 * history[0]
    model.eval()
    with torch.no_grad():
        tuned = model(tokens()).logits
        assert furthest(tuned, from_pretrained(folder)(tokens()).logits) > 0.1
        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(from_pretrained(folder), tmp_path / "adapter").eval()
        assert furthest(loaded(tokens()).logits, tuned) < 1e-5
        merged = loaded.merge_and_unload()
        assert furthest(merged(tokens()).logits, tuned) < 1e-4
    merged.save_pretrained(tmp_path / "merged")
    assert set(load_file(tmp_path / "merged/model.safetensors")) == set(load_file(folder / "model.safetensors"))
    for name, value in before.items():
        original = dict(base.named_parameters()).get(name.replace("_proj.weight", "_proj.base_layer.weight"))
        original = dict(base.named_parameters())[name] if original is None else original
        assert torch.equal(original, value), name


def logprobs(result: dict[str, Any], task: str) -> Tensor:
    """The numbers of a task's answers."""
    return torch.tensor([response[0][0] for response in answers(result, task)])


def test_lm_eval_on_transformers_agrees_with_ours(folder: Path, tmp_path: Path) -> None:
    """HFLM pads its batches on the left and the right; our adapter packs them."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    integration.patch()
    host = HFLM(
        pretrained=from_pretrained(folder), tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu",
        batch_size=3, max_length=512, prefix_token_id=256,
    )  # fmt: skip
    theirs = evaluate(host, tmp_path)
    ours = evaluate(our_lm.lm(publisher(tiny_model()), ByteTokenizer()), tmp_path)
    assert furthest(logprobs(theirs, "choice"), logprobs(ours, "choice")) < 1e-3
    assert theirs["results"]["choice"]["acc,none"] == ours["results"]["choice"]["acc,none"]
    bits = [result["results"]["perplexity"]["bits_per_byte,none"] for result in (theirs, ours)]
    assert bits[0] == pytest.approx(bits[1], rel=1e-5)
    texts = [[response[0] for response in answers(result, "generation")] for result in (theirs, ours)]
    assert sum(len(text) > 1 for text in texts[1]) > 3
    assert texts[0] == texts[1]
