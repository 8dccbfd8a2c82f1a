"""Seconds that a GPU computes in a training step, from a roofline. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.parallel.memory import BF16, layer_activations

if TYPE_CHECKING:
    from upcycle.parallel.gpu import Gpu
    from upcycle.parallel.step import Step

# Shares of the peak, chosen so that the published MFU of docs/scaling.md come out best.
GEMM_EFFICIENCY = 0.7
ATTENTION_EFFICIENCY = 0.4  # of the whole square of scores, although the causal half is all that is computed
# What is kept for the backward pass is written and read, read again, and its gradient is written and read.
TOUCHES = 5
TRAINING_PASSES = 3  # forward, gradients of inputs, gradients of weights


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Seconds of a step.

    Attributes:
        dense: matrix products outside the experts, the head's included.
        attention: scores and what follows from them.
        experts: matrix products of the experts.
        memory: reading and writing activations.
    """

    dense: float
    attention: float
    experts: float
    memory: float

    @property
    def total(self) -> float:
        return self.dense + self.attention + self.experts + self.memory


def compute(step: Step, gpu: Gpu) -> Compute:
    """What the slowest stage computes, the last, which has the head."""
    sizes, layout, tokens = step.sizes, step.layout, step.tokens
    layers, passes = step.moe_layers + step.dense_layers, TRAINING_PASSES + step.workload.activation_checkpointing
    queries, keys = (heads * sizes.head_size / layout.tp for heads in (sizes.heads, sizes.kv_heads))
    projections = gemm(tokens, sizes.hidden, queries + 2 * keys, gpu) + gemm(tokens, queries, sizes.hidden, gpu)
    dense = layers * projections
    dense += step.dense_layers * _ffn(step, tokens, sizes.ffn_width / layout.tp, gpu)
    dense += step.moe_layers * _ffn(step, tokens, sizes.shared_width / layout.shared_ways, gpu)
    head = gemm(tokens, sizes.hidden, sizes.vocab / layout.tp, gpu)
    scores = 4 * step.workload.sequence_length * queries * tokens / (ATTENTION_EFFICIENCY * gpu.flops)
    per_expert = tokens / layout.tp * sizes.top_k * layout.etp * layout.ep / sizes.experts
    expert = _ffn(step, per_expert, sizes.expert_width / layout.etp, gpu)
    kept = step.moe_layers * layer_activations(sizes, layout, moe=True)
    kept += step.dense_layers * layer_activations(sizes, layout, moe=False)
    return Compute(
        dense=step.micro_batches * (passes * dense + TRAINING_PASSES * head),
        attention=step.micro_batches * passes * layers * scores,
        experts=step.micro_batches * passes * step.moe_layers * sizes.experts / layout.ep * expert,
        memory=step.micro_batches * TOUCHES * tokens * kept / gpu.hbm,
    )


def gemm(rows: float, inner: float, columns: float, gpu: Gpu) -> float:
    """Seconds of a matrix product, whose operands are streamed before they are used.

    So efficiency falls where a dimension is small: with few tokens per expert, narrow experts, much TP or ETP.
    """
    operands = rows * inner + inner * columns + rows * columns
    return 2 * rows * inner * columns / (GEMM_EFFICIENCY * gpu.flops) + BF16 * operands / gpu.hbm


def _ffn(step: Step, tokens: float, width: float, gpu: Gpu) -> float:
    if not width:
        return 0.0
    hidden = step.sizes.hidden
    return gemm(tokens, hidden, (step.sizes.matrices - 1) * width, gpu) + gemm(tokens, width, hidden, gpu)
