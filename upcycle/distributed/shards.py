"""Files of checkpoints: reads sharded ones, and says what is wrong. Knows torch's distributed checkpoints (DCP)."""

from __future__ import annotations

import os
import shlex
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from upcycle.errors import OutputError, SourceError, UpcycleError
from upcycle.files.durable import output_errors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MODEL, OPTIMIZER, REST = "state_dict", "optimizer", "rest.pt"
LAST, BEST = "last.ckpt", "best.ckpt"


def going_on(path: Path) -> str:
    """What to do about a checkpoint that a run cannot go on from."""
    best = path.with_name(BEST)
    # The shards that a link names are deleted when it names others, so no two may name the same.
    if path.name == LAST and best.is_file():
        again = shlex.join(["cp", str(best), str(path)])
        return f"`{again}` goes on from the lowest held-out loss, overwrite=true starts again"
    return "start again with overwrite=true"


def other(path: Path) -> str:
    """What to do about a checkpoint that cannot be exported."""
    there = path.with_name(BEST if path.name == LAST else LAST)
    if there.exists():
        return f"take the other one with checkpoint={there.stem}"
    return "train again with overwrite=true" if path.exists() else "go on training with resume=auto"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what fails while a checkpoint is written into the output's error.

    Raises:
        OutputError: the files cannot be written, on this rank or on another.
    """
    with output_errors(path):
        try:
            yield
        except CheckpointException as collected:
            rank, error = _first(collected)
            if isinstance(error, OSError):
                raise error from collected
            raise OutputError(f"cannot write {path}", found=f"rank {rank}: {_line(error)}") from error


@contextmanager
def reading(path: Path, remedy: str) -> Iterator[None]:
    """Turn what fails while a checkpoint is read into the source's error; `remedy` is for one that is damaged.

    Raises:
        SourceError: it is damaged, or is a link to what is not there.
    """
    if path.is_symlink() and not path.exists():
        raise SourceError(
            "the checkpoint is gone",
            found=f"{path}, a link to {os.readlink(path)}, which is not there",
            remedy="put it back, or start again with overwrite=true",
        )
    try:
        yield
    except UpcycleError:
        raise
    except CheckpointException as collected:
        rank, error = _first(collected)
        raise _damaged(path, f"rank {rank}: {_line(error)}", remedy) from error
    except Exception as error:  # torch.load raises what its parsers raise
        raise _damaged(path, _line(error), remedy) from error


def read_rest(path: Path) -> dict[str, Any]:
    """What a sharded checkpoint holds besides model and optimizer."""
    content: dict[str, Any] = torch.load(path / REST, map_location="cpu", weights_only=True)
    return content


def read_sharded(path: Path) -> dict[str, Any]:
    """The whole model of a sharded checkpoint, in this process's memory, as `state_dict`; and the rest."""
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    weights = {
        name.removeprefix(f"{MODEL}."): torch.empty(tensor.size, dtype=tensor.properties.dtype)
        for name, tensor in stored.items()
        if name.startswith(f"{MODEL}.") and isinstance(tensor, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        load({MODEL: weights}, checkpoint_id=path, no_dist=True)
    return {MODEL: weights, **read_rest(path)}


def _first(collected: CheckpointException) -> tuple[int, BaseException]:
    """The failure of the first rank that has one; torch's collection of them is no Exception."""
    return next((rank, error) for rank, (error, _trace) in sorted(collected.failures.items()))


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _damaged(path: Path, found: str, remedy: str) -> SourceError:
    return SourceError("the checkpoint is damaged", found=f"{path}: {found}", remedy=remedy)
