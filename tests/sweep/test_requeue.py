"""A launcher's signal: first the worker ends, then the launcher requeues."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from ended import Ended

from upcycle.sweep.requeue import Requeue

if TYPE_CHECKING:
    from collections.abc import Iterator

SAVES = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(5)); print(flush=True); signal.pause()"


@pytest.fixture
def requeued() -> Iterator[list[int]]:
    """Signals that the launcher has handled."""
    handled: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _frame: handled.append(number))
    yield handled
    signal.signal(signal.SIGUSR2, before)


def test_the_worker_ends_first(requeued: list[int]) -> None:
    with Requeue() as requeue, Ended([sys.executable, "-c", SAVES], stdout=subprocess.PIPE) as worker:
        assert worker.stdout
        worker.stdout.readline()
        with requeue.after(worker):
            os.kill(os.getpid(), signal.SIGUSR2)
            assert worker.wait() == 5
            assert requeued == []
        assert requeued == [signal.SIGUSR2]


def test_without_a_worker_it_is_requeued_at_once(requeued: list[int]) -> None:
    with Requeue():
        os.kill(os.getpid(), signal.SIGUSR2)
        assert requeued == [signal.SIGUSR2]
    os.kill(os.getpid(), signal.SIGUSR2)
    assert len(requeued) == 2


def test_what_no_launcher_handles_is_left_alone() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)]
    with Requeue():
        assert [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)] == before
