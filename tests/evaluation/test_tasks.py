"""The shipped task: its questions are right, and the harness scores a known answerer as it should."""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any

from lm_eval import evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from upcycle.evaluation.harness import TASKS
from upcycle.evaluation.tasks.python_stdlib_facts import load

ROWS = list(load()["test"])


def test_the_questions_are_sound() -> None:
    assert len(ROWS) == len({row["purpose"] for row in ROWS}) == 40
    assert all(len(set(row["choices"])) == 4 for row in ROWS)
    assert Counter(row["answer"] for row in ROWS) == dict.fromkeys(range(4), 10)
    answers = [row["choices"][row["answer"]] for row in ROWS]
    assert len(set(answers)) == 40
    assert not [row for row in ROWS if row["choices"][row["answer"]] in row["purpose"].lower().split()]


def test_every_choice_is_a_module() -> None:
    for name in {name for row in ROWS for name in row["choices"]}:
        assert importlib.util.find_spec(name) is not None, name


class Answerer(LM):
    """Finds the right answer of the first `known` questions likeliest, and the next choice of the others."""

    def __init__(self, known: int) -> None:
        super().__init__()
        self.right = {
            f"# {row['purpose']}\nimport": " " + row["choices"][(row["answer"] + (number >= known)) % 4]
            for number, row in enumerate(ROWS)
        }

    def loglikelihood(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        return [(0.0 if self.right[prompt] == choice else -1e3, False) for prompt, choice in (r.args for r in requests)]

    def loglikelihood_rolling(self, requests: Any, **_: Any) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: Any, **_: Any) -> list[str]:
        raise NotImplementedError


def test_the_harness_asks_and_scores() -> None:
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    for known, expected in ((40, 1.0), (10, 0.25), (0, 0.0)):
        found = evaluate(Answerer(known), manager.load(["python_stdlib_facts"]), log_samples=False)
        assert found["results"]["python_stdlib_facts"]["acc,none"] == expected
