"""Durable file operations whose failures are the output's: write, fsync, rename. Knows paths and bytes only."""

from __future__ import annotations

import errno
import fcntl
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from upcycle.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_REMEDIES: Final = {
    errno.ENOSPC: "free space on that disk, then resume",
    errno.EDQUOT: "free space within the quota, then resume",
    errno.EROFS: "choose an output on a writable file system",
    errno.EACCES: "choose an output in a directory that you may write to",
    errno.EPERM: "choose an output in a directory that you may write to",
    errno.ENOTDIR: "choose an output whose parent is a directory",
    errno.EEXIST: "choose an output whose parent is a directory",
}

DRAFT_SUFFIX: Final = ".tmp"
PENDING_WRITES: Final = 4
SYNC_BYTES: Final = 256 * 1024**2


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn an OSError about `path` into an OutputError that says what to do."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno) if error.errno else None
        raise OutputError(f"cannot write {path}", found=error.strerror or error, remedy=remedy) from error


@contextmanager
def replacing(path: Path) -> Iterator[int]:
    """Yield the descriptor of `<path>.tmp`, which becomes `path` once it is complete and on the disk.

    Raises:
        OutputError: the file cannot be created, synced or renamed.
    """
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with drafting(path, path.with_name(path.name + DRAFT_SUFFIX)) as descriptor:
        yield descriptor


@contextmanager
def drafting(path: Path, draft: Path) -> Iterator[int]:
    """Yield the descriptor of `draft`, which becomes `path` once it is complete and on the disk.

    Raises:
        OutputError: the file cannot be created, synced or renamed.
    """
    with output_errors(path):
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
        with output_errors(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    with output_errors(path):
        draft.rename(path)


@contextmanager
def locked(path: Path, *, busy: str | None = None) -> Iterator[None]:
    """Hold a file's lock, which the operating system drops when the process ends.

    The file stays: others may wait on it.

    Args:
        path: of the file, created if it is not there.
        busy: what to raise when another process holds it; None waits for that process.

    Raises:
        OutputError: another process holds it, or the file cannot be written.
    """
    with output_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0), path)
        except BlockingIOError:
            raise OutputError(str(busy), remedy="wait for it to end") from None
        yield
    finally:
        os.close(descriptor)


def flock(descriptor: int, how: int, path: Path) -> None:
    """Lock an open file; `path` is for the message.

    Raises:
        BlockingIOError: another process holds it, and `how` does not wait.
        OutputError: the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        raise
    except OSError as error:
        raise OutputError(
            f"cannot lock {path}",
            found=error.strerror,
            expected="file locks, without which two processes could spoil each other's files",
            remedy="choose an output on a file system that has them",
        ) from error


def write_all(descriptor: int, data: bytes | memoryview, path: Path) -> None:
    """Write all of `data`; `path` is for the message.

    Raises:
        OutputError: the bytes cannot be written, such as on a full disk.
    """
    rest = memoryview(data)
    with output_errors(path):
        while rest:
            rest = rest[os.write(descriptor, rest) :]


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, which appears complete or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    with replacing(path) as descriptor:
        write_all(descriptor, text.encode(), path)


@contextmanager
def writing_behind(descriptor: int, path: Path) -> Iterator[Callable[[memoryview], None]]:
    """Yield a function that writes in order on another thread, so that the next bytes are made meanwhile.

    At most `PENDING_WRITES` pieces wait; everything is written on the way out. The bytes are put on the disk as they
    come, rather than all at the end while nothing else happens.

    Raises:
        OutputError: from the function or on the way out, the bytes cannot be written.
    """
    pending = deque[Future[None]]()
    unsynced = 0

    def work(piece: memoryview) -> None:
        nonlocal unsynced
        write_all(descriptor, piece, path)
        unsynced += len(piece)
        if unsynced >= SYNC_BYTES:
            with output_errors(path):
                os.fdatasync(descriptor)
            unsynced = 0

    def write(piece: memoryview) -> None:
        if len(pending) == PENDING_WRITES:
            pending.popleft().result()
        pending.append(thread.submit(work, piece))

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="upcycle-write") as thread:
        yield write
        for each in pending:
            each.result()


def sync_directory(path: Path) -> None:
    """Put a directory's entries on the disk.

    Raises:
        OutputError: the directory cannot be synced.
    """
    with output_errors(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
