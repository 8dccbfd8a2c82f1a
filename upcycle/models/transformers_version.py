"""Which transformers is installed, asked of its metadata: what depends on it compares with this."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version

LAYS_OUT = (5, 23)  # the first whose DistributedConfig has replicas and an all-to-all between experts


@cache
def installed() -> tuple[int, int]:
    """Major and minor version."""
    major, minor = version("transformers").split(".")[:2]
    return int(major), int(minor)
