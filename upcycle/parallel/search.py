"""Every layout that fits, best first. Knows no torch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from upcycle.errors import ConfigError
from upcycle.parallel.check import checked_layout, divisors
from upcycle.parallel.memory import RESERVED, Memory, memory
from upcycle.parallel.roofline import Estimate, estimate
from upcycle.parallel.step import Step

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from upcycle.parallel.config import FoldingConfig, ParallelConfig, WorkloadConfig
    from upcycle.parallel.gpu import Gpu
    from upcycle.parallel.sizes import ModelSizes


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout with what it needs and takes."""

    step: Step
    memory: Memory
    estimate: Estimate


def candidate(step: Step, gpu: Gpu) -> Candidate:
    """Count memory and time of a layout."""
    return Candidate(step=step, memory=memory(step), estimate=estimate(step, gpu))


def usable_memory(gpu: Gpu) -> float:
    """Bytes of a GPU that a layout may need."""
    return (1 - RESERVED) * gpu.memory


def search(
    config: ParallelConfig | FoldingConfig, sizes: ModelSizes, workload: WorkloadConfig, gpu: Gpu, nodes: int
) -> list[Candidate]:
    """Every layout that fits in memory, the fastest first; what the options give is kept, what is null is tried."""
    found = []
    for option in _options(config, sizes, gpu, nodes):
        try:
            layout = checked_layout(option, sizes, workload, gpu, nodes)
        except ConfigError:
            continue
        step = Step(sizes=sizes, layout=layout, workload=workload)
        if memory(step).total <= usable_memory(gpu):
            found.append(candidate(step, gpu))
    return sorted(found, key=lambda each: each.estimate.seconds)


def _options(
    config: ParallelConfig | FoldingConfig, sizes: ModelSizes, gpu: Gpu, nodes: int
) -> Iterator[ParallelConfig | FoldingConfig]:
    tried: dict[str, Sequence[int | None]] = {
        "fsdp": [None],  # follows from the world
        "tp": divisors(gpu.gpus_per_node),
        "cp": divisors(nodes * gpu.gpus_per_node),
        "pp": divisors(sizes.layers),
        "etp": divisors(gpu.gpus_per_node),
        "ep": divisors(sizes.experts),
    }
    free = [field.name for field in fields(config) if getattr(config, field.name) is None]
    for degrees in itertools.product(*(tried[name] for name in free)):
        yield replace(config, **dict(zip(free, degrees, strict=True)))
