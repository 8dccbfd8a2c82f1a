"""Who takes whom, beyond plain top-k: limited capacity and expert choice. Pure functions; knows torch and `modeling`.

Shapes: T tokens, N experts, K experts per token, C tokens per expert.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from upcycle.modeling.selection_upcycled_moe import TINY, expert_scores

if TYPE_CHECKING:
    from torch import Tensor

    from upcycle.modeling.selection_upcycled_moe import ExpertSelection


def expert_counts(index_TK: Tensor, experts: int, chosen_TK: Tensor | None = None) -> Tensor:
    """How often each expert is in `index_TK`, where `chosen_TK` is true; int64 [N], without waiting for the device."""
    index = index_TK.flatten()
    ones = torch.ones_like(index) if chosen_TK is None else chosen_TK.flatten().to(index.dtype)
    return index.new_zeros(experts).index_add_(0, index, ones)


def capacity(factor: float, *, tokens: int, top_k: int, experts: int) -> int:
    """Tokens that an expert takes: ceil(factor * tokens * top_k / experts), and at most all (arXiv 2101.03961)."""
    return min(tokens, math.ceil(factor * tokens * top_k / experts))


def within_capacity(scores_TK: Tensor, index_TK: Tensor, *, experts: int, limit: int) -> Tensor:
    """Which pairs of token and expert stay when every expert takes the `limit` best of its own; bool [T, K].

    Among equal scores the earlier token stays.
    """
    expert = index_TK.flatten()
    by_score = scores_TK.flatten().argsort(descending=True, stable=True)
    pairs = by_score[expert[by_score].argsort(stable=True)]  # expert by expert, best first
    counts_N = expert_counts(index_TK, experts)
    first_N = counts_N.cumsum(0) - counts_N
    place = torch.arange(len(pairs), device=pairs.device) - first_N[expert[pairs]]
    return torch.empty_like(pairs, dtype=torch.bool).scatter(0, pairs, place < limit).view_as(index_TK)


def choose_tokens(logits_TN: Tensor, selection: ExpertSelection, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Let every expert choose the `limit` tokens that score highest for it (arXiv 2202.09368).

    K is the largest number of experts that chose one token. A token that fewer chose has padding: experts that did not
    choose it, each at most once, with weight 0. They compute something that counts for nothing, in the output as in all
    gradients.

    Returns:
        weights [T, K] in the logits' dtype, expert indices [T, K], and which pairs are no padding, bool [T, K].
    """
    scores_TN = expert_scores(logits_TN, selection)
    tokens_CN = scores_TN.topk(limit, dim=0).indices
    chosen_TN = torch.zeros_like(scores_TN, dtype=torch.bool).scatter(0, tokens_CN, True)
    top_k = int(chosen_TN.sum(dim=-1).max()) if len(logits_TN) else 1
    index_TK = scores_TN.masked_fill(~chosen_TN, -1.0).topk(top_k, dim=-1).indices
    chosen_TK = chosen_TN.gather(-1, index_TK)
    weights_TK = scores_TN.gather(-1, index_TK) * chosen_TK
    if selection.renormalise or selection.order == "topk_softmax":
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + TINY)
    return weights_TK * selection.scaling_factor, index_TK, chosen_TK
