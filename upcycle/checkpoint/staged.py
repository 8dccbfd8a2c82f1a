"""Files of a staging directory, each of which has its name only when it is complete. Knows bytes only."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from uuid import uuid4

import torch

from upcycle.checkpoint.dtypes import torch_dtype
from upcycle.checkpoint.lock import recorded
from upcycle.errors import OutputError, SourceError
from upcycle.files.durable import DRAFT_SUFFIX, drafting, output_errors, write_all, writing_behind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from upcycle.checkpoint.layout import Shard, TensorSpec

# Progress is reported at least this often, however large the chunks are.
PIECE_BYTES: Final = 16 * 1024**2


@dataclass(kw_only=True)
class StagedFiles:
    """Writes into the staging directory of one run; any number of processes may, even the same file.

    Attributes:
        directory: the staging directory.
        fingerprint: of the run. Once another run has the directory, nothing is written there any more.
    """

    directory: Path
    fingerprint: str

    def has(self, shard: Shard) -> bool:
        """Return whether the shard is complete: renamed into place, and of its exact size."""
        path = self.directory / shard.file
        return path.is_file() and path.stat().st_size == len(shard.header()) + shard.nbytes

    def write_shard(
        self,
        shard: Shard,
        chunks: Callable[[TensorSpec], Iterable[torch.Tensor]],
        on_bytes: Callable[[int], None],
    ) -> None:
        """Stream one safetensors file.

        Args:
            shard: the file and its tensors.
            chunks: returns a tensor's pieces in row-major order, contiguous on the CPU and of the tensor's dtype;
                called once per tensor, wider element types first.
            on_bytes: called with the number of data bytes just handed on to be written.

        Raises:
            OutputError: the file cannot be written.
            AssertionError: the pieces are not the tensor that the shard describes.
        """
        with self._drafting(shard.file) as (descriptor, path), writing_behind(descriptor, path) as write:
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
        with self._drafting(name) as (descriptor, path):
            write_all(descriptor, text.encode(), path)

    def copy_file(self, source: Path, name: str) -> None:
        """Copy a file under that name (a relative path is allowed).

        Raises:
            SourceError: the source cannot be read.
            OutputError: the copy cannot be written.
        """
        with self._drafting(name) as (descriptor, path):
            try:
                stream = source.open("rb")
            except OSError as error:
                raise SourceError(f"cannot read {source}", found=error.strerror) from error
            with stream:
                while piece := stream.read(PIECE_BYTES):
                    write_all(descriptor, piece, path)

    @contextmanager
    def _drafting(self, name: str) -> Iterator[tuple[int, Path]]:
        """Yield the descriptor of a draft that no other process has, and what it becomes."""
        path = self.directory / name
        assert not Path(name).is_absolute(), name
        assert ".." not in Path(name).parts, name
        with output_errors(path):
            if path.parent != self.directory:
                path.parent.mkdir(exist_ok=True)
        with drafting(path, path.with_name(f"{path.name}.{uuid4().hex}{DRAFT_SUFFIX}")) as descriptor:
            # A run that takes the directory over removes the record and then the drafts: this one if it was there.
            found = recorded(self.directory)
            if found != self.fingerprint:
                raise OutputError(
                    f"{self.directory} belongs to another run by now",
                    found=found or "no record",
                    expected=self.fingerprint,
                    remedy="start again when that one has ended",
                )
            yield descriptor, path


def _pieces(spec: TensorSpec, chunk: torch.Tensor) -> Iterable[memoryview]:
    """Return views of a chunk's bytes, copying nothing."""
    if chunk.dtype != torch_dtype(spec.dtype) or not chunk.is_contiguous() or chunk.device.type != "cpu":
        raise AssertionError(
            f"{spec.name}: a chunk is {chunk.dtype} on {chunk.device} with strides {chunk.stride()}, "
            f"not contiguous {spec.dtype} on the CPU"
        )
    view = chunk.detach().reshape(-1).view(torch.uint8).numpy().data
    return (view[start : start + PIECE_BYTES] for start in range(0, len(view), PIECE_BYTES))
