"""Who may write to the directory of a run: one process at a time. Knows paths only."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from upcycle.checkpoint.files import output_errors
from upcycle.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOCK = ".lock"


@contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Hold the directory of a run; the operating system lets go of it when the process ends.

    Raises:
        OutputError: another process holds it, or it cannot be written.
    """
    with output_errors(directory):
        descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"another process is training {directory}", remedy="wait for it to end") from None
        yield
    finally:
        os.close(descriptor)
