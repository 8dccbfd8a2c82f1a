"""The process of one run: `python -m upcycle.sweep.worker`, with the options as a line of JSON on standard input."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading

from pydantic import TypeAdapter

from upcycle.errors import UpcycleError
from upcycle.train.config import TrainConfig
from upcycle.train.run import train


def main() -> int:
    """Train; errors of the user are printed, not traced."""
    config = TypeAdapter(TrainConfig).validate_json(sys.stdin.buffer.readline())
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # for the job, which ends this process; some clusters send it to all
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(stream=sys.stderr, format="upcycle: %(message)s")
    logging.getLogger("upcycle").setLevel(logging.INFO)
    try:
        train(config, on_start=lambda _run: [])
    except (UpcycleError, OSError) as error:
        print(f"upcycle: {error}", file=sys.stderr)
        return 1
    return 0


def _end_with_parent() -> None:
    """Standard input ends when the sweep's process does: save a checkpoint and stop, as at any SIGTERM."""
    os.read(sys.stdin.fileno(), 1)  # not through a buffer, whose lock would be held when the interpreter ends
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
