"""The record of a staging directory, and who is writing there (flock). Knows bytes only."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import weakref
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from upcycle.errors import OutputError
from upcycle.files.durable import DRAFT_SUFFIX, flock, output_errors, write_all, write_text
from upcycle.files.json import parse_json

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self

CONTROL: Final = ".upcycle-staging.json"
PART_LOCK: Final = ".upcycle-part-{}.lock"
_THERE_ALREADY: Final = (errno.ENOTEMPTY, errno.EEXIST)


class StagingLock:
    """A claim on a staging directory, which the operating system drops when the process ends.

    Make one with `acquire`, for the whole directory, or `share`, for a part of the work in it.
    """

    def __init__(self, directory: Path, control: int, *others: int) -> None:
        self.directory = directory
        self._control = control
        # Also releases a claim whose owner was dropped after an error, so that the same process can try again.
        self.release = weakref.finalize(self, _close, control, *others)

    @classmethod
    def acquire(cls, directory: Path) -> Self:
        """Claim a directory that exists.

        Raises:
            OutputError: another process holds it, or the control file cannot be written or locked.
        """
        busy = f"another process is writing {directory}"
        return cls(directory, _locked(directory / CONTROL, fcntl.LOCK_EX, busy, required=True))

    @classmethod
    def share(cls, directory: Path, *, fingerprint: str, part: str) -> Self:
        """Claim a part of the work in a directory, which is made with its record if it is not there.

        What parts do is safe without locks, which not every shared file system has, or has between machines. Where
        they work, a part that is started twice is refused at once.

        Args:
            directory: the staging directory.
            fingerprint: to record.
            part: name of the part.

        Raises:
            OutputError: another process holds that part or the whole directory, or it cannot be written.
        """
        _make(directory, fingerprint)
        busy = f"another process is writing {directory}"
        control = _locked(directory / CONTROL, fcntl.LOCK_SH, busy, required=False)
        try:
            mark = directory / PART_LOCK.format(part.replace("/", "-of-"))
            return cls(directory, control, _locked(mark, fcntl.LOCK_EX, f"{busy} as part={part}", required=False))
        except BaseException:
            os.close(control)
            raise

    def start(self, fingerprint: str) -> None:
        """Empty the directory and record the fingerprint of the run that begins.

        Raises:
            OutputError: the directory cannot be emptied or written.
        """
        control = self.directory / CONTROL
        with output_errors(self.directory):
            # The record goes first: without it, what a kill leaves of the old files is never taken for this run's.
            os.ftruncate(self._control, 0)
            os.fsync(self._control)
            for entry in self.directory.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                elif entry != control:
                    entry.unlink()
            os.lseek(self._control, 0, os.SEEK_SET)
        write_all(self._control, _record(fingerprint).encode(), control)
        with output_errors(control):
            os.fsync(self._control)


def recorded(directory: Path) -> str | None:
    """Return the fingerprint of the run that a staging directory belongs to; None if it was killed before its work.

    Raises:
        OutputError: the record cannot be read.
    """
    control = directory / CONTROL
    if not control.exists():
        return None
    with output_errors(control):
        content = control.read_bytes()
    try:
        return str(parse_json(content)["fingerprint"])
    except (ValueError, LookupError, TypeError):
        return None


def drop_drafts(directory: Path) -> None:
    """Delete the incomplete files of processes that have ended.

    Raises:
        OutputError: they cannot be deleted.
    """
    with output_errors(directory):
        for draft in directory.rglob(f"*{DRAFT_SUFFIX}"):
            draft.unlink()


def retire(directory: Path) -> None:
    """Delete what of a staging directory is not the output's.

    Raises:
        OutputError: it cannot be deleted.
    """
    drop_drafts(directory)
    with output_errors(directory):
        for mark in (directory / CONTROL, *directory.glob(PART_LOCK.format("*"))):
            mark.unlink()


def _make(directory: Path, fingerprint: str) -> None:
    """Make a directory that has its record from the first moment on, unless another process was first."""
    made = directory.with_name(f"{directory.name}.{uuid4().hex}")
    write_text(made / CONTROL, _record(fingerprint))
    with output_errors(directory):
        try:
            made.rename(directory)
        except OSError as error:
            shutil.rmtree(made)
            if error.errno not in _THERE_ALREADY:
                raise


def _record(fingerprint: str) -> str:
    return json.dumps({"fingerprint": fingerprint})


def _locked(path: Path, how: int, busy: str, *, required: bool) -> int:
    """Open a file and lock it; where the file system has no locks, only open it unless the lock is required."""
    with output_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    error = OutputError(busy, remedy="wait for it to end, or choose another output")
    try:
        flock(descriptor, how | fcntl.LOCK_NB, path)
        # The holder may have committed between our open and our lock: then this file is no longer the one there.
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except BlockingIOError:
        pass
    except OutputError as no_locks:
        if not required:
            return descriptor
        error = no_locks
    os.close(descriptor)
    raise error


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
