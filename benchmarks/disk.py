"""How fast the disk takes bytes that cost nothing to make: what conversions are measured against."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

CHUNK = 16 * 2**20


def warm_up(file: Path, size: int) -> None:
    """Write and delete: a virtual disk's first write to a block can take several times as long as all later ones."""
    plain_write(file, size)
    file.unlink()


def plain_write(file: Path, size: int) -> float:
    """Seconds to write `size` bytes in sequence and sync them."""
    os.sync()
    block = os.urandom(CHUNK)
    start = time.perf_counter()
    with file.open("wb", buffering=0) as stream:
        for offset in range(0, size, CHUNK):
            stream.write(block[: size - offset])
        os.fsync(stream.fileno())
    return time.perf_counter() - start
