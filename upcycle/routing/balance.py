"""Balancing as pure functions: losses, sums over ranks, the step of the bias. Knows torch and `modeling`.

Shapes: T tokens, N experts, L layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import distributed

from upcycle.modeling.selection_upcycled_moe import TINY, by_expert, by_position, expert_scores

if TYPE_CHECKING:
    from torch import Tensor

    from upcycle.modeling.selection_upcycled_moe import ExpertSelection


def router_probability(logits_TN: Tensor, selection: ExpertSelection) -> Tensor:
    """Each expert's probability [T, N], which sum to 1; by positions, to 1/G in each.

    Sigmoids are divided by their sum over the experts that compete (arXiv 2412.19437).
    """
    scores_TN = expert_scores(logits_TN, selection)
    if selection.order != "sigmoid_topk":
        return scores_TN
    scores_TCE = by_position(scores_TN, selection)
    return by_expert(scores_TCE / (scores_TCE.sum(dim=-1, keepdim=True) + TINY)) / selection.competing


def load_balancing_loss(probability_LN: Tensor, load_LN: Tensor) -> Tensor:
    """Switch's auxiliary loss (arXiv 2101.03961), the mean over layers of N * sum_i f_i p_i.

    f_i is expert i's share of all assignments and carries no gradient, p_i its mean probability. The loss is 1 when all
    experts are equally loaded. transformers' `load_balancing_loss_func` differs in two ways: its f_i sum to K, so one
    layer's loss is K times this one; and it averages f and p over the layers before multiplying them, so that layers
    with opposite imbalances cancel.

    Args:
        probability_LN: mean router probability per layer and expert.
        load_LN: assignments per layer and expert.
    """
    share_LN = load_LN / load_LN.sum(dim=-1, keepdim=True).clamp(min=1)
    return load_LN.shape[-1] * (share_LN * probability_LN).sum(dim=-1).mean()


def z_loss(logits_TN: Tensor, selection: ExpertSelection) -> Tensor:
    """Mean over tokens, and positions, of the squared logsumexp of the logits (ST-MoE, arXiv 2202.08906)."""
    return by_position(logits_TN, selection).logsumexp(dim=-1).square().mean()


def sum_over_ranks(load_LN: Tensor) -> Tensor:
    """Loads summed over all processes; as they are where there is one. Every process has to call it."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return load_LN
    total_LN = load_LN.clone()
    distributed.all_reduce(total_LN)
    return total_LN


def bias_step(load_LN: Tensor, *, together: int = 1) -> Tensor:
    """Direction in which each expert's bias moves, -1, 0 or 1: the sign of mean load minus load (arXiv 2408.15664).

    Args:
        load_LN: assignments per layer and expert.
        together: so many neighbouring experts have one load, the sum of theirs, and move as one.
    """
    loads = load_LN.unflatten(-1, (-1, together)).sum(dim=-1)
    steps = torch.sign(loads.sum(dim=-1, keepdim=True) - loads.shape[-1] * loads)
    return steps.repeat_interleave(together, dim=-1)
