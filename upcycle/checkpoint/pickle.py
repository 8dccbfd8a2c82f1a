"""Reads PyTorch `.bin` files with `weights_only` (no code in them runs), memory-mapped. Knows no directory layout."""

from __future__ import annotations

import logging
import pickle
import zipfile
from typing import TYPE_CHECKING

import torch

from upcycle.checkpoint.dtypes import dtype_code
from upcycle.checkpoint.index import check_copies, gathered, unlisted
from upcycle.checkpoint.pointer import is_pointer, not_downloaded
from upcycle.checkpoint.tensors import TensorInfo
from upcycle.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

_log = logging.getLogger("upcycle")


class PickleReader:
    """Reads the tensors of one or more PyTorch pickles.

    Args:
        files: the files.
        listed: the file that an index names for each tensor; without it, every name is in one file.

    Raises:
        SourceError: a file is corrupt or holds more than tensors by name, or two files hold the same tensor and no
            index names one of them, or hold different ones.
    """

    def __init__(self, files: Iterable[Path], *, listed: Mapping[str, Path] | None = None) -> None:
        self.files = tuple(sorted(files))
        self._values = {file: _load(file) for file in self.files}
        self.tensors, copies = gathered(self._stored(), listed)
        self.unlisted = unlisted(self.tensors, listed)
        check_copies(self.tensors, copies, self._read)

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor, as a view of the mapped file where it is contiguous; see `TensorReader.read`."""
        return self._read(self.tensors[name])

    def _read(self, info: TensorInfo) -> torch.Tensor:
        return self._values[info.file][info.name].detach().contiguous()

    def _stored(self) -> Iterator[TensorInfo]:
        for file, values in self._values.items():
            for name, tensor in values.items():
                yield TensorInfo(name=name, dtype=dtype_code(tensor.dtype), shape=tuple(tensor.shape), file=file)


def _load(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of one pickle by name."""
    if is_pointer(file):
        raise not_downloaded(file)
    # Only the zip layout (torch >= 1.6) can be mapped; an older file is read whole.
    mapped = file.is_file() and zipfile.is_zipfile(file)
    _log.warning(
        "%s is a pickle: reading it with weights_only=True, so that no code in it runs%s; prefer safetensors",
        file,
        "" if mapped else " (whole, in memory: its layout is older than torch 1.6)",
    )
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise SourceError(f"cannot read {file}", found=error.strerror) from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError) as error:
        raise SourceError(
            f"{file} cannot be loaded as weights only",
            found=_reason(error),
            expected="a PyTorch file of tensors by name and nothing else",
            remedy="do not trust this file; use the model's safetensors files, or a complete copy",
        ) from error
    strays = (
        {type(value).__name__ for value in state.values() if not isinstance(value, torch.Tensor)}
        if isinstance(state, dict)
        else {type(state).__name__}
    )
    if strays:
        raise SourceError(
            f"{file} is not a state dict", found=", ".join(sorted(strays)), expected="a dict of tensors by name"
        )
    return dict(state)


def _reason(error: Exception) -> str:
    """The line of torch's message that says what is wrong: not the first, which recommends weights_only=False."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-2] if len(lines) > 2 else lines[0]
