"""From router logits to experts and their weights, and what routers have in common.

This file travels inside converted checkpoints: it may import only torch and the standard library.

Shapes: T tokens, N experts, K experts per token, G experts per virtual group.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

ROUTER_ORDERS = ("softmax_topk", "topk_softmax", "sigmoid_topk")
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
        group_size: experts that are chosen together; 1 chooses experts one by one.
    """

    top_k: int
    order: str
    renormalise: bool = False
    scaling_factor: float = 1.0
    group_size: int = 1


def expert_scores(logits_TN: torch.Tensor, order: str) -> torch.Tensor:
    """Return each expert's score [T, N] in (0, 1): its sigmoid, or its probability among all experts."""
    return logits_TN.sigmoid() if order == "sigmoid_topk" else logits_TN.softmax(dim=-1)


def select_experts(
    logits_TN: torch.Tensor, selection: ExpertSelection, bias_N: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights [T, K] in the logits' dtype and expert indices [T, K], best first.

    `bias_N` is added to the scores for choosing, never for weighing (arXiv 2408.15664). A group's score is the sum of
    its experts'.
    """
    top_k, group_size, kept_logits = selection.top_k, selection.group_size, selection.order == "topk_softmax"
    scores_TN = expert_scores(logits_TN, selection.order)
    choice_TN = scores_TN if bias_N is None else scores_TN + bias_N
    if group_size > 1:
        group_TK = choice_TN.unflatten(-1, (-1, group_size)).sum(dim=-1).topk(top_k // group_size, dim=-1).indices
        within_G = torch.arange(group_size, device=logits_TN.device)
        index_TK = (group_TK[..., None] * group_size + within_G).flatten(-2)
    else:
        # Two logits may differ where their probabilities, rounded, do not.
        choice_TN = logits_TN if kept_logits and bias_N is None else choice_TN
        index_TK = choice_TN.topk(top_k, dim=-1).indices
    weights_TK = logits_TN.gather(-1, index_TK).softmax(dim=-1) if kept_logits else scores_TN.gather(-1, index_TK)
    if selection.renormalise:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + TINY)
    return weights_TK * selection.scaling_factor, index_TK


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
