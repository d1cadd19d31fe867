"""A model folder remembers its task, and a broken memory is an error."""

import pytest

from kimi_linear.data import MQAR, Palindrome, Stack
from kimi_linear.evals import load_task, save_task


@pytest.mark.parametrize(
    "task",
    [MQAR(num_pairs=3, num_queries=2, vocab=20), Palindrome(length=9), Stack(num_stacks=2, pop_probability=0.25)],
)
def test_round_trip(task, tmp_path):
    save_task(task, tmp_path)
    assert load_task(tmp_path) == task


def test_no_file_is_no_task(tmp_path):
    assert load_task(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "expected JSON such as"),
        ("[1]", "expected JSON such as"),
        ("{}", "expected JSON such as"),
        ('{"task": "chess"}', "task: expected one of palindrome, mqar, stack, got 'chess'"),
        ('{"task": "mqar", "pairs": 3}', "pairs: unknown setting of mqar"),
        ('{"task": "mqar", "num_pairs": 0}', "num_pairs: expected at least 1"),
    ],
)
def test_a_broken_file_is_refused(text, message, tmp_path):
    (tmp_path / "task.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_task(tmp_path)
