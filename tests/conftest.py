"""Fixtures that all tests share."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

import conversions
import models
import pytest
import torch
from hypothesis import settings
from transformers.utils import logging

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

logging.disable_progress_bar()
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")
# The models are tiny, and threads that wait for each other on a busy machine cost seconds, here and in what is started.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that no process is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps the token caches of commands that tests start out of the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the checkpoint of a model of the table, saved on first use, some in one file and some in several."""
    root = tmp_path_factory.mktemp("dense")

    @functools.cache
    def checkpoint(name: str) -> Path:
        size = "20KB" if name in models.SHARDED else "5GB"
        return models.save(models.build(name), root / name, max_shard_size=size)

    return checkpoint


@pytest.fixture(scope="session")
def dense_outputs(dense: Callable[[str], Path]) -> Callable[[str], dict[str, torch.Tensor]]:
    """Returns what a model of the table computes for the test sequences, in float32."""
    return functools.cache(lambda name: conversions.outputs(dense(name)))
