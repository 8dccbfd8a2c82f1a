"""Every layout that fits, best first; and where one does, when none does. Knows no torch."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING

from upcycle.errors import ConfigError
from upcycle.parallel.check import check_ranges, checked_layout
from upcycle.parallel.config import FoldingConfig, ParallelConfig
from upcycle.parallel.memory import RESERVED, Memory, memory
from upcycle.parallel.rank_layout import divisors, rank_layouts
from upcycle.parallel.roofline import StepEstimate, estimate
from upcycle.parallel.step import Step

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from upcycle.parallel.config import WorkloadConfig
    from upcycle.parallel.gpu import Gpu
    from upcycle.parallel.sizes import ModelSizes

LARGER = [2**power for power in range(8)]
# No published run cuts sequences into shorter pieces (2504.14960, table 5; 2412.09952, table 2), where kernels are
# slower than is estimated.
SHORTEST_PIECE = 4096  # tokens


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be planned.

    Attributes:
        parallel: the layout; what is null follows, or is searched.
        sizes: of the model.
        workload: the training step.
        gpu, nodes: what it runs on.
    """

    parallel: ParallelConfig | FoldingConfig
    sizes: ModelSizes
    workload: WorkloadConfig
    gpu: Gpu
    nodes: int

    def step(self) -> Step:
        """The step in the layout that was asked for.

        Raises:
            ConfigError: the layout does not fit the world, the model or the batch.
        """
        layout = checked_layout(self.parallel, self.sizes, self.workload, self.gpu, self.nodes)
        return Step(sizes=self.sizes, layout=layout, workload=self.workload)

    @property
    def usable_memory(self) -> float:
        """Bytes of a GPU that a layout may need."""
        return (1 - RESERVED) * self.gpu.memory


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A step with what it needs and takes."""

    step: Step
    memory: Memory
    estimate: StepEstimate


def candidate(step: Step, gpu: Gpu) -> Candidate:
    """Count memory and time of a step."""
    return Candidate(step=step, memory=memory(step), estimate=estimate(step, gpu))


def search(request: Request) -> list[Candidate]:
    """Every layout that fits in memory, the fastest first; what is given is kept, what is null is tried.

    Raises:
        ConfigError: none fits, or what is given cannot.
    """
    check_ranges(request.parallel, request.workload)
    nodes, possible = request.nodes, list(_possible(request))
    fitting = [step for step in possible if memory(step).total <= request.usable_memory]
    if not possible:
        raise ConfigError(
            "no layout fits the number of GPUs",
            found=f"nodes {nodes} * {request.gpu.gpus_per_node} = {nodes * request.gpu.gpus_per_node} GPUs",
            expected="a number that the model's sizes, the batch and what is given of parallel divide",
            remedy=_other_nodes(request, range(nodes - 1, 0, -1), [*range(nodes + 1, 2 * nodes), *_larger(nodes)]),
        )
    if not fitting:
        least = min(memory(step).total for step in possible)
        raise ConfigError(
            "no layout fits in memory",
            found=f"{least / 1e9:.1f} GB per GPU at least, with nodes {nodes}",
            expected=f"at most {request.usable_memory / 1e9:.1f} GB of {request.gpu.name}",
            remedy=_other_nodes(request, [], _larger(nodes)),
        )
    return sorted((candidate(step, request.gpu) for step in fitting), key=lambda each: each.estimate.seconds)


def _possible(request: Request) -> Iterator[Step]:
    given = request.parallel
    for parallel in _foldings(request, given) if isinstance(given, FoldingConfig) else _own_layouts(request, given):
        try:
            yield replace(request, parallel=parallel).step()
        except ConfigError:
            continue


def _foldings(request: Request, given: FoldingConfig) -> Iterator[FoldingConfig]:
    nodes, gpu, sizes = request.nodes, request.gpu, request.sizes
    pieces = max(1, request.workload.sequence_length // SHORTEST_PIECE)
    tried = {
        "tp": divisors(gpu.gpus_per_node),
        "cp": [cp for cp in divisors(nodes * gpu.gpus_per_node) if cp <= pieces],
        "pp": divisors(sizes.layers),
        "etp": divisors(gpu.gpus_per_node),
        "ep": divisors(sizes.experts),
    }
    free = [field.name for field in fields(given) if getattr(given, field.name) is None]
    for degrees in itertools.product(*(tried[name] for name in free)):
        yield replace(given, **dict(zip(free, degrees, strict=True)))


def _own_layouts(request: Request, given: ParallelConfig) -> Iterator[ParallelConfig]:
    gpu, sizes = request.gpu, request.sizes
    for layout in rank_layouts(request.nodes * gpu.gpus_per_node, experts=sizes.experts, heads=sizes.kv_heads):
        within_a_node = given.tp or gpu.gpus_per_node % layout.tp == 0
        if within_a_node and all(getattr(given, name) in (None, size) for name, size in asdict(layout).items()):
            yield ParallelConfig(**asdict(layout))


def _larger(nodes: int) -> list[int]:
    """Powers of two, and multiples by them, beyond a number of nodes."""
    return sorted(each for each in {*LARGER, *(nodes * power for power in LARGER)} if each > nodes)


def _other_nodes(request: Request, below: Sequence[int], above: Sequence[int]) -> str | None:
    """The nearest numbers of nodes on which a layout fits."""

    def fits(nodes: int) -> bool:
        there = replace(request, nodes=nodes)
        return any(memory(step).total <= there.usable_memory for step in _possible(there))

    nearest = [next((nodes for nodes in side if fits(nodes)), None) for side in (below, above)]
    found = [str(nodes) for nodes in nearest if nodes]
    return f"set nodes to {' or '.join(found)}" if found else None
