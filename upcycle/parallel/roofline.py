"""Estimated time of a training step, and MFU; docs/scaling.md has the model and its errors. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.parallel.communication import KINDS, Kind, Traffic, communication
from upcycle.parallel.compute import TRAINING_PASSES, Compute, compute

if TYPE_CHECKING:
    from collections.abc import Mapping

    from upcycle.parallel.gpu import Gpu
    from upcycle.parallel.step import Step

# Share of a link's peak, chosen as the efficiencies of `compute` were.
LINK_EFFICIENCY = 0.6


@dataclass(frozen=True, kw_only=True)
class StepEstimate:
    """An estimated training step.

    Attributes:
        compute: seconds of computing.
        exposed: seconds of communication that no compute hides, by kind.
        bubble: seconds of waiting for the pipeline to fill and drain.
        mfu: FLOPs of the model, without recomputation, over what the GPUs could do in that time.
    """

    compute: Compute
    exposed: Mapping[Kind, float]
    bubble: float
    mfu: float

    @property
    def seconds(self) -> float:
        return self.compute.total + sum(self.exposed.values()) + self.bubble


def estimate(step: Step, gpu: Gpu) -> StepEstimate:
    """Estimate the time of a step."""
    computed, found = compute(step, gpu), communication(step)
    shares = {"nothing": 0.0, "micro_batch": 1 / step.micro_batches, "step": 1.0}
    exposed, once, left = dict.fromkeys(KINDS, 0.0), 0.0, computed.total
    for behind, share in shares.items():
        together = [(traffic.kind, seconds(traffic, gpu)) for traffic in found if traffic.behind == behind]
        total = sum(duration for _, duration in together)
        hidden = min(total, share * computed.total, left)  # no compute hides two things
        left -= hidden
        for kind, duration in together:
            exposed[kind] += duration * (1 - hidden / total)
        once += total - hidden if behind == "micro_batch" else 0.0
    repeated = computed.total + sum(exposed.values()) - once
    bubble = repeated * (step.layout.pp - 1) / (step.micro_batches * step.chunks)
    workload = step.workload
    tokens = workload.sequences * workload.sequence_length
    flops = TRAINING_PASSES * step.sizes.forward_flops(sequence_length=workload.sequence_length) * tokens
    available = (repeated + once + bubble) * step.layout.world * gpu.flops
    return StepEstimate(compute=computed, exposed=exposed, bubble=bubble, mfu=flops / available)


def seconds(traffic: Traffic, gpu: Gpu) -> float:
    """Seconds of communication over the links that its group spans.

    A ring that leaves a node uses the network of all its members there. Of an all-to-all, what goes to other nodes and
    what stays goes at the same time.
    """
    size, local = traffic.group.size, traffic.group.in_a_node(gpu)
    nvlink, network = LINK_EFFICIENCY * gpu.nvlink, LINK_EFFICIENCY * gpu.network
    if local == size:
        return traffic.nbytes / nvlink
    if traffic.kind == "all-to-all":
        away = (size - local) / (size - 1)
        return traffic.nbytes * max(away / network, (1 - away) / nvlink)
    return traffic.nbytes / (network if traffic.kind == "pipeline" else min(nvlink, local * network))
