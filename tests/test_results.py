"""The committed records of the campaign: whole, under their own names, and comparable."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from upcycle.analysis import load_runs
from upcycle.sweep.plan import HASH_LENGTH, NOT_COMPARED
from upcycle.tracking.record import RUN
from upcycle.tracking.versions import recorded, upgraded

LAPTOP = Path(__file__).parent.parent / "analysis/results/laptop"
RUNS = sorted(file.parent.name for file in LAPTOP.glob(f"*/{RUN}"))


@pytest.mark.parametrize("name", RUNS)
def test_a_directory_is_named_by_its_options(name: str) -> None:
    config = recorded(upgraded(json.loads((LAPTOP / name / RUN).read_text())["config"]))
    compared = {key: value for key, value in config.items() if key not in NOT_COMPARED}
    assert hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()[:HASH_LENGTH] == name


def test_every_run_is_finished_and_belongs_to_a_sweep() -> None:
    named = {run for index in LAPTOP.glob("*.json") for run in json.loads(index.read_text())["runs"]}
    assert named >= set(RUNS)
    runs = load_runs(LAPTOP)
    assert set(runs["status"]) == {"finished"}
    assert runs["run"].nunique() == len(RUNS)


def test_all_runs_share_text_source_and_order() -> None:
    runs = load_runs(LAPTOP)
    assert runs["data_hash"].nunique() == 1
    assert runs["source_hash"].dropna().nunique() == 1
    assert (runs.groupby("seed")["order_hash"].nunique() == 1).all()
