"""Writes a checkpoint so that its directory appears complete or not at all, and so that an interrupted run resumes.

Everything is written into a sibling directory, `.<name>.partial`, that becomes the output in one rename. Knows bytes.
"""

from __future__ import annotations

import logging
import shutil
from typing import TYPE_CHECKING, Final

from upcycle.checkpoint.layout import Shard, TensorSpec, index_json, layout_shards
from upcycle.checkpoint.lock import StagingLock, drop_drafts, recorded, retire
from upcycle.checkpoint.renames import check_renames
from upcycle.checkpoint.staged import StagedFiles
from upcycle.errors import OutputError
from upcycle.files.durable import output_errors, sync_directory

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType
    from typing import Self

__all__ = ["Shard", "StagedFiles", "Staging", "TensorSpec", "check_replaceable", "index_json", "layout_shards"]

_log = logging.getLogger("upcycle")
_SAME: Final = "run with the same settings, source and versions, or"
_CONTINUE: Final = f"{_SAME} start again with overwrite=true and without resume"
_JOIN: Final = f"{_SAME} delete that directory when no part is running, and start every part again"


class Staging(StagedFiles):
    """The directory that becomes `output` once everything in it is complete.

    Make one with `open` or `join`; it is a context manager that releases the lock (and keeps the files) on the way out.
    """

    def __init__(self, output: Path, lock: StagingLock, *, fingerprint: str, overwrite: bool) -> None:
        super().__init__(directory=lock.directory, fingerprint=fingerprint)
        self.output = output
        self.overwrite = overwrite
        self._lock = lock

    @classmethod
    def open(cls, output: Path, *, fingerprint: str, overwrite: bool, resume: bool | None) -> Staging:
        """Prepare to write `output`, and keep other processes from doing the same.

        Args:
            output: the directory to be made; its parents are made too.
            fingerprint: identifies the source and the settings; only a run with the same one can be resumed.
            overwrite: replace an existing output, and drop an interrupted run unless `resume` is set.
            resume: continue an interrupted run if there is one; None for what is made in one go.

        Raises:
            OutputError: something is in the way, another process is writing there, or the place is not fit for it.
        """
        output = output.resolve()
        check_replaceable(output, overwrite=overwrite)
        check_renames(output)
        partial = _sibling(output, "partial")
        with output_errors(output):
            found = partial.is_dir()
            partial.mkdir(parents=True, exist_ok=True)
        lock = StagingLock.acquire(partial)
        try:
            _recover(output)
            check_replaceable(output, overwrite=overwrite)  # again: recovering may have put an output there
            if found and not (resume or overwrite):
                raise OutputError(
                    f"an interrupted run left {partial}",
                    expected="no earlier run for this output",
                    remedy=("continue it with resume=true, or " if resume is not None else "")
                    + "start again with overwrite=true",
                )
            if resume and found and _is_of(partial, fingerprint, _CONTINUE):
                drop_drafts(partial)
            else:
                if resume:
                    _log.info("nothing to resume at %s: starting from the beginning", output)
                lock.start(fingerprint)
        except BaseException:
            lock.release()
            raise
        return cls(output, lock, fingerprint=fingerprint, overwrite=overwrite)

    @classmethod
    def join(cls, output: Path, *, fingerprint: str, part: str) -> Staging:
        """Prepare to write a part of `output`, whose other parts other processes write, maybe on other machines.

        What is complete from an interrupted run is kept.

        Args:
            output: the directory to be made; its parents are made too.
            fingerprint: identifies the source and the settings, which all parts must share.
            part: name of the part.

        Raises:
            OutputError: as `open`; or another part has another fingerprint.
        """
        output = output.resolve()
        check_replaceable(output, overwrite=False)
        check_renames(output)
        partial = _sibling(output, "partial")
        lock = StagingLock.share(partial, fingerprint=fingerprint, part=part)
        try:
            if not _is_of(partial, fingerprint, _JOIN):
                raise OutputError(
                    f"{partial} does not say what it was started with",
                    expected="a directory that the parts of one conversion have started",
                    remedy=_JOIN,
                )
        except BaseException:
            lock.release()
            raise
        return cls(output, lock, fingerprint=fingerprint, overwrite=False)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release the lock; an uncommitted run stays on the disk, to be resumed."""
        self.close()

    def close(self) -> None:
        """Release the lock, leaving the files; harmless after `commit`."""
        self._lock.release()

    def committed(self) -> bool:
        """Return whether the output is there; another process with the same part of it may have been faster."""
        return self.output.exists() and not self.directory.exists()

    def commit(self) -> None:
        """Make the staged directory the output, in one rename; an existing output is moved aside and then deleted.

        Raises:
            OutputError: the rename failed, and the existing output, if any, is back in its place; or an output
                appeared that may not be replaced.
        """
        old = _sibling(self.output, "old")
        check_replaceable(self.output, overwrite=self.overwrite)  # again: it may have appeared since `open`
        for directory in (*(path for path in self.directory.rglob("*") if path.is_dir()), self.directory):
            sync_directory(directory)
        with output_errors(self.output):
            replaced = self.output.exists()
            if replaced:
                self.output.rename(old)
            try:
                self.directory.rename(self.output)
            except OSError:
                if replaced:
                    old.rename(self.output)
                raise
        retire(self.output)
        sync_directory(self.output.parent)
        self._lock.release()
        if replaced:
            shutil.rmtree(old, ignore_errors=True)
        if old.exists():
            _log.warning("%s is in place, but the old one could not be deleted: remove %s", self.output, old)


def _sibling(output: Path, role: str) -> Path:
    return output.with_name(f".{output.name}.{role}")


def check_replaceable(output: Path, *, overwrite: bool) -> None:
    """Check that nothing is at `output` (a resolved path) that may not, or should not, be replaced.

    Raises:
        OutputError: there is.
    """
    with output_errors(output):
        if not output.exists():
            return
        if not output.is_dir():
            raise OutputError(f"the output {output} is a file", expected="a directory, or nothing there yet")
        names = {entry.name for entry in output.iterdir()}
    if not overwrite:
        raise OutputError(
            f"the output {output} exists already", remedy="replace it with overwrite=true, or choose another output"
        )
    if names and "config.json" not in names:
        raise OutputError(
            f"the output {output} holds something else than a model checkpoint, which overwrite=true will not delete",
            found=", ".join(sorted(names)[:8]),
            expected="a directory with a config.json, an empty one, or nothing there yet",
            remedy="choose another output",
        )


def _recover(output: Path) -> None:
    """Undo, or finish, a commit that was killed while it replaced an existing output."""
    old = _sibling(output, "old")
    with output_errors(output):
        if old.exists() and output.exists():
            shutil.rmtree(old)
        elif old.exists():
            old.rename(output)
            _log.info("restored %s, which a killed run had moved aside", output)


def _is_of(partial: Path, fingerprint: str, remedy: str) -> bool:
    """Return whether a staging directory holds work of this run; False if it was killed before or after its work.

    Raises:
        OutputError: it holds that of another one.
    """
    found = recorded(partial)
    if found not in (None, fingerprint):
        raise OutputError(
            f"{partial} was started with other settings or another source",
            found=f"fingerprint {found}",
            expected=f"fingerprint {fingerprint}",
            remedy=remedy,
        )
    return found is not None
