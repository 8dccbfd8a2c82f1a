"""Writes a checkpoint so that its directory appears complete or not at all, and so that an interrupted run resumes.

Everything is written into a sibling directory, `.<name>.partial`, that becomes the output in one rename. Knows bytes.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from upcycle.checkpoint.dtypes import torch_dtype
from upcycle.checkpoint.layout import Shard, TensorSpec, index_json, layout_shards
from upcycle.checkpoint.lock import StagingLock
from upcycle.errors import OutputError, SourceError
from upcycle.files import (
    output_errors,
    replacing,
    sync_directory,
    write_all,
    write_text,
    writing_behind,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType
    from typing import Self

__all__ = ["Shard", "Staging", "TensorSpec", "check_replaceable", "index_json", "layout_shards"]

_log = logging.getLogger("upcycle")
# Progress is reported at least this often, however large the chunks are.
PIECE_BYTES: Final = 16 * 1024**2


class Staging:
    """The directory that becomes `output` once everything in it is complete.

    Make one with `open`; it is a context manager that releases the lock (and keeps the files) on the way out.
    """

    def __init__(self, output: Path, lock: StagingLock, *, overwrite: bool) -> None:
        self.output = output
        self.overwrite = overwrite
        self.directory = lock.directory
        self._lock = lock

    @classmethod
    def open(cls, output: Path, *, fingerprint: str, overwrite: bool, resume: bool) -> Staging:
        """Prepare to write `output`, and keep other processes from doing the same.

        Args:
            output: the directory to be made; its parents are made too.
            fingerprint: identifies the source and the settings; only a run with the same one can be resumed.
            overwrite: replace an existing output, and drop an interrupted run unless `resume` is set.
            resume: continue an interrupted run if there is one.

        Raises:
            OutputError: something is in the way, another process is writing there, or the place is not writable.
        """
        output = output.resolve()
        check_replaceable(output, overwrite=overwrite)
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
                    remedy="continue it with resume=true, or start again with overwrite=true",
                )
            if resume and not found:
                _log.info("nothing to resume at %s: starting from the beginning", output)
            if resume and found and lock.resumes(fingerprint):
                lock.drop_drafts()
            else:
                lock.start(fingerprint)
        except BaseException:
            lock.release()
            raise
        return cls(output, lock, overwrite=overwrite)

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

    def has(self, shard: Shard) -> bool:
        """Return whether the shard is complete from an interrupted run: renamed into place, and of its exact size."""
        path = self._path(shard.file)
        return path.is_file() and path.stat().st_size == len(shard.header()) + shard.nbytes

    def write_shard(
        self,
        shard: Shard,
        chunks: Callable[[TensorSpec], Iterable[torch.Tensor]],
        on_bytes: Callable[[int], None],
    ) -> None:
        """Stream one safetensors file, which appears under its name only when complete.

        Args:
            shard: the file and its tensors.
            chunks: returns a tensor's pieces in row-major order, contiguous on the CPU and of the tensor's dtype;
                called once per tensor, wider element types first.
            on_bytes: called with the number of data bytes just handed on to be written.

        Raises:
            OutputError: the file cannot be written.
            AssertionError: the pieces are not the tensor that the shard describes.
        """
        path = self._path(shard.file)
        with replacing(path) as descriptor, writing_behind(descriptor, path) as write:
            write(memoryview(shard.header()))
            for spec in shard.stored_order():
                written = 0
                for chunk in chunks(spec):
                    for piece in _pieces(spec, chunk):
                        write(piece)
                        written += len(piece)
                        on_bytes(len(piece))
                if written != spec.nbytes:
                    raise AssertionError(f"{spec.name}: the chunks hold {written} bytes, not {spec.nbytes}")

    def write_text(self, name: str, text: str) -> None:
        """Write a UTF-8 file of that name (a relative path is allowed).

        Raises:
            OutputError: the file cannot be written.
        """
        write_text(self._path(name), text)

    def copy_file(self, source: Path, name: str) -> None:
        """Copy a file under that name (a relative path is allowed).

        Raises:
            SourceError: the source cannot be read.
            OutputError: the copy cannot be written.
        """
        path = self._path(name)
        with replacing(path) as descriptor:
            try:
                stream = source.open("rb")
            except OSError as error:
                raise SourceError(f"cannot read {source}", found=error.strerror) from error
            with stream:
                while piece := stream.read(PIECE_BYTES):
                    write_all(descriptor, piece, path)

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
                self._lock.retire()
                self.directory.rename(self.output)
            except OSError:
                if replaced:
                    old.rename(self.output)
                raise
        sync_directory(self.output.parent)
        self._lock.release()
        if replaced:
            shutil.rmtree(old, ignore_errors=True)
        if old.exists():
            _log.warning("%s is in place, but the old one could not be deleted: remove %s", self.output, old)

    def _path(self, name: str) -> Path:
        relative = Path(name)
        assert not relative.is_absolute(), name
        assert ".." not in relative.parts, name
        return self.directory / relative


def _pieces(spec: TensorSpec, chunk: torch.Tensor) -> Iterable[memoryview]:
    """Return views of a chunk's bytes, copying nothing."""
    if chunk.dtype != torch_dtype(spec.dtype) or not chunk.is_contiguous() or chunk.device.type != "cpu":
        raise AssertionError(
            f"{spec.name}: a chunk is {chunk.dtype} on {chunk.device} with strides {chunk.stride()}, "
            f"not contiguous {spec.dtype} on the CPU"
        )
    view = chunk.detach().reshape(-1).view(torch.uint8).numpy().data
    return (view[start : start + PIECE_BYTES] for start in range(0, len(view), PIECE_BYTES))


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
