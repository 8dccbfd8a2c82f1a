"""Tiny checkpoints, built on the spot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """A few tensors of several types and shapes, one of them a scalar and one empty."""
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed.weight": torch.randn(7, 4, generator=generator),
        "model.a.weight": torch.randn(3, 5, generator=generator).bfloat16(),
        "model.b.weight": torch.randn(5, generator=generator).half(),
        "model.count": torch.tensor(3),
        "model.flags": torch.tensor([True, False, True]),
        "model.none": torch.empty(0, 4),
    }


@pytest.fixture
def single(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A directory with one model.safetensors."""
    directory = tmp_path / "single"
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    return directory
