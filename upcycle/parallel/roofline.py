"""Time of a training step and MFU from a roofline; docs/scaling.md says how far off it is. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.parallel.communication import Traffic, communication
from upcycle.parallel.memory import layer_activations

if TYPE_CHECKING:
    from upcycle.parallel.gpu import Gpu
    from upcycle.parallel.step import Step

DENSE_EFFICIENCY = 0.72
HALF_EFFICIENT = 512
LINK_EFFICIENCY = 0.7
TOUCHED = 5
TRAINING_PASSES = 3


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds of a training step.

    Attributes:
        dense: of matrix products outside the experts.
        experts: of matrix products of the experts.
        activations: of reading and writing activations.
        exposed: of communication that no compute hides, by kind.
        bubble: of waiting for the pipeline to fill and drain.
        mfu: model FLOPs over what the GPUs could do in that time.
    """

    dense: float
    experts: float
    activations: float
    exposed: dict[str, float]
    bubble: float
    mfu: float

    @property
    def seconds(self) -> float:
        return self.dense + self.experts + self.activations + sum(self.exposed.values()) + self.bubble


def estimate(step: Step, gpu: Gpu) -> Estimate:
    """Estimate a step's time."""
    sizes, layout, length = step.sizes, step.layout, step.workload.sequence_length
    tokens = step.micro_batches * step.tokens
    passes = TRAINING_PASSES + (1 if step.workload.activation_checkpointing else 0)
    layers = step.moe_layers + step.dense_layers
    per_expert = step.tokens / layout.tp * sizes.top_k * layout.etp * layout.ep / sizes.experts
    grouped = DENSE_EFFICIENCY * per_expert / (per_expert + HALF_EFFICIENT)
    ffn = 2 * sizes.matrices * sizes.hidden
    routed = step.moe_layers * ffn * sizes.top_k * sizes.expert_width / layout.tp
    shared = step.moe_layers * ffn * sizes.shared_width / layout.shared_ways
    other = layers * sizes.attention_flops(sequence_length=length) + step.dense_layers * ffn * sizes.ffn_width
    head = TRAINING_PASSES * 2 * sizes.vocab * sizes.hidden / layout.tp
    dense = tokens * (passes * (other / layout.tp + shared) + head) / (DENSE_EFFICIENCY * gpu.flops)
    experts = tokens * passes * routed / (grouped * gpu.flops)
    kept = step.moe_layers * layer_activations(sizes, layout, moe=True)
    kept += step.dense_layers * layer_activations(sizes, layout, moe=False)
    activations = tokens * TOUCHED * kept / gpu.hbm
    compute = dense + experts + activations
    window = {"nothing": 0.0, "micro_batch": compute / step.micro_batches, "step": compute}
    exposed: dict[str, float] = {}
    for behind in window:
        some = [(t, seconds(t, gpu)) for t in communication(step) if t.behind == behind]
        total = sum(s for _, s in some)
        left = max(0.0, total - window[behind])
        for t, s in some:
            exposed[t.kind] = exposed.get(t.kind, 0.0) + (s * left / total if total else 0)
    steady = compute + sum(exposed.values())
    bubble = steady * (layout.pp - 1) / (step.micro_batches * step.chunks)
    model = TRAINING_PASSES * sizes.forward_flops(sequence_length=length) * step.workload.sequences * length
    return Estimate(
        dense=dense,
        experts=experts,
        activations=activations,
        exposed=exposed,
        bubble=bubble,
        mfu=model / ((steady + bubble) * layout.world * gpu.flops),
    )


def seconds(traffic: Traffic, gpu: Gpu) -> float:
    """Seconds of communication at the bandwidth of the links that the group spans."""
    size, local = traffic.group.size, traffic.group.in_a_node(gpu)
    if local == size:
        return traffic.nbytes / (LINK_EFFICIENCY * gpu.nvlink)
    if traffic.kind == "all-to-all":
        away = (size - local) / (size - 1)
        return traffic.nbytes * max(away / gpu.network, (1 - away) / gpu.nvlink) / LINK_EFFICIENCY
    ring = gpu.network if traffic.kind == "pipeline" else min(gpu.nvlink, local * gpu.network)
    return traffic.nbytes / (LINK_EFFICIENCY * ring)
