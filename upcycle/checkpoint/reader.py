"""Opens a checkpoint, whatever its layout: single, sharded, pickled or GGUF. Knows the other readers of this room."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from upcycle.checkpoint.gguf import GgufReader
from upcycle.checkpoint.index import check_agreement, confined, indexed_files, read_weight_map
from upcycle.checkpoint.pickle import PickleReader
from upcycle.checkpoint.safetensors import SafetensorsReader
from upcycle.checkpoint.tensors import TensorInfo, TensorReader
from upcycle.errors import SourceError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["TensorInfo", "TensorReader", "open_reader", "read_index_names"]

SAFETENSORS: Final = "model.safetensors"
PICKLE: Final = "pytorch_model.bin"
INDEX_SUFFIX: Final = ".index.json"


def open_reader(path: Path) -> TensorReader:
    """Open a checkpoint for reading, preferring safetensors to pickles.

    Args:
        path: a checkpoint directory, or a `.gguf` file.

    Raises:
        SourceError: there is no checkpoint at `path`, or it is damaged; the message names the file.
    """
    if path.suffix == ".gguf" and path.is_file():
        return GgufReader(path)
    if not path.is_dir():
        raise SourceError(
            f"{path} is not a checkpoint",
            found="a file" if path.exists() else "nothing there",
            expected="a directory with safetensors files, or a .gguf file",
        )
    for name, reader in ((SAFETENSORS, SafetensorsReader), (PICKLE, PickleReader)):
        index = path / (name + INDEX_SUFFIX)
        if index.is_file():
            return _open_sharded(index, reader)
        names = [name] if (path / name).is_file() else []
        if not names and reader is SafetensorsReader:
            names = [file.name for file in path.glob("*.safetensors")]
        if names:
            return reader([confined(path, name) for name in names])
    raise _no_weights(path)


def read_index_names(path: Path) -> tuple[str, ...] | None:
    """Return the tensor names of `model.safetensors.index.json` alone, or None where there is no such file.

    No weight file is needed, so a plan can be made for a model that is not on this machine.

    Args:
        path: a checkpoint directory.

    Raises:
        SourceError: the index is there but malformed.
    """
    index = path / (SAFETENSORS + INDEX_SUFFIX)
    return tuple(read_weight_map(index)) if index.is_file() else None


def _open_sharded(index: Path, reader: type[SafetensorsReader | PickleReader]) -> TensorReader:
    weight_map = read_weight_map(index)
    opened = reader(indexed_files(index, weight_map))
    check_agreement(index, weight_map, opened.tensors)
    return opened


def _no_weights(path: Path) -> SourceError:
    ggufs = sorted(path.glob("*.gguf"))
    return SourceError(
        f"{path} holds no weights",
        found=", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "an empty directory",
        expected=f"{SAFETENSORS}, {SAFETENSORS}{INDEX_SUFFIX}, another *.safetensors, or {PICKLE}",
        remedy=f"name the GGUF file itself, such as {ggufs[0]}" if ggufs else None,
    )
