"""A sweep's index names every run that was ever planned for it, and is told from other JSON files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from upcycle.errors import RecordError
from upcycle.sweep.config import SweepConfig
from upcycle.sweep.index import read_index, read_indexes, write_index
from upcycle.sweep.plan import Job, SweepPlan

if TYPE_CHECKING:
    from pathlib import Path


def plan(output: Path, name: str, *seeds: int) -> SweepPlan:
    sweep = SweepConfig(
        question="Which?",
        hypothesis="None.",
        metric="val/loss",
        published="nothing",
        seeds=list(seeds),
        retries=0,
        flops_per_second=1.0,
    )
    jobs = tuple(Job(arm="E8", seed=seed, directory=output / f"run-{seed}", overrides=()) for seed in seeds)
    return SweepPlan(name=name, sweep=sweep, arms=(), seeds=seeds, estimates={}, jobs=jobs)


def test_earlier_runs_stay_named(tmp_path: Path) -> None:
    write_index(plan(tmp_path, "egt", 0, 1), tmp_path)
    write_index(plan(tmp_path, "egt", 1, 2), tmp_path)
    index = read_indexes(tmp_path)["egt"]
    assert {run: each["seed"] for run, each in index["runs"].items()} == {"run-0": 0, "run-1": 1, "run-2": 2}
    assert index["question"] == "Which?"


def test_only_indexes_are_read(tmp_path: Path) -> None:
    write_index(plan(tmp_path, "egt", 0), tmp_path)
    write_index(plan(tmp_path, "budget", 0), tmp_path)
    (tmp_path / "other.json").write_text('{"runs": 3}')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "cut_off.json").write_text('{"sweep": "egt", "ru')
    (tmp_path / "no_text.json").write_bytes(b"\xff")
    (tmp_path / "directory.json").mkdir()
    assert sorted(read_indexes(tmp_path)) == ["budget", "egt"]
    assert read_indexes(tmp_path / "nowhere") == {}


@pytest.mark.parametrize("content", ["{", "[]", '{"runs": {}}'])
def test_a_damaged_index_that_is_asked_for(tmp_path: Path, content: str) -> None:
    """And nothing is written over it."""
    (tmp_path / "egt.json").write_text(content)
    with pytest.raises(RecordError, match="the index of the sweep is damaged"):
        read_index(tmp_path, "egt")
    with pytest.raises(RecordError, match="the index of the sweep is damaged"):
        write_index(plan(tmp_path, "egt", 0), tmp_path)
    assert (tmp_path / "egt.json").read_text() == content
    assert read_index(tmp_path, "budget") is None


@pytest.mark.parametrize(
    "content",
    [
        '{"sweep": "egt", "runs": {}}',
        '{"sweep": "egt", "runs": [], "question": "", "hypothesis": "", "published": "", "metric": "val/loss"}',
        '{"sweep": "egt", "runs": {"a": {}}, "question": "", "hypothesis": "", "published": "", "metric": "val/loss"}',
    ],
)
def test_an_index_that_lacks_something_is_said_wherever_it_is_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "egt.json").write_text(content)
    with pytest.raises(RecordError, match="the index of the sweep is damaged"):
        read_indexes(tmp_path)
    with pytest.raises(RecordError, match="the index of the sweep is damaged"):
        read_index(tmp_path, "egt")
