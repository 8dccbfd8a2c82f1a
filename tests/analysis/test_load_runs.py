"""Records become one frame, the same from every keeper; and what is no record is named."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pandas as pd
import pytest
import training
from written import write_arms, write_run

from upcycle.analysis import compare, load_runs
from upcycle.errors import RecordError, SourceError
from upcycle.tracking.packing import read_directory, write_pack
from upcycle.tracking.rows import RowDecoder
from upcycle.tracking.schema import METRICS

pytest_plugins = ("text_model",)


def change_run(directory: Path, **changes: object) -> None:
    path = directory / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_one_row_per_run_and_step(tmp_path: Path) -> None:
    write_arms(tmp_path / "sweep", {"exact": [3.0, 3.1], "paper": [2.9, 3.2]})
    frame = load_runs(tmp_path)
    assert [Path(run).name for run in frame["run"].unique()] == ["exact-0", "exact-1", "paper-0", "paper-1"]
    assert not frame.duplicated(["run", "step"]).any()
    assert frame["step"].tolist() == [0, 1, 2] * 4
    last = frame[frame["step"] == 2].set_index("init.scaling")
    assert last["val/loss"].tolist() == [3.0, 3.1, 2.9, 3.2]
    assert last["train/loss"].tolist() == pytest.approx([3.1, 3.2, 3.0, 3.3])  # a row of its own in the record
    assert last["seed"].tolist() == [0, 1, 0, 1]


def test_columns(tmp_path: Path) -> None:
    frame = load_runs(write_run(tmp_path / "run", (4.0, 3.5)))
    assert {metric.name for metric in METRICS if "{" not in metric.name} <= set(frame.columns)
    assert {"val/text/loss", "moe/layer_0/load", "moe.top_k", "source_hash", "order_hash"} <= set(frame.columns)
    assert frame["train/tokens"].tolist() == [0, 4 * 32]  # in every row: 4 sequences of 32 tokens a step
    assert frame["train/flops"].tolist() == [0, 1000]
    assert frame["moe/layer_0/load"].iloc[1] == [0.25, 0.75]
    assert frame["moe.top_k"].dtype == "int64"
    assert frame["time"].dt.tz is not None


def test_options_that_runs_do_not_share(tmp_path: Path) -> None:
    write_run(tmp_path / "a", (4.0,), changes=("init.scaling=2.5", "moe.layers=[0,2]"))
    write_run(tmp_path / "b", (4.0,), changes=("init.scaling=exact",))
    frame = load_runs(tmp_path)
    assert frame["init.scaling"].tolist() == ["2.5", "exact"]
    assert frame["moe.layers"].tolist() == ["[0, 2]", "all"]


def test_a_place_given_twice_counts_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "sweep" / "run", (4.0, 3.5))
    assert len(load_runs(tmp_path, run, tmp_path / "sweep")) == 2


def test_what_lies_in_a_run_belongs_to_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", (4.0, 3.5))
    (run / "model" / "inner").mkdir(parents=True)
    (run / "model" / "inner" / "run.json").write_text("{}")
    assert len(load_runs(tmp_path)) == 2


def test_packs_at_any_place(tmp_path: Path) -> None:
    """Below it, as a run of its own, beside runs that have directories; those win, and come in the order of names."""
    runs = [write_run(tmp_path / "deep/sweep" / name, (4.0, end)) for name, end in (("a", 1.0), ("b", 2.0), ("c", 3.0))]
    before = load_runs(tmp_path)
    packed = {run.name: read_directory(run, RowDecoder()) for run in runs}
    write_pack(tmp_path / "deep/sweep/egt.runs.parquet", {name: run for name, run in packed.items() if run})
    shutil.rmtree(runs[1])
    pd.testing.assert_frame_equal(load_runs(tmp_path, runs[1], tmp_path / "deep"), before)
    shutil.rmtree(runs[0])
    write_run(runs[0], (4.0, 9.0))
    assert load_runs(tmp_path)["val/loss"].tolist() == [4.0, 9.0, 4.0, 2.0, 4.0, 3.0]
    assert load_runs(runs[1])["run"].astype(str).tolist() == [str(runs[1])] * 2
    with pytest.raises(RecordError, match="no such directory"):
        load_runs(tmp_path / "deep/sweep/d")
    (tmp_path / "deep/sweep/egt.runs.parquet").write_bytes(b"")
    with pytest.raises(RecordError, match=r"a pack of runs cannot be read"):
        load_runs(tmp_path)


def test_trained_arms(text: Path, text_model: Path, tmp_path: Path) -> None:
    """What training records is what the analysis compares: arms from the same weights, and one from none."""
    for model in ("dense", "upcycle", "scratch"):
        changes = (f"model={model}", f"source='{text_model}'", *training.SMALL_MOE, "budget.steps=2")
        training.run(training.options(text, tmp_path / "runs" / model, *changes))
    frame = load_runs(tmp_path / "runs")
    compared = compare(frame, arms="model", baseline="dense", allow=["source"]).set_index("arm")
    assert compared["differs"].to_dict() == {"scratch": "source", "upcycle": ""}
    assert compared["verdict"].tolist() == ["underpowered"] * 2  # one seed
    assert compared["equal"].str.contains("tokens").all()
    assert set(frame["status"]) == {"finished"}


def test_a_row_that_was_cut_off_is_skipped_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = write_run(tmp_path / "run", (4.0, 3.5))
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 2, "val/lo')
    with caplog.at_level(logging.WARNING, logger="upcycle"):
        assert load_runs(run)["step"].tolist() == [0, 1]
    assert f"{run}: its last row is cut off and was skipped" in caplog.text


def test_a_run_without_rows_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    empty = write_run(tmp_path / "empty", ())
    with pytest.raises(RecordError, match="no run has logged anything yet"):
        load_runs(empty)
    write_run(tmp_path / "run", (4.0,))
    assert load_runs(tmp_path)["run"].nunique() == 1
    assert f"{empty}: nothing was logged yet" in caplog.text


@pytest.mark.parametrize(
    "line", ['{"step": 1, "val/loss": }', '{"val/loss": 1.0}', '{"step": 1, "val/loss": "low"}', "[1]", "3"]
)
def test_a_damaged_row_is_named(tmp_path: Path, line: str) -> None:
    write_run(tmp_path / "whole", (4.0, 3.5))
    damaged = write_run(tmp_path / "damaged", (4.0, 3.5))
    lines = (damaged / "metrics.jsonl").read_text().splitlines()
    (damaged / "metrics.jsonl").write_text("\n".join([lines[0], line, lines[1]]) + "\n")
    with pytest.raises(RecordError, match=r"damaged, row 2:"):
        load_runs(tmp_path)


def test_numbers_that_json_lacks_and_large_ones(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", (4.0, float("nan")), facts={"flops_per_step": 10**22})
    frame = load_runs(run)
    assert frame["val/loss"].isna().tolist() == [False, True]
    assert frame["train/flops"].tolist() == [0.0, 1e22]


def test_no_runs(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no runs found"):
        load_runs(tmp_path)


def test_a_place_that_does_not_exist(tmp_path: Path) -> None:
    write_run(tmp_path / "sweep", (4.0,))
    with pytest.raises(RecordError, match="did you mean sweep"):
        load_runs(tmp_path / "sweeps")
    with pytest.raises(RecordError, match="no such directory"):
        load_runs(tmp_path / "no" / "where")


def test_a_directory_of_another_project(tmp_path: Path) -> None:
    write_run(tmp_path / "ours", (4.0,))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "run.json").write_text('{"config": {"lr": 1}}')
    with pytest.raises(RecordError, match="not a training run of upcycle") as error:
        load_runs(tmp_path)
    assert f"{tmp_path / 'theirs'}, without order_hash" in str(error.value)


@pytest.mark.parametrize("version", [None, 2])
def test_another_version_of_the_schema(tmp_path: Path, version: int | None) -> None:
    write_run(tmp_path / "new", (4.0,))
    change_run(write_run(tmp_path / "old", (4.0,)), schema=version)
    with pytest.raises(RecordError, match="another version of the schema") as error:
        load_runs(tmp_path)
    assert f"{tmp_path / 'old'}: schema {version}" in str(error.value)


def test_a_damaged_description(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", (4.0,))
    (run / "run.json").write_text("{")
    with pytest.raises(SourceError, match=r"run\.json is not"):
        load_runs(run)


def test_an_index_of_runs_is_not_needed(tmp_path: Path) -> None:
    """Frames of several loads can be put together: the columns are the same."""
    one, other = (load_runs(write_run(tmp_path / name, (4.0, 3.0))) for name in ("a", "b"))
    assert list(one.columns) == list(other.columns)
    assert len(pd.concat([one, other], ignore_index=True)) == 4


def test_a_metric_that_changes_its_kind_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", (4.0,))
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 1, "val/loss": [1.0]}\n')
    with pytest.raises(RecordError, match=r"row 2: Expected `float`, got `array` - at `\$\.val/loss`"):
        load_runs(run)


def test_a_time_that_is_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", (4.0,))
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 1, "time": "yesterday"}\n')
    with pytest.raises(RecordError, match="the time of a row is damaged"):
        load_runs(run)


def test_what_is_said_of_a_step(tmp_path: Path) -> None:
    """Rows of a step are joined; the last to name a metric counts, and null names none."""
    run = write_run(tmp_path / "run", (4.0,))
    lines = (
        '{"step": 2, "train/loss": 1.0, "moe/layer_0/load": [1.0]}',
        '{"step": 1, "train/loss": 9.0}',
        '{"step": 2, "train/loss": 2.0, "val/loss": 3.0, "new": 7}',
        '{"step": 2, "val/loss": null, "moe/layer_0/load": null}',
    )
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write("\n".join(lines) + "\n")
    frame = load_runs(run).set_index("step")
    assert frame.index.tolist() == [0, 1, 2]
    assert frame.loc[2, ["train/loss", "val/loss", "new"]].tolist() == [2.0, 3.0, 7.0]
    assert frame.loc[2, "moe/layer_0/load"] == [1.0]
    assert frame["val/loss"].isna().tolist() == [False, True, False]


def test_whole_numbers_and_fractions_fit_together(tmp_path: Path) -> None:
    """What is a list of whole numbers in one run is one of fractions in another."""
    for name, values in (("a", "[1, 0]"), ("b", "[0.5, 0.5]")):
        with (write_run(tmp_path / name, (4.0,)) / "metrics.jsonl").open("a") as stream:
            stream.write(f'{{"step": 1, "moe/layer_0/load": {values}}}\n')
    loads = load_runs(tmp_path)["moe/layer_0/load"]
    assert loads.dropna().tolist() == [[1.0, 0.0], [0.5, 0.5]]
