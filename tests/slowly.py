"""A conversion that writes slowly, in processes of its own, so that a test can interrupt it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from cli import Outcome

if TYPE_CHECKING:
    import signal

# A shell that put the tests into the background has SIGINT ignored.
LISTENING = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from upcycle.cli import main
main()
"""
# Its sitecustomize.py runs in the workers too.
STARTUP = Path(__file__).with_name("startup")


class Run:
    """A conversion in a process, and a session, of its own."""

    def __init__(self, *arguments: object, cwd: Path, seconds: float) -> None:
        path = os.pathsep.join([str(STARTUP), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-c", LISTENING, "convert", *map(str, arguments)],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": path, "SECONDS_BEFORE_WRITE": str(seconds)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for_bytes(self, staging: Path, count: int) -> None:
        """Wait until the staging directory's weights have so many bytes, finished and unfinished files together."""
        deadline = time.monotonic() + 120
        while sum(size for file in staging.glob("model-*") if (size := size_of(file))) < count:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def workers(self) -> list[psutil.Process]:
        """The processes that it started and that live."""
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]

    def end(self, with_signal: signal.Signals) -> Outcome:
        self.process.send_signal(with_signal)
        return self.ended()

    def ended(self) -> Outcome:
        out, err = self.process.communicate(timeout=60)
        return Outcome(status=self.process.returncode, out=out, err=err)


def size_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # renamed from draft to final name since the listing
        return 0


def weight_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("model-*"))
