"""`upcycle pack`: the same records in a file a sweep; nothing goes that is not packed, or that is no record."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
from cli import contents
from written import write_run

from upcycle.analysis import load_runs
from upcycle.errors import OutputError, RecordError, SourceError
from upcycle.sweep import pack as packing
from upcycle.sweep.config import PackConfig
from upcycle.sweep.pack import pack
from upcycle.tracking.claim import claimed
from upcycle.tracking.packs import read_pack

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cli import Outcome

    Upcycle = Callable[..., Outcome]

pytest_plugins = ("tiny",)
SWEEPS = {"egt": ("r1", "r2", "both"), "groups": ("both", "r3", "r4")}
TEXTS = {"question": "Which?", "hypothesis": "None.", "published": "nothing", "metric": "val/loss"}


def index(output: Path, sweep: str, runs: tuple[str, ...]) -> None:
    entries = {name: {"arm": name, "seed": 0, "overrides": []} for name in runs}
    (output / f"{sweep}.json").write_text(json.dumps({"sweep": sweep, **TEXTS, "runs": entries}))


def write(output: Path, *names: str, **facts: Any) -> None:
    for name in names:
        write_run(output / name, (4.0, 3.0 + len(name)), seed=ord(name[-1]), facts=facts)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Two sweeps that share a run; one of their runs never began."""
    (tmp_path / "runs").mkdir()
    for sweep, runs in SWEEPS.items():
        index(tmp_path / "runs", sweep, runs)
    write(tmp_path / "runs", "r1", "r2", "both", "r3")
    return tmp_path / "runs"


def directories(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir() if path.is_dir())


def packed(output: Path) -> dict[str, list[str]]:
    return {file.name: list(read_pack(file)) for file in sorted(output.glob("*.parquet"))}


def of(output: Path, name: str | None = None) -> PackConfig:
    return PackConfig(runs=str(output), name=name)


def test_the_records_are_the_same(output: Path, upcycle: Upcycle) -> None:
    """And a run that two sweeps name is in one pack."""
    before = load_runs(output)
    (output / "r1/metrics.arrow").write_bytes(b"")
    (output / "r2/.lock").touch()
    ended = upcycle("pack", output)
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.splitlines() == [
        f"packed  {output}/egt.runs.parquet: 3 runs, 3 of them new",
        f"packed  {output}/groups.runs.parquet: 1 runs, 1 of them new",
    ]
    assert packed(output) == {"egt.runs.parquet": ["both", "r1", "r2"], "groups.runs.parquet": ["r3"]}
    assert directories(output) == []
    pd.testing.assert_frame_equal(load_runs(output), before, check_exact=True)
    one = before[before["run"].astype(str) == str(output / "r2")].reset_index(drop=True)
    assert load_runs(output / "r2")["val/loss"].equals(one["val/loss"])


def test_packing_again_changes_nothing(output: Path) -> None:
    pack(of(output))
    before = contents(output)
    assert {file.name: count for file, count in pack(of(output)).packs.items()} == {
        "egt.runs.parquet": (3, 0),
        "groups.runs.parquet": (1, 0),
    }
    assert contents(output) == before


def test_later_runs_join(output: Path) -> None:
    """Whatever came first: the frame is that of all directories."""
    write(output, "r4")
    before = load_runs(output)
    shutil.move(output / "r4", output.parent / "r4")
    shutil.move(output / "r1", output.parent / "r1")
    pack(of(output))
    for name in ("r1", "r4"):
        shutil.move(output.parent / name, output / name)
    pd.testing.assert_frame_equal(load_runs(output), before, check_exact=True)  # some in packs, some in directories
    assert [count for count in pack(of(output)).packs.values()] == [(3, 1), (2, 1)]
    assert directories(output) == []
    pd.testing.assert_frame_equal(load_runs(output), before, check_exact=True)


def test_one_sweep_alone(output: Path) -> None:
    pack(of(output, "groups"))
    assert packed(output) == {"groups.runs.parquet": ["both", "r3"]}
    assert directories(output) == ["r1", "r2"]
    pack(of(output))  # the run that is packed already stays where it is
    assert packed(output) == {"egt.runs.parquet": ["r1", "r2"], "groups.runs.parquet": ["both", "r3"]}


def test_a_run_that_was_trained_again_replaces_what_is_packed(output: Path) -> None:
    pack(of(output))
    write_run(output / "both", (4.0, 1.0))
    assert load_runs(output / "both")["val/loss"].tolist() == [4.0, 1.0]
    pack(of(output, "groups"))
    assert directories(output) == []
    assert packed(output) == {"egt.runs.parquet": ["both", "r1", "r2"], "groups.runs.parquet": ["r3"]}
    assert load_runs(output / "both")["val/loss"].tolist() == [4.0, 1.0]


def test_what_is_kept_and_why(output: Path, upcycle: Upcycle) -> None:
    """Runs that have not finished, or are no sweep's; and directories of packed runs that hold more than the record."""
    before = load_runs(output)
    (output / "r1/checkpoints").mkdir(exist_ok=True)
    (output / "r1/checkpoints/last.ckpt").write_bytes(b"weights")
    (output / "r2/wandb/offline-run-1").mkdir(parents=True)
    (output / "r2/wandb/latest-run").symlink_to(output / "r2/wandb/offline-run-1")
    shutil.move(output / "both", output.parent / "both")
    (output / "both").symlink_to(output.parent / "both")
    write(output, "r4", status="failed")
    write(output, "stranger")
    ended = upcycle("pack", output)
    assert ended.status == 0
    assert ended.out.splitlines()[2:] == [
        f"kept    {output}/both: it is a link",
        f"kept    {output}/r1: it holds checkpoints besides the record",
        f"kept    {output}/r2: it holds wandb besides the record",
        f"kept    {output}/r4: its status is failed",
        f"kept    {output}/stranger: no sweep's index names it",
    ]
    assert directories(output) == ["both", "r1", "r2", "r4", "stranger"]
    assert (output / "r1/metrics.jsonl").exists()
    for name in ("r1", "r2", "r4", "stranger"):
        shutil.rmtree(output / name)
    (output / "both").unlink()
    pd.testing.assert_frame_equal(load_runs(output), before, check_exact=True)


def test_a_run_that_logged_nothing_is_kept(output: Path) -> None:
    write_run(output / "r4", ())
    assert pack(of(output)).kept == {output / "r4": "nothing was logged"}
    assert (output / "r4/run.json").exists()


def test_a_directory_that_changes_meanwhile_is_kept(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def then_change(file: Path, runs: dict[str, Any]) -> None:
        write_pack(file, runs)
        write_run(output / "r2", (4.0, 2.0))

    write_pack = packing.write_pack
    monkeypatch.setattr(packing, "write_pack", then_change)
    assert pack(of(output)).kept == {output / "r2": "it changed meanwhile: pack it again"}
    monkeypatch.undo()
    assert not pack(of(output)).kept
    assert 2.0 in load_runs(output / "r2")["val/loss"].tolist()


def test_nothing_is_deleted_before_it_is_packed(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second pack cannot be written."""
    before = contents(output)
    monkeypatch.setattr(packing, "write_pack", lambda *_given: (_ for _ in ()).throw(OutputError("a full disk")))
    with pytest.raises(OutputError, match="a full disk"):
        pack(of(output))
    assert contents(output) == {**before, ".pack.lock": b""}


def test_a_deletion_that_was_killed_goes_on(output: Path) -> None:
    """What is left of a directory is no run any more, and nothing is lost."""
    before = load_runs(output)
    rows = (output / "r1/metrics.jsonl").read_bytes()
    pack(of(output))
    (output / "r1").mkdir()
    (output / "r1/metrics.jsonl").write_bytes(rows[:100])
    pd.testing.assert_frame_equal(load_runs(output), before, check_exact=True)
    assert len(load_runs(output / "r1")) == 2
    pack(of(output))
    assert directories(output) == []


def test_a_run_that_another_process_works_at(output: Path) -> None:
    with claimed(output / "r2"), pytest.raises(OutputError, match=f"another process is training {output / 'r2'}"):
        pack(of(output))
    assert (output / "r2/metrics.jsonl").exists()
    assert not pack(of(output)).kept
    assert directories(output) == []


def test_bad_input(output: Path, tmp_path: Path, upcycle: Upcycle) -> None:
    upcycle("pack").refused("a required option is missing", remedy="runs=")
    upcycle("pack", tmp_path / "nowhere").refused("there is no such directory", found=str(tmp_path / "nowhere"))
    upcycle("pack", output, "name=group").refused("unknown sweep", found="group", remedy="groups")
    (tmp_path / "empty").mkdir()
    upcycle("pack", tmp_path / "empty").refused("no sweep was started there", found=str(tmp_path / "empty"))
    upcycle("pack", tmp_path / "empty", "name=egt").refused("unknown sweep", found="egt")
    index(tmp_path / "empty", "egt", ("r1", "r2"))
    write(tmp_path / "empty", "r1", status="running")
    upcycle("pack", tmp_path / "empty").refused("no run of the sweeps has finished")
    assert not list((tmp_path / "empty").glob("*.parquet"))
    (output / "damaged.json").write_text("{")
    upcycle("pack", output, "name=damaged").refused("the index of the sweep is damaged")
    (output / "egt.runs.parquet").write_bytes(b"PAR1")
    upcycle("pack", output).refused("a pack of runs cannot be read", found=f"{output}/egt.runs.parquet: ")
    assert directories(output) == ["both", "r1", "r2", "r3"]


def test_damaged_records_are_named_and_nothing_is_done(output: Path) -> None:
    rows = (output / "r1/metrics.jsonl").read_text()
    (output / "r1/metrics.jsonl").write_text(rows[:-3])
    with pytest.raises(RecordError, match=r"r1, row \d+"):
        pack(of(output))
    (output / "r1/metrics.jsonl").write_text(rows)
    content = json.loads((output / "r2/run.json").read_text())
    (output / "r2/run.json").write_text(json.dumps(content | {"schema": 99}))
    with pytest.raises(RecordError, match="another version of the schema"):
        pack(of(output))
    (output / "r2/run.json").write_text("{")
    with pytest.raises(SourceError, match=r"run\.json is not"):
        pack(of(output))
    assert packed(output) == {}
    assert directories(output) == ["both", "r1", "r2", "r3"]
