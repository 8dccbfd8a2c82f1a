"""A run at a W&B server, read through the client's public API, gives the frame that its record gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import pytest
import training
import wandb

from upcycle.analysis import load_runs
from upcycle.errors import RecordError

if TYPE_CHECKING:
    from pathlib import Path

    from wandb_server import Server

pytest_plugins = ("text_model",)
PLACE = "wandb:lab/upcycle"


@pytest.fixture
def run(server: Server, text: Path, text_model: Path, tmp_path: Path) -> Path:
    """A run that was mirrored as it trained."""
    mirrored = ("wandb.mode=online", "wandb.group=order", "model=upcycle", *training.SMALL_MOE)
    training.run(training.options(text, tmp_path / "run", f"source='{text_model}'", *mirrored))
    return tmp_path / "run"


def assert_same(server: pd.DataFrame, local: pd.DataFrame) -> None:
    """The one assertion, which every mutant must fail: column by column, but for where it was read."""
    assert set(server.columns) == set(local.columns)
    for name in local.columns.drop("run"):
        # W&B keeps times in microseconds as floats, and does not tell 1.0 from 1.
        pd.testing.assert_series_equal(
            server[name], local[name], check_dtype=False, check_categorical=False, rtol=0, atol=0
        )


def test_the_same_frame_from_the_server(server: Server, run: Path) -> None:
    local = load_runs(run)
    for place in (PLACE, f"{PLACE}/order"):
        assert_same(load_runs(place), local)
    (name,) = load_runs(PLACE)["run"].unique()
    assert name.startswith(f"{PLACE}/")
    (kept,) = server.runs.values()
    kept.history[3]["moe/layer_0/load"]["values"][0] += 1e-6  # the mutant
    with pytest.raises(AssertionError):
        assert_same(load_runs(PLACE), local)
    with pytest.raises(RecordError, match="no runs found"):
        load_runs(f"{PLACE}/other")
    with pytest.raises(RecordError, match=r"W&B cannot be read") as error:
        load_runs("wandb:lab/another")
    assert "another" in str(error.value)


def test_a_run_of_another_project(server: Server, tmp_path: Path) -> None:
    theirs = wandb.init(project="upcycle", mode="online", dir=str(tmp_path), config={"lr": 1})
    theirs.finish()
    with pytest.raises(RecordError, match="not a training run of upcycle"):
        load_runs(PLACE)


def test_the_key_is_wrong(server: Server) -> None:
    server.status = 401
    with pytest.raises(RecordError, match="W&B cannot be read"):
        load_runs(PLACE)


@pytest.mark.parametrize("place", ["wandb:", "wandb:lab", "wandb:lab/", "wandb:/upcycle"])
def test_not_a_place(place: str) -> None:
    with pytest.raises(RecordError, match="not a place at W&B"):
        load_runs(place)
