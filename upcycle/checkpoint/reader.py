"""Opens a checkpoint, whatever its layout: single, sharded, pickled or GGUF. Knows the other readers of this room."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from upcycle.checkpoint.gguf import GgufReader
from upcycle.checkpoint.index import check_stored, confined, indexed_files, read_weight_map
from upcycle.checkpoint.pickle import PickleReader
from upcycle.checkpoint.safetensors import SafetensorsReader
from upcycle.checkpoint.tensors import TensorInfo, TensorReader
from upcycle.errors import SourceError
from upcycle.files.json import object_or_empty

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["TensorInfo", "TensorReader", "has_weights", "open_reader", "read_index_names"]

SAFETENSORS: Final = "model.safetensors"
PICKLE: Final = "pytorch_model.bin"
INDEX_SUFFIX: Final = ".index.json"
WEIGHTS: Final = (SAFETENSORS, SAFETENSORS + INDEX_SUFFIX, PICKLE, PICKLE + INDEX_SUFFIX)
UNINDEXED: Final = "model*.safetensors"
NAMED_BY_CONFIG: Final = "transformers_weights"

_log = logging.getLogger("upcycle")


def open_reader(path: Path) -> TensorReader:
    """Open the weights that transformers would load from a checkpoint; also shards that have no index.

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
    chosen = _chosen_weights(path)
    if chosen is None:
        raise _no_weights(path)
    ignored = [name for name in _weights_beside(path) if name.startswith(SAFETENSORS) and name != chosen.name]
    if ignored:
        _log.warning("%s: reading %s, as transformers does, and not %s", path, chosen.name, ", ".join(ignored))
    reader = PickleReader if chosen.name.startswith(PICKLE) else SafetensorsReader
    if chosen.name.endswith(INDEX_SUFFIX):
        return _open_sharded(chosen, reader)
    return reader([chosen] if chosen.is_file() else sorted(path.glob(UNINDEXED)))


def has_weights(path: Path) -> bool:
    """Whether a directory holds any file of the weights that transformers loads; an index alone is none.

    Raises:
        SourceError: as for `open_reader`, where an index or config.json is malformed.
    """
    chosen = _chosen_weights(path)
    if chosen is None or not chosen.name.endswith(INDEX_SUFFIX):
        return chosen is not None
    return any((path / file).is_file() for file in set(read_weight_map(chosen).values()))


def _chosen_weights(path: Path) -> Path | None:
    """The weight file of a directory, or the index of its files, that transformers loads; None where there is none.

    Where there are shards but no index, which transformers does not load, it is the pattern of their names.

    Raises:
        SourceError: config.json names a file that is not there, or not a file of the directory.
    """
    named = _named_by_config(path)
    if named is not None:
        return named
    there = _weights_beside(path)
    if not there:
        return path / UNINDEXED if any(path.glob(UNINDEXED)) else None
    return path / there[0]


def _weights_beside(path: Path) -> list[str]:
    """Names of the weight files and indexes in a directory, in the order in which transformers looks for them."""
    return [name for name in WEIGHTS if (path / name).is_file()]


def _named_by_config(path: Path) -> Path | None:
    """The weights that config.json names (`transformers_weights`); a damaged one is for others to report."""
    name = object_or_empty(path / "config.json").get(NAMED_BY_CONFIG)
    if name is None:
        return None
    endings = (".safetensors", ".safetensors" + INDEX_SUFFIX)
    file = confined(path, name) if isinstance(name, str) and name.endswith(endings) else None
    if file is None or not file.is_file():
        raise SourceError(
            f"{NAMED_BY_CONFIG} in {path / 'config.json'} names no weights",
            found=name,
            expected="a safetensors file, or an index of such files, in the same directory",
            remedy="add the file, or take the entry out of config.json",
        )
    return file


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
    listed = {name: index.parent / file for name, file in weight_map.items()}
    opened = reader(indexed_files(index, weight_map), listed=listed)
    check_stored(index, listed, opened.tensors)
    return opened


def _no_weights(path: Path) -> SourceError:
    ggufs = sorted(path.glob("*.gguf"))
    return SourceError(
        f"{path} holds no weights",
        found=", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "an empty directory",
        expected=f"{', '.join(WEIGHTS)}, or {UNINDEXED}",
        remedy=f"name the GGUF file itself, such as {ggufs[0]}" if ggufs else None,
    )
