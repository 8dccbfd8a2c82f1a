"""From router logits to experts and their weights, and what routers have in common.

This file travels inside converted checkpoints: it may import only torch and the standard library.

Shapes: T tokens, N experts, K experts per token, G experts per virtual group, E = N / G groups. Expert e * G + g holds
shard position g of the dense FFN.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

ROUTER_ORDERS = ("softmax_topk", "topk_softmax", "sigmoid_topk")
GROUPS = ("free", "tied", "whole", "positions")
# DeepSeek-V3's guard against a sum of 0. Added to a sum of at least 1/N it changes no bit in float32.
TINY = 1e-20


@dataclass(frozen=True, kw_only=True)
class ExpertSelection:
    """How a router turns logits into experts and weights.

    Attributes:
        top_k: experts per token (K).
        order: `softmax_topk` (probabilities over all experts), `topk_softmax` (softmax over the kept logits) or
            `sigmoid_topk` (each expert's own sigmoid, arXiv 2412.19437).
        renormalise: divide the kept weights by their sum.
        scaling_factor: what the weights are multiplied by in the end.
        granularity: experts of a virtual group (G).
        groups: how experts of virtual groups are chosen. `free`: one by one. `tied`: the router's rows are equal within
            a group, and its experts are chosen together; plain top-k chooses the same ones. `whole`: groups are chosen,
            by the sum of their experts' scores. `positions`: of each shard position the best K/G among its E experts,
            softmax and sums within the position, weights over G; so each token gets every shard, whatever the rows
            (close to the mixture of grouped experts of Pangu Pro MoE, arXiv 2505.21411).
    """

    top_k: int
    order: str
    renormalise: bool = False
    scaling_factor: float = 1.0
    granularity: int = 1
    groups: str = "free"

    @property
    def competing(self) -> int:
        """How many sets of experts compete within themselves alone: one for each shard position, or all as one."""
        return self.granularity if self.groups == "positions" else 1


def by_position(values_TN: torch.Tensor, selection: ExpertSelection) -> torch.Tensor:
    """Return [T, C, N / C]: the experts that compete with each other along the last dimension."""
    values_TEC: torch.Tensor = values_TN.unflatten(-1, (-1, selection.competing))
    return values_TEC.transpose(-1, -2)


def by_expert(values_TCE: torch.Tensor) -> torch.Tensor:
    """Return [T, N], the inverse of `by_position`."""
    return values_TCE.transpose(-1, -2).flatten(-2)


def expert_scores(logits_TN: torch.Tensor, selection: ExpertSelection) -> torch.Tensor:
    """Return each expert's score [T, N] in (0, 1): its sigmoid, or its probability among all experts.

    By `positions`, it is its probability within its position over G, so that all of them sum to 1 too.
    """
    if selection.order == "sigmoid_topk":
        return logits_TN.sigmoid()
    if selection.competing == 1:
        return logits_TN.softmax(dim=-1)
    return by_expert(by_position(logits_TN, selection).softmax(dim=-1)) / selection.competing


def select_experts(
    logits_TN: torch.Tensor, selection: ExpertSelection, bias_N: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights [T, K] in the logits' dtype and expert indices [T, K], best first.

    `bias_N` is added to the scores for choosing, never for weighing (arXiv 2408.15664). A group's score is the sum of
    its experts'. By positions, the best experts of all positions come first, then the second ones.
    """
    scores_TN = expert_scores(logits_TN, selection)
    choice_TN = scores_TN if bias_N is None else scores_TN + bias_N
    if selection.groups == "free" and selection.order == "topk_softmax" and bias_N is None:
        choice_TN = logits_TN  # two logits may differ where their probabilities, rounded, do not
    index_TK = _choose(choice_TN, selection)
    return _weigh(logits_TN, scores_TN, index_TK, selection) * selection.scaling_factor, index_TK


def _choose(choice_TN: torch.Tensor, selection: ExpertSelection) -> torch.Tensor:
    top_k, size = selection.top_k, selection.granularity
    if selection.groups == "free":
        return choice_TN.topk(top_k, dim=-1).indices
    within_G = torch.arange(size, device=choice_TN.device)
    if selection.groups == "positions":
        chosen_TGR = by_position(choice_TN, selection).topk(top_k // size, dim=-1).indices
        return by_expert(chosen_TGR * size + within_G[:, None])
    choice_TEG: torch.Tensor = choice_TN.unflatten(-1, (-1, size))
    groups_TR = choice_TEG.sum(dim=-1).topk(top_k // size, dim=-1).indices
    return (groups_TR[..., None] * size + within_G).flatten(-2)


def _weigh(
    logits_TN: torch.Tensor, scores_TN: torch.Tensor, index_TK: torch.Tensor, selection: ExpertSelection
) -> torch.Tensor:
    kept_logits, apart = selection.order == "topk_softmax", selection.competing > 1
    kept = (logits_TN if kept_logits else scores_TN).gather(-1, index_TK)
    if not (kept_logits or selection.renormalise):
        return kept
    if apart:
        kept = by_position(kept, selection)
    kept = kept.softmax(dim=-1) if kept_logits else kept
    if selection.renormalise:
        kept = kept / (kept.sum(dim=-1, keepdim=True) + TINY)
    return by_expert(kept) / selection.competing if apart else kept


class BiasedRouter(nn.Module):
    """A router whose bias for choosing experts, float32 [N] or None, keeps its dtype when the model changes its own."""

    e_score_correction_bias: torch.Tensor | None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        kept_N = self.e_score_correction_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved_N = self.e_score_correction_bias
        if kept_N is not None and moved_N is not None and moved_N.dtype != kept_N.dtype:
            # bfloat16 would lose the bias's small steps.
            self.e_score_correction_bias = kept_N.to(moved_N.device)
        return self
