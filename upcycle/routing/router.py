"""The one router of training. Knows torch, `modeling` and the functions of this room.

Shapes: T tokens, H hidden, N experts, K experts per token, G experts per virtual group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast

from upcycle.modeling.selection_upcycled_moe import BiasedRouter, expert_scores, select_experts
from upcycle.routing.balance import router_probability, z_loss
from upcycle.routing.choice import capacity, choose_tokens, expert_counts, within_capacity
from upcycle.routing.statistics import RoutingSums, measure
from upcycle.routing.ties import shared_rows, tie

if TYPE_CHECKING:
    from upcycle.modeling.selection_upcycled_moe import ExpertSelection
    from upcycle.routing.config import RouterConfig


class Forward(NamedTuple):
    """What balancing needs of a training forward; the first two carry gradients.

    Attributes:
        probability_N: mean router probability of each expert.
        z_loss: scalar.
        load_N: assignments to each expert, before any is dropped, int64.
        tokens: how many there were, int64.
    """

    probability_N: Tensor
    z_loss: Tensor
    load_N: Tensor
    tokens: Tensor


def together(forwards: tuple[Forward, ...]) -> Forward:
    """Several forwards as if their tokens had come in one."""
    if len(forwards) == 1:
        return forwards[0]
    total = torch.stack([each.tokens for each in forwards]).sum()
    return Forward(
        probability_N=torch.stack([each.probability_N * (each.tokens / total) for each in forwards]).sum(dim=0),
        z_loss=torch.stack([each.z_loss * (each.tokens / total) for each in forwards]).sum(),
        load_N=torch.stack([each.load_N for each in forwards]).sum(dim=0),
        tokens=total,
    )


class Router(BiasedRouter):
    """Routes tokens for one MoE block, in place of its native router.

    Args:
        native: the router of the model's own type, with a parameter `weight` [N, H].
        selection: see below.
        options: the options.
        bias_N: see `e_score_correction_bias`.
        indices_first: whether the block around it takes (indices, weights, logits).
        passes: how often a forward pass of the model applies it.

    Attributes:
        weight: the native router's own parameter, [N, H].
        e_score_correction_bias: float32 [N], added to scores for choosing experts only; None where nothing uses it.
        selection: how logits become experts and weights.
        ahead: how they will after the next optimizer step, in the last step before a release; otherwise None.
        masses: where `ahead` is set, sums over the tokens of this step of the weights as they are, and as they would be
            under `ahead`, float64 [2].
        forwarded: of the last training forward pass of the model, one of each time; empty after an optimizer step.
        step_load_N: assignments in all training forwards of this optimizer step; None before the first.
        sums: statistics since they were last reset; None before the first training forward.
        measuring: whether training forwards add to `sums`.
        counted_T: which tokens of the next training forward balancing and statistics are about; None counts all.

    What is counted is no buffer, because DistributedDataParallel overwrites buffers with those of rank 0.
    """

    weight: nn.Parameter

    def __init__(
        self,
        native: nn.Module,
        selection: ExpertSelection,
        options: RouterConfig,
        *,
        bias_N: Tensor | None,
        indices_first: bool = False,
        passes: int = 1,
    ) -> None:
        super().__init__()
        self._parameters = native._parameters  # and no copy of it: FSDP2 exchanges what is in it
        self.register_buffer("e_score_correction_bias", bias_N)
        self.selection, self.options, self._indices_first = selection, options, indices_first
        self._passes = passes
        self.ahead: ExpertSelection | None = None
        self.masses: Tensor | None = None
        self.forwarded: tuple[Forward, ...] = ()
        self.step_load_N: Tensor | None = None
        self.sums: RoutingSums | None = None
        self.measuring = True
        self.counted_T: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route the tokens of x [..., H].

        Returns:
            float32 logits [T, N] without noise, weights [T, K] in the input's dtype, expert indices [T, K], or the
            same from the last to the first. What is dropped for capacity, and padding of expert choice, keeps an index
            and has weight 0.
        """
        x_TH = x.reshape(-1, x.shape[-1])
        with maybe_autocast(device_type=x.device.type, enabled=False):
            logits_TN = self._logits(self._jittered(x_TH.float()))
            noisy_TN = self._noisy(logits_TN)
            weights_TK, index_TK, chosen_TK = self._choose(noisy_TN)
            if self.training:
                kept_TK = self._keep(noisy_TN, index_TK, chosen_TK)
                weights_TK = weights_TK * kept_TK
                self._record(*self._counted(logits_TN, index_TK, chosen_TK, kept_TK))
                if self.ahead:
                    self._look_ahead(*self._counted(noisy_TN, weights_TK))
        weights_TK = weights_TK.to(x.dtype)
        return (index_TK, weights_TK, logits_TN) if self._indices_first else (logits_TN, weights_TK, index_TK)

    @property
    def tied(self) -> bool:
        """Whether the rows of every virtual group are kept equal."""
        return self.selection.groups == "tied"

    def tie(self) -> None:
        """Make the rows of every virtual group equal, if they are to be."""
        if self.tied:
            tie(self.weight, self.selection.granularity)

    def _counted(self, *of_tokens: Tensor) -> tuple[Tensor, ...]:
        return of_tokens if self.counted_T is None else tuple(each[self.counted_T] for each in of_tokens)

    def _logits(self, x_TH: Tensor) -> Tensor:
        if not self.tied:
            return F.linear(x_TH, self.weight.float())
        granularity = self.selection.granularity
        logits_TE = F.linear(x_TH, shared_rows(self.weight.float(), granularity))
        return logits_TE.repeat_interleave(granularity, dim=-1)

    def _look_ahead(self, logits_TN: Tensor, weights_TK: Tensor) -> None:
        assert self.ahead is not None
        with torch.no_grad():
            later_TK, _ = select_experts(logits_TN, self.ahead, self.e_score_correction_bias)
            masses = torch.stack([each.sum(dtype=torch.float64) for each in (weights_TK, later_TK)])
        self.masses = masses if self.masses is None else self.masses + masses

    def _jittered(self, x_TH: Tensor) -> Tensor:
        jitter = self.options.jitter
        if not (self.training and jitter):
            return x_TH
        return x_TH * torch.empty_like(x_TH).uniform_(1 - jitter, 1 + jitter)

    def _noisy(self, logits_TN: Tensor) -> Tensor:
        if not (self.training and self.options.noisy_top_k):
            return logits_TN
        tokens, experts = logits_TN.shape
        if self.selection.groups == "positions":
            return logits_TN + torch.empty_like(logits_TN).normal_(std=self.selection.competing / experts)
        # Noise of its own for every expert would tear apart a virtual group whose logits tie.
        granularity = self.selection.granularity
        groups = logits_TN.new_empty(tokens, experts // granularity).normal_(std=1 / experts)
        return logits_TN + groups.repeat_interleave(granularity, dim=-1)

    def _choose(self, logits_TN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.options.expert_choice:
            limit = self._capacity(logits_TN, self.options.capacity_factor or 1.0)
            return choose_tokens(logits_TN, self.selection, limit)
        weights_TK, index_TK = select_experts(logits_TN, self.selection, self.e_score_correction_bias)
        return weights_TK, index_TK, torch.ones_like(index_TK, dtype=torch.bool)

    def _keep(self, logits_TN: Tensor, index_TK: Tensor, chosen_TK: Tensor) -> Tensor:
        factor = self.options.capacity_factor
        if factor is None or self.options.expert_choice:
            return chosen_TK
        scores_TK = expert_scores(logits_TN.detach(), self.selection).gather(-1, index_TK)
        limit = self._capacity(logits_TN, factor)
        return within_capacity(scores_TK, index_TK, experts=logits_TN.shape[-1], limit=limit)

    def _capacity(self, logits_TN: Tensor, factor: float) -> int:
        tokens, experts = logits_TN.shape
        return capacity(factor, tokens=tokens, top_k=self.selection.top_k, experts=experts)

    def _record(self, logits_TN: Tensor, index_TK: Tensor, chosen_TK: Tensor, kept_TK: Tensor) -> None:
        probability_TN = router_probability(logits_TN, self.selection)
        probability_N, z = probability_TN.mean(dim=0), z_loss(logits_TN, self.selection)
        # Activation checkpointing repeats the forward inside the backward: it must save what the first one saved, and
        # count nothing.
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            with torch.no_grad():
                load_N = expert_counts(index_TK, logits_TN.shape[-1], chosen_TK)
            made = Forward(probability_N, z, load_N, load_N.new_full((), len(logits_TN)))
            # Read only where it has to be: what is read is what torch.compile compiles for.
            self.forwarded = (made,) if self._passes == 1 else (*self.forwarded, made)[-self._passes :]
            self.step_load_N = load_N if self.step_load_N is None else self.step_load_N + load_N
            if self.measuring:
                with torch.no_grad():
                    granularity = self.selection.granularity
                    sums = measure(probability_TN, index_TK, chosen_TK, kept_TK, load_N, granularity=granularity)
                self.sums = sums if self.sums is None else self.sums + sums
