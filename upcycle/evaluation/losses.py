"""Losses on held-out text, by domain. Knows models and windows of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from upcycle.data.windows import Windows


@torch.no_grad()
def domain_losses(
    model: nn.Module, held_out: Mapping[str, Windows], *, batch_size: int, windows: int | None
) -> dict[str, tuple[float, int]]:
    """Mean cross entropy in nats per token, and the number of tokens, by domain; the model in evaluation mode.

    Args:
        model: a causal LM of transformers; left in the mode it was in.
        held_out: windows by domain.
        batch_size: windows per forward pass.
        windows: windows used per domain, from the first; None takes all.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    losses = {}
    for domain, dataset in held_out.items():
        used = len(dataset) if windows is None else min(windows, len(dataset))
        total, tokens = 0.0, 0
        for batch in DataLoader(Subset(dataset, range(used)), batch_size=batch_size):
            inputs = {name: values.to(device) for name, values in batch.items()}
            labels = inputs.pop("labels").flatten()
            # Positions keep documents apart only in a model that makes no cache.
            logits = model(**inputs, use_cache=False).logits.flatten(0, 1).float()
            total += float(F.cross_entropy(logits, labels, reduction="none").double().sum())
            tokens += len(labels)
        losses[domain] = (total / tokens, tokens)
    model.train(training)
    return losses
