"""The shape of a fine-grained MoE: expansion E, granularity G, top-k T, and which layers have it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RouterOrder = Literal["softmax_topk", "topk_softmax", "sigmoid_topk"]
Shared = Literal["copies", "part", "whole"]
Groups = Literal["auto", "free", "tied", "whole", "positions"]
LatentStart = Literal["exact", "compress"]


@dataclass(frozen=True, kw_only=True)
class MoeShape:
    """Fine-grained MoE, arXiv 2410.07524: `E8G8T8` is 64 experts of 1/8 width, 8 active.

    Attributes:
        expansion: E, copies of the dense FFN.
        granularity: G, shards that each FFN is cut into; expert e*G+g holds shard g.
        expert_width: neurons of one expert.
        top_k: T, routed experts active per token.
        router_order: whether the softmax is taken over all experts or over the selected ones; or sigmoids, each
            expert's own, divided by their sum over the selected ones.
        shared: what the shared expert, which every token uses, is made of. `copies`: of further copies of shards.
            `part`: it takes some neurons of the FFN at weight 1, and only the others are cut into shards. `whole`: it
            is the FFN, and routed experts start with a down matrix of zeros.
        shared_width: its neurons, 0 where there is none.
        layers: indices of the layers that become MoE.
        groups: how experts of virtual groups are chosen, as `ExpertSelection` says; auto until the type is known.
        latent: L, the size in which routed experts compute (LatentMoE, arXiv 2601.18089); None: in the hidden size.
    """

    expansion: int
    granularity: int
    expert_width: int
    top_k: int
    router_order: RouterOrder
    shared: Shared
    shared_width: int
    layers: tuple[int, ...]
    groups: Groups
    latent: int | None = None

    @property
    def experts(self) -> int:
        return self.expansion * self.granularity

    @property
    def shared_experts(self) -> int:
        """Experts of the same width that the shared one is as large as, rounded down."""
        return self.shared_width // self.expert_width

    @property
    def name(self) -> str:
        shared = f"S{self.shared_experts}" if self.shared_experts else ""
        return f"E{self.expansion}G{self.granularity}T{self.top_k}{shared}"
