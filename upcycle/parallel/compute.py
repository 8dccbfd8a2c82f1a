"""Seconds that a GPU computes in a training step, from a roofline. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.parallel.memory import BF16, part_activations

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
    layers, passes = step.count("attention"), TRAINING_PASSES + step.workload.activation_checkpointing
    queries, keys = (heads * sizes.head_size / layout.tp for heads in (sizes.heads, sizes.kv_heads))
    projections = gemm(tokens, sizes.hidden, queries + 2 * keys, gpu) + gemm(tokens, queries, sizes.hidden, gpu)
    dense = layers * projections
    dense += step.count("mamba2") * _mamba(step, tokens, gpu)
    dense += step.count("dense") * _ffn(step, tokens, sizes.ffn_width / layout.tp, gpu)
    dense += step.count("moe") * _ffn(step, tokens, sizes.shared_width / layout.shared_ways, gpu)
    head = gemm(tokens, sizes.hidden, sizes.vocab / layout.tp, gpu)
    scores = 4 * step.workload.sequence_length * queries * tokens / (ATTENTION_EFFICIENCY * gpu.flops)
    per_expert = tokens / layout.tp * sizes.top_k * layout.etp * layout.ep / sizes.experts
    expert = _ffn(step, per_expert, sizes.expert_width / layout.etp, gpu, size=sizes.expert_size)
    if sizes.latent:
        dense += step.count("moe") * 2 * gemm(tokens / layout.tp, sizes.hidden, sizes.latent, gpu)
    kept = sum(step.count(part) * part_activations(sizes, layout, part) for part in sizes.parts)
    return Compute(
        dense=step.micro_batches * (passes * dense + TRAINING_PASSES * head),
        attention=step.micro_batches * passes * layers * scores,
        experts=step.micro_batches * passes * step.count("moe") * sizes.experts / layout.ep * expert,
        memory=step.micro_batches * TOUCHES * tokens * kept / gpu.hbm,
    )


def gemm(rows: float, inner: float, columns: float, gpu: Gpu) -> float:
    """Seconds of a matrix product, whose operands are streamed before they are used.

    So efficiency falls where a dimension is small: with few tokens per expert, narrow experts, much TP or ETP.
    """
    operands = rows * inner + inner * columns + rows * columns
    return 2 * rows * inner * columns / (GEMM_EFFICIENCY * gpu.flops) + BF16 * operands / gpu.hbm


def _mamba(step: Step, tokens: float, gpu: Gpu) -> float:
    mamba, hidden, tp = step.sizes.mamba, step.sizes.hidden, step.layout.tp
    if mamba is None:
        return 0.0
    projections = gemm(tokens, hidden, mamba.rows / tp, gpu) + gemm(tokens, mamba.channels / tp, hidden, gpu)
    return projections + mamba.scan_flops() / tp * tokens / (ATTENTION_EFFICIENCY * gpu.flops)


def _ffn(step: Step, tokens: float, width: float, gpu: Gpu, *, size: int | None = None) -> float:
    """Seconds of an FFN that takes and returns vectors of the hidden size, or of another one."""
    if not width:
        return 0.0
    size = size or step.sizes.hidden
    return gemm(tokens, size, (step.sizes.matrices - 1) * width, gpu) + gemm(tokens, width, size, gpu)
