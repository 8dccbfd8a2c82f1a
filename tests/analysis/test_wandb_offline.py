"""Offline directories of W&B, written by its own client through the mirror, give the frame that the record gives."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
from written import write_run

from upcycle.analysis import load_runs
from upcycle.errors import RecordError
from upcycle.tracking.record import read_run
from upcycle.tracking.wandb_mirror import open_mirror

wandb = pytest.importorskip("wandb")

if TYPE_CHECKING:
    from pathlib import Path

IDENTITY = {"id": "abcd", "project": "p", "entity": None}


def mirrored(run: Path, status: str, *, held: int = 0) -> None:
    """Mirror the rows of a record from one on."""
    mirror = open_mirror(run, {**read_run(run), "wandb": IDENTITY}, online=False, held=held)
    mirror.finish(status, {})


def comparable(frame: pd.DataFrame) -> pd.DataFrame:
    """Without where it was read from; W&B does not tell 1.0 from 1."""
    numbers = frame.select_dtypes("number").columns
    return frame.drop(columns="run").astype(dict.fromkeys(numbers, float))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted after a step and went on, in two offline directories."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        run = tmp_path_factory.mktemp("mirrored") / "run"
        write_run(run, (4.0, math.nan), facts={"status": "interrupted"})
        mirrored(run, "interrupted")
        whole = (run / "metrics.jsonl").read_text()
        write_run(run, (4.0, math.nan, 3.0))
        rewritten = (run / "metrics.jsonl").read_text().removeprefix(whole).splitlines(keepends=True)
        (run / "metrics.jsonl").write_text(whole + "".join(rewritten[-2:]))
        mirrored(run, "finished", held=3)
    return run


def test_the_same_frame_from_the_mirror(run: Path) -> None:
    assert len(list((run / "wandb").glob("offline-run-*"))) == 2
    mirror = load_runs(run / "wandb")
    assert mirror["step"].tolist() == [0, 1, 2]
    assert mirror["status"].tolist() == ["finished"] * 3
    assert mirror["moe/layer_0/load"].iloc[2] == [0.25, 0.75]
    pd.testing.assert_frame_equal(
        comparable(mirror), comparable(load_runs(run)), check_like=True, check_categorical=False
    )


def test_a_run_of_another_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    theirs: Any = wandb.init(mode="offline", dir=str(tmp_path), config={"lr": 1})
    theirs.finish()
    with pytest.raises(RecordError, match="not a training run of upcycle"):
        load_runs(tmp_path)


def test_a_directory_that_w_and_b_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "run-x.wandb").write_bytes(b"nothing")
    with pytest.raises(RecordError, match="the offline W&B run cannot be read"):
        load_runs(tmp_path)
