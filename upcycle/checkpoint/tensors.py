"""What every reader offers: the tensors' names, types and shapes, and their values one at a time. Knows dtypes only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from upcycle.checkpoint.dtypes import dtype_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor of a checkpoint, without its values.

    Attributes:
        name: the Hugging Face parameter name.
        dtype: safetensors code of the elements that `read` returns.
        shape: elements per dimension.
        file: the file that holds the bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def nbytes(self) -> int:
        """Bytes of the values that `read` returns (for GGUF: after dequantisation)."""
        return math.prod(self.shape) * dtype_bytes(self.dtype)


class TensorReader(Protocol):
    """A checkpoint opened for reading; no values are in memory until `read`."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name, in storage order."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that bytes come from, sorted."""

    @property
    def unlisted(self) -> frozenset[str]:
        """Names of tensors that lie in the files of an index which does not list them."""

    def read(self, name: str) -> torch.Tensor:
        """Return the contiguous CPU tensor of that name, in the shape and dtype that `tensors` states.

        It may be a view of the memory-mapped file: do not write to it.

        Raises:
            KeyError: no tensor has that name.
            SourceError: the bytes turn out to be unreadable.
        """
