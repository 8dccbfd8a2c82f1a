"""What a sweep still takes: runs that have finished take nothing, interrupted ones no disk that they have already."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from upcycle.errors import RecordError
from upcycle.sweep.check import Estimate
from upcycle.sweep.config import SweepConfig
from upcycle.sweep.expand import Arm
from upcycle.sweep.plan import Job, SweepPlan
from upcycle.sweep.render import plan_table
from upcycle.tracking.packing import write_pack
from upcycle.tracking.packs import PackedRun
from upcycle.tracking.rows import RowDecoder

if TYPE_CHECKING:
    from pathlib import Path

SMALL, LARGE = 1000, 7000  # bytes of their checkpoints
RATE = 50.0  # FLOP/s


def made(directory: Path, status: str | None, checkpoint: int = 0) -> None:
    """A run that stands as it says, with a checkpoint of so many bytes."""
    if status:
        (directory / "checkpoints").mkdir(parents=True)
        (directory / "checkpoints/last.ckpt").write_bytes(bytes(checkpoint))
        (directory / "run.json").write_text(json.dumps({"schema_version": 1, "status": status}))


@pytest.fixture
def plan(tmp_path: Path) -> SweepPlan:
    """Two arms with two seeds: one run finished, one interrupted, one killed, one not started."""
    sweep = SweepConfig(
        question="Which?",
        hypothesis="None.",
        metric="val/loss",
        published="nothing",
        seeds=[0, 1],
        retries=0,
        flops_per_second=RATE,
    )
    sizes = {"small": SMALL, "large": LARGE}
    estimates = {
        arm: Estimate(model="qwen2_moe", parameters=1, steps=1, tokens=1, flops=10 * disk, disk=disk)
        for arm, disk in sizes.items()
    }
    jobs = tuple(
        Job(arm=arm, seed=seed, directory=tmp_path / f"{arm}-{seed}", overrides=()) for seed in (0, 1) for arm in sizes
    )
    made(tmp_path / "small-0", "finished", SMALL)
    made(tmp_path / "large-0", "interrupted", 3000)
    made(tmp_path / "small-1", "running", SMALL + 50)  # a little more than was thought
    arms = tuple(Arm(name=name, overrides=()) for name in sizes)
    return SweepPlan(name="mine", sweep=sweep, arms=arms, seeds=(0, 1), estimates=estimates, jobs=jobs)


def test_only_what_is_left_counts(plan: SweepPlan) -> None:
    assert [job.directory.name for job in plan.left] == ["large-0", "small-1", "large-1"]
    assert plan.disk(plan.left) == (LARGE - 3000) + 0 + LARGE
    assert plan.flops(plan.left) == 10 * (2 * LARGE + SMALL)
    assert plan.seconds(plan.left) == plan.flops(plan.left) / RATE
    assert plan.flops(plan.jobs) == 20 * (LARGE + SMALL)


def test_a_packed_run_has_finished_unless_its_directory_says_otherwise(plan: SweepPlan, tmp_path: Path) -> None:
    rows = RowDecoder().decode("run", b'{"step": 0, "time": "2026-01-01T00:00:00+00:00"}\n')
    packed = PackedRun(text='{"status": "finished"}', columns=rows)
    write_pack(tmp_path / "mine.runs.parquet", {"large-0": packed, "large-1": packed})
    assert [job.directory.name for job in plan.left] == ["large-0", "small-1"]
    (tmp_path / "mine.runs.parquet").write_bytes(b"PAR1")
    with pytest.raises(RecordError, match="a pack of runs cannot be read"):
        _ = plan.left


@pytest.mark.parametrize(("free", "conflict"), [(2 * LARGE - 3000, False), (2 * LARGE - 3001, True)])
def test_a_sweep_that_is_nearly_finished_fits_on_a_small_disk(plan: SweepPlan, free: int, conflict: bool) -> None:
    """All its checkpoints together would not."""
    assert free < sum(plan.estimates[job.arm].disk for job in plan.jobs)
    console = Console(width=120)
    with console.capture() as printed:
        console.print(plan_table(plan, free=free))
    assert ("conflict" in printed.get()) is conflict
    assert "4 runs (2 arms, seeds 0, 1), 1 finished" in printed.get()
    assert "left: 1.5e+05 of 1.6e+05 FLOPs, 50 min" in printed.get()
