"""Randomness by name: the same numbers whatever the order, the sharding or the process."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, key: str) -> torch.Generator:
    """A CPU generator that depends on `seed` and `key` alone."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
