"""Losses on held-out text, by domain."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset

from upcycle.train.module import model_inputs
from upcycle.train.periodic import Periodic

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning.pytorch import Trainer
    from torch import nn
    from torch.utils.data import Dataset

    from upcycle.data.corpus import Corpus
    from upcycle.tracking.record import Record
    from upcycle.train.checkpoints import Checkpoints


@torch.no_grad()
def domain_losses(
    model: nn.Module, held_out: Mapping[str, Dataset[dict[str, torch.Tensor]]], *, batch_size: int, windows: int | None
) -> dict[str, tuple[float, int]]:
    """Mean cross entropy in nats per token, and the number of tokens, by domain; the model in evaluation mode.

    Args:
        model: a causal LM; left in the mode it was in.
        held_out: windows by domain.
        batch_size: windows per forward pass.
        windows: windows used per domain, from the first; None takes all.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    losses = {}
    for domain, dataset in held_out.items():
        used = len(dataset) if windows is None else min(windows, len(dataset))  # type: ignore[arg-type]
        total, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
        for batch in DataLoader(Subset(dataset, range(used)), batch_size=batch_size):
            inputs = {name: value.to(device) for name, value in model_inputs(batch).items()}
            logits = model(**inputs, use_cache=False).logits.flatten(0, 1).float()
            labels = batch["labels"].to(device).flatten()
            total += F.cross_entropy(logits, labels, reduction="none").double().sum()
            tokens += labels.numel()
        losses[domain] = (float(total) / tokens, tokens)
    model.train(training)
    return losses


class Validation(Periodic):
    """Measures the held-out losses.

    Args:
        corpus: the text, with some held out.
        record: where the losses go.
        checkpoints: told of every loss, to keep the best.
        every: optimizer steps.
        batch_size: windows per forward pass.
        windows: per domain; None takes all.
    """

    def __init__(
        self,
        corpus: Corpus,
        record: Record,
        checkpoints: Checkpoints,
        *,
        every: int,
        batch_size: int,
        windows: int | None,
    ) -> None:
        super().__init__(every=every)
        self._corpus, self._record, self._checkpoints = corpus, record, checkpoints
        self._batch_size, self._windows = batch_size, windows

    def measure(self, step: int, module: Any, trainer: Trainer) -> None:
        with trainer.precision_plugin.forward_context():
            losses = domain_losses(
                module.model, self._corpus.held_out, batch_size=self._batch_size, windows=self._windows
            )
        mean = sum(loss * tokens for loss, tokens in losses.values()) / sum(tokens for _, tokens in losses.values())
        row: dict[str, float] = {"val/loss": mean, "val/perplexity": math.exp(mean)}
        for domain, (loss, _) in losses.items():
            row[f"val/{domain}/loss"] = loss
            row[f"val/{domain}/nats_per_byte"] = loss / self._corpus.bytes_per_token[domain]
        self._record.log(row, step=step)
        self._checkpoints.improve(mean)
