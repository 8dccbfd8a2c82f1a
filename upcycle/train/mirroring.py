"""Calls the mirror of a record as training goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.pytorch import LightningModule, Trainer


class Mirroring(Callback):
    """Hands over what the last step left in the record.

    Args:
        update: does that, and does not raise.
    """

    def __init__(self, update: Callable[[], None]) -> None:
        self._update = update

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._update()
