"""The signals by which a launcher has its job requeued, held back until the run has saved a checkpoint."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from types import FrameType, TracebackType
    from typing import Self

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)  # submitit's is the second, unless it is told otherwise


class Requeue:
    """Handles the signals that a launcher handles; of others it knows nothing.

    submitit requeues a job when the signal comes, and SLURM ends a job when it is requeued.
    """

    def __init__(self) -> None:
        self._came: int | None = None
        self._worker: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Take the place of the launcher's handlers."""
        found = {number: signal.getsignal(number) for number in SIGNALS}
        self._launchers: dict[int, Any] = {number: handler for number, handler in found.items() if callable(handler)}
        for number in self._launchers:
            signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Put them back."""
        for number, handler in self._launchers.items():
            signal.signal(number, handler)

    @contextmanager
    def after(self, worker: subprocess.Popen[bytes]) -> Iterator[None]:
        """Let a worker that runs inside end at a signal, and then the launcher do what it would have done.

        Raises:
            SystemExit: what submitit does when it has requeued the job.
        """
        self._worker = worker
        try:
            yield
        finally:
            self._worker = None
        if self._came is not None:
            number, self._came = self._came, None
            self._launchers[number](number, None)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._worker is None:
            self._launchers[number](number, frame)
        else:
            self._came = number
            self._worker.terminate()
