"""Memory of the rank that needs most. Knows no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.parallel.sizes import layer, outside

if TYPE_CHECKING:
    from collections.abc import Iterator

    from upcycle.parallel.config import WorkloadConfig
    from upcycle.parallel.layout import Layout
    from upcycle.parallel.sizes import ModelSizes, Weight

BF16, FP32 = 2, 4
ADAM = 2 * FP32
# Logits in bfloat16, their copy in float32 and its gradient.
LOGITS = BF16 + 2 * FP32
# For the CUDA context, buffers of NCCL and fragmentation.
RESERVED = 0.1


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one GPU.

    Attributes:
        weights: what it keeps of them. Megatron: in bfloat16; transformers: its shard in float32.
        gathered: transformers: two layers in bfloat16, one in use and one on its way, and a layer's gradient.
        gradients: in float32.
        optimizer: AdamW's states, and Megatron's float32 weights.
        activations: what the forward pass keeps for the backward pass, and the logits.
    """

    weights: int
    gathered: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gathered + self.gradients + self.optimizer + self.activations


def memory(sizes: ModelSizes, layout: Layout, workload: WorkloadConfig) -> Memory:
    """Memory of the GPU that needs most, in the first or the last stage.

    Megatron's distributed optimizer keeps 2 + 4 bytes per parameter and shares out 12, so 6 + 12/DP; FSDP2 shares out
    all 16.
    """
    stages = (_stage_memory(sizes, layout, workload, last=last) for last in (False, True))
    return max(stages, key=lambda each: each.total)


def _stage_memory(sizes: ModelSizes, layout: Layout, workload: WorkloadConfig, *, last: bool) -> Memory:
    weights = list(stage_weights(sizes, layout, last=last))
    whole = sum(count * math.prod(layout.split(weight)) for weight, count in weights)
    shard = sum(count * layout.sharded(weight) for weight, count in weights)
    activations = _activations(sizes, layout, workload, last=last)
    if layout.engine == "megatron":
        optimizer = (FP32 + ADAM) * shard
        return Memory(
            weights=BF16 * whole, gathered=0, gradients=FP32 * whole, optimizer=optimizer, activations=activations
        )
    one = sum(math.prod(layout.split(weight)) for weight in layer(sizes, moe=True))
    return Memory(
        weights=FP32 * shard,
        gathered=3 * BF16 * one,
        gradients=FP32 * shard,
        optimizer=ADAM * shard,
        activations=activations,
    )


def stage_layers(sizes: ModelSizes, layout: Layout) -> tuple[int, int]:
    """Layers of a stage with experts and without, where those with experts are most."""
    moe = math.ceil(sizes.moe_layers / layout.pp)
    return moe, sizes.layers // layout.pp - moe


def stage_weights(sizes: ModelSizes, layout: Layout, *, last: bool) -> Iterator[tuple[Weight, int]]:
    """The weights of the first or the last stage of the pipeline, and how often they occur."""
    moe, dense = stage_layers(sizes, layout)
    for weight in layer(sizes, moe=True):
        yield weight, moe
    for weight in layer(sizes, moe=False):
        yield weight, dense
    if layout.pp == 1:
        for weight in outside(sizes):
            yield weight, 1
    else:
        # Tied weights are held by both ends of a pipeline.
        yield next(outside(sizes)), 1


def interleaving(sizes: ModelSizes, layout: Layout, workload: WorkloadConfig) -> int:
    """Model chunks of a stage: one per layer, where the schedule allows it (arXiv 2104.04473, 2412.09952)."""
    return sizes.layers // layout.pp if layout.pp > 1 and micro_batches(layout, workload) % layout.pp == 0 else 1


def micro_batches(layout: Layout, workload: WorkloadConfig) -> int:
    """Micro-batches of a step that a rank runs."""
    return workload.sequences // (layout.dp * workload.micro)


def _in_flight(sizes: ModelSizes, layout: Layout, workload: WorkloadConfig, *, last: bool) -> float:
    """Micro-batches whose activations a stage holds at once, with 1F1B, interleaved or not (arXiv 2104.04473)."""
    count, chunks, rank = micro_batches(layout, workload), interleaving(sizes, layout, workload), 0
    if last:
        rank = layout.pp - 1
    if chunks == 1:
        return min(count, layout.pp - rank)
    return min(count * chunks, 2 * (layout.pp - rank - 1) + (chunks - 1) * layout.pp + 1) / chunks


def _activations(sizes: ModelSizes, layout: Layout, workload: WorkloadConfig, *, last: bool) -> int:
    moe, dense = stage_layers(sizes, layout)
    tokens = workload.micro * workload.sequence_length // layout.cp
    kept = moe * layer_activations(sizes, layout, moe=True) + dense * layer_activations(sizes, layout, moe=False)
    if workload.activation_checkpointing:
        largest = layer_activations(sizes, layout, moe=True)
        kept = (moe + dense) * BF16 * sizes.hidden / (layout.tp if layout.sequence_parallel else 1)
    else:
        largest = 0
    logits = LOGITS * sizes.vocab / layout.tp if last or layout.pp == 1 else 0
    in_flight = _in_flight(sizes, layout, workload, last=last)
    return int(tokens * (in_flight * kept + largest + logits))


def layer_activations(sizes: ModelSizes, layout: Layout, *, moe: bool) -> float:
    """Bytes per token (of a CP rank) that a layer keeps for its backward pass, in bfloat16.

    Counted as in arXiv 2205.05198, section 4.1, without dropout and with an attention that keeps no scores. Inputs of
    two norms, of queries, keys and values, and of the FFN: 4 times the hidden size. Queries, keys, values, and what
    attention returns. Of the experts, for each of a token's top_k: the token sent to its expert, gate and up, their
    product, and the output.
    """
    tp, matrices = layout.tp, sizes.matrices
    sequence = tp if layout.sequence_parallel else 1
    attention = 2 * (sizes.heads + sizes.kv_heads) * sizes.head_size / tp
    kept = 4 * sizes.hidden / sequence + attention
    if not moe:
        return BF16 * (kept + matrices * sizes.ffn_width / tp)
    routed = sizes.top_k * ((layout.etp + 1) * sizes.hidden + matrices * sizes.expert_width) / tp
    shared = matrices * sizes.shared_width / sequence
    return BF16 * (kept + routed + shared)
