"""Tasks for lm-eval that need no download: a choice, a perplexity and a generation on made-up text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SUBJECTS = ("river", "engine", "letter", "garden", "winter", "number", "mirror")


def documents() -> list[dict[str, Any]]:
    """Texts of different lengths, one of them not ASCII."""
    return [
        {
            "question": f"The {subject} of {i} is",
            "choices": ["old", "very new", "ünknown"],
            "gold": i % 3,
            "text": f"A {subject} ran {i} times. " * (2 * i + 1),
        }
        for i, subject in enumerate(SUBJECTS)
    ]


def tasks(folder: Path) -> list[dict[str, Any]]:
    """lm-eval's configurations of the three tasks, their documents in ``folder``."""
    file = folder / "documents.json"
    file.write_text(json.dumps(documents()))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
    choice = {
        "task": "choice", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_target": "gold",
        "doc_to_choice": "choices", "metric_list": [metric("acc", "mean", True), metric("acc_norm", "mean", True)],
    }  # fmt: skip
    perplexity = {
        "task": "perplexity", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [metric("bits_per_byte", "bits_per_byte", False)],
    }  # fmt: skip
    generation = {
        "task": "generation", "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "old",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [metric("exact_match", "mean", True)],
    }  # fmt: skip
    return [{**task, **data} for task in (choice, perplexity, generation)]


def metric(name: str, aggregation: str, higher: bool) -> dict[str, Any]:
    """All that lm-eval would otherwise warn about."""
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher}


def evaluate(
    model: Any,
    folder: Path,
    names: tuple[str, ...] = ("choice", "perplexity", "generation"),
    *,
    apply_chat_template: bool = False,
) -> dict[str, Any]:
    """lm-eval's own result for ``model``; without its index of thousands of tasks."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    wanted = [task for task in tasks(folder) if task["task"] in names]
    return lm_eval.simple_evaluate(
        model=model,
        tasks=wanted,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=apply_chat_template,
    )


def answers(result: dict[str, Any], task: str) -> list[Any]:
    """What the model said to each request of a task, in the documents' order."""
    samples = sorted(result["samples"][task], key=lambda sample: sample["doc_id"])
    return [response for sample in samples for response in sample["resps"]]
