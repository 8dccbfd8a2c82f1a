"""Reads W&B offline directories."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upcycle.analysis.run_record import RunRecord
from upcycle.analysis.wandb_history import record_rows
from upcycle.tracking.wandb_offline import inspect

if TYPE_CHECKING:
    from pathlib import Path


def read_offline(directory: Path) -> RunRecord:
    """Read an offline directory; all those of one W&B run, which was resumed, have one name.

    Raises:
        RecordError: wandb is not installed, or cannot read the directory.
    """
    identity, history = "", []
    content: dict[str, Any] = {}
    for record in inspect(directory):
        match record:
            case {"type": "run", "run": run}:
                identity = run["run_id"]
                content |= run.get("config", {}).get("update", {})
            case {"type": "summary", "summary": {"update": {"status": str(said)}}}:
                content["status"] = said
            case {"type": "history", "history": {"item": item}}:
                history.append(item)
    rows = record_rows(history)
    return RunRecord(name=str(directory.parent / identity), content=content, parts=(lambda: rows,))
