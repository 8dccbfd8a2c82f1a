"""Who may write to the directory of a run: one process at a time. Knows paths only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from upcycle.files.durable import locked

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

LOCK = ".lock"


def claimed(directory: Path) -> AbstractContextManager[None]:
    """Hold the directory of a run; the operating system lets go of it when the process ends.

    Raises:
        OutputError: another process holds it, or it cannot be written.
    """
    return locked(directory / LOCK, busy=f"another process is training {directory}")
