"""The real client of W&B in a home of its own, and a server for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import wandb
from wandb_server import KEY, Server, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NOWHERE = "http://127.0.0.1:9"  # the discard port, where nothing listens


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The client of W&B as in a fresh process, without a server; its base URL can be set."""
    for name, value in {
        "HOME": tmp_path / "home",
        "WANDB_DIR": tmp_path / "wandb",
        "WANDB_API_KEY": KEY,
        "WANDB_BASE_URL": NOWHERE,
    }.items():
        monkeypatch.setenv(name, str(value))
    for name in ("home", "wandb"):
        (tmp_path / name).mkdir()
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()


@pytest.fixture
def server(client: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that the client knows."""
    with serving() as listening:
        client.setenv("WANDB_BASE_URL", listening.url)
        wandb.teardown()
        yield listening
