"""Options of `parallel.*` and of `upcycle plan`; the defaults are in `conf/`. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Tag

from upcycle.options.config import STRICT, ConversionConfig
from upcycle.parallel.gpu import Gpu, GpuFile
from upcycle.precision.config import QuantiseConfig


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How ranks share the model and the batch (transformers' `DistributedConfig`): world = replicate * fsdp * tp.

    The ranks of one replica hold the experts: ep of them share a copy, fsdp * tp / ep of them shard each expert. With
    search=true null is whatever is best.

    Attributes:
        fsdp: ranks that shard the parameters (FSDP2), and split the batch; null takes what the world leaves.
        tp: ranks that split every matrix outside the experts; null is 1.
        ep: ranks that experts are spread over; null takes all of a replica, fsdp * tp.
        replicate: replicas of the whole, which split the batch too (HSDP); null is 1.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    fsdp: int | None
    tp: int | None
    ep: int | None
    replicate: int | None


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


def _parallel_kind(plain: Any) -> str:
    return "folding" if "pp" in plain else "fsdp"


AnyParallel = Annotated[
    Annotated[ParallelConfig, Tag("fsdp")] | Annotated[FoldingConfig, Tag("folding")], Discriminator(_parallel_kind)
]


def _gpu_kind(plain: Any) -> str:
    return "file" if "file" in plain else "gpu"


AnyGpu = Annotated[Annotated[Gpu, Tag("gpu")] | Annotated[GpuFile, Tag("file")], Discriminator(_gpu_kind)]


@dataclass(frozen=True, kw_only=True)
class PlanConfig(ConversionConfig):
    """`upcycle plan`.

    Attributes:
        format: table or json.
        parallel: plan a training step too, in this layout.
        gpu: what it would run on.
        nodes: of `gpu.gpus_per_node` GPUs.
        search: rank the layouts that fit, trying every degree of `parallel` that is null.
        workload: the training step.
        precision: plan what this recipe of low precision would apply to; float32 and bfloat16 are none.
        quantise: its options.
    """

    format: str
    parallel: AnyParallel | None
    gpu: AnyGpu
    nodes: int
    search: bool
    workload: WorkloadConfig
    precision: str = "bfloat16"
    quantise: QuantiseConfig = QuantiseConfig()
