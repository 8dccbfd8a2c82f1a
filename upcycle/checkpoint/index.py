"""Weight indexes: which file of a directory holds which tensor, and that none lies outside. Knows JSON and bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from upcycle.errors import SourceError
from upcycle.errors import listed as first_of
from upcycle.files.json import read_object

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor

    from upcycle.checkpoint.tensors import TensorInfo

_SHOWN = 8


def read_weight_map(index: Path) -> dict[str, str]:
    """Return the file name of every tensor that an index lists, in its order.

    Raises:
        SourceError: the index cannot be read, is not JSON or has no `weight_map` of names to file names.
    """
    try:
        content = read_object(index, remedy="download it again")
    except OSError as error:
        raise SourceError(f"cannot read {index}", found=error.strerror) from error
    match content:
        case {"weight_map": dict(weight_map)} if weight_map and all(
            isinstance(file, str) for file in weight_map.values()
        ):
            return weight_map
    raise SourceError(
        f"{index} is not a weight index", found="no usable weight_map", expected='{"weight_map": {tensor: file}}'
    )


def indexed_files(index: Path, weight_map: Mapping[str, str]) -> list[Path]:
    """Return the files that an index names, sorted, all present and inside its directory.

    Raises:
        SourceError: a file is missing (every missing one is named) or lies outside the directory.
    """
    directory = index.parent
    files = [confined(directory, name) for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise SourceError(
            f"{len(missing)} of the {len(files)} files that {index} names are missing",
            found=f"no {', '.join(missing)}",
            remedy="download the missing files into the same directory",
        )
    return files


def confined(directory: Path, name: str) -> Path:
    """Return the path of the file that an index or a config calls `name`; a link there is its owner's and is followed.

    Raises:
        SourceError: the name leads out of the directory.
    """
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise SourceError(
            f"the weight file {name!r} lies outside the checkpoint {directory}",
            found=name,
            expected="the name of a file in the same directory",
            remedy="do not trust this checkpoint; download the model again",
        )
    return directory / path


def check_stored(index: Path, listed: Mapping[str, Path], tensors: Mapping[str, TensorInfo]) -> None:
    """Check that every tensor that an index lists is stored in the file that it names.

    Raises:
        SourceError: it is not; the tensors are named.
    """
    wrong = [
        f"{name} ({file.name})"
        for name, file in sorted(listed.items())
        if name not in tensors or tensors[name].file != file
    ]
    if wrong:
        raise SourceError(
            f"{index} and the files it names disagree",
            found=f"listed but not stored: {first_of(wrong, shown=_SHOWN)}",
            expected="every listed tensor in the file that the index names",
            remedy="the files come from different versions of the model; download them all again",
        )


def gathered(
    stored: Iterable[TensorInfo], listed: Mapping[str, Path] | None
) -> tuple[dict[str, TensorInfo], list[TensorInfo]]:
    """One of each tensor of several files, by name; and the further copies of some of them.

    Args:
        stored: every tensor of every file.
        listed: the file that an index names for each tensor, whose copy is taken; None where there is no index.

    Raises:
        SourceError: two files hold the same tensor, and no index says which to read.
    """
    tensors: dict[str, TensorInfo] = {}
    copies: list[TensorInfo] = []
    for info in stored:
        other = tensors.get(info.name)
        if other is None:
            tensors[info.name] = info
            continue
        if listed is None or info.name not in listed:
            raise SourceError(
                f"two files hold the tensor {info.name}",
                found=f"{other.file.name} and {info.file.name}",
                expected="every tensor once, or an index that says which file to read it from",
                remedy="take the file away that does not belong to the model",
            )
        taken, left = (info, other) if info.file == listed[info.name] else (other, info)
        tensors[info.name] = taken
        copies.append(left)
    return tensors, copies


def unlisted(tensors: Mapping[str, TensorInfo], listed: Mapping[str, Path] | None) -> frozenset[str]:
    """Names of the tensors that an index does not list; none where there is no index."""
    return frozenset(tensors) - frozenset(listed) if listed is not None else frozenset()


def check_copies(
    tensors: Mapping[str, TensorInfo], copies: Iterable[TensorInfo], read: Callable[[TensorInfo], Tensor]
) -> None:
    """Check that further copies of tensors are equal to those that an index names: transformers loads the last of them.

    Args:
        tensors: those that the index names.
        copies: the others.
        read: gives the values of either.

    Raises:
        SourceError: one differs; the tensor and both files are named.
    """
    for copy in copies:
        named = tensors[copy.name]
        if (copy.dtype, copy.shape) != (named.dtype, named.shape) or not torch.equal(
            read(copy).reshape(-1).view(torch.uint8), read(named).reshape(-1).view(torch.uint8)
        ):
            raise SourceError(
                f"two files hold different tensors {copy.name}",
                found=f"{named.file.name}, which the index names, and {copy.file.name}",
                expected="one of them, or equal ones: transformers loads whichever file comes last",
                remedy="download both files again, from one version of the model",
            )
