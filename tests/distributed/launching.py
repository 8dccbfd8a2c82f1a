"""Runs jobs on several ranks with torchrun, as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

WORKER = Path(__file__).with_name("worker.py")


def on_ranks(ranks: int, jobs: Sequence[dict[str, Any]], directory: Path) -> None:
    """Run jobs of worker.py in one process group, and check that all ranks came to the end."""
    file = directory / f"jobs_{ranks}.json"
    file.write_text(json.dumps(jobs))
    ended = torchrun(ranks, str(WORKER), str(file))
    assert ended.returncode == 0, ended.stdout + ended.stderr


def torchrun(ranks: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Start a program on every rank."""
    return subprocess.run(
        ["torchrun", "--standalone", f"--nproc-per-node={ranks}", *command],
        env={**environment(), "PYTHONPATH": str(WORKER.parent.parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )


def environment() -> dict[str, str]:
    """The variables of a user whose virtual environment is active, with one thread for each rank."""
    programs = Path(sys.executable).parent
    return {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
