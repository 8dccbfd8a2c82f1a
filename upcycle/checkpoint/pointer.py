"""Git LFS pointers: three lines of text where a file should be. Knows bytes only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from upcycle.errors import SourceError

if TYPE_CHECKING:
    from pathlib import Path

POINTER: Final = b"version https://git-lfs"


def is_pointer(file: Path) -> bool:
    """Whether a file is a pointer, or cannot be read at all: no."""
    try:
        with file.open("rb") as stream:
            return stream.read(len(POINTER)) == POINTER
    except OSError:
        return False


def not_downloaded(file: Path) -> SourceError:
    """The error for a pointer."""
    return SourceError(
        f"{file} was not downloaded",
        found="a Git LFS pointer, which names the file's content and does not hold it",
        expected="the file itself",
        remedy="run `git lfs pull` in the repository, or `hf download` of the model",
    )
