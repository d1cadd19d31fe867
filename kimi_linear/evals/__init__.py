"""Evaluations: each is a function from a sampler to a result."""

from kimi_linear.evals.perplexity import Perplexity
from kimi_linear.evals.protocol import Eval, Result, Sampler
from kimi_linear.evals.synthetic import Accuracy, TaskAccuracy, accuracy, measure
from kimi_linear.evals.task_file import load_task, save_task

__all__ = [
    "Accuracy",
    "Eval",
    "Perplexity",
    "Result",
    "Sampler",
    "TaskAccuracy",
    "accuracy",
    "load_task",
    "measure",
    "save_task",
]
