"""Options of `parallel.*`; the defaults are in `conf/parallel/`. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from upcycle.config import STRICT


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
