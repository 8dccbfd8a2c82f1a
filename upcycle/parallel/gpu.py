"""What a GPU and the links between GPUs can do; `conf/gpu/` has the vendor's figures. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from upcycle.config import STRICT


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """`gpu=h100`, `gpu=FILE`: peaks as the vendor states them, one direction for links.

    Attributes:
        name: what it is called.
        memory: bytes.
        flops: dense BF16 FLOP/s, without sparsity.
        hbm: bytes/s of its memory.
        nvlink: bytes/s to the other GPUs of its node.
        network: bytes/s to other nodes, per GPU.
        gpus_per_node: GPUs that NVLink connects.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    name: str
    memory: float
    flops: float
    hbm: float
    nvlink: float
    network: float
    gpus_per_node: int


@dataclass(frozen=True, kw_only=True)
class Group:
    """Ranks that communicate: `size` of them, `stride` apart."""

    size: int
    stride: int = 1

    def in_a_node(self, gpu: Gpu) -> int:
        """Members that share a node."""
        return max(1, min(self.size, gpu.gpus_per_node // self.stride))

