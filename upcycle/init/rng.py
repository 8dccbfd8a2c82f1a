"""Randomness by name: the same numbers whatever the order, the sharding or the process."""

from __future__ import annotations

import hashlib

import torch


def derived_seed(seed: int, key: str) -> int:
    """A signed 64-bit seed that depends on `seed` and `key` alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8], "big", signed=True)


def generator(seed: int, key: str) -> torch.Generator:
    """A CPU generator that depends on `seed` and `key` alone."""
    return torch.Generator().manual_seed(derived_seed(seed, key))
