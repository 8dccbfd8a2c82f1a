"""Weight indexes: which file of a directory holds which tensor, and that no file lies outside. Knows JSON and paths."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from upcycle.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from upcycle.checkpoint.tensors import TensorInfo

_SHOWN = 8


def read_weight_map(index: Path) -> dict[str, str]:
    """Return the file name of every tensor that an index lists, in its order.

    Raises:
        SourceError: the index is not JSON or has no `weight_map` of names to file names.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"cannot read {index}", found=error.strerror) from error
    except ValueError as error:
        raise SourceError(f"{index} is not valid JSON", found=error, remedy="download it again") from error
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
    """Return the path of `name` inside `directory`.

    A symlink may leave the directory only for the blobs of the same Hugging Face hub cache entry
    (`models--x/snapshots/<revision>/file` -> `models--x/blobs/…`).

    Raises:
        SourceError: the path or what it links to lies outside.
    """
    path = directory / name
    home, target = directory.resolve(), path.resolve()
    allowed = [home]
    for parent in (home, *home.parents):
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            allowed.append(parent.parent / "blobs")
    climbs = ".." in path.relative_to(directory).parts if path.is_relative_to(directory) else True
    if climbs or not any(target.is_relative_to(root) for root in allowed):
        raise SourceError(
            f"the weight file {name!r} lies outside the checkpoint {directory}",
            found=target,
            expected=f"a file inside {home}",
            remedy="copy the file into the directory if you trust it",
        )
    return path


def check_agreement(index: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    """Check that the index and the files' own headers list the same tensors in the same files.

    Raises:
        SourceError: they do not; the tensors are named.
    """
    directory = index.parent
    listed = {(name, directory / file) for name, file in weight_map.items()}
    stored = {(info.name, info.file) for info in tensors.values()}
    if listed != stored:
        problems = [
            *_describe("listed but not stored", listed - stored),
            *_describe("stored but not listed", stored - listed),
        ]
        raise SourceError(
            f"{index} and the files it names disagree",
            found="; ".join(problems),
            expected="the same tensors in the same files",
            remedy="the files come from different versions of the model; download them all again",
        )


def _describe(label: str, pairs: Iterable[tuple[str, Path]]) -> list[str]:
    names = [f"{name} ({file.name})" for name, file in sorted(pairs)]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{label}: {', '.join(names[:_SHOWN])}{more}"] if names else []
