"""Ctrl-C held back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from upcycle.convert.interruption import uninterrupted

if TYPE_CHECKING:
    from collections.abc import Iterator

MASK = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """A shell that put the tests into the background has SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def another_thread() -> Iterator[None]:
    """It does not block the signal, so the process takes it there."""
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    yield
    end.set()
    thread.join()


def test_ctrl_c_comes_at_the_end(another_thread):
    steps = []

    def work() -> None:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            steps.extend(range(1000))

    with pytest.raises(KeyboardInterrupt):
        work()
    assert len(steps) == 1000
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nothing_comes_of_nothing():
    with uninterrupted():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_processes_never_see_it():
    with uninterrupted():
        inside = subprocess.run([sys.executable, "-c", MASK], capture_output=True, text=True, check=True)
    assert inside.stdout == "True\n"


def test_what_ignores_ctrl_c_still_does():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_in_another_thread_it_is_not_ours():
    errors = []

    def run() -> None:
        try:
            with uninterrupted():
                pass
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not errors
