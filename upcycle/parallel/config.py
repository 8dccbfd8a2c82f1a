"""Options of `parallel.*` and of `upcycle plan`; the defaults are in `conf/`. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from upcycle.config import STRICT, ConversionConfig


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How ranks share the model and the batch (transformers' `DistributedConfig`): world = replicate * fsdp * tp.

    The ranks of one replica hold the experts: ep of them share a copy, fsdp * tp / ep of them shard each expert.

    Attributes:
        fsdp: ranks that shard the parameters (FSDP2), and split the batch; null takes what the world leaves.
        tp: ranks that split every matrix outside the experts.
        ep: ranks that experts are spread over; null takes all of a replica, fsdp * tp.
        replicate: replicas of the whole, which split the batch too (HSDP).
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    fsdp: int | None
    tp: int
    ep: int | None
    replicate: int


@dataclass(frozen=True, kw_only=True)
class FoldingConfig:
    """How ranks share the model in Megatron-Core (MoE Parallel Folding, arXiv 2504.14960).

    world = tp * cp * dp * pp = etp * ep * edp * pp; dp and edp follow from the world. null is 1, and with search=true
    whatever is best.

    Attributes:
        tp: ranks that split every matrix outside the experts.
        cp: ranks that split every sequence.
        pp: stages of the pipeline.
        etp: ranks that split every matrix of an expert.
        ep: ranks that experts are spread over.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    tp: int | None
    cp: int | None
    pp: int | None
    etp: int | None
    ep: int | None


@dataclass(frozen=True, kw_only=True)
class WorkloadConfig:
    """`workload.*`: what a training step does.

    Attributes:
        sequences: per optimizer step, over all ranks and micro-batches.
        micro: sequences per forward pass and rank.
        sequence_length: tokens per sequence.
        activation_checkpointing: recompute the activations of every layer in the backward pass.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    sequences: int
    micro: int
    sequence_length: int
    activation_checkpointing: bool
