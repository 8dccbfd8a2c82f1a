"""W&B's offline runs beside a record: which are unsent, and which rows they hold."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

from upcycle.errors import RecordError
from upcycle.files.json import NotJsonError, parse_json
from upcycle.options.extras import need

if TYPE_CHECKING:
    from pathlib import Path

SYNCED = ".wandb.synced"  # how W&B's own sync marks a log that it has sent


def offline_logs(directory: Path) -> list[Path]:
    """W&B's offline logs beside a record, the oldest first."""
    return sorted(directory.glob("wandb/offline-run-*/*.wandb"))


def unsent_logs(directory: Path) -> list[Path]:
    """Those that have not been sent."""
    return [log for log in offline_logs(directory) if not log.with_suffix(SYNCED).exists()]


def set_aside(logs: list[Path]) -> None:
    """Keep logs from being sent whose rows are at the server already."""
    for log in logs:
        log.with_suffix(SYNCED).touch()


def offline_rows(directory: Path) -> int:
    """Rows of the record that its offline logs hold together.

    Raises:
        RecordError: a log cannot be read.
    """
    return max((rows_of(log).stop for log in offline_logs(directory)), default=0)


def rows_of(log: Path) -> range:
    """Which rows of the record an offline log holds; that of a killed run lacks the last ones.

    Raises:
        RecordError: it cannot be read.
    """
    records = inspect(log)
    steps = [record["history"]["item"]["_step"] for record in records if record["type"] == "history"]
    return range(min(steps), max(steps) + 1) if steps else range(0)


def inspect(log: Path) -> list[dict[str, Any]]:
    """What W&B's own reader says is in an offline log, or in the directory of one.

    Raises:
        MissingPackageError: wandb is not installed.
        RecordError: it cannot be read.
    """
    need("an offline run of W&B", "wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    ended = subprocess.run(command, capture_output=True, check=False)
    if ended.returncode:
        said = ended.stderr.decode(errors="replace").strip()
        raise RecordError("the offline W&B run cannot be read", found=f"{log}: {said}")
    try:
        return [parse_json(line) for line in ended.stdout.splitlines()]
    except NotJsonError as error:
        raise RecordError("the offline W&B run cannot be read", found=f"{log}: {error}") from error


def send_log(log: Path) -> None:
    """Send an offline log through W&B's own sync.

    Raises:
        RecordError: it was not sent.
    """
    command = [sys.executable, "-m", "wandb", "sync", str(log)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode or log in unsent_logs(log.parents[2]):
        said = (ended.stderr or ended.stdout).strip().splitlines()
        raise RecordError("W&B's sync did not send an offline run", found=f"{log}: {said[-1] if said else 'no reason'}")
