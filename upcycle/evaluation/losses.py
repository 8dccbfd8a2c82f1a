"""Losses on held-out text, by domain. Knows models, windows of tokens, and the ranks that share a model."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from upcycle.distributed.ranks import ALONE
from upcycle.models.ahead import before_head

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from upcycle.data.windows import Windows
    from upcycle.distributed.ranks import Ranks
    from upcycle.evaluation.ahead import AheadSums


@torch.no_grad()
def domain_losses(
    model: PreTrainedModel,
    held_out: Mapping[str, Windows],
    *,
    batch_size: int,
    windows: int | None,
    ranks: Ranks = ALONE,
    ahead: AheadSums | None = None,
) -> dict[str, tuple[float, int]]:
    """Mean cross entropy in nats per token, and the number of tokens, by domain; the model in evaluation mode.

    Args:
        model: a causal LM of transformers; left in the mode it was in.
        held_out: windows by domain.
        batch_size: windows per forward pass.
        windows: windows used per domain, from the first; None takes all.
        ranks: the processes over which the model is laid out; each measures its share of the windows.
        ahead: what measures the model's block for multi-token prediction on the same passes; None without one.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    losses = {}
    for domain, dataset in held_out.items():
        used = len(dataset) if windows is None else min(windows, len(dataset))
        left = len(range(ranks.data_rank, used, ranks.layout.data))
        # A rank with a window less than others goes along with their forward passes, and does not count it.
        share = [index % used for index in range(ranks.data_rank, used + ranks.data_rank, ranks.layout.data)]
        total = torch.zeros((), dtype=torch.float64, device=device)
        for batch in DataLoader(Subset(dataset, share), batch_size=batch_size):
            inputs = {name: values.to(device) for name, values in batch.items()}
            labels_BL = inputs.pop("labels")
            with ExitStack() as watching:
                hidden = watching.enter_context(before_head(model)) if ahead else []
                # Positions keep documents apart only in a model that makes no cache.
                logits_BLV = model(**inputs, use_cache=False).logits
            if ahead:
                ahead.add(hidden[0], logits_BLV, labels_BL)
            logits = logits_BLV.flatten(0, 1).float()
            losses_BL = F.cross_entropy(logits, labels_BL.flatten(), reduction="none").view(labels_BL.shape)
            total += losses_BL[: max(0, left)].double().sum()
            left -= len(labels_BL)
        tokens = used * dataset.sequence_length
        losses[domain] = (float(ranks.sum(total)) / tokens, tokens)
    model.train(training)
    return losses


def perplexity(loss: float) -> float:
    """E to a loss in nats per token; infinite where that is more than a number can say."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
