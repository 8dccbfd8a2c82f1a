"""Runs jobs on several ranks with torchrun, as a user would."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ended import Ended

if TYPE_CHECKING:
    from collections.abc import Sequence

SOON = 300  # seconds, in which all ranks have ended when one has, on a machine with much else to do
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
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def srun(ranks: int, *command: str) -> list[subprocess.CompletedProcess[str]]:
    """Start a program on every rank as a plain srun does: rank 0 keeps the store, and nobody ends the other ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"SLURM_JOB_NAME": "train", "SLURM_NTASKS": ranks, "SLURM_NTASKS_PER_NODE": ranks, "SLURM_NNODES": 1}
    job |= {"SLURM_STEP_ID": 0, "SLURM_NODEID": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pipe = subprocess.PIPE
    with ExitStack() as ending:
        started = [
            ending.enter_context(
                Ended(
                    command,
                    env={**environment(), **{name: str(value) for name, value in {**job, **of_rank}.items()}},
                    stdout=pipe,
                    stderr=pipe,
                    text=True,
                )
            )
            for of_rank in ({"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in range(ranks))
        ]
        said = [each.communicate(timeout=SOON) for each in started]
    return [
        subprocess.CompletedProcess(command, each.returncode, *texts) for each, texts in zip(started, said, strict=True)
    ]


def environment() -> dict[str, str]:
    """The variables of a user whose virtual environment is active, with one thread for each rank."""
    programs = Path(sys.executable).parent
    path = f"{programs}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parent.parent.parent)}
