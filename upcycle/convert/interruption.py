"""Ctrl-C, remembered. Knows the standard library only."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType, TracebackType
    from typing import Self


class Interruption:
    """Makes a SIGINT end what runs inside with a KeyboardInterrupt, whatever becomes of the first one.

    Python raises it wherever the program happens to be. Where that is inside C code, such as torch's conversion of
    storages, it may come out as another error, or not at all. For the main thread only.
    """

    def __init__(self) -> None:
        self.came = False

    def __enter__(self) -> Self:
        """Listen for the signal, unless the process was told to ignore it (`nohup`)."""
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Raise KeyboardInterrupt in place of an error that the signal became."""
        signal.signal(signal.SIGINT, self._before)
        if self.came and isinstance(error, Exception):
            raise KeyboardInterrupt from error

    def check(self) -> None:
        """Raise KeyboardInterrupt if the signal came."""
        if self.came:
            raise KeyboardInterrupt

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.came = True
        raise KeyboardInterrupt


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the end; processes that start here never see it, though a terminal sends it to them too.

    Processes inherit the signal mask. For this process it is not enough: it is one thread's, and any other (torch and
    progress bars start some) takes the signal in its place.
    """
    came: list[tuple[int, FrameType | None]] = []
    handler = signal.getsignal(signal.SIGINT)
    listening = callable(handler) and threading.current_thread() is threading.main_thread()
    if listening:
        signal.signal(signal.SIGINT, lambda *caught: came.append(caught))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if listening:
            signal.signal(signal.SIGINT, handler)
    if came and callable(handler):
        handler(*came[0])
