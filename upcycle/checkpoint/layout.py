"""Which tensor goes into which output file, and the bytes of that file's header. Knows names, types and sizes only."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from upcycle.checkpoint.dtypes import dtype_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

# The data must start aligned to the widest element type (F64, I64, C64).
_ALIGNMENT: Final = 8


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor to be written.

    Attributes:
        name: the Hugging Face parameter name.
        dtype: safetensors code.
        shape: elements per dimension.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * dtype_bytes(self.dtype)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One safetensors file to be written.

    Attributes:
        file: its name.
        tensors: what it holds, in the order of the layout.
    """

    file: str
    tensors: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors' data, without the header."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def stored_order(self) -> list[TensorSpec]:
        """Return the tensors as they lie in the file: wider element types first, so that every one is aligned."""
        return sorted(self.tensors, key=lambda tensor: -dtype_bytes(tensor.dtype))

    def header(self) -> bytes:
        """Return the file's bytes before the data: the length field and the JSON header, padded with spaces."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in self.stored_order():
            begin, end = end, end + tensor.nbytes
            entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return struct.pack("<Q", len(text)) + text


def layout_shards(specs: Sequence[TensorSpec], max_shard_bytes: int) -> tuple[Shard, ...]:
    """Cut tensors into files of at most `max_shard_bytes` of data, keeping their order.

    A tensor larger than the limit gets a file of its own.

    Args:
        specs: the tensors, every name once.
        max_shard_bytes: the limit in bytes, positive.

    Returns:
        The files: `model.safetensors` if one is enough, else `model-00001-of-000NN.safetensors` and so on.
    """
    assert max_shard_bytes > 0, max_shard_bytes
    assert len({spec.name for spec in specs}) == len(specs), "a tensor name occurs twice"
    groups: list[list[TensorSpec]] = []
    filled = 0
    for spec in specs:
        if not groups or filled + spec.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    if len(groups) == 1:
        return (Shard(file="model.safetensors", tensors=tuple(groups[0])),)
    return tuple(
        Shard(file=f"model-{number:05d}-of-{len(groups):05d}.safetensors", tensors=tuple(group))
        for number, group in enumerate(groups, start=1)
    )


def index_json(shards: Sequence[Shard]) -> str:
    """Return the text of `model.safetensors.index.json`, the same for the same layout."""
    content = {
        "metadata": {"total_size": sum(shard.nbytes for shard in shards)},
        "weight_map": {tensor.name: shard.file for shard in shards for tensor in shard.tensors},
    }
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
