"""What running a conversion takes: the extrapolation is from the benchmark's result, and divided by who writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from upcycle.plan.cost import BASE_MEMORY, Cost
from upcycle.plan.effort import MEASURED, effort

FOUND = json.loads((Path(__file__).parents[2] / "benchmarks/results/convert_workers.json").read_text())
COST = Cost(
    padding_parameters=0,
    padding_flops_per_token=0,
    padding_bytes=0,
    dense_parameters=1,
    parameters=8,
    active_parameters=1,
    ahead_parameters=0,
    bytes_to_write=10**12,
    dense_flops_per_token=2,
    flops_per_token=2,
    peak_memory=10**9,
)


def test_the_rate_is_the_measured_one():
    """To two significant digits."""
    assert MEASURED.bytes_per_second == float(f"{FOUND['one_worker_bytes_per_second']:.1e}")
    assert MEASURED.machine == f"{FOUND['environment']['machine']}, load average {FOUND['load_average']:.1f}"
    assert MEASURED.date == FOUND["environment"]["date"]


@pytest.mark.parametrize(("workers", "files", "writing"), [(1, 100, 1), (8, 100, 8), (8, 3, 3)])
def test_time_is_bytes_over_the_rate_of_those_that_write(workers, files, writing):
    found = effort(COST, workers=workers, files=files)
    assert found.workers == writing
    assert found.estimated_seconds == COST.bytes_to_write / (writing * MEASURED.bytes_per_second)
    assert found.extrapolated_from == MEASURED
    twice = effort(replace(COST, bytes_to_write=2 * COST.bytes_to_write), workers=workers, files=files)
    assert twice.estimated_seconds == 2 * found.estimated_seconds


def test_memory_is_of_all_processes():
    assert effort(COST, workers=1, files=4).peak_memory == COST.peak_memory
    assert effort(COST, workers=4, files=4).peak_memory == BASE_MEMORY + 4 * COST.peak_memory
