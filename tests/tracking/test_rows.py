"""The columns that a finished run keeps are those of its rows, or they are not used."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

from upcycle.tracking.record import METRICS, Record
from upcycle.tracking.rows import COLUMNS, RowDecoder, keep_columns, kept_columns

if TYPE_CHECKING:
    from pathlib import Path

    import pyarrow as pa


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """A run that kept its columns."""
    made = Record(tmp_path)
    for step in range(1, 4):
        made.log({"train/loss": 1.0 / step, "moe/layer_0/load": [0.25, 0.75]}, step=step)
        made.log({"val/loss": math.nan if step == 2 else 2.0 * step}, step=step)
    keep_columns(tmp_path)
    return made


def decoded(directory: Path) -> pa.RecordBatch:
    return RowDecoder().decode("run", (directory / METRICS).read_bytes())


def test_columns(record: Record) -> None:
    batch = decoded(record.directory)
    assert batch.schema.names == ["step", "time", "train/loss", "val/loss", "moe/layer_0/load"]
    assert batch["step"].to_pylist() == [1, 2, 3]
    assert batch["train/loss"].to_pylist() == [1.0, 0.5, 1 / 3]
    assert [math.isnan(value) for value in batch["val/loss"].to_pylist()] == [False, True, False]
    assert batch["moe/layer_0/load"].to_pylist() == [[0.25, 0.75]] * 3


def test_kept_columns_are_those_of_the_rows(record: Record) -> None:
    kept = kept_columns(record.directory)
    assert kept is not None
    # Not by the batches' own comparison, for which NaN is no NaN.
    assert str(kept.to_pydict()) == str(decoded(record.directory).to_pydict())


def test_rows_that_changed_have_none(record: Record) -> None:
    """One row more; and one that was edited without a change of the size."""
    rows = (record.directory / METRICS).read_bytes()
    record.log({"train/loss": 0.0}, step=4)
    assert kept_columns(record.directory) is None
    (record.directory / METRICS).write_bytes(rows.replace(b"0.25", b"0.26"))
    assert kept_columns(record.directory) is None


@pytest.mark.parametrize("damage", [b"", b"no columns"])
def test_damaged_columns_are_not_used(record: Record, damage: bytes) -> None:
    (record.directory / COLUMNS).write_bytes(damage)
    assert kept_columns(record.directory) is None


def test_a_run_that_logged_nothing_keeps_none(tmp_path: Path) -> None:
    keep_columns(tmp_path)
    assert kept_columns(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_metrics_that_later_runs_bring(record: Record) -> None:
    """What one run taught the decoder does not show in the next one's columns."""
    decoder = RowDecoder()
    decoder.decode("first", b'{"step": 1, "first": 1.0, "list": [1]}\n')
    second = decoder.decode("second", b'{"step": 1, "second": 2}\n')
    assert second.select(["step", "second"]).to_pylist() == [{"step": 1, "second": 2.0}]
    assert second.schema.names == ["step", "time", "second"]
