"""A pack gives back what a run's directory says, bit for bit; what it cannot hold, or is no pack, is named."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from upcycle.errors import OutputError, RecordError, SourceError
from upcycle.tracking import packing
from upcycle.tracking.packing import read_directory, same, write_pack
from upcycle.tracking.packs import PackedRun, find_run, read_pack
from upcycle.tracking.record import Record
from upcycle.tracking.rows import RowDecoder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def run(directory: Path, *rows: dict[str, object]) -> PackedRun:
    """A run with these rows, as its directory says."""
    record = Record(directory)
    record.create()
    record.describe(status="finished", config={"peak": 0.1 + 0.2}, text='"ä" \n')
    for step, row in enumerate(rows):
        record.log(row, step=step)
    made = read_directory(directory, RowDecoder())
    assert made
    return made


def said(run: PackedRun) -> dict[str, tuple[pa.DataType, str]]:
    return {name: (run.columns[name].type, str(values)) for name, values in run.columns.to_pydict().items()}


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, PackedRun]:
    """Runs that logged different metrics: fractions, whole numbers, NaN, infinities, zeros of either sign, lists."""
    third = {"x": 1 / 3, "count": 7, "zero": -0.0}
    return {
        "a": run(
            tmp_path / "a", {"loss": math.nan, "load": [0.1, math.nan, -0.0]}, third, {"loss": math.inf, "load": []}
        ),
        "b": run(tmp_path / "b", {"loss": 2.5}),
        "c": run(tmp_path / "c", {"only/here": [1.0]}, {"zero": 0.0}),
    }


@pytest.fixture
def pack(runs: dict[str, PackedRun], tmp_path: Path) -> Path:
    write_pack(tmp_path / "sweep.runs.parquet", runs)
    return tmp_path / "sweep.runs.parquet"


def test_every_bit_comes_back(runs: dict[str, PackedRun], pack: Path) -> None:
    read = read_pack(pack)
    assert list(read) == list(runs)
    for name, given in runs.items():
        assert read[name].text == given.text
        assert said(read[name]) == said(given)  # of each run its own metrics alone
    assert not list(pack.parent.glob("*.tmp"))


def test_what_is_not_the_same(tmp_path: Path) -> None:
    """Zeros of either sign, lists with another end, a value that is not there, another text."""
    one = run(tmp_path / "one", {"x": 0.0, "load": [math.nan, 1.0]})
    assert same(one, run(tmp_path / "one"))
    time = one.columns["time"]
    for name, value in (("x", [-0.0]), ("x", [math.nan]), ("load", [[math.nan]]), ("load", [[math.nan, 2.0]])):
        changed = one.columns.set_column(one.columns.schema.get_field_index(name), name, pa.array(value))
        assert changed["time"] == time
        assert not same(one, PackedRun(text=one.text, columns=changed)), name
    assert not same(one, PackedRun(text=one.text, columns=one.columns.drop_columns(["x"])))
    assert not same(one, PackedRun(text=one.text + " ", columns=one.columns))


def test_other_tools_read_it(pack: Path) -> None:
    table = pq.read_table(pack)
    assert table["run"].to_pylist() == ["a", "a", "a", "b", "c", "c"]
    assert [text is not None for text in table["run_json"].to_pylist()] == [True, False, False, True, True, False]
    assert table["step"].to_pylist() == [0, 1, 2, 0, 0, 1]


def test_a_directory_comes_before_a_pack(pack: Path) -> None:
    directory = pack.parent / "b"
    assert find_run(directory)["config"] == {"peak": 0.1 + 0.2}  # type: ignore[index]
    Record(directory).describe(status="running")
    assert find_run(directory) == {"status": "running"}
    (directory / "run.json").write_text("{")
    with pytest.raises(SourceError, match=r"run\.json is not"):
        find_run(directory)
    (directory / "run.json").unlink()
    packed = find_run(directory)
    assert packed
    assert (packed["status"], packed["text"]) == ("finished", '"ä" \n')
    assert find_run(pack.parent / "d") is None
    assert find_run(pack.parent / "nowhere/b") is None


def test_a_pack_that_changes_is_read_again(pack: Path, runs: dict[str, PackedRun]) -> None:
    later = pack.parent / "later"
    assert find_run(later) is None
    write_pack(pack, {**runs, "later": runs["b"]})
    assert find_run(later) is not None


def cut(pack: Path) -> None:
    pack.write_bytes(pack.read_bytes()[:-100])


def flip(pack: Path) -> None:
    """One bit of a value."""
    content = bytearray(pack.read_bytes())
    metadata = pq.read_metadata(pack).row_group(0).column(4)
    content[metadata.data_page_offset + metadata.total_compressed_size - 1] ^= 1
    pack.write_bytes(content)


def change(pack: Path, table: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(table(pq.read_table(pack)), pack)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "Parquet": lambda pack: pack.write_bytes(b""),
    "magic bytes": cut,
    "CRC": flip,
    "no column run_json, time": lambda pack: change(pack, lambda table: table.drop_columns(["run_json", "time"])),
    "no run_json in its first row": lambda pack: change(pack, lambda table: table.slice(1)),
    "run_json of a is ": lambda pack: change(
        pack, lambda table: table.set_column(1, "run_json", pa.array(["{", *[None] * 5], pa.string()))
    ),
    "run_json of a is no object": lambda pack: change(
        pack, lambda table: table.set_column(1, "run_json", pa.array(["[]", *[None] * 5], pa.string()))
    ),
}


@pytest.mark.parametrize("says", DAMAGE)
def test_a_damaged_pack_is_named(pack: Path, says: str) -> None:
    (pack.parent / "a/run.json").unlink()
    DAMAGE[says](pack)
    with pytest.raises(RecordError, match="a pack of runs cannot be read") as error:
        find_run(pack.parent / "a") and read_pack(pack)
    assert f"{pack}: " in str(error.value)
    assert says in str(error.value)


def test_what_a_pack_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="the name of a column of packs") as error:
        run(tmp_path / "one", {"run": 1.0})
    assert f"{tmp_path / 'one'}: run" in str(error.value)
    runs = {"a": run(tmp_path / "a", {"x": 1.0}), "b": run(tmp_path / "b", {"x": [1.0]})}
    with pytest.raises(RecordError, match="a number in one run and a list in another"):
        write_pack(tmp_path / "sweep.runs.parquet", runs)
    assert not list(tmp_path.glob("*.parquet*"))


def test_a_pack_that_comes_back_otherwise_takes_no_place(
    pack: Path, runs: dict[str, PackedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pack.read_bytes()
    for wrong in ({"a": runs["a"]}, {**runs, "b": runs["c"]}):
        monkeypatch.setattr(packing, "read_pack", lambda _file, wrong=wrong: wrong)
        with pytest.raises(OutputError, match="does not come back as it was written"):
            write_pack(pack, runs)
        assert pack.read_bytes() == before


def test_a_run_without_rows_or_with_a_damaged_one(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.describe(status="finished")
    assert read_directory(tmp_path, RowDecoder()) is None
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "x": 1.0}) + '\n{"step": 2, "x"')
    with pytest.raises(RecordError, match="row 2"):
        read_directory(tmp_path, RowDecoder())
