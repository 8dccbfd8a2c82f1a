"""What lies beside the weights of a converted checkpoint: its manifest, and the name of its report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upcycle.errors import SourceError
from upcycle.files.json import read_object

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST = "upcycle_manifest.json"
FORMAT = 1
REPORT = "equivalence.json"


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint, or None where there is none.

    Raises:
        SourceError: it is damaged, or of a format that this version does not read.
    """
    file = directory / MANIFEST
    try:
        manifest = read_object(file, remedy="convert again")
    except (FileNotFoundError, NotADirectoryError):
        return None
    if "format" not in manifest:
        raise SourceError("the manifest is damaged", found=f"{file} without a format", remedy="convert again")
    found = manifest["format"]
    if found != FORMAT:
        raise SourceError(
            "the manifest has another format", found=found, expected=FORMAT, remedy="use the upcycle that wrote it"
        )
    return manifest
