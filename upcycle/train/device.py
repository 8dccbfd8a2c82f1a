"""Where a run computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from upcycle.train.config import TrainConfig


def device_of(config: TrainConfig) -> torch.device:
    """The device that the options name."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)
