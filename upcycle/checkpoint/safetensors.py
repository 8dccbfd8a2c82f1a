"""Reads safetensors files: the headers eagerly and checked, the values memory-mapped. Knows no directory layout."""

from __future__ import annotations

import math
import struct
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from safetensors import safe_open

from upcycle.checkpoint.dtypes import TORCH_DTYPES
from upcycle.checkpoint.index import check_copies, gathered, unlisted
from upcycle.checkpoint.pointer import POINTER, not_downloaded
from upcycle.checkpoint.tensors import TensorInfo
from upcycle.errors import SourceError
from upcycle.files.json import NotJsonError, parse_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import torch

LENGTH_BYTES: Final = 8
MAX_HEADER_BYTES: Final = 100_000_000  # safetensors' own limit (`MAX_HEADER_SIZE`)
_FETCH_AGAIN: Final = "the file is truncated or corrupt; copy or download it again"


class SafetensorsReader:
    """Reads the tensors of one or more safetensors files.

    Args:
        files: the files.
        listed: the file that an index names for each tensor; without it, every name is in one file.

    Raises:
        SourceError: a file is truncated or corrupt, or two files hold the same tensor and no index names one of them,
            or hold different ones.
    """

    def __init__(self, files: Iterable[Path], *, listed: Mapping[str, Path] | None = None) -> None:
        self.files = tuple(sorted(files))
        self._open: dict[Path, Any] = {}
        self.tensors, copies = gathered((info for file in self.files for info in read_header(file)), listed)
        self.unlisted = unlisted(self.tensors, listed)
        check_copies(self.tensors, copies, self._read)

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor as a view of the memory-mapped file; see `TensorReader.read`."""
        return self._read(self.tensors[name])

    def _read(self, info: TensorInfo) -> torch.Tensor:
        if info.file not in self._open:
            self._open[info.file] = safe_open(info.file, framework="pt")
        tensor: torch.Tensor = self._open[info.file].get_tensor(info.name)
        return tensor


def read_header(file: Path) -> list[TensorInfo]:
    """Return the tensors that a file's header describes, in storage order, checked against the file's size.

    Raises:
        SourceError: the file cannot be read, or its header and its size do not make a valid safetensors file.
    """
    header, data_bytes = _load_header(file)
    spans = [(*_span(file, name, entry), name) for name, entry in header.items() if name != "__metadata__"]
    spans.sort(key=lambda span: span[:2])
    edges = [(0, 0, ""), *spans]
    for (_, end, before), (begin, _, name) in pairwise(edges):
        if begin != end:
            raise _corrupt(file, f"{name} begins at byte {begin}", f"byte {end}, where {before or 'the data'} ends")
    described = edges[-1][1]
    if described != data_bytes:
        prefix = file.stat().st_size - data_bytes
        raise _corrupt(file, f"{prefix + data_bytes} bytes", f"{prefix + described} bytes, as its header describes")
    return [
        TensorInfo(name=name, dtype=header[name]["dtype"], shape=tuple(header[name]["shape"]), file=file)
        for _, _, name in spans
    ]


def _load_header(file: Path) -> tuple[dict[str, Any], int]:
    """Return the parsed header and the number of bytes that follow it."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length_field = stream.read(LENGTH_BYTES)
            if len(length_field) < LENGTH_BYTES:
                raise _corrupt(file, f"{size} bytes", f"at least {LENGTH_BYTES} bytes, for the header's length")
            if length_field == POINTER[:LENGTH_BYTES]:
                raise not_downloaded(file)
            (length,) = struct.unpack("<Q", length_field)
            if length > MAX_HEADER_BYTES:
                raise _corrupt(file, f"a header length of {length} bytes", f"at most {MAX_HEADER_BYTES}")
            if LENGTH_BYTES + length > size:
                raise _corrupt(file, f"{size} bytes", f"at least {LENGTH_BYTES + length}, as its header length says")
            text = stream.read(length)
    except OSError as error:
        raise SourceError(f"cannot read {file}", found=error.strerror) from error
    try:
        header = parse_json(text)
    except NotJsonError as error:
        raise _corrupt(file, f"a header that is not JSON: {error}", "a JSON header") from error
    if not isinstance(header, dict):
        raise _corrupt(file, f"a header that is a JSON {type(header).__name__}", "a JSON object")
    return header, size - LENGTH_BYTES - length


def _span(file: Path, name: str, entry: Any) -> tuple[int, int]:
    """Return the first and the last-plus-one data byte of a tensor, after checking its header entry."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if all(
            isinstance(size, int) and size >= 0 for size in shape
        ):
            pass
        case _:
            raise _corrupt(file, f"a malformed header entry for {name}", "dtype, shape and data_offsets")
    if dtype not in TORCH_DTYPES:
        raise SourceError(
            f"{file} holds {name} in an unsupported element type", found=dtype, expected=", ".join(TORCH_DTYPES)
        )
    expected = math.prod(shape) * TORCH_DTYPES[dtype].itemsize
    if begin < 0 or end - begin != expected:
        raise _corrupt(file, f"{end - begin} bytes for {name}", f"{expected} bytes for shape {shape} of {dtype}")
    return begin, end


def _corrupt(file: Path, found: str, expected: str) -> SourceError:
    return SourceError(f"{file} is not a valid safetensors file", found=found, expected=expected, remedy=_FETCH_AGAIN)
