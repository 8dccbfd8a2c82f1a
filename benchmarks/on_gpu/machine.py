"""Which card, and what is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch
from needs import device, say

PACKAGES = ("torch", "transformers", "triton", "megablocks", "liger-kernel", "torchao", "transformer-engine")


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


card = torch.cuda.get_device_properties(device())
say(
    {
        "card": card.name,
        "memory_gb": round(card.total_memory / 1e9, 1),
        "capability": [card.major, card.minor],
        "cuda": torch.version.cuda,
        **{package: installed(package) for package in PACKAGES},
    }
)
