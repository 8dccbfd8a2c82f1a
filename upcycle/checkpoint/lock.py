"""The control file of a staging directory: who is writing there (flock), and with which settings. Knows bytes only."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import weakref
from typing import TYPE_CHECKING, Final

from upcycle.errors import OutputError
from upcycle.files import DRAFT_SUFFIX, output_errors, write_all

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self

CONTROL: Final = ".upcycle-staging.json"
_log = logging.getLogger("upcycle")


class StagingLock:
    """An exclusive claim on a staging directory, which the operating system drops when the process ends.

    Make one with `acquire`.
    """

    def __init__(self, directory: Path, descriptor: int) -> None:
        self.directory = directory
        self._descriptor = descriptor
        # Also releases a claim whose owner was dropped after an error, so that the same process can try again.
        self.release = weakref.finalize(self, os.close, descriptor)

    @classmethod
    def acquire(cls, directory: Path) -> Self:
        """Claim a directory that exists.

        Raises:
            OutputError: another process holds it, or the control file cannot be written.
        """
        control = directory / CONTROL
        with output_errors(control):
            descriptor = os.open(control, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        lock = cls(directory, descriptor)
        with output_errors(control):
            claimed = _claim(descriptor, control)
        if not claimed:
            lock.release()
            raise OutputError(
                f"another process is writing {directory}", remedy="wait for it to end, or choose another output"
            )
        return lock

    def resumes(self, fingerprint: str) -> bool:
        """Return whether what the directory holds can be continued; False if it was killed before or after its work.

        Raises:
            OutputError: it was started with another fingerprint.
        """
        with output_errors(self.directory):
            content = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
        try:
            found = json.loads(content)["fingerprint"]
        except (ValueError, LookupError, TypeError):
            _log.info("%s holds no finished work to resume: starting from the beginning", self.directory)
            return False
        if found != fingerprint:
            raise OutputError(
                f"{self.directory} was started with other settings or another source",
                found=f"fingerprint {found}",
                expected=f"fingerprint {fingerprint}",
                remedy="run with the same settings, or start again with overwrite=true and without resume",
            )
        return True

    def start(self, fingerprint: str) -> None:
        """Empty the directory and record the fingerprint of the run that begins.

        Raises:
            OutputError: the directory cannot be emptied or written.
        """
        control = self.directory / CONTROL
        with output_errors(self.directory):
            # The record goes first: without it, what a kill leaves of the old files is never taken for this run's.
            os.ftruncate(self._descriptor, 0)
            os.fsync(self._descriptor)
            for entry in self.directory.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                elif entry != control:
                    entry.unlink()
            os.lseek(self._descriptor, 0, os.SEEK_SET)
        write_all(self._descriptor, json.dumps({"fingerprint": fingerprint}).encode(), control)
        with output_errors(control):
            os.fsync(self._descriptor)

    def drop_drafts(self) -> None:
        """Delete the incomplete files of the run that is resumed.

        Raises:
            OutputError: they cannot be deleted.
        """
        with output_errors(self.directory):
            for draft in self.directory.rglob(f"*{DRAFT_SUFFIX}"):
                draft.unlink()

    def retire(self) -> None:
        """Remove the control file, so that the directory can become the output."""
        (self.directory / CONTROL).unlink()


def _claim(descriptor: int, control: Path) -> bool:
    """Lock an open control file, and return whether that made the directory ours."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # The holder may have committed between our open and our lock: then this file is no longer the one there.
    return control.exists() and os.path.samestat(os.fstat(descriptor), control.stat())
