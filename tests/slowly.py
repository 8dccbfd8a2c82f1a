"""A conversion that stops half-way, in processes of its own, so that a test can interrupt it there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from cli import Outcome

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

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
    """A conversion in a process, and a session, of its own, all of which has ended when the context is left.

    It writes no more, and so cannot end, once the weights in its staging directory have `stop_at` bytes, finished and
    unfinished files together, before it is sent a signal.
    """

    def __init__(self, *arguments: object, cwd: Path, stop_at: int) -> None:
        path = os.pathsep.join([str(STARTUP), os.environ.get("PYTHONPATH", "")])
        self._stop_at, self._place = stop_at, tempfile.TemporaryDirectory()
        self._go_on = Path(self._place.name) / "go on"
        self.process = subprocess.Popen(
            [sys.executable, "-c", LISTENING, "convert", *map(str, arguments)],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": path, "STOP_AT": str(stop_at), "GO_ON": str(self._go_on)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()
        self._place.cleanup()

    def wait_until_stopped(self, staging: Path) -> None:
        """Wait until the staging directory's weights have all the bytes that it writes."""
        deadline = time.monotonic() + 120
        while sum(size_of(file) for file in staging.glob("model-*")) < self._stop_at:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def workers(self) -> list[psutil.Process]:
        """The processes that it started and that live."""
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]

    def end(self, with_signal: signal.Signals, *, to_all: bool = False) -> Outcome:
        """Send it, or all of its session, a signal, and wait for its end."""
        (os.killpg if to_all else os.kill)(self.process.pid, with_signal)
        return self.ended()

    def ended(self) -> Outcome:
        """Let it go on to its end, after what was sent to it."""
        self._go_on.touch()
        out, err = self.process.communicate(timeout=60)
        return Outcome(status=self.process.returncode, out=out, err=err)


def size_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # renamed from draft to final name since the listing
        return 0


def weight_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("model-*"))
