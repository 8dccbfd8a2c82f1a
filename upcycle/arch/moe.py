"""The shape of a fine-grained MoE: expansion E, granularity G, top-k T, and which layers have it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RouterOrder = Literal["softmax_topk", "topk_softmax"]
Groups = Literal["auto", "free", "tied", "whole", "positions"]


@dataclass(frozen=True, kw_only=True)
class MoeShape:
    """Fine-grained MoE, arXiv 2410.07524: `E8G8T8` is 64 experts of 1/8 width, 8 active.

    Attributes:
        expansion: E, copies of the dense FFN.
        granularity: G, shards that each FFN is cut into; expert e*G+g holds shard g.
        top_k: T, routed experts active per token.
        router_order: whether the softmax is taken over all experts or over the selected ones.
        shared_experts: experts of the same width that every token uses.
        layers: indices of the layers that become MoE.
        groups: how experts of virtual groups are chosen, as `ExpertSelection` says; auto until the type is known.
    """

    expansion: int
    granularity: int
    top_k: int
    router_order: RouterOrder
    shared_experts: int
    layers: tuple[int, ...]
    groups: Groups

    @property
    def experts(self) -> int:
        return self.expansion * self.granularity

    @property
    def name(self) -> str:
        shared = f"S{self.shared_experts}" if self.shared_experts else ""
        return f"E{self.expansion}G{self.granularity}T{self.top_k}{shared}"
