"""Fixtures that all tests share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import conversions
import models
import pytest
import torch
from transformers.utils import logging

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logging.disable_progress_bar()


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the checkpoint of a model of the table, saved on first use, some in one file and some in several."""
    root, saved = tmp_path_factory.mktemp("dense"), {}

    def checkpoint(name: str) -> Path:
        if name not in saved:
            size = "20KB" if name in models.SHARDED else "5GB"
            saved[name] = models.save(models.build(name), root / name, max_shard_size=size)
        return saved[name]

    return checkpoint


@pytest.fixture(scope="session")
def dense_logits(dense: Callable[[str], Path]) -> Callable[[str], torch.Tensor]:
    """Returns the logits of a model of the table on the test sequences, in float32."""
    known: dict[str, torch.Tensor] = {}

    def of(name: str) -> torch.Tensor:
        if name not in known:
            known[name] = conversions.logits(dense(name))
        return known[name]

    return of
