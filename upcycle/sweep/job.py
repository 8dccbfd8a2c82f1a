"""One run of a sweep, in a process of its own: tried again if it fails, and never at the cost of the others."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any

from upcycle.errors import SourceError, TrainingError
from upcycle.files.durable import flock
from upcycle.models.source import expanded
from upcycle.options.arguments import typed_options
from upcycle.sweep.requeue import Requeue
from upcycle.sweep.team import Team, submitted
from upcycle.tracking.packs import find_run
from upcycle.tracking.record import RUN
from upcycle.tracking.status import FINISHED, INTERRUPTED
from upcycle.train.config import TrainConfig

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from omegaconf import DictConfig

ERROR_LINES = 5
WORKER = (sys.executable, "-P", "-m", "upcycle.sweep.worker")


def content_of(run: Path) -> Mapping[str, Any]:
    """What run.json says, in the run's directory or in a pack; empty if there is none, or one that cannot be read.

    Raises:
        RecordError: a pack cannot be read.
    """
    with suppress(SourceError):
        return find_run(run) or {}
    return {}


def status_of(run: Path) -> str | None:
    """The status that run.json says; None if there is none. Raises as `content_of`."""
    status: str | None = content_of(run).get("status")
    return status


def log_of(run: Path) -> Path:
    """Where everything that a run prints is kept, beside its directory."""
    return run.with_name(run.name + ".log")


def last_lines(run: Path) -> tuple[str, ...]:
    """The last ones of what a run printed, its error if it failed; none if it never began."""
    log = log_of(run)
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return tuple(line for line in lines if line.strip())[-ERROR_LINES:]


def run_job(composed: DictConfig) -> None:
    """Bring a run to its end, unless it is there already. What Hydra's launchers call, wherever they run it.

    Where the run has a layout and submitit started several tasks, this is one of them, and has the worker of one rank.

    Args:
        composed: the options of the run, with those of the sweep; `sweep.job` is what to call it.

    Raises:
        OutputError: the file system has no locks.
        TrainingError: the tasks of the job did not come together.
    """
    config: TrainConfig = typed_options(TrainConfig, composed)
    run = expanded(config.output)
    job = submitted() if config.parallel else None
    with Requeue() as requeue:
        if job and job.global_rank:
            with Team(job) as team:
                while team.follow():
                    _attempt(config, requeue, team, log=None)
            return
        run.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with log_of(run).open("ab", buffering=0) as log:
            try:
                with Team(job) if job and job.num_tasks > 1 else nullcontext() as team:
                    _lead(config, requeue, team, log, attempts=1 + composed.sweep.retries)
            except TrainingError as error:
                log.write(f"upcycle: {error}\n".encode())
                raise
    print(f"{composed.sweep.job}: {status_of(run)}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def _lead(config: TrainConfig, requeue: Requeue, team: Team | None, log: IO[bytes], *, attempts: int) -> None:
    """Decide whether and how often to try.

    The log is locked while anything works at the run, so that what is left of a sweep that was killed ends first.
    """
    run = expanded(config.output)
    flock(log.fileno(), fcntl.LOCK_EX, log_of(run))
    for _ in range(attempts):
        if status_of(run) == FINISHED:
            break
        if run.exists() and not (run / RUN).exists():
            shutil.rmtree(run)  # killed before it began
        if team:
            team.start()
        code = _attempt(config, requeue, team, log)
        if code < 0:
            log.write(f"killed by {signal.Signals(-code).name}\n".encode())
        if status_of(run) == INTERRUPTED:
            break


def _attempt(config: TrainConfig, requeue: Requeue, team: Team | None, log: IO[bytes] | None) -> int:
    """Train in a process that ends when this one does, however that happens: its standard input is then closed.

    What it prints goes to the log, or where this process's goes.
    """
    process = subprocess.Popen(
        WORKER,
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        start_new_session=True,
        env=os.environ | (team.variables() if team else {}),
    )
    with process, requeue.after(process):
        assert process.stdin is not None
        process.stdin.write(json.dumps(asdict(config)).encode() + b"\n")
        process.stdin.flush()
        return team.wait(process) if team else process.wait()
