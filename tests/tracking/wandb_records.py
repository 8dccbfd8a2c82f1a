"""What the tests of the W&B mirror share: records without training, and what W&B holds of them."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from upcycle.tracking.config import WandbConfig
from upcycle.tracking.record import Record
from upcycle.tracking.schema import SCHEMA_VERSION
from upcycle.tracking.wandb_training import TrainingMirror

if TYPE_CHECKING:
    from pathlib import Path

HASHES = {"order_hash": "abc", "data_hash": "def", "flops_per_step": 1000}
LOADS = [0.5, 0.25, 0.25]


def options(mode: str, **changes: Any) -> WandbConfig:
    given = {"project": "moe", "entity": None, "group": "order", "tags": ["smoke"], "artifacts": False, **changes}
    return WandbConfig(mode=mode, **given)


def begin(record: Record, **changes: Any) -> Record:
    """Describe a run as training does before its first step."""
    record.create()
    given = {"project": "moe", "entity": None, "group": None, "tags": [], "artifacts": False, **changes}
    config = {
        "seed": 0,
        "source": None,
        "moe": {"top_k": 2},
        "batch": {"sequences": 2},
        "sequence_length": 4,
        "wandb": given,
    }
    record.describe(schema=SCHEMA_VERSION, status="running", config=config, **HASHES)
    return record


def train(directory: Path, mode: str, *, first: int = 1, after: int = 6, status: str = "finished") -> None:
    """A process that trains, from a checkpoint on, with a record that may be there already."""
    record = Record(directory)
    mirror = TrainingMirror(record, options(mode))
    begin(record, group="order", tags=["smoke"])
    with mirror:
        record.forget_after(first - 1)
        for step in range(first, after):
            log(record, step, step + 1)
            mirror.update()
        record.describe(status=status)


def log(made: Record, first: int, after: int) -> None:
    """Rows of two kinds: of every step, and the held-out loss of every second."""
    for step in range(first, after):
        made.log({"train/loss": 5.0 / step, "train/grad_norm": 1.0 * step, "moe/layer_0/load": LOADS}, step=step)
        if step % 2 == 0:
            made.log({"val/loss": 6.0 / step}, step=step)


def rows(directory: Path) -> list[dict[str, Any]]:
    """The record's rows as W&B should have them: without their times, and each with the tokens and FLOPs spent."""
    run = json.loads((directory / "run.json").read_text())
    tokens = run["config"]["batch"]["sequences"] * run["config"]["sequence_length"]
    made = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for row in made:
        del row["time"]
        row |= {"train/tokens": tokens * row["step"], "train/flops": run["flops_per_step"] * row["step"]}
    return made


def shown(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of W&B as the record has them: without what W&B adds, and lists in place of their histograms.

    The server gets a histogram as an object, W&B's reader shows a key for each of its fields.
    """
    return [
        {
            name.removesuffix(".values"): value["values"] if isinstance(value, dict) else value
            for name, value in row.items()
            if not name.startswith("_") and not name.endswith((".bins", "._type"))
        }
        for row in history
    ]


def inspect(log: Path) -> list[dict[str, Any]]:
    """What an offline run holds, through W&B's own reader."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    return [json.loads(line) for line in subprocess.check_output(command, text=True).splitlines()]


def offline_history(directory: Path) -> list[dict[str, Any]]:
    """Rows of all offline runs beside a record, one after the other."""
    logs = sorted(directory.glob("wandb/offline-run-*/*.wandb"))
    return [each["history"]["item"] for log in logs for each in inspect(log) if each["type"] == "history"]
