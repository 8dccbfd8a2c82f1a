"""Reads W&B offline directories with W&B's own `wandb leet inspect`, and undoes what the mirror did to the record."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from upcycle.analysis.run_record import RunRecord
from upcycle.errors import RecordError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

# W&B writes numbers that JSON lacks as text, and a histogram as three entries.
_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_HISTOGRAM, _NOT_LIST = ".values", ("._type", ".bins")


def read_offline(directory: Path) -> RunRecord:
    """Read an offline directory; all those of one W&B run, which was resumed, have one name.

    Raises:
        RecordError: wandb is not installed, or cannot read the directory.
    """
    identity, rows = "", []
    content: dict[str, Any] = {}
    for record in _records(directory):
        match record:
            case {"type": "run", "run": run}:
                identity = run["run_id"]
                content |= run.get("config", {}).get("update", {})
            case {"type": "summary", "summary": {"update": {"status": str(said)}}}:
                content["status"] = said
            case {"type": "history", "history": {"item": item}}:
                rows.append(json.dumps(_row(item)) + "\n")
    lines = "".join(rows).encode()
    return RunRecord(name=str(directory.parent / identity), content=content, parts=(lambda: lines,))


def _row(item: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"time": datetime.fromtimestamp(item["_timestamp"], UTC).isoformat()}
    for name, value in item.items():
        if not name.startswith("_") and not name.endswith(_NOT_LIST):
            row[name.removesuffix(_HISTOGRAM)] = _NUMBERS.get(value, value) if isinstance(value, str) else value
    return row


def _records(directory: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(directory)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RecordError(
            "the offline W&B run cannot be read",
            found=f"{directory}: {ended.stderr.strip()}",
            remedy="pip install 'wandb>=0.31'" if "No module named wandb" in ended.stderr else None,
        )
    return [json.loads(line) for line in ended.stdout.splitlines()]
