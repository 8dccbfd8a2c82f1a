"""Memory of the GPU that needs most. Knows no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.parallel.sizes import layer

if TYPE_CHECKING:
    from upcycle.parallel.folding import Folding
    from upcycle.parallel.sizes import ModelSizes, Part
    from upcycle.parallel.step import Step

BF16, FP32 = 2, 4
ADAM = 2 * FP32
LOGITS = BF16 + 2 * FP32  # their copy in float32 and its gradient
# Left to the CUDA context, the buffers of NCCL, and fragmentation.
RESERVED = 0.1


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one GPU.

    Attributes:
        weights: Megatron: those of the stage, in bfloat16; transformers: a shard, in float32.
        gathered: transformers: two layers in float32, one in use and one on its way, and a layer's gradients.
        gradients: in float32.
        optimizer: AdamW's states, and Megatron's float32 weights.
        activations: what the forward pass keeps for the backward pass.
    """

    weights: int
    gathered: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gathered + self.gradients + self.optimizer + self.activations


def memory(step: Step) -> Memory:
    """Memory of a GPU of the first or the last stage, whichever needs more.

    Megatron's distributed optimizer keeps 2 + 4 bytes per parameter and shards 12 over DP, so 6 + 12/DP; FSDP2 shards
    all 16.
    """
    layout, weights = step.layout, list(step.stage_weights())
    whole = sum(count * math.prod(layout.split(weight)) for weight, count in weights)
    shard = sum(count * layout.sharded(weight) for weight, count in weights)
    activations = max(_activations(step, stage=0), _activations(step, stage=layout.pp - 1))
    if layout.engine == "megatron":
        return Memory(
            weights=BF16 * whole,
            gathered=0,
            gradients=FP32 * whole,
            optimizer=(FP32 + ADAM) * shard,
            activations=activations,
        )
    of_a_layer = sum(math.prod(layout.split(weight)) for weight in layer(step.sizes))
    return Memory(
        weights=FP32 * shard,
        gathered=3 * FP32 * of_a_layer,
        gradients=FP32 * shard,
        optimizer=ADAM * shard,
        activations=activations,
    )


def _activations(step: Step, *, stage: int) -> int:
    sizes, layout = step.sizes, step.layout
    moe = layer_activations(sizes, layout)
    kept = sum(step.count(part) * part_activations(sizes, layout, part) for part in sizes.parts)
    per_token = LOGITS * sizes.vocab / layout.tp if stage == layout.pp - 1 else 0.0
    if step.workload.activation_checkpointing:
        kept = sizes.layers // layout.pp * BF16 * sizes.hidden / layout.token_ways
        per_token += moe
    return int(step.tokens * (per_token + _in_flight(step, stage) * kept))


def _in_flight(step: Step, stage: int) -> float:
    """Micro-batches whose activations a stage holds at once: 1F1B, interleaved if it can be (arXiv 2104.04473)."""
    stages, chunks = step.layout.pp, step.chunks
    warm_up = 2 * (stages - stage - 1) + (chunks - 1) * stages if chunks > 1 else stages - stage - 1
    return min(step.micro_batches, (warm_up + 1) / chunks)


def layer_activations(sizes: ModelSizes, layout: Folding) -> float:
    """Bytes that a whole layer with experts keeps, as `part_activations` counts them."""
    attention = 0.0 if sizes.separate else part_activations(sizes, layout, "attention")
    return attention + part_activations(sizes, layout, "moe")


def part_activations(sizes: ModelSizes, layout: Folding, part: Part) -> float:
    """Bytes that a part of a layer keeps for its backward pass, in bfloat16, per token of a CP rank.

    Counted as in arXiv 2205.05198, section 4, without dropout, and with an attention that keeps no scores: the inputs
    of its norm and of itself; queries, keys, values, and what attention returns; gate, up, and their product. For each
    expert of a token, its copy of the token and its output too. Mamba-2 keeps its projections, what was convolved, and
    what the scan and the gated norm return. The kernels of transformers are not fused: a norm keeps a float32 copy and
    the normalised input, an FFN its activated gate.
    """
    fused = layout.engine == "megatron"
    inputs, width = (2, sizes.matrices) if fused else (4, sizes.matrices + 1)
    kept = inputs * sizes.hidden / layout.token_ways
    match part:
        case "attention":
            kept += 2 * (sizes.heads + sizes.kv_heads) * sizes.head_size / layout.tp
        case "mamba2":
            assert sizes.mamba
            kept += (sizes.mamba.rows + sizes.mamba.convolved + 2 * sizes.mamba.channels) / layout.tp
        case "dense":
            kept += width * sizes.ffn_width / layout.tp
        case "moe":
            # ETP gathers the tokens of its ranks and splits the width.
            copies = (layout.etp + 1) * sizes.expert_size + width * sizes.expert_width
            kept += sizes.top_k * copies / layout.tp + width * sizes.shared_width / layout.shared_ways
            kept += 2 * (sizes.latent or 0) / layout.tp
    return BF16 * kept
