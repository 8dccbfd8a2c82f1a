"""Tasks of the lm-evaluation-harness (the extra `upcycle[eval]`), those shipped in `tasks/` among them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.errors import ConfigError, did_you_mean
from upcycle.options.extras import need

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASKS = Path(__file__).parent / "tasks"


class Harness:
    """The tasks that a user named, ready to be run.

    Args:
        tasks: names of tasks or groups, the harness's or those shipped here.

    Raises:
        ConfigError: the harness does not know a task.
        MissingPackageError: it is not installed.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        need("tasks=…", "lm_eval")
        from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]

        self._manager = TaskManager(include_path=str(TASKS), include_defaults=False)
        shipped = self._manager.all_tasks
        if not set(tasks) <= set(shipped):
            self._manager = TaskManager(include_path=str(TASKS))  # 14,000 files: seconds
        for task in tasks:
            if task not in self._manager.all_tasks:
                raise ConfigError(
                    "unknown task",
                    found=task,
                    expected=f"{', '.join(shipped)}, or what `lm-eval ls tasks` lists",
                    remedy=did_you_mean(task, self._manager.all_tasks),
                )
        self._tasks = list(tasks)

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_length: int
    ) -> list[dict[str, Any]]:
        """The metrics of every task, without examples in the prompt beyond those that the task defines.

        Args:
            model: the model, on its device.
            tokenizer: its tokenizer.
            max_length: tokens that the model reads at once.

        Returns:
            `task`, `metric`, `value` and `stderr` (None where the harness gives none), by task and metric.
        """
        from lm_eval import evaluate  # type: ignore[import-untyped]
        from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]

        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, max_length=max_length, batch_size=1)
        found = evaluate(wrapped, self._manager.load(self._tasks), log_samples=False)
        return [
            {"task": task, "metric": metric, "value": float(value), "stderr": stderr}
            for task, metrics in found["results"].items()
            for metric, value, stderr in _metrics(metrics)
        ]


def _metrics(metrics: dict[str, Any]) -> list[tuple[str, float, float | None]]:
    """Name, value and standard error; the harness writes `acc,none` and `acc_stderr,none`, with "N/A" for no error."""
    rows = []
    for key, value in metrics.items():
        name, comma, chosen = key.partition(",")
        if not comma or name.endswith("_stderr"):
            continue
        stderr = metrics.get(f"{name}_stderr,{chosen}")
        label = name if chosen == "none" else f"{name} ({chosen})"
        rows.append((label, value, float(stderr) if isinstance(stderr, int | float) else None))
    return rows
