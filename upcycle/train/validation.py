"""Losses on held-out text, by domain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upcycle.evaluation.losses import domain_losses, perplexity
from upcycle.train.periodic import Periodic

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from upcycle.data.corpus import Corpus
    from upcycle.distributed.ranks import Ranks
    from upcycle.tracking.record import Record
    from upcycle.train.checkpoints import Checkpoints


class Validation(Periodic):
    """Measures the held-out losses.

    Args:
        corpus: the text, with some held out.
        record: where the losses go.
        ranks: the processes that train together; each measures its share.
        checkpoints: told of every loss, to keep the best.
        every: optimizer steps.
        batch_size: windows per forward pass.
        windows: per domain; None takes all.
    """

    def __init__(
        self,
        corpus: Corpus,
        record: Record,
        ranks: Ranks,
        checkpoints: Checkpoints,
        *,
        every: int,
        batch_size: int,
        windows: int | None,
    ) -> None:
        super().__init__(every=every)
        self._corpus, self._record, self._ranks, self._checkpoints = corpus, record, ranks, checkpoints
        self._batch_size, self._windows = batch_size, windows

    def measure(self, step: int, module: Any, trainer: Trainer) -> None:
        with trainer.precision_plugin.forward_context():
            losses = domain_losses(
                module.model,
                self._corpus.held_out,
                batch_size=self._batch_size,
                windows=self._windows,
                ranks=self._ranks,
            )
        mean = sum(loss * tokens for loss, tokens in losses.values()) / sum(tokens for _, tokens in losses.values())
        row: dict[str, float] = {"val/loss": mean, "val/perplexity": perplexity(mean)}
        for domain, (loss, _) in losses.items():
            row[f"val/{domain}/loss"] = loss
            row[f"val/{domain}/nats_per_byte"] = loss / self._corpus.bytes_per_token[domain]
        self._record.log(row, step=step)
        self._checkpoints.improve(mean)
