"""W&B's server of this machine, shipped sweeps and what is written for the analysis serve these tests too."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import wandb

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wandb_server import Server

sys.path += [str(Path(__file__).parent.parent / room) for room in ("analysis", "sweep", "tracking")]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that the client of W&B is set up for, in a home of its own."""
    from wandb_server import KEY, serving

    (tmp_path / "home").mkdir()
    with serving() as listening:
        settings = {"HOME": tmp_path / "home", "WANDB_API_KEY": KEY, "WANDB_BASE_URL": listening.url}
        for name, value in settings.items():
            monkeypatch.setenv(name, str(value))
        wandb.teardown()
        yield listening
        wandb.teardown()
