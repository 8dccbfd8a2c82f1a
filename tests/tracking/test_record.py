"""The files of a run: whole rows, or none; and what may be replaced."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest
import training
from cli import contents

from upcycle.errors import RecordError, SourceError
from upcycle.tracking.record import Record, read_run
from upcycle.tracking.schema import METRICS, metric

if TYPE_CHECKING:
    from pathlib import Path

    from upcycle.train.config import TrainConfig


def steps(directory: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_rows_after_a_checkpoint_are_forgotten(tmp_path: Path) -> None:
    record = Record(tmp_path)
    for step in range(5):
        record.log({"train/loss": 1.0 / (step + 1)}, step=step)
    assert record.last == {"train/loss": 0.2}
    record.forget_after(2)
    assert steps(tmp_path) == [0, 1, 2]
    record.forget_after(-1)
    assert steps(tmp_path) == []


def test_a_record_that_goes_on_knows_the_last_value_of_every_metric(tmp_path: Path) -> None:
    """A resumed run may end without another row of some metrics, and its summary has them nevertheless."""
    earlier = Record(tmp_path)
    for step in range(5):
        earlier.log({"train/loss": 1.0 / (step + 1)}, step=step)
    earlier.log({"val/loss": 0.5}, step=2)
    resumed = Record(tmp_path)
    resumed.forget_after(3)
    assert resumed.last == {"train/loss": 0.25, "val/loss": 0.5}


def test_a_row_that_was_cut_off_is_forgotten(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.log({"train/loss": 1.0}, step=1)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 1, "train/lo')
    record.forget_after(5)
    assert steps(tmp_path) == [1]


def test_nothing_to_forget(tmp_path: Path) -> None:
    Record(tmp_path).forget_after(0)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_description_grows(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.describe(status="running", config={"seed": 0})
    record.describe(status="finished")
    assert read_run(tmp_path) == {"status": "finished", "config": {"seed": 0}}
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_no_run(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SourceError, match="there is no run"):
            read_run(place)


def written(directory: Path, run: str) -> TrainConfig:
    """Leaves a directory with a run.json and weights; options of a run that would go there."""
    (directory / "weights").mkdir(parents=True)
    (directory / "weights" / "best.ckpt").write_text("of months")
    (directory / "run.json").write_text(run)
    return training.options(directory, directory, "model=dense", "source=dense")


GIVEN = [{"overwrite": one, "resume": other} for one, other in ((True, False), (False, True), (True, True))]


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize(
    ("run", "says"),
    [
        ('{"lr": 1}', "not a training run of upcycle"),
        ('{"config": {"lr": 1}}', "not a training run of upcycle"),
        ("[1]", r"run\.json is not"),
        ("{", r"run\.json is not"),
    ],
)
def test_what_another_project_wrote_is_left_alone(tmp_path: Path, given: dict[str, Any], run: str, says: str) -> None:
    config = written(tmp_path / "run", run)
    before = contents(tmp_path)
    with pytest.raises((RecordError, SourceError), match=says):
        Record.open(tmp_path / "run", asdict(config), **given).create()
    assert contents(tmp_path) == before


def test_a_run_of_another_schema_is_replaced_but_not_gone_on_with(tmp_path: Path) -> None:
    run = {"schema": 0, "config": {}, "order_hash": "", "data_hash": "", "flops_per_step": 1}
    config = written(tmp_path / "run", json.dumps(run))
    with pytest.raises(RecordError, match="another version of the schema") as error:
        Record.open(tmp_path / "run", asdict(config), overwrite=False, resume=True)
    assert f"{tmp_path / 'run'}: schema 0" in str(error.value)
    Record.open(tmp_path / "run", asdict(config), overwrite=True, resume=False).create()
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("content", ["[]", "3", "null", '"finished"', "{", ""])
def test_a_damaged_run_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(SourceError, match=r"run\.json is not"):
        read_run(tmp_path)


def test_metric_names_are_unique_and_have_units() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert all(metric.unit and metric.meaning for metric in METRICS)


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("val/loss", "val/loss"),
        ("val/python/loss", "val/{domain}/loss"),
        ("moe/layer_3/load", "moe/layer_{layer}/load"),
    ],
)
def test_a_name_in_the_record_finds_its_metric(name: str, template: str) -> None:
    found = metric(name)
    assert found is not None
    assert found.name == template


def test_a_name_that_no_metric_has() -> None:
    assert metric("val/losses") is None
