"""What running a conversion takes: processes, their memory, and a time that is extrapolated from a measured rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from upcycle.plan.cost import BASE_MEMORY

if TYPE_CHECKING:
    from upcycle.plan.cost import Cost


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How fast one process wrote in a measured conversion.

    Attributes:
        bytes_per_second: of tensors, from the first byte to the finished output.
        machine: what it was measured on.
        date: when.
    """

    bytes_per_second: float
    machine: str
    date: str


# benchmarks/convert_workers.py with one worker, to two digits of benchmarks/results/convert_workers.json.
MEASURED: Final = Rate(bytes_per_second=9.4e8, machine="x86_64, 2 cores, load average 0.8", date="2026-11-25")


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What a conversion takes on one machine.

    Attributes:
        workers: processes that write; no more than there are files.
        peak_memory: bytes of anonymous memory of all processes together, at most.
        estimated_seconds: an extrapolation: the time if each of them wrote at the measured rate.
        extrapolated_from: that rate.
    """

    workers: int
    peak_memory: int
    estimated_seconds: float
    extrapolated_from: Rate


def effort(cost: Cost, *, workers: int, files: int) -> Effort:
    """Count what a conversion with so many workers takes, where so many files are written."""
    writing = min(workers, files)
    return Effort(
        workers=writing,
        peak_memory=cost.peak_memory if writing == 1 else BASE_MEMORY + writing * cost.peak_memory,
        estimated_seconds=cost.bytes_to_write / (writing * MEASURED.bytes_per_second),
        extrapolated_from=MEASURED,
    )
