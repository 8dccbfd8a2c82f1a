"""One run of a sweep, in a process of its own: tried again if it fails, and never at the cost of the others."""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from upcycle.arguments import typed_options
from upcycle.errors import SourceError
from upcycle.source import expanded
from upcycle.tracking.record import RUN, read_run
from upcycle.train.config import TrainConfig

if TYPE_CHECKING:
    from pathlib import Path

    from omegaconf import DictConfig

FINISHED, INTERRUPTED = "finished", "interrupted"
ERROR_LINES = 5
WORKER = (sys.executable, "-P", "-m", "upcycle.sweep.worker")


def status_of(run: Path) -> str | None:
    """What run.json says; None if there is none, or one that cannot be read."""
    try:
        return str(read_run(run).get("status"))
    except SourceError:
        return None


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

    The log is locked while anything works at the run, so that what is left of a sweep that was killed ends first.

    Args:
        composed: the options of the run, with those of the sweep; `sweep.job` is what to call it.
    """
    config: TrainConfig = typed_options(TrainConfig, composed)
    run = expanded(config.output)
    run.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log_of(run).open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        for _ in range(1 + composed.sweep.retries):
            if status_of(run) == FINISHED:
                break
            if run.exists() and not (run / RUN).exists():
                shutil.rmtree(run)  # killed before it began
            code = _attempt(config, log.fileno())
            if code < 0:
                log.write(f"killed by {signal.Signals(-code).name}\n".encode())
                log.flush()
            if status_of(run) == INTERRUPTED:
                break
    print(f"{composed.sweep.job}: {status_of(run)}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def _attempt(config: TrainConfig, log: int) -> int:
    """Train in a process that ends when this one does, however that happens: its standard input is then closed."""
    with subprocess.Popen(WORKER, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(asdict(config)).encode() + b"\n")
        process.stdin.flush()
        return process.wait()
