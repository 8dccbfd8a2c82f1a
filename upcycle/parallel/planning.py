"""From options and a conversion to a planned training step: what `upcycle plan parallel=…` prints. Knows no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from upcycle.errors import ConfigError
from upcycle.parallel.communication import communication
from upcycle.parallel.gpu import checked_gpu
from upcycle.parallel.roofline import seconds
from upcycle.parallel.search import Candidate, Request, candidate, search

if TYPE_CHECKING:
    from upcycle.parallel.config import PlanConfig
    from upcycle.parallel.sizes import ModelSizes


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A planned training step.

    Attributes:
        request: what was asked for.
        chosen: the layout asked for, or with `search=true` the fastest.
        ranking: every layout that fits, fastest first; without a search, only the one asked for.
    """

    request: Request
    chosen: Candidate
    ranking: list[Candidate]

    @property
    def fits(self) -> bool:
        """Whether the chosen layout fits in memory."""
        return self.chosen.memory.total <= self.request.usable_memory


def plan_training(config: PlanConfig, sizes: ModelSizes) -> Planned:
    """Plan training a model.

    Raises:
        ConfigError: no layout fits, or a figure is out of range.
    """
    assert config.parallel
    if config.nodes < 1:
        raise ConfigError("nodes is out of range", found=config.nodes, expected="1 or more")
    request = Request(
        parallel=config.parallel,
        sizes=sizes,
        workload=config.workload,
        gpu=checked_gpu(config.gpu),
        nodes=config.nodes,
    )
    ranking = search(request) if config.search else [candidate(request.step(), request.gpu)]
    return Planned(request=request, chosen=ranking[0], ranking=ranking)


def planned_json(planned: Planned) -> dict[str, Any]:
    """Everything that the tables say, of every layout."""
    return {
        "gpu": asdict(planned.request.gpu),
        "nodes": planned.request.nodes,
        "workload": asdict(planned.request.workload),
        "usable_memory": planned.request.usable_memory,
        "fits": planned.fits,
        "layouts": [_candidate_json(each, planned.request) for each in planned.ranking],
    }


def _candidate_json(each: Candidate, request: Request) -> dict[str, Any]:
    estimate = each.estimate
    return {
        "layout": asdict(each.step.layout),
        "micro_batches": each.step.micro_batches,
        "chunks": each.step.chunks,
        "memory": {**asdict(each.memory), "total": each.memory.total},
        "communication": [
            {**asdict(traffic), "seconds": seconds(traffic, request.gpu)} for traffic in communication(each.step)
        ],
        "estimated": {**asdict(estimate), "seconds": estimate.seconds},
    }
